"""Which of the tensors that a model returns count as its result, and so stay put."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import fx


@dataclass(frozen=True)
class AllBut:
    """Everything that is returned counts, but outputs of these names: what a spec that is known says."""

    names: tuple[str, ...]


Outputs: TypeAlias = "str | Sequence[str] | Callable[[Any], Any] | AllBut | None"
"""What is asked for: see `auto_spec`. None leaves it to the kind of result."""


@dataclass(frozen=True)
class Returned:
    """A tensor that a model returns: the names under which it does, and whether it counts as the result."""

    names: tuple[str, ...]
    counts: bool


def returned_by(end: fx.Node) -> list[Returned]:
    """What is said of each result of an output node; of one of which nothing is said, that it counts."""
    said: list[Returned] | None = end.meta.get("returned")
    results: Any = end.args[0]
    number = len(results) if isinstance(results, (list, tuple)) else 1
    return [Returned((), True)] * number if said is None else said


def counting(end: fx.Node) -> list[bool]:
    """Whether each result of an output node counts, as it does where in any pass one of the same name does."""
    returned = returned_by(end)
    names = {name for one in returned if one.counts for name in one.names}
    return [one.counts or not names.isdisjoint(one.names) for one in returned]
