"""What notebooks show."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import nn

import permgraph as pg
from tests.pictures.models import attention, hostile, stack


def parsed(markup: str) -> ElementTree.Element:
    """The elements of a fragment that is also XML: every tag closed, everything escaped."""
    return ElementTree.fromstring(markup.replace("&#9632;", "■"))


def rows(markup: str) -> list[list[str]]:
    return [["".join(cell.itertext()) for cell in row] for row in parsed(markup).iter("tr")]


def test_a_spec() -> None:
    markup = attention()._repr_html_()
    assert rows(markup) == [
        ["group", "size", "one at each index of", "stands in"],
        ["■ stream", "8", "—", "qkv.weight[1], out.weight[0] and 1 more"],
        ["■ h", "2", "—", "qkv.weight[0], out.weight[1]"],
        ["■ qk", "4", "h", "qkv.weight[0]"],
        ["■ v", "4", "h", "qkv.weight[0], out.weight[1]"],
    ]
    assert f"{attention().log_order():.6g}" in markup


def test_a_large_spec_stays_small() -> None:
    markup = stack(200)._repr_html_()
    assert len(rows(markup)) == 25
    assert "and 177 more groups" in markup
    assert len(markup) < 20_000


def test_names_are_escaped() -> None:
    markup = hostile()._repr_html_()
    tags = {element.tag for element in parsed(markup).iter()}
    assert tags <= {"div", "p", "strong", "table", "thead", "tbody", "tr", "th", "td", "span"}


def test_an_alignment_and_its_result() -> None:
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in "ab")
    fit = pg.align(a, b)
    for shown in (fit, fit.result):
        found = rows(shown._repr_html_())
        assert len(found) == 1 + fit.sweeps
        assert [row[1] for row in found[1:]] == [f"{sweep.objective:.6g}" for sweep in fit.history]


@pytest.mark.parametrize("top", [3.0, float("nan")])
def test_a_barrier(top: float) -> None:
    line = pg.Barrier((0.0, 0.5, 1.0), {"loss": (1.0, top, 2.0), "<b>": (1.0, 1.0, 1.0)})
    found = rows(line._repr_html_())
    assert found[0] == ["metric", "at a", "at b", "barrier", "highest at"]
    assert found[1] == ["loss", "1", "2", f"{line.height():.6g}", "0.5"]
    assert found[2][0] == "<b>"
    assert ("1 values are not finite" in line._repr_html_()) == (top != top)
