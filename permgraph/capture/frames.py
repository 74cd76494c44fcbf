"""Where in the model an operator was called: the innermost module, and the line of the model's source."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cache
from types import CodeType, FrameType

import torch

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep


@cache
def short_name(filename: str) -> str | None:
    """A source file's name relative to its entry of `sys.path`; None for torch's own and generated code."""
    if filename.startswith("<"):
        return None
    path = os.path.abspath(filename)
    if path.startswith(_TORCH):
        return None
    roots = sorted({os.path.abspath(root or os.curdir) for root in sys.path}, key=len, reverse=True)
    for root in roots:
        if path.startswith(root.rstrip(os.sep) + os.sep):
            return os.path.relpath(path, root).replace(os.sep, "/")
    return "/".join(path.split(os.sep)[-2:])


def locate(paths: Mapping[int, str], stop: CodeType, depth: int = 2) -> tuple[str, str | None]:
    """The path of the innermost module that is running, and `"file.py:12"` for the innermost line outside torch.

    `paths` maps the `id` of a module to its path. Frames are walked outwards until both are found, or the frame
    that runs `stop` is met: what stands outside it is the caller's code and not the model's.
    """
    module: str | None = None
    source: str | None = None
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None and (code := frame.f_code) is not stop:
        if source is None and (short := short_name(code.co_filename)) is not None:
            source = f"{short}:{frame.f_lineno}"
        if module is None and code.co_argcount and code.co_varnames[0] == "self":
            module = paths.get(id(frame.f_locals.get("self")))
        if module is not None and source is not None:
            break
        frame = frame.f_back
    return module or "", source
