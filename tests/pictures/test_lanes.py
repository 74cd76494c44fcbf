"""The tree of modules, the lanes that groups make through it, and the picture."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import matplotlib
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import permgraph as pg
from permgraph.pictures.lanes import Lanes, lay_out
from permgraph.pictures.tree import Module, Repeated, module_tree, short_names, walk
from tests.pictures.models import attention, chain, hostile, stack

matplotlib.use("Agg")


def test_blocks_that_repeat_are_put_together() -> None:
    spec = stack(5)
    (layers,) = [module for _, module in walk(module_tree(spec)) if module.path == "layers"]
    first, rest = layers.children
    assert isinstance(first, Module)
    assert isinstance(rest, Repeated)
    assert (first.path, rest.like) == ("layers.0", "layers.0")
    assert [module.path for module in rest.modules] == ["layers.1", "layers.2", "layers.3", "layers.4"]
    assert module_tree(spec).all_parameters == tuple(spec.axes)


def test_two_blocks_are_no_repetition() -> None:
    (layers,) = [module for _, module in walk(module_tree(stack(2))) if module.path == "layers"]
    assert all(isinstance(child, Module) for child in layers.children)


@pytest.mark.parametrize("change", ["size", "wiring", "name"])
def test_blocks_that_differ_are_not_put_together(change: str) -> None:
    text = str(stack(4))
    if change == "size":
        text = text.replace("layers.2.up.weight    6x4 ", "layers.2.up.weight 7x4").replace(
            "layers.2.up 6", "layers.2.up 7"
        )
        text = text.replace("layers.2.down.weight  4x6 ", "layers.2.down.weight 4x7")
    elif change == "wiring":  # the third block's inner group is the second's
        text = text.replace("layers.2.up ", "layers.1.up ").replace(
            " · layers.1.up 6 · layers.1.up 6", " · layers.1.up 6"
        )
        text = text.replace("embed layers.2.up", "embed layers.1.up")
    else:
        text = text.replace("layers.2.up.weight", "layers.2.rise.weight")
    spec = pg.PermutationSpec.parse(text)
    (layers,) = [module for _, module in walk(module_tree(spec)) if module.path == "layers"]
    assert all(isinstance(child, Module) for child in layers.children)
    assert len(layers.children) == 4


def test_the_tree_holds_every_parameter_once() -> None:
    for spec in (stack(), attention(), hostile()):
        assert sorted(module_tree(spec).all_parameters) == sorted(spec.axes)
        listed = [name for _, module in walk(module_tree(spec)) for name in module.parameters]
        assert sorted(listed) == sorted(spec.axes)


@given(st.lists(st.text("ab.", min_size=1, max_size=6), min_size=1, max_size=8, unique=True))
def test_short_names_are_ends_of_one_name_only(names: list[str]) -> None:
    short = short_names(dict.fromkeys(names))
    for name, end in short.items():
        assert name == end or name.endswith(f".{end}")
        assert end == name or not any(other.endswith(f".{end}") or other == end for other in names if other != name)


def check(picture: Lanes, spec: pg.PermutationSpec) -> None:
    """What must hold of every layout."""
    for one in picture.lanes:
        assert 0 <= one.start < one.stop < len(picture.rows)
        marks = [at for at, row in enumerate(picture.rows) if one.group in row.first | row.later]
        assert (marks[0], marks[-1]) == (one.start, one.stop)
        for other in picture.lanes:
            assert one is other or one.column != other.column or one.stop < other.start or other.stop < one.start
    drawn = {lane.group for lane in picture.lanes}
    inside = {group for row in picture.rows for group in row.inner}
    assert not drawn & inside
    assert drawn | inside <= set(spec.moving)
    if not any(row.modules for row in picture.rows):
        assert drawn | inside == set(spec.moving)


@given(st.sampled_from([stack, chain]), st.integers(1, 6), st.integers(1, 30), st.booleans())
def test_lanes_do_not_collide(
    make: Callable[[int], pg.PermutationSpec], layers: int, rows: int, collapse: bool
) -> None:
    spec = make(layers)
    check(lay_out(spec, rows=rows, collapse=collapse), spec)


def test_a_layout_exactly() -> None:
    picture = lay_out(stack(4))
    assert [row.label for row in picture.rows] == [
        "embed",
        "layers.0.up",
        "layers.0.down",
        "layers.1 … 3",
        "head",
    ]
    assert [(lane.group, lane.column, lane.start, lane.stop) for lane in picture.lanes] == [
        ("embed", 0, 0, 4),
        ("layers.0.up", 1, 1, 2),
    ]
    assert picture.rows[3].modules == 3
    assert picture.rows[3].inner == ("layers.1.up",)
    assert [row.first for row in picture.rows[:3]] == [frozenset(), {"layers.0.up"}, {"embed"}]
    assert [row.later for row in picture.rows[:3]] == [{"embed"}, {"embed"}, {"layers.0.up"}]


def test_modules_are_folded_until_there_is_room() -> None:
    spec = stack(30)
    assert len(lay_out(spec, collapse=False).rows) == 62
    folded = lay_out(spec, rows=40, collapse=False)
    assert [row.label for row in folded.rows[:3]] == ["embed", "layers.0", "layers.1"]
    assert folded.rows[1].inner == ("layers.0.up",)
    check(folded, spec)


def test_one_module_can_be_drawn_alone() -> None:
    picture = lay_out(stack(4), within="layers.0")
    assert [row.label for row in picture.rows] == ["up", "down"]
    assert {lane.group for lane in picture.lanes} == {"embed", "layers.0.up"}
    with pytest.raises(pg.errors.SpecError, match="no module 'layer'"):
        lay_out(stack(4), within="layer")


def test_the_picture_has_a_line_for_each_lane() -> None:
    spec = attention()
    ax = spec.plot()
    lines = [line for line in ax.lines if line.get_gid() == "permgraph-lane"]
    assert len(lines) == len(lay_out(spec).lanes) == 3  # the query-key channels stand in one module only
    assert [text.get_text() for text in ax.texts if text.get_gid() == "permgraph-row"] == ["qkv", "out", "norm"]
    said = " ".join(text.get_text() for text in ax.texts)
    assert "v 4 per h" in said
    assert "inside only: 4" in said
    ax.figure.canvas.draw()


def test_nothing_is_written_over_anything_else() -> None:
    ax = pg.auto_spec(nn.Sequential(*(nn.Linear(7, 7) for _ in range(9)))).plot()
    figure = ax.figure
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts if text.get_text().strip()]
    page = figure.bbox
    for at, box in enumerate(boxes):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        # Pieces of one line stand next to each other, so that only the insides count.
        assert not any(box.shrunk(0.9, 0.7).overlaps(other.shrunk(0.9, 0.7)) for other in boxes[at + 1 :])


def test_it_draws_names_as_they_are() -> None:
    names = ["$x_{$.weight", "a\nb.weight", "\\frac.weight"]
    spec = pg.PermutationSpec(groups={}, axes={name: (pg.spec.Fixed(2),) for name in names})
    spec.plot().figure.canvas.draw()
    hostile().plot().figure.canvas.draw()


def test_it_draws_into_axes_that_are_given() -> None:
    import matplotlib.pyplot as plt

    _, ax = plt.subplots()
    assert stack().plot(ax=ax) is ax


def test_an_empty_spec_draws_too() -> None:
    pg.PermutationSpec(groups={}, axes={}).plot().figure.canvas.draw()


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(pg.errors.MissingExtraError, match=r"permgraph\[plots\]"):
        stack().plot()


def test_drawing_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    stack().plot()
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture(autouse=True)
def _close_figures() -> Any:
    yield
    import matplotlib.pyplot as plt

    plt.close("all")
