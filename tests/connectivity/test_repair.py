"""Activation statistics of interpolated networks: BatchNorm recalibration and REPAIR."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

from permgraph.connectivity import channel_statistics, interpolate, recalibrate_batchnorm, repair
from permgraph.errors import EvaluationError, MismatchError, NonFiniteError


def _data(*shape: int, scale: float = 1.0) -> list[torch.Tensor]:
    return [scale * torch.randn(96, *shape, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def _randomised(model: nn.Module, seed: int) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=g))
    return model.eval()


def _conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6))


def test_recalibrated_statistics_are_those_of_the_data() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4)).eval()
    x = torch.randn(50, 4) * 3 + 2
    norm = recalibrate_batchnorm(model, [(x[:40], None), (x[40:], None)])[0]
    torch.testing.assert_close(norm.running_mean, x.mean(0))  # batches of 40 and 10, weighted by their size
    expected = (40 * x[:40].var(0) + 10 * x[40:].var(0)) / 50
    torch.testing.assert_close(norm.running_var, expected)


def test_recalibration_makes_training_and_evaluation_agree() -> None:
    model = _randomised(_conv_net(), 0)
    (x, _) = _data(3, 9, 9, scale=5.0)
    result = recalibrate_batchnorm(model, [x])
    batch_statistics = copy.deepcopy(model).train()(x)
    torch.testing.assert_close(result(x), batch_statistics, rtol=1e-2, atol=1e-2)
    assert (model(x) - batch_statistics).abs().max() > 1


def test_recalibration_changes_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4, momentum=0.3), nn.BatchNorm1d(4))
    model.eval()
    model[0].train()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    result = recalibrate_batchnorm(model, _data(4))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    for m in (model, result):
        assert [part.training for part in m] == [True, False, False, False]
        assert [part.momentum for part in m[2:]] == [0.3, 0.1]
    again = recalibrate_batchnorm(model, _data(4))  # dropout is off: nothing depends on chance
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in result.state_dict().items())
    for name, x in result.state_dict().items():
        assert torch.equal(x, before[name]) == ("running" not in name and "tracked" not in name)


def test_recalibration_forgets_what_was_there() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4)).eval()
    model[0].running_mean.fill_(torch.nan)
    model[0].running_var.fill_(torch.inf)
    x = torch.randn(50, 4)
    torch.testing.assert_close(recalibrate_batchnorm(model, [x])[0].running_mean, x.mean(0))


def test_recalibration_of_a_network_in_training_mode_has_no_dropout() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    x = torch.randn(50, 4)
    result = recalibrate_batchnorm(model, [x])
    torch.testing.assert_close(result[1].running_mean, x.mean(0))
    assert all(part.training for part in (*model, *result))


def test_recalibration_without_batchnorm_is_a_copy() -> None:
    model = nn.Linear(4, 4).eval()
    result = recalibrate_batchnorm(model, [])
    assert result is not model
    assert torch.equal(result.weight, model.weight)


def test_recalibration_refuses() -> None:
    model = nn.BatchNorm1d(4).eval()
    with pytest.raises(EvaluationError, match="the loader gave no batch"):
        recalibrate_batchnorm(model, [])
    with pytest.raises(EvaluationError, match="use larger batches"):
        recalibrate_batchnorm(model, [torch.zeros(1, 4)])


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)), (7,)),
    "layernorm": (lambda: nn.Sequential(nn.Linear(7, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3)), (5, 7)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2)), (3, 9, 9)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 6, 3)), (3, 9)),
    "transposed": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, groups=2)), (3, 9, 9)),  # noqa: E501
    "batchnorm": (_conv_net, (3, 9, 9)),
}  # fmt: skip


class Conv1D(nn.Module):
    """A linear layer whose weight is (in, out), as GPT-2 has it in transformers."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


