"""Singular values and vectors of two networks, and what permutations do to them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from permgraph.connectivity import compare_spectra
from permgraph.errors import EvaluationError, MismatchError, NonFiniteError
from permgraph.matching import align
from permgraph.spec import PermutationSpec
from tests.matching.examples import SPECS, state


@pytest.mark.parametrize("name", ["mlp", "concatenation", "attention"])
def test_permutations_keep_singular_values_and_move_vectors(name: str) -> None:
    spec = SPECS[name]
    a = state(spec, 0)
    turned = spec.random(1, every_group=True).apply(a)
    found = compare_spectra(a, turned)
    same = compare_spectra(a, a)
    for layer in found.layers.values():
        torch.testing.assert_close(layer.values_a, layer.values_b)
        assert layer.least_distance < 1e-5
    assert same.alignment() == pytest.approx(1) and same.distance == 0
    assert found.alignment() < 0.7 and found.distance > 1
    assert found.reduction(same) == pytest.approx(1)


def test_it_is_the_inner_product_and_the_distance() -> None:
    spec = SPECS["concatenation"]
    a, b = state(spec, 0), state(spec, 1)
    found = compare_spectra(a, b)
    for name, layer in found.layers.items():
        assert layer.inner() == pytest.approx(float((a[name].double() * b[name].double()).sum()), rel=1e-6)
        assert layer.distance == pytest.approx(float((a[name] - b[name]).norm()), rel=1e-5)
        assert layer.inner() <= layer.most() and layer.least_distance <= layer.distance
        assert layer.overlaps.shape == (len(layer.values_a), len(layer.values_b))
    whole = sum(float((a[n].double() - b[n].double()).square().sum()) for n in a)
    assert found.distance == pytest.approx(math.sqrt(whole), rel=1e-6)


def test_the_least_distance_is_reached_by_rotations() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(5, 4), torch.randn(5, 4)
    u, s, v = torch.linalg.svd(a, full_matrices=False)
    t = torch.linalg.svdvals(b)
    rotated = (u * t) @ v
    assert compare_spectra({"w": a}, {"w": b}).least_distance == pytest.approx(float((s - t).norm()), rel=1e-5)
    assert compare_spectra({"w": a}, {"w": rotated}).distance == pytest.approx(float((s - t).norm()), rel=1e-5)


def test_large_values_only() -> None:
    # The first directions agree, the second ones are opposite.
    a = torch.diag(torch.tensor([10.0, 1.0]))
    b = torch.diag(torch.tensor([10.0, -1.0]))
    (layer,) = compare_spectra({"w": a}, {"w": b}).layers.values()
    assert layer.alignment() == pytest.approx(99 / 101)
    assert layer.alignment(above=0.5) == pytest.approx(1)


def test_alignment_aligns_the_large_ones() -> None:
    spec = PermutationSpec.parse("0.weight 32x4 h .\n2.weight 3x32 . h\ngroups: h 32")
    a = state(spec, 0)
    noisy = {name: tensor + 0.3 * state(spec, 1)[name] for name, tensor in a.items()}
    b = spec.random(2, every_group=True).apply(noisy)
    before, after = compare_spectra(a, b), compare_spectra(a, align(a, b, spec=spec).state_dict)
    assert after.alignment() > 0.9 > 0.5 > before.alignment()
    assert before.reduction(after) > 0.4
    assert after.least_distance == pytest.approx(before.least_distance, rel=1e-4)
    assert "0.weight" in str(after)


def test_ties_and_statistics_count_once_or_not_at_all() -> None:
    shared = torch.randn(3, 3)
    a = {"up": shared, "down": shared, "bn.running_mean": torch.zeros(3), "bias": torch.zeros(3)}
    b = {"up": -shared, "down": -shared, "bn.running_mean": torch.ones(3), "bias": torch.ones(3)}
    found = compare_spectra(a, b)
    assert list(found.layers) == ["up"]
    assert found.distance == pytest.approx(math.sqrt(4 * float(shared.square().sum()) + 3), rel=1e-5)


def test_refusals() -> None:
    a = nn.Linear(2, 3)
    with pytest.raises(MismatchError, match="'bias' is no weight"):
        compare_spectra(a, a, names=["bias"])
    with pytest.raises(MismatchError, match="shape"):
        compare_spectra(a, nn.Linear(3, 3))
    with pytest.raises(EvaluationError, match="no floating-point weight"):
        compare_spectra({"x": torch.ones(3)}, {"x": torch.ones(3)})
    bad = {"weight": torch.full((3, 2), math.nan), "bias": torch.zeros(3)}
    with pytest.raises(NonFiniteError, match="'weight' of b"):
        compare_spectra(a, bad)
