"""Small networks with every kind of structure, and what they are trained on, for the tests of learned matching."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.general.models import Rms

TOKENS, LENGTH, WIDTH = 7, 6, 12


def turned(x: Tensor) -> Tensor:
    """Rotary positions on (batch, heads, length, size)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 10.0 ** -torch.arange(half, dtype=x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Layer(nn.Module):
    """Attention and feed-forward units, each normalised beforehand: Llama's, or without positions GPT-2's."""

    def __init__(self, rotary: bool, heads: int = 2) -> None:
        super().__init__()
        self.rotary, self.heads = rotary, heads
        norm = Rms if rotary else nn.LayerNorm
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=not rotary) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
        self.gate = nn.Linear(WIDTH, 20) if rotary else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.rotary:
            q, k = turned(q), turned(k)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.gelu(self.up(y)) if self.gate is None else F.silu(self.gate(y)) * self.up(y))


class Reader(nn.Module):
    """A transformer that reads tokens and gives logits at the last place."""

    def __init__(self, rotary: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.position = None if rotary else nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.layer = Layer(rotary)
        self.norm = Rms(WIDTH) if rotary else nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.position is not None:
            x = x + self.position
        return self.head(self.norm(self.layer(x))[:, -1])


class Tied(nn.Module):
    """Units between an embedding and a head that are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embed.weight
        self.up, self.down = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).mean(1)
        return self.head(x + self.down(torch.relu(self.up(x))))


def texts(count: int = 256) -> tuple[Tensor, Tensor]:
    """Tokens, and which of them follows the first place that holds what the last one does."""
    tokens = torch.randint(TOKENS, (count, LENGTH), generator=torch.Generator().manual_seed(0))
    return tokens, tokens[torch.arange(count), tokens.eq(tokens[:, -1:]).long().argmax(1) - 1]


def points(count: int = 256) -> tuple[Tensor, Tensor]:
    """Points in eight dimensions, whose class is the sign pattern of two quadratic forms."""
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] * x[:, 3] > 0).long()


def perceptron(activation: type[nn.Module] = nn.ReLU, norm: bool = False) -> nn.Module:
    """Two hidden layers."""
    normalise = [nn.BatchNorm1d(24)] if norm else []
    return nn.Sequential(nn.Linear(8, 24), *normalise, activation(), nn.Linear(24, 24), activation(), nn.Linear(24, 4))


def low_rank() -> nn.Module:
    """Layers with nothing between them, so that any map may stand there."""
    return nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 20), nn.Tanh(), nn.Linear(20, 4))


def trained(make, data: tuple[Tensor, Tensor], seed: int, steps: int = 120) -> nn.Module:
    """A network of this seed after so many steps over all of the data."""
    torch.manual_seed(seed)
    model = make()
    x, y = data
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():  # gains and biases that differ from where they began
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    model.zero_grad()
    return model.eval()
