"""Further passes of a module that reads values: with other answers to what Python asks, other inputs, other weights.

Where Python reads a value, a pass shows one branch, and one place where something is cut. What is read and depends on
weights or inputs is answered otherwise, all that one line of the code asks for and then each by itself: a truth value
by its opposite, a number by one far above, one far below and the next. Such a pass may be one that no input leads to.
What it ties and pins costs symmetries then, and no more; and where it fails, nothing is learnt from it. Other inputs
and weights show what several values, each as plausible as before, make of the pass together.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from permgraph.capture.captured import Captured
from permgraph.capture.inputs.registry import ExampleInputs
from permgraph.capture.module_copy import copy_with
from permgraph.capture.passes import Variation
from permgraph.capture.schema import is_random, operator_name, signature
from permgraph.capture.untracked import CUT_ANYWHERE, VALUES_LEAVE_TORCH

#: So many times something is answered otherwise, the first value for which each line asks before all second ones.
MAX_ANSWERS = 32
#: So many times all weights and inputs are drawn anew.
MAX_DRAWS = 4
#: Graphs of more operators are compared up to where they first differ.
_MAX_ALIGNED = 3000

_TAKES_FROM = frozenset({"aten::index", "aten::index_select", "aten::embedding", "aten::gather"})


def draws(captured: Captured) -> Iterator[Variation]:
    """Passes on which the values that Python reads are others; none where it reads none that could be."""
    reads = _reads(captured)
    drawn = [_drawn(captured.inputs, seed) for seed in range(1, 1 + MAX_DRAWS)] if reads else []
    for every in itertools.zip_longest(itertools.islice(_answered(_sites(reads)), MAX_ANSWERS), drawn):
        for name, varied in filter(None, every):
            yield Variation(name, frozenset({name}), **{"inputs": captured.inputs, **varied})


def more_draws(variation: Variation, again: Captured, passes: Sequence[Captured]) -> Iterator[Variation]:
    """A further pass once more, with other answers to what its code asks at places where no earlier pass asked."""
    if variation.on_other_values:
        return
    known = {site for one in passes for site in _sites(_reads(one))}
    sites = {site: nodes for site, nodes in _sites(_reads(again)).items() if site not in known}
    for name, varied in itertools.islice(_answered(sites), MAX_ANSWERS):
        named = f"{variation.name}, {name}"
        yield replace(variation, name=named, shows=frozenset({named}), **varied)


def _sites(reads: Sequence[fx.Node]) -> dict[Any, list[fx.Node]]:
    """The values that Python read, by the module and the line of the code that asked."""
    sites: dict[Any, list[fx.Node]] = {}
    for node in reads:
        if "read" in node.meta and not _asks_whether_finite(node):
            sites.setdefault((node.meta["module"], node.meta["source"]), []).append(node)
    return sites


def _answered(sites: Mapping[Any, list[fx.Node]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The values of each line answered otherwise together, then each by itself."""
    rounds = itertools.zip_longest(*sites.values())
    turns = [nodes for nodes in sites.values() if len(nodes) > 1]
    turns += [[node] for each in rounds for node in each if node is not None]
    return itertools.chain.from_iterable(map(_answers, turns))


