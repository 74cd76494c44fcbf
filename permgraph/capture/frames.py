"""Where in the model an operator was called: the innermost module, and the line of the model's source."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Mapping
from functools import cache
from types import CodeType, FrameType

import torch

_STACK_LINE = re.compile(r'File "([^"]+)", line (\d+)')
#: Code that stands between a model and its operators: torch's, and this package's.
_BETWEEN = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in (torch.__file__, __file__))


@cache
def short_name(filename: str) -> str | None:
    """A source file's name relative to its entry of `sys.path`; None for torch's own and generated code."""
    if filename.startswith("<"):
        return None
    path = os.path.abspath(filename)
    if path.startswith(_BETWEEN):
        return None
    roots = sorted({os.path.abspath(root or os.curdir) for root in sys.path}, key=len, reverse=True)
    for root in roots:
        if path.startswith(root.rstrip(os.sep) + os.sep):
            return os.path.relpath(path, root).replace(os.sep, "/")
    return "/".join(path.split(os.sep)[-2:])


def _traced_place(frame: FrameType, paths: Mapping[int, str]) -> tuple[str | None, str | None]:
    """Module and source line as the node of a traced or exported graph remembers them."""
    graph_module = frame.f_locals.get("self")
    path = paths.get(id(graph_module))
    if path is None or not isinstance(graph_module, torch.fx.GraphModule):
        return None, None
    number = getattr(graph_module, "_lineno_map", {}).get(frame.f_lineno - frame.f_code.co_firstlineno)
    if number is None:
        return path, None
    node = next(itertools.islice(graph_module.graph.nodes, number, None))
    stack: dict[str, tuple[str, object]] = node.meta.get("nn_module_stack") or {"": ("", None)}
    inner = list(stack.values())[-1][0]
    lines = _STACK_LINE.findall(node.meta.get("stack_trace") or "")
    shorts = [f"{short}:{line}" for filename, line in lines if (short := short_name(filename)) is not None]
    return ".".join(part for part in (path, inner) if part), shorts[-1] if shorts else None


def locate(paths: Mapping[int, str], stop: CodeType, depth: int = 2) -> tuple[str, str | None]:
    """The path of the innermost module that is running, and `"file.py:12"` for the innermost line outside torch.

    `paths` maps the `id` of a module to its path. Frames are walked outwards until both are found, or the frame
    that runs `stop` is met: what stands outside it is the caller's code and not the model's.
    """
    module: str | None = None
    source: str | None = None
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None and (code := frame.f_code) is not stop:
        if code.co_filename.startswith("<eval_with_key>"):  # the code that torch.fx made from a graph
            path, line = _traced_place(frame, paths)
            module, source = module if module is not None else path, source or line
        if source is None and (short := short_name(code.co_filename)) is not None:
            source = f"{short}:{frame.f_lineno}"
        if module is None and code.co_argcount and code.co_varnames[0] == "self":
            module = paths.get(id(frame.f_locals.get("self")))
        if module is not None and source is not None:
            break
        frame = frame.f_back
    return module or "", source