ARCHITECTURES["gpt2"] = (lambda: nn.Sequential(Conv1D(16, 7), nn.GELU(), Conv1D(3, 16)), (5, 7))
AFFINE = (Conv1D, nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("t", [0.5, 0.2])
def test_repaired_statistics_are_the_parents_average(architecture: str, t: float) -> None:
    build, shape = ARCHITECTURES[architecture]
    a, b = _randomised(build(), 0), _randomised(build(), 1)
    (x, _) = _data(*shape)
    if architecture == "batchnorm":  # with statistics of its own, as a trained parent has
        a, b = recalibrate_batchnorm(a, [x]), recalibrate_batchnorm(b, [x])
    middle = copy.deepcopy(a)
    middle.load_state_dict(interpolate(a, b, t))
    before = copy.deepcopy(middle.state_dict())
    result = repair(middle, [(x, None)], parents=(a, b), weights=(1 - t, t))
    got, one, two, unrepaired = (channel_statistics(m, [x]) for m in (result, a, b, middle))
    assert set(got.means) == {name for name, m in a.named_modules() if isinstance(m, AFFINE)}
    error_before = 0.0
    for name in got.means:
        wanted = (1 - t) * one.means[name] + t * two.means[name]
        torch.testing.assert_close(got.means[name], wanted, rtol=1e-3, atol=1e-3)
        wanted = (1 - t) * one.deviations[name] + t * two.deviations[name]
        torch.testing.assert_close(got.deviations[name], wanted, rtol=1e-3, atol=1e-3)
        error_before = max(error_before, (unrepaired.deviations[name] - wanted).abs().max().item())
    assert error_before > 0.05  # there was something to repair
    assert list(result.state_dict()) == list(before)
    assert all(torch.equal(v, before[name]) for name, v in middle.state_dict().items())
    assert not any(m._forward_hooks for net in (a, b, middle, result) for m in net.modules())


def test_with_batchnorm_it_is_recalibration() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-12), nn.ReLU())

    a, b = _randomised(build(), 0), _randomised(build(), 1)
    middle = copy.deepcopy(a)
    middle.load_state_dict(interpolate(a, b, 0.5))
    (x, _) = _data(3, 9, 9)
    assert (repair(middle, [x], parents=(a, b))(x) - middle(x)).abs().max() > 0.1
    torch.testing.assert_close(repair(middle, [x], (a, b))(x), recalibrate_batchnorm(middle, [x])(x), rtol=0, atol=1e-4)


def test_a_network_is_its_own_repair() -> None:
    build, shape = ARCHITECTURES["mlp"]
    a = _randomised(build(), 0)
    (x, _) = _data(*shape)
    torch.testing.assert_close(repair(a, [x], parents=(a, a))(x), a(x), rtol=1e-3, atol=1e-4)


def test_parents_can_be_measured_once() -> None:
    build, shape = ARCHITECTURES["mlp"]
    a, b, middle = (_randomised(build(), seed) for seed in range(3))
    data = _data(*shape)
    whole = repair(middle, data, parents=(a, b))
    measured = repair(middle, data, parents=(channel_statistics(a, data), channel_statistics(b, data)))
    assert all(torch.equal(x, measured.state_dict()[name]) for name, x in whole.state_dict().items())


def test_statistics_are_exact_over_batches() -> None:
    layer = nn.Linear(3, 4, dtype=torch.float64).eval()
    with torch.no_grad():
        layer.bias.add_(1e6)  # a large mean must not drown the deviation
    x = torch.randn(100, 3, dtype=torch.float64)
    got = channel_statistics(nn.Sequential(layer).eval(), [x[:70], x[70:]])
    out = layer(x)
    torch.testing.assert_close(got.means["0"], out.mean(0))
    torch.testing.assert_close(got.deviations["0"], out.std(0, correction=0))


def test_a_layer_without_bias_is_only_rescaled() -> None:
    a, b, middle = (_randomised(nn.Sequential(nn.Linear(5, 4, bias=False)), seed) for seed in range(3))
    (x, _) = _data(5)
    result = repair(middle, [x], parents=(a, b))
    got, one, two = (channel_statistics(m, [x]) for m in (result, a, b))
    torch.testing.assert_close(got.deviations["0"], (one.deviations["0"] + two.deviations["0"]) / 2)
    ratio = result[0].weight / middle[0].weight
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


