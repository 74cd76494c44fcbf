"""Pictures, tables and pages of specs whose modules change places."""

from __future__ import annotations

import functools

import torch

import permgraph as pg
from permgraph.pictures.content import content
from permgraph.pictures.similarity import layer_similarity
from permgraph.pictures.tree import short_names
from tests.cli.networks import Mixture


@functools.cache
def spec() -> pg.PermutationSpec:
    return pg.auto_spec(Mixture(), (torch.zeros(2, 5),), modules=True)


def test_tables_count_tensors_and_stacks() -> None:
    assert "14 parameters and buffers in 7 modules · 12 of them in 4 stacks, of modules" in spec()._repr_html_()
    assert "14 parameters" in repr(spec())


def test_groups_of_modules_have_names_with_words() -> None:
    assert short_names({"a.*": 0, "a.0.0": 0})["a.*"] == "a.*"
    assert short_names({"a.*.*": 0, "b": 0})["a.*.*"] == "a.*.*"
    axes = spec().plot()
    assert any(text.get_text().startswith("experts.* 3") for text in axes.texts)


def test_the_page_finds_paths_between_stacks() -> None:
    data = content(spec())
    names = [row[0] for row in data["parameters"]]
    rows = {row[0]: row for row in data["parameters"]}
    assert rows["experts.*.0.weight"][3] == [f"experts.{i}.0.weight" for i in range(3)]
    assert {names[at] for at in data["stacks"]} == set(spec().stacks)
    assert [data["groups"][at][0] for at in data["modules"]] == ["experts.*"]
    slots = [(name, dim) for name in names for dim in range(len(rows[name][1]))]
    held = set(data["ties"][0::3]) | set(data["ties"][1::3])
    assert {slots.index(("experts.*.0.weight", 1)), slots.index(("experts.*.2.weight", 2))} <= held


def test_layers_are_compared_module_by_module() -> None:
    net = Mixture()
    turn = spec().random(1, every_group=True)
    a, b = net.state_dict(), turn.apply(net.state_dict())
    found = layer_similarity(spec(), a, b, turn.inverse())
    assert {one.layer for one in found} == {"router", *(f"experts.{i}.{j}" for i in range(3) for j in (0, 2))}
    assert all(abs(one.after - 1) < 1e-6 and one.before < 0.99 for one in found if one.after is not None)


def test_a_report_of_an_alignment() -> None:
    a, b = Mixture().eval(), Mixture().eval()
    fit = pg.align(a, b, spec=spec())
    page = pg.report(spec(), alignment=fit, models=(a.state_dict(), b.state_dict()))
    assert "experts.2.0" in page.html and "stacks of modules that change places" in page.html
