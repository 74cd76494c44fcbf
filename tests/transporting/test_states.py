"""Averages, masks, differences and whole training checkpoints go where the weights go."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import permgraph as pg
from permgraph.errors import MismatchError, PermgraphError


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)
    ).eval()


def equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_state_dict_moves_as_permutations_and_transformations_move_it() -> None:
    given = net()
    for symmetry in ("permutation", "general"):
        turn = pg.auto_spec(given, symmetry=symmetry).random(1)
        moved = pg.transport(turn, given.state_dict())
        assert equal(moved, turn.apply(given.state_dict())) and equal(moved, pg.transport(turn, given))
        part = {name: tensor for name, tensor in given.state_dict().items() if name.startswith("3.")}
        assert equal(pg.transport(turn, part), {name: moved[name] for name in part})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.norm = nn.RMSNorm(4)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.head(self.norm(x + self.fc(x)))


def test_tied_weights_stay_tied_unless_the_spec_unties_them() -> None:
    given, tokens = Tied().double(), torch.tensor([[0, 1, 2]])
    turn = pg.auto_spec(given, (tokens,)).random(1, every_group=True)
    moved = pg.transport(turn, {name: tensor.detach() for name, tensor in given.state_dict().items()})
    assert moved["head.weight"].data_ptr() == moved["table.weight"].data_ptr()
    spec = pg.auto_spec(given, (tokens,), symmetry="general", untie=True)
    part = {f"ema.{name}": tensor for name, tensor in given.state_dict().items() if name != "head.weight"}
    there = spec.random(1).apply(given.state_dict())
    moved = pg.transport(spec.random(1), part)
    assert not torch.equal(there["head.weight"], there["table.weight"])
    assert equal({name.removeprefix("ema."): tensor for name, tensor in moved.items()}, there)


def test_averages_under_a_prefix() -> None:
    given = net()
    average = AveragedModel(given, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    turn = pg.auto_spec(given).random(1, every_group=True)
    there = turn.apply(given.state_dict())
    moved = pg.transport(turn, average.state_dict())
    assert equal({k.removeprefix("module."): v for k, v in moved.items() if k != "n_averaged"}, there)
    assert int(moved["n_averaged"]) == 0
    both = {**given.state_dict(), **{f"ema.{name}": tensor for name, tensor in given.state_dict().items()}}
    moved = pg.transport(turn, both)
    assert list(moved) == list(both)
    assert equal({name: moved[name] for name in there}, there)
    assert equal({name: moved[f"ema.{name}"] for name in there}, there)


def test_a_training_checkpoint_as_a_whole() -> None:
    given = net().train()
    adam = torch.optim.Adam(given.parameters())
    given(torch.randn(5, 4)).sum().backward()
    adam.step()
    shadow = [parameter.detach().clone() for parameter in given.parameters()]
    whole = {
        "epoch": 3,
        "state_dict": given.state_dict(),
        "optimizer_states": [adam.state_dict()],
        "ema": {"decay": 0.99, "shadow_params": shadow, "loss": torch.tensor(0.25)},
        "rng": torch.get_rng_state(),
        "note": None,
    }
    turn = pg.auto_spec(given.eval()).random(1, every_group=True)
    kept = copy.deepcopy(whole)
    moved = pg.transport(turn, whole, parameters=given)
    there = turn.apply(given.state_dict())
    names = [name for name, _ in given.named_parameters()]
    assert moved["epoch"] == 3 and moved["note"] is None and torch.equal(moved["rng"], whole["rng"])
    assert equal(moved["state_dict"], there)
    assert equal(dict(zip(names, moved["ema"]["shadow_params"], strict=True)), {name: there[name] for name in names})
    first = adam.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(moved["optimizer_states"][0]["state"][0]["exp_avg"], turn.apply_to("0.weight", first))
    assert moved["ema"]["decay"] == 0.99 and float(moved["ema"]["loss"]) == 0.25
    assert equal(whole["state_dict"], kept["state_dict"])  # nothing that goes in is changed
    with pytest.raises(MismatchError, match="'ema.shadow_params' is a list of tensors without names"):
        pg.transport(turn, {"ema": whole["ema"]})
    with pytest.raises(MismatchError, match=r"'best\.0' is a tensor of shape \(6,\) by itself"):
        pg.transport(turn, {"best": [torch.ones(6), 3]})


def test_pruned_weights_and_their_masks() -> None:
    given = net()
    turn = pg.auto_spec(given).random(1, every_group=True)
    there = turn.apply(given.state_dict())
    prune.random_unstructured(given[3], "weight", amount=0.4)
    state = given.state_dict()
    assert "3.weight_mask" in state and "3.weight" not in state
    moved = pg.transport(turn, state)
    assert torch.equal(moved["3.weight_orig"], there["3.weight"])
    assert torch.equal(moved["3.weight_mask"], turn.apply_to("3.weight", state["3.weight_mask"]))
    fresh = net()
    fresh.load_state_dict(there)
    prune.custom_from_mask(fresh[3], "weight", moved["3.weight_mask"])
    x = torch.randn(5, 4)
    torch.testing.assert_close(fresh(x), given(x))
    whole = {"model": there, "masks": {"3.weight": state["3.weight_mask"] > 0}}  # truth values, and nothing said
    assert torch.equal(pg.transport(turn, whole)["masks"]["3.weight"], moved["3.weight_mask"] > 0)
    general = pg.auto_spec(net(), symmetry="general").random(1)
    signed = pg.transport(general, {"3.weight": state["3.weight_mask"]}, kind="mask")
    assert set(signed["3.weight"].unique().tolist()) == {0.0, 1.0}


def test_differences_go_with_the_linear_part() -> None:
    """What is added before is what is added after, also where matrices act between gains that differ."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.head = nn.Embedding(5, 4), nn.RMSNorm(4), nn.Linear(4, 3)
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.table(tokens)
            return self.head(self.norm(x + self.down(self.up(self.norm(x)).relu())))

    base, tuned = Normed().double(), Normed().double()
    with torch.no_grad():
        for each in (base, tuned):
            each.norm.weight.uniform_(0.5, 2)
    tokens = torch.tensor([[0, 1, 2, 3]])
    spec = pg.auto_spec(base, (tokens,), symmetry="general")
    difference = {name: tuned.state_dict()[name] - tensor for name, tensor in base.state_dict().items()}
    for turn in (spec.permutations().random(1), spec.random(1)):
        moved = pg.transport(turn, difference, kind="difference", base=base)
        there = turn.apply(base.state_dict())
        for name, tensor in turn.apply(tuned.state_dict()).items():
            torch.testing.assert_close(there[name] + moved[name], tensor)
    assert spec.random(1).matrices and spec.random(1).gains
    with pytest.raises(MismatchError, match="give base="):
        pg.transport(spec.random(1), difference, kind="difference")
    with pytest.raises(MismatchError, match="the gradient of '.*' depends on gains"):
        pg.transport(spec.random(1), difference, kind="gradient")


