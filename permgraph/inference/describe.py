"""From axis types to a `PermutationSpec`: name the groups and write each parameter's axes as expressions."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set

from torch import fx

from permgraph.algebra import Axes, Axis, Index, Kind
from permgraph.algebra.limits import OUT_OF_TIME
from permgraph.capture import Captured
from permgraph.inference import unread
from permgraph.inference.fibres import Fibres
from permgraph.inference.outputs import with_outputs
from permgraph.inference.solution import Solution, is_weight
from permgraph.rules.typed_tensor import TypedTensor
from permgraph.spec import PermutationSpec, Pin, UnknownOp
from permgraph.spec.binding import Group
from permgraph.spec.expressions import Axis as Expression
from permgraph.spec.expressions import Family, Fixed, Label, Product, Ref, Sum
from permgraph.spec.provenance import Constraints, SlotPin, Tie, Unread

#: How the note begins that a spec holds for the branch which the values of weights and inputs chose.
ON_REAL_TENSORS = "inferred on real tensors"


def describe(captured: Captured, solution: Solution, fibres: Fibres) -> PermutationSpec:
    """The last stage: the spec of a captured graph, its groups named and its axes written as expressions."""
    writer = Writer(solution, fibres)
    notes = list(captured.remarks)
    if captured.mode == "real":
        notes.append(f"{ON_REAL_TENSORS}, for the branch that they took, because {captured.fallback_reason}")
    if captured.opaque:
        notes.append(
            f"what objects of these types that the model returns hold was not seen: {', '.join(captured.opaque)}"
        )
    if kept := _kept_and_moving(solution):
        more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
        notes.append(f"the forward pass keeps tensors whose units move, as {', '.join(kept[:3])}{more}")
    if late := {number for *_, why, number in solution.ledger().pins if why == OUT_OF_TIME}:
        notes.append(f"max_seconds was up while solving: what {len(late)} operators touch stays put")
    unused = tuple(dict.fromkeys((*captured.unused, *solution.unread)))
    loose = writer.unread_axes()
    notes += unread.notes(solution, [(entry.parameter, entry.groups) for entry in loose], solution.unread)
    names = [node.meta["names"] for node in solution.nodes if is_weight(node)]
    spec = PermutationSpec(
        groups=writer.groups(),
        axes=writer.expressions(),
        shapes={name: tensor.shape for name, tensor in writer.parameters.items()},
        aliases={alias: first for first, *aliases in names for alias in aliases},
        pins=writer.pins(),
        unknown_ops=writer.unknown_ops(),
        unused=unused,
        unread=loose,
        model_class=captured.model_class,
        notes=tuple(notes),
        constraints=writer.constraints(),
    )
    return with_outputs(spec, solution, writer.axes_of)


def _kept_and_moving(solution: Solution) -> list[str]:
    """The attributes in which the forward pass leaves tensors on the model that a permutation renumbers."""
    left = {node: name for end in solution.nodes for node, name in end.meta.get("left", {}).items()}
    return sorted({
        name
        for node, name in left.items()
        if any(a.pinned is None for axis in solution.values[node].dims for a in solution.axes.atoms(axis))
    })  # fmt: skip


class Writer:
    """Turns a solution into the parts of a spec."""

    def __init__(self, solution: Solution, fibres: Fibres) -> None:
        self.solution = solution
        self.axes: Axes = solution.axes
        self.ledger = solution.ledger()
        weights = solution.parameters.items()
        self.parameters = {n: t for n, t in weights if t.dtype.is_floating_point or t.dtype.is_complex}
        self.unread = frozenset(solution.unread)
        self.parents = dict(fibres.parents)
        self.inner: set[Axis] = set()  # the atoms of joined factors but the first of each
        self.fused = self._fuse(fibres.mutual)
        moving = list(dict.fromkeys(self.fused.get(atom, atom) for atom in fibres.moving))
        fibred_over = {h for parents in self.parents.values() for h in parents}
        self.names = self._names([*moving, *(h for h in fibred_over if h.pinned is not None)])

    def groups(self) -> dict[str, Group]:
        """Every group, parents before children."""
        atoms = sorted(self.names, key=lambda atom: len(self.parents.get(atom, ())))
        return {
            self.names[atom]: Group(
                self.names[atom],
                atom.size,
                tuple(self.names[h] for h in self.parents.get(atom, ())),
                fixed=atom.pinned is not None,
            )
            for atom in atoms
        }

    def expressions(self) -> dict[str, tuple[Expression, ...]]:
        """For each parameter the expression of each of its dimensions."""
        return {name: self._parameter(name, tensor) for name, tensor in self.parameters.items()}

    def pins(self) -> tuple[Pin, ...]:
        """Every parameter axis, or factor of one, that stays put."""
        found = []
        for name, tensor in self.parameters.items():
            for dim in range(tensor.ndim):
                if name in self.unread:
                    found.append(Pin(name, dim, tensor.shape[dim], "never read by the forward pass"))
                    continue
                seen = set()
                for atom in self.axes.atoms(tensor.dims[dim]):
                    if atom.pinned is not None and atom not in seen:
                        seen.add(atom)
                        found.append(Pin(name, dim, atom.size, atom.pinned.reason, *self._place(atom.pinned.node)))
        return tuple(found)

    def unread_axes(self) -> tuple[Unread, ...]:
        """Every parameter axis of which no pass read all, and that may belong to groups that move."""
        found = []
        for loose in unread.loose_axes(self.solution):
            atoms = dict.fromkeys(self.fused.get(atom, atom) for atom in loose.atoms)
            groups = tuple(self.names[atom] for atom in atoms if atom in self.names)
            if groups:
                found.append(Unread(loose.parameter, loose.dim, loose.size, groups))
        return tuple(found)

    def unknown_ops(self) -> tuple[UnknownOp, ...]:
        """Operators without a rule, with the place of the first call of each."""
        numbers: dict[str, list[int]] = {}
        for number in self.ledger.unknown:
            numbers.setdefault(str(self.solution.nodes[number].target), []).append(number)
        return tuple(UnknownOp(name, len(found), *self._place(found[0])[1:]) for name, found in numbers.items())

    def constraints(self) -> Constraints:
        """What tied which slots, and where pins were put."""
        ties = {
            (a.name, i, b.name, j): Tie(slot(a, i), slot(b, j), *self._place(n))
            for a, i, b, j, n in self.ledger.ties
            if (a, i) != (b, j)
        }
        pins = {(t.name, d, why): SlotPin(slot(t, d), why, *self._place(n)) for t, d, why, n in self.ledger.pins}
        return Constraints(tuple(ties.values()), tuple(pins.values()))

    # -- factors that are one axis -------------------------------------------------------------------------------------

    def _fuse(self, mutual: Set[tuple[Axis, Axis]]) -> dict[Axis, Axis]:
        """Join factors which a view has split and nothing tells apart: ``(h d)`` is one axis then, no wreath product.

        That is so where each may depend on the other, and possible where they always stand side by side. Returns for
        each atom of such a run the atom that takes the place of all.
        """
        after: dict[Axis, set[Axis | None]] = defaultdict(set)
        before: dict[Axis, set[Axis | None]] = defaultdict(set)
        if mutual:
            for tensor in self.parameters.values():
                for axis in tensor.dims:
                    for factors in self._runs(axis):
                        for left, right in itertools.pairwise([None, *factors, None]):
                            if left is not None:
                                after[left].add(right)
                            if right is not None:
                                before[right].add(left)
        fused: dict[Axis, Axis] = {}
        for first in {h: None for pair in mutual for h in pair}:
            run = [first]
            while first not in fused and len(after[run[-1]]) == 1:
                (following,) = after[run[-1]]
                if following is None or len(before[following]) != 1 or following in fused:
                    break
                if not all({(atom, following), (following, atom)} <= mutual for atom in run):
                    break
                run.append(following)
            if len(run) > 1 and self._alike_outside(run) and not self._continues(run[0], before, mutual):
                whole = self.axes.atom(math.prod(atom.size for atom in run))
                fused.update(dict.fromkeys(run, whole))
                self.inner.update(run[1:])
                self.parents[whole] = tuple(p for p in self.parents.get(run[0], ()) if p not in run)
        for atom, parents in list(self.parents.items()):
            self.parents[atom] = tuple(dict.fromkeys(fused.get(p, p) for p in parents))
        return fused

    @staticmethod
    def _continues(first: Axis, before: Mapping[Axis, set[Axis | None]], mutual: Set[tuple[Axis, Axis]]) -> bool:
        """Whether a run that starts earlier could hold this one."""
        earlier = before[first]
        return len(earlier) == 1 and (first, next(iter(earlier))) in mutual

    def _alike_outside(self, run: Sequence[Axis]) -> bool:
        """Whether the atoms of a run have the same parents beside one another, and are parents of the same atoms."""
        own = {frozenset(p for p in self.parents.get(atom, ()) if p not in run) for atom in run}
        over = {frozenset(a for a, parents in self.parents.items() if atom in parents and a not in run) for atom in run}
        return len(own) == 1 and len(over) == 1

    def _runs(self, axis: Axis) -> Iterator[list[Axis | None]]:
        """The factors of each product in an axis, in order; None for one that is no atom."""
        axis = self.axes.resolve(axis)
        factors = self.axes.factors(axis)
        if axis.kind in (Kind.ATOM, Kind.PRODUCT):
            yield [factor if factor.kind is Kind.ATOM else None for factor in factors]
        for child in factors if axis.kind is Kind.PRODUCT else axis.children:
            if child.kind is not Kind.ATOM or axis.kind is not Kind.PRODUCT:
                yield from self._runs(child)

    # -- names ---------------------------------------------------------------------------------------------------------

    def _names(self, atoms: Sequence[Axis]) -> dict[Axis, str]:
        """Each atom by the module that makes it: the first whose parameter has the atom where results come out."""
        wanted = set(atoms)
        origin: dict[Axis, str] = {}
        for produced in (True, False):
            for name in self.solution.order:
                tensor = self.parameters[name]
                for dim in range(tensor.ndim):
                    if produced and not self._is_output(tensor, dim):
                        continue
                    for atom in (self.fused.get(a, a) for a in self.axes.atoms(tensor.dims[dim])):
                        if atom in wanted:
                            module = name.rpartition(".")[0] or name
                            origin.setdefault(atom, name if module.isdecimal() else module)
        count = Counter(origin.values())
        seen: Counter[str] = Counter()
        names = {}
        for atom, module in origin.items():
            names[atom] = module if count[module] == 1 else f"{module}#{seen[module]}"
            seen[module] += 1
        return names

    def _is_output(self, tensor: TypedTensor, dim: int) -> bool:
        """A weight's first dimension, a vector's only one, or any behind a pinned one (the table of an embedding)."""
        return dim == 0 or all(a.pinned is not None for axis in tensor.dims[:dim] for a in self.axes.atoms(axis))

    def _parameter(self, name: str, tensor: TypedTensor) -> tuple[Expression, ...]:
        return tuple(Fixed(size) for size in tensor.shape) if name in self.unread else self.axes_of(tensor)

    def axes_of(self, tensor: TypedTensor) -> tuple[Expression, ...]:
        """The expression of each dimension of any tensor of the graph, parameter or not."""
        labels: dict[Index, str] = {}
        for axis in tensor.dims:
            for index in self._indices(axis):
                labels.setdefault(index, f"s{len(labels)}")
        return tuple(self._expression(axis, labels) for axis in tensor.dims)

    def _indices(self, axis: Axis) -> list[Index]:
        """The sums to which the families in an axis refer."""
        axis = self.axes.resolve(axis)
        found = [index for child in axis.children for index in self._indices(child)]
        if axis.kind is Kind.FAMILY and axis.index is not None:
            found.insert(0, axis.index.find())
        return found

    def _expression(self, axis: Axis, labels: Mapping[Index, str]) -> Expression:
        axis = self.axes.resolve(axis)
        if axis.kind is Kind.ATOM:
            return Ref(self.names[axis]) if axis in self.names else Fixed(axis.size)
        if axis.kind is Kind.FAMILY:
            assert axis.index is not None
            return Family(labels[axis.index.find()], tuple(self._expression(c, labels) for c in axis.children))
        if axis.kind is Kind.PRODUCT:
            starts = [factor for factor in self.axes.factors(axis) if factor not in self.inner]
            return _product([self._expression(self.fused.get(factor, factor), labels) for factor in starts])
        assert axis.index is not None
        name = labels.get(axis.index.find())
        if name is not None:
            return Label(name, Sum(tuple(self._expression(child, labels) for child in axis.children)))
        return _sum([self._expression(part, labels) for part in self.axes.parts(axis)])

    def _place(self, number: int) -> tuple[str | None, str | None, str | None]:
        if number < 0:
            return None, None, None
        node: fx.Node = self.solution.nodes[number]
        operator = str(node.target) if node.op == "call_function" else None
        return operator, node.meta.get("module"), node.meta.get("source")


def slot(tensor: TypedTensor, dim: int) -> str:
    """The name of one dimension of one tensor in the graph of constraints."""
    return f"{tensor.name}[{dim}]" if dim >= 0 else f"{tensor.name}[values]"


def _product(factors: Sequence[Expression]) -> Expression:
    """A product in which neighbouring fixed factors are one."""
    merged: list[Expression] = []
    for factor in factors:
        if isinstance(factor, Fixed) and merged and isinstance(merged[-1], Fixed):
            merged[-1] = Fixed(merged[-1].size * factor.size)
        elif factor != Fixed(1):
            merged.append(factor)
    return merged[0] if len(merged) == 1 else Product(tuple(merged)) if merged else Fixed(1)


def _sum(parts: Sequence[Expression]) -> Expression:
    """A sum in which neighbouring fixed parts are one."""
    merged: list[Expression] = []
    for part in parts:
        if isinstance(part, Fixed) and merged and isinstance(merged[-1], Fixed):
            merged[-1] = Fixed(merged[-1].size + part.size)
        else:
            merged.append(part)
    return merged[0] if len(merged) == 1 else Sum(tuple(merged))
