"""Federated averaging with Flower, where the clients' networks are brought into correspondence before the mean.

`AlignedFedAvg` stands in for ``flwr.server.strategy.FedAvg``, and `AlignedMessageFedAvg` for the message-based
``flwr.serverapp.strategy.FedAvg``. Both leave the mean, its weighting by examples, the metrics and the choice of
clients to Flower. Flower comes with ``pip install 'permgraph[federated]'``; it is imported with this module only.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from permgraph.errors import MismatchError, MissingExtraError
from permgraph.matching import WeightMatching
from permgraph.matching.agreement import agreed_spec
from permgraph.matching.matcher import SupportsMatch, runs_networks
from permgraph.merging.methods import CycleConsistent
from permgraph.merging.result import MergeMethod, Models
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.weights.state_dict import is_continuous, require_finite

__all__ = ["AlignedFedAvg", "AlignedMessageFedAvg", "AlignedRound"]

_MISSING = "federated averaging needs flwr 1.21 or later: pip install 'permgraph[federated]'"


class _WithoutFlower:
    """What stands in for Flower's strategies where it is not installed: it cannot be made."""

    def __init__(self, *args: Any, **options: Any) -> None:
        raise MissingExtraError(_MISSING)


try:
    from flwr.server.strategy import FedAvg as _FitFedAvg
    from flwr.serverapp.strategy import FedAvg as _MessageFedAvg
except ImportError:
    _FitFedAvg = _MessageFedAvg = _WithoutFlower

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class AlignedRound:
    """How the clients of one round were aligned.

    Attributes:
        number: of the round, from 1.
        seconds: of wall time, for all clients together.
        moved: for each client how many units were given another place.
        apart: whether the clients were matched to each other, and not to the global model.
    """

    number: int
    seconds: float
    moved: dict[str, int]
    apart: bool


