"""One operator call as a rule sees it: typed tensors, and the words in which a rule states what is tied to what.

A rule is written in labels, like an einsum. Two dimensions with the same label are permuted alike; a label that a
tensor lacks is summed over, broadcast or produced. For a linear map,

    call.link((x, "... k"), (w, "o k"), (b, "o"), (out, "... o"))

Labels also say, without the rule's help, *which permutations may differ where*. An axis may be permuted differently at
each index of another exactly if every tensor which has the one has the other, and that is read off the labels. So a
rule must show each tensor that matters, the ones inside the operator included: softmax along d divides by a sum that
has every label but d, and says so with ``via=["..."]``.

A label in parentheses is a factor of a dimension, ``(g i)``, with sizes given by keyword; a label with ``!`` must stay
put, for the reason given as ``why``; ``_`` is a dimension about which the link says nothing; ``;`` comes before the
axis which an integer tensor's *values* index, so that an index tensor is labelled just as its one-hot encoding would
be: ``(idx, "b k ; e")``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from permgraph.algebra import Axes, Axis, Index, Kind, Pinned
from permgraph.errors import ConflictError

EQUAL = "equal values are told apart by their place"
VALUE = -1  # the dimension number by which the axis of an integer tensor's values goes


class TypedTensor:
    """A tensor of the graph with an axis for each dimension, and one for its values where they index something."""

    __slots__ = ("_origin", "dims", "dtype", "known", "name", "read", "shape", "tied", "uniform", "value", "viewed")

    def __init__(self, name: str, shape: Sequence[int], dtype: torch.dtype, axes: Axes) -> None:
        self.name = name
        self.shape = tuple(shape)
        self.dtype = dtype
        self.dims = [axes.atom(size) for size in self.shape]
        self.value: Axis | None = None
        self._origin: TypedTensor | None = None  # no cycle: thousands of them go as soon as nobody holds them
        # Dimensions along which it does not vary: no link ties them, as if they were broadcast.
        self.uniform: frozenset[int] = frozenset()
        self.tied: frozenset[int] = frozenset()  # dimensions along which elements may be equal by more than chance
        self.read = True  # whether anything depends on it
        self.viewed = False  # whether its memory is seen through other tensors as well
        # The values of a short vector of integers that the model's code has.
        self.known: tuple[int, ...] | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def origin(self) -> TypedTensor:
        """The tensor of which this one is a view of all elements: an index and its views are the same function."""
        return self._origin or self

    def follow(self, source: TypedTensor) -> None:
        """Say that this tensor holds the elements of `source`, all of them in the same order."""
        self._origin = None if source.origin is self else source.origin

    @property
    def is_integral(self) -> bool:
        return not (self.dtype.is_floating_point or self.dtype.is_complex) and self.dtype is not torch.bool

    def axis(self, dim: int) -> Axis:
        if dim == VALUE:
            assert self.value is not None
            return self.value
        return self.dims[dim]


@dataclass(frozen=True)
class Labelled:
    """A tensor in a link (None: one inside the operator): the axis of each label, and the dimension it stands in."""

    tensor: TypedTensor | None
    axes: Mapping[str, Axis]
    where: Mapping[str, int]


@dataclass(frozen=True)
class Relation:
    """What one link said of each of its tensors, those inside the operator included."""

    node: int
    tensors: tuple[Labelled, ...]


@dataclass(frozen=True)
class Rearrangement:
    """A call which moved whole axes about (view, slice, concatenation): its tensors hold the same atoms."""

    node: int
    tensors: tuple[TypedTensor, ...]


@dataclass
class Ledger:
    """Everything that the rules said, in the order in which they said it."""

    relations: list[Relation] = field(default_factory=list)
    rearrangements: list[Rearrangement] = field(default_factory=list)
    ties: list[tuple[TypedTensor, int, TypedTensor, int, int]] = field(default_factory=list)  # slot, slot, node
    pins: list[tuple[TypedTensor, int, str, int]] = field(default_factory=list)  # slot, reason, node
    unknown: list[int] = field(default_factory=list)
    taken: list[TypedTensor] = field(default_factory=list)  # of which a part was taken
    searched: list[tuple[TypedTensor, tuple[int, ...], int]] = field(default_factory=list)  # tensor, dims, node
    # What was searched for its largest elements, in any order, and these; dimension, node.
    unsorted: list[tuple[TypedTensor, TypedTensor, int, int]] = field(default_factory=list)

    def clear(self) -> None:
        for entries in vars(self).values():
            entries.clear()

    @classmethod
    def joined(cls, ledgers: Iterable[Ledger]) -> Ledger:
        """All that several ledgers hold, in one."""
        whole = cls()
        for ledger in ledgers:
            for name, entries in vars(ledger).items():
                vars(whole)[name].extend(entries)
        return whole


Pattern = tuple[tuple[tuple[str, ...], ...], "str | None"]


@lru_cache(maxsize=4096)
def parse_pattern(text: str) -> Pattern:
    """``"b (g i) _ ; e"`` as the labels of each dimension, and the label of the values."""
    labels, _, value = text.partition(";")
    dims: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for token in labels.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            group = []
        elif token == ")":
            assert group is not None, f"unbalanced parentheses in {text!r}"
            dims.append(tuple(group))
            group = None
        elif group is not None:
            group.append(token)
        else:
            dims.append((token,))
    return tuple(dims), value.strip() or None


@lru_cache(maxsize=4096)
def _placed(text: str, ndim: int) -> tuple[tuple[tuple[tuple[str, bool], ...], ...], str | None] | None:
    """A pattern for a tensor of `ndim` dimensions: of each the labels, and whether ``!`` says that they stay put."""
    dims, value = parse_pattern(text)
    if ("...",) in dims:
        at = dims.index(("...",))
        extra = ndim - (len(dims) - 1)
        dims = (*dims[:at], *((f"*{extra - 1 - k}",) for k in range(extra)), *dims[at + 1 :])
    if len(dims) != ndim:
        return None
    return tuple(tuple((label.rstrip("!") or "_", label.endswith("!")) for label in labels) for labels in dims), value


@lru_cache(maxsize=4096)
def matching_dims(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """The shortest runs of dimensions of two shapes that hold equally many indices, in order."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    i = j = 0
    while i < len(left) or j < len(right):
        a: list[int] = []
        b: list[int] = []
        product_a = product_b = 1
        while (not a and not b) or product_a != product_b:
            if i < len(left) and (product_a <= product_b or j == len(right)):
                a.append(i)
                product_a *= left[i]
                i += 1
            elif j < len(right):
                b.append(j)
                product_b *= right[j]
                j += 1
            else:
                raise ConflictError(f"cannot view {left} as {right}")
        found.append((tuple(a), tuple(b)))
    return tuple(found)


