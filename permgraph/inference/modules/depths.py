"""Whether any modules of a graph could change places, told from how deep in the graph weights are met.

An exchange keeps for each node the longest way to it from the inputs, where steps that may be part of a sum, a product
or a choice do not count, since these are read as one. Weights of one shape that are met at unlike depths, as those of
layers in sequence are, do not change places; where no two are met alike, nothing has to be read further.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable

from torch import fx

from permgraph.inference.modules.reading import CHOICES, COMMUTATIVE, SUMS
from permgraph.inference.operators import first_result, name_of
from permgraph.inference.solution import Solution, is_weight

UNCOUNTED = frozenset([*SUMS, *COMMUTATIVE, *CHOICES, "index", "view"])
"""Operators whose calls may be read as a part of another's."""


def may_change_places(solution: Solution) -> bool:
    """Whether two weights of one shape, or whose names differ in one number alone, are met alike."""
    facts = solution.facts
    depths: dict[fx.Node, int] = {}
    met: dict[fx.Node, list[tuple[Hashable, ...]]] = {}
    for node in facts.nodes:
        looked_at = node.all_input_nodes if node.op == "call_function" and facts.operators.of(node).reads_values else ()
        deepest = max((depths[source] for source in looked_at), default=0)
        counted = node.target is operator.getitem or name_of(node) not in UNCOUNTED
        depths[node] = deepest + 1 if node.op == "call_function" and counted else deepest
        if is_weight(node):
            met[node] = []
        elif counted and looked_at and node in facts.live:
            for place, source in enumerate(node.all_input_nodes):
                if source in met:
                    met[source].append((node.target, place, depths[node]))
    seen: set[Hashable] = set()
    for node, by in met.items():
        val = first_result(node)
        if not node.users or val is None:
            continue
        how = frozenset(by)
        words = node.meta["names"][0].split(".")
        keys: list[Hashable] = [
            (*words[:i], "*", *words[i + 1 :], frozenset(depth for *_, depth in how))
            for i, word in enumerate(words)
            if word.isdecimal()
        ]
        if val.is_floating_point() or val.is_complex():
            keys.append((tuple(val.shape), str(val.dtype), how))
        if not seen.isdisjoint(keys):
            return True
        seen.update(keys)
    return False
