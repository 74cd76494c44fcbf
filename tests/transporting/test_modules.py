"""What goes with modules that change places goes where these go."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import permgraph as pg
from permgraph.errors import MismatchError

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=3e-3, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Mixture(nn.Module):
    """Experts whose outputs a router weighs; the hidden units of each can be renumbered, and the experts exchanged."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(5, count)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        return sum((gates[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts)), torch.zeros_like(x))


@functools.cache
def spec() -> pg.PermutationSpec:
    return pg.auto_spec(Mixture(), (torch.randn(2, 5),), modules=True)


def turn(seed: int = 3) -> pg.Permutation:
    """A permutation that moves every group: the first of the experts to another place."""
    found = spec().random(seed, every_group=True)
    assert found.arrays["experts.*"][0] != 0
    return found


def equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
        net(x).square().add(net(x)).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("by_name", [False, True])
def test_training_goes_on_along_the_same_trajectory(name: str, by_name: bool) -> None:
    def made(net: nn.Module) -> torch.optim.Optimizer:
        return OPTIMIZERS[name](net.named_parameters() if by_name else net.parameters())

    net, p = Mixture().double(), turn()
    optimizer = made(net)
    train(net, optimizer, 5, 1)
    other = copy.deepcopy(net)
    other.load_state_dict(p.apply(net.state_dict()))
    carried = made(other)
    carried.load_state_dict(pg.transport(p, optimizer.state_dict(), parameters=None if by_name else net))
    forgetful = copy.deepcopy(other)
    train(net, optimizer, 20, 2)
    train(other, carried, 20, 2)
    train(forgetful, made(forgetful), 20, 2)
    due = p.apply(net.state_dict())

    def distance(found: nn.Module) -> float:
        return max(float((due[name] - tensor).abs().max()) for name, tensor in found.state_dict().items())

    assert distance(other) < 1e-10 < 1e-5 < distance(forgetful)


def test_an_expert_without_a_gradient_yet_takes_the_lack_of_a_state_along() -> None:
    net, p = Mixture(), turn()
    optimizer = torch.optim.Adam(net.parameters())
    without = [f"experts.1.{name}" for name, _ in net.experts[1].named_parameters()]
    for name, parameter in net.named_parameters():
        parameter.grad = None if name in without else torch.randn_like(parameter)
    optimizer.step()
    names = [name for name, _ in net.named_parameters()]
    moved = pg.transport(p, optimizer.state_dict(), parameters=net)["state"]
    place = p.arrays["experts.*"].tolist().index(1)
    assert {names[index] for index in range(len(names)) if index not in moved} == {
        name.replace("experts.1", f"experts.{place}") for name in without
    }


def test_steps_go_with_their_expert() -> None:
    net, p = Mixture(), turn()
    optimizer = torch.optim.Adam(net.parameters())
    for step in range(3):
        for name, parameter in net.named_parameters():
            parameter.grad = None if name.startswith("experts.2.") and step else torch.randn_like(parameter)
        optimizer.step()
    names = [name for name, _ in net.named_parameters()]
    moved = pg.transport(p, optimizer.state_dict(), parameters=net)["state"]
    place = p.arrays["experts.*"].tolist().index(2)
    steps = {name: int(moved[index]["step"]) for index, name in enumerate(names)}
    at_place = {name for name in names if name.startswith(f"experts.{place}.")}
    assert {name for name, step in steps.items() if step == 1} == at_place


def test_an_optimizer_without_an_expert_that_takes_a_place_is_refused() -> None:
    net, p = Mixture(), turn()
    kept = [name for name, _ in net.named_parameters() if not name.startswith("experts.0.")]
    optimizer = torch.optim.Adam([p for name, p in net.named_parameters() if name in kept])
    train_one = sum(parameter.square().sum() for parameter in net.parameters())
    train_one.backward()
    optimizer.step()
    with pytest.raises(MismatchError, match=r"not 'experts\.0\..*whose module takes its place"):
        pg.transport(p, optimizer.state_dict(), parameters=kept)


