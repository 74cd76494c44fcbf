"""Further passes: the same module on inputs of other sizes, in training mode, called twice, joined into one graph.

A specification is inferred from what a forward pass did, and used for a model that runs on other inputs. What another
pass ties or pins holds as well, so passes are solved together: their graphs are put side by side, and the parameters
are the nodes that they share. A pass that differs from an earlier one in its sizes alone says nothing new (`alike`).
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from permgraph.capture.captured import Captured
from permgraph.capture.inputs.registry import ExampleInputs
from permgraph.capture.module_copy import copy_with

Sizes = Mapping[int, int]


@dataclass(frozen=True)
class Variation:
    """How a further pass differs from the first.

    Attributes:
        name: in words, for people.
        shows: what of that which a user may vary it shows; a pass of which an earlier one showed all is not run.
        inputs: what the module is called on.
        training: in training mode, with dropout as identity.
        calls: how often it is called on them, one time after the other.
        weights: a seed, for others than the module has.
        answers: which of the values that Python asks for it is told otherwise, by their number, and how.
    """

    name: str
    shows: frozenset[str]
    inputs: ExampleInputs
    training: bool = False
    calls: int = 1
    weights: int | None = None
    answers: tuple[tuple[int, str], ...] = ()

    @property
    def on_other_values(self) -> bool:
        """Whether nothing but values differs from the first pass."""
        return bool(self.answers) or self.weights is not None


def variations(model: nn.Module, inputs: ExampleInputs) -> Iterator[Variation]:
    """What to vary, the passes that show most first: sizes and training mode, a second call, larger whole numbers."""
    held = {size for tensor in (*model.parameters(), *model.buffers()) for size in _shape(tensor)}
    every, batch = _larger(inputs, held, batch_only=False), _larger(inputs, held, batch_only=True)
    larger: list[tuple[str, set[str], Sizes]] = []
    if every:
        larger.append(("larger sizes", {"batch", "sizes"}, every))
    if batch and batch != every:
        larger.append(("a larger batch", {"batch"}, batch))
    for name, shows, sizes in larger:
        resize = functools.partial(resized, sizes=sizes)
        yield Variation(f"{name} in training mode", frozenset(shows | {"training"}), _mapped(inputs, resize), True)
    for name, shows, sizes in larger:
        yield Variation(name, frozenset(shows), _mapped(inputs, functools.partial(resized, sizes=sizes)))
    yield Variation("training mode", frozenset({"training"}), inputs, training=True)
    yield Variation("two calls", frozenset({"calls"}), inputs, calls=2)
    yield from _larger_numbers(model, inputs)


def _mapped(inputs: ExampleInputs, change: Callable[[Tensor], Tensor]) -> ExampleInputs:
    args, kwargs = copy_with((inputs.args, inputs.kwargs), change, {})
    return replace(inputs, args=args, kwargs=kwargs)


def _larger_numbers(model: nn.Module, inputs: ExampleInputs) -> Iterator[Variation]:
    """The arguments of forward that are whole numbers, given or by default, each one larger."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return
    kwargs = dict(inputs.kwargs)
    names = []
    for at, parameter in enumerate(parameters):
        value = inputs.args[at] if at < len(inputs.args) else kwargs.get(parameter.name, parameter.default)
        if type(value) is int and at >= len(inputs.args) and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY:
            kwargs[parameter.name] = value + 1
            names.append(parameter.name)
    if names:
        yield Variation(f"larger {', '.join(names)}", frozenset({"numbers"}), replace(inputs, kwargs=kwargs))


# -- sizes -------------------------------------------------------------------------------------------------------------


def _tensors(inputs: ExampleInputs) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    copy_with((inputs.args, inputs.kwargs), keep, {})
    return found


