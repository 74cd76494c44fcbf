"""Weights that met nothing but constants: a recurrent layer in its first step, whose state is zeros or ones.

Such a step shows what comes out of the weight, and not what goes in: nothing tells the columns apart that a constant
met, so that they seem free. From the second step on they meet the state: an axis of the same size, of a tensor with as
many elements, or of one from which that was taken or to which it was broadcast. Which one, nothing shows. So these
columns stay put; and so do all axes that could be it, unless every input has more than one step in some pass and the
model keeps no such state: what is still constant then, such as the zeros with which DETR's decoder begins, is taken to
be constant in every run, and named in the notes.

What is constant is told by what a tensor depends on, and not by the operators that it came through: neither inputs nor
a product with weights stand between it and a tensor that the code itself made. A part of a tensor may be so too, as
where a state was joined to an input, and so is what does not vary along a dimension, whatever it depends on.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from permgraph.algebra import Axis, Kind, Pinned
from permgraph.inference.operators import contracted_with, is_real
from permgraph.inference.solution import Solution, is_weight, tensors_in
from permgraph.rules.call import Call
from permgraph.rules.typed_tensor import TypedTensor

UNSEEN = "its weight met only constants"
ONE_STEP = "a weight met only constants, as in the first step of a sequence: one of this size may meet it in the second"

Atoms = frozenset[Axis]
State = tuple[int, int]  # the size of an axis, and that of all other dimensions of its tensor
NONE: Atoms = frozenset()
NO_STATES: frozenset[State] = frozenset()
MOVING = frozenset(["same", "kept", "moved", "joined", "padded", "looked up"])  # these sum nothing up


def pin_unseen(solution: Solution, run_until_stable: Callable[[Solution], None]) -> None:
    """Pin what of weights met only constants, and all axes that may be the state for which these stood."""
    search = _Search(solution)
    unseen = dict(search.unseen())
    states = search.states.union(*(found for _, found in unseen.values()))
    if not unseen and not states:
        return
    reasons = dict.fromkeys(unseen, UNSEEN)
    held_back = _may_be_one_step(solution, {size for size, _ in states})
    if not held_back:
        tensors = [(name, tensor) for name, tensor in solution.parameters.items() if tensor.shape]
        solution.unseen = tuple(
            name for name, t in tensors if any(a in unseen for axis in t.dims for a in solution.axes.atoms(axis))
        )
    for call in solution.calls if held_back else ():
        for tensor in call.results:
            for size, axis in zip(tensor.shape, tensor.dims, strict=True):
                for atom in solution.axes.atoms(axis):
                    if atom.pinned is None and any(_may_be(tensor, n, states) for n in (size, atom.size)):
                        reasons.setdefault(atom, ONE_STEP)
    said = []
    for number, node in solution.weights_read():
        tensor = solution.values[node]
        for dim, axis in enumerate(tensor.dims):
            met = dict.fromkeys(reasons[atom] for atom in solution.axes.atoms(axis) if atom in reasons)
            said += [(tensor, dim, reason, number) for reason in met]
    for atom, reason in reasons.items():
        solution.axes.pin(atom, Pinned(reason, unseen[atom][0] if atom in unseen else -1))
    if solution.axes.has_families:
        run_until_stable(solution)
    solution.ends.pins += said


def _may_be_one_step(solution: Solution, sizes: Collection[int]) -> bool:
    """Whether a state of one of these sizes is kept on the model, or inputs have one element along something.

    Of passes on inputs of several sizes the largest counts.
    """
    kept = [size for node in solution.nodes for left in node.meta.get("left", ()) for size in left.meta["val"].shape]
    largest: dict[str, list[int]] = {}
    for node in solution.nodes:
        if node.op == "placeholder" and node.meta["kind"] == "input":
            for name in node.meta["names"]:
                for tensor in tensors_in(solution.values.get(node)):
                    before = largest.get(name, [])
                    largest[name] = [max(pair) for pair in itertools.zip_longest(before, tensor.shape, fillvalue=0)]
    lists = {name[: found.start()] for name in largest for found in re.finditer(r"\[0\]", name)} - {"args"}
    alone = any(not any(name.startswith(f"{place}[1]") for name in largest) for place in lists)
    single = any(1 in shape for shape in largest.values())
    return bool(sizes) and (alone or single or not set(sizes).isdisjoint(kept))


def _may_be(tensor: TypedTensor, size: int, states: Iterable[State]) -> bool:
    """Whether an axis of this size in a tensor may be one of these states."""
    rows = math.prod(tensor.shape) // size
    return rows > 0 and any(size == n and (rows % k == 0 or k % rows == 0) for n, k in states)


class _Search:
    """Which nodes are constant, and of each tensor which axes come from constants alone."""

    def __init__(self, solution: Solution) -> None:
        self.solution = solution
        self.properties = solution.facts.operators.of
        self._fed = self._find_fed()
        self._constant = self._find_constant()
        self._from_constants: dict[int, Atoms] = {}  # by the `id` of the tensor
        self._calls = {call.node: call for call in solution.calls}
        self.states: set[State] = set()  # of constants that met a weight whose indices are told apart already
        self._margins: set[Axis] = set()  # what padding added: constant, and no state
        self._known: dict[Axis, Atoms] = {}

    def unseen(self) -> Iterator[tuple[Axis, tuple[int, frozenset[State]]]]:
        """Each axis of a weight that met only constants: the number of a node where it did, and for which states."""
        solution, live = self.solution, self.solution.facts.live
        # A gate whose only use is to be multiplied with zeros shows nothing either.
        shown = solution.facts.live_but_for(solution.facts.zeros)
        weights = {a for _, node in solution.weights_read() for a in self._atoms(solution.values[node])}
        real: set[Axis] = set()
        apart: list[tuple[Atoms, State]] = []
        candidates: list[tuple[Axis, int, frozenset[State]]] = []
        for number, node in enumerate(solution.nodes):
            call = self._calls.get(node)
            if call is not None:
                self._pass_on(call)
                if node in live and self.properties(node).values not in MOVING:
                    apart += self._taken_apart(call)
                    candidates += [(a, number, states) for a, states in self._summed_up(call) if a in weights]
            if node in self._fed and node in shown and node not in self._constant:
                for tensor in tensors_in(solution.values.get(node)):
                    real |= self._atoms(tensor) - self._from_constants.get(id(tensor), NONE)
        self.states = {state for atoms, state in apart if atoms.isdisjoint(real)}
        for atom, number, states in candidates:
            if atom not in real and atom.pinned is None:
                yield atom, (number, states)

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _read(self, node: fx.Node) -> list[fx.Node]:
        """The arguments of which a node reads elements; if it has none itself, of which it would."""
        if node.op != "call_function" or not self.properties(node).reads_values:
            return []
        return [source for source in node.all_input_nodes if _has_elements(source) or not _has_elements(node)]

    def _find_fed(self) -> set[fx.Node]:
        """What depends on inputs; of memory that is written to, whatever sees it."""
        memory = self.solution.facts.memory
        fed: set[fx.Node] = set()
        owners: set[fx.Node] = set()
        before = -1
        while before != len(fed):
            before = len(fed)
            for node in self.solution.nodes:
                if (
                    (node.op == "placeholder" and node.meta["kind"] == "input")
                    or any(source in fed for source in self._read(node))
                    or (owners and node in memory.written and memory.owner(node) in owners)
                ):
                    fed.add(node)
                    owners.update(map(memory.owner, memory.written_by(node)))
            if not owners:
                break
        return fed

    def _find_constant(self) -> set[fx.Node]:
        """What comes from a tensor that the code made, by way of no input and no product with weights; and zeros."""
        constant = set(self.solution.facts.zeros)
        for node in self.solution.nodes:
            if node in self._fed or not is_real(node) or is_weight(node):
                continue
            sources = self._read(node)
            made = node.op == "placeholder" or not sources
            if made or (self.properties(node).values != "mixed" and any(source in constant for source in sources)):
                constant.add(node)
        return constant

    # -- axes ------------------------------------------------------------------------------------------------------

    def _atoms(self, tensor: TypedTensor) -> Atoms:
        return frozenset().union(*(self._atoms_of(axis) for axis in tensor.dims))

    def _atoms_of(self, axis: Axis) -> Atoms:
        axis = self.solution.axes.resolve(axis)
        if axis not in self._known:
            self._known[axis] = frozenset(self.solution.axes.atoms(axis))
        return self._known[axis]

    def _of_argument(self, tensor: TypedTensor) -> Atoms:
        """The axes of an argument that come from constants alone, or along which it does not vary."""
        source = self.solution.uses.get(id(tensor))
        if source is not None:
            if source in self._constant:
                return self._atoms(tensor)
            own = self.solution.values[source]
            uniform = frozenset().union(*(self._atoms_of(tensor.dims[d]) for d in tensor.uniform))
            return uniform | self._from_constants.get(id(own), NONE)
        return self._from_constants.get(id(tensor), NONE)

    def _pass_on(self, call: Call) -> None:
        """Note which axes of the results come from constants alone."""
        if call.node in self._constant:
            for result in call.results:
                self._from_constants[id(result)] = self._atoms(result)
            return
        arguments = [(self._atoms(tensor), self._of_argument(tensor)) for tensor in call.tensors]
        constant = frozenset().union(*(known for _, known in arguments))
        padded = self.properties(call.node).values == "padded"
        if not constant and not padded:
            return
        varying = frozenset().union(*(atoms - known for atoms, known in arguments))
        for result in call.results:
            atoms = self._atoms(result)
            margins = atoms - constant - varying if padded else NONE
            self._margins |= margins
            self._from_constants[id(result)] = ((atoms & constant) - varying) | margins

    def _summed_up(self, call: Call) -> Iterator[tuple[Axis, frozenset[State]]]:
        """The axes over which a call sums that meet only constants, with the states for which these may stand."""
        arguments = [(tensor, self._of_argument(tensor)) for tensor in call.tensors]
        elements = [math.prod(tensor.shape) for tensor, known in arguments if known or tensor.uniform]
        if not elements:
            return
        left: Atoms = frozenset().union(*map(self._atoms, call.results))
        for tensor, _ in arguments:
            varying = {a for other, its in arguments if other is not tensor for a in self._atoms(other) - its}
            for axis in tensor.dims:
                gone = {a for a in self._atoms_of(axis) - left - varying if a.pinned is None}
                sizes = self._sizes(axis, gone - self._margins)
                states = frozenset((size, max(count // axis.size, 1)) for size in sizes for count in elements)
                yield from ((atom, NO_STATES if atom in self._margins else states) for atom in gone)

    def _taken_apart(self, call: Call) -> Iterator[tuple[Atoms, State]]:
        """The states for which constants may stand whose indices are told apart before a product sums over them.

        Those of zeros, whatever told them apart, and of others that were taken index by index; with the axes that they
        meet. Of another constant, such as waves of positions, its own values may tell.
        """
        product = contracted_with(call.node, self.properties(call.node))
        for factor, dim, met, along in (product, (*product[2:], *product[:2])) if product is not None else ():
            if factor in self._constant:
                tensor = self.solution.values[factor]
                size = tensor.shape[dim]
                if size > 1 and (factor in self.solution.facts.zeros or not self._atoms_of(tensor.dims[dim])):
                    other = self._atoms_of(self.solution.values[met].dims[along])
                    yield other, (size, max(math.prod(tensor.shape) // size, 1))

    def _sizes(self, axis: Axis, gone: set[Axis]) -> frozenset[int]:
        """The sizes of an axis, or of the parts of it, that consist of these."""
        axis = self.solution.axes.resolve(axis)
        if axis.kind is Kind.SUM and not gone.issuperset(self._atoms_of(axis)):
            return frozenset().union(*(self._sizes(part, gone) for part in axis.children))
        return frozenset([axis.size]) if not gone.isdisjoint(self._atoms_of(axis)) else frozenset()


def _has_elements(node: fx.Node) -> bool:
    val: Any = node.meta.get("val")
    return not isinstance(val, torch.Tensor) or math.prod(val.shape) > 0
