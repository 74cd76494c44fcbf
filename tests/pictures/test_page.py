"""What the report holds, read as a file: nothing from outside, nothing that names could break."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import permgraph as pg
from permgraph.pictures.charts import _ticks, line_chart
from permgraph.pictures.content import content
from permgraph.pictures.lanes import lay_out
from permgraph.spec import PermutationSpec
from tests.pictures.models import ENDING, HOSTILE, attention, hostile, stack
from tests.pictures.test_lanes import check
from tests.spec.strategies import tensors


class Elements(HTMLParser):
    """Every element with its attributes, and the text of the scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._within = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._within = tag == "script"
        if self._within:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._within = False

    def handle_data(self, data: str) -> None:
        if self._within:
            self.scripts[-1] += data


def data_of(page: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(Elements(page).scripts[0])
    return data


def pair() -> tuple[nn.Module, nn.Module, PermutationSpec]:
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval() for _ in "ab")
    return a, b, pg.auto_spec(a)


def test_one_file_that_needs_no_other() -> None:
    a, b, spec = pair()
    line = pg.barrier(a, b, lambda net: float(net(torch.ones(1, 4)).sum()), points=3)
    page = pg.report(spec, alignment=pg.align(a, b, spec=spec), models=(a, b), barrier={"one": line, "two": line}).html
    elements = Elements(page)
    assert not [tag for tag, _ in elements.found if tag in ("img", "iframe", "object", "embed", "base", "form")]
    for tag, attributes in elements.found:
        if tag == "link":
            assert attributes["href"] == "data:,"
        assert not {"src", "srcset", "action"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    assert "http" not in page.replace("http-equiv", "")
    assert "@import" not in page
    assert "url(" not in page
    assert len(elements.scripts) == 2


def check_data(spec: PermutationSpec) -> None:
    data = data_of(pg.report(spec).html)
    names = [group[0] for group in data["groups"]]
    assert names == list(spec.groups)

    def text(axis: Any) -> str:
        match axis:
            case int():
                return str(axis) if axis >= 0 else names[-1 - axis]
            case ["*", *inner]:
                return f"({' '.join(map(text, inner))})"
            case ["+", *inner]:
                return f"[{' + '.join(map(text, inner))}]"
            case [":", label, inner]:
                return f"{label}:{text(inner)}"
            case ["@", label, *inner]:
                return f"{{{' | '.join(map(text, inner))}}}@{label}"
        raise AssertionError(axis)

    for (name, shape, axes, _), (known, expected) in zip(data["parameters"], spec.axes.items(), strict=True):
        assert (name, tuple(shape)) == (known, spec.shapes[known])
        assert list(map(text, axes)) == list(map(str, expected))
    for row, group in zip(data["groups"], spec.groups.values(), strict=True):
        assert row[2:5] == [group.size, [names.index(parent) for parent in group.parents], int(group.fixed)]


def test_the_data_describe_the_spec() -> None:
    check_data(attention())
    check_data(hostile())


@settings(max_examples=25)
@given(tensors())
def test_the_data_describe_any_spec(made: tuple[PermutationSpec, object]) -> None:
    spec, _ = made
    check_data(spec)
    check(lay_out(spec), spec)
    spec._repr_html_()


def test_the_constraints_are_all_there() -> None:
    _, _, spec = pair()
    assert spec.constraints is not None
    data = content(spec)
    slots = [f"{name}[{dim}]" for name, axes in spec.axes.items() for dim in range(len(axes))]
    ties = [data["ties"][at : at + 3] for at in range(0, len(data["ties"]), 3)]
    assert len(ties) == len(spec.constraints.ties)
    for (a, b, step), tie in zip(ties, spec.constraints.ties, strict=True):
        assert (a < len(slots), b < len(slots)) == (tie.a in slots, tie.b in slots)
        assert a >= len(slots) or slots[a] == tie.a
        assert b >= len(slots) or slots[b] == tie.b
        made = [data["strings"][at] if at >= 0 else None for at in data["steps"][step]]
        assert made == [tie.operator, tie.module, tie.source]


def test_neighbouring_groups_have_different_colours() -> None:
    for spec in (attention(), stack()):
        colour = {group[0]: group[6] for group in content(spec)["groups"]}
        for name in spec.axes:
            groups = {occurrence.group for occurrence in spec.occurrences(name)}
            assert len({colour[group] for group in groups}) == len(groups)


def test_groups_of_one_block_have_different_colours_though_they_share_no_row() -> None:
    lines = ["embed.weight 5x4 . stream"]
    for block in range(3):
        for inner in ("q", "v", "up"):
            lines += [
                f"{block}.{inner}.weight 6x4 {block}.{inner} stream",
                f"{block}.{inner}_out.weight 4x6 stream {block}.{inner}",
            ]
    groups = ["stream 4", *(f"{block}.{inner} 6" for block in range(3) for inner in ("q", "v", "up"))]
    spec = pg.PermutationSpec.parse("\n".join([*lines, f"groups: {' · '.join(groups)}"]))
    colour = {group[0]: group[6] for group in content(spec)["groups"]}
    for block in range(3):
        assert len({colour["stream"], *(colour[f"{block}.{inner}"] for inner in ("q", "v", "up"))}) == 4
    assert colour["0.up"] == colour["1.up"] == colour["2.up"]


def test_more_groups_than_colours_differ_in_their_borders() -> None:
    names = [f"group{letter}" for letter in "abcdefghijkl"]  # twelve, all in one place
    axes = " ".join(names)
    spec = pg.PermutationSpec.parse(f"w {'x'.join(['2'] * 12)} {axes}\ngroups: {' · '.join(f'{n} 2' for n in names)}")
    assert len({group[6] for group in content(spec)["groups"]}) == 12


def test_blocks_alike_have_colours_alike() -> None:
    colour = {group[0]: group[6] for group in content(stack(6))["groups"]}
    assert len({colour[f"layers.{layer}.up"] for layer in range(6)}) == 1
    assert colour["layers.0.up"] != colour["embed"]


def test_no_name_becomes_markup() -> None:
    spec = hostile()
    harmless = pg.report(stack()).html
    page = pg.report(
        spec,
        title=HOSTILE,
        about={ENDING: ENDING},
        barrier={ENDING: pg.Barrier((0, 1), {HOSTILE: (1, 2)}, metric=HOSTILE)},
    ).html
    assert data_of(page)["parameters"][0][0] == f"{HOSTILE}.weight"
    elements = Elements(page)
    assert len(elements.scripts) == 2
    assert elements.scripts[1] == Elements(harmless).scripts[1]
    assert {tag for tag, _ in elements.found} <= {tag for tag, _ in Elements(harmless).found} | {
        *("figure", "figcaption", "svg", "line", "text", "polyline", "circle", "title", "h2", "p", "code", "span"),
        *("table", "thead", "tbody", "tr", "th", "td"),
    }
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]


