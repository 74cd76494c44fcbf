"""Whoever waits at a terminal sees how far it is; nobody else sees anything."""

from __future__ import annotations

import inspect
import io
import time
from types import SimpleNamespace
from typing import Any

import pytest

import permgraph as pg
from permgraph.conventions import waiting
from permgraph.conventions.waiting import Wait, silent, waits


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error, as a terminal on which lines are shown at once."""
    screen = Terminal()
    monkeypatch.setattr(waiting, "sys", SimpleNamespace(stderr=screen, modules={}))
    monkeypatch.setattr(waiting, "DELAY", 0.01)
    monkeypatch.setattr(waiting, "INTERVAL", 0.005)
    monkeypatch.delenv("PERMGRAPH_PROGRESS", raising=False)
    return screen


@waits("counting")
def count(steps: int, progress: Any = None) -> int:
    for done in range(1, steps + 1):
        time.sleep(0.03)
        if progress is not None:
            progress(done, steps)
    return steps


def test_a_long_wait_shows_its_steps_and_leaves_nothing(terminal: Terminal) -> None:
    seen: list[tuple[int, int]] = []
    assert count(4, progress=lambda *done: seen.append(done)) == 4
    shown = terminal.getvalue()
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert "counting, 0 s" in shown and f"counting {'━' * 12}{'─' * 12} 2 of 4, 0 s" in shown
    last = shown.rstrip("\r").rpartition("\r")[2]
    assert last.strip() == "" and shown.endswith("\r") and "\n" not in shown
    assert waiting._shown is None


def test_a_wait_inside_another_shows_nothing_of_its_own(terminal: Terminal) -> None:
    with Wait("outer"):
        count(2)
    assert "outer" in terminal.getvalue() and "counting" not in terminal.getvalue()


def test_an_error_ends_the_line(terminal: Terminal) -> None:
    @waits("failing")
    def fail() -> None:
        time.sleep(0.05)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert terminal.getvalue().endswith("\r") and waiting._shown is None


def test_nothing_is_shown_where_nobody_watches(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    with silent():
        count(2)
    monkeypatch.setenv("PERMGRAPH_PROGRESS", "0")
    count(2)
    monkeypatch.delenv("PERMGRAPH_PROGRESS")
    monkeypatch.setattr(waiting, "DELAY", 60)  # a short wait
    count(2)
    assert terminal.getvalue() == ""
    monkeypatch.setattr(waiting, "DELAY", 0.01)
    pipe = io.StringIO()
    monkeypatch.setattr(waiting, "sys", SimpleNamespace(stderr=pipe, modules={}))
    count(2)
    assert pipe.getvalue() == ""


def test_what_is_decorated_keeps_its_signature() -> None:
    assert list(inspect.signature(pg.align).parameters)[:3] == ["model_a", "model_b", "matcher"]
    assert "progress" in inspect.signature(pg.barrier_along).parameters
