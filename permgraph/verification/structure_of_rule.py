"""What a rule declares of matrices, scales and signs (`acts=`), tried on one call in both directions.

*The law*: random elements of the structures act on all inputs, the operator runs, and its results must be the former
ones, acted upon. *Exactness*: near the identity, each place where a group stands (in an input or a result) may do a
little of something to one index; the combinations under which the law still holds are counted, and a step is taken
along them, to see that they are no accident of the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from permgraph.spec.binding import Occurrence
from permgraph.spec.transformation import Transformation, Where
from permgraph.verification.directions import Index, free_combinations
from permgraph.verification.trial_of_rule import Trial, Typed

SEEDS = (0, 1)
TOLERANCE = 1e-8
STEP = 1e-5
DRAWS = 4
MAX_PLACES = 24

Place = tuple[int, Typed, Occurrence]  # the number among inputs and results


def structures_text(trial: Trial) -> str:
    """``a GL · b P``: the structures of the groups that have more than permutations."""
    groups = trial.general.groups
    named = {letter: groups[name].structure for name, letter in trial.letters().items()}
    return " · ".join(f"{letter} {structure}" for letter, structure in named.items() if not structure.is_plain)


def structure_law(trial: Trial, before: Sequence[Tensor]) -> tuple[float, list[str]]:
    """The largest error over random elements of the structures, and a sentence for each group that breaks the law."""
    more = [name for name, group in trial.general.groups.items() if not group.structure.is_plain]
    worst, problems = 0.0, []
    if more:
        for seed in SEEDS:
            element = trial.general.random(seed, every_group=True)
            error = _error(trial, before, element)
            worst = max(worst, error)
        if not worst <= TOLERANCE:
            for name in more:
                error = _error(trial, before, trial.general.random(0).restricted_to([name]))
                if not error <= TOLERANCE:
                    where = f"{trial.general.groups[name].structure} on the axis {trial.letters()[name]}"
                    problems.append(f"an element of {where} changes the results by {error:.3g}")
            problems = problems or ["elements of all structures at once change the results, though each alone does not"]
    return worst, problems


def _error(trial: Trial, before: Sequence[Tensor], element: Transformation) -> float:
    given = [_acted(trial, typed, element, t) for typed, t in zip(trial.inputs, trial.tensors, strict=True)]
    return _apart(
        trial.call(given), [_acted(trial, typed, element, t) for typed, t in zip(trial.outputs, before, strict=True)]
    )


def _acted(trial: Trial, typed: Typed, element: Transformation, tensor: Tensor) -> Tensor:
    assert trial.general.general is not None
    if typed.indexed is not None or not tensor.is_floating_point():
        return typed.act(element.permutation, tensor)
    return element.apply_axes(typed.axes, tensor, trial.general.general.actions.get(typed.name, ()))


def _apart(after: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, relative to the magnitude of each result."""
    worst = 0.0
    for new, old in zip(after, expected, strict=True):
        if new.shape != old.shape:
            return math.inf
        if not new.numel():
            continue
        if not (new.is_floating_point() or new.is_complex()):
            worst = max(worst, float((new != old).any()))
            continue
        if not bool((new.isfinite() == old.isfinite()).all()):
            return math.inf
        size = torch.nan_to_num(old, posinf=0.0, neginf=0.0).abs().max().clamp_min(1.0)
        single = 1e4 if new.dtype not in (torch.float64, torch.complex128) else 1.0
        worst = max(worst, float(torch.nan_to_num(new - old).abs().max() / size / single))
    return worst


