"""Networks on which users of other tools were let down, each with the group that is derived by hand.

The name of each case says where it comes from: alignment tools (git-re-basin, ZipIt, merging of Stable Diffusion and of
voices) and pruners, whose dependency graphs break on the same patterns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import permgraph as pg

IMAGE = torch.randn(2, 3, 8, 8)
VOICE = (torch.randn(2, 5, 6), torch.randn(2, 2, 1))


def s(n: int) -> float:
    return math.lgamma(n + 1)


class PartialConvolution(nn.Module):
    """FasterNet's: a quarter of the stream is convolved, and all of it goes through a wider layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.split = [width // 4, width - width // 4]
        self.conv = nn.Conv2d(width // 4, width // 4, 3, padding=1, bias=False)
        self.wide = nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(), nn.Conv2d(hidden, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        one, rest = x.split(self.split, 1)
        return x + self.wide(torch.cat([self.conv(one), rest], 1))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """A tensor beside itself: by `cat`, or by `repeat`, or with another one between."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 3)
        self.out = nn.Conv2d(15 if how == "between" else 10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        if self.how == "repeat":
            both = a.repeat(1, 2, 1, 1)
        else:
            both = torch.cat([a, self.b(x).relu(), a] if self.how == "between" else [a, a], 1)
        return self.out(both)  # type: ignore[no-any-return]


class ModulatedConvolution(nn.Module):
    """StyleGAN2's: a kernel for each sample, scaled by its style, all samples as groups of one convolution."""

    def __init__(self, style: int, channels: int, out: int, kernel: int, demodulate: bool = True) -> None:
        super().__init__()
        self.scale, self.demodulate = 1 / math.sqrt(channels * kernel**2), demodulate
        self.weight = nn.Parameter(torch.randn(1, out, channels, kernel, kernel))
        self.modulation = nn.Linear(style, channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        b, c, h, w = x.shape
        _, out, _, kernel, _ = self.weight.shape
        weight = self.scale * self.weight * self.modulation(style).view(b, 1, c, 1, 1)
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8).view(b, out, 1, 1, 1)
        weight = weight.view(b * out, c, kernel, kernel)
        y = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=kernel // 2, groups=b)
        return y.view(b, out, h, w)


class Generator(nn.Module):
    """A mapping network, a constant as input, and modulated convolutions with noise."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(4, 9), nn.LeakyReLU(0.2), nn.Linear(9, 6), nn.LeakyReLU(0.2))
        self.constant = nn.Parameter(torch.randn(1, 5, 4, 4))
        self.conv, self.bias = ModulatedConvolution(6, 5, 7, 3), nn.Parameter(torch.zeros(1, 7, 1, 1))
        self.to_rgb = ModulatedConvolution(6, 7, 3, 1, demodulate=False)

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z)
        h = self.conv(self.constant.repeat(len(z), 1, 1, 1), w)
        return self.to_rgb(F.leaky_relu(h + self.bias, 0.2), w)  # type: ignore[no-any-return]


class PooledHeads(nn.Module):
    """MViT's attention: queries, keys and values pooled by a depthwise convolution that all heads share."""

    def __init__(self, width: int, heads: int, dim: int, residual: bool) -> None:
        super().__init__()
        self.heads, self.dim, self.residual = heads, dim, residual
        self.qkv, self.proj = nn.Linear(width, 3 * heads * dim), nn.Linear(heads * dim, width)
        self.pools = nn.ModuleList(nn.Conv2d(dim, dim, 3, stride=k, padding=1, groups=dim) for k in (1, 2, 2))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        q, k, v = (
            norm(self._pooled(pool, one, height, width))
            for one, pool, norm in zip(qkv.unbind(0), self.pools, self.norms, strict=True)
        )
        y = (q * self.dim**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        y = y + q if self.residual else y
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))  # type: ignore[no-any-return]

    def _pooled(self, pool: nn.Module, x: Tensor, height: int, width: int) -> Tensor:
        b, h, _, d = x.shape
        y: Tensor = pool(x.reshape(b * h, height, width, d).permute(0, 3, 1, 2))
        return y.reshape(b, h, d, -1).transpose(2, 3)


class MViT(nn.Module):
    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 10, 2, 2), nn.LayerNorm(10)
        self.attention, self.head = PooledHeads(10, 3, 4, residual), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        h, w = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        return self.head((x + self.attention(self.norm(x), h, w)).mean(1))  # type: ignore[no-any-return]


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Stream(nn.Module):
    """One of the two streams of a block of Stable Diffusion 3: its modulation, projections and MLP."""

    def __init__(self, width: int, condition: int, heads: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.modulation = nn.Linear(condition, 6 * width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * heads * dim), nn.Linear(heads * dim, width)
        self.q_norm, self.k_norm = RMSNorm(dim), RMSNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def before(self, x: Tensor, c: Tensor) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        shift, scale, *rest = self.modulation(F.silu(c))[:, None].chunk(6, -1)
        y = self.norm1(x) * (1 + scale) + shift
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, self.dim)).permute(2, 0, 3, 1, 4)
        return [self.q_norm(q), self.k_norm(k), v], tuple(rest)

    def after(self, x: Tensor, y: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        gate, shift, scale, gate2 = rest
        x = x + gate * self.proj(y.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale) + shift)  # type: ignore[no-any-return]


