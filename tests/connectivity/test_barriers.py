"""Barriers: the definition, what is measured on the way, and what is refused."""

from __future__ import annotations

import builtins
import copy
import logging
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from permgraph.connectivity import (
    Barrier,
    barrier,
    barrier_along,
    evaluate_on,
    feature_connectivity,
    fit_curve,
    recalibrate_batchnorm,
    repair,
)
from permgraph.errors import EvaluationError, MismatchError, MissingExtraError


class Point(nn.Module):
    """A network that is one number, so that the path is known exactly."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))
        self.eval()


def _value(model: nn.Module) -> float:
    return model.value.item()  # type: ignore[operator,union-attr]


def test_the_definition_on_a_known_curve() -> None:
    # L(w) = 1 - w² from w = -1 to w = 2: L = 1 - (3t - 1)², and the line between the ends is -3t.
    result = barrier(Point(-1.0), Point(2.0), lambda m: 1 - _value(m) ** 2, points=31)
    excess = [1 - (3 * t - 1) ** 2 + 3 * t for t in result.alphas]
    assert result.losses == pytest.approx([1 - (3 * t - 1) ** 2 for t in result.alphas])
    assert result.excess() == pytest.approx(excess, abs=1e-12)
    assert result.barrier == pytest.approx(max(excess))  # 9/4, at t = 1/2
    assert result.barrier == pytest.approx(2.25, abs=0.01)
    assert result.position() == pytest.approx(0.5, abs=0.02)
    # Frankle et al. subtract the mean of the ends from the largest loss: 1 - (0 - 3) / 2.
    assert result.instability == pytest.approx(1 + 1.5, abs=0.01)


def test_a_convex_loss_has_no_barrier() -> None:
    result = barrier(Point(-1.0), Point(2.0), lambda m: _value(m) ** 2)
    assert len(result.alphas) == 25
    assert result.barrier == 0


def test_accuracy_counts_when_it_falls() -> None:
    def evaluate(model: nn.Module) -> dict[str, float]:
        w = _value(model)
        return {"loss": 1 - w**2, "accuracy": 0.5 + 0.4 * w**2, "recall": 0.5 + 0.4 * w**2}

    result = barrier(Point(-1.0), Point(1.0), evaluate, points=5)
    assert result.barriers == pytest.approx({"loss": 1.0, "accuracy": 0.4, "recall": 0.0})
    assert result.higher_is_better == {"accuracy"}
    turned = barrier(Point(-1.0), Point(1.0), evaluate, points=5, higher_is_better=("accuracy", "recall"))
    assert turned.barriers["recall"] == pytest.approx(0.4)
    with pytest.raises(EvaluationError, match="no metric 'f1' was measured, only 'loss', 'accuracy', 'recall'"):
        result.height("f1")


@pytest.mark.parametrize(
    ("bad", "height"), [(math.nan, "nan"), (math.inf, "inf")], ids=["a NaN on the way", "an infinite loss on the way"]
)
def test_values_that_are_not_finite_are_shown(bad: float, height: str, caplog: pytest.LogCaptureFixture) -> None:
    def evaluate(model: nn.Module) -> float:
        return bad if abs(_value(model)) < 0.1 else 1.0

    with caplog.at_level(logging.WARNING, "permgraph"):
        result = barrier(Point(-1.0), Point(1.0), evaluate, points=5)
    assert str(result.barrier) == height
    assert result.nonfinite == (("loss", 0.5),)
    assert result.position() == 0.5
    assert "not finite at loss[0.5]" in str(result)
    assert "not finite" in caplog.text


def test_an_end_that_is_not_finite_leaves_no_barrier_to_speak_of() -> None:
    result = barrier(Point(-1.0), Point(1.0), lambda m: math.inf if _value(m) == 1 else 0.0, points=3)
    assert math.isnan(result.barrier)
    assert result.nonfinite == (("loss", 1.0),)
    assert result.position() == 1.0 and str(result) == "barrier: loss nan (3 points); not finite at loss[1]"


def test_points_can_be_given() -> None:
    result = barrier(Point(0.0), Point(1.0), _value, points=(0, 0.1, 1))
    assert result.losses == pytest.approx((0, 0.1, 1))
    for points in (1, (0.0, 0.5), (0, 0.6, 0.4, 1)):
        with pytest.raises(EvaluationError, match="points must"):
            barrier(Point(0.0), Point(1.0), _value, points=points)


def test_state_dicts_need_a_module() -> None:
    a, b = Point(-1.0), Point(1.0)

    def evaluate(model: nn.Module) -> float:
        return 1 - _value(model) ** 2

    whole = barrier(a, b, evaluate, points=5)
    assert barrier(a.state_dict(), b.state_dict(), evaluate, 5, model=Point(7.0)) == whole
    assert barrier(a, b.state_dict(), evaluate, 5) == whole
    with pytest.raises(EvaluationError, match="pass the module that runs them"):
        barrier(a.state_dict(), b.state_dict(), evaluate)


def test_training_mode_is_refused_and_named() -> None:
    a, b = (nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval() for _ in range(2))
    b[1].train()
    with pytest.raises(EvaluationError, match=r"b must be in evaluation mode, but its '1' \(Dropout\) is"):
        barrier(a, b, lambda m: 0.0)


def test_networks_that_differ_are_refused() -> None:
    with pytest.raises(MismatchError, match=r"'weight' has shape \(2, 3\) in a but \(2, 4\) in b"):
        barrier(nn.Linear(3, 2).eval(), nn.Linear(4, 2).eval(), lambda m: 0.0)
    with pytest.raises(MismatchError, match="'weight' is in a but not in model"):
        barrier(nn.Linear(3, 2).eval(), nn.Linear(3, 2).eval(), lambda m: 0.0, model=nn.ReLU().eval())


def test_metrics_must_not_change_on_the_way() -> None:
    names = iter(("loss", "error"))
    with pytest.raises(EvaluationError, match=r"metrics \['error'\] at t = 1, but \['loss'\] before"):
        barrier(Point(0.0), Point(1.0), lambda m: {next(names): 0.0}, points=2)
    with pytest.raises(EvaluationError, match="evaluate returned no metric"):
        barrier(Point(0.0), Point(1.0), lambda m: {}, points=2)


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)).eval()


def _loader(shuffle: bool = True) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(50, 4, generator=g), torch.randint(3, (50,), generator=g))
    return DataLoader(data, batch_size=16, shuffle=shuffle)


def test_nothing_of_the_caller_changes() -> None:
    a, b, loader = _net(), _net(), _loader()
    before = [copy.deepcopy(m.state_dict()) for m in (a, b)]
    random = torch.get_rng_state()
    barrier(a, b, evaluate_on(loader), points=3, prepare=lambda net, t: recalibrate_batchnorm(net, loader))
    assert torch.equal(torch.get_rng_state(), random)
    for m, old in zip((a, b), before, strict=True):
        assert not any(part.training for part in m.modules())
        assert all(torch.equal(x, old[name]) for name, x in m.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in m.parameters())


def test_each_point_is_prepared() -> None:
    a, b, loader = _net(), _net(), _loader()
    seen: list[float] = []
    done: list[tuple[int, int]] = []

    def prepare(net: nn.Module, t: float) -> nn.Module:
        seen.append(t)
        return recalibrate_batchnorm(net, loader)

    def mean(net: nn.Module) -> float:
        return net[1].running_mean.sum().item()  # type: ignore[index]

    plain = barrier(a, b, mean, points=3)
    prepared = barrier(a, b, mean, points=3, prepare=prepare, progress=lambda *args: done.append(args))
    assert seen == [0, 0.5, 1]
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert plain.losses == (0, 0, 0)  # as initialised
    assert all(abs(value) > 1e-3 for value in prepared.losses)


def test_each_point_is_prepared_from_a_fresh_copy() -> None:
    def prepare(net: nn.Module, t: float) -> nn.Module:
        net.calls = getattr(net, "calls", 0) + 1  # not part of the state dict
        return net

    a = Point(0.0)
    assert barrier(a, Point(1.0), lambda net: float(net.calls), points=3, prepare=prepare).losses == (1, 1, 1)  # type: ignore[arg-type]
    assert not hasattr(a, "calls")


def test_what_prepare_returns_is_evaluated() -> None:
    with pytest.raises(EvaluationError, match="prepare must return the network to evaluate, not NoneType"):
        barrier(Point(0.0), Point(1.0), _value, points=2, prepare=lambda net, t: net.eval() and None)  # type: ignore[arg-type,return-value]


def test_evaluate_on_is_the_mean_over_examples() -> None:
    net, loader = _net(), _loader()
    images, labels = loader.dataset.tensors  # type: ignore[attr-defined]
    got = evaluate_on(loader)(net)  # batches of 16, 16, 16 and 2 do not weigh the same
    logits = net(images)
    assert got["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert got["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


class Tagger(nn.Module):
    """Takes keywords and answers with an object, like a Hugging Face model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 7)

    def forward(self, input_ids: torch.Tensor) -> Any:
        class Output:
            logits = self.table(input_ids)

        return Output


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ((torch.zeros(6, 5), torch.zeros(6).long()), r"cannot run on a batch of shape \(6, 5\): mat1 and mat2.*loader"),
        ((torch.zeros(6, 4), torch.full((6,), 7)), r"logits and targets of shape \(6, 3\) and \(6,\): Target 7 is out"),
        ("ab", "cannot run on a batch without a tensor"),
    ],
    ids=["inputs of another size", "a class that is not there", "text"],
)
def test_a_batch_that_does_not_fit_is_described(batch: Any, said: str) -> None:
    a, b = nn.Linear(4, 3).eval(), nn.Linear(4, 3).eval()
    with pytest.raises(EvaluationError, match=said):
        barrier(a, b, evaluate_on([batch]), points=3)
    with pytest.raises(EvaluationError, match=said):
        fit_curve(a, b, [batch])
    if "logits" not in said:  # the others look at no targets
        for measure in (
            lambda: repair(a, [batch], (a, b)),
            lambda: feature_connectivity(a, b, [batch]),
        ):
            with pytest.raises(EvaluationError, match=said):
                measure()


