"""Small modules of which the whole group is known, each with what it should be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 7), activation, nn.Linear(7, 4))


class Elementwise(nn.Module):
    """A function that is no module, between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(3, 7), nn.Linear(7, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


class Gated(nn.Module):
    """down(f(gate(x)) · up(x)), of two layers or one that is cut in two."""

    def __init__(self, function: Callable[[Tensor], Tensor], fused: bool = False) -> None:
        super().__init__()
        self.function, self.fused = function, fused
        if fused:
            self.both = nn.Linear(3, 14, bias=False)
        else:
            self.gate, self.up = nn.Linear(3, 7, bias=False), nn.Linear(3, 7, bias=False)
        self.down = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(self.function(gate) * up)


class LowRank(nn.Module):
    """A layer with an adapter of rank 3."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a, self.b = nn.Linear(5, 6), nn.Linear(5, 3, bias=False), nn.Linear(3, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x) + 0.5 * self.b(self.a(x))


class Attention(nn.Module):
    """Heads of width 5, each key and value head for some heads of queries."""

    def __init__(self, heads: int = 2, shared: int = 1, fused: bool = False, kernel: bool = True) -> None:
        super().__init__()
        self.heads, self.shared, self.fused, self.kernel = heads, shared, fused, kernel
        if fused:
            self.qkv = nn.Linear(11, 3 * heads * 5)
        else:
            self.q, self.k, self.v = (nn.Linear(11, n * 5) for n in (heads * shared, heads, heads))
        self.o = nn.Linear(heads * shared * 5, 11)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).view(b, t, 3, self.heads, 5).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (f(x).view(b, t, -1, 5).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.kernel:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.shared > 1)
        else:
            y = (q @ k.transpose(-1, -2) * 5**-0.5).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class Rms(nn.Module):
    """RMSNorm in primitive operators; `more` is what Gemma adds to its weight."""

    def __init__(self, n: int, more: float = 0.0) -> None:
        super().__init__()
        self.weight, self.more = nn.Parameter(torch.ones(n)), more

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y * (self.more + self.weight) if self.more else self.weight * y


class Centred(nn.Module):
    """LayerNorm in primitive operators."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.weight * ((x - mean) * torch.rsqrt(variance + 1e-6)) + self.bias


class Block(nn.Module):
    """A residual block of 13 GELU units, with its norm before, after the sum, or also on the branch."""

    def __init__(self, norm: Callable[[int], nn.Module], where: str) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.where = norm(7), nn.Linear(7, 13), nn.Linear(13, 7), where
        self.branch = norm(7) if where == "branch" else nn.Identity()
        self.scale = nn.Parameter(torch.ones(7)) if where == "scaled" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "after":
            return self.norm(x + self.down(F.gelu(self.up(x))))
        y = self.branch(self.down(F.gelu(self.up(self.norm(x)))))
        return x + (y if self.scale is None else self.scale * y)


class Residual(nn.Module):
    """Two blocks on a stream of width 7 between an embedding and a head, which may be one table."""

    def __init__(self, norm: Callable[[int], nn.Module], where: str = "before", tied: bool = False) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(17, 7), nn.Linear(7, 17, bias=False)
        self.blocks, self.norm = nn.Sequential(Block(norm, where), Block(norm, where)), norm(7)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.table(ids))))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], **more: object) -> None:
        super().__init__()
        self.layer, self.head = kind(3, 7, batch_first=True, **more), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


class Viewed(nn.Module):
    """A layer of 12 units that are seen as 3 × 4 on the way through a function, and as 12 by what reads them."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.a, self.function, self.b = nn.Linear(3, 12), function, nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x).view(-1, 3, 4)).flatten(1))


class TalkingHeads(Attention):
    """Attention whose logits are mixed by a matrix over heads before the softmax."""

    def __init__(self) -> None:
        super().__init__(heads=3)
        self.mix = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, -1, 5).transpose(1, 2) for f in (self.q, self.k, self.v))
        logits = torch.einsum("gh,bhqk->bgqk", self.mix, q @ k.transpose(-1, -2))
        return self.o((logits.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))


class Gram(nn.Module):
    """All inner products of the rows of one layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return y @ y.mT


class Cosine(nn.Module):
    """Cosines between the outputs of two towers, as in contrastive models."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 7), nn.Linear(3, 7)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.a(x), dim=-1) @ F.normalize(self.b(x), dim=-1).mT


def convolutions(*between: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 7, 3), *between, nn.Conv2d(7, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)
    )


def vectors() -> Tensor:
    return torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


def sequences(width: int) -> Tensor:
    return torch.randn(6, 6, width, generator=torch.Generator().manual_seed(0))


def tokens() -> Tensor:
    return torch.randint(17, (4, 9), generator=torch.Generator().manual_seed(0))


def images() -> Tensor:
    return torch.randn(20, 3, 9, 9, generator=torch.Generator().manual_seed(0))