class MMDiT(nn.Module):
    """Two streams of tokens with weights of their own, modulated by one condition, that attend to one another."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.time = nn.Linear(3, 8), nn.Linear(5, 9), nn.Linear(4, 6)
        self.streams = nn.ModuleList(nn.ModuleList([Stream(8, 6, 2, 4, 11), Stream(9, 6, 2, 4, 13)]) for _ in range(2))
        self.out, self.out_text = nn.Linear(8, 2), nn.Linear(9, 2)

    def forward(self, image: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        x, y, c = self.image(image), self.text(text), self.time(time)
        for one, other in self.streams:  # type: ignore[misc]
            a, rest = one.before(x, c)
            b, rest_of_other = other.before(y, c)
            joint = F.scaled_dot_product_attention(*(torch.cat(pair, 2) for pair in zip(a, b, strict=True)))
            n = x.shape[1]
            x, y = one.after(x, joint[:, :, :n], rest), other.after(y, joint[:, :, n:], rest_of_other)
        return self.out(x), self.out_text(y)


class Looped(nn.Module):
    """The same block several times, each time behind a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, 7), nn.Linear(7, 2)
        self.up, self.gate, self.down = nn.Linear(7, 9), nn.Linear(7, 9), nn.Linear(9, 7)
        self.norms = nn.ModuleList(nn.LayerNorm(7) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm in self.norms:
            y = norm(x)
            x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.out(x)  # type: ignore[no-any-return]


class CoordinateAttention(nn.Module):
    """Means along the height and along the width, concatenated, mixed, and split again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 2, 1)
        self.mix, self.norm = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
        self.high, self.wide = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        _, _, h, w = x.shape
        both = torch.cat([F.adaptive_avg_pool2d(x, (None, 1)), F.adaptive_avg_pool2d(x, (1, None)).mT], 2)
        high, wide = F.hardswish(self.norm(self.mix(both))).split([h, w], 2)
        return self.out(x * self.high(high).sigmoid() * self.wide(wide.mT).sigmoid())  # type: ignore[no-any-return]


class PatchMerging(nn.Module):
    """Swin's: every second row and column, four times, beside one another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 5, 1), nn.LayerNorm(20)
        self.reduction, self.out = nn.Linear(20, 9, bias=False), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.out(self.reduction(self.norm(x)).relu())  # type: ignore[no-any-return]


def upscaler() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5 * 4, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(5), nn.Conv2d(5, 3, 3))


def downscaler() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.PixelUnshuffle(2), nn.Conv2d(20, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )


def dcgan() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 7 * 4 * 4), nn.Unflatten(1, (7, 4, 4)), nn.BatchNorm2d(7), nn.ReLU(),
        nn.ConvTranspose2d(7, 5, 4, 2, 1, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.ConvTranspose2d(5, 3, 4, 2, 1),
    )  # fmt: skip


def conv(inputs: int, out: int, kernel: int = 1, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out), nn.SiLU()
    )


