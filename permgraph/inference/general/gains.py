"""Vectors of weights that are read as they are: what a norm or a layer scale multiplies an axis with."""

from __future__ import annotations

import math

from permgraph.inference.solution import Solution, is_weight
from permgraph.rules.registry import properties_of
from permgraph.rules.typed_tensor import TypedTensor


class Gains:
    """Which tensors of a graph are a parameter, with all its elements along one dimension, in its own order."""

    def __init__(self, solution: Solution) -> None:
        self._names: dict[int, str] = {}
        written = solution.facts.memory.written
        for node in solution.nodes:
            value = solution.values.get(node)
            if is_weight(node) and isinstance(value, TypedTensor) and node not in written and _is_vector(value):
                if value.dtype.is_floating_point:
                    self._names[id(value)] = node.meta["names"][0]
        for call in solution.calls:
            if len(call.tensors) != 1 or len(call.results) != 1 or properties_of(str(call.node.target)).acts != "moved":
                continue
            source, out = call.tensors[0], call.results[0]
            name = self._names.get(id(source))
            same = _is_vector(out) and math.prod(out.shape) == math.prod(source.shape)
            if name is not None and same and call.node not in written and out.dtype.is_floating_point:
                self._names[id(out)] = name

    def name_of(self, tensor: TypedTensor) -> str | None:
        """The parameter that a tensor is, or None."""
        return self._names.get(id(tensor))


def _is_vector(tensor: TypedTensor) -> bool:
    return sum(size > 1 for size in tensor.shape) == 1
