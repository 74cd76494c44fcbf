"""A line with a bar for whoever waits longer than two seconds at a prompt or in a notebook.

It goes to standard error, is gone when the wait is over, and is shown on a terminal or in a notebook only; setting the
environment variable ``PERMGRAPH_PROGRESS=0`` leaves it out.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

DELAY, INTERVAL, BAR = 2.0, 0.25, 24  # seconds before the first line and between two; characters of a full bar

_shown: Wait | None = None
_silent = 0


class Wait:
    """A wait with a title, for as long as the context lasts; one inside another shows nothing of its own."""

    def __init__(self, title: str) -> None:
        self.title, self.step = title, ""
        self.started = time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Wait:
        global _shown
        if _shown is None and is_watched():
            _shown = self
            self._thread = threading.Thread(target=self._show, name="permgraph-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _shown
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread, _shown = None, None

    def following(self, progress: Callable[..., object] | None) -> Callable[..., object] | None:
        """What to call after each step: it shows the step and calls what was given; that alone where nothing is shown.

        Steps are records of passes with a ``number``, or how many are done of how many.
        """
        if self._thread is None:
            return progress

        def step(*done: Any) -> object:
            self.step = _bar(*done) if len(done) == 2 else f"pass {getattr(done[0], 'number', done[0])}"
            return None if progress is None else progress(*done)

        return step

    def line(self) -> str:
        """What is shown now: the title, the step, and the seconds so far."""
        return f"{self.title}{self.step and ' '}{self.step}, {time.monotonic() - self.started:.0f} s"

    def _show(self) -> None:
        written = 0
        if not self._over.wait(DELAY):
            while not self._over.wait(INTERVAL):
                line = self.line()
                _put(f"\r{line.ljust(written)}")
                written = len(line)
        if written:
            _put(f"\r{' ' * written}\r")


def waits(title: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function that may take long: whoever waits for it sees the title, and the steps that it reports."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        reports = "progress" in inspect.signature(function).parameters

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            with Wait(title) as wait:
                if reports and wait._thread is not None:
                    bound = inspect.signature(function).bind(*args, **kwargs)
                    bound.arguments["progress"] = wait.following(bound.arguments.get("progress"))
                    return function(*bound.args, **bound.kwargs)
                return function(*args, **kwargs)

        return run

    return decorate


def is_watched() -> bool:
    """Whether somebody would see a line: at a terminal or in a notebook, in the main thread, unless turned off."""
    if _silent or os.environ.get("PERMGRAPH_PROGRESS") == "0":
        return False
    if threading.current_thread() is not threading.main_thread() or sys.stderr is None:
        return False
    return sys.stderr.isatty() or "ipykernel" in sys.modules


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Show no lines for as long as this lasts: the command line has bars of its own."""
    global _silent
    _silent += 1
    try:
        yield
    finally:
        _silent -= 1


def _bar(done: int, total: int) -> str:
    full = round(BAR * done / total) if total else 0
    return f"{'━' * full}{'─' * (BAR - full)} {done} of {total}"


def _put(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # closed meanwhile, or of another encoding: nobody watches then
        sys.stderr.write(text)
        sys.stderr.flush()
