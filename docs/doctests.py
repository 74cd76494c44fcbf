"""An extension of griffe, which reads the docstrings for the reference: it shows their examples as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

# A line that starts with >>>, and all that follows up to a blank line, indented alike.
EXAMPLE = re.compile(r"^(?P<indent>[ ]*)>>> .*(?:\n(?P=indent)\S.*|\n(?P=indent)[ ]+\S.*)*", re.MULTILINE)


def fenced(match: re.Match[str]) -> str:
    """Return an example between fences."""
    indent = match["indent"]
    return f"{indent}```pycon\n{match[0]}\n{indent}```"


class Doctests(griffe.Extension):
    """Puts fences around every example in a docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring, once."""
        if obj.docstring is not None and "```pycon" not in obj.docstring.value:
            obj.docstring.value = EXAMPLE.sub(fenced, obj.docstring.value)