def loose_families(axes: Axes, axis: Axis, provided: frozenset[Index] = frozenset()) -> Iterator[Axis]:
    """The families in an axis whose sum is not in the same product: they need it in another dimension."""
    if not axes.contains_family(axis):
        return
    axis = axes.resolve(axis)
    if axis.kind is Kind.PRODUCT:
        factors = axes.factors(axis)
        provided |= {f.index.find() for f in factors if f.kind is Kind.SUM and f.index is not None}
        for factor in factors:
            yield from loose_families(axes, factor, provided)
    else:
        if axis.kind is Kind.FAMILY and axis.index is not None and axis.index.find() not in provided:
            yield axis
        for child in axis.children:
            yield from loose_families(axes, child, provided)


def provides(axes: Axes, axis: Axis, index: Index) -> bool:
    """Whether a family over `index` in another dimension can tell its member by this axis."""
    return any(f.kind is Kind.SUM and f.index is not None and f.index.find() is index for f in axes.factors(axis))


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
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument by its schema name, or `default` if this overload has none of that name (or None was given)."""
        found = self.arguments.get(name)
        return default if found is None else found

    @property
    def out(self) -> TypedTensor:
        """The first (often the only) result."""
        found = self.outs[0]
        assert isinstance(found, TypedTensor)
        return found

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
        found = self.get(name, default)
        assert isinstance(found, int)
        return found % max(tensor.ndim, 1)

    def dim_list(self, tensor: TypedTensor, name: str = "dim") -> list[int]:
        """A list-of-dimensions argument, counted from the front; all of them if it is None or empty."""
        found = self.get(name)
        if found is None or (isinstance(found, (list, tuple)) and not found):
            return list(range(tensor.ndim))
        given = [found] if isinstance(found, int) else list(found)
        return [d % max(tensor.ndim, 1) for d in given]

    # -- words for rules -------------------------------------------------------------------------------------------

    def link(
        self, *slots: tuple[TypedTensor | None, str], via: Sequence[str] = (), why: str = "", **sizes: int
    ) -> None:
        """Tie the dimensions that bear the same label; see the head of this module for the patterns."""
        tensors = [self._label(tensor, pattern, sizes, why) for tensor, pattern in slots if tensor is not None]
        if via:
            known = {label: axis for labelled in reversed(tensors) for label, axis in labelled.axes.items()}
            for pattern in via:
                inner = self._expand_virtual(pattern, known)
                tensors.append(_inside({label: known[label] for label in inner}))
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
        names = [f"d{i}" for i in range(source.ndim)]
        self.link((source, " ".join(names)), (out, " ".join("_" if d is None else names[d] for d in dims)))
        self.carry_values(source, out, all_of_them=True)

    def regroup(self, source: TypedTensor, out: TypedTensor) -> None:
        """A view: the same elements in the same order under another shape."""
        if 0 in source.shape:
            return
        for left, right in matching_dims(source.shape, out.shape):
            merged = self.axes.product([source.dims[d] for d in left])
            for d, factor in zip(right, self.axes.split(merged, [out.shape[d] for d in right]), strict=True):
                self.axes.unify(out.dims[d], factor)
            self._note_ties(source, left, out, right)
        self.note_rearrangement(source, out)
        self.carry_values(source, out, all_of_them=True)

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
        self.note_rearrangement(source, out)
        self.carry_values(source, out, all_of_them=True)

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
        self.note_rearrangement(*parts, out)
        if out.is_integral:
            self.share_values([*parts, out])
        else:
            for part in parts:
                self.pin_values(part, "an index was turned into a number")

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

    def note_rearrangement(self, *tensors: TypedTensor) -> None:
        """Note that this call moved whole axes about between these tensors, for the question of what may depend."""
        self.ledger.rearrangements.append(Rearrangement(self.number, tensors))

    def tensor_like(self, tensor: TypedTensor, dim: int, size: int) -> TypedTensor:
        """A tensor inside the operator, of another's shape but for one dimension."""
        shape = [size if d == dim else n for d, n in enumerate(tensor.shape)]
        return TypedTensor(f"{tensor.name}.inner", shape, tensor.dtype, self.axes)

    def unknown(self) -> None:
        """No rule applies: pin everything that the call touches, and list it."""
        self.ledger.unknown.append(self.number)
        self.pin_all([*self.tensors, *self.results], f"no rule for {self.node.target}")

    # -- inside ------------------------------------------------------------------------------------------------------

    def _is_pinned(self, axis: Axis) -> bool:
        axis = self.axes.resolve(axis)
        return axis.kind is Kind.ATOM and axis.pinned is not None

    def _label(self, tensor: TypedTensor, pattern: str, sizes: Mapping[str, int], why: str) -> Labelled:
        found = _placed(pattern, tensor.ndim)
        if found is None:
            raise ConflictError(f"{self.node.target}: pattern {pattern!r} does not fit shape {tensor.shape}")
        dims, value = found
        labelled: dict[str, Axis] = {}
        where: dict[str, int] = {}
        for d, labels in enumerate(dims):
            if d in tensor.uniform:
                continue
            if len(labels) == 1:
                axes = [tensor.dims[d]]
            else:
                given = [sizes.get(label) for label, _ in labels]
                rest = tensor.shape[d] // math.prod(size for size in given if size is not None)
                axes = self.axes.split(tensor.dims[d], [rest if size is None else size for size in given])
            for (label, stays), axis in zip(labels, axes, strict=True):
                if axis.size == 1:
                    continue
                if stays:
                    assert why, f"{self.node.target}: pattern {pattern!r} pins without saying why"
                    self.axes.pin(axis, Pinned(why, self.number))
                    self.ledger.pins.append((tensor, d, why, self.number))
                if label != "_":
                    if label in labelled:
                        raise ConflictError(f"{self.node.target}: label {label!r} stands twice in {pattern!r}")
                    labelled[label] = axis
                    where[label] = d
        if value is not None:
            self.ignore_values(tensor)
        if value is not None and tensor.value is not None and tensor.value.size != 1:
            labelled[value] = tensor.value
            where[value] = VALUE
        return Labelled(tensor, labelled, where)

    @staticmethod
    def _expand_virtual(pattern: str, known: Mapping[str, Axis]) -> list[str]:
        labels = [label for dim in parse_pattern(pattern)[0] for label in dim]
        starred = [label for label in known if label.startswith("*")] if "..." in labels else []
        return [label for label in (*labels, *starred) if label in known]

    def _check_families(self, tensors: Sequence[Labelled]) -> None:
        """Collapse each family whose sum is not seen, under one label, by every tensor that has the family's label."""
        if not self.axes.has_families:
            return
        for labelled in tensors:
            if labelled.tensor is not None and 0 in labelled.tensor.shape:
                continue  # no element shows which member is meant
            for label, axis in labelled.axes.items():
                for family in list(loose_families(self.axes, axis)):
                    assert family.index is not None
                    index = family.index.find()
                    others = {m: other for m, other in labelled.axes.items() if m != label}
                    givers = [m for m, other in others.items() if provides(self.axes, other, index)]
                    if len(givers) != 1 or any(label in t.axes and givers[0] not in t.axes for t in tensors):
                        self.axes.collapse(family)

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

    def _note_ties(self, a: TypedTensor, left: Sequence[int], b: TypedTensor, right: Sequence[int]) -> None:
        for i in left:
            for j in right:
                self.note_tie(a, i, b, j)
