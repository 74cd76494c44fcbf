"""What a command shows: its result on stdout, notes and progress on stderr, errors in one line."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

from permgraph.cli.options import Shown
from permgraph.conventions.waiting import silent
from permgraph.errors import PermgraphError, in_one_line

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SAYS_NO = 1
BAD_INPUT = 2
OUR_BUG = 70  # EX_SOFTWARE
INTERRUPTED = 130


class Stage:
    """A stage of the work: called with how much of it is done. This one shows nothing."""

    def __call__(self, done: float) -> None:
        """Say how much is done."""

    def step(self, done: int, total: int, what: str) -> None:
        """Say how many steps of the present pass are done, of how many, and what comes next."""


class Screen:
    """The channel of one command to whoever runs it.

    A context: an error that is the user's to mend leaves it as one line on stderr and exit code 2; any other as a line
    that says that it is a bug, and exit code 70. Tracebacks are shown only for `debug`.

    Args:
        shown: the options about what to show.
        resumes: whether the command keeps what it has done, and goes on there when it is given again.
    """

    def __init__(self, shown: Shown, *, resumes: bool = False) -> None:
        self.resumes = resumes
        self.as_json, self.quiet, self.debug = shown.as_json, shown.quiet, shown.debug
        self.notes: list[str] = []
        self._bars = ExitStack()

    def __enter__(self) -> Screen:
        if self.debug:
            logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(name)s: %(message)s")
        else:
            warnings.simplefilter("ignore")  # those of other libraries about models that we did not write
        self._bars.enter_context(silent())  # those of the library, beside which stages have their own
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.close()
        if error is None or isinstance(error, typer.Exit):
            return
        if isinstance(error, BrokenPipeError):  # stdout was closed, as by head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(SAYS_NO) from None
        code, said = _verdict(error)
        if code == INTERRUPTED and self.resumes:
            said += "; the same command goes on where this one stopped"
        if self.debug:
            traceback.print_exception(kind, error, trace, file=sys.stderr)
        if self.as_json:
            print(json.dumps({"error": {"type": type(error).__name__, "message": said}, "exit_code": code}))
        print(f"error: {said}", file=sys.stderr)
        raise typer.Exit(code) from None

    def note(self, text: str) -> None:
        """Say something in passing."""
        if not text:
            return
        self.notes.append(text)
        if not self.quiet and not self.as_json:
            print(text, file=sys.stderr)

    def result(self, data: Mapping[str, Any], text: str) -> None:
        """Print what the command found: as JSON if asked for, else as text."""
        if self.as_json:
            print(json.dumps(_plain({**data, "notes": self.notes}), indent=2, allow_nan=False))
        else:
            print(text, flush=True)

    @contextmanager
    def stage(self, title: str, total: float | None = None) -> Iterator[Stage]:
        """A stage of the work, with a live bar and the time left on a terminal."""
        if self.quiet or self.as_json or self.debug or not sys.stderr.isatty():
            yield Stage()
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            yield _Bar(progress, progress.add_task(title, total=total), title, total)


class _Bar(Stage):
    """A stage with a bar."""

    def __init__(self, progress: Progress, task: TaskID, title: str, total: float | None) -> None:
        self.progress, self.task, self.title = progress, task, title
        self.counts_passes = total is None
        self.described = title
        self.at = 0

    def __call__(self, done: float) -> None:
        """Show how much is done; where nobody knows of how much, as the number of the pass that begins."""
        if self.counts_passes:
            self.described = f"{self.title}, pass {done + 1:g}"
            self.progress.update(self.task, description=self.described)
        else:
            self.progress.update(self.task, completed=done)

    def step(self, done: int, total: int, what: str) -> None:
        """Show the steps of the present pass, and what comes next."""
        if done < self.at:  # a new pass: the time left is of that
            self.progress.reset(self.task)
        self.at = done
        self.progress.update(self.task, completed=done, total=total, description=f"{self.described}: {what}")


def table(rows: Sequence[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    """Rows in aligned columns."""
    shown = [head, *rows] if head else list(rows)
    widths = [max(len(row[column]) for row in shown) for column in range(len(shown[0]))] if shown else []
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    return "\n".join(lines)


def _verdict(error: BaseException) -> tuple[int, str]:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, PermgraphError):
        return BAD_INPUT, in_one_line(error)
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename else ""
        return BAD_INPUT, f"{named}{error.strerror or in_one_line(error)}"
    if isinstance(error, MemoryError):
        return BAD_INPUT, "out of memory: say --stream, or use a machine with more"
    return OUR_BUG, f"{type(error).__name__}: {in_one_line(error)} (this is a bug in permgraph: --debug shows where)"


def _plain(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
