"""The experiments' own networks: concatenations, four kinds of normalisation, characters, points of the plane.

Together with the demo's they are the architectures on which every experiment runs, with no code for any of them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from networks import Batch, Encoder
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, scaled_dot_product_attention, silu


class DenseNet(nn.Module):
    """Each layer takes the concatenation of all before it (Huang et al. 2017), with GroupNorm over one group."""

    def __init__(self, width: int = 16, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 2, 1)
        self.convs = nn.ModuleList(nn.Conv2d(width * (1 + k), width, 3, 1, 1) for k in range(layers))
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in range(layers))
        self.head = nn.Linear(width * (1 + layers), 10)

    def forward(self, images: Tensor) -> Tensor:
        seen = [relu(self.stem(images))]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            seen.append(relu(norm(conv(torch.cat(seen, 1)))))
        return self.head(torch.cat(seen, 1).mean((2, 3)))


class ConvNet(nn.Module):
    """Four convolutions with one kind of normalisation: "batch", "group" (four groups), "layer" or "none"."""

    def __init__(self, width: int = 32, norm: str = "none") -> None:
        super().__init__()
        sizes = [1, width, width, 2 * width, 2 * width]
        self.convs = nn.ModuleList(
            nn.Conv2d(n, m, 3, 2 if at == 2 else 1, 1) for at, (n, m) in enumerate(pairwise(sizes))
        )
        kinds = {
            "batch": nn.BatchNorm2d,
            "group": lambda m: nn.GroupNorm(4, m),
            "layer": lambda m: nn.GroupNorm(1, m),  # over all channels and positions of one image
            "none": lambda m: nn.Identity(),
        }
        self.norms = nn.ModuleList(kinds[norm](m) for m in sizes[1:])
        self.head = nn.Linear(sizes[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


class Characters(nn.Module):
    """A transformer that reads twenty characters and gives logits for the next."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(ALPHABET), width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.ModuleList(Encoder(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed(text) + self.position[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, -1])


class GPT(nn.Module):
    """A language model of the shape of GPT-2: learnt positions, LayerNorm, biases everywhere, logits at each place."""

    def __init__(self, characters: int, width: int = 96, heads: int = 4, depth: int = 2, context: int = 64) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(characters, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Encoder(width, heads, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed(text) + self.position(torch.arange(text.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PostNormEncoder(Encoder):
    """The same, normalised after each sum, as in BERT."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.down(gelu(self.up(x))))


class BERT(nn.Module):
    """A model of the shape of BERT, which fills in characters that are masked by one of its own."""

    def __init__(self, characters: int, width: int = 96, heads: int = 4, depth: int = 2, context: int = 64) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(characters + 1, width), nn.Embedding(context, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(PostNormEncoder(width, heads) for _ in range(depth))
        self.transform, self.after = nn.Linear(width, width), nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        x = self.norm(self.embed(text) + self.position(torch.arange(text.shape[1])))
        for block in self.blocks:
            x = block(x)
        return self.head(self.after(gelu(self.transform(x))))


class RMSNorm(nn.Module):
    """A vector over the root of its mean square, times a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


class LlamaBlock(nn.Module):
    """Attention with rotary positions and gated units, each normalised beforehand, without biases.

    Several heads of queries read one of keys and values, where there are fewer `key_heads`. With `post_norm`, what each
    half adds to the stream is normalised too, as in Gemma.
    """

    def __init__(self, width: int, heads: int, key_heads: int, post_norm: bool, units: int) -> None:
        super().__init__()
        self.heads, self.key_heads = heads, key_heads
        of_keys = width // heads * key_heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.after1, self.after2 = (RMSNorm(width) if post_norm else nn.Identity() for _ in range(2))
        self.q, self.k, self.v, self.out = (
            nn.Linear(width, size, bias=False) for size in (width, of_keys, of_keys, width)
        )
        self.gate, self.up = (nn.Linear(width, units, bias=False) for _ in range(2))
        self.down = nn.Linear(units, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.norm1(x)
        q, k, v = (
            f(y).view(batch, length, heads, -1).transpose(1, 2)
            for f, heads in ((self.q, self.heads), (self.k, self.key_heads), (self.v, self.key_heads))
        )
        k, v = (each.repeat_interleave(self.heads // self.key_heads, 1) for each in (rotary(k), v))
        mixed = scaled_dot_product_attention(rotary(q), k, v, is_causal=True)
        x = x + self.after1(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        y = self.norm2(x)
        return x + self.after2(self.down(silu(self.gate(y)) * self.up(y)))


def rotary(x: Tensor) -> Tensor:
    """Each pair of channels of queries or keys (batch, heads, length, size) turned by its place."""
    half = x.shape[-1] // 2
    place = torch.arange(x.shape[-2]).float()[:, None]
    angle = place * 10000 ** (-torch.arange(0, 2 * half, 2).float() / (2 * half))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Llama(nn.Module):
    """A language model of the shape of Llama: it reads characters, and gives logits for the next at each place.

    With fewer `key_heads` it is that of Llama 3, with a `tied` head that of its small models, and with `post_norm` and
    a tied head that of Gemma. Each block has two `units` for each channel of the stream, unless it is told how many.
    """

    def __init__(
        self,
        characters: int,
        width: int = 96,
        heads: int = 4,
        depth: int = 2,
        key_heads: int | None = None,
        tied: bool = False,
        post_norm: bool = False,
        units: int | None = None,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.blocks = nn.ModuleList(
            LlamaBlock(width, heads, key_heads or heads, post_norm, units or 2 * width) for _ in range(depth)
        )
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        if tied:
            nn.init.normal_(self.embed.weight, std=width**-0.5)
            self.head.weight = self.embed.weight

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed(text)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PlaneMLP(nn.Module):
    """Two hidden layers for points of the plane in two classes."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 2)

    def forward(self, points: Tensor) -> Tensor:
        return self.head(self.layers(points))


ALPHABET = "\n abcdefghijklmnopqrstuvwxyz.,'()_0"
CONTEXT = 20


def characters(count: int = 4096) -> tuple[Batch, Batch]:
    """Windows of Python's own help texts, which ship with it, and the character that follows each.

    Letters are lowered, digits are all 0, and what is not in the alphabet is left out. Test windows come from the last
    fifth of the text.
    """
    from pydoc_data.topics import topics

    text = "".join(topics[key] for key in sorted(topics)).lower()
    number = {character: at for at, character in enumerate(ALPHABET)} | {
        digit: len(ALPHABET) - 1 for digit in "123456789"
    }
    codes = torch.tensor([number[character] for character in text if character in number])
    cut = len(codes) * 4 // 5

    def windows(part: Tensor, many: int, seed: int) -> Batch:
        at = torch.randint(len(part) - CONTEXT, (many,), generator=torch.Generator().manual_seed(seed))
        taken = part[at[:, None] + torch.arange(CONTEXT + 1)]
        return taken[:, :-1], taken[:, -1]

    return windows(codes[:cut], count, 0), windows(codes[cut:], 1024, 1)


def plane(count: int = 1024) -> tuple[Batch, Batch]:
    """Scikit-learn's two half moons, with noise."""
    from sklearn.datasets import make_moons

    points, labels = make_moons(count + 1024, noise=0.2, random_state=0)
    x, y = torch.tensor(points, dtype=torch.float32), torch.tensor(labels)
    return (x[:count], y[:count]), (x[count:], y[count:])
