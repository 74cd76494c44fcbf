"""Search for symmetries of a call that its rule denies.

A candidate exchanges two indices on some of the inputs' axes of one size, everywhere or at one index of a further axis.
If the results come out renumbered and no element of the inferred group does that to the inputs, the rule is too strict.
Axes are taken apart into the factors that the rule gives them. The search finds every denied exchange of this form; it
does not try products of exchanges on axes of different sizes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from permgraph.errors import PermgraphError
from permgraph.spec.binding import IntArray, coordinates
from permgraph.spec.expressions import Axis, Label, Product, refs, size_of
from permgraph.verification.trial_of_rule import Trial, Typed

CLOSE = 1e-9
SHUFFLES = 12


@dataclass(frozen=True)
class Slot:
    """A factor of a dimension of an input: the number of the input, and of the factor in its refined shape."""

    tensor: int
    at: int
    dim: int
    axis: Axis


@dataclass(frozen=True)
class Exchange:
    """Indices i and j change places on these slots; if `beside` is not empty, only at index 0 of those slots."""

    slots: tuple[Slot, ...]
    beside: tuple[Slot, ...]
    i: int
    j: int


def denied(trial: Trial) -> Iterator[str]:
    """Each symmetry found that the rule denies, in words; at most one for each set of axes."""
    shapes = [_refined(typed, trial) for typed in trial.inputs]
    samples = _Samples(trial)
    told: set[tuple[Slot, ...]] = set()
    for exchange in _candidates(trial, shapes):
        if exchange.slots in told:
            continue
        targets = [
            _exchanged(torch.arange(math.prod(s)).reshape(s), k, exchange).reshape(-1) for k, s in enumerate(shapes)
        ]
        if _is_element(trial, [target.numpy() for target in targets]):
            continue
        if all(_holds(trial, exchange, targets, *sample) for sample in samples):
            told.add(exchange.slots)
            yield _words(exchange)


class _Samples:
    """Inputs with their results: the given ones first, then the same values in other places, made when asked for.

    What is a symmetry holds for them all; what held by chance does not.
    """

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._known = [(trial.tensors, trial.call(trial.tensors))]
        self._generator = torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
        for at in range(1 + SHUFFLES):
            if at == len(self._known):
                shuffled = tuple(map(self._shuffled, self._trial.tensors))
                self._known.append((shuffled, self._trial.call(shuffled)))
            yield self._known[at]

    def _shuffled(self, tensor: Tensor) -> Tensor:
        order = torch.randperm(tensor.numel(), generator=self._generator)
        return tensor.reshape(-1)[order].reshape(tensor.shape)


def _holds(
    trial: Trial, exchange: Exchange, targets: Sequence[Tensor], sample: Sequence[Tensor], before: Sequence[Tensor]
) -> bool:
    moved = [t.reshape(-1)[target].reshape(t.shape) for t, target in zip(sample, targets, strict=True)]
    return _renumbered(trial, before, trial.call(moved), bool(exchange.beside))


def _words(exchange: Exchange) -> str:
    where = " and ".join(f"dimension {slot.dim} of input{slot.tensor}" for slot in exchange.slots)
    only = f" at one index of dimension {exchange.beside[0].dim} alone" if exchange.beside else ""
    return (
        f"indices {exchange.i} and {exchange.j} of {where} may be exchanged{only}, and the results are renumbered, "
        "but the rule denies it"
    )


# -- candidates ------------------------------------------------------------------------------------------------------


def _refined(typed: Typed, trial: Trial) -> tuple[int, ...]:
    return tuple(size_of(factor, trial.spec.groups) for _, factor in _factors(typed))


def _factors(typed: Typed) -> list[tuple[int, Axis]]:
    """Each dimension's factors, with the number of the dimension."""
    found: list[tuple[int, Axis]] = []
    for dim, axis in enumerate(typed.axes if typed.indexed is None else typed.axes[:-1]):
        inner = axis.expr if isinstance(axis, Label) else axis
        found.extend((dim, factor) for factor in (inner.factors if isinstance(inner, Product) else (axis,)))
    return found


def _candidates(trial: Trial, shapes: Sequence[tuple[int, ...]]) -> Iterator[Exchange]:
    classes: dict[int, list[Slot]] = {}
    for k, (typed, shape) in enumerate(zip(trial.inputs, shapes, strict=True)):
        for at, ((dim, axis), size) in enumerate(zip(_factors(typed), shape, strict=True)):
            if size > 1:
                classes.setdefault(size, []).append(Slot(k, at, dim, axis))
    for size, slots in classes.items():
        pairs = list(itertools.combinations(range(size), 2)) if size <= 4 else [(i, i + 1) for i in range(size - 1)]
        for subset in _subsets(slots):
            for i, j in pairs:
                yield Exchange(subset, (), i, j)
            for other, others in classes.items():
                if other != size:
                    for beside in _beside(subset, others):
                        if not _is_reverse(trial, subset, beside):
                            yield Exchange(subset, beside, 0, 1)


def _subsets(slots: Sequence[Slot]) -> Iterator[tuple[Slot, ...]]:
    sizes = range(1, len(slots) + 1) if len(slots) <= 5 else (1, 2, len(slots))
    for count in sizes:
        yield from itertools.combinations(slots, count)


def _beside(subset: Sequence[Slot], others: Sequence[Slot]) -> Iterator[tuple[Slot, ...]]:
    """One slot of another size in each tensor that is touched."""
    tensors = sorted({slot.tensor for slot in subset})
    choices = [[slot for slot in others if slot.tensor == k] for k in tensors]
    if all(choices):
        yield from itertools.product(*choices)


