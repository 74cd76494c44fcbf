"""What the source says at the place where a run failed: the lines, what was compared, and whose value was None."""

from __future__ import annotations

import ast
import linecache
import traceback
from collections.abc import Iterator
from functools import lru_cache
from types import FrameType
from typing import Any

from torch import nn


def failing_lines(error: Exception) -> list[str]:
    """The lines of source that were being run when an error was raised, the innermost three, and those just before."""
    lines = []
    for frame, line in list(traceback.walk_tb(error.__traceback__))[-3:]:
        lines += [linecache.getline(frame.f_code.co_filename, number) for number in (line, line - 1)]
    return lines


def names_at_fault(model: nn.Module, error: Exception) -> tuple[list[str], list[str]]:
    """The names of the module's forward that the failing statement reads: those whose value was None, and all.

    Where the statement calls a function, and one of that function's own arguments was None where it failed, the names
    that were handed on as those come first.
    """
    called = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if not _is_of_torch(frame)]
    at = next((n for n, (frame, _) in reversed(list(enumerate(called))) if _is_forward_of(model, frame)), None)
    if at is None:
        return [], []
    suspects: list[str] = []
    arguments: list[str] = []
    read: list[str] = []
    for frame, line in reversed(called[at:]):
        parts = _parts_of_statement(frame.f_code.co_filename, line)
        absent = [name for name in _names(parts) if name in frame.f_locals and frame.f_locals[name] is None]
        handed = [name for call in _calls(parts) for name in _handed(call, suspects, arguments)]
        suspects = list(dict.fromkeys([*(name for name in handed if name in absent), *absent]))
        arguments = [name for name in frame.f_code.co_varnames[: frame.f_code.co_argcount] if name != "self"]
        read = _names(parts)
    return suspects, read


def _handed(call: ast.Call, suspects: list[str], arguments: list[str]) -> Iterator[str]:
    """The names that a call hands on as those of a function's arguments which are under suspicion."""
    for name in suspects:
        place = arguments.index(name) if name in arguments else len(call.args)
        given = call.args[place : place + 1] + [k.value for k in call.keywords if k.arg == name]
        yield from (value.id for value in given if isinstance(value, ast.Name))


def _is_of_torch(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "torch"


def _is_forward_of(model: nn.Module, frame: FrameType) -> bool:
    """Whether a frame runs the forward of a module of this class; what runs is a copy of the module."""
    return frame.f_code.co_name == "forward" and type(frame.f_locals.get("self")) is type(model)


def _names(parts: list[ast.AST]) -> list[str]:
    return list(dict.fromkeys(n.id for part in parts for n in ast.walk(part) if isinstance(n, ast.Name)))


def _calls(parts: list[ast.AST]) -> list[ast.Call]:
    return [node for part in parts for node in ast.walk(part) if isinstance(node, ast.Call)]


def _parts_of_statement(filename: str, line: int) -> list[ast.AST]:
    """The statement that stands on a line; of one with a body, what is evaluated before that."""
    found: ast.stmt | None = None
    for statement in _statements(filename):
        if statement.lineno <= line <= (statement.end_lineno or statement.lineno) and (
            found is None or statement.lineno >= found.lineno
        ):
            found = statement
    if found is None:
        return []
    bodies = ("body", "orelse", "finalbody", "handlers", "decorator_list")
    held = [value for name, value in ast.iter_fields(found) if name not in bodies]
    return [part for value in held for part in (value if isinstance(value, list) else [value]) if _is_node(part)]


def _is_node(value: Any) -> bool:
    return isinstance(value, ast.AST)


@lru_cache(maxsize=64)
def _statements(filename: str) -> tuple[ast.stmt, ...]:
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return ()
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.stmt))


def compared(error: Exception) -> Iterator[tuple[int, int]]:
    """The two sides of the comparison that a failed assertion made, where they are names or attributes."""
    if not isinstance(error, AssertionError):
        return
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    source = linecache.getline(frame.f_code.co_filename, line).strip()
    try:
        statement = ast.parse(source).body[0]
    except (SyntaxError, IndexError):
        return
    for node in ast.walk(statement):
        if isinstance(node, ast.Compare):
            sides = [_evaluated(side, frame.f_locals) for side in (node.left, *node.comparators)]
            numbers = [value for value in sides if type(value) is int]
            for given in numbers:
                yield from ((given, wanted) for wanted in numbers if wanted != given)


def _evaluated(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of a name, an attribute, a constant or an indexed shape; None for anything that would run code."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _evaluated(node.value, names)
        if node.attr == "shape" or isinstance(owner, nn.Module):
            return getattr(owner, node.attr, None)
    if isinstance(node, ast.Subscript):
        owner, at = _evaluated(node.value, names), _evaluated(node.slice, names)
        if isinstance(owner, tuple) and type(at) is int and -len(owner) <= at < len(owner):
            return owner[at]
    return None
