"""Flower's strategies with aligned clients: the mean is Flower's, and renumbered clients average as they should."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import permgraph as pg
from permgraph.errors import MismatchError, NonFiniteError
from permgraph.merging import flower

flwr = pytest.importorskip("flwr")
from flwr.common import (  # noqa: E402
    Code,
    FitRes,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.strategy import FedAvg  # noqa: E402


class Client:
    """A client of which a strategy asks nothing but its name."""

    def __init__(self, cid: str) -> None:
        self.cid = cid


def network(seed: int = 0, width: int = 5) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 1024).round() / 1024)  # so that means with shares like 1/8 are exact
    return model


def result(state: dict[str, torch.Tensor], cid: str = "0", examples: int = 1) -> tuple[Any, FitRes]:
    parameters = ndarrays_to_parameters([tensor.numpy() for tensor in state.values()])
    return Client(cid), FitRes(Status(Code.OK, ""), parameters, examples, {})


def state_of(parameters: Any, model: nn.Module) -> dict[str, torch.Tensor]:
    arrays = parameters_to_ndarrays(parameters)
    return {name: torch.from_numpy(np.asarray(a)) for name, a in zip(model.state_dict(), arrays, strict=True)}


@pytest.mark.parametrize("rounds_apart", [0, 1])
@pytest.mark.parametrize("inplace", [True, False])
def test_permuted_clients_of_one_network_average_to_it(rounds_apart: int, inplace: bool) -> None:
    model = network()
    spec = pg.auto_spec(model)
    own = model.state_dict()
    clients = [own, *(spec.random(seed, every_group=True).apply(own) for seed in (1, 2, 3))]
    strategy = flower.AlignedFedAvg(model, rounds_apart=rounds_apart, inplace=inplace)
    results = [
        result(state, str(n), examples) for n, (state, examples) in enumerate(zip(clients, (4, 2, 1, 1), strict=True))
    ]
    strategy._alignment.begin(own)
    parameters, _ = strategy.aggregate_fit(1, results, [])
    mean = state_of(parameters, model)
    assert all(torch.equal(mean[name], tensor) for name, tensor in own.items())
    (done,) = strategy.alignments
    assert done.apart == bool(rounds_apart)
    assert done.moved["0"] == 0 and all(done.moved[str(n)] > 0 for n in (1, 2, 3))
    plain, _ = FedAvg(inplace=inplace).aggregate_fit(1, results, [])
    assert not torch.allclose(state_of(plain, model)["0.weight"], own["0.weight"], atol=1e-2)


def test_the_mean_is_weighted_by_examples() -> None:
    """Units that are far apart leave one way to match them; the mean is then worked out by hand."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    a = {"0.weight": torch.tensor([[1.0], [10.0]]), "2.weight": torch.tensor([[1.0, 2.0]])}
    b = {"0.weight": torch.tensor([[14.0], [5.0]]), "2.weight": torch.tensor([[6.0, 5.0]])}  # the other way round
    strategy = flower.AlignedFedAvg(model)
    parameters, _ = strategy.aggregate_fit(1, [result(a, "a", 3), result(b, "b", 1)], [])
    mean = state_of(parameters, model)
    assert mean["0.weight"].flatten().tolist() == pytest.approx([(3 * 1 + 5) / 4, (3 * 10 + 14) / 4])
    assert mean["2.weight"].flatten().tolist() == pytest.approx([(3 * 1 + 5) / 4, (3 * 2 + 6) / 4])
    assert strategy.alignments[0].moved == {"a": 0, "b": 2}