class Bottleneck(nn.Module):
    def __init__(self, width: int, inner: int, shortcut: bool) -> None:
        super().__init__()
        self.one, self.two, self.shortcut = conv(width, inner, 3), conv(inner, width, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(self.one(x))
        return x + y if self.shortcut else y


class Split(nn.Module):
    """A convolution whose result is halved; bottlenecks go on from the last half, and all is concatenated."""

    def __init__(self, inputs: int, out: int, half: int, inner: int, count: int, shortcut: bool) -> None:
        super().__init__()
        self.one, self.two = conv(inputs, 2 * half), conv((2 + count) * half, out)
        self.inner = nn.ModuleList(Bottleneck(half, inner, shortcut) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.one(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.inner)
        return self.two(torch.cat(parts, 1))  # type: ignore[no-any-return]


class Pyramid(nn.Module):
    """One maximum over another, side by side."""

    def __init__(self, inputs: int, out: int, inner: int) -> None:
        super().__init__()
        self.one, self.two, self.pool = conv(inputs, inner), conv(4 * inner, out), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.one(x)]
        parts.extend(self.pool(parts[-1]) for _ in range(3))
        return self.two(torch.cat(parts, 1))  # type: ignore[no-any-return]


class Detector(nn.Module):
    """A detector after YOLOv8: split stages, a pyramid of maxima, and boxes as expectations over bins."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv(3, 6, 3, 2), conv(10, 8, 3, 2)
        self.first, self.last = Split(6, 10, 4, 5, 2, True), Split(18, 7, 3, 4, 2, False)
        self.pyramid = Pyramid(8, 8, 5)
        self.boxes = nn.ModuleList(nn.Sequential(conv(n, 6, 3), conv(6, 5, 3), nn.Conv2d(5, 4 * 6, 1)) for n in (7, 8))
        self.classes = nn.ModuleList(nn.Sequential(conv(n, 7, 3), nn.Conv2d(7, 3, 1)) for n in (7, 8))
        self.bins = nn.Conv2d(6, 1, 1, bias=False).requires_grad_(False)
        self.bins.weight.data[:] = torch.arange(6.0).view(1, 6, 1, 1)
        self.stride: Tensor
        self.register_buffer("stride", torch.tensor([2.0, 4.0]))

    def forward(self, x: Tensor) -> Tensor:
        high = self.first(self.stem(x))
        low = self.pyramid(self.down(high))
        high = self.last(torch.cat([F.interpolate(low, scale_factor=2.0), high], 1))
        found = []
        for level, y in enumerate((high, low)):
            box = self.boxes[level](y).flatten(2)
            b, _, a = box.shape
            box = self.bins(box.view(b, 4, 6, a).transpose(2, 1).softmax(1)).view(b, 4, a) * self.stride[level]
            found.append(torch.cat([box, self.classes[level](y).flatten(2).sigmoid()], 1))
        return torch.cat(found, 2)


DETECTOR = (
    s(6) + s(10) + s(8)  # stem, first stage, down
    + 2 * s(4) + 2 * s(5)  # of the first stage one half, the other with all that is added to it, and bottlenecks
    + s(5) + s(8)  # the pyramid
    + 2 * s(3) + 2 * s(3) + 2 * s(4) + s(7)  # of the last stage both halves, what each bottleneck makes, and inside
    + 2 * (s(6) + s(5) + s(7))  # both levels of the head
    + s(6)  # the bins, which all boxes share, with the weights that say what each stands for
)  # fmt: skip


class Gated(nn.Module):
    """WaveNet's: dilated convolutions with weight norm, halves that gate one another, and a part that is left aside."""

    def __init__(self, width: int, layers: int, condition: int) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.condition = normed(nn.Conv1d(condition, 2 * width * layers, 1))
        self.inner = nn.ModuleList(normed(nn.Conv1d(width, 2 * width, 3, padding=1)) for _ in range(layers))
        self.outer = nn.ModuleList(
            normed(nn.Conv1d(width, 2 * width if at + 1 < layers else width, 1)) for at in range(layers)
        )

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        g, total = self.condition(g), torch.zeros_like(x)
        for at in range(self.layers):
            y = self.inner[at](x) + g[:, 2 * at * self.width : 2 * (at + 1) * self.width]
            y = self.outer[at](y[:, : self.width].tanh() * y[:, self.width :].sigmoid())
            if at + 1 < self.layers:
                x, total = x + y[:, : self.width], total + y[:, self.width :]
            else:
                total = total + y
        return total


def normed(module: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(module)


class Coupling(nn.Module):
    """A flow that shifts one half by what it makes of the other."""

    def __init__(self, half: int, width: int, condition: int) -> None:
        super().__init__()
        self.half = half
        self.pre, self.post = nn.Conv1d(half, width, 1), nn.Conv1d(width, half, 1)
        self.inner = Gated(width, 2, condition)

    def forward(self, z: Tensor, g: Tensor) -> Tensor:
        kept, moved = z.split([self.half, self.half], 1)
        return torch.cat([kept, moved + self.post(self.inner(self.pre(kept), g))], 1)


class Vocoder(nn.Module):
    """After VITS: a prior, flows with flipped channels between them, transposed convolutions and residual blocks."""

    def __init__(self, flip: bool) -> None:
        super().__init__()
        self.flip = flip
        self.prior, self.speaker = nn.Conv1d(5, 6, 1), nn.Conv1d(2, 4, 1)
        self.flows = nn.ModuleList(Coupling(3, 7, 4) for _ in range(2))
        self.pre, self.up = nn.Conv1d(6, 8, 3, padding=1), normed(nn.ConvTranspose1d(8, 6, 4, 2, 1))
        self.blocks = nn.ModuleList(normed(nn.Conv1d(6, 6, k, padding=k // 2)) for k in (3, 5))
        self.post = nn.Conv1d(6, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor, speaker: Tensor) -> Tensor:
        z, g = self.prior(x), self.speaker(speaker)
        for flow in self.flows:
            z = flow(z, g)
            z = z.flip(1) if self.flip else z
        y = self.up(F.leaky_relu(self.pre(z), 0.1))
        y = sum(y + block(F.leaky_relu(y, 0.1)) for block in self.blocks) / len(self.blocks)
        return self.post(F.leaky_relu(y)).tanh()  # type: ignore[no-any-return]


# Of each coupling: the stream of its gated layers, their two gates, and what is left aside; then speaker, decoder.
VOCODER = 2 * (s(7) + 2 * s(7) + s(7)) + s(4) + s(8) + s(6)


class NormedBlock(nn.Module):
    """A residual block of Stable Diffusion's U-Net: two convolutions behind GroupNorms, and the time between them."""

    def __init__(self, inputs: int, out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inputs), nn.GroupNorm(4, out)
        self.one, self.two = nn.Conv2d(inputs, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.time = nn.Linear(time, out)
        self.shortcut = nn.Conv2d(inputs, out, 1) if inputs != out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.one(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.shortcut(x) + self.two(F.silu(self.norm2(y)))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Skips concatenated under GroupNorms whose cells are none of those that either side has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(2, 5), nn.SiLU(), nn.Linear(5, 6))
        self.first, self.down, self.last = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(8, 3, 1)
        self.high, self.low, self.up = NormedBlock(8, 8, 6), NormedBlock(16, 16, 6), NormedBlock(24, 8, 6)
        self.norm = nn.GroupNorm(4, 8)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        t = self.embed(time)
        skip = self.high(self.first(x), t)
        y = F.interpolate(self.low(self.down(skip), t), scale_factor=2.0)
        return self.last(F.silu(self.norm(self.up(torch.cat([y, skip], 1), t))))  # type: ignore[no-any-return]


UNET = (
    s(5) + s(6)  # the embedding of the time
    + 4 * s(2) + s(3)  # the skip: of its four cells of 2 the first is in a cell of 6 with the other side's last 4
    + 3 * s(4) + 2 * s(2)  # that side: of four cells of 4, the second is half in one cell of 6, half in the next
    + s(4) + 4 * s(2) + s(4) + 4 * s(4)  # inside the two blocks before that
    + 2 * (s(4) + 4 * s(2))  # inside the block after it, and what that makes
)  # fmt: skip


class ResidualMLP(nn.Module):
    """That of git-re-basin's issue 8: a stream of 30 units, and layers of 50 beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 30), nn.Linear(30, 4)
        self.up = nn.ModuleList(nn.Linear(30, 50) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(50, 30) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        for up, down in zip(self.up, self.down, strict=True):
            x = (x + down(up(x).relu())).relu()
        return self.last(x)  # type: ignore[no-any-return]


def parallel() -> nn.Module:
    vit = pytest.importorskip("timm.models.vision_transformer")
    block = vit.ParallelThingsBlock(dim=8, num_heads=2, num_parallel=2, mlp_ratio=1.5, qkv_bias=True, init_values=0.1)
    return nn.Sequential(nn.Linear(3, 8), block, nn.LayerNorm(8), nn.Linear(8, 2))


Case = tuple[Callable[[], nn.Module], tuple[Tensor, ...], float]

CASES: dict[str, Case] = {
    # What is added to the stream, whose quarters are apart; what each small convolution makes, and each bottleneck.
    "FasterNet, Torch-Pruning 219": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 12, 3), PartialConvolution(12, 10), PartialConvolution(12, 11), nn.Conv2d(12, 2, 1)
        ),
        (IMAGE,),
        s(3) + s(9) + 2 * s(3) + s(10) + s(11),
    ),
    "cat twice, Torch-Pruning 146": (lambda: Twice("cat"), (IMAGE,), s(5)),
    "repeat": (lambda: Twice("repeat"), (IMAGE,), s(5)),
    "another between": (lambda: Twice("between"), (IMAGE,), 2 * s(5)),
    "StyleGAN2, only-train-once 57": (Generator, (torch.randn(3, 4),), s(9) + s(6) + s(5) + s(7)),
    "MViT, Torch-Pruning 287": (lambda: MViT(False), (IMAGE,), s(10) + s(3) + 2 * s(4)),
    "MViT with residual pooling": (lambda: MViT(True), (IMAGE,), s(10) + s(3) + s(4)),
    # Streams, condition; in each block the heads, the channels of queries and keys, which share gains from head to
    # head, those of values at each head, and both MLPs.
    "Stable Diffusion 3": (
        MMDiT,
        (torch.randn(2, 5, 3), torch.randn(2, 4, 5), torch.randn(2, 4)),
        s(8) + s(9) + s(6) + 2 * (s(2) + s(4) + 2 * s(4) + s(11) + s(13)),
    ),
    "a block in a loop, llm-compressor 2953": (Looped, (torch.randn(4, 3),), s(7) + s(9)),
    "CoordAtt, Torch-Pruning 503": (CoordinateAttention, (torch.randn(2, 3, 8, 6),), s(6) + s(4)),
    # Stream; of each of two attentions the heads, and at each of them both kinds of channels; of each MLP its units.
    # That both attentions, and both MLPs, could change places, no axis says.
    "ParallelThingsBlock": (parallel, (torch.randn(2, 5, 3),), s(8) + 2 * (s(2) + 4 * s(4)) + 2 * s(12)),
    "patch merging, Torch-Pruning 258": (PatchMerging, (IMAGE,), s(5) + s(9)),
    "PixelShuffle, Torch-Pruning 98": (upscaler, (IMAGE,), s(5)),
    "PixelUnshuffle": (downscaler, (IMAGE,), s(5) + s(4)),
    "DCGAN, Torch-Pruning 125": (dcgan, (torch.randn(2, 6),), s(7) + s(5)),
    "YOLOv8, Torch-Pruning 147": (Detector, (torch.randn(2, 3, 16, 16),), DETECTOR),
    "VITS without flips": (lambda: Vocoder(False), VOICE, VOCODER + 2 * s(3)),
    # The two halves of the channels could move along, if an axis could be another one backwards: they stay put.
    "VITS, RVC 867": (lambda: Vocoder(True), VOICE, VOCODER),
    "Stable Diffusion, rebasin 25": (UNet, (IMAGE, torch.randn(2, 2)), UNET),
    "git-re-basin 8": (ResidualMLP, (torch.randn(4, 8),), s(30) + 2 * s(50)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_users_cases(name: str) -> None:
    make, inputs, expected = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    spec = pg.auto_spec(model, inputs)
    assert spec.log_order() == pytest.approx(expected), str(spec)
    proof = pg.verify(model, spec, inputs)
    assert proof.passed, str(proof)


def test_planted_permutations_of_a_residual_mlp_are_recovered() -> None:
    """Of 100 the users of git-re-basin's issue 8 got 10."""
    torch.manual_seed(0)
    spec = pg.auto_spec(ResidualMLP(), (torch.randn(4, 8),))
    recovered = 0
    for seed in range(100):
        torch.manual_seed(seed)
        a = ResidualMLP().state_dict()
        fit = pg.align(a, spec.random(seed).apply(a), spec=spec, seed=seed)
        recovered += all(torch.equal(a[name], fit.state_dict[name]) for name in a)
    assert recovered == 100
