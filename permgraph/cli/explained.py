"""An explanation as lines that fit: for each axis that is tied, the operators that tie it, module by module."""

from __future__ import annotations

import itertools
import shutil
import textwrap
from collections.abc import Iterator, Sequence

from permgraph.spec.explain import Explanation, Part
from permgraph.spec.provenance import SlotPin, Tie

SHOWN = 12
NO_PATH = "of one group; by which operators was not kept"
DIRECTLY = "directly"


def in_lines(explanation: Explanation, width: int | None = None) -> str:
    """What `permgraph explain` prints.

    Args:
        explanation: why an axis is what it is.
        width: the longest line, where names allow it; that of the terminal by default, and at most 120.
    """
    width = width or min(120, max(60, shutil.get_terminal_size((120, 40)).columns))
    whole = len(explanation.parts) == 1 and explanation.parts[0].axis == explanation.axis
    lines = [] if whole else [f"{explanation.slot} ({explanation.size}) is {explanation.axis}"]
    for part in explanation.parts:
        title = f"{explanation.slot} ({part.size})" if whole else f"  {part.axis} ({part.size})"
        lines.append(f"{title} {_verdict(part)}:")
        lines += [f"{'' if whole else '  '}{line}" for line in _reasons(part)]
    lines += explanation.modules
    return "\n".join(
        wrapped
        for line in lines
        for wrapped in textwrap.wrap(
            line,
            width,
            subsequent_indent=" " * (len(line) - len(line.lstrip()) + 4),
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def _verdict(part: Part) -> str:
    if part.moves:
        return f"is group {part.group}"
    return "stays put" if part.group is None else f"is {part.group}, which stays put and names an axis"


def _reasons(part: Part) -> Iterator[str]:
    if part.moves:
        for link in part.links[:SHOWN]:
            steps = list(_steps(link.ties))
            if link.modules:
                yield f"  {link}"
            elif steps:
                yield f"  tied to {link.slot} by"
                yield from (f"      {step}" for step in steps)
            else:
                yield f"  tied to {link.slot}: {DIRECTLY if link.ties else NO_PATH}"
        if len(part.links) > SHOWN:
            yield f"  and to {len(part.links) - SHOWN} more"
        if not part.links:
            yield "  tied to no other axis of a parameter"
    elif part.pin is None:
        yield "  the reason was not kept"
    else:
        by = "".join(f" by {step}" for step in _steps((part.pin,)))
        yield f"  {part.pin.reason}, at {part.pin.slot}{by}"
        steps = list(_steps(part.pin_path))
        if steps:
            yield "  reached by"
            yield from (f"      {step}" for step in steps)


def _steps(made: Sequence[Tie | SlotPin]) -> Iterator[str]:
    """The operators of a path in words: those that follow each other in one module together, with the lines."""
    known = [step for step in made if step.operator is not None]
    for module, run in itertools.groupby(known, key=lambda step: step.module):
        operators: list[str] = []
        places: list[str] = []
        for step in run:
            assert step.operator is not None
            name = step.operator.removeprefix("aten.").partition(".")[0]
            if not operators or operators[-1] != name:
                operators.append(name)
            if step.source and step.source not in places:
                places.append(step.source)
        where = f" in {module}" if module else ""
        yield f"{', '.join(operators)}{where}{_lines_of(places)}"


def _lines_of(places: Sequence[str]) -> str:
    """Source lines, each file named once."""
    lines: dict[str, list[str]] = {}
    for place in places:
        file, _, number = place.rpartition(":")
        lines.setdefault(file, []).append(number)
    named = "; ".join(f"{file}:{','.join(numbers)}" for file, numbers in lines.items())
    return f" ({named})" if named else ""
