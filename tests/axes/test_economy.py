"""What makes inference fast stays true: nothing is left to the garbage collector, and tables say what torch says."""

from __future__ import annotations

import contextlib
import gc
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from permgraph.algebra import Axes, Axis
from permgraph.algebra.limits import MAX_NESTING, TOO_INTRICATE
from permgraph.capture import capture
from permgraph.capture.environment import gc_paused
from permgraph.capture.schema import signature
from permgraph.errors import ConflictError
from permgraph.inference.auto_spec import solve, spec_of
from permgraph.rules.call import Call
from permgraph.rules.typed_tensor import TypedTensor, matching_dims
from permgraph.spec.json import to_json

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=5)


@given(SIZES, st.data())
def test_matching_dimensions_hold_the_same_indices(left: list[int], data: st.DataObject) -> None:
    right = list(left)
    for _ in range(data.draw(st.integers(0, 3))):  # neighbours joined: a view of the same elements
        if len(right) > 1:
            at = data.draw(st.integers(0, len(right) - 2))
            right[at : at + 2] = [right[at] * right[at + 1]]
    runs = matching_dims(tuple(left), tuple(right))
    assert [d for a, _ in runs for d in a] == list(range(len(left)))
    assert [d for _, b in runs for d in b] == list(range(len(right)))
    for a, b in runs:
        assert math.prod(left[d] for d in a) == math.prod(right[d] for d in b)


def test_runs_are_as_short_as_can_be() -> None:
    assert matching_dims((2, 12, 5), (2, 3, 4, 5)) == (((0,), (0,)), ((1,), (1, 2)), ((2,), (3,)))
    assert matching_dims((4, 6), (6, 4)) == (((0, 1), (0, 1)),)


def test_shapes_of_other_sizes_do_not_match() -> None:
    with pytest.raises(ConflictError, match=r"cannot view \(4, 3\) as \(5,\)"):
        matching_dims((4, 3), (5,))


def test_signature_says_what_is_written_and_returned() -> None:
    in_place = signature(torch.ops.aten.add_.Tensor)
    assert in_place is not None and in_place.returned == (("self",),)
    assert [(a.name, a.default, a.shares, a.writes) for a in in_place.arguments] == [
        ("self", None, True, True), ("other", None, False, False), ("alpha", 1, False, False),
    ]  # fmt: skip
    view = signature(torch.ops.aten.transpose.int)
    assert view is not None and view.returned == ((),)
    several = signature(torch.ops.aten.topk.values)
    assert several is not None and several.returned == (("values",), ("indices",))
    assert [(a.shares, a.writes) for a in view.arguments] == [(True, False), (False, False), (False, False)]
    assert signature(len) is None


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_put_off_and_comes_back(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with contextlib.suppress(KeyError), gc_paused():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() is enabled
        capture(nn.Linear(3, 2), (torch.zeros(1, 3),))
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_a_solution_goes_when_nobody_holds_it() -> None:
    """A cycle in it would leave thousands of objects to the collector, which takes longer than to infer anew."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    captured = capture(layer, (torch.zeros(2, 3, 8),))
    with gc_paused():
        before = _made()
        solution = solve(captured.graph)
        assert _made() > before + 100
        del solution
        assert _made() == before


def _made() -> int:
    return sum(type(thing) in (Axis, Axes, Call, TypedTensor) for thing in gc.get_objects())


class Nested(nn.Module):
    """Each layer's result is put behind all that was there before, so that types are as deep as there are layers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3 + i, 1) for i in range(layers))
        self.last = nn.Linear(3 + layers, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], -1)
        return self.last(x)


@pytest.mark.parametrize("layers", [40, 250])
def test_the_depth_of_the_callers_stack_does_not_matter(layers: int) -> None:
    captured = capture(nn.Sequential(nn.Linear(2, 3), Nested(layers)), (torch.zeros(1, 2),))

    def deeper(frames: int) -> str:
        return deeper(frames - 1) if frames else str(to_json(spec_of(captured)))

    here = deeper(0)
    assert deeper(500) == here
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(deeper, 0).result() == here
    assert (TOO_INTRICATE in here) == (layers > MAX_NESTING)
