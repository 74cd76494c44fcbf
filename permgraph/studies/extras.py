"""Packages that come with an extra of permgraph."""

from __future__ import annotations

import importlib
from typing import Any

from permgraph.errors import MissingExtraError


def imported(name: str, extra: str = "study", who: str = "studies need") -> Any:
    """The module of this name.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"{who} {name}: pip install permgraph[{extra}]") from error
