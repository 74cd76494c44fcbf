"""States that are means of squares over one dimension, as Adafactor's, and those that cannot be moved exactly."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import permgraph as pg
from permgraph.errors import MismatchError


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    """Random draws of a test are its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Attention(nn.Module):
    """A residual stream with heads, whose value channels have an order of their own in each head.

    The keys have no bias: its gradient is zero but for rounding, which Adafactor scales up to a step of full size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.qkv, self.out = nn.Linear(5, 8), nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.last(x + self.out(mixed.transpose(1, 2).reshape(x.shape)))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)), (6, 7)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 9, 3), nn.Tanh(), nn.Conv2d(9, 5, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)
        ),
        (4, 2, 6, 6),
    ),
    "attention": (Attention, (3, 4, 5)),
}


def torchs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(parameters, lr=0.05, weight_decay=0.01)


def transformers_(parameters: Any) -> torch.optim.Optimizer:
    made = pytest.importorskip("transformers.optimization").Adafactor
    optimizer: torch.optim.Optimizer = made(parameters, lr=3e-3, relative_step=False, scale_parameter=True, beta1=0.9)
    return optimizer


def timms(parameters: Any) -> torch.optim.Optimizer:
    made = pytest.importorskip("timm.optim").AdafactorBigVision
    optimizer: torch.optim.Optimizer = made(parameters, lr=3e-3, min_dim_size_to_factor=3, momentum_dtype=torch.float64)
    return optimizer


def train(net: nn.Module, optimizer: torch.optim.Optimizer, shape: tuple[int, ...], seed: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        result = net(torch.randn(shape, generator=generator, dtype=torch.float64))
        result.square().add(result).mean().backward()
        optimizer.step()


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@functools.cache
def spec_of(name: str) -> pg.PermutationSpec:
    build, shape = NETS[name]
    return pg.auto_spec(build(), (torch.zeros(shape),))


@pytest.mark.parametrize("make", [torchs, transformers_, timms])
@pytest.mark.parametrize("name", NETS)
def test_training_goes_on_along_the_same_trajectory(name: str, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    build, shape = NETS[name]
    net = build().double()
    optimizer = make(net.parameters())
    train(net, optimizer, shape, 1, 5)
    kept = [
        tuple(value.shape) for value in optimizer.state_dict()["state"][0].values() if isinstance(value, torch.Tensor)
    ]
    assert any(found not in ((), tuple(next(net.parameters()).shape)) for found in kept)  # something is factored
    turn = spec_of(name).random(3, every_group=True)
    other = copy.deepcopy(net)
    other.load_state_dict(turn.apply(net.state_dict()))
    forgetful = copy.deepcopy(other)
    carried, left = make(other.parameters()), make(forgetful.parameters())
    moved = pg.transport(turn, optimizer.state_dict(), parameters=net)
    carried.load_state_dict(moved)
    left.load_state_dict(optimizer.state_dict())  # as it was, for weights that are elsewhere now
    for each, state in ((net, optimizer), (other, carried), (forgetful, left)):
        train(each, state, shape, 2, 50)
    there = turn.apply(net.state_dict())
    assert distance(there, other.state_dict()) < 1e-6
    assert distance(there, forgetful.state_dict()) > 1e-4  # the state counts
    assert distance(net.state_dict(), other.state_dict()) > 1e-2  # and so does the permutation


def test_means_move_along_the_dimension_that_is_left() -> None:
    """Rows by the outputs' permutation, columns by the inputs': what they are is computed anew from moved squares."""
    spec = pg.PermutationSpec.parse("a.weight 4x3 h s\nb.weight 2x4 . h\nc.weight 3x2 s .\ngroups: h 4 · s 3")
    turn = spec.random(1, every_group=True)
    squares = torch.arange(12.0).reshape(4, 3).square()
    moved = turn.apply_to("a.weight", squares)
    for row, col, keepdim in (("row_var", "col_var", True), ("exp_avg_sq_row", "exp_avg_sq_col", False)):
        kept = {row: squares.mean(-1, keepdim=keepdim), col: squares.mean(-2, keepdim=keepdim)}
        state = {"state": {0: kept}, "param_groups": [{"params": [0]}]}
        new = pg.transport(turn, state, parameters=["a.weight"])["state"][0]
        torch.testing.assert_close(new[row], moved.mean(-1, keepdim=keepdim))
        torch.testing.assert_close(new[col], moved.mean(-2, keepdim=keepdim))
        assert not torch.equal(new[row], kept[row])
        assert not torch.equal(new[col], kept[col])


def test_means_over_what_the_rest_depends_on_are_refused() -> None:
    """Each of two experts orders its hidden units by itself: means over experts are then of other units."""
    spec = pg.PermutationSpec.parse("up.weight 2x3 e d\ndown.weight 2x3 e d\ngroups: e 2 · d 3 per e")
    turn = spec.random(1, every_group=True)
    for kept, fits in (({"row_var": torch.rand(2, 1)}, True), ({"col_var": torch.rand(1, 3)}, False)):
        state = {"state": {0: kept}, "param_groups": [{"params": [0]}]}
        if fits:
            pg.transport(turn, state, parameters=["up.weight"])
            continue
        with pytest.raises(MismatchError, match="'col_var' of 'up.weight'.*depends on dimension 0"):
            pg.transport(turn, state, parameters=["up.weight"])


def test_signs_leave_means_of_squares_and_scales_do_not() -> None:
    for build, word in ((nn.Tanh, None), (nn.ReLU, "scales the gradients before the means")):
        net = nn.Sequential(nn.Linear(4, 6), build(), nn.Linear(6, 3)).double()
        optimizer = torch.optim.Adafactor(net.parameters())
        train(net, optimizer, (5, 4), 0, 2)
        turn = pg.auto_spec(net, symmetry="general").random(2)
        if word is not None:
            with pytest.raises(MismatchError, match=word):
                pg.transport(turn, optimizer, parameters=net)
            continue
        assert turn.signs
        moved = pg.transport(turn, optimizer, parameters=net)["state"][0]["row_var"]
        given = optimizer.state_dict()["state"][0]["row_var"]
        torch.testing.assert_close(moved, turn.permutation.apply_to("0.bias", given[:, 0])[:, None])


def test_states_of_bitsandbytes_in_full_precision_move() -> None:
    turn = pg.PermutationSpec.parse(SQUARE).random(0, every_group=True)
    kept = {"state1": torch.rand(4, 4), "state2": torch.rand(4, 4)}
    state = {"state": {0: {"step": 3, "__bnb_optimizer_quant_state__": kept}}, "param_groups": [{"params": [0]}]}
    moved = pg.transport(turn, state, parameters=["a.weight"])["state"][0]
    assert moved["step"] == 3
    for key, tensor in kept.items():
        assert torch.equal(moved["__bnb_optimizer_quant_state__"][key], turn.apply_to("a.weight", tensor))


SQUARE = "a.weight 4x4 h s\nb.weight 2x4 . h\nc.weight 4x2 s .\ngroups: h 4 · s 4"


class Coded(torch.Tensor):
    """As torchao's states say of themselves: codes, and a factor for each block of them."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (
            {"state1": torch.zeros(4, 4, dtype=torch.uint8), "qmap1": torch.rand(256), "absmax1": torch.rand(1)},
            "quantised in blocks, as 'qmap1'",
        ),
        ({"exp_avg": torch.zeros(4, 4).as_subclass(Coded)}, r"quantised in blocks, as 'exp_avg' \(codes, scale\)"),
        (
            {"step": 1, "__bnb_optimizer_quant_state__": {"state1": torch.zeros(4, 4), "absmax1": torch.rand(1)}},
            "quantised in blocks, as 'absmax1'",
        ),
        ({"precond_0": torch.eye(4)}, "'precond_0' of 'a.weight' is no tensor with an element for each"),
        ({"exp_avg": torch.ones(4, 4), "GG": [torch.eye(4), torch.eye(4)]}, "'GG' of 'a.weight' is no tensor"),
        ({"row_var": torch.rand(3, 1)}, r"'row_var' of 'a.weight' has shape \(3, 1\), but means over dimension 1"),
        ({"exp_avg_sq_r": torch.rand(4)}, r"'exp_avg_sq_r' of 'a.weight' has shape \(4,\), but the parameter \(4, 4\)"),
        ({"unheard": torch.rand(4, 1)}, "'unheard' of 'a.weight' has shape"),
    ],
)
def test_what_cannot_be_moved_exactly_is_refused_in_one_line(kept: dict[str, Any], said: str) -> None:
    turn = pg.PermutationSpec.parse(SQUARE).random(0, every_group=True)
    with pytest.raises(MismatchError, match=said) as caught:
        pg.transport(turn, {"state": {0: kept}, "param_groups": [{"params": [0]}]}, parameters=["a.weight"])
    assert "\n" not in str(caught.value)