def test_state_dicts_averages_and_differences_move_as_the_weights() -> None:
    net, p = Mixture(), turn()
    averaged = AveragedModel(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    averaged.update_parameters(net)
    due = p.apply(net.state_dict())
    for kind in ("weights", "difference", "gradient", "squares", "mask"):
        assert equal(pg.transport(p, net.state_dict(), kind=kind), due)
    both = pg.transport(p, {"model": net.state_dict(), "ema": averaged.state_dict(), "epoch": 3})
    assert equal(both["model"], due) and both["epoch"] == 3
    assert equal({n: t for n, t in both["ema"].items() if n != "n_averaged"},
                 {f"module.{n}": t for n, t in p.apply(averaged.module.state_dict()).items()})  # fmt: skip
    flat = {**net.state_dict(), **{f"ema.{name}": tensor for name, tensor in averaged.module.state_dict().items()}}
    found = pg.transport(p, flat)
    assert equal({n: t for n, t in found.items() if not n.startswith("ema.")}, due)
    assert equal({n.removeprefix("ema."): t for n, t in found.items() if n.startswith("ema.")},
                 p.apply(averaged.module.state_dict()))  # fmt: skip


def test_part_of_the_experts_is_refused_where_another_takes_their_place() -> None:
    net, p = Mixture(), turn()
    part = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("experts.0.")}
    with pytest.raises(MismatchError, match=r"the module of 'experts\.0\..* takes its place"):
        pg.transport(p, part)
    router = {name: tensor for name, tensor in net.state_dict().items() if name.startswith("router.")}
    assert equal(pg.transport(p, router), {name: p.apply(net.state_dict())[name] for name in router})


def test_masks_of_pruned_experts_move() -> None:
    net, p = Mixture(), turn()
    plain = net.state_dict()
    plain = {name: tensor.clone() for name, tensor in plain.items()}
    for expert in net.experts:
        prune.random_unstructured(expert[0], "weight", 0.5)
    moved = pg.transport(p, net.state_dict())
    masks = {f"experts.{i}.0.weight": expert[0].weight_mask for i, expert in enumerate(net.experts)}
    due, due_masks = p.apply(plain), p.apply({**plain, **masks})
    for i in range(4):
        assert torch.equal(moved[f"experts.{i}.0.weight_orig"], due[f"experts.{i}.0.weight"])
        assert torch.equal(moved[f"experts.{i}.0.weight_mask"], due_masks[f"experts.{i}.0.weight"])


def test_adapters_of_experts_move_with_them() -> None:
    net, p = Mixture(), turn()
    state, adapter, merged = net.state_dict(), {}, dict(net.state_dict())
    for i in range(4):
        for layer in (0, 2):
            name = f"experts.{i}.{layer}"
            a, b = torch.randn(3, state[f"{name}.weight"].shape[1]), torch.randn(state[f"{name}.weight"].shape[0], 3)
            adapter[f"base_model.model.{name}.lora_A.weight"] = a
            adapter[f"base_model.model.{name}.lora_B.weight"] = b
            merged[f"{name}.weight"] = state[f"{name}.weight"] + b @ a
    moved = pg.transport(p, adapter)
    assert moved.keys() == adapter.keys()
    base, due = p.apply(state), p.apply(merged)
    for i in range(4):
        for layer in (0, 2):
            a, b = (moved[f"base_model.model.experts.{i}.{layer}.lora_{x}.weight"] for x in "AB")
            name = f"experts.{i}.{layer}.weight"
            torch.testing.assert_close(base[name] + b @ a, due[name], atol=1e-6, rtol=1e-5)
    with pytest.raises(MismatchError, match="give those of all modules that change places"):
        pg.transport(p, {key: tensor for key, tensor in adapter.items() if "experts.0." not in key})


def test_a_dictionary_along_an_expert_goes_by_its_group() -> None:
    p = turn()
    of_all = torch.randn(4, 7)
    moved = pg.transport(p, {"probe": of_all}, axes={"probe": "experts.* experts.0.0"})["probe"]
    experts, units = p.arrays["experts.*"].copy(), p.arrays["experts.0.0"].copy()
    assert torch.equal(moved, torch.stack([of_all[experts[i]][units[i]] for i in range(4)]))
    with pytest.raises(MismatchError, match=r"the module of 'experts\.0\.0\.weight' changes place"):
        pg.transport(p, {"probe": torch.randn(7)}, axes={"probe": [("experts.0.0.weight", 0)]})
