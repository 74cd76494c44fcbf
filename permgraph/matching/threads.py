"""As many threads as there are cores free: two that share a core with other programs are slower than one.

torch's threads work in step. Each product is cut into one part a thread, and whoever is done waits for the others,
busily at first. Where another program has one of the cores, every product waits for the part of that core, and the
waiting takes time from what it waits for. So a match looks how many cores the others leave, and computes with no more
threads than that; it looks again between steps. It never takes more threads than torch is set to, and gives the number
back when it ends.

How many other programs want a core is read where Linux says it (``/proc/loadavg``), with no lag and in some 0.1 ms; the
threads of this process are taken off. Elsewhere nothing is known of the others: only what the process may use counts.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Result = TypeVar("Result")

SWITCH = "PERMGRAPH_FREE_CORES"
"""The environment variable that turns this off, by the value 0."""

INTERVAL = 0.02
"""Seconds between two looks, at least."""

SHARE = 0.01
"""How much of its time a match may spend on looking."""

QUOTAS = (
    ("/sys/fs/cgroup/cpu.max",),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)
"""Where a container's quota of microseconds stands, and of how many: in one file, or in two."""

KEPT = 3
"""Of how many looks the middle one counts: a program that wants a core for a moment changes nothing."""


class _Threads:
    """The number of torch's threads while a match runs.

    Attributes:
        most: what torch is set to, or the number of cores that this process may use, if that is less.
        now: what it is at present.
    """

    def __init__(self, most: int) -> None:
        self.most, self.now = min(most, cores_allowed()), most
        self._seen: deque[int] = deque(maxlen=KEPT)
        self._next = 0.0

    def look(self) -> None:
        """Bring the number up to date, unless that was done just now."""
        started = time.perf_counter()
        if started < self._next:
            return
        others = wanting_a_core()
        self._seen.append(0 if others is None else others)
        free = (os.cpu_count() or 1) - int(statistics.median_low(self._seen))
        fitting = max(1, min(self.most, free))
        if fitting != self.now:
            torch.set_num_threads(fitting)
            self.now = fitting
        ended = time.perf_counter()
        self._next = ended + max(INTERVAL, (ended - started) / SHARE)


_running: ContextVar[_Threads | None] = ContextVar("permgraph_threads", default=None)


@contextlib.contextmanager
def free_cores() -> Iterator[None]:
    """Within it, torch computes with no more threads than there are cores free.

    Inside another one, inside `as_set`, and with ``PERMGRAPH_FREE_CORES=0`` in the environment it does nothing.

    Example:
        >>> with free_cores():
        ...     product = torch.eye(3) @ torch.eye(3)
    """
    most = torch.get_num_threads()
    if _running.get() is not None or most == 1 or os.environ.get(SWITCH) == "0":
        yield
        return
    threads = _Threads(most)
    token = _running.set(threads)
    try:
        threads.look()
        yield
    finally:
        _running.reset(token)
        if threads.now != most:
            torch.set_num_threads(most)


@contextlib.contextmanager
def as_set() -> Iterator[None]:
    """Within it, the number of torch's threads stays as it is set: sums differ in their last digits between numbers."""
    token = _running.set(_Threads(1))
    try:
        yield
    finally:
        _running.reset(token)


def look_again() -> None:
    """Between two steps of a match: take as many threads as there are cores free now."""
    threads = _running.get()
    if threads is not None and threads.most > 1:
        threads.look()


def on_free_cores(method: Callable[Given, Result]) -> Callable[Given, Result]:
    """A method that runs within `free_cores`."""

    @functools.wraps(method)
    def within(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with free_cores():
            return method(*args, **kwargs)

    return within


def wanting_a_core() -> int | None:
    """How many threads of other programs run or wait for a core; None where the system does not say."""
    try:
        runnable = Path("/proc/loadavg").read_bytes().split()[3]
        return max(0, int(runnable.partition(b"/")[0]) - own_running())
    except (OSError, ValueError, IndexError):
        return None


def own_running() -> int:
    """How many threads of this process run or wait for a core."""
    count = 0
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{thread}/stat", "rb") as file:
            count += file.read().rpartition(b") ")[2][:1] == b"R"  # after the name, which may have brackets itself
    return count


def cores_allowed() -> int:
    """How many cores this process may use, by its affinity and by the quota of its container (cgroup v2 or v1)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for path in QUOTAS:
        try:
            quota, period = (int(word) for file in path for word in Path(file).read_text().split())
        except (OSError, ValueError):  # none is set, or the file is another version's
            continue
        if quota > 0:
            return max(1, min(allowed, -(-quota // period)))
    return allowed
