"""Fingerprints: equal for equal contents, different for any difference."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import permgraph as pg
from permgraph.errors import StudyError
from permgraph.studies.fingerprint import fingerprint

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=8,
)


def same(one: Any, other: Any) -> bool:
    """Equality of plain data that tells 1 from 1.0 and True, and 0.0 from -0.0, and a list like a tuple."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and repr(one) == repr(other)


@given(plain, plain)
def test_plain_data(one: Any, other: Any) -> None:
    assert (fingerprint(one) == fingerprint(other)) == same(one, other)


def closure(captured: Any) -> Callable[[], Any]:
    return lambda: captured


def loader(batch: int = 2, value: float = 0.0) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.full((4, 2), value)), batch_size=batch)


@pytest.mark.parametrize(
    ("make", "other"),
    [
        (lambda: torch.arange(4.0), lambda: torch.tensor([0.0, 1, 2, 4])),
        (lambda: torch.arange(4.0), lambda: torch.arange(4.0).reshape(2, 2)),
        (lambda: torch.arange(4), lambda: torch.arange(4, dtype=torch.int32)),
        (lambda: torch.arange(6.0).reshape(2, 3).t(), lambda: torch.arange(6.0).reshape(3, 2)),
        (lambda: torch.zeros(2, dtype=torch.bfloat16), lambda: torch.ones(2, dtype=torch.bfloat16)),
        (lambda: torch.tensor(1.0), lambda: torch.tensor(2.0)),
        (lambda: np.arange(3), lambda: np.arange(4)),
        (
            lambda: nn.Linear(1, 2, bias=False, device="cpu").requires_grad_(False).eval().apply(_fill),
            lambda: nn.Linear(1, 2),
        ),
        (lambda: pg.WeightMatching(), lambda: pg.WeightMatching(max_sweeps=3)),
        (lambda: functools.partial(max, 1), lambda: functools.partial(max, 2)),
        (lambda: closure(torch.zeros(2)), lambda: closure(torch.ones(2))),
        (lambda: {"b": 1, "a": 2}, lambda: {"b": 2, "a": 1}),
        (lambda: {1, 2}, lambda: {1, 3}),
        (lambda: loader(), lambda: loader(batch=1)),
        (lambda: loader(), lambda: loader(value=1.0)),
        (lambda: Path("a"), lambda: Path("b")),
    ],
)
def test_contents(make: Callable[[], Any], other: Callable[[], Any]) -> None:
    assert fingerprint(make()) == fingerprint(make())
    assert fingerprint(make()) != fingerprint(other())


def _fill(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.fill_(0.5)


def test_the_order_of_a_mapping_does_not_count() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_a_cycle_ends() -> None:
    one: list[Any] = [1]
    one.append(one)
    other: list[Any] = [2]
    other.append(other)
    assert fingerprint(one) != fingerprint(other)


def test_another_process_finds_the_same() -> None:
    text = (
        "import torch, permgraph as pg; from permgraph.studies.fingerprint import fingerprint;"
        "matchers = [pg.WeightMatching(), pg.ActivationMatching([torch.ones(2)])];"
        "print(fingerprint([matchers, {'x', 'y', 'z'}, torch.arange(3)]))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", text], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_what_cannot_be_read_is_refused_by_name() -> None:
    with pytest.raises(StudyError, match=r"value\['x'\]\[1\] is a builtins\.generator"):
        fingerprint({"x": [1, (i for i in "ab")]})
    with pytest.raises(StudyError, match="meta device"):
        fingerprint(torch.ones(2, device="meta"))
