"""Layers fitted by least squares, against solutions worked out otherwise."""

from __future__ import annotations

import copy
import importlib
import logging

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.merging.patches import patches, weight_as_matrix, write_matrix


def _mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).double().eval()


def _average(a: nn.Module, b: nn.Module) -> nn.Module:
    middle = copy.deepcopy(a)
    middle.load_state_dict(pg.average([a, b]))
    return middle


def _loss(model: nn.Module, a: nn.Module, b: nn.Module, x: Tensor) -> float:
    return float((model(x) - (a(x) + b(x)) / 2).square().mean())


def test_one_layer_is_the_solution_of_numpy() -> None:
    torch.manual_seed(0)
    a, b, x = nn.Linear(3, 2).double(), nn.Linear(3, 2).double(), torch.randn(50, 3, dtype=torch.float64)
    start = nn.Linear(3, 2).double().eval()
    fitted = pg.least_squares(start, [x[:20], x[20:]], (a, b), ridge=1e-12)
    rows = torch.cat([x, torch.ones(50, 1, dtype=torch.float64)], 1)
    exact = torch.linalg.lstsq(rows, (a(x) + b(x)) / 2).solution
    assert torch.allclose(torch.cat([fitted.weight, fitted.bias[:, None]], 1), exact.T, atol=1e-9)


def test_what_the_data_do_not_say_stays() -> None:
    torch.manual_seed(0)
    a, b, start = (nn.Linear(3, 2, bias=False).double().eval() for _ in range(3))
    x = torch.randn(50, 3, dtype=torch.float64)
    x[:, 2] = 0
    fitted = pg.least_squares(start, [x], (a, b), ridge=1e-9)
    assert torch.allclose(fitted.weight[:, 2], start.weight[:, 2])
    assert torch.allclose(fitted.weight[:, :2], ((a.weight + b.weight) / 2)[:, :2], atol=1e-6)
    nearly = pg.least_squares(start, [x], (a, b), ridge=1e9)
    assert torch.allclose(nearly.weight, start.weight, atol=1e-6)


@pytest.mark.parametrize("inputs", ["merged", "parents"])
def test_it_comes_nearer_to_the_mean_of_the_outputs(inputs: str) -> None:
    a, b, x = _mlp(0), _mlp(1), torch.randn(300, 3, dtype=torch.float64)
    aligned = pg.align(a, b).model()
    middle = _average(a, aligned)
    fitted = pg.least_squares(middle, list(x.split(100)), (a, aligned), inputs=inputs)
    fresh = torch.randn(300, 3, dtype=torch.float64)
    assert _loss(fitted, a, b, fresh) < 0.7 * _loss(middle, a, b, fresh)


def test_portions_are_the_same_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, x = _mlp(0), _mlp(1), [torch.randn(40, 3, dtype=torch.float64)]
    whole = pg.least_squares(_average(a, b), x, (a, b), inputs="parents").state_dict()
    monkeypatch.setattr(importlib.import_module("permgraph.merging.least_squares"), "MEMORY", 1)
    parts = pg.least_squares(_average(a, b), x, (a, b), inputs="parents").state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 3, 3, stride=2, padding=1),
        nn.Conv2d(2, 3, (3, 2), dilation=(2, 1), padding="same", padding_mode="circular"),
        nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect", bias=False),
        nn.Conv3d(2, 3, 2),
        nn.Linear(4, 3),
    ],
)
def test_patches_times_the_matrix_are_the_layer(layer: nn.Module) -> None:
    spatial = layer.weight.ndim - 2
    x = torch.randn(5, *([2] if spatial else [7, 4]), *[6] * spatial)
    rows = torch.cat(list(patches(layer, x)))
    y = layer(x).movedim(1, -1) if spatial else layer(x)
    assert torch.allclose((rows @ weight_as_matrix(layer)).float(), y.flatten(0, -2), atol=1e-5)
    other = copy.deepcopy(layer)
    write_matrix(other, 2 * weight_as_matrix(layer))
    assert torch.allclose(other(x), 2 * layer(x), atol=1e-5)


def test_statistics_are_recalibrated() -> None:
    torch.manual_seed(0)

    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()

    a, b, x = net(), net(), torch.randn(60, 1, 8, 8)
    fitted = pg.least_squares(_average(a, b), [x], (a, b))
    seen = fitted[0](x).movedim(1, 0).flatten(1)
    assert torch.allclose(fitted[1].running_mean, seen.mean(1), atol=1e-5)
    assert torch.allclose(fitted[1].running_var, seen.var(1), rtol=1e-4)


def test_what_cannot_be_fitted_is_left_and_said(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)

    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2)).eval()

    a, b = net(), net()
    middle = _average(a, b)
    with caplog.at_level(logging.WARNING):
        fitted = pg.least_squares(middle, [torch.randn(9, 4, 6, 6)], (a, b))
    assert all(torch.equal(fitted.state_dict()[name], tensor) for name, tensor in middle.state_dict().items())
    assert "'0' is left as it is: a transposed or grouped" in caplog.text and "'2' is left" in caplog.text


def test_what_does_not_help_is_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    """Of one network and itself nothing is to be gained, and a wrong scale of the inputs' statistics loses much."""
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Linear(16, 2)).eval()
    with torch.no_grad():
        a[1].running_var.fill_(100.0)  # so that what the data have is not what the network was made for
    x = torch.randn(5, 3)
    with caplog.at_level(logging.WARNING):
        fitted = pg.least_squares(a, [x], (a, a), layers=lambda name, _: name == "0")
    again = pg.recalibrate_batchnorm(a, [x])
    assert "no nearer" in caplog.text
    assert all(torch.equal(fitted.state_dict()[name], tensor) for name, tensor in again.state_dict().items())


def test_a_partial_merge_is_fitted_too() -> None:
    a, b, x = _mlp(0), _mlp(1), torch.randn(300, 3, dtype=torch.float64)
    for inputs in ("merged", "parents"):
        merge = pg.partial_merge(a, b, width=1.5)
        assert _loss(merge.least_squares([x], inputs=inputs), a, b, x) < 0.7 * _loss(merge.model(), a, b, x)
    whole = pg.partial_merge(a, b, width=2)  # which is the mean of the outputs already
    assert _loss(whole.least_squares([x]), a, b, x) < 1e-20


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"loader": []}, "the loader gave no batch"),
        ({"loader": iter([torch.zeros(1, 3)])}, "only once"),
        ({"ridge": 0.0}, "ridge is 0.0"),
        ({"inputs": "outputs"}, "inputs"),
        ({"parents": ()}, "needs the 2 networks"),
        ({"loader": [torch.full((4, 3), torch.nan, dtype=torch.float64)]}, "NaN or infinity"),
    ],
)
def test_bad_input(how: dict, said: str) -> None:
    a, b = _mlp(0), _mlp(1)
    given = {"loader": [torch.zeros(4, 3, dtype=torch.float64)], "parents": (a, b), **how}
    loader, parents = given.pop("loader"), given.pop("parents")
    with pytest.raises((pg.errors.PermgraphError, ValueError), match=said):
        pg.least_squares(_average(a, b), loader, parents, **given)
