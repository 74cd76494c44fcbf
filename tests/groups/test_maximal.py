"""Nothing is missed: a numeric search for symmetries outside the inferred group, which reads no operator.

A *move* swaps two indices of one axis of one parameter, where the axis is any factor of a dimension: for a dimension
of n, written as (outer, swapped, inner) in every way, at all outer indices or at one; for n = m·m, on both factors at
once; in parameters of three and more dimensions, at one index of another dimension only. For each set of dimensions
that the graph of constraints ties together, all combinations of at most one move a dimension are tried where they are
few enough, and otherwise a random choice of them in which dimensions of one size mostly move alike. Each that preserves
the function on random weights must be an element of the inferred group, which SymPy decides on the parameters'
elements.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from sympy.combinatorics import Permutation as Sympy
from sympy.combinatorics import PermutationGroup
from torch import Tensor, nn

import permgraph as pg
from tests.groups.test_layouts import Net, lin, par

FEW = 20_000
Slot = tuple[str, int]


def swaps(n: int) -> dict[tuple[int, ...], Tensor]:
    """Every swap of two indices of a factor of n, by its place (outer, swapped, inner, i, j, at): as an index of n."""
    found: dict[tuple[int, ...], Tensor] = {}
    for outer in (d for d in range(1, n + 1) if n % d == 0):
        for inner in (d for d in range(1, n // outer + 1) if (n // outer) % d == 0):
            middle = n // outer // inner
            for (i, j), at in itertools.product(itertools.combinations(range(middle), 2), range(-1, outer)):
                index = torch.arange(n).view(outer, middle, inner).clone()
                rows = slice(None) if at < 0 else at
                index[rows, [i, j]] = index[rows, [j, i]]
                if not any(torch.equal(index.flatten(), known) for known in found.values()):
                    found[outer, middle, inner, i, j, at] = index.flatten()
    root = math.isqrt(n)
    for i, j in itertools.combinations(range(root), 2) if root * root == n else ():  # an axis times itself
        swapped = torch.arange(root)
        swapped[[i, j]] = swapped[[j, i]]
        found[root, root, 0, i, j, -1] = torch.arange(n).view(root, root)[swapped][:, swapped].flatten()
    return found


def moves(shape: torch.Size, dim: int) -> dict[tuple[Any, ...], Tensor]:
    """Every move along one dimension, as an index of the parameter's elements."""
    places = torch.arange(shape.numel()).view(shape)
    found = {}
    for key, index in swaps(shape[dim]).items():
        moved = places.index_select(dim, index)
        found[(*key, -1, -1)] = moved.flatten()
        for other in range(len(shape)) if len(shape) > 2 else ():
            for at in range(shape[other]) if other != dim else ():
                partly = places.clone()
                partly.select(other, at).copy_(moved.select(other, at))
                found[(*key, other, at)] = partly.flatten()
    return found


