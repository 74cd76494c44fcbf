"""matplotlib, imported when a picture is drawn and not before."""

from __future__ import annotations

from types import ModuleType

from permgraph.errors import MissingExtraError


def pyplot() -> ModuleType:
    """Return ``matplotlib.pyplot``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib: pip install 'permgraph[plots]'") from error
    return plt
