"""What lies between networks, where they are aligned by transformations: the same words take either kind of element."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import permgraph as pg
from permgraph.connectivity.curve_alignment import fit_aligned_curve
from permgraph.errors import MismatchError
from tests.general.whole_networks import at, away, inputs, network, output, planted, spec_of

NAME = "vit"


def evaluate(model: nn.Module) -> float:
    truth = output(NAME, network(NAME, 3).state_dict())
    with torch.no_grad():
        return float(F.mse_loss(model(inputs(NAME)), truth))


@pytest.fixture(scope="module")
def models() -> list[nn.Module]:
    return [at(NAME, state) for state in planted(NAME, 3, seed=3)[1]]


@pytest.fixture(scope="module")
def merged(models: list[nn.Module]) -> pg.Merge:
    return pg.merge(models, spec=spec_of(NAME))


def test_claims_take_transformations_and_results(models: list[nn.Module], merged: pg.Merge) -> None:
    fit = pg.align(models[0], models[1], spec=spec_of(NAME))
    given = [fit, fit.transformation]
    heights = [pg.weak_connectivity(*models[:2], one, evaluate, 0.1, points=5).highest for one in given]
    assert heights[0] == heights[1] < 0.01
    assert pg.barrier(*models[:2], evaluate, 5).barrier > 20 * max(heights[0], 1e-4)
    same = pg.simultaneous_connectivity([models[0]], [models[1]], fit, evaluate, 0.1, points=5)
    assert same.highest == heights[0]
    strong = [
        pg.strong_connectivity(models, each, evaluate, 0.1, points=5).highest
        for each in (merged, merged.transformations)
    ]
    assert strong[0] == strong[1] < 0.01
    star = pg.star_connectivity(merged.model(), models, merged, evaluate, 0.1, points=5)
    assert star.highest < 0.01


def test_masks_are_not_mixed(models: list[nn.Module], merged: pg.Merge) -> None:
    assert merged.transformations is not None
    mask = torch.ones_like(models[0].state_dict()["head.weight"], dtype=torch.bool)
    with pytest.raises(MismatchError, match=r"acts on 'head\.weight'.*mix the weights"):
        pg.permute_masks(merged.transformations[1], {"head.weight": mask})


def test_a_curve_to_a_transformed_end(models: list[nn.Module]) -> None:
    data = [(inputs(NAME), output(NAME, models[0].state_dict()))]
    fit = pg.align(models[0], models[1], spec=spec_of(NAME))
    found = fit_aligned_curve(
        models[0], models[1], data, spec_of(NAME), init=fit, rounds=1, epochs=1, relaxed_steps=2, loss=F.mse_loss
    )
    assert found.transformation is not None and found.element is found.transformation
    assert len(found.losses) == 2 and len(found.moved) == 1
    end = found.curve(1.0)
    assert away(NAME, models[1].state_dict(), end) < 1e-9
    with pytest.raises(MismatchError, match="another spec"):
        fit_aligned_curve(models[0], models[1], data, spec_of(NAME).permutations(), init=fit, loss=F.mse_loss)


def test_a_report_compares_layers_after_the_transformation(models: list[nn.Module]) -> None:
    fit = pg.align(models[0], models[1], spec=spec_of(NAME))
    page = pg.report(spec_of(NAME), alignment=fit, models=(models[0], models[1]))
    assert "Similarity, layer by layer" in page.html


def test_repair_after_a_merge_of_transformed_networks() -> None:
    name = "normed mlp"
    spec = spec_of(name)
    copies, states = planted(name, 3, seed=3)
    networks = [at(name, state) for state in states]
    whole = pg.merge(networks, spec=spec)
    assert whole.transformations is not None
    ends = []
    for element, state in zip(whole.transformations, states, strict=True):
        ends.append(at(name, element.apply(state)))
    repaired = pg.repair(whole.model(), [(inputs(name),)], parents=ends)
    truth = output(name, copies[0])
    with torch.no_grad():
        assert float((repaired(inputs(name)) - truth).abs().max()) < 0.2 * float(truth.abs().max())
