"""Soundness on architectures and programs that nobody thought of: what general symmetries claim there must hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import permgraph as pg
from tests.groups.random_models import RandomNetwork
from tests.groups.random_programs import RandomProgram

QUICK = range(1000, 1012)
SWEEP = range(1012, 1500)


def _proof(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> pg.Verification | None:
    spec = pg.auto_spec(model, inputs, symmetry="general")
    plain = pg.auto_spec(model, inputs)
    # The chains of ties may differ: those of BatchNorm in training mode count for scales alone.
    assert replace(spec.permutations(), constraints=None) == replace(plain, constraints=None)
    further = 0 if isinstance(model, RandomProgram) else 2  # with other sizes it draws another program, or none
    return pg.verify(model, spec, inputs, controls="none", further=further) if spec.moving else None


@pytest.mark.parametrize("seed", QUICK)
def test_random_architecture(seed: int) -> None:
    model = RandomNetwork(seed).eval()
    proof = _proof(model, (model.example(),))
    assert proof is None or proof.passed, str(proof)


@pytest.mark.parametrize("seed", [*QUICK, 1295])
def test_random_program(seed: int) -> None:
    model = RandomProgram(seed).eval()
    proof = _proof(model, (model.example(),))
    assert proof is None or proof.passed, str(proof)


@pytest.mark.zoo
@pytest.mark.parametrize("seed", SWEEP)
def test_random_sweep(seed: int) -> None:
    for kind in (RandomNetwork, RandomProgram):
        model = kind(seed).eval()
        proof = _proof(model, (model.example(),))
        assert proof is None or proof.passed, str(proof)
