"""A type for each tensor of a captured graph, before any rule has said anything of it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import fx

from permgraph.algebra import Axes, Cuts, FactorKey
from permgraph.capture.schema import signature
from permgraph.inference.facts import GraphFacts
from permgraph.inference.predicted_cuts import PLACEHOLDER
from permgraph.inference.solution import Solution, is_weight
from permgraph.rules.call import Call
from permgraph.rules.ledger import Ledger
from permgraph.rules.typed_tensor import TypedTensor


def type_graph(facts: GraphFacts, cuts: Mapping[FactorKey, Cuts]) -> Solution:
    """Fresh axes for every tensor, the dimensions of weights and constants made as `cuts` says of them."""
    number = {node: i for i, node in enumerate(facts.nodes)}
    weights = [node for node in facts.nodes if is_weight(node)]
    read = sorted((n for n in weights if n.users), key=lambda node: min(number[user] for user in node.users))
    solution = Solution(facts, Axes(cuts))
    solution.order = [node.meta["names"][0] for node in read if _is_float(node.meta["val"])]
    solution.unread = [node.meta["names"][0] for node in weights if not node.users]
    values = solution.values
    memo: dict[Any, Any] = {}
    for node in facts.nodes:
        if node.op == "placeholder":
            values[node] = tensor = _typed(solution, node, node.meta["val"])
            if isinstance(tensor, TypedTensor) and node.meta["kind"] != "input":
                tensor.dims = solution.axes.named.make(solution.axes, (PLACEHOLDER, number[node]), tensor.shape)
                tensor.known = facts.known.get(node)
            if is_weight(node) and isinstance(values[node], TypedTensor):
                name = node.meta["names"][0]
                values[node].name = name
                solution.parameters[name] = values[node]
        elif node.op == "call_function":
            if node.target is operator.getitem:
                source, item = node.args
                assert isinstance(source, fx.Node)
                values[node] = part = values[source][item]
                if isinstance(part, TypedTensor):
                    part.asked_for_repeats += (partial(facts.repeats_of, node),)
                continue
            if node in facts.for_shape:
                values[node] = _typed(solution, node, node.meta["val"])
                continue
            arguments = _arguments(solution, node)
            values[node] = result = _result(solution, node, arguments)
            outs = list(result) if isinstance(result, (list, tuple)) else [result]
            if node in facts.known:
                result.known = facts.known[node]
            solution.calls.append(Call(node, number[node], arguments, outs, solution.axes, Ledger(), memo))
    return solution


def _is_float(val: Any) -> bool:
    return isinstance(val, torch.Tensor) and (val.dtype.is_floating_point or val.dtype.is_complex)


def _typed(solution: Solution, node: fx.Node, val: Any, suffix: str = "") -> Any:
    if isinstance(val, torch.Tensor):
        tensor = TypedTensor(node.name + suffix, val.shape, val.dtype, solution.axes)
        tensor.asked_for_repeats = (partial(solution.facts.repeats_of, node),)
        tensor.viewed = node in solution.facts.memory.viewed
        tensor.written = node in solution.facts.memory.written
        return tensor
    if isinstance(val, (list, tuple)):
        items = [_typed(solution, node, item, f"{suffix}.{i}") for i, item in enumerate(val)]
        if node not in solution.facts.results and not suffix:
            read = {user.args[1] for user in node.users if user in solution.facts.live}
            for i, item in enumerate(items):
                if isinstance(item, TypedTensor):
                    item.read = i in read
        return items
    return val


def _used(solution: Solution, source: fx.Node, user: fx.Node) -> Any:
    """What a node holds, as one use of it sees it: with axes of its own where the tensor does not vary."""
    value = solution.values[source]
    dims = solution.facts.uniform.get(source)
    if not dims or not isinstance(value, TypedTensor):
        return value
    used = TypedTensor(f"{value.name} in {user.name}", value.shape, value.dtype, solution.axes)
    used.dims = [used.dims[d] if d in dims else axis for d, axis in enumerate(value.dims)]
    used.uniform = dims
    solution.uses[id(used)] = source
    used.use_of = value
    used.asked_for_repeats = value.asked_for_repeats
    return used


def _argument(solution: Solution, value: Any, node: fx.Node) -> Any:
    if isinstance(value, fx.Node):
        return _used(solution, value, node)
    if isinstance(value, (list, tuple)):
        return [_argument(solution, item, node) for item in value]
    return value


def _arguments(solution: Solution, node: fx.Node) -> dict[str, Any]:
    known = signature(node.target)
    if known is None:
        return {str(i): _argument(solution, arg, node) for i, arg in enumerate((*node.args, *node.kwargs.values()))}
    args, kwargs = node.args, node.kwargs
    found = {}
    for i, argument in enumerate(known.arguments):
        if i < len(args):
            found[argument.name] = _argument(solution, args[i], node)
        elif argument.name in kwargs:
            found[argument.name] = _argument(solution, kwargs[argument.name], node)
        else:
            found[argument.name] = argument.default
    return found


def _result(solution: Solution, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """The result's tensors; the argument itself where an operator returns what it has written into."""
    known = signature(node.target)
    val = node.meta["val"]
    typed = _typed(solution, node, val)
    results = typed if isinstance(typed, list) else [typed]
    for i, names in enumerate(known.returned[: len(results)] if known is not None else ()):
        for name in names:
            written, made = arguments[name], results[i]
            if isinstance(written, TypedTensor) and isinstance(made, TypedTensor) and written.shape == made.shape:
                results[i] = written
    return results if isinstance(typed, list) else results[0]
