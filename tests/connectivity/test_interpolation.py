"""The straight line between two state dicts."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from permgraph.connectivity import interpolate
from permgraph.errors import EvaluationError, MismatchError


def _state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(5, 3, generator=g).to(dtype),
        "bias": torch.randn(5, generator=g).to(dtype),
        "steps": torch.tensor(seed),
    }


@given(t=st.floats(-1, 2), seed=st.integers(0, 99))
@settings(deadline=None)
def test_it_is_the_line(t: float, seed: int) -> None:
    a, b = _state(seed, torch.float64), _state(seed + 1, torch.float64)
    middle = interpolate(a, b, t)
    for name in ("weight", "bias"):
        torch.testing.assert_close(middle[name], (1 - t) * a[name] + t * b[name], rtol=1e-12, atol=1e-12)
    assert middle["steps"] == seed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_ends_are_exact_and_the_dtype_is_kept(dtype: torch.dtype) -> None:
    a, b = _state(0, dtype), _state(1, dtype)
    for t, end in ((0.0, a), (1.0, b)):
        for name in ("weight", "bias"):
            result = interpolate(a, b, t)[name]
            assert result.dtype == dtype
            assert torch.equal(result, end[name])


def test_a_network_and_itself_give_itself() -> None:
    a = _state(3, torch.bfloat16)
    assert all(torch.equal(x, a[name]) for name, x in interpolate(a, copy.deepcopy(a), 0.3).items())


def test_half_precision_is_computed_in_float32() -> None:
    # In float16 the difference of the ends, 120000, overflows.
    a, b = {"x": torch.tensor([60000.0]).half()}, {"x": torch.tensor([-60000.0]).half()}
    assert interpolate(a, b, 0.5)["x"].item() == 0
    # A finer b is not rounded, or overflowed, before it is averaged.
    assert interpolate(a, {"x": torch.tensor([-180000.0])}, 0.25)["x"].item() == 0


def test_tied_names_stay_tied() -> None:
    def tied(value: float) -> dict[str, torch.Tensor]:
        x = torch.full((3,), value)
        return {"embedding": x, "head": x, "other": torch.full((3,), value)}

    result = interpolate(tied(0.0), tied(1.0), 0.5)
    assert result["embedding"].data_ptr() == result["head"].data_ptr() != result["other"].data_ptr()

    untied = {name: x.clone() for name, x in tied(1.0).items()}
    assert interpolate(tied(0.0), untied, 0.5)["head"].tolist() == [0.5] * 3  # equal values are as good as tied
    untied["head"] += 1
    with pytest.raises(MismatchError, match="'embedding' and 'head' are one tied tensor in a"):
        interpolate(tied(0.0), untied, 0.5)


def test_views_of_one_storage_are_not_tied() -> None:
    both = torch.arange(6.0)
    a = {"low": both[:3], "high": both[3:]}
    b = {"low": torch.zeros(3), "high": torch.ones(3)}
    result = interpolate(a, b, 0.5)
    assert result["low"].tolist() == [0.0, 0.5, 1.0]
    assert result["high"].tolist() == [2.0, 2.5, 3.0]


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_inputs_are_never_changed_or_shared(t: float) -> None:
    a, b = nn.Linear(3, 4), nn.Linear(3, 4)
    before = [copy.deepcopy(m.state_dict()) for m in (a, b)]
    for x in interpolate(a, b, t).values():
        assert not x.requires_grad
        x.fill_(99.0)
    for m, old in zip((a, b), before, strict=True):
        assert all(torch.equal(x, old[name]) for name, x in m.state_dict().items())


def test_what_does_not_fit_is_named() -> None:
    a = _state(0)
    with pytest.raises(MismatchError, match=r"'bias' has shape \(5,\) in a but \(6,\) in b"):
        interpolate(a, {**a, "bias": torch.zeros(6)}, 0.5)
    with pytest.raises(MismatchError, match="'extra' is in b but not in a"):
        interpolate(a, {**a, "extra": torch.zeros(1)}, 0.5)
    with pytest.raises(MismatchError, match=r"not in b, which has 'module.weight': strip the prefix 'module.'"):
        interpolate(a, {f"module.{name}": x for name, x in a.items()}, 0.5)
    with pytest.raises(MismatchError, match="'weight' is torch.float32 in a but torch.int64 in b"):
        interpolate(a, {**a, "weight": torch.zeros(5, 3, dtype=torch.int64)}, 0.5)
    with pytest.raises(MismatchError, match="'weight' in b is on the meta device"):
        interpolate(a, {**a, "weight": torch.zeros(5, 3, device="meta")}, 0.5)
    with pytest.raises(EvaluationError, match="t must be finite"):
        interpolate(a, a, float("nan"))


def test_ratios_by_layer() -> None:
    names = ["embed.weight", "layer1.0.w", "layer1.1.w", "layer1.1.b", "layer2.0.w", "fc.weight"]
    a, b = ({name: torch.full((2,), value) for name in names} for value in (0.0, 8.0))

    def mixed(t: Any) -> list[float]:
        return [float(tensor[0]) for tensor in interpolate(a, b, t).values()]

    assert mixed((0.0, 1.0)) == [0, 0, 4, 4, 8, 8]  # three layers; what is outside goes with its neighbour
    assert mixed((0.5, 0.25, 1.0)) == [4, 4, 2, 2, 8, 8]
    assert mixed([0.25]) == [2] * 6
    shuffled = {f"layers.{n}.w": torch.ones(1) for n in sorted(range(11), key=str)}  # 0, 1, 10, 2, ...
    line = interpolate({name: torch.zeros(1) for name in shuffled}, shuffled, (0.0, 1.0))
    assert [float(line[f"layers.{n}.w"]) for n in range(11)] == pytest.approx([n / 10 for n in range(11)])
    assert mixed({"layer1.1.*": 1, "layer*": 0.5, "*": 0}) == [0, 4, 8, 8, 4, 0]
    with pytest.raises(MismatchError, match=r"no parameter fits the pattern 'layer3\.\*'"):
        mixed({"layer3.*": 1, "*": 0})
    with pytest.raises(MismatchError, match="no pattern of the ratios fits 'embed.weight': end them with"):
        mixed({"layer*": 1, "fc.*": 0})
    for wrong in (math.nan, (0.0, math.inf), "much"):
        with pytest.raises(EvaluationError, match="must be finite"):
            mixed(wrong)