def _places(tensor: Tensor) -> range:
    """The dimensions, besides the batch, that are places of a text, steps of a sequence or rows of an image.

    A guess by the conventions of `torch.nn`: of numbers all; of vectors the second of three, the later of more. Where
    it is wrong, the pass fails, which is harmless.
    """
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    return (
        range(1, tensor.ndim)
        if whole or tensor.ndim == 0
        else range(1, 2)
        if tensor.ndim == 3
        else range(2, tensor.ndim)
    )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape; of a parameter that is not initialised yet, none."""
    return () if is_lazy(tensor) else tuple(tensor.shape)


def _larger(inputs: ExampleInputs, held: Collection[int], *, batch_only: bool) -> dict[int, int]:
    """New sizes for those that a user may vary; no two become one, and none becomes one of the inputs or weights."""
    tensors = _tensors(inputs)
    varied = dict.fromkeys(tensor.shape[0] for tensor in tensors if tensor.ndim)
    if not batch_only:
        varied.update(dict.fromkeys(tensor.shape[d] for tensor in tensors for d in _places(tensor)))
    taken = {size for tensor in tensors for size in tensor.shape}.union(held)
    sizes: dict[int, int] = {}
    for size in varied:
        sizes[size] = next(n for n in _above(size) if n not in taken)
        taken.add(sizes[size])
    return sizes


def _above(size: int) -> Iterator[int]:
    """Sizes above this one that are multiples of the same power of two."""
    step = size & -size if size > 4 else 1
    return itertools.count(size + step, max(step, 1))


def resized(tensor: Tensor, sizes: Sizes) -> Tensor:
    """The tensor with other sizes: what it holds again from the start, and whole numbers that count go on counting."""
    made = tensor.detach()
    for dim in (0, *_places(tensor)) if tensor.ndim else ():
        size = tensor.shape[dim]
        new = sizes.get(size, size)
        if new == size:
            continue
        at = torch.arange(new, device=made.device)
        counts = made.dtype in (torch.int64, torch.int32) and size > 1 and bool((made.diff(dim=dim) == 1).all())
        made = made.index_select(dim, at % size)
        if counts:
            shape = [1] * made.ndim
            shape[dim] = new
            made = made + (at // size * size).to(made.dtype).view(shape)
    return made


# -- graphs ------------------------------------------------------------------------------------------------------------


def alike(first: Captured, second: Captured) -> bool:
    """Whether two passes ran the same operators on the same nodes, with sizes of which each stands for one other.

    Then the second ties and pins what the first does. Sizes of weights stand for themselves.
    """
    nodes, others = list(first.graph.nodes), list(second.graph.nodes)
    if len(nodes) != len(others):
        return False
    number = {node: at for at, node in enumerate(nodes)}
    other_number = {node: at for at, node in enumerate(others)}
    forth: dict[int, int] = {1: 1}
    back: dict[int, int] = {1: 1}

    def same_size(a: int, b: int) -> bool:
        return forth.setdefault(a, b) == b and back.setdefault(b, a) == a

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node):
            return isinstance(b, fx.Node) and number[a] == other_number[b]
        if isinstance(a, (list, tuple)):
            return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
        if type(a) is int and type(b) is int:  # a number of a dimension stays; a size goes with the shapes' sizes
            return a == b or same_size(a, b)
        return type(a) is type(b) and (a == b or a != a)

    def same_value(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            alike_dtype = isinstance(b, Tensor) and a.dtype == b.dtype and a.ndim == b.ndim
            return alike_dtype and all(map(same_size, a.shape, b.shape))
        if isinstance(a, (list, tuple)):
            return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same_value, a, b))
        return True

    for node, other in zip(nodes, others, strict=True):
        if node.op != other.op or (node.target != other.target and node.op != "placeholder"):
            return False
        if node.op == "placeholder":
            if node.meta["kind"] != other.meta["kind"]:
                return False
            if node.meta["kind"] in ("parameter", "buffer"):
                if node.meta["names"] != other.meta["names"]:
                    return False
                if not all(same_size(size, size) for size in node.meta["val"].shape):
                    return False
        if not (same_value(node.meta["val"], other.meta["val"]) and same(node.args, other.args)):
            return False
        if node.kwargs.keys() != other.kwargs.keys() or not same(
            list(node.kwargs.values()), [other.kwargs[key] for key in node.kwargs]
        ):
            return False
    return True


def joined(passes: Sequence[Captured]) -> Captured:
    """Several passes as one: the first one's graph, and after it the others', over the same parameters and buffers."""
    graph = fx.Graph()
    shared: dict[tuple[str, ...], fx.Node] = {}
    copies: dict[fx.Node, fx.Node] = {}
    for node in (node for one in passes for node in one.graph.nodes if node.op == "placeholder"):
        names = tuple(node.meta["names"]) if node.meta["kind"] in ("parameter", "buffer") else ()
        if names and names in shared:
            copies[node] = shared[names]
            continue
        copies[node] = graph.node_copy(node)
        if names:
            shared[names] = copies[node]
    outputs: list[Any] = []
    ends: list[fx.Node] = []
    for one in passes:
        for node in one.graph.nodes:
            if node.op == "call_function":
                copies[node] = graph.node_copy(node, lambda source: copies[source])
            elif node.op == "output":
                outputs.extend(node.args[0])
                ends.append(node)
    output = graph.output([copies[node] for node in outputs])
    left = {copies[node]: name for end in ends for node, name in end.meta.get("left", {}).items()}
    output.meta.update(ends[0].meta, val=[value for end in ends for value in end.meta["val"]], left=left)
    graph.lint()
    unused = tuple(name for name in passes[0].unused if all(name in one.unused for one in passes))
    return replace(passes[0], graph=graph, unused=unused)
