"""What is foreseen of cuts spares a run of the rules, and changes nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.capture import capture
from permgraph.inference import fixpoint as solving
from permgraph.inference.auto_spec import spec_of
from permgraph.inference.operators import Operators
from permgraph.inference.predicted_cuts import foreseen_cuts
from permgraph.spec.json import to_json
from tests.groups.random_models import RandomNetwork
from tests.groups.test_layouts import Net, lin, par

X = torch.zeros(2, 3, 8)


def runs_and_spec(captured: pg.capture.Captured, monkeypatch: pytest.MonkeyPatch, foresee: bool) -> tuple[int, Any]:
    """How often the rules were run over the graph, and the spec that came of it."""
    count = 0

    original = solving.type_graph

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(solving, "type_graph", counted)
        if not foresee:
            patch.setattr(solving, "foreseen_cuts", lambda *given: {})
        spec = spec_of(captured)
    return count, to_json(spec)


@pytest.mark.parametrize("seed", range(16))
def test_nothing_but_the_number_of_runs_depends_on_foresight(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = RandomNetwork(seed).eval()
    captured = capture(model, (model.example(),))
    fewer, seeing = runs_and_spec(captured, monkeypatch, foresee=True)
    more, blind = runs_and_spec(captured, monkeypatch, foresee=False)
    assert seeing == blind
    assert fewer <= more


def _attend(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
    return m.o(mixed.transpose(1, 2).flatten(2))


def unbound(m: Any, x: Tensor) -> Tensor:
    return _attend(m, *m.qkv(x).view(2, 3, 3, 4, 5).permute(2, 0, 3, 1, 4).unbind(0))


def selected(m: Any, x: Tensor) -> Tensor:
    qkv = m.qkv(x).view(2, 3, 3, 4, 5).transpose(1, 3).contiguous().transpose(2, 1)
    return _attend(m, *(qkv.select(1, i) for i in range(3)))


def split_in_three(m: Any, x: Tensor) -> Tensor:
    parts = m.qkv(x).view(2, 3, 3, 20).split(1, dim=2)
    return _attend(m, *(part.squeeze(2).view(2, 3, 4, 5).transpose(1, 2) for part in parts))


@pytest.mark.parametrize("forward", [unbound, selected, split_in_three])
def test_a_fused_projection_takes_one_run(
    forward: Callable[[Any, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = capture(Net(forward, qkv=lin(8, 60), o=lin(20, 2)), (X,))
    fewer, seeing = runs_and_spec(captured, monkeypatch, foresee=True)
    more, blind = runs_and_spec(captured, monkeypatch, foresee=False)
    assert (fewer, more) == (1, 2)
    assert seeing == blind


def test_parts_of_a_parameter_are_foreseen() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return (x @ m.w[:8]).relu() @ m.w[8:].T

    captured = capture(Net(forward, w=par(14, 8)), (X,))
    (weight,) = captured.placeholders("parameter")
    number = list(captured.graph.nodes).index(weight)
    assert foreseen_cuts(list(captured.graph.nodes), Operators()) == {("placeholder", number, 0): (8,)}


def test_of_two_views_alike_none_is_named() -> None:
    """Which of two equal factors comes first depends on what is pinned by then."""

    def forward(m: Any, x: Tensor) -> Tensor:
        outer = (x[0] @ m.w).T @ (x[1] @ m.w)
        return outer.view(2, 4, 2, 4)[0, :, 1]

    captured = capture(Net(forward, w=nn.Parameter(torch.zeros(8, 8))), (X,))
    named = [key for key in foreseen_cuts(list(captured.graph.nodes), Operators()) if key[0] != "placeholder"]
    assert named == []