def test_clients_that_correspond_are_averaged_as_by_flower() -> None:
    model = network()
    own = model.state_dict()
    generator = torch.Generator().manual_seed(0)
    near = [{k: v + 1e-3 * torch.randn(v.shape, generator=generator) for k, v in own.items()} for _ in range(3)]
    results = [result(state, str(n), n + 1) for n, state in enumerate(near)]
    strategy = flower.AlignedFedAvg(model, rounds_apart=0)
    strategy._alignment.begin(own)
    ours, _ = strategy.aggregate_fit(1, results, [])
    plain, _ = FedAvg().aggregate_fit(1, results, [])
    assert ours.tensors == plain.tensors
    assert set(strategy.alignments[0].moved.values()) == {0}


def test_a_later_round_aligns_to_the_mean_before_it() -> None:
    model = network()
    spec, own = pg.auto_spec(model), model.state_dict()
    strategy = flower.AlignedFedAvg(model)
    strategy.aggregate_fit(1, [result(own)], [])
    moved = [spec.random(seed, every_group=True).apply(own) for seed in (1, 2)]
    parameters, _ = strategy.aggregate_fit(2, [result(state, str(n)) for n, state in enumerate(moved)], [])
    assert all(torch.equal(t, own[name]) for name, t in state_of(parameters, model).items())
    assert [done.apart for done in strategy.alignments] == [True, False]


def test_a_server_of_flower_runs_it() -> None:
    from flwr.server.client_manager import SimpleClientManager

    model = network()
    manager = SimpleClientManager()
    strategy = flower.AlignedFedAvg(model, rounds_apart=0, min_fit_clients=0, min_available_clients=0)
    sent = ndarrays_to_parameters([tensor.numpy() for tensor in model.state_dict().values()])
    assert strategy.configure_fit(1, sent, manager) == []
    moved = pg.auto_spec(model).random(1, every_group=True).apply(model.state_dict())
    parameters, _ = strategy.aggregate_fit(1, [result(moved)], [])
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in state_of(parameters, model).items())


def test_batchnorm_counters_go_through() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    own = model.state_dict()
    moved = pg.auto_spec(model).random(1, every_group=True).apply(own)
    parameters, _ = flower.AlignedFedAvg(model).aggregate_fit(1, [result(own, "a"), result(moved, "b")], [])
    assert all(torch.allclose(t, own[name], atol=1e-7) for name, t in state_of(parameters, model).items())


def broken(change: str) -> dict[str, torch.Tensor]:
    state = copy.deepcopy(dict(network().state_dict()))
    if change == "shape":
        state["2.weight"] = torch.zeros(4, 6)
    elif change == "missing":
        del state["4.bias"]
    elif change == "many":
        state["5.bias"] = torch.zeros(2)
    else:
        state["2.bias"][1] = float("nan")
    return state


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("shape", r"client 7: '2.weight' has shape \(4, 6\), but \(4, 5\) in the model"),
        ("missing", "client 7 has 5 arrays, but the model 6 in its state dict: there is none for '4.bias'"),
        ("many", "client 7 has 7 arrays, but the model 6 in its state dict: the last ones have no name"),
        ("nan", "'2.bias' of client 7 holds NaN or infinity in 1 of its 4 elements"),
    ],
)
def test_clients_that_do_not_fit_are_named(change: str, said: str) -> None:
    model = network()
    strategy = flower.AlignedFedAvg(model)
    with pytest.raises((MismatchError, NonFiniteError), match=said):
        strategy.aggregate_fit(1, [result(model.state_dict()), result(broken(change), "7")], [])
    assert strategy.alignments == ()


def test_what_cannot_be_done_is_said() -> None:
    model = network()
    with pytest.raises(MismatchError, match="round 2 has no global model to align to"):
        flower.AlignedFedAvg(model).aggregate_fit(2, [result(model.state_dict())], [])
    with pytest.raises(MismatchError, match="takes the clients' module first, not a dict"):
        flower.AlignedFedAvg(dict(model.state_dict()))  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="runs the networks on data"):
        flower.AlignedFedAvg(model, matcher=pg.ActivationMatching([torch.zeros(2, 3)]))
    with pytest.raises(MismatchError, match="rounds_apart=-1"):
        flower.AlignedFedAvg(model, rounds_apart=-1)
    with pytest.raises(MismatchError, match="two results of one round are of client '0'"):
        flower.AlignedFedAvg(model).aggregate_fit(1, [result(model.state_dict()), result(model.state_dict())], [])
    with pytest.raises(MismatchError, match="does not fit|not know|has shape|no '"):
        flower.AlignedFedAvg(network(width=6), spec=pg.auto_spec(model))