def test_evaluate_on_takes_mappings_and_other_class_dimensions() -> None:
    model = Tagger().eval()
    with torch.no_grad():
        model.table.weight.copy_(10 * torch.eye(7))
    ids = torch.arange(7).repeat(3, 1)
    batch = {"input_ids": ids, "labels": ids.clone()}
    assert evaluate_on([batch], class_dim=-1)(model)["accuracy"] == 1
    assert "labels" in batch  # the caller's batch is whole
    with pytest.raises(EvaluationError, match=r"targets must have shape \(3, 4\), not \(3,\)"):
        evaluate_on([(torch.zeros(3, 5, 4), torch.zeros(3, dtype=torch.long))])(nn.Identity().eval())


@dataclass
class CausalLMOutput:
    """An output as transformers names that of its causal language models."""

    logits: torch.Tensor


class Successor(nn.Module):
    """Gives the logits of the next number, of seven: certain of it."""

    def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
        return CausalLMOutput(50 * nn.functional.one_hot((input_ids + 1) % 7, 7).float())


def test_the_labels_of_a_causal_language_model_are_those_of_the_next_place() -> None:
    ids = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 1]])  # only the last step of the second is no successor
    batch = {"input_ids": ids, "labels": ids.clone()}
    found = evaluate_on([batch])(Successor().eval())
    assert found["accuracy"] == 5 / 6 and found["loss"] == pytest.approx(50 / 6)
    assert evaluate_on([batch], shift=False)(Successor().eval())["accuracy"] == 0
    masked = {"input_ids": ids, "labels": torch.tensor([[0, 1, 2, 3], [4, 5, 6, -100]])}
    assert evaluate_on([batch, masked])(Successor().eval())["accuracy"] == 10 / 11
    moved = {"input_ids": ids, "labels": (ids + 1) % 7}  # by the loader already
    assert evaluate_on([moved])(Successor().eval())["accuracy"] == 1
    with pytest.raises(EvaluationError, match="no target counts"):
        evaluate_on([{"input_ids": ids[:, :1], "labels": ids[:, :1]}])(Successor().eval())


