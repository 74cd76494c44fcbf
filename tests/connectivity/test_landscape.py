"""The loss on the plane through three networks."""

from __future__ import annotations

import math

import matplotlib

matplotlib.use("Agg")

import pytest
import torch
from torch import nn

from permgraph.connectivity import barrier, loss_surface, recalibrate_batchnorm
from permgraph.errors import EvaluationError, MismatchError, NonFiniteError


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).eval()


A, B, C = network(0), network(1), network(2)


def parameters(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in net.parameters()])


def test_coordinates_are_distances() -> None:
    target = parameters(A) + 0.3 * (parameters(B) - parameters(A)) + 0.4 * (parameters(C) - parameters(A))

    def distance(net: nn.Module) -> float:
        return float((parameters(net) - target).norm())

    found = loss_surface(A, B, C, distance, points=4, margin=0.5)
    points = [parameters(net) for net in (A, B, C)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert math.dist(found.corners[i], found.corners[j]) == pytest.approx(
            float((points[i] - points[j]).norm()), rel=1e-5
        )
    # The target lies in the plane: its coordinates are the same mixture of the corners'.
    place = [sum(w * corner[axis] for w, corner in zip((0.3, 0.3, 0.4), found.corners, strict=True)) for axis in (0, 1)]
    for row, y in enumerate(found.y):
        for column, x in enumerate(found.x):
            assert found.losses[row][column] == pytest.approx(math.dist((x, y), place), abs=1e-5)
    assert found.ends["loss"] == pytest.approx([float((p - target).norm()) for p in points], abs=1e-5)


def test_the_barrier_is_that_inside_the_triangle() -> None:
    def bump(net: nn.Module) -> float:
        shift = parameters(net) - parameters(A)
        return -float(shift.square().sum())  # concave: highest above the plane inside

    found = loss_surface(A, B, C, bump, points=25)
    lines = [barrier(one, other, bump, 25).barrier for one, other in ((A, B), (A, C), (B, C))]
    assert found.barrier > 0.95 * max(lines)
    valley = loss_surface(A, B, C, lambda net: -bump(net), points=9)
    assert valley.barrier == 0
    accuracy = loss_surface(A, B, C, lambda net: {"accuracy": bump(net)}, points=9)
    assert accuracy.metric == "accuracy" and accuracy.barrier == 0


def test_what_is_not_finite_is_shown_and_not_averaged_away() -> None:
    calls = 0

    def evaluate(net: nn.Module) -> float:
        nonlocal calls
        calls += 1
        return math.nan if calls == 3 + 13 else 1.0

    found = loss_surface(A, B, C, evaluate, points=5, margin=0.0)
    assert found.nonfinite == 1
    inside = loss_surface(A, B, C, lambda net: math.nan, points=5)
    assert math.isnan(inside.barrier)
    ax = found.plot()
    assert ax.get_xlabel() == "L2 distance" and {text.get_text() for text in ax.texts} == {"A", "B", "C"}
    spaced = loss_surface(A, B, C, lambda net: float(net[0].weight.square().sum()), points=5).plot(
        levels=[0.5, 1, 2, 9]
    )
    colours = spaced.collections[0].cmap(spaced.collections[0].norm([0.6, 1.5, 5]))[:, 2]  # each step its own
    assert len(set(colours)) == 3
    with pytest.raises(EvaluationError, match="no metric 'accuracy'"):
        found.plot("accuracy")


def test_a_network_that_is_not_finite_is_named() -> None:
    state = {name: tensor.clone() for name, tensor in B.state_dict().items()}
    state["0.weight"][0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"'0\.weight' of b holds NaN or infinity"):
        loss_surface(A, state, C, lambda net: 0.0, points=2)


def test_batchnorm_is_prepared_and_nothing_is_changed() -> None:
    data = [torch.randn(32, 3, generator=torch.Generator().manual_seed(0))]
    before = {name: tensor.clone() for name, tensor in A.state_dict().items()}
    seen: list[float] = []

    def prepare(net: nn.Module, t: float) -> nn.Module:
        seen.append(t)
        return recalibrate_batchnorm(net, data) if t else net

    found = loss_surface(A, B, C, lambda net: float(net[1].running_mean.abs().sum()), points=3, prepare=prepare)
    assert found.ends["loss"] == (0.0, 0.0, 0.0) and min(map(min, found.losses)) > 0
    assert seen == [0.0] * 3 + [0.5] * 9
    assert all(torch.equal(tensor, before[name]) for name, tensor in A.state_dict().items())


def test_refusals() -> None:
    def loss(net: nn.Module) -> float:
        return 0.0

    with pytest.raises(EvaluationError, match="lie on a line"):
        loss_surface(A, B, B, loss)
    with pytest.raises(EvaluationError, match="lie on a line"):
        loss_surface(A, A, B, loss)
    with pytest.raises(EvaluationError, match="points=1"):
        loss_surface(A, B, C, loss, points=1)
    with pytest.raises(EvaluationError, match="margin=-1"):
        loss_surface(A, B, C, loss, margin=-1)
    with pytest.raises(EvaluationError, match="all state dicts"):
        loss_surface(A.state_dict(), B.state_dict(), C.state_dict(), loss)
    with pytest.raises(MismatchError):
        loss_surface(A, B, nn.Sequential(nn.Linear(3, 5)).eval(), loss)
    calls = iter(range(100))
    with pytest.raises(EvaluationError, match="it must return the same ones"):
        loss_surface(A, B, C, lambda net: {"loss": 0.0} if next(calls) < 5 else {"other": 0.0}, points=3)