class _Alignment:
    """What both strategies do between the clients' replies and Flower's mean."""

    def __init__(
        self,
        model: nn.Module,
        spec: PermutationSpec | None,
        rounds_apart: int,
        matcher: SupportsMatch | None,
        method: MergeMethod | None,
        seed: int,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise MismatchError(f"the strategy takes the clients' module first, not a {type(model).__name__}")
        if rounds_apart < 0:
            raise MismatchError(f"rounds_apart={rounds_apart}: give 0 or more")
        self.matcher = WeightMatching(init="identity") if matcher is None else matcher
        self.method = CycleConsistent() if method is None else method
        for searcher in (self.matcher, getattr(self.method, "matcher", None)):
            if searcher is not None and runs_networks(searcher):
                raise MismatchError(
                    f"{type(searcher).__name__} runs the networks on data, which a server has not: match by weights"
                )
        spec, _ = agreed_spec([model], ["the model"], spec)
        self.spec = spec if spec.general is None else spec.permutations()
        state = model.state_dict()
        self.spec.check(state)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.rounds_apart, self.seed = rounds_apart, seed
        self.reference: State | None = None
        self.history: list[AlignedRound] = []

    def listed(self, arrays: Sequence[Any], who: str) -> dict[str, torch.Tensor]:
        """Arrays in the order of the model's state dict, by its names."""
        if len(arrays) != len(self.shapes):
            where = list(self.shapes)[len(arrays)] if len(arrays) < len(self.shapes) else None
            more = "there is none for " + repr(where) if where else "the last ones have no name"
            raise MismatchError(
                f"{who} has {len(arrays)} arrays, but the model {len(self.shapes)} in its state dict: {more}; send "
                "model.state_dict().values(), in this order"
            )
        return self.named(dict(zip(self.shapes, arrays, strict=True)), who)

    def named(self, arrays: Mapping[str, Any], who: str) -> dict[str, torch.Tensor]:
        """Arrays by the model's names as tensors, once it is sure that each has its shape and is finite."""
        for name in arrays:
            if name not in self.shapes:
                raise MismatchError(f"{who} has an array {name!r}, which the model has not: send its state dict")
        state: dict[str, torch.Tensor] = {}
        for name, shape in self.shapes.items():
            if name not in arrays:
                raise MismatchError(f"{who} has no array for {name!r}, which the model has with shape {shape}")
            array = np.asarray(arrays[name])
            if array.shape != shape:
                raise MismatchError(f"{who}: {name!r} has shape {array.shape}, but {shape} in the model")
            try:
                tensor = torch.from_numpy(array.copy())
            except TypeError:
                raise MismatchError(f"{who}: {name!r} holds {array.dtype}, which is no number of PyTorch's") from None
            if is_continuous(tensor):
                require_finite(tensor, name, who, ": leave that client out of the round")
            state[name] = tensor
        return state

    def begin(self, reference: State) -> None:
        """Note the global model with which a round begins."""
        self.reference = reference

    def end(self, result: State) -> None:
        """Note the global model with which a round ends, as what the next one begins with unless it is told."""
        self.reference = result

    def brought(self, number: int, clients: Mapping[str, State]) -> dict[str, dict[str, torch.Tensor]]:
        """The clients' state dicts, renumbered so that they correspond to each other.

        Raises:
            MismatchError: there is no global model to align to.
        """
        started = time.perf_counter()
        apart = number <= self.rounds_apart
        working = {who: self._working(state) for who, state in sorted(clients.items())}
        if apart:
            elements: dict[str, Permutation] = dict.fromkeys(working, self.spec.identity())
            if len(working) > 1:
                models = Models(tuple(working.values()), self.spec).stacked()
                found = self.method.find(models, self.seed).over(self.spec)
                _require_an_end(found.outcome)
                back = found.permutations[0].inverse()  # all to the numbering of the first
                elements = {who: back @ each for who, each in zip(working, found.permutations, strict=True)}
        else:
            if self.reference is None:
                raise MismatchError(
                    f"round {number} has no global model to align to: configure the round first, or raise rounds_apart="
                )
            target, elements = self._working(self.reference), {}
            for who, state in working.items():
                match = self.matcher.match(target, state, self.spec, self.seed)
                _require_an_end(match.outcome)
                elements[who] = match.permutation
        aligned: dict[str, dict[str, torch.Tensor]] = {
            who: elements[who].apply(state) for who, state in clients.items()
        }
        moved = {who: sum(element.moved().values()) for who, element in elements.items()}
        self.history.append(AlignedRound(number, time.perf_counter() - started, moved, apart))
        return aligned

    def _working(self, state: State) -> dict[str, torch.Tensor]:
        """The same in float32 or better, in which matching computes."""
        return {
            name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if is_continuous(tensor) else tensor
            for name, tensor in state.items()
        }


class _Aligned:
    """What both strategies take besides the options of Flower's own, and tell."""

    def __init__(
        self,
        model: nn.Module,
        *,
        spec: PermutationSpec | None = None,
        rounds_apart: int = 1,
        matcher: SupportsMatch | None = None,
        method: MergeMethod | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)  # Flower's, which comes next in the order of classes
        self._alignment = _Alignment(model, spec, rounds_apart, matcher, method, seed)

    @property
    def alignments(self) -> tuple[AlignedRound, ...]:
        """How the clients of each round were aligned."""
        return tuple(self._alignment.history)


class AlignedFedAvg(_Aligned, _FitFedAvg):  # type: ignore[misc]
    """`FedAvg` of ``flwr.server.strategy``, with each client aligned before the mean is taken.

    In the first `rounds_apart` rounds, in which clients begin with weights of their own, they are matched to each
    other; afterwards each is matched to the global model with which the round began. Then `FedAvg` takes its mean,
    weighted by the clients' numbers of examples. A renumbered network computes what it did, so that clients which
    correspond already, as in rounds of few steps from one model, are left as they are or lose nothing.

    Clients send ``[t.cpu().numpy() for t in model.state_dict().values()]``. BatchNorm's statistics are averaged as they
    are by `FedAvg`; where clients began apart, measure them anew (`recalibrate_batchnorm`).

    Args:
        model: the clients' network, of which the symmetries, names and shapes are taken; never changed nor kept.
        spec: its symmetries; inferred from `model` if not given. Of general ones, the permutations are used.
        rounds_apart: in how many rounds, from the first, clients do not begin with the global model.
        matcher: how a client is matched to the global model; by default `WeightMatching(init="identity")`.
        method: how clients are matched to each other; by default `CycleConsistent()`.
        seed: for all random choices of matching.
        options: those of `FedAvg`.

    Attributes:
        alignments: an `AlignedRound` for each round so far.

    Raises:
        MissingExtraError: Flower is not installed.
        MismatchError: the model does not fit the spec, or a matcher runs networks on data.

    `aggregate_fit` raises MismatchError or NonFiniteError that names the client and the parameter, where a client's
    arrays are not the model's, or hold NaN or infinity.

    References:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", 2017 (the mean);
        Wang et al., "Federated Learning with Matched Averaging", 2020 (matching before it); Ainsworth et al., "Git
        Re-Basin", 2022, Section 3.2 (the matching).
    """

    def __repr__(self) -> str:
        return f"AlignedFedAvg(accept_failures={self.accept_failures}, rounds_apart={self._alignment.rounds_apart})"

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
        """Note the global model, and choose clients as `FedAvg` does."""
        if server_round > self._alignment.rounds_apart:
            self._alignment.begin(self._state(parameters, "the global model"))
        return super().configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(
        self, server_round: int, results: list[tuple[Any, Any]], failures: list[Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Align the clients' networks, then aggregate as `FedAvg` does."""
        if not results or (failures and not self.accept_failures):
            return super().aggregate_fit(server_round, results, failures)  # type: ignore[no-any-return]
        from flwr.common import ndarrays_to_parameters

        ids = _distinct([str(client.cid) for client, _ in results])
        states = {who: self._state(res.parameters, f"client {who}") for who, (_, res) in zip(ids, results, strict=True)}
        aligned = self._alignment.brought(server_round, states)
        brought = [
            (client, dataclasses.replace(res, parameters=ndarrays_to_parameters(_arrays(aligned[who]))))
            for who, (client, res) in zip(ids, results, strict=True)
        ]
        parameters, metrics = super().aggregate_fit(server_round, brought, failures)
        if parameters is not None:
            self._alignment.end(self._state(parameters, "the mean"))
        return parameters, metrics

    def _state(self, parameters: Any, who: str) -> dict[str, torch.Tensor]:
        from flwr.common import parameters_to_ndarrays

        return self._alignment.listed(parameters_to_ndarrays(parameters), who)


class AlignedMessageFedAvg(_Aligned, _MessageFedAvg):  # type: ignore[misc]
    """The message-based `FedAvg` of ``flwr.serverapp.strategy``, with each client aligned before the mean is taken.

    As `AlignedFedAvg`, for clients that answer with an ``ArrayRecord(model.state_dict())``, whose keys are the names of
    the model's state dict. Clients are named in errors and in `alignments` by the ids of their nodes.

    Args:
        model, spec, rounds_apart, matcher, method, seed: as of `AlignedFedAvg`.
        options: those of `FedAvg`.

    Attributes:
        alignments: an `AlignedRound` for each round so far.

    Raises:
        MissingExtraError: Flower is not installed.
        MismatchError: the model does not fit the spec, or a matcher runs networks on data.
    """

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        """Note the global model, and choose clients as `FedAvg` does."""
        if server_round > self._alignment.rounds_apart:
            self._alignment.begin(self._state(arrays, "the global model"))
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> tuple[Any, Any]:
        """Align the clients' networks, then aggregate as `FedAvg` does."""
        replies = list(replies)
        good = [reply for reply in replies if not reply.has_error() and len(reply.content.array_records) == 1]
        if not good or len(good) < sum(not reply.has_error() for reply in replies):
            return super().aggregate_train(server_round, replies)  # type: ignore[no-any-return]
        ids = _distinct([str(reply.metadata.src_node_id) for reply in good])
        states = {}
        for who, reply in zip(ids, good, strict=True):
            (record,) = reply.content.array_records.values()
            states[who] = self._state(record, f"client {who}")
        aligned = self._alignment.brought(server_round, states)
        brought = {id(reply): _with_arrays(reply, aligned[who]) for who, reply in zip(ids, good, strict=True)}
        arrays, metrics = super().aggregate_train(server_round, [brought.get(id(r), r) for r in replies])
        if arrays is not None:
            self._alignment.end(self._state(arrays, "the mean"))
        return arrays, metrics

    def _state(self, arrays: Any, who: str) -> dict[str, torch.Tensor]:
        return self._alignment.named({name: array.numpy() for name, array in arrays.items()}, who)


def _require_an_end(outcome: str) -> None:
    """Stop where a search was stopped, which it catches to return the best so far."""
    if outcome == "interrupted":
        raise KeyboardInterrupt


def _arrays(state: State) -> list[Any]:
    return [tensor.numpy() for tensor in state.values()]


def _with_arrays(reply: Any, state: State) -> Any:
    """A copy of a reply with other weights in it; the reply is not changed."""
    from flwr.app import Array, ArrayRecord, RecordDict

    content = RecordDict(dict(reply.content.items()))
    (key,) = reply.content.array_records
    content[key] = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in state.items()})
    changed = copy.copy(reply)
    changed.content = content
    return changed


def _distinct(ids: Sequence[str]) -> Sequence[str]:
    """The clients' ids, once it is sure that no two are the same."""
    for number, who in enumerate(ids):
        if who in ids[:number]:
            raise MismatchError(f"two results of one round are of client {who!r}: give each client an id of its own")
    return ids