def test_evaluate_on_refuses() -> None:
    net = _net()
    with pytest.raises(EvaluationError, match="the loader gave no batch"):
        evaluate_on([])(net)
    used_up = iter([(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))])
    evaluate = evaluate_on(used_up)
    evaluate(net)
    with pytest.raises(EvaluationError, match="a generator that was already used up"):
        evaluate(net)
    with pytest.raises(EvaluationError, match="a batch holds no targets"):
        evaluate_on([torch.zeros(2, 4)])(net)
    with pytest.raises(EvaluationError, match="not int"):
        evaluate_on([3])(net)
    with pytest.raises(EvaluationError, match="evaluation mode"):
        evaluate_on(_loader())(_net().train())


def _result(values: tuple[float, ...]) -> Barrier:
    return Barrier(alphas=(0.0, 0.5, 1.0), curves={"loss": values})


def test_plot_draws_the_curve_its_ends_and_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    ax = _result((1.0, 3.0, 1.0)).plot(label="naive")
    assert _result((1.0, math.nan, 2.0)).plot(ax=ax, label="aligned") is ax
    kinds = [line.get_gid() for line in ax.lines]
    assert kinds == ["permgraph-curve", "permgraph-ends", "permgraph-curve", "permgraph-ends", "permgraph-nonfinite"]
    first, second = (line for line in ax.lines if line.get_gid() == "permgraph-curve")
    assert list(first.get_ydata()) == [1.0, 3.0, 1.0]
    assert first.get_color() != second.get_color()
    assert first.get_marker() != second.get_marker()
    assert list(ax.lines[-1].get_xdata()) == [0.5]
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["naive, barrier 2", "aligned, barrier nan", "not finite"]


