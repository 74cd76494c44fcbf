"""Vectors of weights that are read as they are: what a norm or a layer scale multiplies an axis with."""

from __future__ import annotations

import math

from torch import fx

from permgraph.inference.operators import name_of
from permgraph.inference.solution import Solution, is_weight
from permgraph.rules.registry import properties_of
from permgraph.rules.typed_tensor import TypedTensor
from permgraph.spec.general import Gain


class Gains:
    """Which tensors of a graph are a vector of weights, in its own order along one dimension, or 1 more than that.

    Attributes:
        nodes: the nodes whose results these are.
    """

    def __init__(self, solution: Solution) -> None:
        self._gains: dict[int, Gain] = {}
        self.nodes: dict[fx.Node, Gain] = {}
        written = solution.facts.memory.written
        for node in solution.nodes:
            value = solution.values.get(node)
            if not is_weight(node) or node in written or not isinstance(value, TypedTensor):
                continue
            if _is_vector(value) and value.dtype.is_floating_point:
                self._say(node, value, Gain(node.meta["names"][0]))
        for call in solution.calls:
            if len(call.tensors) != 1 or len(call.results) != 1 or call.node in written:
                continue
            source, out = call.tensors[0], call.results[0]
            gain = self._gains.get(id(source))
            same = _is_vector(out) and math.prod(out.shape) == math.prod(source.shape)
            if gain is None or not same or not out.dtype.is_floating_point:
                continue
            if properties_of(str(call.node.target)).acts == "moved":
                self._say(call.node, out, gain)
            elif (
                name_of(call.node) == "add"
                and isinstance(call.get("other"), (int, float))
                and call.get("alpha", 1) == 1
            ):
                self._say(call.node, out, Gain(gain.name, gain.added + call["other"]))

    def _say(self, node: fx.Node, tensor: TypedTensor, gain: Gain) -> None:
        self._gains[id(tensor)] = self.nodes[node] = gain

    def of(self, tensor: TypedTensor) -> Gain | None:
        """The gain that a tensor is, or None."""
        return self._gains.get(id(tensor))


def _is_vector(tensor: TypedTensor) -> bool:
    return sum(size > 1 for size in tensor.shape) == 1
