"""Several passes as one graph over shared parameters, and whether two of them say the same.

A specification is inferred from what a forward pass did, and used for a model that runs on other inputs. What another
pass ties or pins holds as well, so passes are solved together: their graphs are put side by side, and the parameters
are the nodes that they share. A pass that differs from an earlier one in its sizes alone says nothing new (`alike`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from permgraph.capture.captured import Captured
from permgraph.capture.counting import returned_by
from permgraph.capture.drawn_factors import DrawnFactors, drawn_factors
from permgraph.capture.numbering import Numbering
from permgraph.capture.schema import operator_name, signature

_VIEWS = frozenset(["view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten"])

_BATCH_NORMS = frozenset(["native_batch_norm", "batch_norm", "cudnn_batch_norm"])
_RESULT = -1  #: in place of the number of an argument
_TRAINING = 5  #: the argument that says whether a batch norm takes its statistics from the batch

_IMAGE = ("batch", "channels", "depth", "height", "width")
_KERNEL = ("channels", *_IMAGE[1:])
_BIAS = ("channels",)


def alike(first: Captured, second: Captured, *, in_any_mode: bool = False) -> bool:
    """Whether two passes ran the same operators on the same nodes, with sizes that differ and say the same.

    At each operator every size stands for one other, and a view puts the same dimensions together or takes them apart:
    then each rule says of the second pass what it says of the first. With `in_any_mode`, batch norms may differ in
    where their statistics come from, and count their batches or not: which units change places is the same then, by
    how much they may be scaled is not. A factor drawn for each sample of a batch, as stochastic depth draws them in
    training, is as good as none, as dropout is.
    """
    nodes, others = (_but_for_modes(one) if in_any_mode else list(one.graph.nodes) for one in (first, second))
    varied = _varied(nodes, others)
    batches = _varied(nodes, others, first=True)
    factors, other_factors = (
        drawn_factors(nodes, {a for a, _ in batches}),
        drawn_factors(others, {b for _, b in batches}),
    )
    nodes, others = factors.without(nodes), other_factors.without(others)
    if len(nodes) != len(others):
        return False
    numbers = factors.numbers(nodes), other_factors.numbers(others)
    if not _multiply_samples(other_factors, nodes, numbers[1], batches):
        return False
    return all(_alike(*pair, numbers, varied, in_any_mode) for pair in zip(nodes, others, strict=True))


def _multiply_samples(
    factors: DrawnFactors, others: Sequence[fx.Node], number: dict[fx.Node, int], batches: Collection[tuple[int, int]]
) -> bool:
    """Whether what is multiplied by drawn factors has as many samples as the batch, in the other pass too."""
    values = ((others[number[product]].meta["val"], product.meta["val"]) for product in factors.by_sample)
    return all(isinstance(a, Tensor) and a.ndim and (a.shape[0], b.shape[0]) in batches for a, b in values)


def _varied(nodes: Sequence[fx.Node], others: Sequence[fx.Node], *, first: bool = False) -> frozenset[tuple[int, int]]:
    """The sizes of inputs that differ between two passes, in pairs; or of their first dimensions alone."""
    inputs = ([n for n in each if n.op == "placeholder" and n.meta["kind"] == "input"] for each in (nodes, others))
    shapes = [(a.meta["val"].shape, b.meta["val"].shape) for a, b in zip(*inputs, strict=False)]
    pairs = (pair for a, b in shapes for pair in list(zip(a, b, strict=False))[: 1 if first else None])
    return frozenset(pair for pair in pairs if pair[0] != pair[1])


def _but_for_modes(captured: Captured) -> list[fx.Node]:
    """The nodes of a pass without those that count batches, or take the statistics of one, for nothing else."""

    def adds(node: fx.Node) -> bool:
        return node.op == "call_function" and str(node.target) == "aten.add_.Tensor" and not node.users

    counters = {
        node
        for node in captured.graph.nodes
        if node.op == "placeholder" and node.meta["kind"] == "buffer"
        if node.meta["val"].ndim == 0 and not node.meta["val"].is_floating_point()
        if all(map(adds, node.users))
    }

    def counts(node: fx.Node) -> bool:
        if node.users or node.op != "call_function":
            return False
        source = node.args[0] if node.args else None
        if node.target is operator.getitem:
            return isinstance(source, fx.Node) and operator_name(source.target) in _BATCH_NORMS and bool(node.args[1])
        return bool(source in counters)

    return [node for node in captured.graph.nodes if not counts(node)]


def _alike(
    node: fx.Node,
    other: fx.Node,
    numbers: tuple[dict[fx.Node, int], dict[fx.Node, int]],
    varied: frozenset[tuple[int, int]],
    in_any_mode: bool,
) -> bool:
    if node.op != other.op:
        return False
    if node.op == "placeholder":
        if not _same_placeholder(node, other):
            return False
    elif node.target != other.target:
        return False
    sizes = _Sizes()
    names = _dimensions(node)

    def value(of: fx.Node) -> Any:
        kept = (
            in_any_mode and operator_name(of.target) in _BATCH_NORMS
        )  # in evaluation mode the other results are empty
        return of.meta["val"][0] if kept else of.meta["val"]

    def same_value(a: Any, b: Any, role: int) -> bool:
        if isinstance(a, Tensor):
            if not isinstance(b, Tensor) or a.dtype != b.dtype or a.ndim != b.ndim:
                return False
            return all(map(sizes.same, a.shape, b.shape, names(role, a.ndim)))
        if isinstance(a, (list, tuple)):
            return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same_value, a, b, [role] * len(a)))
        return True

    def same_nodes(a: Any, b: Any, role: int) -> bool:
        """Whether the same tensors stand here, whose sizes stand for one another."""
        if isinstance(a, fx.Node):
            numbered = isinstance(b, fx.Node) and numbers[0][a] == numbers[1][b]
            return numbered and same_value(value(a), value(b), role)
        if isinstance(a, (list, tuple)):
            return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same_nodes, a, b, [role] * len(a)))
        return True

    if not same_value(value(node), value(other), _RESULT):
        return False
    ours, theirs = ([*each.args, *each.kwargs.values()] for each in (node, other))
    if node.kwargs.keys() != other.kwargs.keys() or len(ours) != len(theirs):
        return False
    if in_any_mode and operator_name(node.target) in _BATCH_NORMS:
        ours[_TRAINING] = theirs[_TRAINING] = None
    if not all(map(same_nodes, ours, theirs, range(len(ours)))):
        return False
    numbers_of = _Numbers(node, other, sizes, varied)
    return all(map(numbers_of.same, _argument_names(node), ours, theirs)) and _same_view(node, other, sizes)


def _same_placeholder(node: fx.Node, other: fx.Node) -> bool:
    """Whether two tensors are one weight, or inputs, or constants that hold the same or have other shapes."""
    kind = node.meta["kind"]
    if kind != other.meta["kind"]:
        return False
    if kind in ("parameter", "buffer"):
        return bool(node.meta["names"] == other.meta["names"])
    ours, theirs = node.meta.get("real"), other.meta.get("real")
    if kind == "input" or ours is theirs:
        return True
    if ours is None or theirs is None or ours.dtype != theirs.dtype:
        return False
    try:
        return ours.shape != theirs.shape or bool(torch.equal(ours.detach().cpu(), theirs.detach().cpu()))
    except (NotImplementedError, RuntimeError):  # nested, quantised and the like
        return False


def _argument_names(node: fx.Node) -> list[str]:
    """The names of a node's arguments, as far as its operator's schema has them."""
    known = signature(node.target)
    positional = [argument.name for argument in known.arguments] if known is not None else []
    positional += [""] * (len(node.args) - len(positional))
    return [*positional[: len(node.args)], *node.kwargs]


#: Arguments that say which dimension is meant, or how many groups there are: what they mean, no size says.
_EXACT = frozenset(["dim", "dims", "dim0", "dim1", "dim2", "start_dim", "end_dim", "groups", "group", "num_groups"])
#: Arguments that say which indices of a dimension are meant.
_PLACES = frozenset(["start", "end", "index", "length", "diagonal", "offset"])
_EXACT_OF = frozenset(["pow", "getitem"])
_SCALARS = frozenset(["self", "other", "value", "fill_value", "exponent", "min", "max", "alpha", "end"])


class _Numbers:
    """Which numbers among the arguments of an operator may differ between two passes.

    A number may be a size, and then it differs as a size of the operator's tensors does, or as one of the inputs; or a
    place along a dimension whose size differs. Any other must be the same.
    """

    def __init__(self, node: fx.Node, other: fx.Node, sizes: _Sizes, varied: frozenset[tuple[int, int]]) -> None:
        self._pairs, self._varied = sizes.differing(), varied
        self._name = operator_name(node.target) or getattr(node.target, "__name__", "")
        self._along = self._dimension_varies(node, other)

    def same(self, name: str, a: Any, b: Any) -> bool:
        """Whether two arguments of this name are the same, but for such numbers; tensors have been compared."""
        if isinstance(a, fx.Node):
            return True
        if isinstance(a, (list, tuple)):
            return all(map(self.same, [name] * len(a), a, b))
        if type(a) is not type(b):
            return False
        if type(a) is int:
            return a == b or self._may_differ(name, a, b)
        try:
            return bool(a == b or a != a)
        except NotImplementedError:  # packed weights of quantised layers
            return a is b

    def _may_differ(self, name: str, a: int, b: int) -> bool:
        if name in _EXACT or self._name in _EXACT_OF:
            return False
        if name in _PLACES and self._along is not None:
            return self._along
        if self._name in ("native_group_norm", "native_group_norm_backward"):  # their sizes are given besides
            return True
        return (a, b) in self._pairs or (name in _SCALARS and (a, b) in self._varied)

    @staticmethod
    def _dimension_varies(node: fx.Node, other: fx.Node) -> bool | None:
        """Whether the dimension that an operator's numbers are places of differs in size; None where there is none."""
        source, theirs = (each.args[0] if each.args else None for each in (node, other))
        if not isinstance(source, fx.Node) or not isinstance(theirs, fx.Node):
            return None
        a, b = source.meta["val"], theirs.meta["val"]
        if not isinstance(a, Tensor) or not a.ndim:
            return None
        if operator_name(node.target) in ("triu", "tril", "diagonal", "diagonal_scatter"):
            return bool(a.shape[-2:] != b.shape[-2:])
        given = dict(zip(_argument_names(node), [*node.args, *node.kwargs.values()], strict=True)).get("dim", 0)
        if not isinstance(given, int) or not -a.ndim <= given < a.ndim or a.ndim != b.ndim:
            return None
        return bool(a.shape[given] != b.shape[given])