def more_than_declared(trial: Trial, before: Sequence[Tensor] | None) -> Iterator[str]:
    """What acts on an axis besides what the structures say, one sentence for each axis; nothing without results."""
    if before is None:
        return
    spec, letters = trial.general, trial.letters()
    draws = list(_draws(trial, before))
    finite = all(bool(t.isfinite().all()) for _, results in draws for t in results if t.is_floating_point())
    real = finite and all(t.dtype is torch.float64 for t in (*trial.tensors, *before) if t.is_floating_point())
    parents = {parent for group in spec.groups.values() for parent in group.parents}
    for name in spec.moving:
        places = list(_places(trial, before, name))
        if not real or name in parents or not 0 < len(places) <= MAX_PLACES or any(t.is_complex() for t in before):
            continue
        structure, n = spec.groups[name].structure, spec.groups[name].size
        scales = {"GL": 1, "O": 0, "O1": 0}.get(structure.linear, structure.scales)
        mixed = {"GL": 2, "O": 1}.get(structure.linear, 0)
        if structure.linear == "O1" and n == 2:
            continue
        for what, expected, tries in (
            ("scales", scales, [[(i, i)] for i in range(min(n, 3))]),
            ("ways to mix two indices", mixed, [[(i, (i + 1) % n), ((i + 1) % n, i)] for i in range(min(n, 3))]),
        ):
            found = free_combinations(
                expected,
                len(places),
                tries,
                lambda place, at, amount: _broken(trial, draws, places, {place: {at: amount}}),  # noqa: B023
                lambda amounts: float(np.abs(_broken(trial, draws, places, amounts)).max()),  # noqa: B023
                STEP,
            )
            if found > expected:
                yield f"{found} independent {what} pass on the axis {letters[name]}, of which {expected} are declared"


def _places(trial: Trial, before: Sequence[Tensor], name: str) -> Iterator[Place]:
    for number, typed in enumerate((*trial.inputs, *trial.outputs)):
        if typed.indexed is None and (*trial.tensors, *before)[number].is_floating_point():
            for occurrence in trial.general.layout(typed.axes).occurrences:
                if occurrence.group == name:
                    yield number, typed, occurrence


def _draws(trial: Trial, before: Sequence[Tensor]) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """Inputs with their results: those of the trial, and such with numbers like them in other places."""
    yield trial.tensors, before
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS - 1):
        drawn = []
        for tensor in trial.tensors:
            if tensor.is_floating_point() or tensor.dtype is torch.bool:
                order = torch.randperm(tensor.numel(), generator=generator)
                tensor = tensor.flatten()[order].reshape(tensor.shape)
            if tensor.is_floating_point():
                factors = 0.5 + 0.5 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor = tensor * factors.to(tensor.dtype)
            drawn.append(tensor)
        yield drawn, trial.call(drawn)


def _broken(
    trial: Trial,
    draws: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
    places: Sequence[Place],
    amounts: Mapping[int, Mapping[Index, float]],
) -> Any:
    """How far the law is broken when index j is added to index i at some places, as much as is said for each."""
    return np.concatenate([_broken_at(trial, tensors, before, places, amounts) for tensors, before in draws])


def _broken_at(
    trial: Trial,
    tensors_before: Sequence[Tensor],
    before: Sequence[Tensor],
    places: Sequence[Place],
    amounts: Mapping[int, Mapping[Index, float]],
) -> Any:
    given = [t.clone() for t in tensors_before]
    expected = [t.clone() for t in before]
    for place, entries in amounts.items():
        number, typed, occurrence = places[place]
        tensors, at = (given, number) if number < len(given) else (expected, number - len(given))
        where = Where(trial.general, trial.general.layout(typed.axes), occurrence)
        matrix = np.zeros((where.size, where.size))
        for index, amount in entries.items():
            matrix[index] += amount
        matrix = torch.linalg.matrix_exp(torch.from_numpy(matrix)).numpy()
        if tensors[at].is_floating_point():
            where.multiply(tensors[at], where.at_first_parents(matrix))
    after = trial.call(given)
    parts = [
        torch.nan_to_num(new - old, posinf=0.0, neginf=0.0).flatten()
        for new, old in zip(after, expected, strict=True)
        if new.is_floating_point() and new.shape == old.shape
    ]
    return torch.cat([*parts, torch.zeros(1, dtype=torch.float64)]).numpy()
