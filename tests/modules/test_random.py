"""Soundness on programs that nobody wrote: whatever changes places in them leaves what they compute."""

from __future__ import annotations

import pytest

import permgraph as pg
from permgraph.errors import SpecError
from tests.modules.by_hand import worst_difference
from tests.modules.random_lanes import RandomLanes

QUICK = range(24)
SWEEP = range(24, 1024)
GENERAL = (0, 5, 9)
"""Of these some modules change places, also where more than permutations acts."""


def _check(seed: int) -> int:
    """The number of stacks."""
    model = RandomLanes(seed).eval()
    spec = pg.auto_spec(model, (model.example(),), modules=True)
    if spec.stacks:
        inputs = [(model.example(4, 1),), (model.example(7, 2),)]
        assert worst_difference(model, spec, inputs, modes=(False, True), tries=3) < 1e-6, model.trace
    return len(spec.stacks)


def test_random_programs() -> None:
    assert sum(_check(seed) > 0 for seed in QUICK) > len(QUICK) // 6


@pytest.mark.zoo
@pytest.mark.parametrize("seed", SWEEP)
def test_random_program_in_a_sweep(seed: int) -> None:
    try:
        _check(seed)
    except SpecError as error:  # said of the same program without modules, too
        with pytest.raises(SpecError, match=str(error)[:30].replace("(", ".")):
            pg.auto_spec(RandomLanes(seed).eval(), (RandomLanes(seed).example(),))


def _check_general(seed: int) -> int:
    """The number of stacks of the spec of general symmetries."""
    model = RandomLanes(seed).eval()
    alone, whole = (
        pg.auto_spec(model, (model.example(),), symmetry="general", modules=modules) for modules in (False, True)
    )
    assert whole.dimension() == alone.dimension()
    if whole.stacks:
        inputs = [(model.example(4, 1),), (model.example(7, 2),)]
        assert worst_difference(model, whole, inputs) < 1e-6, model.trace
    return len(whole.stacks)


def test_random_programs_of_general_symmetries() -> None:
    assert sum(_check_general(seed) > 0 for seed in GENERAL) == len(GENERAL)


@pytest.mark.zoo
@pytest.mark.parametrize("seed", range(150))
def test_random_program_of_general_symmetries_in_a_sweep(seed: int) -> None:
    try:
        _check_general(seed)
    except SpecError as error:  # said of the same program without modules, too
        with pytest.raises(SpecError, match=str(error)[:30].replace("(", ".")):
            pg.auto_spec(RandomLanes(seed).eval(), (RandomLanes(seed).example(),), symmetry="general", modules=False)
