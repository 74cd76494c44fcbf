"""Random graphs of branches, of one unit each, so that whole modules are all that can change places in them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Graph:
    """Vertices in order, each with those that it sums: the input is the first, the result the last."""

    sources: list[list[int]]
    kinds: list[int]


def random_graph(seed: int, *, across: int = 0) -> Graph:
    """Branches of branches, in which equal parts are frequent; with so many edges across them."""
    rng = random.Random(seed)
    graph = Graph([[]], [0])

    def vertex(sources: list[int], kind: int) -> int:
        graph.sources.append(sources)
        graph.kinds.append(kind)
        return len(graph.kinds) - 1

    def plan(depth: int) -> list[Any]:
        found: list[Any] = []
        for _ in range(rng.randint(1, 2)):
            if depth and rng.random() < 0.8:
                kinds = [plan(depth - 1) for _ in range(rng.randint(1, 2))]
                found.append([rng.choice(kinds) for _ in range(rng.randint(2, 3))])
            else:
                found.append(rng.choice([1, 1, 2]))
        return found

    def built(steps: list[Any], at: int) -> int:
        for one in steps:
            at = vertex([at], one) if isinstance(one, int) else vertex([built(branch, at) for branch in one], 3)
        return at

    end = built(plan(2), 0)
    while end < 4:
        end = built(plan(2), end)
    for _ in range(across):
        a, b = sorted(rng.sample(range(1, end + 1), 2))
        if a not in graph.sources[b]:
            graph.sources[b].append(a)
    return graph


class OfUnits(nn.Module):
    """A graph as a network of single units: each vertex of the kinds 1 and 2 has a weight and a bias of its own."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.units = nn.ModuleDict({str(i): nn.Linear(1, 1) for i, kind in enumerate(graph.kinds) if kind in (1, 2)})

    def forward(self, x: Tensor) -> Tensor:
        made = [x]
        for i, (sources, kind) in enumerate(zip(self.graph.sources[1:], self.graph.kinds[1:], strict=True), 1):
            total = made[sources[0]]
            for source in sources[1:]:
                total = total + made[source]
            function = {1: torch.tanh, 2: torch.sin, 3: torch.exp}[kind]
            made.append(function(self.units[str(i)](total) if kind in (1, 2) else total))
        return made[-1]
