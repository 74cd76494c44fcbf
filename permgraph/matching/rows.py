"""Rows that mean the same in networks with other numbers of them: tokens of two vocabularies, classes of two heads.

Nothing acts on such rows, so they say which units correspond as far as both networks have them, and the others are
moved along. Networks are matched on the rows in common, by one spec, and each is moved by a spec of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from permgraph.errors import MismatchError
from permgraph.spec.elements import AnyElement
from permgraph.spec.expressions import Axis, Fixed
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.weights.state_dict import is_continuous

Names: TypeAlias = Mapping[str, int] | Mapping[int, str] | Sequence[str]
"""What the rows of one network are called, as ``tokenizer.get_vocab()``, ``config.id2label`` or a list says it."""


@dataclass(frozen=True)
class UnionRows:
    """Rows of networks of which the result has all: those of the first, and after them what only others have.

    Attributes:
        names: what the rows of each network are called, as ``rows=`` of `align` and `merge` takes it. With ``"common"``
            the first rows are the same, and further ones are those of the network that has most.

    Example:
        >>> spec = PermutationSpec.parse("head.bias  2  .\\ngroups: unit 1")
        >>> a, b = {"head.bias": torch.tensor([1.0, 2.0])}, {"head.bias": torch.tensor([5.0, 4.0, 3.0])}
        >>> from permgraph import merge
        >>> rows = UnionRows([["cat", "dog"], ["owl", "dog", "cat"]])
        >>> merge([a, b], spec=spec, rows=rows).state_dict["head.bias"].tolist()
        [2.0, 3.0, 5.0]
    """

    names: Any


RowNames: TypeAlias = Literal["common"] | Sequence[Names] | Sequence[Sequence[Names]] | UnionRows
"""For each network what its rows are called, or a list of that for rows of several kinds; or ``"common"``: the first
rows of both are the same, as far as both have them. As a `UnionRows`, the result has the rows of all."""


RESULT = "output of the model"
"""Why what a model returns stays put, in the words of a spec's pins."""


class Kind(NamedTuple):
    """Rows of one kind: what they are, and for each network the row of each name."""

    what: str
    rows: tuple[Mapping[str, int], ...]

    def fits(self, sizes: Sequence[int]) -> bool:
        """Whether these may be the rows of tables of these sizes, some of which may have rows to spare."""
        return all(
            rows and max(rows.values()) < size and 2 * len(rows) >= size
            for rows, size in zip(self.rows, sizes, strict=True)
        )


class Table(NamedTuple):
    """The rows of one parameter: in which dimension, and for each network where the result's rows are, or -1.

    The result has the rows of the first network, or after them those that only others have.
    """

    dim: int
    partners: tuple[Tensor, ...]

    def common(self, number: int) -> Tensor:
        """The rows of a network that all of them have, in the first one's order."""
        had = torch.stack(self.partners).ge(0).all(0)
        return self.partners[number][had]


