"""One operator, or a few, run on example tensors: the recorded graph, and the axes that the rules give it.

Nothing is pinned at the ends, so that inputs and results show all that the rules allow: what a trial finds is what the
rules say, and nothing else.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from permgraph.inference.auto_spec import solve
from permgraph.inference.describe import Writer
from permgraph.inference.fibres import find_fibres
from permgraph.inference.general import with_structures
from permgraph.inference.solution import Solution
from permgraph.rules.typed_tensor import TypedTensor
from permgraph.spec.expressions import Axis, Fixed, refs, rename
from permgraph.spec.spec import PermutationSpec


class Element(Protocol):
    """What a trial needs of a permutation: that it acts on tensors whose axes are given."""

    def apply_axes(self, axes: tuple[Axis, ...], tensor: Tensor) -> Tensor:
        """A new tensor, permuted."""
        ...


@dataclass(frozen=True)
class Typed:
    """A tensor of a trial: its expressions, the last one that of its values if they index an axis of `indexed`."""

    name: str
    axes: tuple[Axis, ...]
    indexed: int | None = None

    def act(self, element: Element, tensor: Tensor) -> Tensor:
        """The tensor permuted: an index tensor as its one-hot code, for that is what its values mean."""
        if self.indexed is None:
            return element.apply_axes(self.axes, tensor)
        code = torch.nn.functional.one_hot(tensor.long(), self.indexed)
        return element.apply_axes(self.axes, code).argmax(-1).to(tensor.dtype)

    def text(self) -> str:
        """``(a b ; c)``; a dot for what stays put, 1 for a dimension of one."""
        shown = ["1" if axis == Fixed(1) else "." if isinstance(axis, Fixed) else str(axis) for axis in self.axes]
        if self.indexed is not None:
            shown[-1:] = [";", shown[-1]]
        return f"({' '.join(shown)})"


@dataclass(frozen=True)
class Trial:
    """What the rules say of one call, and the means to make it again with other inputs.

    Args:
        operators: the operators that ran, in order.
        spec: the groups that act on inputs and results.
        inputs: the tensors among the arguments.
        outputs: the tensors among the results.
        tensors: the values of the inputs.
        call: from other input tensors to the results' tensors.
        general: the same spec with the structures of the groups.
    """

    operators: tuple[str, ...]
    spec: PermutationSpec
    inputs: tuple[Typed, ...]
    outputs: tuple[Typed, ...]
    tensors: tuple[Tensor, ...]
    call: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    general: PermutationSpec

    def letters(self) -> dict[str, str]:
        """A letter for each group, in the order in which they are met."""
        names: dict[str, str] = {}
        for typed in (*self.inputs, *self.outputs):
            for axis in typed.axes:
                for group in refs(axis):
                    names.setdefault(group, _letters(len(names)) + ("!" if self.spec.groups[group].fixed else ""))
        return names

    def axes_text(self) -> str:
        """``(a b), (c b) -> (a c) where a per b``: groups by letters, in the order in which they are met."""
        names = self.letters()
        shown = [
            ", ".join(_renamed(typed, names).text() for typed in side) or "()" for side in (self.inputs, self.outputs)
        ]
        fibres = [
            f"{letter} per {' '.join(sorted(names[parent] for parent in self.spec.groups[group].parents))}"
            for group, letter in names.items()
            if self.spec.groups[group].parents
        ]
        return " -> ".join(shown) + (f" where {', '.join(fibres)}" if fibres else "")


def _letters(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else f"a{number}"


def _renamed(typed: Typed, names: Mapping[str, str]) -> Typed:
    axes = tuple(rename(axis, lambda group: names[group]) for axis in typed.axes)
    return Typed(typed.name, axes, typed.indexed)


def canonical(text: str) -> str:
    """A text of axes with its words renamed by order of appearance, so that texts can be compared.

    >>> canonical("(m k), (o k) -> (m o) where m per k")
    '(a b), (c b) -> (a c) where a per b'
    """
    names: dict[str, str] = {}

    def letter(found: re.Match[str]) -> str:
        return names.setdefault(found[0], _letters(len(names)))

    body, where, fibres = text.partition(" where ")
    body = re.sub(r"[A-Za-z_]\w*", letter, body)
    entries = []
    for entry in fibres.split(",") if where else []:
        group, _, parents = entry.partition(" per ")
        above = sorted(re.sub(r"[A-Za-z_]\w*", letter, parent) for parent in parents.split())
        entries.append(f"{re.sub(r'[A-Za-z_]+[0-9]*', letter, group.strip())} per {' '.join(above)}")
    return " ".join(body.split()) + (f" where {', '.join(sorted(entries))}" if entries else "")


def attempt(op: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trial:
    """Run an operator, or a function made of operators, once, and let the rules type what ran."""
    leaves, tree = tree_flatten((args, dict(kwargs)))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = tuple(leaves[i].detach().clone() for i in places)

    def arguments(given: Sequence[Any]) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, given, strict=True):
            filled[place] = tensor
        return tree_unflatten(filled, tree)

    def run(given: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        held = [tensor.clone() for tensor in given]
        a, k = arguments(held)
        with _seeded(), torch.no_grad():
            return op(*a, **k), held

    result, held = run(tensors)
    first = _tensors(result)
    # A tensor that the operator writes into without returning it is a result too: running statistics, for one.
    written = [
        i
        for i, (old, new) in enumerate(zip(tensors, held, strict=True))
        if not torch.equal(torch.nan_to_num(old), torch.nan_to_num(new)) and not any(new is t for t in first)
    ]

    def call(given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        result, held = run(given)
        return (*_tensors(result), *(held[i] for i in written))

    if isinstance(op, OpOverload):
        recorder = _Recorder(tensors)
        a, k = arguments(recorder.placeholders)
        results = [recorder.write(op, a, k, result)]
    else:
        fresh = [tensor.clone() for tensor in tensors]
        recorder = _Recorder(fresh)
        a, k = arguments(fresh)
        with _seeded(), torch.no_grad(), recorder:
            result = op(*a, **k)
        results = [recorder.node(tensor) for tensor in _tensors(result)]
    solution = solve(recorder.graph, results)
    ins = [solution.values[node] for node in recorder.placeholders]
    outs = [t for node in results for t in tree_leaves(solution.values[node]) if isinstance(t, TypedTensor)]
    outs += [ins[i] for i in written]
    values = [*tensors, *first, *(held[i] for i in written)]
    names = [*(f"input{i}" for i in range(len(ins))), *(f"result{i}" for i in range(len(outs)))]
    spec, general, typed = _typed(solution, names, [*ins, *outs], values)
    operators = tuple(str(node.target) for node in recorder.graph.nodes if isinstance(node.target, OpOverload))
    return Trial(operators, spec, typed[: len(ins)], typed[len(ins) :], tensors, call, general)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


@contextmanager
def _seeded() -> Iterator[None]:
    """Random operators draw the same numbers each time, and the caller's generator is not advanced."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(0)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def undivided(op: OpOverload) -> Callable[..., Any]:
    """The operator in one piece, for use in a function under trial, where a composite one would arrive in parts."""

    def run(*args: Any, **kwargs: Any) -> Any:
        recorder = _get_current_dispatch_mode()
        if not isinstance(recorder, _Recorder):
            return op(*args, **kwargs)
        with _pop_mode_temporarily():
            result = op(*args, **kwargs)
        node_args, node_kwargs = tree_map(recorder.argument, (args, kwargs))
        recorder.write(op, node_args, node_kwargs, result)
        return result

    return run


