"""The page that ``spec``, ``align`` and ``barrier`` write when asked."""

from __future__ import annotations

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
from tests.pictures.test_page import data_of

Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in a folder with two scrambled networks and their spec."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    spec = pg.auto_spec(net)
    spec.save("net.json")
    save_file(net.state_dict(), "a.safetensors")
    save_file(spec.random(1).apply(net.state_dict()), "b.safetensors")

    def run(*args: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
        return result

    return run


def test_spec_writes_a_page(run: Run) -> None:
    said = run("spec", "net.json", "--report", "page.html").stderr
    assert "report written to page.html" in said
    page = Path("page.html").read_text()
    assert [row[0] for row in data_of(page)["parameters"]] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert "net.json" in page


def test_align_writes_how_it_went(run: Run) -> None:
    args = ("align", "a.safetensors", "b.safetensors", "--spec", "net.json", "-o", "c.safetensors")
    result = json.loads(run(*args, "--report", "page.html", "--json").stdout)
    assert [sweep["sweep"] for sweep in result["history"]] == list(range(1, result["sweeps"] + 1))
    assert result["history"][-1]["objective"] == pytest.approx(result["objective"])
    page = Path("page.html").read_text()
    assert f"{result['objective_before']:.6g} → {result['objective']:.6g}" in page
    assert page.count("<td>1.000</td>") == 2  # both layers are A's again
    again = run(*args, "--report", "other.html", "--overwrite")
    assert Path("other.html").is_file()
    assert "report written" in again.stderr


@pytest.mark.parametrize("page", ["page.pdf", "nowhere/page.html"])
def test_a_page_that_cannot_be_written_is_refused_at_once(run: Run, page: str) -> None:
    for command in (
        ("spec", "net.json"),
        ("align", "a.safetensors", "b.safetensors", "--spec", "net.json", "-o", "c.safetensors"),
    ):
        assert f"--report {page}" in run(*command, "--report", page, code=2).stderr
    assert not Path("c.safetensors").exists()