def _answers(nodes: Sequence[fx.Node]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each way in which these reads are answered otherwise together."""
    numbers = [node.meta["read"] for node in nodes]
    where = nodes[0].meta["source"] or nodes[0].meta["module"] or "the model"
    which = f"value {numbers[0]}" if len(numbers) == 1 else f"values {numbers[0]} to {numbers[-1]}"
    for way in ("otherwise",) if isinstance(nodes[0].meta["val"], bool) else ("above", "below", "next"):
        yield f"{which} at {where} {way}", {"answers": tuple((number, way) for number in numbers)}


def _drawn(inputs: ExampleInputs, seed: int) -> tuple[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    made = copy_with((inputs.args, inputs.kwargs), lambda t: drawn_like(t, generator, False), {})
    return f"other values, seed {seed}", {"inputs": replace(inputs, args=made[0], kwargs=made[1]), "weights": seed}


def drawn_like(tensor: Tensor, generator: torch.Generator, signed: bool) -> Tensor:
    """A tensor's values in another order and at another scale, with other signs if they may; whole numbers stay.

    What is the same everywhere, such as a bias of zeros, gets a spread, so that it does not stand for any order.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor.detach().clone()
    values = tensor.detach().to("cpu", torch.float32).reshape(-1)
    scale = 10 ** (1.4 * torch.rand((), generator=generator, device="cpu") - 0.7)
    made = values[torch.randperm(len(values), generator=generator, device="cpu")] * scale
    if signed:
        if bool((values == values[0]).all()):
            made = made + 0.5 * torch.randn(made.shape, generator=generator, device="cpu")
        made = made * (2 * torch.randint(0, 2, made.shape, generator=generator, device="cpu") - 1)
    return made.reshape(tensor.shape).to(tensor)


def _reads(captured: Captured) -> list[fx.Node]:
    """The nodes by which Python read values that depend on weights, inputs or random numbers, or these gave a size."""
    if captured.mode == "fake":
        return []
    varying: set[fx.Node] = set()
    for node in captured.graph.nodes:
        given = node.op == "placeholder" and node.meta["kind"] != "constant"
        drawn = is_random(node.target)
        if given or drawn or not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
    return [node for node in captured.graph.nodes if node in varying and _tells_values(node)]


def _asks_whether_finite(read: fx.Node) -> bool:
    """Whether a truth value says no more than that numbers are finite, as a spec takes them to be anyway."""
    checks, waiting = [], list(read.all_input_nodes)
    while waiting:
        node = waiting.pop()
        sources = [s for s in node.all_input_nodes if isinstance(s.meta["val"], Tensor)]
        if not (isinstance(node.meta["val"], Tensor) and node.meta["val"].dtype == torch.bool):
            return False
        if sources and all(source.meta["val"].dtype == torch.bool for source in sources):
            waiting += sources
        else:
            checks.append(node)
    return bool(checks) and all(map(_checks_finiteness, checks))


def _checks_finiteness(node: fx.Node) -> bool:
    name = operator_name(node.target)
    if name in ("isnan", "isinf", "isfinite", "isposinf", "isneginf"):
        return True
    left, right = (*node.args, None, None)[:2]
    infinite = isinstance(right, (int, float)) and math.isinf(right)
    return name in ("eq", "ne", "lt") and (left is right or infinite)


def _tells_values(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return "read" in node.meta or node.target is VALUES_LEAVE_TORCH or torch.Tag.dynamic_output_shape in tags


# -- where values say how far something goes -------------------------------------------------------------------------


def mark_cuts(first: Captured, second: Captured) -> bool:
    """Note in both graphs the dimensions that they cut at different places, though nothing but values differs.

    Says whether there are any.
    """
    found = False
    for a, b in list(_aligned(first.graph, second.graph)):
        for dim in _cut_at_different_places(a, b):
            for node in (a, b):
                found = True
                source = node.all_input_nodes[0]
                with node.graph.inserting_before(node):
                    mark = node.graph.call_function(CUT_ANYWHERE, (source, dim))
                mark.meta.update(val=None, module=node.meta["module"], source=node.meta["source"])
    return found


def _aligned(first: fx.Graph, second: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Pairs of calls of the same operator at the same place of two passes."""
    ours, theirs = ([n for n in graph.nodes if n.op == "call_function"] for graph in (first, second))
    same = 0
    while same < min(len(ours), len(theirs)) and ours[same].target == theirs[same].target:
        same += 1
    yield from zip(ours[:same], theirs[:same], strict=True)
    ours, theirs = ours[same:], theirs[same:]
    if max(len(ours), len(theirs)) <= _MAX_ALIGNED:
        left, right = ([str(n.target) for n in nodes] for nodes in (ours, theirs))
        for block in difflib.SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks():
            yield from zip(ours[block.a : block.a + block.size], theirs[block.b : block.b + block.size], strict=True)


def _cut_at_different_places(a: fx.Node, b: fx.Node) -> list[int]:
    """The dimensions of the first argument of two calls, alike in shape, of which they take different parts."""
    source, other = (next(iter(node.all_input_nodes), None) for node in (a, b))
    if source is None or other is None or _shape(source) is None or _shape(source) != _shape(other):
        return []
    ndim = len(_shape(source) or ())
    known = signature(a.target)
    name = a.target._schema.name if known is not None else ""  # type: ignore[union-attr]
    if name in _TAKES_FROM:
        return [dim for dim in _indexed(a, ndim) if _of_other_sizes(a, b)]
    if all(_shape(x) == _shape(y) for x, y in zip(a.all_input_nodes, b.all_input_nodes, strict=False)) and (
        _plain(a.args) != _plain(b.args) or _plain(a.kwargs) != _plain(b.kwargs)
    ):
        names = [argument.name for argument in known.arguments] if known is not None else []
        dim = {**dict(zip(names, a.args, strict=False)), **a.kwargs}.get("dim", 0)
        if "dim" in names and isinstance(dim, int):
            return [dim % ndim] if ndim else []
        turns = not {"dims", "dim0"}.isdisjoint(names)
        return list(range(ndim)) if turns or _shapes(a) != _shapes(b) else []
    return []


def _indexed(node: fx.Node, ndim: int) -> list[int]:
    """The dimensions from which an operator takes elements by their numbers."""
    if node.target._schema.name == "aten::index":  # type: ignore[union-attr]
        return [dim for dim, index in enumerate(node.args[1]) if index is not None]  # type: ignore[arg-type]
    if node.target._schema.name == "aten::embedding":  # type: ignore[union-attr]
        return [0]
    return [int(node.args[1]) % ndim]  # type: ignore[arg-type]


def _of_other_sizes(a: fx.Node, b: fx.Node) -> bool:
    """Whether the numbers by which two calls take elements are constants of the code, and not equally many."""
    indices = a.all_input_nodes[1:]
    if any(source.op == "placeholder" and source.meta["kind"] != "constant" for i in indices for source in _cone(i)):
        return False
    return any(_shape(x) != _shape(y) for x, y in zip(indices, b.all_input_nodes[1:], strict=False))


def _cone(node: fx.Node) -> set[fx.Node]:
    """What a node is computed from, and itself."""
    found, waiting = {node}, [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _shapes(node: fx.Node) -> list[Any]:
    """The shapes of all results."""
    value = node.meta.get("val")
    return [tuple(v.shape) for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Tensor)]


def _plain(value: Any) -> Any:
    """Arguments without their nodes and dtypes: the numbers among them."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value if isinstance(value, int) else None
