"""Running a module again, differently, until nothing new is seen or enough has run."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

from permgraph.capture.captured import Captured
from permgraph.capture.draws import draws, mark_cuts
from permgraph.capture.passes import Variation, alike, joined, variations
from permgraph.capture.record import Limits
from permgraph.capture.run import capture_again
from permgraph.capture.subject import unwrap

log = logging.getLogger(__name__)


class FurtherPasses:
    """The passes of one module that say something new, the first of them given; and what became of the others.

    Attributes:
        passes: those that are to be solved together.
        alike: the names of those that differ from an earlier one in their sizes alone.
        failed: the names of those that the module does not run, with the reason.
        untried: the names of those for which there was no room.
    """

    def __init__(
        self,
        model: Any,
        captured: Captured,
        max_passes: int,
        max_nodes: int = 200_000,
        max_seconds: float | None = None,
    ) -> None:
        self.passes = [captured]
        self.names: list[str] = []
        self.alike: list[str] = []
        self.failed: dict[str, str] = {}
        self.untried: list[str] = []
        limits = Limits(max_nodes, max_seconds, time.monotonic())
        shown: set[str] = set() if captured.keeps_state else {"calls"}  # else a second call is like the first
        left = 0  # of those on other values, of which there are many
        for variation in _alternating(draws(captured), variations(unwrap(model).core, captured.inputs)):
            if variation.shows <= shown:
                continue
            if len(self.passes) + len(self.alike) >= max_passes:
                if variation.on_other_values:
                    left += 1
                else:
                    self.untried.append(variation.name)
                continue
            try:
                again = capture_again(model, captured, variation, limits)
            except Exception as error:  # the module's own, on inputs that it was not written for
                if variation.on_other_values:  # or on values that it never has
                    log.debug("a pass with %s failed: %s", variation.name, error)
                    continue
                self.failed[variation.name] = f"{type(error).__name__}: {_first_line(error)}"
                log.debug("a pass with %s failed: %s", variation.name, self.failed[variation.name])
                continue
            shown |= variation.shows
            if variation.on_other_values:
                mark_cuts(captured, again)
            if any(alike(one, again) for one in self.passes):
                self.alike.append(variation.name)
            else:
                self.passes.append(again)
                self.names.append(variation.name)
        if left:
            self.untried.append(f"{left} on other values")

    def joined(self) -> Captured:
        """The passes as one graph over shared parameters."""
        return self.passes[0] if len(self.passes) == 1 else joined(self.passes)

    def notes(self) -> tuple[str, ...]:
        """What ran and what did not, in sentences."""
        said = []
        if self.names or self.alike:
            said.append(f"inferred from {1 + len(self.names) + len(self.alike)} passes: the first, and with "
                        f"{', '.join([*self.names, *self.alike])}")  # fmt: skip
        said += [f"not run with {name}: {reason}" for name, reason in self.failed.items()]
        if self.untried:
            said.append(f"not tried, for max_passes: {', '.join(self.untried)}")
        return tuple(said)


def _alternating(*kinds: Iterable[Variation]) -> Iterator[Variation]:
    """The first of each kind, the second of each, and so on."""
    turns = itertools.zip_longest(*kinds)
    return (variation for turn in turns for variation in turn if variation is not None)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:120]