def test_copies_of_the_weights_are_each_moved_by_their_own_gains() -> None:
    given, tokens = Tied().double(), torch.tensor([[0, 1, 2]])
    turn = pg.auto_spec(given, (tokens,), symmetry="general", untie=True).random(1)
    average = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    average["norm.weight"] = torch.tensor([0.5, 2, 3, 4]).double()
    moved = pg.transport(turn, {**given.state_dict(), **{f"ema.{name}": t for name, t in average.items()}})
    for prefix, state in (("", given.state_dict()), ("ema.", average)):
        for name, tensor in turn.apply(state).items():
            torch.testing.assert_close(moved[prefix + name], tensor)


def test_a_merge_moves_what_is_of_each_model() -> None:
    models = [net(), net()]
    merged = pg.merge(models)
    for number, model in enumerate(models):
        expected = merged.permutations[number].apply(model.state_dict())
        assert equal(merged.transport(number, model.state_dict()), expected)
    with pytest.raises(MismatchError, match="there is no model 2"):
        merged.transport(2, models[0].state_dict())


def test_what_is_unknown_is_refused() -> None:
    given = net()
    turn = pg.auto_spec(given).random(1)
    with pytest.raises(MismatchError, match=r"'extra\.weight', of shape \(3, 3\), belongs to no parameter"):
        pg.transport(turn, {**given.state_dict(), "extra.weight": torch.ones(3, 3)})
    with pytest.raises(MismatchError, match=r"model: none of the checkpoint's 1 keys"):
        pg.transport(turn, {"model": {"weight_of_another": torch.ones(3)}})
    with pytest.raises(MismatchError, match="but the spec says"):
        pg.transport(turn, {"0.weight": torch.ones(3, 3)})
    with pytest.raises(PermgraphError, match="unknown kind 'moments'"):
        pg.transport(turn, given, kind="moments")  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="permutation or transformation is needed"):
        pg.transport("fit", given)
    with pytest.raises(MismatchError, match="a dictionary of tensors is moved"):
        pg.transport(turn, [torch.ones(2)], axes={})
