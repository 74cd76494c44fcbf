"""What came of matching two checkpoints: as plain data, in words, and back again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from permgraph.conventions.displayed import plural
from permgraph.matching import MatchResult, Sweep
from permgraph.spec.elements import AnyElement
from permgraph.spec.transformation import Transformation


def in_words(report: Mapping[str, Any]) -> str:
    """A report of matching, in words."""
    return (
        f"{report['outcome']} after {plural(report['sweeps'], 'sweep')}: objective {report['objective_before']:.6g} -> "
        f"{report['objective']:.6g}; {report['moved']} of {report['of']} indices moved in "
        f"{plural(report['groups'], 'group')}"
    )


def match_of(kept: Mapping[str, Any], element: AnyElement) -> MatchResult:
    """The outcome of matching, from what `MatchingRun.report` made of it; of each sweep only totals are known."""
    history = tuple(
        Sweep(sweep["sweep"], sweep["objective"], {"all groups": sweep["moved"]}, {}, sweep["seconds"])
        for sweep in kept.get("history", ())
    )
    transformation = element if isinstance(element, Transformation) else None
    return MatchResult(
        element.permutation if isinstance(element, Transformation) else element,
        kept["objective"],
        kept["objective_before"],
        kept["outcome"],
        history,
        seed=kept["seed"],
        seconds=kept.get("seconds", 0.0),
        transformation=transformation,
    )