def _is_reverse(trial: Trial, subset: Sequence[Slot], beside: Sequence[Slot]) -> bool:
    """Whether the further axis is fibred over this one already: of two directions the spec has the larger group."""
    mine = {group for slot in subset for group in refs(slot.axis)}
    theirs = [group for slot in beside for group in refs(slot.axis)]
    return any(mine & set(trial.spec.groups[group].parents) for group in theirs)


def _exchanged(tensor: Tensor, number: int, exchange: Exchange) -> Tensor:
    whole = tensor
    for slot in exchange.slots:
        if slot.tensor == number:
            order = torch.arange(tensor.shape[slot.at])
            order[exchange.i], order[exchange.j] = exchange.j, exchange.i
            tensor = tensor.index_select(slot.at, order)
    for slot in exchange.beside:
        if slot.tensor == number:
            index = torch.arange(whole.shape[slot.at]).reshape([-1 if d == slot.at else 1 for d in range(whole.ndim)])
            tensor = torch.where(index == 0, tensor, whole)
    return tensor


# -- are the results renumbered? -------------------------------------------------------------------------------------


def _renumbered(trial: Trial, before: Sequence[Tensor], after: Sequence[Tensor], partly: bool) -> bool:
    for typed, old, new in zip(trial.outputs, before, after, strict=True):
        if old.shape != new.shape:
            return False
        if typed.indexed is not None:
            if not (int(new.min()) >= 0 and int(new.max()) < typed.indexed):
                return False
            old, new = (torch.nn.functional.one_hot(t.long(), typed.indexed) for t in (old, new))
        a, b = (_plain(tensor, _refined_with_value(typed, trial)) for tensor in (old, new))
        if not _close(a.reshape(-1).sort().values, b.reshape(-1).sort().values):
            return False  # not even the same values
        if not (_permuted(a, b) or (partly and _permuted_at_one_index(a, b))):
            return False
    return True


def _refined_with_value(typed: Typed, trial: Trial) -> tuple[int, ...]:
    shape = _refined(typed, trial)
    return shape if typed.indexed is None else (*shape, typed.indexed)


def _plain(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    if tensor.is_complex():
        tensor, shape = torch.view_as_real(tensor.resolve_conj()), (*shape, 2)
    return torch.nan_to_num(tensor.double(), nan=1.234e30).reshape(list(shape))


def _permuted(old: Tensor, new: Tensor) -> bool:
    """Whether a permutation of each dimension takes the one to the other.

    The sorted values of a slice do not depend on the numbering of the other dimensions: by them slices are matched.
    """
    orders = []
    for dim, size in enumerate(old.shape if old.numel() else ()):
        a, b = (t.movedim(dim, 0).reshape(size, -1).sort(1).values for t in (old, new))
        alike = ((a[None] - b[:, None]).abs() <= CLOSE * (1 + a[None].abs())).all(-1)
        order: list[int] = []
        for i in range(size):
            free = [j for j in alike[i].nonzero().flatten().tolist() if j not in order]
            if not free:
                return False
            order.append(i if i in free else free[0])
        orders.append(torch.tensor(order))
    for dim, indices in enumerate(orders):
        old = old.index_select(dim, indices)
    return _close(old, new)


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=CLOSE, atol=CLOSE)


def _permuted_at_one_index(old: Tensor, new: Tensor) -> bool:
    for dim, size in enumerate(old.shape):
        same = [i for i in range(size) if _close(old.select(dim, i), new.select(dim, i))]
        if len(same) == size - 1:
            at = next(i for i in range(size) if i not in same)
            if _permuted(old.select(dim, at), new.select(dim, at)):
                return True
    return False


# -- does the group have it? -----------------------------------------------------------------------------------------


def _is_element(trial: Trial, targets: Sequence[IntArray]) -> bool:
    """Whether some element of the group acts on the inputs so: new element k is old element ``target[k]``."""
    spec = trial.spec
    identity: Any = spec.identity()
    arrays = {name: array.copy() for name, array in identity.arrays.items()}
    for typed, target in zip(trial.inputs, targets, strict=True):
        if not _read_off(trial, typed, target, arrays):
            return False
    try:
        element: Any = replace(identity, arrays=arrays)
    except PermgraphError:
        return False  # what was read off is not a permutation
    for typed, target in zip(trial.inputs, targets, strict=True):
        axes = typed.axes if typed.indexed is None else typed.axes[:-1]
        shape = [size_of(axis, spec.groups) for axis in axes]
        acted = element.apply_axes(axes, torch.arange(target.size).reshape(shape))
        if not np.array_equal(acted.reshape(-1).numpy(), target):
            return False
    return True


def _read_off(trial: Trial, typed: Typed, target: IntArray, arrays: Mapping[str, IntArray]) -> bool:
    """Enter into the groups' arrays what they must hold to act on one tensor so; False if no array could."""
    axes = typed.axes if typed.indexed is None else typed.axes[:-1]
    shape = tuple(size_of(axis, trial.spec.groups) for axis in axes)
    new = np.unravel_index(np.arange(target.size), shape) if shape else ()
    old = np.unravel_index(target, shape) if shape else ()
    for occurrence in trial.spec.layout(axes).occurrences:
        if occurrence.group not in arrays:
            continue
        along = coordinates(axes[occurrence.dim], occurrence.path, trial.spec.groups)
        there = along[new[occurrence.dim]] >= 0
        for dim, path, part in occurrence.guards:
            there &= coordinates(axes[dim], (*path, part), trial.spec.groups)[new[dim]] >= 0
        parents = [coordinates(axes[p.dim], p.path, trial.spec.groups)[new[p.dim]][there] for p in occurrence.parents]
        place = (*parents, along[new[occurrence.dim]][there])
        found = along[old[occurrence.dim]][there]
        if (found < 0).any():
            return False
        arrays[occurrence.group][place] = found
    return True