def test_failures_are_flowers_own_affair() -> None:
    model = network()
    strategy = flower.AlignedFedAvg(model, accept_failures=False)
    assert strategy.aggregate_fit(1, [], []) == (None, {})
    assert strategy.aggregate_fit(1, [result(model.state_dict())], [RuntimeError()]) == (None, {})
    assert strategy.alignments == ()


def test_the_example_of_the_documentation_is_sound() -> None:
    """It defines an app of Flower's; that runs on a server only."""
    page = Path(__file__).resolve().parents[2] / "docs" / "many-models.md"
    (code,) = re.findall(r"^```py\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"Net": network}
    exec(code, names)
    assert isinstance(names["app"], names["ServerApp"])
    given = re.search(r"AlignedMessageFedAvg\((.*?)\)", code)
    assert given is not None
    strategy = eval(f"AlignedMessageFedAvg({given[1]})", {**names, "model": network()})
    assert strategy.fraction_train == 0.5 and strategy.alignments == ()


# --- messages ---------------------------------------------------------------------------------------------------------


def message(state: dict[str, torch.Tensor], node: int, examples: int = 1) -> Any:
    """A reply as it comes from a node, made without a run of Flower's."""
    from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict

    content = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(tensor.numpy()) for name, tensor in state.items()}),
            "metrics": MetricRecord({"num-examples": examples, "loss": float(node)}),
        }
    )
    known = dict(
        run_id=1, message_id="", src_node_id=node, dst_node_id=1, reply_to_message_id="", group_id="", created_at=0.0,
        ttl=60.0, message_type="train",
    )  # fmt: skip
    return Message(content, metadata=Metadata(**known))


def test_messages_of_permuted_clients_average_to_the_network() -> None:
    model = network()
    spec, own = pg.auto_spec(model), model.state_dict()
    moved = [spec.random(seed, every_group=True).apply(own) for seed in (1, 2)]
    strategy = flower.AlignedMessageFedAvg(model, fraction_evaluate=0.5)
    replies = [message(own, 11, 2), message(moved[0], 12, 1), message(moved[1], 13, 1)]
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert all(torch.equal(torch.from_numpy(arrays[name].numpy()), tensor) for name, tensor in own.items())
    assert metrics["loss"] == pytest.approx((2 * 11 + 12 + 13) / 4)
    first = replies[1].content["arrays"]["0.weight"].numpy()
    assert np.array_equal(first, moved[0]["0.weight"].numpy())  # what came in is not changed
    arrays, _ = strategy.aggregate_train(2, replies[1:])
    assert all(torch.equal(torch.from_numpy(arrays[name].numpy()), tensor) for name, tensor in own.items())
    assert list(strategy.alignments[1].moved) == ["12", "13"] and min(strategy.alignments[1].moved.values()) > 0


def test_messages_that_do_not_fit_are_named() -> None:
    model = network()
    strategy = flower.AlignedMessageFedAvg(model)
    for change, said in (
        ("shape", r"client 7: '2.weight' has shape \(4, 6\), but \(4, 5\) in the model"),
        ("missing", "client 7 has no array for '4.bias'"),
        ("many", "client 7 has an array '5.bias', which the model has not"),
    ):
        with pytest.raises(MismatchError, match=said):
            strategy.aggregate_train(1, [message(model.state_dict(), 1), message(broken(change), 7)])
    assert strategy.aggregate_train(1, []) == (None, None)
