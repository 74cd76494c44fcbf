"""What the commands write beside checkpoints: checks of where, and the outcome of matching for a report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from permgraph.errors import CheckpointError
from permgraph.matching import MatchResult, Sweep
from permgraph.pictures.figures import pyplot
from permgraph.spec.permutation import Permutation

PAGE = "Write a page to click through (.html): what is tied to what, and why."


PAGES = (".html", ".htm")
FIGURES = (".png", ".svg", ".pdf")


def check_file(path: Path | None, option: str, endings: Sequence[str]) -> None:
    """Refuse, before anything is computed, a file that could not be written.

    Args:
        path: of the file; None if none is wanted.
        option: that named it.
        endings: which it may have; any, if there are none.

    Raises:
        CheckpointError: it has another ending, it is a folder, or there is no folder for it that can be written to.
        MissingExtraError: it is a figure, and matplotlib is not installed.
    """
    if path is None:
        return
    if endings and path.suffix not in endings:
        raise CheckpointError(f"{option} {path}: its ending must be {' or '.join(endings)}")
    if path.is_dir():
        raise CheckpointError(f"{option} {path}: it is a folder")
    if not path.parent.is_dir():
        raise CheckpointError(f"{option} {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise CheckpointError(f"{option} {path}: the folder {path.parent} cannot be written to")
    if path.suffix in FIGURES:
        pyplot()


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