class Search:
    """The search over one model."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.model = model.double().eval()
        self.inputs = tuple(t.double() if t.is_floating_point() else t for t in inputs)
        self.spec = pg.auto_spec(self.model, self.inputs)
        generator = torch.Generator().manual_seed(1)
        self.weights = {
            name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in model.named_parameters()
        }
        self.start = dict(zip(self.weights, self._starts(), strict=True))
        self.group = self._group()
        self.reference = self.outputs({})[0]

    def _starts(self) -> Iterator[int]:
        return itertools.accumulate((w.numel() for w in list(self.weights.values())[:-1]), initial=0)

    def outputs(self, index: dict[str, Tensor]) -> Tensor:
        """The outputs with elements taken by these indices (count, elements), one row for each."""
        count = len(next(iter(index.values()))) if index else 1
        stacked = {n: w.flatten()[index[n]].view(-1, *w.shape) if n in index else w.expand(count, *w.shape)
                   for n, w in self.weights.items()}  # fmt: skip

        def run(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.model, weights, self.inputs)

        return torch.vmap(run, randomness="error")(stacked).flatten(1)

    def _group(self) -> PermutationGroup:
        size = sum(w.numel() for w in self.weights.values())
        generators = [Sympy(size - 1)]
        identity = pg.Permutation.identity(self.spec)
        for name in self.spec.moving:
            rows = identity.arrays[name]
            for place in itertools.product(*(range(n) for n in rows.shape[:-1])):
                for i in range(rows.shape[-1] - 1):
                    arrays = {group: array.copy() for group, array in identity.arrays.items()}
                    arrays[name][(*place, i)], arrays[name][(*place, i + 1)] = i + 1, i
                    generators.append(self._element(pg.Permutation(self.spec, arrays)))
        return PermutationGroup(*generators)

    def _element(self, permutation: pg.Permutation) -> Sympy:
        return self._sympy({n: permutation.apply_to(n, torch.arange(w.numel()).view(w.shape)).flatten()
                            for n, w in self.weights.items()})  # fmt: skip

    def _sympy(self, index: dict[str, Tensor]) -> Sympy:
        image: list[int] = []
        for name, weight in self.weights.items():
            own = index.get(name, torch.arange(weight.numel()))
            image.extend((own + self.start[name]).tolist())
        return Sympy(image)

    def tied(self) -> Iterator[list[Slot]]:
        """The dimensions of parameters that the graph of constraints ties together."""
        slots = {f"{n}[{d}]": (n, d) for n, w in self.weights.items() for d in range(w.ndim) if w.shape[d] > 1}
        graph = nx.Graph()
        graph.add_nodes_from(slots)
        graph.add_edges_from((tie.a, tie.b) for tie in self.spec.constraints.ties)
        for component in nx.connected_components(graph):
            if found := sorted(slots[node] for node in component if node in slots):
                yield found

    def combinations(self, slots: list[Slot]) -> Iterator[dict[Slot, Tensor]]:
        options = {slot: moves(self.weights[slot[0]].shape, slot[1]) for slot in slots}
        total = 1
        for found in options.values():
            total *= 1 + len(found)
        if total <= FEW:
            for chosen in itertools.product(*([None, *found.values()] for found in options.values())):
                yield {slot: move for slot, move in zip(slots, chosen, strict=True) if move is not None}
            return
        rng = random.Random(0)
        for _ in range(FEW):
            alike: dict[int, tuple[Any, ...]] = {}
            picked = {}
            for slot, found in options.items():
                size = self.weights[slot[0]].shape[slot[1]]
                key = alike.setdefault(size, rng.choice(list(found)))
                if key not in found or rng.random() < 0.2:
                    key = rng.choice(list(found))
                if rng.random() < 0.7:
                    picked[slot] = found[key]
            yield picked

    def symmetries(self) -> Iterator[tuple[dict[Slot, Tensor], dict[str, Tensor]]]:
        """Every combination of moves that preserves the function, and the elements that it takes."""
        for slots in self.tied():
            names = sorted({name for name, _ in slots})
            combinations = [c for c in self.combinations(slots) if c]
            for start in range(0, len(combinations), 5000):
                batch = combinations[start : start + 5000]
                index = {name: torch.arange(self.weights[name].numel()).repeat(len(batch), 1) for name in names}
                for row, moved in enumerate(batch):
                    for (name, _), move in moved.items():
                        index[name][row] = index[name][row][move]
                near = (self.outputs(index) - self.reference).abs().amax(1) < 1e-9 * self.reference.abs().max()
                for row in near.nonzero().flatten().tolist():
                    yield batch[row], {name: index[name][row] for name in names}


X = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0))


def _attend(m: Any, x: Tensor) -> Tensor:
    q, k, v = (f(x).unflatten(-1, (2, 2)).transpose(1, 2) for f in (m.q, m.k, m.v))
    return m.o(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))


def _experts(m: Any, x: Tensor) -> Tensor:
    gate = m.router(x).softmax(-1)
    return torch.einsum("bsn,noh,bsnh->bso", gate, m.down, torch.tanh(torch.einsum("bsd,nhd->bsnh", x, m.up)))


def _recurrent(m: Any, x: Tensor) -> Tensor:
    state = torch.zeros(len(x), 4, dtype=x.dtype)
    for step in x.unbind(1):
        state = torch.tanh(m.i(step) + state @ m.w)
    return m.o(state)


def _gated(m: Any, x: Tensor) -> Tensor:
    gate, up = m.up(x).chunk(2, -1)
    return m.down(torch.sigmoid(gate) * up)


def _pairs(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.o(torch.einsum("bsi,bsj->bsij", y, torch.tanh(y)).flatten(2))


def _groups(m: Any, x: Tensor) -> Tensor:
    y = m.up(x).unflatten(-1, (2, 3))
    return m.down((y / (1 + y.abs().sum(-1, keepdim=True))).flatten(2))


def _shuffled(m: Any, x: Tensor) -> Tensor:
    y = m.a(x.transpose(1, 2)).unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)
    return m.c(torch.tanh(m.b(torch.tanh(y))))


def _squeeze(m: Any, x: Tensor) -> Tensor:
    y = torch.tanh(m.a(x))
    return m.o(y * torch.sigmoid(m.up(torch.relu(m.down(y.mean(1, keepdim=True))))))


def _residual(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.c(y + torch.tanh(m.b(y)))


def _concatenated(m: Any, x: Tensor) -> Tensor:
    y = torch.tanh(m.a(x))
    return m.c(torch.tanh(torch.cat([y, m.b(y)], -1)))


def _one_part(m: Any, x: Tensor) -> Tensor:
    y = m.up(x)
    return m.down(torch.cat([torch.tanh(y[..., :2]), torch.sigmoid(y[..., 2:])], -1))


def _unused_view(m: Any, x: Tensor) -> Tensor:
    return m.down(torch.tanh(m.up(x).unflatten(-1, (2, 2))).flatten(2))


def _gram(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).unflatten(-1, (2, 2))
    return m.o(torch.einsum("bsgd,bshd->bsgh", y, torch.tanh(y)).flatten(2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "two layers": lambda: Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=lin(3, 4), b=lin(4, 2)),
    "a residual stream": lambda: Net(_residual, a=lin(3, 4), b=lin(4, 4, False), c=lin(4, 2)),
    "a concatenation": lambda: Net(_concatenated, a=lin(3, 3), b=lin(3, 3, False), c=lin(6, 2)),
    "attention": lambda: Net(
        _attend, q=lin(3, 4, False), k=lin(3, 4, False), v=lin(3, 4, False), o=lin(4, 2)
    ),
    "experts": lambda: Net(_experts, router=lin(3, 2, False), up=par(2, 2, 3), down=par(2, 2, 2)),
    "recurrence": lambda: Net(_recurrent, i=lin(3, 4), w=par(4, 4), o=lin(4, 2)),
    "a gate": lambda: Net(_gated, up=lin(3, 8), down=lin(4, 2)),
    "pairs": lambda: Net(_pairs, a=lin(3, 3), o=lin(9, 2)),
    "groups with a norm": lambda: Net(_groups, up=lin(3, 6), down=lin(6, 2)),
    "shuffled groups": lambda: Net(
        _shuffled, a=nn.Conv1d(3, 6, 1), b=nn.Conv1d(6, 6, 1, groups=3), c=nn.Conv1d(6, 2, 1)
    ),
    "squeeze and excitation": lambda: Net(
        _squeeze, a=lin(3, 4), down=lin(4, 2, False), up=lin(2, 4, False), o=lin(4, 2)
    ),
    "two kinds of units": lambda: Net(_one_part, up=lin(3, 4), down=lin(4, 2)),
    "a view that nothing uses": lambda: Net(_unused_view, up=lin(3, 4), down=lin(4, 2)),
    "products between heads": lambda: Net(_gram, a=lin(3, 4), o=lin(4, 2)),
    "a normalised layer": lambda: Net(
        lambda m, x: m.b(F.layer_norm(m.a(x), (4,), m.g, m.h)), a=lin(3, 4), g=par(4), h=par(4), b=lin(4, 2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_no_symmetry_is_outside_the_group(name: str) -> None:
    search = Search(MODELS[name](), (X,))
    seen = 0
    for moved, index in search.symmetries():
        element = search._sympy(index)
        if not element.is_Identity:
            assert search.group.contains(element), f"{[(s, m.tolist()) for s, m in moved.items()]}\n{search.spec}"
            seen += 1
    assert seen >= len(search.spec.moving), "the search finds too little to witness anything"


def test_the_search_finds_what_a_smaller_group_lacks() -> None:
    search = Search(MODELS["two layers"](), (X,))
    assert search.group.order() == 24
    search.group = PermutationGroup(Sympy(search.group.degree - 1))
    assert any(not search.group.contains(search._sympy(index)) for _, index in search.symmetries())