def _typed(
    solution: Solution, names: Sequence[str], tensors: Sequence[TypedTensor], values: Sequence[Tensor]
) -> tuple[PermutationSpec, PermutationSpec, tuple[Typed, ...]]:
    """The spec in which all these tensors are parameters, index tensors as their one-hot codes; and with structures."""
    shown: dict[str, TypedTensor] = {}
    indexed: dict[str, int | None] = {}
    for name, tensor, value in zip(names, tensors, values, strict=True):
        size = None if tensor.value is None or not value.numel() else tensor.value.size
        if size is not None and not 0 <= int(value.min()) <= int(value.max()) < size:
            size = None  # no index after all: arithmetic has pinned its axis
        shape = tensor.shape if size is None else (*tensor.shape, size)
        shown[name] = TypedTensor(name, shape, torch.float64, solution.axes)
        shown[name].dims = list(tensor.dims) if size is None else [*tensor.dims, tensor.axis(-1)]
        shown[name].use_of = tensor
        indexed[name] = size
    everything = replace(solution, parameters=shown, order=list(shown), unread=())
    fibres = find_fibres(everything)
    writer = Writer(everything, fibres)
    spec = PermutationSpec(groups=writer.groups(), axes=writer.expressions(), unknown_ops=writer.unknown_ops())
    general = with_structures(spec, everything, fibres)
    return spec, general, tuple(Typed(name, spec.axes[name], indexed[name]) for name in names)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes operators down as nodes; a tensor is known by the identity of its Python object."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Any] = []
        self.placeholders = [self._placeholder("free", tensor) for tensor in tensors]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        node_args, node_kwargs = tree_map(self.argument, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.write(func, node_args, node_kwargs, result)
        return result

    def node(self, tensor: Tensor) -> fx.Node:
        """The newest node of a tensor; one that was never seen is a constant."""
        if id(tensor) not in self._nodes:
            self._placeholder("constant", tensor)
        return self._nodes[id(tensor)]

    def write(self, op: Any, args: Any, kwargs: Any, result: Any) -> fx.Node:
        """Append a call, and know its results from now on."""
        node = self.graph.create_node("call_function", op, tuple(args), dict(kwargs))
        node.meta.update(val=result, module="", source=None)
        self._bind(result, node)
        return node

    def _bind(self, result: Any, node: fx.Node) -> None:
        self._alive.append(result)
        if isinstance(result, Tensor):
            self._nodes[id(result)] = node
        elif isinstance(result, (list, tuple)):
            for i, item in enumerate(result):
                if isinstance(item, (Tensor, list, tuple)):
                    part = self.graph.call_function(operator.getitem, (node, i))
                    part.meta.update(val=item, module="", source=None)
                    self._bind(item, part)

    def _placeholder(self, kind: str, tensor: Tensor) -> fx.Node:
        first = next(iter(self.graph.nodes), None)
        with self.graph.inserting_before(first) if kind == "constant" else self.graph.inserting_before(None):
            node = self.graph.placeholder(f"{kind}_{len(self._alive)}")
        node.meta.update(val=tensor, real=tensor, module="", source=None, kind=kind, names=(node.name,))
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)
        return node

    def argument(self, value: Any) -> Any:
        """A tensor as its node, anything else as it is."""
        return self.node(value) if isinstance(value, Tensor) else value
