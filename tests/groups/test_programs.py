"""Soundness on programs that nobody would write: whatever is claimed there must hold, by a comparison of its own."""

from __future__ import annotations

import copy

import pytest
import torch

import permgraph as pg
from permgraph.verification.double_precision import in_double_precision
from tests.groups.random_programs import STEPS, RandomProgram

QUICK = range(20)
SWEEP = range(20, 2020)


def error_of(seed: int) -> tuple[float, pg.PermutationSpec]:
    """The relative change of the outputs, the largest over a few random weights and permutations of all groups."""
    model = RandomProgram(seed)
    x = model.example()
    spec = pg.auto_spec(model, (x,))
    if not spec.moving or any(note.startswith("inferred on real tensors") for note in spec.notes):
        return 0.0, spec  # of one that reads values, the spec holds for one branch
    model, worst = copy.deepcopy(model).double(), 0.0
    for draw in range(3):
        generator = torch.Generator().manual_seed(draw)
        state = {n: torch.randn(w.shape, generator=generator).double() for n, w in model.state_dict().items()}
        outputs = []
        for weights in (state, spec.random(draw, every_group=True).apply(state)):
            with in_double_precision():
                outputs.append(torch.func.functional_call(model, weights, (x.double(),)))
        before, after = outputs
        if bool(torch.isfinite(before).all()):
            worst = max(worst, float((after - before).abs().max() / (1e-30 + before.abs().max())))
    return worst, spec


@pytest.mark.parametrize("seed", QUICK)
def test_random_program(seed: int) -> None:
    error, spec = error_of(seed)
    assert error < 1e-7, f"{RandomProgram(seed).trace}\n{spec}"


@pytest.mark.zoo
@pytest.mark.parametrize("seed", SWEEP)
def test_random_program_sweep(seed: int) -> None:
    error, spec = error_of(seed)
    assert error < 1e-7, f"{RandomProgram(seed).trace}\n{spec}"


def test_the_sweep_meets_every_step() -> None:
    met = {line.split(" ")[0] for seed in SWEEP[:300] for line in RandomProgram(seed).trace}
    assert {step.__name__ for step in STEPS} <= met


def test_a_family_of_axes_that_stay_put_needs_no_label() -> None:
    assert error_of(854)[0] < 1e-7  # a window of a table is written to, and each part of it is viewed in another way