def _dimensions(node: fx.Node) -> Callable[[int, int], Sequence[str]]:
    """Names for the dimensions of a tensor, from its place among a node's arguments and their number.

    Where an operator treats dimensions by their places, sizes that are equal by chance are told apart by these names.
    """
    if operator_name(node.target) == "convolution":
        return lambda role, ndim: {1: _KERNEL, 2: _BIAS}.get(role, _IMAGE)
    if operator_name(node.target) in _BATCH_NORMS:
        return lambda role, ndim: _IMAGE if role in (0, _RESULT) else _BIAS
    if node.target is operator.getitem or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return lambda role, ndim: [str(d - ndim) for d in range(ndim)]
    return lambda role, ndim: [""] * ndim


class _Sizes:
    """Which size of one pass stands for which of another; a single index always for a single one."""

    def __init__(self) -> None:
        self._pairs: set[tuple[str, int, int]] = set()
        self._met: set[tuple[str, int, bool]] = set()

    def differing(self) -> frozenset[tuple[int, int]]:
        """The pairs of sizes that differ."""
        return frozenset((a, b) for _, a, b in self._pairs if a != b)

    def same(self, a: int, b: int, along: str = "") -> bool:
        """Whether the one may stand for the other, which it does from now on, `along` dimensions of this name."""
        if (along, a, b) in self._pairs:
            return True
        if (a == 1) != (b == 1) or (along, a, False) in self._met or (along, b, True) in self._met:
            return False
        self._met.update([(along, a, False), (along, b, True)])
        self._pairs.add((along, a, b))
        return True


