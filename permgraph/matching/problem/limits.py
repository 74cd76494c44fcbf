"""Limits on a match: groups and indices that stay, and how many may move."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from permgraph.assignment.solve import Solver, assign_limited
from permgraph.errors import PermgraphError
from permgraph.matching.ascent.step import choose, rounding_of
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec

Frozen: TypeAlias = Sequence[str] | Mapping[str, Sequence[int] | None]


@dataclass(frozen=True)
class Limits:
    """What may not move in one group.

    Attributes:
        held: indices that stay where they are.
        home: the present index of each original one; None where there is no limit on moves.
        most: how many indices may be away from home.
    """

    held: np.ndarray
    home: np.ndarray | None = None
    most: int = 0


def limits_of(
    spec: PermutationSpec, frozen: Frozen, max_moves: int | Mapping[str, int] | None, init: object
) -> tuple[set[str], dict[str, Limits]]:
    """Which groups may not move at all, and what limits there are on others; see `WeightMatching` for the arguments.

    Raises:
        PermgraphError: a pattern fits no group, an index is not in its group, a limit is on part of a fibred group, or
            `init` is beyond it.
    """
    still: set[str] = set()
    held: dict[str, set[int]] = {}
    given = frozen if isinstance(frozen, Mapping) else dict.fromkeys(frozen)
    for pattern, indices in given.items():
        for name in groups_named(spec.moving, pattern, "frozen"):
            if indices is None:
                still.add(name)
            else:
                held.setdefault(name, set()).update(_indices(spec, name, indices))
    most: dict[str, int] = {}
    if isinstance(max_moves, Mapping):
        for pattern, number in max_moves.items():
            most.update(dict.fromkeys(groups_named(spec.moving, pattern, "max_moves"), number))
    elif max_moves is not None:
        most = {name: max_moves for name, group in spec.moving.items() if not group.parents}
    limits = {}
    for name, group in spec.moving.items():
        if name in still or not (name in held or name in most):
            continue
        if group.parents:
            raise PermgraphError(f"group {name!r} is fibred over others: it can be frozen whole, but not in part")
        kept = np.array(sorted(held.get(name, ())), dtype=np.int64)
        if name not in most:
            limits[name] = Limits(kept)
            continue
        start = init.arrays[name] if isinstance(init, Permutation) else np.arange(group.size)
        away = start != np.arange(group.size)
        if most[name] < 0:
            raise PermgraphError(f"max_moves={most[name]} for group {name!r}: give 0 or more")
        if np.count_nonzero(away) > most[name] or away[kept].any():
            raise PermgraphError(
                f"init moves {np.count_nonzero(away)} indices of group {name!r}, of which max_moves={most[name]} may "
                f"and {int(away[kept].sum())} are frozen; begin at one that obeys the limits"
            )
        limits[name] = Limits(kept, np.argsort(start), most[name])
    return still, limits


def choose_limited(
    worth: torch.Tensor, solver: Solver, name: str, limits: Mapping[str, Limits], arrays: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, float]:
    """As `choose`, within the limits on this group if there are any, where the groups now stand as `arrays` says.

    With limits the values are one matrix (n, n); with a limit on moves, what is found may not be the best.
    """
    own = limits.get(name)
    if own is None:
        return choose(worth, solver, name)
    home = np.argsort(arrays[name]) if own.home is not None and name in arrays else own.home
    n = worth.shape[-1]
    loose = np.setdiff1d(np.arange(n), own.held)
    columns = np.arange(n)
    if not len(loose):
        return columns, 0.0
    within = worth if len(loose) == n else worth[loose][:, loose]
    if home is None:
        chosen, gain = choose(within, solver, name)
        columns[loose] = loose[chosen]
        return columns, gain
    place = np.full(n, -1)
    place[loose] = np.arange(len(loose))
    table = within.double().cpu().numpy()
    # Those that are held are at home, so that the homes of all others are among the others.
    chosen = assign_limited(table, place[home[loose]], own.most, solver=solver, name=name).columns
    rows = np.arange(len(loose))
    new, old = table[rows, chosen], table[rows, rows]
    gain = float((new - old).sum())
    if gain <= rounding_of(worth) * float(np.abs(new).sum() + np.abs(old).sum()):
        return columns, 0.0
    columns[loose] = loose[chosen]
    return columns, gain


def groups_named(groups: Iterable[str], pattern: str, setting: str) -> list[str]:
    """The groups whose names a pattern fits.

    Raises:
        PermgraphError: it fits none; the message names the setting that it is from.
    """
    found = fnmatch.filter(groups, pattern)
    if not found:
        known = ", ".join(groups) or "none"
        raise PermgraphError(f"{setting} names {pattern!r}, but no group is called so; there are {known}")
    return found


def _indices(spec: PermutationSpec, name: str, indices: Sequence[int]) -> set[int]:
    size = spec.groups[name].size
    for index in indices:
        if not 0 <= index < size:
            raise PermgraphError(f"frozen names index {index} of group {name!r}, which has {size}")
    return set(indices)