def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install 'permgraph\[plots\]'"):
        _result((1.0, 3.0, 1.0)).plot()


def test_a_path_need_not_be_straight() -> None:
    net = nn.Linear(1, 1, bias=False).eval()

    def path(t: float) -> dict[str, torch.Tensor]:
        return {"weight": torch.tensor([[t + 3 * t * (1 - t)]])}

    found = barrier_along(path, lambda m: m.weight.item(), points=5, model=net)
    assert found.alphas == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert found.barrier == pytest.approx(0.75) and found.position() == 0.5
    with pytest.raises(EvaluationError, match="evaluation mode"):
        barrier_along(path, lambda m: 0.0, model=net.train())


def test_calibration_is_the_gap_of_confidence_and_accuracy() -> None:
    # Confidences 0.9 (three of four right) and 0.6 (one of two right), in bins of their own.
    rows = [(0.9, 0), (0.9, 0), (0.9, 0), (0.9, 1), (0.6, 0), (0.6, 1)]
    logits = torch.tensor([[math.log(p), math.log(1 - p)] for p, _ in rows])
    targets = torch.tensor([target for _, target in rows])
    wanted = (4 * (0.9 - 0.75) + 2 * (0.6 - 0.5)) / 6
    for loader in ([(logits, targets)], [(logits[:1], targets[:1]), (logits[1:], targets[1:])]):
        found = evaluate_on(loader, bins=10)(nn.Identity().eval())
        assert found["calibration"] == pytest.approx(wanted)
    # In one bin, overconfidence here makes up for the lack of it there.
    assert evaluate_on([(logits, targets)], bins=1)(nn.Identity().eval())["calibration"] == pytest.approx(wanted)
    under = evaluate_on([(logits[[0, 4]], torch.tensor([1, 0]))], bins=1)(nn.Identity().eval())["calibration"]
    apart = evaluate_on([(logits[[0, 4]], torch.tensor([1, 0]))], bins=10)(nn.Identity().eval())["calibration"]
    assert under == pytest.approx(0.25) and apart == pytest.approx((0.9 + 0.4) / 2)
    with pytest.raises(EvaluationError, match="bins=0"):
        evaluate_on([], bins=0)
