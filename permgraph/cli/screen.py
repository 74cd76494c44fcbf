"""What a command shows: its result on stdout, notes and progress on stderr, errors in one line."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Annotated, Any

import typer

from permgraph.errors import PermgraphError

SAYS_NO = 1
BAD_INPUT = 2
OUR_BUG = 70  # EX_SOFTWARE
INTERRUPTED = 130

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, errors too.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress bars.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and the library's log.")]

Update = Callable[[float], None]


class Screen:
    """The channel of one command to whoever runs it.

    A context: an error that is the user's to mend leaves it as one line on stderr and exit code 2; any other as a line
    that says that it is a bug, and exit code 70. Tracebacks are shown only for `debug`.
    """

    def __init__(self, as_json: bool, quiet: bool, debug: bool) -> None:
        self.as_json, self.quiet, self.debug = as_json, quiet, debug
        self.notes: list[str] = []

    def __enter__(self) -> Screen:
        if self.debug:
            logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(name)s: %(message)s")
        else:
            warnings.simplefilter("ignore")  # those of other libraries about models that we did not write
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, typer.Exit):
            return
        if isinstance(error, BrokenPipeError):  # whoever reads us has had enough, as head has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(SAYS_NO) from None
        code, said = _verdict(error)
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
    def stage(self, title: str, total: float | None = None) -> Iterator[Update]:
        """A stage of the work, with a live bar on a terminal; yields a function to be called with how much is done."""
        if self.quiet or self.as_json or self.debug or not sys.stderr.isatty():
            yield lambda done: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(title, total=total)
            yield lambda done: progress.update(task, completed=done)


def table(rows: Sequence[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    """Rows in aligned columns."""
    shown = [head, *rows] if head else list(rows)
    widths = [max(len(row[column]) for row in shown) for column in range(len(shown[0]))] if shown else []
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    return "\n".join(lines)


def _verdict(error: BaseException) -> tuple[int, str]:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted; the same command goes on where this one stopped"
    if isinstance(error, PermgraphError):
        return BAD_INPUT, _line(error)
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename else ""
        return BAD_INPUT, f"{named}{error.strerror or _line(error)}"
    if isinstance(error, MemoryError):
        return BAD_INPUT, "out of memory: say --stream, or use a machine with more"
    return OUR_BUG, f"{type(error).__name__}: {_line(error)} (this is a bug in permgraph: --debug shows where)"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _plain(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
