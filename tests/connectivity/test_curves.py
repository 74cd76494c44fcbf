"""Curves with trained bends, and the permutation of their far end."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from permgraph.connectivity import Curve, evaluate_on, fit_aligned_curve, fit_curve, recalibrate_batchnorm
from permgraph.connectivity.barriers import barrier
from permgraph.errors import EvaluationError, MismatchError, NonFiniteError
from permgraph.matching import align
from permgraph.matching.ascent import step
from permgraph.networks.descend import falling
from permgraph.spec import PermutationSpec
from permgraph.spec.permutation import Permutation

SPEC = PermutationSpec.parse("0.weight 16x2 h .\n0.bias 16 h\n2.weight 2x16 . h\n2.bias 2 .\ngroups: h 16")


def points_of(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(128, 2, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] * x[:, 1] > 0).long()


LOADER = [points_of()]


def trained(seed: int, *, norm: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)]
        net = nn.Sequential(*(layer for layer in layers if norm or not isinstance(layer, nn.BatchNorm1d)))
        descent = torch.optim.Adam(net.parameters(), lr=0.05)
        for _ in range(60):
            descent.zero_grad()
            nn.functional.cross_entropy(net(LOADER[0][0]), LOADER[0][1]).backward()
            descent.step()
    return net.eval()


def fast(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05)


def test_a_curve_is_its_formula() -> None:
    a, bend, b = ({"w": torch.tensor([x, 2 * x])} for x in (1.0, 5.0, 2.0))
    bezier, polygon = Curve((a, bend, b)), Curve((a, bend, b), "polygon")
    for t in (0.0, 0.2, 0.5, 0.9, 1.0):
        wanted = (1 - t) ** 2 * 1 + 2 * t * (1 - t) * 5 + t**2 * 2
        assert bezier(t)["w"].tolist() == pytest.approx([wanted, 2 * wanted])
        wanted = 1 + 8 * t if t < 0.5 else 5 - 6 * (t - 0.5)
        assert polygon(t)["w"].tolist() == pytest.approx([wanted, 2 * wanted])
        assert sum(bezier.coefficients(t)) == pytest.approx(1) == pytest.approx(sum(polygon.coefficients(t)))


@pytest.mark.parametrize("shape", ["bezier", "polygon"])
@pytest.mark.parametrize("bends", [0, 1, 3])
def test_untrained_it_is_the_line(shape: str, bends: int) -> None:
    a, b = trained(0), trained(1)
    curve = Curve.straight(a, b, bends=bends, shape=shape)  # type: ignore[arg-type]
    for t in (0.0, 0.3, 1.0):
        for name, tensor in curve(t).items():
            torch.testing.assert_close(tensor, torch.lerp(a.state_dict()[name], b.state_dict()[name], t))
    evaluate = evaluate_on(LOADER)
    assert curve.barrier(evaluate, 5, model=a).losses == pytest.approx(barrier(a, b, evaluate, 5).losses, abs=1e-5)


@pytest.mark.parametrize(("shape", "bends"), [("bezier", 1), ("polygon", 1), ("polygon", 2)])
def test_training_lowers_the_barrier(shape: str, bends: int) -> None:
    a, b = trained(0), trained(1)
    evaluate = evaluate_on(LOADER)
    before = {name: tensor.clone() for name, tensor in (*a.state_dict().items(), *b.state_dict().items())}
    state = torch.random.get_rng_state()
    curve = fit_curve(a, b, LOADER, shape=shape, bends=bends, epochs=60, optimizer=fast, seed=3)  # type: ignore[arg-type]
    assert torch.equal(state, torch.random.get_rng_state())
    line = barrier(a, b, evaluate, 11).barrier
    assert line > 0.1 and curve.barrier(evaluate, 11, model=a).barrier < 0.5 * line
    for end, net in ((0.0, a), (1.0, b)):
        assert all(torch.equal(tensor, curve(end)[name]) for name, tensor in net.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in b.state_dict().items())
    assert len(curve.history) == 60 and len(curve.points) == bends + 2
    again = fit_curve(a, b, LOADER, shape=shape, bends=bends, epochs=60, optimizer=fast, seed=3)  # type: ignore[arg-type]
    assert again.history == curve.history


def test_going_on_from_a_curve() -> None:
    a, b = trained(0), trained(1)
    curve = fit_curve(a, b, LOADER, epochs=60)
    assert fit_curve(a, b, LOADER, init=curve, epochs=1).history[0] < fit_curve(a, b, LOADER, epochs=1).history[0]
    kept = fit_curve(a, b, LOADER, init=curve, epochs=0)
    assert all(torch.equal(kept(0.5)[name], tensor) for name, tensor in curve(0.5).items())


@pytest.mark.parametrize("shape", ["bezier", "polygon"])
@pytest.mark.parametrize("rate", [1e-3, 0.05, 1.0])
def test_no_curve_is_worse_than_its_start(shape: str, rate: float, caplog: pytest.LogCaptureFixture) -> None:
    a, b = trained(0), trained(1)
    b = align(a, b, spec=SPEC).model()
    with caplog.at_level(logging.WARNING, "permgraph"):
        sgd = lambda parameters: torch.optim.SGD(parameters, lr=100 * rate)  # noqa: E731
        curve = fit_curve(a, b, LOADER, shape=shape, epochs=6, optimizer=sgd)  # type: ignore[arg-type]
    before, after = curve.losses
    places = [(k + 0.5) / 5 for k in range(5)]
    evaluate = evaluate_on(LOADER)
    for path, wanted in ((Curve.straight(a, b, shape=shape), before), (curve, after)):  # type: ignore[arg-type]
        a_copy = trained(0)
        losses = []
        for t in places:
            a_copy.load_state_dict(path(t))
            losses.append(evaluate(a_copy)["loss"])
        assert sum(losses) / 5 == pytest.approx(wanted, rel=1e-4)
    assert after <= before
    assert (after == before) == ("stay where they began" in caplog.text)
    assert rate != 1.0 or after == before  # a rate far too high


def test_the_rate_falls_in_the_second_half() -> None:
    rates: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[no-untyped-def]
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    a, b = trained(0), trained(1)
    fit_curve(a, b, LOADER, epochs=10, optimizer=lambda p: Watched(p, lr=0.1))
    assert rates[:5] == [0.1] * 5 and rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.001)
    rates.clear()
    # Over all rounds, not over each of them.
    fit_aligned_curve(a, b, LOADER, SPEC, rounds=2, epochs=5, relaxed_steps=1, optimizer=lambda p: Watched(p, lr=0.1))
    steps = [rate for number, rate in enumerate(rates) if number not in (0, 6)]  # the first of a round is the far end's
    assert steps[:5] == [0.1] * 5 and steps[-1] == pytest.approx(0.001)


def test_with_batchnorm() -> None:
    a, b = trained(0, norm=True), trained(1, norm=True)
    curve = fit_curve(a, b, LOADER, epochs=60)
    measured = curve.barrier(evaluate_on(LOADER), 7, model=a, prepare=lambda net, t: recalibrate_batchnorm(net, LOADER))
    line = barrier(a, b, evaluate_on(LOADER), 7, prepare=lambda net, t: recalibrate_batchnorm(net, LOADER))
    assert measured.barrier < 0.7 * line.barrier
    assert torch.equal(curve(0.5)["1.num_batches_tracked"], a.state_dict()["1.num_batches_tracked"])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.down.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def test_ties_stay() -> None:
    a, b = Tied().eval(), Tied().eval()
    curve = fit_curve(a, b, LOADER, epochs=2)
    for point in (curve.points[1], curve(0.4)):
        assert point["up.weight"] is point["down.weight"]


def test_perturbed_batches_are_what_is_trained_on() -> None:
    a, b = trained(0), trained(1)
    seen: list[torch.Tensor] = []

    def flip(network: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(next(network.parameters()).clone())
        return batch[0], 1 - batch[1]

    clean, flipped = (fit_curve(a, b, LOADER, epochs=40, optimizer=fast, perturb=perturb) for perturb in (None, flip))
    assert flipped.history[-1] != clean.history[-1]
    assert len(seen) == 40 + 2 * 5  # one batch: in each epoch, and at the five places measured before and after
    assert not torch.equal(seen[0], seen[1])  # the network is the one on the curve
    accuracy = evaluate_on(LOADER)
    a.load_state_dict(flipped(0.5))
    assert accuracy(a)["accuracy"] < 0.5


def test_the_permutation_takes_part() -> None:
    a = trained(0)
    b = SPEC.random(5, every_group=True).apply(a.state_dict())
    steps: list[tuple[int, int]] = []
    found = fit_aligned_curve(
        a, b, LOADER, SPEC, rounds=6, epochs=4, optimizer=fast, progress=lambda done, of: steps.append((done, of))
    )
    assert steps[-1] == (6, 6) and any(found.moved)
    assert found.losses[-1] < found.losses[0]
    end = found.permutation.apply(b)
    assert all(torch.equal(tensor, end[name]) for name, tensor in found.curve(1.0).items())
    assert "rounds in" in str(found)
    fixed = fit_curve(a, b, LOADER, epochs=24, optimizer=fast)
    evaluate = evaluate_on(LOADER)
    measured = [curve.barrier(evaluate, 9, model=a).barrier for curve in (found.curve, fixed)]
    assert measured[0] <= measured[1] + 1e-6


def test_a_good_permutation_stays() -> None:
    a, b = trained(0), trained(1)
    turn = align(a, b, spec=SPEC).permutation
    found = fit_aligned_curve(a, b, LOADER, SPEC, init=turn, rounds=2, epochs=3)
    assert found.permutation == turn and found.moved == (False, False)
    # Far steps are not near at hand: with a small λ the permutation stays wherever it is.
    found = fit_aligned_curve(a, b, LOADER, SPEC, rounds=2, epochs=1, proximity=1e-6)
    assert found.permutation.is_identity


def test_no_step_of_the_permutation_raises_the_loss() -> None:
    a = trained(0)
    b = SPEC.random(5, every_group=True).apply(a.state_dict())
    # Without epochs only the permutation moves.
    swap = np.arange(16)
    swap[:6] = np.roll(swap[:6], 1)
    nearly = Permutation(SPEC, {"h": swap}) @ SPEC.random(5, every_group=True).inverse()
    found = fit_aligned_curve(a, b, LOADER, SPEC, init=nearly, rounds=3, epochs=0)
    assert any(found.moved) and found.losses[-1] < found.losses[0]
    assert all(later <= earlier for earlier, later in zip(found.losses, found.losses[1:], strict=False))


def test_refusals() -> None:
    a, b = trained(0), trained(1)
    with pytest.raises(EvaluationError, match="unknown shape"):
        fit_curve(a, b, LOADER, shape="spline")  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="bends=-1"):
        fit_curve(a, b, LOADER, bends=-1)
    with pytest.raises(EvaluationError, match="epochs=-1"):
        fit_curve(a, b, LOADER, epochs=-1)
    with pytest.raises(EvaluationError, match="measured_batches=0"):
        fit_curve(a, b, LOADER, measured_batches=0)
    with pytest.raises(EvaluationError, match="the loader gave no batch"):
        fit_curve(a, b, [])
    with pytest.raises(EvaluationError, match="a generator"):
        fit_curve(a, b, iter(LOADER))
    with pytest.raises(EvaluationError, match="holds no targets"):
        fit_curve(a, b, [LOADER[0][0]])
    with pytest.raises(EvaluationError, match="training mode"):
        fit_curve(a, trained(1).train(), LOADER)
    with pytest.raises(EvaluationError, match="both state dicts"):
        fit_curve(a.state_dict(), b.state_dict(), LOADER)
    with pytest.raises(MismatchError):
        fit_curve(a, nn.Linear(2, 2).eval(), LOADER)
    with pytest.raises(NonFiniteError, match="loss on the path is nan"):
        fit_curve(a, b, LOADER, loss=lambda output, target: output.sum() * math.nan)
    with pytest.raises(EvaluationError, match="runs from 0 to 1"):
        Curve.straight(a, b)(1.5)
    with pytest.raises(EvaluationError, match="at least its two ends"):
        Curve((a.state_dict(),))
    for name, value in (("rounds", 0), ("measured_batches", 0), ("relaxed_steps", 0), ("proximity", 0.0)):
        with pytest.raises(EvaluationError, match=f"{name}="):
            fit_aligned_curve(a, b, LOADER, SPEC, **{name: value})


class Interrupted:
    """A loader in the nth batch of which, over all readings, somebody presses Ctrl-C."""

    def __init__(self, at: int) -> None:
        self.at, self.read = at, 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in LOADER:
            self.read += 1
            if self.read == self.at:
                raise KeyboardInterrupt
            yield batch


def test_an_interrupted_curve_is_kept_as_far_as_it_is_better() -> None:
    a, b = trained(0), trained(1)
    loader = Interrupted(at=7)  # one was read to measure it on
    curve = fit_curve(a, b, loader, epochs=20, optimizer=fast)
    assert (curve.outcome, len(curve.history), loader.read) == ("interrupted", 5, 7)
    assert curve.losses[1] < curve.losses[0]
    assert "interrupted after 5 epochs" in str(curve)
    as_far = fit_curve(a, b, LOADER, epochs=5, optimizer=lambda leaves: Falls(leaves, 20))
    assert as_far.outcome == "done"
    for one, other in zip(curve.points, as_far.points, strict=True):
        assert all(torch.allclose(one[name], other[name]) for name in one)


class Falls(torch.optim.Adam):
    """`fast`, with the rates of a training of so many epochs, whatever else it is told."""

    def __init__(self, leaves: list[torch.Tensor], epochs: int) -> None:
        super().__init__(leaves, lr=0.05)
        self.epochs, self.steps = epochs, 0

    def step(self, *arguments: object) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            group["lr"] = 0.05 * falling((self.steps - 0.5) / self.epochs)
        super().step()


@pytest.mark.parametrize("at", [2, 3, 5, 6])
def test_an_interrupted_curve_with_its_permutation(at: int) -> None:
    a, b = trained(0), trained(1)
    found = fit_aligned_curve(a, b, Interrupted(at), SPEC, rounds=3, epochs=2, optimizer=fast)
    whole = fit_aligned_curve(a, b, LOADER, SPEC, rounds=3, epochs=2, optimizer=fast)
    assert (found.outcome, found.curve.outcome, whole.outcome) == ("interrupted", "interrupted", "done")
    assert len(found.losses) == len(found.moved) + 1 <= len(whole.losses)
    finished = (at - 2) // 2  # rounds, of two epochs each
    assert found.losses[: finished + 1] == whole.losses[: finished + 1]
    assert found.losses[-1] <= whole.losses[finished]
    last = found.permutation.apply(b.state_dict())
    assert all(torch.equal(found.curve(1.0)[name], last[name]) for name in last)


def test_what_a_matcher_catches_ends_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(*arguments: object, **keywords: object) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "assign", interrupted)
    a, b = trained(0), trained(1)
    found = fit_aligned_curve(a, b, LOADER, SPEC, rounds=3, epochs=1)
    assert (found.outcome, len(calls), found.moved) == ("interrupted", 1, ())
    assert found.permutation.is_identity
    assert all(torch.equal(found.curve(0.5)[n], Curve.straight(a, b)(0.5)[n]) for n in a.state_dict())
