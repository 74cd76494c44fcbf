"""What the commands write beside checkpoints: which endings a file may have, and whether it can be written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from permgraph.errors import CheckpointError

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
        from permgraph.pictures.figures import pyplot

        pyplot()