def _same_view(node: fx.Node, other: fx.Node, sizes: _Sizes) -> bool:
    """Whether two views, if they are some, put the same dimensions together and take the same apart.

    Dimensions that are as large in both passes may be those of weights: these are taken apart into the same sizes.
    """
    name = operator_name(node.target)
    if name == "as_strided":
        return bool(node.meta["val"].shape == other.meta["val"].shape)
    if name not in _VIEWS:
        return True
    parts = [_parts(each) for each in (node, other)]
    if parts[0] is None or parts[1] is None or len(parts[0]) != len(parts[1]):
        return False
    shapes = [(_source(each).meta["val"].shape, each.meta["val"].shape) for each in (node, other)]
    for (d, e, part), (*dims, other_part) in zip(parts[0], parts[1], strict=True):
        varies = shapes[0][0][d] != shapes[1][0][d] and shapes[0][1][e] != shapes[1][1][e]
        if dims != [d, e] or not (part == other_part or varies) or not sizes.same(part, other_part):
            return False
    return True


def _source(view: fx.Node) -> Any:
    return view.args[0]


def _parts(view: fx.Node) -> list[tuple[int, int, int]] | None:
    """The factors that a view keeps whole: for each the dimension before, the one after, and its size.

    None where there are none, as in a view of two rows of three as three of two.
    """
    before, after = _source(view).meta["val"].shape, view.meta["val"].shape
    if 0 in before:
        return None
    left, right = list(_wide(before)), list(_wide(after))
    parts = []
    while left and right:
        (d, size), (e, other) = left.pop(0), right.pop(0)
        part = math.gcd(size, other)
        if part not in (size, other):
            return None
        parts.append((d, e, part))
        if size > part:
            left.insert(0, (d, size // part))
        if other > part:
            right.insert(0, (e, other // part))
    return None if left or right else parts  # else a view of other bits


def _wide(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    return ((dim, size) for dim, size in enumerate(shape) if size > 1)


def joined(passes: Sequence[Captured], *, whole: bool = False) -> Captured:
    """Several passes as one: the first one's graph, and after it what the others compute that none did before.

    With `whole`, all that the others compute: of modules that are alike none is alone in what it shares with others.
    """
    graph = fx.Graph()
    made: dict[int, fx.Node] = {}
    copies: dict[fx.Node, fx.Node] = {}
    numbering = Numbering(passes, apart=True, weights_alone=whole)

    def copy(node: fx.Node) -> None:
        number = numbering.of(node)
        if number not in made:
            made[number] = graph.node_copy(node, lambda source: copies[source])
        copies[node] = made[number]

    for node in (node for one in passes for node in one.graph.nodes if node.op == "placeholder"):
        copy(node)
    outputs: list[Any] = []
    ends: list[fx.Node] = []
    for one in passes:
        for node in one.graph.nodes:
            if node.op == "call_function":
                copy(node)
            elif node.op == "output":
                outputs.extend(node.args[0])
                ends.append(node)
    output = graph.output([copies[node] for node in outputs])
    left = {copies[node]: name for end in ends for node, name in end.meta.get("left", {}).items()}
    output.meta.update(
        ends[0].meta,
        val=[value for end in ends for value in end.meta["val"]],
        left=left,
        returned=[one for end in ends for one in returned_by(end)],
    )
    graph.lint()
    unused = tuple(name for name in passes[0].unused if all(name in one.unused for one in passes))
    return replace(passes[0], graph=graph, unused=unused)
