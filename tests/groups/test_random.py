"""Soundness on architectures that nobody thought of: a claimed symmetry must be one, whatever the wiring."""

from __future__ import annotations

import pytest

import permgraph as pg
from tests.groups.random_models import BLOCKS, RandomNetwork

QUICK = range(25)
SWEEP = range(25, 525)


def proof_of(seed: int) -> pg.Verification:
    model = RandomNetwork(seed).eval()
    inputs = (model.example(),)
    spec = pg.auto_spec(model, inputs)
    assert not spec.unknown_ops
    return pg.verify(model, spec, inputs)


@pytest.mark.parametrize("seed", QUICK)
def test_random_architecture(seed: int) -> None:
    proof = proof_of(seed)
    assert proof.passed, str(proof)


@pytest.mark.zoo
@pytest.mark.parametrize("seed", SWEEP)
def test_random_architecture_sweep(seed: int) -> None:
    proof = proof_of(seed)  # a branch that chance has made dead has no control that could pass
    assert proof.max_error <= proof.tolerance, str(proof)


def test_the_sweep_meets_every_block() -> None:
    met = {type(module) for seed in SWEEP[:150] for module in RandomNetwork(seed).modules()}
    assert set(BLOCKS) <= met
