"""Small networks with the structures of real ones, and inputs for them, to match and merge over the whole group."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import permgraph as pg

State = dict[str, Any]


class Attention(nn.Module):
    """Heads of queries, `shared` of them for each head of keys and values, with rotary positions or without."""

    def __init__(self, width: int, heads: int, shared: int = 1, each: int = 4, rotary: bool = False) -> None:
        super().__init__()
        self.each, self.shared, self.rotary = each, shared, rotary
        bias = not rotary
        self.q = nn.Linear(width, heads * shared * each, bias=bias)
        self.k, self.v = (nn.Linear(width, heads * each, bias=bias) for _ in range(2))
        self.o = nn.Linear(heads * shared * each, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, -1, self.each).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.rotary:
            angles = torch.arange(t)[:, None] * torch.tensor([1.0, 0.3]).to(x.dtype).repeat(2)
            cosine, sine = angles.cos(), angles.sin()
            q, k = (y * cosine + torch.cat([-y[..., 2:], y[..., :2]], -1) * sine for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.shared > 1)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class Gated(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], attention: nn.Module, inner: nn.Module, after: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention, self.inner, self.after = norm(8), norm(8), attention, inner, after

    def forward(self, x: Tensor) -> Tensor:
        if self.after:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.inner(x))
        x = x + self.attention(self.norm1(x))
        return x + self.inner(self.norm2(x))


class ViT(nn.Module):
    """Patches, LayerNorm before, positions, GELU, the mean over places."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.positions = nn.Conv2d(1, 8, 2, 2), nn.Parameter(torch.zeros(9, 8))
        inner = [nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 8)) for _ in range(2)]
        self.blocks = nn.Sequential(*(Block(nn.LayerNorm, Attention(8, 2), each, False) for each in inner))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


class Llama(nn.Module):
    """RMSNorm, rotary positions, grouped queries, SwiGLU, an untied head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(11, 8), nn.RMSNorm(8, eps=1e-5), nn.Linear(8, 11, bias=False)
        norm = lambda width: nn.RMSNorm(width, eps=1e-5)  # noqa: E731
        self.blocks = nn.Sequential(*(Block(norm, Attention(8, 2, 2, 4, True), Gated(8, 9), False) for _ in range(2)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.table(ids))))


class Bert(nn.Module):
    """LayerNorm after the sum: the stream keeps its permutations."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 5)
        inner = nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 8))
        self.block = Block(nn.LayerNorm, Attention(8, 2), inner, True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block(self.norm(self.table(ids)))[:, 0])


class Mixture(nn.Module):
    """A pre-norm block whose experts are modules of their own, two of them for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.before, self.norm = nn.RMSNorm(8, eps=1e-5), nn.RMSNorm(8, eps=1e-5)
        self.router, self.experts = nn.Linear(8, 3, bias=False), nn.ModuleList(Gated(8, 9) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y = self.before(x)
        weights, chosen = self.router(y).softmax(-1).topk(2, -1)
        for number, expert in enumerate(self.experts):
            x = x + (weights * (chosen == number)).sum(-1, keepdim=True) * expert(y)
        return self.head(self.norm(x))


def relu_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 5))


def normed_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 5))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": relu_mlp,
    "normed mlp": normed_mlp,
    "vit": ViT,
    "llama": Llama,
    "bert": Bert,
    "mixture": Mixture,
}


def inputs(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    if name == "vit":
        return torch.randn(6, 1, 6, 6, generator=generator, dtype=torch.float64)
    if name in ("llama", "bert", "mixture"):
        return torch.randint(11, (4, 6), generator=generator)
    return torch.randn(8, 4, generator=generator, dtype=torch.float64)


@cache
def spec_of(name: str) -> pg.PermutationSpec:
    x = inputs(name)
    given = (x if x.dtype == torch.long else x.float(),)
    return pg.auto_spec(NETWORKS[name]().eval(), given, symmetry="general", modules=name == "mixture")


def network(name: str, seed: int) -> nn.Module:
    """A network with random weights in float64; vectors such as gains and biases are near one or zero as they were."""
    generator = torch.Generator().manual_seed(seed)
    model = NETWORKS[name]().double().eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            ones = bool((tensor == 1).all())
            tensor.data = (1 + 0.3 * drawn).abs() + 0.2 if ones else drawn / max(tensor.shape[-1], 4) ** 0.5
    return model


def at(name: str, state: State) -> nn.Module:
    """The network with these weights."""
    model = NETWORKS[name]().double().eval()
    model.load_state_dict(state)
    return model


def output(name: str, state: State) -> Tensor:
    """What it computes."""
    with torch.no_grad():
        found: Tensor = at(name, state)(inputs(name))
    return found


def away(name: str, one: State, other: State) -> float:
    """How far apart two states' functions are, relative to the first's size."""
    first, second = output(name, one), output(name, other)
    return float((first - second).abs().max() / first.abs().max())


def noisy(name: str, state: State, share: float, seed: int) -> State:
    """A state with noise of this share of each tensor's size.

    Statistics and integers stay, and gains that are given to the other network, since what reads them takes them up.
    """
    still = spec_of(name).general_gains
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, tensor in state.items():
        out[key] = tensor.clone()
        if tensor.is_floating_point() and "running" not in key and key not in still:
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            out[key] += share * tensor.norm() / max(tensor.numel(), 1) ** 0.5 * drawn
    return out


def distance(one: State, other: State) -> float:
    """The Euclidean distance between two states."""
    gaps = [(one[n] - other[n]).double().square().sum() for n in one if one[n].is_floating_point()]
    return float(torch.stack(gaps).sum().sqrt())


def planted(name: str, count: int, seed: int, share: float = 0.02) -> tuple[list[State], list[State]]:
    """Noisy copies of one network, and the same each under a random element of the whole group."""
    truth, spec = network(name, seed).state_dict(), spec_of(name)
    copies = [noisy(name, truth, share, seed * 100 + number) for number in range(count)]
    return copies, [spec.random(seed * 100 + 50 + n).apply(copy) for n, copy in enumerate(copies)]