def test_it_is_written_to_a_file(tmp_path: Path) -> None:
    made = pg.report(stack(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == made.html
    assert "KiB" in repr(made)
    shown = made._repr_html_()
    assert 'sandbox="allow-scripts"' in shown
    (frame,) = [attributes for tag, attributes in Elements(shown).found if tag == "iframe"]
    assert frame["srcdoc"] == made.html


def test_repeated_layers_cost_little() -> None:
    one, many = (len(pg.report(stack(layers)).html) for layers in (10, 400))
    assert (many - one) / 390 < 400  # bytes a layer


def test_what_does_not_fit_is_refused() -> None:
    a, b, spec = pair()
    with pytest.raises(pg.errors.MismatchError, match="another spec"):
        pg.report(stack(), alignment=pg.align(a, b, spec=spec))
    with pytest.raises(pg.errors.MismatchError, match=r"A has no '0.bias', of shape \(8,\)"):
        pg.report(spec, models=({"0.weight": torch.zeros(8, 4)}, b))
    with pytest.raises(pg.errors.MismatchError, match=r"'0.weight' has shape \(1, 4\) in B"):
        pg.report(spec, models=(a, {**b.state_dict(), "0.weight": torch.zeros(1, 4)}))


def test_similarity_by_hand() -> None:
    a, b, spec = pair()
    fit = pg.align(a, b, spec=spec)
    moved = fit.state_dict
    rows = pg.layer_similarity(spec, a.state_dict(), b.state_dict(), fit.permutation)
    assert [row.layer for row in rows] == ["0", "2"]

    def whole(state: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor:
        return torch.cat([state[f"{layer}.{part}"].flatten() for part in ("weight", "bias")]).double()

    for row in rows:
        for state, value in ((b.state_dict(), row.before), (moved, row.after)):
            expected = torch.cosine_similarity(whole(a.state_dict(), row.layer), whole(state, row.layer), dim=0)
            assert value == pytest.approx(float(expected), abs=1e-12)
    scrambled = spec.random(3)
    back = pg.layer_similarity(spec, a.state_dict(), scrambled.apply(a.state_dict()), scrambled.inverse())
    assert all(row.after == pytest.approx(1) for row in back)


def test_a_layer_of_zeros_has_no_angle() -> None:
    spec = PermutationSpec.parse("fc.weight 2 .\nfc.other = fc.weight")
    (row,) = pg.layer_similarity(spec, {"fc.other": torch.zeros(2)}, {"fc.weight": torch.ones(2)})
    assert math.isnan(row.before)
    assert row.after is None
    assert "zero" in pg.report(spec, models=({"fc.other": torch.zeros(2)}, {"fc.weight": torch.ones(2)})).html


def test_nothing_that_goes_in_is_changed() -> None:
    a, b, spec = pair()
    before = {name: tensor.clone() for name, tensor in b.state_dict().items()}
    state = torch.get_rng_state()
    pg.report(spec, alignment=pg.align(a, b, spec=spec), models=(a, b))
    assert all(torch.equal(tensor, before[name]) for name, tensor in b.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.0, 0.0), (-3.2, 1e-9), (1e6, 1e6 + 1), (1e-8, 3e-8), (-5, -5), (2, 97)]
)
def test_ticks_are_few_and_round_and_cover(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 9
    hair = 1e-6 * (ticks[1] - ticks[0])
    assert ticks[0] - hair <= low
    assert high <= ticks[-1] + hair


def test_a_chart_leaves_gaps_where_nothing_is_finite() -> None:
    points = [(0.0, 1.0), (0.25, 2.0), (0.5, math.nan), (0.75, 1.0), (1.0, math.inf)]
    drawn = line_chart({"one": points}, name="loss", across="t")
    assert drawn.count("<polyline") == 2
    assert drawn.count("<circle") == 3
    assert "2 not finite" in drawn
    assert "nan" not in drawn
    assert "No value" in line_chart({"one": [(0.0, math.nan)]}, name="loss", across="t")
