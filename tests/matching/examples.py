"""Specs of small networks, written by hand, and pairs of state dicts over them."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from permgraph.spec import PermutationSpec
from permgraph.spec.permutation import Permutation

State = dict[str, torch.Tensor]

SPECS = {
    "mlp": PermutationSpec.parse("""
        l1.weight  16x8   h1 .
        l1.bias    16     h1
        l2.weight  12x16  h2 h1
        l2.bias    12     h2
        l3.weight  5x12   . h2
        groups: h1 16 · h2 12
    """),
    "concatenation": PermutationSpec.parse("""
        c0  6x3x3x3   a . . .
        c1  5x6x3x3   b a . .
        c2  4x11x3x3  c [a + b] . .
        c3  7x15x1x1  . [a + b + c] . .
        groups: a 6 · b 5 · c 4
    """),
    "residual": PermutationSpec.parse("""
        stem   8x3x3x3  c . . .
        conv1  6x8x3x3  m c . .
        conv2  8x6x3x3  c m . .
        square 8x8x1x1  c c . .
        scale  8        c
        head   5x8      . c
        groups: c 8 · m 6
    """),
    "recurrent": PermutationSpec.parse("""
        weight_ih  28x5  (4 h) .
        weight_hh  28x7  (4 h) h
        bias       28    (4 h)
        out        4x7   . h
        groups: h 7
    """),
    "attention": PermutationSpec.parse("""
        q      24x10  (h d1) c
        k      24x10  (h d1) c
        v      24x10  (h d2) c
        o      10x24  c (h d2)
        embed  30x10  . c
        head   7x10   . c
        groups: c 10 · h 4 · d1 6 per h · d2 6 per h
    """),
    "grouped query": PermutationSpec.parse("""
        q      48x10  (k g d1) c
        key    24x10  (k d1) c
        v      24x10  (k d2) c
        o      10x48  c (k g d2)
        embed  30x10  . c
        head   7x10   . c
        groups: c 10 · k 4 · g 2 per k · d1 6 per k · d2 6 per k
    """),
    "grouped convolution": PermutationSpec.parse("""
        c0  12x3x3x3  (g i) . . .
        c1  20x3x3x3  (g o) i . .
        c2  6x20      r (g o)
        c3  4x6       . r
        groups: g 4 · i 3 per g · o 5 per g · r 6
    """),
    "experts": PermutationSpec.parse("""
        router  4x10    e c
        up      4x8x10  e i c
        down    4x10x8  e c i
        embed   20x10   . c
        head    7x10    . c
        groups: e 4 · i 8 per e · c 10
    """),
    "three levels": PermutationSpec.parse("""
        a      24x10  (x y z) c
        b      6x10   (x y) c
        embed  20x10  . c
        out    10x24  c (x y z)
        groups: c 10 · x 2 · y 3 per x · z 4 per x y
    """),
    "fused projection": PermutationSpec.parse("""
        qkv  72x10  (s h d) .
        o    10x24  . (h2 e)
        groups: s 3 fixed · h 4 per s · d 6 per s h · h2 4 · e 6 per h2
    """),
    "recurrent heads": PermutationSpec.parse("""
        inner  3x4x4  h d d
        in     12x6   (h d) .
        out    6x12   . (h d)
        groups: h 3 · d 4 per h
    """),
    "square of heads": PermutationSpec.parse("""
        square  12x12  (h d) (h d)
        in      12x6   (h d) .
        groups: h 3 · d 4 per h
    """),
    "two parents": PermutationSpec.parse("""
        both  3x4x5x6  e h d .
        one   3x7      e .
        two   4x7      h .
        groups: e 3 · h 4 · d 5 per e h
    """),
    "family": PermutationSpec.parse("""
        up    24x6  (s:[1 + 1] {a | b}@s 3) .
        down  5x8   . [a + b]
        groups: a 4 · b 4
    """),
    "one index": PermutationSpec.parse("""
        l1  1x3  h .
        l2  2x1  . h
        groups: h 1
    """),
    "nothing": PermutationSpec.parse("""
        l1  4x3  . .
    """),
}


def state(spec: PermutationSpec, seed: int, dtype: torch.dtype = torch.float32) -> State:
    """A state dict of standard normal tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in spec.shapes.items()
    }


def planted(spec: PermutationSpec, seed: int, noise: float = 0.1) -> tuple[State, State, Permutation]:
    """A, B and the permutation that brings B back to A but for noise."""
    a = state(spec, seed)
    secret = spec.random(seed + 1)
    other = state(spec, seed + 2)
    b = {name: tensor + noise * other[name] for name, tensor in secret.inverse().apply(a).items()}
    return a, b, secret


def inner(a: State, b: State) -> float:
    """The sum of inner products, in float64."""
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def every(spec: PermutationSpec) -> Iterator[Permutation]:
    """Every element of a small group."""
    choices = []
    for group in spec.moving.values():
        rows = math.prod(spec.groups[parent].size for parent in group.parents)
        shape = (*(spec.groups[parent].size for parent in group.parents), group.size)
        all_rows = list(itertools.permutations(range(group.size)))
        choices.append([np.array(c).reshape(shape) for c in itertools.product(all_rows, repeat=rows)])
    for chosen in itertools.product(*choices):
        yield Permutation(spec, dict(zip(spec.moving, chosen, strict=True)))


def best_of_all(spec: PermutationSpec, a: State, b: State, objective: Callable[[State, State], float] = inner) -> float:
    """The best objective in the whole group, by trying every element."""
    return max(objective(a, p.apply(b)) for p in every(spec))


#: Of nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)).
NORMED = PermutationSpec.parse("""
    0.weight               7x4  h .
    0.bias                 7    h
    1.weight               7    h
    1.bias                 7    h
    1.running_mean         7    h
    1.running_var          7    h
    3.weight               3x7  . h
    3.bias                 3    .
    groups: h 7
""")


def renumbered(model: nn.Module, seed: int) -> nn.Module:
    """A copy of a network of the spec `NORMED`, with its units in another order."""
    other = copy.deepcopy(model)
    other.load_state_dict(NORMED.random(seed).apply(model.state_dict()))
    return other


class Tied(nn.Module):
    """An embedding that is the head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.mix(self.embed(x))))
