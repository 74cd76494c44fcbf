"""Studies and plans from the command line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import permgraph as pg
from permgraph.cli.app import app
from permgraph.cli.options import Shown
from permgraph.cli.planfile import read_plan
from permgraph.cli.screen import Screen
from tests.cli.networks import Net, Waves, loader

NETWORKS = Path(__file__).with_name("networks.py")
Run = Callable[..., Any]

PLAN = f"""
model: {NETWORKS}:Net
networks: runs/*.safetensors
matchers:
  weights: {{matcher: weight, order: random}}
  activations: {{matcher: activation, data: data.safetensors, batch-size: 8}}
data: {{data: data.safetensors}}
pairs: first
points: 3
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a command; the working folder is not that of the plan."""

    def run(*args: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
        return result

    return run


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan over three networks and a small data set."""
    (tmp_path / "runs").mkdir()
    for seed in range(3):
        torch.manual_seed(seed)
        save_file(Net().state_dict(), tmp_path / "runs" / f"n{seed}.safetensors")
    inputs, targets = loader()[0]
    save_file({"inputs": inputs, "targets": targets}, tmp_path / "data.safetensors")
    (tmp_path / "plan.yaml").write_text(PLAN)
    return tmp_path / "plan.yaml"


def test_a_plan_runs_and_runs_only_once(run: Run, plan: Path, tmp_path: Path) -> None:
    args = ("study", plan, "--store", tmp_path / "store", "--backend", "sequential")
    waiting = json.loads(run(*args, "--dry-run", "--json").stdout)
    assert (waiting["cells"], len(waiting["missing"])) == (6, 6)
    table, figure = tmp_path / "table.csv", tmp_path / "barriers.png"
    found = json.loads(run(*args, "-o", table, "--figure", figure, "--json").stdout)
    assert found["summary"] == "6 cells: 6 done"
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["a"], row["b"], row["matcher"]) for row in rows] == [
        ("n0", b, matcher) for b in ("n1", "n2") for matcher in ("none", "weights", "activations")
    ]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "nothing is missing" in run(*args, "--dry-run").stdout
    before = table.read_bytes()
    assert "weights" in run(*args, "-o", table).stdout
    assert table.read_bytes() == before


def test_data_of_the_same_name_and_other_content_is_other_data(run: Run, plan: Path, tmp_path: Path) -> None:
    args = ("study", plan, "--store", tmp_path / "store", "--backend", "sequential", "--json")
    run(*args)
    inputs, targets = loader()[0]
    save_file({"inputs": inputs + 1, "targets": targets}, tmp_path / "data.safetensors")
    assert len(json.loads(run(*args, "--dry-run").stdout)["missing"]) == 6


def test_workers_refuse_data_that_have_changed(plan: Path, tmp_path: Path) -> None:
    grid = read_plan(plan, Screen(Shown(quiet=True)))
    other = {"inputs": torch.zeros(2, 5), "targets": torch.zeros(2, dtype=torch.int64)}
    save_file(other, tmp_path / "data.safetensors")
    result = pg.study(grid, tmp_path / "store", jobs=1)
    assert len(result.failed) == 6
    assert all("other content here" in error for error in result.failed.values())


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("points: 3", "points: many", "points: 'many' is not a number"),
        ("points: 3", "speed: 3", "unknown key 'speed'"),
        ("points: 3", "points: 3\npoints: 4", "line 10: 'points' stands twice"),
        ("model:", "nodel:", "unknown key 'nodel'"),
        ("runs/*.safetensors", "{1: runs/n0.safetensors, '1': runs/n1.safetensors}", "such as 1 and '1'"),
        ("runs/*", "walks/*", "'walks/*.safetensors' matches no file"),
        ("pairs: first", "pairs: [[n0, n9]]", "a pair names the network 'n9'"),
        ("pairs: first", "pairs: [n0]", "give all, ordered, first, or a list"),
        ("matcher: weight,", "matcher: telepathy,", "matchers: weights: 'telepathy' is not"),
        ("order: random", "odor: random", "no setting 'odor'"),
        ("data: {data: data.safetensors}", "data: {dada: x}", "unknown option 'dada'"),
        ("data: {data: data.safetensors}", "data: {data: gone.safetensors}", "no such file"),
        ("points: 3", "points: [", "not YAML"),
        (PLAN, "just a text", "a plan is a mapping"),
    ],
)
def test_plans_with_mistakes(run: Run, plan: Path, tmp_path: Path, old: str, new: str, said: str) -> None:
    plan.write_text(plan.read_text().replace(old, new))
    result = run("study", plan, "--store", tmp_path / "store", "--backend", "sequential", code=2)
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "store" / "cells").exists()


def test_a_failed_cell_is_said(run: Run, plan: Path, tmp_path: Path) -> None:
    plan.write_text(plan.read_text().replace("{data: data.safetensors}", "{data: data.safetensors, class-dim: 0}"))
    result = run("study", plan, "--store", tmp_path / "store", "--backend", "sequential", code=1)
    assert "failed: n0 <- n1, none, seed 0: EvaluationError" in result.stderr


def test_what_a_match_will_cost(run: Run) -> None:
    model = f"{NETWORKS}:Net(width=64)"
    found = json.loads(run("plan", model, "--calibration", "0.1", "--workers", "1", "--workers", "4", "--json").stdout)
    assert found["assignments_per_pass"] == {"64": 3}
    assert found["memory"]["in memory"] > 3 * 4 * found["elements"]
    assert set(found["seconds"]["streamed"]) == {"1", "4"}
    text = run("plan", model, "--calibration", "0.1").stdout
    assert "3 of 64" in text and "workers" in text


def test_a_plan_gives_the_shapes_of_inputs_that_are_not_found(run: Run, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for seed in range(2):
        torch.manual_seed(seed)
        save_file(Waves().state_dict(), tmp_path / "runs" / f"n{seed}.safetensors")
    text = f"model: {NETWORKS}:Waves\nnetworks: runs/*.safetensors\nmatchers: {{weights: {{}}}}\n"
    plan = tmp_path / "plan.yaml"
    for given, code in (
        ("", 2),
        ("input: 3\n", 2),
        ("input: [2]\n", 2),
        ("input: 2,3700\n", 0),
        ("input: ['2,3700']\n", 0),
    ):
        plan.write_text(text + given)
        said = run("study", plan, "--store", tmp_path / "store", "--dry-run", code=code)
        assert code == 0 or "shape" in said.stderr or "input: give a text" in said.stderr
