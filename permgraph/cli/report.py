"""What the commands need to write a report: the option, its check, and the outcome of matching as it was kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from permgraph.errors import CheckpointError
from permgraph.matching import MatchResult, Sweep
from permgraph.permutation import Permutation

PAGE = "Write a page to click through (.html): what is tied to what, and why."


def check_page(page: Path | None) -> None:
    """Refuse, before anything is computed, a page that could not be written.

    Raises:
        CheckpointError: its ending is not .html, or there is no such folder.
    """
    if page is None:
        return
    if page.suffix not in (".html", ".htm"):
        raise CheckpointError(f"--report {page}: its ending must be .html")
    if not page.parent.is_dir():
        raise CheckpointError(f"--report {page}: there is no folder {page.parent}")


def match_of(kept: Mapping[str, Any], permutation: Permutation) -> MatchResult:
    """The outcome of matching, from what `Work.report` made of it; of each sweep only totals are known."""
    history = tuple(
        Sweep(sweep["sweep"], sweep["objective"], {"all groups": sweep["moved"]}, {}, sweep["seconds"])
        for sweep in kept.get("history", ())
    )
    return MatchResult(
        permutation,
        kept["objective"],
        kept["objective_before"],
        kept["outcome"],
        history,
        seed=kept["seed"],
        seconds=kept.get("seconds", 0.0),
    )
