"""The networks that the untidy checkpoints are of, and what is expected of each file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

State = dict[str, torch.Tensor]

NETS = '''"""The networks that most of the files are of."""

import torch
from torch import nn


class Net(nn.Module):
    """A small network whose ``scale`` no checkpoint of today has, and whose ``mask`` old ones have."""

    _keys_to_ignore_on_load_unexpected = [r"first\\.mask"]

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)
        self.register_buffer("scale", torch.ones(6), persistent=False)

    def forward(self, x):
        return self.head(self.second(self.norm(self.first(x * self.scale)).relu()).relu())


class Tied(nn.Module):
    """Its head is its table of tokens."""

    def __init__(self):
        super().__init__()
        self.table, self.hidden, self.out = nn.Embedding(9, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        x = self.table(tokens)
        return self.head(x + self.out(self.hidden(x).relu()))
'''

SHAPES = {
    "first.weight": (12, 6), "first.bias": (12,), "norm.weight": (12,), "norm.bias": (12,), "norm.running_mean": (12,),
    "norm.running_var": (12,), "second.weight": (12, 12), "second.bias": (12,), "head.weight": (3, 12),
    "head.bias": (3,),
}  # fmt: skip
TIED_SHAPES = {
    "table.weight": (9, 8), "hidden.weight": (12, 8), "hidden.bias": (12,), "out.weight": (8, 12), "out.bias": (8,),
}  # fmt: skip


def draw(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, size: float = 1.0) -> State:
    """Random weights; variances are positive."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: t.abs() + 0.5 * size if name.endswith("var") else t for name, t in state.items()}


def near(a: State) -> State:
    """A with a hundredth of noise: B before its units are put in another order."""
    noise = draw(1, {name: tuple(tensor.shape) for name, tensor in a.items()}, 0.01)
    return {name: tensor + noise[name] for name, tensor in a.items()}


def reordered(state: State) -> State:
    """`Net` with its hidden units, and `Tied` with its stream and hidden units, in another order."""
    generator = torch.Generator().manual_seed(2)
    out = dict(state)
    if "table.weight" in state:
        stream, hidden = torch.randperm(8, generator=generator), torch.randperm(12, generator=generator)
        moves = {"table.weight": (None, stream), "hidden.weight": (hidden, stream), "hidden.bias": (hidden,)}
        moves |= {"out.weight": (stream, hidden), "out.bias": (stream,), "head.weight": (None, stream)}
    else:
        p, q = torch.randperm(12, generator=generator), torch.randperm(12, generator=generator)
        moves = {"first.weight": (p,), "first.bias": (p,), "second.weight": (q, p), "second.bias": (q,)}
        moves |= {f"norm.{kind}": (p,) for kind in ("weight", "bias", "running_mean", "running_var")}
        moves |= {"head.weight": (None, q)}
    for name, orders in moves.items():
        for dim, order in enumerate(orders if name in out else ()):
            out[name] = out[name] if order is None else out[name].index_select(dim, order)
    return out


@dataclass(frozen=True)
class Case:
    """A checkpoint B beside A, and what should come of them.

    Attributes:
        name: in a few words, as in the table.
        make: writes B, and A where it is another than ``a.safetensors``, into a folder of their own.
        b: what B is called; the result of `align` has its ending.
        a: what A is called.
        model: of both.
        options: further options of both commands.
        refused: what the one line must say where both refuse; a pair if they say different things, or None where one
            does what it should.
        said: what a note must say.
        where: keys that lead to the state dict in B's file.
        key: what B calls a parameter.
        dtype: of B's tensors, whose rounding the result may differ by.
        tied: whether the network is `Tied`.
    """

    name: str
    make: Callable[[Path], None]
    b: str = "b.pt"
    a: str = "a.safetensors"
    model: str = "net.py:Net"
    options: tuple[str, ...] = ()
    refused: str | tuple[str | None, str | None] | None = None
    said: str = ""
    where: tuple[str, ...] = ()
    key: Callable[[str], str] = str
    dtype: torch.dtype = torch.float32
    tied: bool = False

    @property
    def refusals(self) -> tuple[str | None, str | None]:
        """What `align` and `merge` must say, None where they must do it."""
        return self.refused if isinstance(self.refused, tuple) else (self.refused, self.refused)
