"""Arguments, attributes and keys that a failed run missed, or that were in its way."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Iterator

from torch import nn

from permgraph.capture.inputs.failing_source import failing_lines, names_at_fault
from permgraph.capture.inputs.guesses import (
    Guess,
    Guesses,
    Mend,
    annotations_of,
    beginnings,
    changed,
    handed_on,
    paired,
    parameters_of,
)
from permgraph.capture.inputs.layers import required
from permgraph.capture.inputs.trials import Failure

_MENTIONS_NONE = re.compile(r"NoneType|\bNone\b|must be (given|provided|specified)|should be provided|required")


def asked_for(model: nn.Module, guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """A tensor for the attribute or the key that the model looked for, and an owner that has such."""
    error, place = failure.error, len(guesses)
    owner: str | None = None
    if isinstance(error, AttributeError) and failure.asked in guesses and error.name:
        owner, key, kind = failure.asked, error.name, "record"
    elif isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        owner, key, kind = next((n for n, g in guesses.items() if g.kind == "mapping"), None), error.args[0], "mapping"
    else:
        key = _string_index(error)
        kind = "mapping"
        owner = next(iter(failure.last.origins), None) if key and failure.last is not None else None
    if owner is None or owner not in guesses or "." in owner or not key.isidentifier() or key.startswith("_"):
        return
    holder = guesses[owner] if guesses[owner].kind == kind else Guess(kind)  # type: ignore[arg-type]
    for at, guess in enumerate(beginnings(model, key, place)[:6]):
        yield 0.5 + at, {**changed(guesses, owner, holder), f"{owner}.{key}": guess}


def _string_index(error: Exception) -> str:
    """The key by which a tensor was indexed, which it cannot be."""
    if not isinstance(error, (IndexError, TypeError, RuntimeError)) or "ind" not in str(error):
        return ""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        found = re.search(r"""\[['"](\w+)['"]\]""", linecache.getline(frame.f_code.co_filename, line))
        if found:
            return found[1]
    return ""


def left_out(model: nn.Module, guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """An argument whose default is None, where the model does not do without; what the error names comes first."""
    parameters = parameters_of(model)
    absent = [name for name, p in parameters.items() if p.default is None and name not in guesses]
    lines = failing_lines(failure.error)
    message = str(failure.error)
    told = " ".join((message, *lines))
    absent += [
        name for name in handed_on(model) if name not in parameters and name not in guesses and _mentions(told, name)
    ]
    if not absent:
        return
    named = [name for name in absent if _mentions(message, name)]
    missed, stated = names_at_fault(model, failure.error)
    missed = [name for name in missed if name in absent and name not in named]
    named += missed
    read = [n for n in absent if n not in named and (n in stated or any(_mentions(line, n) for line in lines))]
    likely = named + read
    if (
        not likely
        and not _MENTIONS_NONE.search(message)
        and not isinstance(failure.error, (AssertionError, ValueError))
    ):
        return
    order = [*parameters, *(name for name in absent if name not in parameters)]
    hints = annotations_of(model)
    choices = {name: beginnings(model, name, order.index(name), hints.get(name)) for name in absent}
    for at, name in enumerate([*likely, *(n for n in absent if n not in likely)][:6]):
        for rank, guess in enumerate(choices[name][:3]):
            given = {**guesses, name: guess}
            given = paired(given) if guess.kind == "mask" and rank == 0 else given
            yield 0.3 + (0.5 if name in likely else 1.5) * at + rank, {n: given[n] for n in _in_order(given, order)}
    for cost, together in ((0.6, missed), (2.5, absent)):
        if len(together) > 1:
            every = paired({**{name: choices[name][0] for name in together}, **guesses})
            yield cost, {name: every[name] for name in _in_order(every, order)}


def in_the_way(model: nn.Module, guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """Without an argument that the module does without, where the failing statement reads it."""
    _, stated = names_at_fault(model, failure.error)
    needed = required(model)
    for name in stated:
        if name in guesses and name not in needed:
            yield 1.0, {key: guess for key, guess in guesses.items() if key.partition(".")[0] != name}


def _mentions(text: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", text) is not None


def _in_order(guesses: Guesses, order: list[str]) -> list[str]:
    return [*(name for name in order if name in guesses), *(name for name in guesses if name not in order)]
