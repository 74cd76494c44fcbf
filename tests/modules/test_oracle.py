"""How many ways there are to exchange modules, against the automorphisms that igraph counts in the same graph."""

from __future__ import annotations

import math

import pytest
import torch

import permgraph as pg
from tests.modules.random_branches import Graph, OfUnits, random_graph

igraph = pytest.importorskip("igraph", reason="igraph counts automorphisms; it is not installed")

QUICK = range(12)
SWEEP = range(12, 212)


def _automorphisms(graph: Graph) -> int:
    """With the input and the result in their places, of what the result depends on."""
    needed, stack = set[int](), [len(graph.kinds) - 1]
    while stack:
        at = stack.pop()
        if at not in needed:
            needed.add(at)
            stack += graph.sources[at]
    number = {at: i for i, at in enumerate(sorted(needed))}
    edges = [(number[a], number[b]) for b in needed for a in graph.sources[b]]
    colours = [graph.kinds[at] if at != len(graph.kinds) - 1 else 9 for at in sorted(needed)]
    return round(igraph.Graph(n=len(number), edges=edges, directed=True).count_automorphisms(color=colours))


def _found(graph: Graph) -> tuple[int, pg.PermutationSpec, OfUnits]:
    torch.manual_seed(0)
    model = OfUnits(graph)
    spec = pg.auto_spec(model, (torch.randn(2, 1),), modules=True, vary=False)
    return round(math.exp(spec.log_order())), spec, model


def _check(seed: int) -> None:
    branches = random_graph(seed)
    assert _found(branches)[0] == _automorphisms(branches)
    # With edges across branches, automorphisms need be no products of exchanges: what is found is a part of them.
    graph = random_graph(seed, across=2)
    found, spec, model = _found(graph)
    assert _automorphisms(graph) % found == 0
    if spec.moving:
        proof = pg.verify(model, spec, (torch.randn(2, 1),), controls="none", further=0)
        assert proof.passed, str(proof)


@pytest.mark.parametrize("seed", QUICK)
def test_as_many_as_automorphisms(seed: int) -> None:
    _check(seed)


@pytest.mark.zoo
@pytest.mark.parametrize("seed", SWEEP)
def test_as_many_as_automorphisms_in_a_sweep(seed: int) -> None:
    _check(seed)
