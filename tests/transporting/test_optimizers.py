"""Training goes on after a network and its optimizer were renumbered as it would have gone on without that."""

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

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=3e-3, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
}


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    """Random draws of a test are its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)).double()


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 20, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).double()


def data(net: nn.Module, steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (6, 7) if isinstance(net[1], nn.Tanh) else (3, 4, 5)  # type: ignore[index]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        net(batch).square().add(net(batch)).mean().backward()
        optimizer.step()


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@functools.cache
def spec_of(build: Callable[[], nn.Module]) -> pg.PermutationSpec:
    return pg.auto_spec(build())


@pytest.mark.parametrize(
    ("build", "name"), [*((mlp, name) for name in OPTIMIZERS), *((transformer, n) for n in ("Adam", "AdamW", "SGD"))]
)
def test_training_goes_on_along_the_same_trajectory(build: Callable[[], nn.Module], name: str) -> None:
    net, make = build(), OPTIMIZERS[name]
    optimizer = make(net.parameters())
    train(net, optimizer, data(net, 5))
    turn = spec_of(build).random(3, every_group=True)
    other = copy.deepcopy(net)
    other.load_state_dict(turn.apply(net.state_dict()))
    forgetful = copy.deepcopy(other)
    carried, fresh = make(other.parameters()), make(forgetful.parameters())
    carried.load_state_dict(pg.transport(turn, optimizer.state_dict(), parameters=net))
    after = data(net, 50)
    for each, state in ((net, optimizer), (other, carried), (forgetful, fresh)):
        train(each, state, after)
    there = turn.apply(net.state_dict())
    assert distance(there, other.state_dict()) < 1e-6
    assert distance(there, forgetful.state_dict()) > 1e-4  # the state counts
    assert distance(net.state_dict(), other.state_dict()) > 1e-2  # and so does the permutation


def test_an_alignment_moves_what_its_module_has_trained() -> None:
    b = mlp()
    optimizer = torch.optim.Adam(b.parameters())
    train(b, optimizer, data(b, 3))
    fit = pg.align(mlp(), b)
    assert not fit.permutation.is_identity
    before = copy.deepcopy(optimizer.state_dict())
    moved = fit.transport(optimizer)
    names = [name for name, _ in b.named_parameters()]
    for index, name in enumerate(names):
        for key in ("exp_avg", "exp_avg_sq"):
            given = optimizer.state_dict()["state"][index][key]
            assert torch.equal(moved["state"][index][key], fit.permutation.apply_to(name, given))
            assert torch.equal(given, before["state"][index][key])
    assert moved["param_groups"] == before["param_groups"] and moved["state"][0]["step"] == 3
    by_state = fit.transport(optimizer.state_dict())
    assert all(torch.equal(by_state["state"][n]["exp_avg"], moved["state"][n]["exp_avg"]) for n in range(len(names)))


def test_groups_of_parameters_in_another_order() -> None:
    net = mlp()
    named = list(net.named_parameters())
    groups = [[n for n, p in named if p.ndim > 1], [n for n, p in named if p.ndim == 1]]
    optimizer = torch.optim.Adam([{"params": [dict(named)[n] for n in group]} for group in groups])
    train(net, optimizer, data(net, 2))
    turn = spec_of(mlp).random(0, every_group=True)
    with pytest.raises(MismatchError, match="2 groups of parameters.*or the optimizer itself"):
        pg.transport(turn, optimizer.state_dict(), parameters=net)
    order = [*groups[0], *groups[1]]
    for moved in (
        pg.transport(turn, optimizer, parameters=net),
        pg.transport(turn, optimizer.state_dict(), parameters=order),
        pg.transport(turn, {"net": net.state_dict(), "optim": [optimizer.state_dict()]}, parameters=order)["optim"][0],
    ):
        for index, name in enumerate(order):
            given = optimizer.state_dict()["state"][index]["exp_avg_sq"]
            assert torch.equal(moved["state"][index]["exp_avg_sq"], turn.apply_to(name, given))
    with pytest.raises(MismatchError, match="none of the Sequential's"):
        pg.transport(turn, optimizer, parameters=mlp())


def test_the_state_may_name_its_parameters() -> None:
    net = mlp()
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer, data(net, 2))
    turn = spec_of(mlp).random(0, every_group=True)
    moved = pg.transport(turn, optimizer.state_dict())
    given = optimizer.state_dict()["state"][2]["momentum_buffer"]
    assert torch.equal(moved["state"][2]["momentum_buffer"], turn.apply_to("2.weight", given))
    by_name = {"state": {"2.weight": {"exp_avg": given}}, "param_groups": [{"params": ["2.weight"]}]}
    assert torch.equal(pg.transport(turn, by_name)["state"]["2.weight"]["exp_avg"], turn.apply_to("2.weight", given))


def test_what_does_not_fit_is_refused() -> None:
    net = mlp()
    optimizer = torch.optim.Adam(net.parameters())
    train(net, optimizer, data(net, 1))
    state, turn = optimizer.state_dict(), spec_of(mlp).random(0)
    names = [name for name, _ in net.named_parameters()]
    with pytest.raises(MismatchError, match="which parameter is which: give parameters="):
        pg.transport(turn, state)
    with pytest.raises(MismatchError, match="6 parameters, but 5 names"):
        pg.transport(turn, state, parameters=names[1:])
    with pytest.raises(MismatchError, match=r"'exp_avg' of '4\.bias' has shape \(12, 7\), but the parameter \(3,\)"):
        pg.transport(turn, state, parameters=names[::-1])
    with pytest.raises(MismatchError, match="'4.wieght', which the spec does not know"):
        pg.transport(turn, state, parameters=[*names[:4], "4.wieght", names[5]])


def test_scales_go_with_gradients_and_their_squares() -> None:
    """In y = v relu(w x), w by s and v by 1/s: the gradient of w by 1/s, and its square by 1/s²."""
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    turn = pg.auto_spec(net, symmetry="general").random(2)
    other = copy.deepcopy(net)
    other.load_state_dict(turn.apply(net.state_dict()))
    x = torch.randn(5, 2, dtype=torch.float64)
    for each in (net, other):
        each(x).sum().backward()
    gradients, there = ({n: p.grad for n, p in each.named_parameters()} for each in (net, other))
    moved = pg.transport(turn, gradients, kind="gradient")
    squares = pg.transport(turn, {name: g.square() for name, g in gradients.items() if g is not None}, kind="squares")
    for name, gradient in there.items():
        assert gradient is not None
        torch.testing.assert_close(moved[name], gradient)
        torch.testing.assert_close(squares[name], gradient.square())
    scale = next(iter(turn.scales.values()))
    assert float(abs(scale - 1).max()) > 0.1
    adam = torch.optim.Adam(net.parameters())
    adam.step()
    state = pg.transport(turn, adam, parameters=net)["state"][0]
    torch.testing.assert_close(state["exp_avg_sq"], squares["0.weight"] * 1e-3)
    state_of_its_own = {
        "state": {0: {"curvature": adam.state_dict()["state"][0]["exp_avg"]}},
        "param_groups": [{"params": [0]}],
    }
    with pytest.raises(MismatchError, match="'curvature' is not known"):
        pg.transport(turn, state_of_its_own, parameters=["0.weight"])


class Linear3(nn.Module):
    """Three linear layers with nothing between them, so that any invertible matrix can act there."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1)).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_gradients_go_with_the_inverse_transpose_and_squares_not_at_all() -> None:
    net = Linear3()
    turn = pg.auto_spec(net, symmetry="general").random(2)
    assert turn.matrices
    other = copy.deepcopy(net)
    other.load_state_dict(turn.apply(net.state_dict()))
    x = torch.randn(5, 2, dtype=torch.float64)
    for each in (net, other):
        each(x).square().sum().backward()
    moved = pg.transport(turn, {n: p.grad for n, p in net.named_parameters()}, kind="gradient")
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(moved[name], parameter.grad)
    adam = torch.optim.Adam(net.parameters())
    adam.step()
    with pytest.raises(
        MismatchError, match=r"GL acts on 'layers\.0\.weight'.*matrices mix the gradients.*permutations"
    ):
        pg.transport(turn, adam, parameters=net)