def test_a_constant_channel_is_shifted_and_not_blown_up() -> None:
    a, b, middle = (_randomised(nn.Sequential(nn.Linear(5, 4)), seed) for seed in range(3))
    with torch.no_grad():
        middle[0].weight[2] = 0
    (x, _) = _data(5)
    result = repair(middle, [x], parents=(a, b))
    assert torch.equal(result[0].weight[2], torch.zeros(5))
    got, one, two = (channel_statistics(m, [x]) for m in (result, a, b))
    torch.testing.assert_close(got.means["0"], (one.means["0"] + two.means["0"]) / 2, atol=1e-6, rtol=1e-5)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.down = nn.Linear(4, 4)
        self.down.weight = self.up.weight
        self.free = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.idle = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.free(self.down(self.up(x)).relu())


def test_what_cannot_be_repaired_is_left_alone_and_said(caplog: pytest.LogCaptureFixture) -> None:
    a, b, middle = (_randomised(Tied(), seed) for seed in range(3))
    with caplog.at_level(logging.WARNING, "permgraph"):
        result = repair(middle, _data(4), parents=(a, b))
    assert all(torch.equal(x, middle.state_dict()[name]) for name, x in result.state_dict().items())
    assert "'up' is left as it is: tied parameter up.weight = down.weight" in caplog.text
    assert "'free' is left as it is: its weight is parametrised" in caplog.text
    assert "'idle' was not repaired: the forward pass never calls it" in caplog.text


def test_layers_can_be_left_out() -> None:
    build, shape = ARCHITECTURES["mlp"]
    a, b, middle = (_randomised(build(), seed) for seed in range(3))
    result = repair(middle, _data(*shape), parents=(a, b), layers=lambda name, module: name != "4")
    assert torch.equal(result[4].weight, middle[4].weight)
    assert not torch.equal(result[2].weight, middle[2].weight)


def test_what_is_not_finite_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """A parent that is not finite is a mistake; a network on the way between two may be so, and is shown as it is."""
    a, b = (_randomised(_conv_net(), seed) for seed in (0, 1))
    data = _data(3, 9, 9)
    broken = copy.deepcopy(a)
    with torch.no_grad():
        broken[3].weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="layer '3' puts out NaN or infinity"):
        repair(a, data, (a, broken))
    with pytest.raises(NonFiniteError, match="layer '0' puts out NaN or infinity"):
        channel_statistics(a, [torch.full((4, 3, 9, 9), torch.nan)])
    assert not caplog.records
    result = repair(broken, data, (a, b))
    assert "layer '3' of the model puts out NaN or infinity" in caplog.text
    assert not bool(torch.isfinite(result(data[0])).all())
    caplog.clear()
    assert not bool(torch.isfinite(recalibrate_batchnorm(broken, data)[4].running_mean).all())
    assert "the statistics of '4' are not finite" in caplog.text
    caplog.clear()
    recalibrate_batchnorm(a, data)
    assert not caplog.records


def test_repair_refuses() -> None:
    a, b = (_randomised(nn.Sequential(nn.Linear(5, 4)), seed) for seed in range(2))
    with pytest.raises(EvaluationError, match="at least 2 parents, not 1"):
        repair(a, _data(5), parents=(b,))
    with pytest.raises(EvaluationError, match="the loader gave no batch"):
        repair(a, [], parents=(a, b))
    with pytest.raises(EvaluationError, match="the model to repair must be in evaluation mode"):
        repair(copy.deepcopy(a).train(), _data(5), parents=(a, b))
    with pytest.raises(EvaluationError, match="the model to measure must be in evaluation mode"):
        repair(a, _data(5), parents=(a, copy.deepcopy(b).train()))
    with pytest.raises(EvaluationError, match="weights must be one number for each of the 2 parents"):
        repair(a, _data(5), parents=(a, b), weights=(1.0,))
    wide = _randomised(nn.Sequential(nn.Linear(5, 6)), 0)
    with pytest.raises(MismatchError, match="layer '0' has 4 output channels in the first parent and 6 in another"):
        repair(a, _data(5), parents=(a, wide))
    with pytest.raises(MismatchError, match="layer '0' has 4 output channels in the model, but has 6 in the parents"):
        repair(a, _data(5), parents=(wide, wide))
