"""What commands show: help, completion, bars on a terminal, and nothing where nothing was asked for."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from permgraph.cli.app import app
from permgraph.cli.models import spec_of
from permgraph.cli.options import Shown, complete_model
from permgraph.cli.screen import Screen
from permgraph.errors import CheckpointError

NET = f"{Path(__file__).with_name('networks.py')}:Net(6, depth=2)"
COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback is not None]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_options_and_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for option in ("--json", "--quiet", "--debug"):
        assert option in result.stdout
    assert re.search(rf"Examples?\s+permgraph {command} ", result.stdout), result.stdout


def complete(words: str) -> list[str]:
    result = CliRunner().invoke(
        app,
        [],
        prog_name="permgraph",
        env={
            "_PERMGRAPH_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        },
    )
    return [line.split(",")[-1] for line in result.stdout.split()]


def test_a_shell_completes_commands_options_and_values() -> None:
    assert set(complete("permgraph ")) == {*COMMANDS, *(group.name for group in app.registered_groups)}
    assert set(complete("permgraph rules ")) == {"list", "check"}
    assert "--matcher" in complete("permgraph align --ma")
    assert "frank-wolfe" in complete("permgraph align --matcher ")
    assert {"timm:", "torchvision:", "hf:"} <= set(complete("permgraph spec "))


def test_a_shell_completes_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "net.py").write_text("")
    (tmp_path / "net.json").write_text("{}")
    assert complete_model("n") == ["net.py:", "net.json"]
    assert complete_model("hf:f") == ["hf:folder"]
    assert complete_model("hf:absent/x") == []
    assert complete_model("what:ever") == []
    pytest.importorskip("timm")
    assert "timm:resnet18" in complete_model("timm:resnet1")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make standard error a terminal, from here to the end of the test."""
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    return made


def test_a_stage_has_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with Screen(Shown()) as screen, screen.stage("writing", 100) as stage:
        stage(50)
        stage(100)
    assert "writing" in terminal.getvalue()
    assert re.search(r"\d:\d\d:\d\d", terminal.getvalue())


def test_a_stage_names_its_pass_and_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with Screen(Shown()) as screen, screen.stage("matching b") as stage:
        stage.step(0, 3, "Gram matrices, layers.0")
        stage.step(0, 3, "assignment, layers.0")
        stage.step(2, 3, "Gram matrices, layers.1")
        stage(1)
        stage.step(0, 3, "Gram matrices, layers.2")
    assert "matching b, pass 2: Gram matrices, layers.2" in re.sub(r"\x1b\[[\d;?]*\w", "", terminal.getvalue())


@pytest.mark.parametrize("shown", [Shown(quiet=True), Shown(as_json=True), Shown(debug=True)])
def test_no_bar_where_none_was_asked_for(monkeypatch: pytest.MonkeyPatch, shown: Shown) -> None:
    terminal = on_terminal(monkeypatch)
    with Screen(shown) as screen, screen.stage("writing", 100) as stage:
        stage(50)
        stage.step(0, 3, "Gram matrices")
    assert "writing" not in terminal.getvalue()


def test_align_shows_every_stage_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    terminal = on_terminal(monkeypatch)
    stages: list[str] = []
    real = Screen.stage

    def noted(self: Screen, title: str, total: float | None = None) -> Any:
        stages.append(title)
        return real(self, title, total)

    monkeypatch.setattr(Screen, "stage", noted)
    spec = spec_of(NET)
    state = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in spec.shapes.items()
    }
    for name in "ab":
        save_file(state, f"{name}.safetensors")
    app(
        ["align", "a.safetensors", "b.safetensors", "-m", NET, "-o", "c.safetensors", "--stream"], standalone_mode=False
    )
    assert stages == ["finding symmetries", "comparing structures", "matching b.safetensors", "writing"]
    assert "matching b.safetensors" in terminal.getvalue()


def test_errors_are_json_where_that_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="2"), Screen(Shown(as_json=True)):
        raise CheckpointError("a\n  b")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": {"type": "CheckpointError", "message": "a b"}, "exit_code": 2}
    assert err == "error: a b\n"


def test_a_bug_is_called_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="70"), Screen(Shown()):
        raise ZeroDivisionError("x")
    assert "this is a bug in permgraph" in capsys.readouterr().err


@pytest.mark.parametrize("resumes", [False, True])
def test_only_what_goes_on_says_so_when_it_is_interrupted(resumes: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, Screen(Shown(), resumes=resumes):
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130
    assert capsys.readouterr().err.startswith(
        "error: interrupted; the same command goes on" if resumes else "error: interrupted\n"
    )
