"""One operator call as a rule sees it: typed tensors, and the words in which a rule states what is tied to what.

The patterns of labels are explained in `permgraph.rules.pattern`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from permgraph.algebra import Axes, Axis, Index, Kind, Pinned
from permgraph.algebra.cells import fits, stretches
from permgraph.errors import ConflictError
from permgraph.rules.ledger import Labelled, Ledger, Rearrangement, Relation
from permgraph.rules.pattern import Fitted, expand_via, fit
from permgraph.rules.typed_tensor import VALUE, TypedTensor, loose_families, matching_dims, provides

EQUAL = "equal values are told apart by their place"


def _flat(values: Iterable[Any]) -> Iterator[TypedTensor]:
    """The tensors among these values, and in lists among them."""
    for value in values:
        if isinstance(value, TypedTensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, TypedTensor))


def _inside(axes: Mapping[str, Axis]) -> Labelled:
    """A tensor inside the operator, of which only the labels matter."""
    return Labelled(None, axes, dict.fromkeys(axes, 0))


class Call:
    """One call of an operator: its arguments by the names of its schema, its results, and the words for a rule."""

    def __init__(
        self,
        node: fx.Node,
        number: int,
        arguments: Mapping[str, Any],
        outs: Sequence[Any],
        axes: Axes,
        ledger: Ledger,
        memo: dict[Any, Any],
    ) -> None:
        self.node = node
        self.number = number
        self.arguments = arguments
        self.outs = outs
        self.axes = axes
        self.ledger = ledger
        self._memo = memo
        self._followed: set[int] = set()  # the tensors of whose values the rule has said where they go
        self._tensors = tuple(_flat(arguments.values()))
        self._results = tuple(_flat(outs))

    # -- arguments -----------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Any:
        if name not in self.arguments:
            raise ConflictError(f"there is no argument {name!r}; the schema has {', '.join(self.arguments) or 'none'}")
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument by its schema name, or `default` if this overload has none of that name (or None was given)."""
        given = self.arguments.get(name)
        return default if given is None else given

    @property
    def exchangeable_noise(self) -> bool:
        """Whether random values are training's: drawn each for itself, so that any order of them is as likely."""
        return bool(self.node.meta.get("training"))

    @property
    def out(self) -> TypedTensor:
        """The first (often the only) result."""
        first = self.outs[0] if self.outs else None
        if not isinstance(first, TypedTensor):
            raise ConflictError(f"{self.node.target} gives no tensor as its first result")
        return first

    @property
    def tensors(self) -> list[TypedTensor]:
        """The tensors among the arguments, in the order of the schema, lists flattened."""
        return list(self._tensors)

    @property
    def results(self) -> list[TypedTensor]:
        """The tensors among the results, lists flattened."""
        return list(self._results)

    def dim(self, tensor: TypedTensor, name: str = "dim", default: int | None = None) -> int:
        """A dimension argument, counted from the front."""
        given = self.get(name, default)
        if not isinstance(given, int):
            raise ConflictError(f"{self.node.target} has no number as its argument {name!r}, but {given!r}")
        return given % max(tensor.ndim, 1)

    def dim_list(self, tensor: TypedTensor, name: str = "dim") -> list[int]:
        """A list-of-dimensions argument, counted from the front; all of them if it is None or empty."""
        given = self.get(name)
        if given is None or (isinstance(given, (list, tuple)) and not given):
            return list(range(tensor.ndim))
        return [d % max(tensor.ndim, 1) for d in ([given] if isinstance(given, int) else given)]

    @staticmethod
    def names(
        tensor: TypedTensor | int,
        *,
        skip: Collection[int] = (),
        blank: Collection[int] = (),
        named: Mapping[int, str] | None = None,
    ) -> str:
        """A label for each dimension of a tensor, or of so many: ``"d0 d1 d2"``.

        The dimensions `skip` are left out, `blank` are left open, and some may be `named` otherwise.
        """
        count = tensor if isinstance(tensor, int) else tensor.ndim
        labels = {d: f"d{d}" for d in range(count) if d not in skip} | dict.fromkeys(blank, "_") | dict(named or {})
        return " ".join(labels[d] for d in sorted(labels))

    # -- words for rules -------------------------------------------------------------------------------------------

    def link(
        self, *slots: tuple[TypedTensor | None, str], via: Sequence[str] = (), why: str = "", **sizes: int
    ) -> None:
        """Tie the dimensions that bear the same label, see `permgraph.rules.pattern`; no tensor (None) ties nothing.

        `via` has the labels of tensors inside the operator, `why` the reason of what stays put, and `sizes` are those
        of factors in brackets.
        """
        given = [(tensor, pattern) for tensor, pattern in slots if tensor is not None]
        patterns = tuple((pattern, tensor.shape) for tensor, pattern in given)
        fitted = fit(patterns, tuple(via), tuple(sizes.items()), bool(why))
        tensors = [self._label(tensor, labels, why) for (tensor, _), labels in zip(given, fitted, strict=True)]
        if via:
            known = {label: axis for labelled in reversed(tensors) for label, axis in labelled.axes.items()}
            tensors += [_inside({label: known[label] for label in expand_via(pattern, known)}) for pattern in via]
        # A one-hot code has a single one along the axis of the values, so that nothing may differ along that axis.
        for labelled in [t for t in tensors if VALUE in t.where.values()]:
            tensors.append(_inside({m: axis for m, axis in labelled.axes.items() if labelled.where[m] != VALUE}))
        self._check_families(tensors)
        self._tie(tensors)
        self.ledger.relations.append(Relation(self.number, tuple(tensors)))

    def pointwise(self, *tensors: TypedTensor | None) -> None:
        """Tie tensors elementwise, with broadcasting: dimensions are counted from the last."""
        self.link(*((tensor, "...") for tensor in tensors))

    def move(self, source: TypedTensor, out: TypedTensor, dims: Sequence[int | None]) -> None:
        """Tie ``out``'s dimensions to those of `source` with the numbers `dims`; None: a dimension of its own."""
        self.link((source, self.names(source)), (out, " ".join("_" if d is None else f"d{d}" for d in dims)))
        self.carry_values(source, out, all_of_them=True)

    def regroup(self, source: TypedTensor, out: TypedTensor) -> None:
        """A view: the same elements in the same order under another shape."""
        runs = matching_dims(source.shape, out.shape) if 0 not in source.shape else self._around_none(source, out)
        for left, right in runs:
            merged = self.axes.product([source.dims[d] for d in left])
            for d, factor in zip(right, self.axes.split(merged, [out.shape[d] for d in right]), strict=True):
                self.axes.unify(out.dims[d], factor)
            for i, j in itertools.product(left, right):
                self.note_tie(source, i, out, j)
        self.note_rearrangement(source, out, how=("view",))
        self.carry_values(source, out, all_of_them=True)

    def _around_none(self, source: TypedTensor, out: TypedTensor) -> Sequence[tuple[Sequence[int], Sequence[int]]]:
        """The runs of dimensions of a view without elements that would match if there were some.

        With several dimensions of none, or others than these before and behind it, nothing tells, and all stay put.
        """
        i, j = source.shape.index(0), out.shape.index(0)
        before, behind = (source.shape[:i], out.shape[:j]), (source.shape[i + 1 :], out.shape[j + 1 :])
        if math.prod(before[0]) != math.prod(before[1]) or not 0 < math.prod(behind[0]) == math.prod(behind[1]):
            self.pin_all([source, out], "viewed in another shape where there was no element")
            return ()
        after = [([d + i + 1 for d in left], [d + j + 1 for d in right]) for left, right in matching_dims(*behind)]
        return [*matching_dims(*before), *after]

    def take(self, source: TypedTensor, out: TypedTensor, dim: int, start: int, end: int, *, keep: bool = True) -> None:
        """``out`` is indices start..end of one dimension of `source` (without that dimension if not `keep`)."""
        piece, restriction = self.axes.slice(source.dims[dim], start, end)
        if end - start < source.shape[dim]:
            self.ledger.taken.append(source)
        at = 0
        for d in range(source.ndim):
            if d == dim and not keep:
                continue
            axis = piece if d == dim else self.axes.restrict(source.dims[d], restriction)
            self.axes.unify(out.dims[at], axis)
            self.note_tie(source, d, out, at)
            at += 1
        self.note_rearrangement(source, out, how=("take", dim, start, keep))
        self.carry_values(source, out, all_of_them=True)

    def take_every(self, source: TypedTensor, out: TypedTensor, dim: int, start: int, step: int) -> None:
        """``out`` is every `step`-th index of one dimension from `start`: one column of (steps, step)."""
        rows, columns = self.axes.split(source.dims[dim], [source.shape[dim] // step, step])
        _, restriction = self.axes.slice(columns, start, start + 1)
        for d in range(source.ndim):
            axis = rows if d == dim else source.dims[d]
            self.axes.unify(out.dims[d], self.axes.restrict(axis, restriction))
            self.note_tie(source, d, out, d)
        self.note_rearrangement(source, out, how=("every", dim, start, step))
        self.carry_values(source, out)

    def take_known(self, source: TypedTensor, out: TypedTensor, dim: int, indices: Sequence[int]) -> None:
        """``out`` is these indices of one dimension of `source`, put one after the other."""
        wanted = [index % source.shape[dim] for index in indices]
        joints = [0, *(i for i in range(1, len(wanted)) if wanted[i] != wanted[i - 1] + 1), len(wanted)]
        runs = [(wanted[a], wanted[b - 1] + 1) for a, b in itertools.pairwise(joints)]
        if len(runs) == 1:
            self.take(source, out, dim, *runs[0])
            return
        pieces = self.remember("pieces", lambda: [self.tensor_like(source, dim, end - start) for start, end in runs])
        for piece, (start, end) in zip(pieces, runs, strict=True):
            self.take(source, piece, dim, start, end)
        self.concatenate(pieces, out, dim)

    def concatenate(self, parts: Sequence[TypedTensor], out: TypedTensor, dim: int) -> None:
        """``out`` is the concatenation of `parts` along `dim`."""
        parts = [part for part in parts if part.ndim == out.ndim and part.shape[dim] > 0]
        if not parts:
            return
        index = self.remember("concatenation", Index)
        total = self.axes.sum([part.dims[dim] for part in parts], index)
        self.axes.unify(out.dims[dim], total)
        for d in range(out.ndim):
            members = [part.dims[d] for part in parts]
            if d != dim and out.shape[d] > 1:
                if len(parts) == 1 or any(self._is_pinned(member) for member in members):
                    for member in members:
                        self.axes.unify(out.dims[d], member)
                else:
                    self.axes.unify(out.dims[d], self.axes.family(index, members))
            for part in parts:
                self.note_tie(part, d, out, d)
        self.note_rearrangement(*parts, out, how=("join", dim))
        if out.is_integral:
            self.share_values([*parts, out])
        else:
            for part in parts:
                self.pin_values(part, "an index was turned into a number")

    def pad(self, source: TypedTensor, out: TypedTensor, margins: Sequence[tuple[int, int]]) -> None:
        """``out`` is `source` between margins before and after each dimension, which have no order of their own.

        Negative margins cut something off.
        """
        for d, (before, after) in enumerate(margins):
            axis, _ = self.axes.slice(source.dims[d], max(-before, 0), source.shape[d] - max(-after, 0))
            if before > 0 or after > 0:
                around = self.remember(f"margin {d}", lambda b=before, a=after: (self._margin(b), self._margin(a)))
                axis = self.remember(f"padded {d}", lambda m=around, inner=axis: self.axes.sum([m[0], inner, m[1]]))
            self.axes.unify(out.dims[d], axis)
            self.note_tie(source, d, out, d)
        self.note_rearrangement(source, out, how=("pad", tuple(margins)))

    def is_product(self, tensor: TypedTensor, dim: int, groups: int) -> bool:
        """Whether a dimension is that many groups of one size, as far as it is known, each made up like the others.

        It is none where a seam of a concatenation, or a group of another size, lies across a border.
        """
        return fits(self.axes, tensor.dims[dim], tensor.shape[dim] // groups)

    def cut_into_cells(self, tensor: TypedTensor, dim: int, groups: int, via: str) -> None:
        """Say that a dimension is cut at the borders of that many groups; those that are whole and alike may move.

        `via` has the labels, beside that of the groups, of a tensor inside the operator that has a value for each.
        """
        size = tensor.shape[dim] // groups
        for stretch in stretches(self.axes, tensor.dims[dim], size):
            start, end, period = stretch
            piece = self.remember(f"{start} to {end}", lambda n=end - start: self.tensor_like(tensor, dim, n))
            self.take(tensor, piece, dim, start, end)
            if stretch.rows == 1:
                continue
            shape = [*piece.shape[:dim], stretch.rows, period, *piece.shape[dim + 1 :]]
            rows = self.remember(
                f"rows of {period} from {start} to {end}",
                lambda n=shape: TypedTensor(f"{tensor.name}.rows", n, tensor.dtype, self.axes),
            )
            self.regroup(piece, rows)
            for low in range(0, period, size):
                cell = self.remember(
                    f"cell {low} of {period} from {start} to {end}", lambda t=rows: self.tensor_like(t, dim + 1, size)
                )
                self.take(rows, cell, dim + 1, low, low + size)
                self.link((cell, self.names(cell, named={dim: "g"})), via=[f"{via} g"])

    def unify(self, a: TypedTensor, i: int, b: TypedTensor, j: int) -> None:
        """Make one axis of two dimensions, of one tensor or of two: rows and columns are renumbered alike."""
        self.axes.unify(a.dims[i], b.dims[j])
        self.ledger.unified.append((a, i % a.ndim, b, j % b.ndim, self.number))

    def number_dims(self, index: TypedTensor, source: TypedTensor, dims: Sequence[int]) -> None:
        """Say that the values of an integer tensor number these dimensions of `source`, flattened."""
        index.value = self.axes.product([source.dims[d] for d in dims]) if len(dims) != 1 else source.dims[dims[0]]

    def pin(self, tensor: TypedTensor | None, dims: int | Sequence[int], reason: str) -> None:
        """Say that these dimensions stay put (`VALUE`: the axis that the tensor's values index)."""
        if tensor is None:
            return
        for dim in [dims] if isinstance(dims, int) else dims:
            axis = tensor.axis(dim)
            if axis.size > 1:
                self.axes.pin(axis, Pinned(reason, self.number))
                self.ledger.pins.append((tensor, dim, reason, self.number))

    def pin_all(self, tensors: Sequence[TypedTensor], reason: str) -> None:
        """Pin every dimension, and the axis of the values, of each of these tensors."""
        for tensor in tensors:
            self.pin(tensor, range(tensor.ndim), reason)
            self.pin_values(tensor, reason)

    def pin_values(self, tensor: TypedTensor | None, reason: str) -> None:
        """Pin the axis which the tensor's integer values index, if there is one."""
        if tensor is not None and tensor.value is not None:
            self.ignore_values(tensor)
            self.pin(tensor, VALUE, reason)

    def ignore_values(self, *tensors: TypedTensor) -> None:
        """Say that the operator does not read the values of these tensors, or that they need no further word."""
        self._followed.update(map(id, tensors))

    def pin_unfollowed_values(self) -> None:
        """Pin the axes that the values of the arguments index, where the rule has not said what becomes of them."""
        for tensor in self._tensors:
            if tensor.value is not None and id(tensor) not in self._followed:
                self.pin_values(tensor, f"an index went into {self.node.target}")
            elif tensor.viewed and any(tensor is result for result in self._results):
                # what is written into memory is read through another view, where nothing says what it numbers
                self.pin_values(tensor, "an index was written into a view")
        self._followed.clear()

    def carry_values(self, source: TypedTensor, out: TypedTensor, *, all_of_them: bool = False) -> None:
        """Say that the values of `out` are values of `source` (in the same order, if `all_of_them`)."""
        self.ignore_values(source)
        if source.value is not None:
            if all_of_them and math.prod(source.shape) == math.prod(out.shape):
                out.follow(source)
            if not out.is_integral:
                self.pin_values(source, "an index was turned into a number")
            elif out.value is None:
                out.value = source.value
            else:
                self.axes.unify(out.value, source.value)

    def share_values(self, tensors: Sequence[TypedTensor]) -> None:
        """Say that values of all these tensors may stand in one another's place; without a common axis, pin."""
        self.ignore_values(*tensors)
        values = [tensor.value for tensor in tensors if tensor.value is not None]
        if not values:
            return
        untyped = [t for t in tensors if t.value is None and t not in self.results]
        if untyped or len({value.size for value in values}) > 1:
            for tensor in tensors:
                self.pin_values(tensor, "indices are mixed with other integers")
            return
        for tensor in tensors:
            if tensor.value is None:
                tensor.value = values[0]
            else:
                self.axes.unify(tensor.value, values[0])

    def remember(self, key: str, make: Any) -> Any:
        """Something that this call makes once and finds again when its rule runs a second time."""
        slot = (self.number, key)
        if slot not in self._memo:
            self._memo[slot] = make()
        return self._memo[slot]

    def note_tie(self, a: TypedTensor, i: int, b: TypedTensor, j: int) -> None:
        """Note for explanations that two dimensions are tied; links and moves do so by themselves."""
        if a.shape[i] > 1 and b.shape[j] > 1:
            self.ledger.ties.append((a, i, b, j, self.number))

    def note_rearrangement(self, *tensors: TypedTensor, how: tuple[Any, ...]) -> None:
        """Note that this call moved whole axes about between these tensors, and how; see `Rearrangement`."""
        self.ledger.rearrangements.append(Rearrangement(self.number, tensors, how))

    def tensor_like(self, tensor: TypedTensor, dim: int, size: int) -> TypedTensor:
        """A tensor inside the operator, of another's shape but for one dimension."""
        shape = [size if d == dim else n for d, n in enumerate(tensor.shape)]
        return TypedTensor(f"{tensor.name}.inner", shape, tensor.dtype, self.axes)

    def unknown(self) -> None:
        """No rule applies: pin everything that the call touches, and list it."""
        self.ledger.unknown.append(self.number)
        self.pin_all([*self.tensors, *self.results], f"no rule for {self.node.target}")

    # -- inside ------------------------------------------------------------------------------------------------------

    def _margin(self, size: int) -> Axis:
        return self.axes.atom(size) if size > 0 else self.axes.sum([])

    def _is_pinned(self, axis: Axis) -> bool:
        axis = self.axes.resolve(axis)
        return axis.kind is Kind.ATOM and axis.pinned is not None

    def _label(self, tensor: TypedTensor, fitted: Fitted, why: str) -> Labelled:
        """The axis of each label of a pattern; along dimensions of one, and where it does not vary, it has none."""
        labelled: dict[str, Axis] = {}
        where: dict[str, int] = {}
        for d, factors in enumerate(fitted.dims):
            if d in tensor.uniform:
                continue
            whole = tensor.dims[d]
            axes = [whole] if len(factors) == 1 else self.axes.split(whole, [factor.size for factor in factors])
            for factor, axis in zip(factors, axes, strict=True):
                if axis.size == 1:
                    continue
                if factor.stays:
                    self.axes.pin(axis, Pinned(why, self.number))
                    self.ledger.pins.append((tensor, d, why, self.number))
                if factor.label != "_":
                    labelled[factor.label] = axis
                    where[factor.label] = d
        if fitted.value is not None:
            self.ignore_values(tensor)
            if tensor.value is not None and tensor.value.size != 1:
                labelled[fitted.value] = tensor.value
                where[fitted.value] = VALUE
        return Labelled(tensor, labelled, where)

    def _check_families(self, tensors: Sequence[Labelled]) -> None:
        """Collapse each family whose sum is not seen, under one label, by every tensor that has the family's label."""
        if not self.axes.has_families:
            return
        for labelled in tensors:
            if labelled.tensor is not None and 0 in labelled.tensor.shape:
                continue  # no element shows which member is meant
            for label, axis in labelled.axes.items():
                for loose in list(loose_families(self.axes, axis)):
                    others = {m: other for m, other in labelled.axes.items() if m != label}
                    givers = [m for m, other in others.items() if provides(self.axes, other, loose)]
                    if len(givers) != 1 or any(label in t.axes and givers[0] not in t.axes for t in tensors):
                        self.axes.collapse(loose.family)

    def _tie(self, tensors: Sequence[Labelled]) -> None:
        first: dict[str, tuple[TypedTensor, int, Axis]] = {}
        later: list[tuple[Axis, Axis]] = []
        for labelled in tensors:
            if labelled.tensor is None:
                continue
            for label, axis in labelled.axes.items():
                dim = labelled.where[label]
                if label not in first:
                    first[label] = labelled.tensor, dim, axis
                    continue
                other, other_dim, known = first[label]
                self.ledger.ties.append((other, other_dim, labelled.tensor, dim, self.number))
                if self.axes.has_families and any(True for _ in loose_families(self.axes, axis)):
                    later.append((known, axis))
                else:
                    self.axes.unify(known, axis)
        for known, axis in later:  # the sums that families refer to must have met before
            self.axes.unify(known, axis)
