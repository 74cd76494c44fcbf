"""Every block of Python in the README and the documentation runs, and prints what the block after it says."""

from __future__ import annotations

import contextlib
import io
import pkgutil
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import permgraph as pg
from permgraph.cli.app import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(?P<language>\S*)[ ]*(?P<title>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(page: Path) -> list[tuple[str, str | None, int]]:
    """Return a page's Python blocks: the code, what it must print (None: anything), and its line in the page."""
    text = page.read_text(encoding="utf-8")
    fences = list(FENCE.finditer(text))
    found = []
    for number, fence in enumerate(fences):
        if fence["language"] == "python":
            following = fences[number + 1] if number + 1 < len(fences) else None
            output = following["text"] if following is not None and "output" in following["title"] else None
            found.append((fence["text"], output, text.count("\n", 0, fence.start()) + 2))
    return found


def test_the_reference_names_everything_public() -> None:
    """By the name that users type, or by the module that defines it."""
    named = re.findall(r"^::: permgraph\.(\S+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    ends = {name.rpartition(".")[2] for name in named}
    assert not sorted(name for name in pg.__all__ if not name.startswith("__") and name not in ends)
    for name in named:
        assert pkgutil.resolve_name(f"permgraph.{name}"), name


def test_the_figures_can_be_drawn_and_are_there(tmp_path: Path) -> None:
    figures = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    figures["main"](tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {f"{name}.svg" for name in figures["FIGURES"]}
    assert drawn <= {path.name for path in (ROOT / "docs" / "images").iterdir()}
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not sorted(name for name in drawn if f"images/{name}" not in pages)


def _command_lines() -> list[tuple[str, str]]:
    """Each command of ours that a page shows, or the help of a command does, with where."""
    found = [
        (page.name, line)
        for page in PAGES
        for line in re.findall(r"^    (permgraph [a-z].*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    for name, command in _commands().items():
        found += [
            (f"{name} --help", line) for line in re.findall(r"^\s*(permgraph .*)$", command.help or "", re.MULTILINE)
        ]
    return found


def _commands() -> dict[str, Any]:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return commands


def test_commands_have_the_options_that_are_shown() -> None:
    """They are parsed, and not run."""
    lines = _command_lines()
    assert len(lines) > 15
    for where, line in lines:
        _, name, *words = shlex.split(line, comments=True)
        try:
            _commands()[name].make_context(name, words)
        except Exception as error:
            raise AssertionError(f"{where}: {line}: {error}") from error


def test_every_page_is_in_the_navigation() -> None:
    listed = (ROOT / "mkdocs.yml").read_text()
    assert not [page.name for page in PAGES[1:] if f" {page.name}" not in listed]


def test_blocks_are_found() -> None:
    assert sum(len(_blocks(page)) for page in PAGES) > 10
    assert sum(output is not None for page in PAGES for _, output, _ in _blocks(page)) > 3


@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page)], ids=lambda page: page.stem)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for code, expected, line in _blocks(page):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                # Blank lines in front give the block's own line numbers to a traceback.
                exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
            if expected is not None:
                assert printed.getvalue().strip() == expected.strip(), f"{page.name}:{line} prints something else"