@dataclass(frozen=True)
class Rows:
    """Which rows of several networks mean the same.

    Attributes:
        specs: for each network its spec, which differ in the numbers of rows.
        spec: the spec of the rows that all have.
        tables: the parameters of which rows are matched.
        notes: what was matched, and what is left.
        union: whether the result has the rows of all networks, and not those of the first alone.
    """

    specs: tuple[PermutationSpec, ...]
    spec: PermutationSpec
    tables: Mapping[str, Table]
    notes: tuple[str, ...]
    union: bool = False

    @classmethod
    def of(
        cls,
        spec: PermutationSpec,
        states: Sequence[Mapping[str, Any]],
        kinds: Sequence[Kind],
        *,
        first_ones: bool = False,
        tables: Iterable[str] = (),
        names: Sequence[str] = ("A", "B"),
        union: bool = False,
    ) -> Rows | None:
        """Find them; None if all networks have the same rows.

        Args:
            spec: of the first network.
            states: tensors, or what has their shapes, of each.
            kinds: what rows are called.
            first_ones: take the first rows of each as the same, where no kind fits.
            tables: parameters that have rows of the first kind, also where the networks have equally many.
            names: what to call the networks.
            union: whether the result has the rows of all.

        Raises:
            MismatchError: parameters differ in something else than the number of rows on which nothing acts; or nothing
                says which of them mean the same, or they have none in common.
        """
        if spec.stacks and not kinds and not first_ones:
            return None
        in_place = ("modules that could change places stay where they are",) if spec.stacks else ()
        spec = spec.modules_in_place()
        shapes = [_shapes(spec, state) for state in states]
        tables = {spec.canonical(name) for name in tables}
        found: dict[str, Table] = {}
        told: dict[str, None] = {}
        results = {pin.parameter for pin in spec.pins if not pin.dim and pin.reason == RESULT} if union else set()
        for name, axes in spec.axes.items():
            every = [each.get(name, spec.shapes[name]) for each in shapes]
            dim = _row_dimension(name, axes, every, names)
            reordered = dim is None and (name in tables or name in results) and bool(kinds)
            if dim is None and not reordered:
                continue
            dim = 0 if dim is None else dim
            sizes = [shape[dim] for shape in every]
            fitting = [kind for kind in kinds if kind.fits(sizes)]
            if reordered and name not in tables:  # nothing else says that these are classes
                fitting = [kind for kind in fitting if all(len(rows) == sizes[0] for rows in kind.rows)]
            kind = next(iter(fitting), None)
            if kind is None and reordered:
                continue
            if kind is None and not first_ones:
                raise MismatchError(
                    f"{name!r} has shape {every[0]} in {names[0]} but {next(s for s in every if s != every[0])} in "
                    f'{names[_first_other(every)]}, and nothing says which rows mean the same: rows="common" takes the '
                    "first of both, and names of the rows may be given, such as tokenizer.get_vocab() of both"
                )
            partners = _partners(kind, sizes, union)
            table = Table(dim, partners)
            if reordered and all(torch.equal(each, torch.arange(sizes[0])) for each in partners):
                continue
            if not len(table.common(0)):
                raise MismatchError(f"{name!r}: no row of {names[0]} has the name of one of every other network")
            found[name] = table
            told.update(dict.fromkeys(_notes(kind, table, sizes, names, union)))
        if not found:
            return None
        specs = tuple(resized(spec, each) for each in shapes)
        common = {name: list(spec.shapes[name]) for name in found}
        for name, table in found.items():
            common[name][table.dim] = len(table.common(0))
        return cls(specs, resized(spec, {n: tuple(s) for n, s in common.items()}), found, (*told, *in_place), union)

    def shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape in the result of a parameter that has this shape in any of the networks."""
        table = self.tables.get(self.spec.aliases.get(name, name))
        rows = {} if table is None else {table.dim: len(table.partners[0])}
        return tuple(rows.get(dim, size) for dim, size in enumerate(shape))

    def completed(self, number: int, name: str, tensor: Tensor, first: Tensor) -> Tensor:
        """A parameter of a network in the layout of the result, with the first network's rows where it has none."""
        table = self.tables.get(self.spec.aliases.get(name, name))
        if table is None:
            return tensor
        at, at_first = (table.partners[n].to(tensor.device) for n in (number, 0))
        own = tensor.detach().index_select(table.dim, at.clamp(min=0))
        others = first.to(tensor).detach().index_select(table.dim, at_first.clamp(min=0))
        return torch.where(_along(at >= 0, table.dim, tensor.ndim), own, others)

    def pick(self, number: int, name: str, tensor: Tensor) -> Tensor:
        """A parameter of a network with the rows in common alone; any other as it is."""
        table = self.tables.get(self.spec.aliases.get(name, name))
        if table is None:
            return tensor
        return tensor.detach().index_select(table.dim, table.common(number).to(tensor.device))

    def common(self, number: int, state: Mapping[str, Any]) -> dict[str, Any]:
        """A network with the rows in common alone; what is tied stays tied."""
        done: dict[tuple[int, str], Any] = {}
        out = {}
        for key, value in state.items():
            same = id(value), self.spec.aliases.get(key, key)
            if same not in done:
                done[same] = self.pick(number, key, value) if isinstance(value, Tensor) else value
            out[key] = done[same]
        return out

    def own(self, number: int, element: AnyElement) -> AnyElement:
        """An element of the group of the rows in common, as one of a network's own."""
        return on_spec(element, self.specs[number])

    def filled(self, name: str, tensors: Sequence[Tensor], shares: Sequence[float]) -> list[Tensor]:
        """A parameter of each network in the layout of the result: rows that one has not got are the others' mean.

        So the mean of all, with these shares, is in each row the mean of those that have it.
        """
        table = self.tables.get(self.spec.aliases.get(name, name))
        if table is None:
            return list(tensors)
        spread, had = [], []
        for tensor, partners in zip(tensors, table.partners, strict=True):
            at = partners.to(tensor.device)
            rows = tensor.detach().index_select(table.dim, at.clamp(min=0))
            spread.append(rows)
            had.append(_along(at >= 0, table.dim, tensor.ndim))
        weights = [share * mask.double() for share, mask in zip(shares, had, strict=True)]
        whole = sum(weights[1:], weights[0])
        work = torch.promote_types(spread[0].dtype, torch.float32)
        mean = sum(
            (rows.to(work) * (w / whole.clamp(min=1e-300)).to(work) for rows, w in zip(spread, weights, strict=True)),
            torch.zeros_like(spread[0], dtype=work),
        )
        mean = torch.where(whole > 0, mean, spread[0].to(work))  # where those that have it do not count
        return [torch.where(m, rows, mean.to(rows.dtype)) for rows, m in zip(spread, had, strict=True)]

    def completed_state(self, number: int, state: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
        """A network in the layout of the result, as `completed` says; what is tied stays tied."""
        done: dict[tuple[int, int], Tensor] = {}
        out = dict(state)
        for key, value in state.items():
            if isinstance(value, Tensor) and self.spec.aliases.get(key, key) in self.tables:
                same = id(value), id(first[key])
                if same not in done:
                    done[same] = self.completed(number, key, value, first[key])
                out[key] = done[same]
        return out

    def in_first(self, states: Sequence[Mapping[str, Any]], shares: Sequence[float]) -> list[dict[str, Any]]:
        """Networks in the layout of the result, as `filled` says."""
        out: list[dict[str, Any]] = [dict(state) for state in states]
        done: dict[tuple[int, ...], list[Tensor]] = {}
        for key, value in states[0].items():
            if isinstance(value, Tensor) and is_continuous(value) and self.spec.aliases.get(key, key) in self.tables:
                same = tuple(id(state[key]) for state in states)
                if same not in done:
                    done[same] = self.filled(key, [state[key] for state in states], shares)
                for state, tensor in zip(out, done[same], strict=True):
                    state[key] = tensor
        return out


def kinds_of(rows: RowNames | None, count: int) -> tuple[Kind, ...]:
    """What a caller says of the rows of so many networks.

    Raises MismatchError if it does not say it for each.
    """
    if isinstance(rows, UnionRows):
        rows = rows.names
    if rows is None or (isinstance(rows, str) and rows == "common"):
        return ()
    if isinstance(rows, str) or not isinstance(rows, Sequence) or not rows:
        raise MismatchError(f'rows is "common", or the names of the rows of each network, not {str(rows)[:80]!r}')
    several: Any = rows if _is_several(rows) else [rows]
    for each in several:
        if len(each) != count:
            raise MismatchError(f"rows has the names of {len(each)} networks, and there are {count}")
    return tuple(Kind("names", tuple(map(rows_by_name, each))) for each in several)


def takes_first_ones(rows: RowNames | None) -> bool:
    """Whether the first rows of networks are to be taken as the same."""
    return bool((rows.names if isinstance(rows, UnionRows) else rows) == "common")


def _is_several(rows: Sequence[Any]) -> bool:
    first = rows[0]
    return not isinstance(first, Mapping) and bool(first) and not isinstance(first[0], str)


def rows_by_name(names: Any) -> dict[str, int]:
    """The row of each name, however it is told; of a name that stands twice the first."""
    if isinstance(names, Mapping):
        pairs = [(v, int(k)) if isinstance(v, str) else (k, int(v)) for k, v in names.items()]
    else:
        pairs = [(str(name), row) for row, name in enumerate(names)]
    found: dict[str, int] = {}
    for name, row in sorted(pairs, key=lambda pair: pair[1]):
        found.setdefault(str(name), row)
    return found


def labels_of(networks: Sequence[object]) -> tuple[Kind, ...]:
    """The classes of modules of transformers, by their configurations; nothing if one does not say."""
    labels = [getattr(getattr(network, "config", None), "id2label", None) for network in networks]
    if not all(isinstance(each, Mapping) and each for each in labels):
        return ()
    return (Kind("classes", tuple(map(rows_by_name, labels))),)


def tables_of(module: nn.Module) -> list[str]:
    """The parameters whose rows are tokens, of a module of transformers."""
    found = []
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        try:
            part = getattr(module, ask)()
        except Exception:  # many models have none, and each says so in another way
            continue
        if isinstance(part, nn.Module):
            own = {id(parameter) for parameter in part.parameters(recurse=False)}
            found += [name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in own]
    return found


def resized(spec: PermutationSpec, shapes: Mapping[str, tuple[int, ...]]) -> PermutationSpec:
    """The same spec with other sizes of dimensions on which nothing acts; other dimensions keep theirs."""
    axes: dict[str, tuple[Axis, ...]] = {}
    for name, own in spec.axes.items():
        shape = shapes.get(name, spec.shapes[name])
        if len(shape) != len(own):
            axes[name] = own
            continue
        axes[name] = tuple(Fixed(n) if isinstance(axis, Fixed) else axis for axis, n in zip(own, shape, strict=True))
    return spec if axes == dict(spec.axes) else replace(spec, axes=axes, shapes={})


def on_spec(element: AnyElement, spec: PermutationSpec) -> AnyElement:
    """The same element, of a spec that differs in sizes on which nothing acts."""
    if isinstance(element, Transformation):
        moved = Permutation(spec.permutations(), dict(element.permutation.arrays))
        return Transformation(spec, moved, element.matrices, element.scales, element.signs, element.gains)
    plain = spec.permutations()
    return Permutation(plain, dict(element.arrays))


def _shapes(spec: PermutationSpec, state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    known = {spec.aliases.get(key, key): value for key, value in state.items()}
    return {name: tuple(known[name].shape) for name in spec.axes if hasattr(known.get(name), "shape")}


def _first_other(shapes: Sequence[tuple[int, ...]]) -> int:
    return next(n for n, shape in enumerate(shapes) if shape != shapes[0])


def _row_dimension(
    name: str, axes: Sequence[Axis], shapes: Sequence[tuple[int, ...]], names: Sequence[str]
) -> int | None:
    """The dimension in which networks have other numbers of rows; None if their shapes are the same."""
    if all(shape == shapes[0] for shape in shapes):
        return None
    one, other = shapes[0], shapes[_first_other(shapes)]
    alike = all(len(shape) == len(one) for shape in shapes)
    dims = [d for d in range(len(one)) if any(shape[d] != one[d] for shape in shapes)] if alike else []
    if len(dims) != 1 or not isinstance(axes[dims[0]], Fixed):
        raise MismatchError(
            f"{name!r} has shape {one} in {names[0]} but {other} in {names[_first_other(shapes)]}"
            + (": a group acts there, and match_widths() matches networks of other widths" if len(dims) == 1 else "")
        )
    return dims[0]


def _along(mask: Tensor, dim: int, ndim: int) -> Tensor:
    """A mask of rows in the shape in which it meets a tensor."""
    return mask.reshape([-1 if d == dim else 1 for d in range(ndim)])


def rows_in_union(rows: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The row of each name in the result of a union: the first network's as they are, those of others after them.

    They come next after the last row that has a name, as a tokenizer counts what is added to it, also where the first
    network's tables have rows to spare.
    """
    found = dict(rows[0])
    after = max(found.values(), default=-1) + 1
    for each in rows[1:]:
        for name in sorted(each, key=each.__getitem__):
            if name not in found:
                found[name] = after
                after += 1
    return found


def _partners(kind: Kind | None, sizes: Sequence[int], union: bool) -> tuple[Tensor, ...]:
    """For each network where the result's rows are, or -1."""
    own = torch.arange(max(sizes) if union else sizes[0])
    if union and kind is not None:
        named = rows_in_union(kind.rows)
        whole = max(sizes[0], max(named.values()) + 1)
        partners = []
        for number, rows in enumerate(kind.rows):
            at = torch.full((whole,), -1)
            if not number:
                at[: sizes[0]] = torch.arange(sizes[0])  # its rows to spare too, but for those that get a name
            for name, row in named.items():
                at[row] = rows.get(name, -1)
            partners.append(at)
        return tuple(partners)
    if kind is None:
        return tuple(torch.where(own < size, own, -1) for size in sizes)
    found = [own]
    for rows in kind.rows[1:]:
        at = torch.full((sizes[0],), -1)
        for name, row in kind.rows[0].items():
            at[row] = rows.get(name, -1)
        found.append(at)
    return tuple(found)


def _notes(kind: Kind | None, table: Table, sizes: Sequence[int], names: Sequence[str], union: bool) -> Iterable[str]:
    common = len(table.common(0))
    how = "the first of both" if kind is None else f"by their {kind.what}"
    counts = [f"{size} in {name}" for size, name in zip(sizes[1:], names[1:], strict=True)]
    shown = (" and " if len(counts) == 1 else ", ").join([f"{sizes[0]} rows in {names[0]}", *counts])
    yield (
        f"of {shown}, {common} are in common, {how}: these count in matching, and the others are moved along with "
        "their units"
    )
    if union:
        added = int((table.partners[0] < 0).sum())
        yield f"the result has the {sizes[0]} rows of {names[0]} in their order, and {added} that only others have"
