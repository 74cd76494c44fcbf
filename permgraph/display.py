"""Pictures by name: what a value draws itself with, imported when it is drawn.

Values such as a spec know how they are shown, and pictures know the values; this is the one place where the former
name the latter, as text, so that no package that holds values depends on the one that draws them.
"""

from __future__ import annotations

import importlib
from typing import Any

PICTURES = {
    "spec": "permgraph.pictures.drawing:plot_spec",
    "spec table": "permgraph.pictures.tables:spec_table",
    "result table": "permgraph.pictures.tables:result_table",
}


def display(picture: str, *args: Any, **kwargs: Any) -> Any:
    """Draw the picture of that name."""
    module, _, function = PICTURES[picture].partition(":")
    return getattr(importlib.import_module(module), function)(*args, **kwargs)
