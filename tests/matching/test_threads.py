"""A match takes as many threads as there are cores free, gives them back, and finds the same whatever it takes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import permgraph as pg
from permgraph.errors import PermgraphError
from permgraph.matching import WeightMatching, threads

SPEC = pg.PermutationSpec.parse("a.weight 6x5 h .\nb.weight 3x6 . h\ngroups: h 6")


@pytest.fixture(autouse=True)
def eight(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of eight cores, all of them this process's, on which torch is set to six threads."""
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(threads, "cores_allowed", lambda: 8)
    monkeypatch.delenv(threads.SWITCH, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    yield
    torch.set_num_threads(before)


def others(monkeypatch: pytest.MonkeyPatch, *counts: int) -> None:
    """Say that so many other threads want a core, at one look after the other, the last from then on."""
    said = iter([*counts[:-1], *[counts[-1]] * 100])
    monkeypatch.setattr(threads, "wanting_a_core", lambda: next(said))
    monkeypatch.setattr(threads, "INTERVAL", 0.0)
    monkeypatch.setattr(threads, "SHARE", 1e9)


@pytest.mark.parametrize(("busy", "expected"), [(0, 6), (2, 6), (3, 5), (7, 1), (8, 1), (30, 1)])
def test_as_many_as_are_free(monkeypatch: pytest.MonkeyPatch, busy: int, expected: int) -> None:
    others(monkeypatch, busy)
    with threads.free_cores():
        assert torch.get_num_threads() == expected
        with threads.free_cores():  # one inside another leaves it alone
            assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 6


def test_it_follows_the_machine_but_not_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three looks the middle one counts: 0, 0 and 8 others leave all cores, 0, 8 and 8 none."""
    others(monkeypatch, 0, 0, 8, 8, 8, 0, 0)
    seen = []
    with threads.free_cores():
        for _ in range(6):
            seen.append(torch.get_num_threads())
            threads.look_again()
    assert seen == [6, 6, 6, 1, 1, 1]


def test_no_more_than_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    others(monkeypatch, 0)
    monkeypatch.setattr(threads, "cores_allowed", lambda: 2)
    with threads.free_cores():
        assert torch.get_num_threads() == 2
    monkeypatch.setattr(threads, "wanting_a_core", lambda: None)  # nobody says what the others do
    with threads.free_cores():
        assert torch.get_num_threads() == 2


def test_it_can_be_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    others(monkeypatch, 8)
    with threads.as_set(), threads.free_cores():
        threads.look_again()
        assert torch.get_num_threads() == 6
    monkeypatch.setenv(threads.SWITCH, "0")
    with threads.free_cores():
        threads.look_again()
        assert torch.get_num_threads() == 6


def test_a_match_gives_the_threads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    others(monkeypatch, 7)
    draw = torch.Generator().manual_seed(0)
    a = {name: torch.randn(shape, generator=draw) for name, shape in SPEC.shapes.items()}
    turn = SPEC.random(1, every_group=True)
    seen = []
    found = WeightMatching().match(a, turn.apply(a), SPEC, progress=lambda _: seen.append(torch.get_num_threads()))
    assert seen and set(seen) == {1} and torch.get_num_threads() == 6
    assert (found.permutation @ turn).is_identity
    with pytest.raises(PermgraphError):  # where it fails too
        WeightMatching().match({}, {}, SPEC)
    assert torch.get_num_threads() == 6


def test_quotas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    limit, quota, period = tmp_path / "max", tmp_path / "quota", tmp_path / "period"
    monkeypatch.setattr(threads, "QUOTAS", ((str(limit),), (str(quota), str(period))))
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert threads.cores_allowed() == 16
    for content, expected in (("250000 100000\n", 3), ("max 100000\n", 16), ("1000 100000\n", 1), ("nonsense", 16)):
        limit.write_text(content)
        assert threads.cores_allowed() == expected
    quota.write_text("400000\n")
    period.write_text("100000\n")
    assert threads.cores_allowed() == 4
    quota.write_text("-1\n")  # none is set
    assert threads.cores_allowed() == 16


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="the system does not say what others want")
def test_threads_of_this_process_are_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of this process that works is its own; a process that works is another's."""
    assert threads.own_running() >= 1
    ended = threading.Event()
    thread = threading.Thread(target=lambda: [None for _ in iter(ended.is_set, True)])
    thread.start()
    try:
        assert max(threads.own_running() for _ in range(200)) >= 2
    finally:
        ended.set()
        thread.join()
    worker = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        until = time.monotonic() + 10
        while (threads.wanting_a_core() or 0) < 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert (threads.wanting_a_core() or 0) >= 1
    finally:
        worker.kill()
        worker.wait()
