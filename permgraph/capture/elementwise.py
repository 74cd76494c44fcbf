"""Python functions of numbers that `Tensor.apply_` and its like call for one element after the other."""

from __future__ import annotations

import builtins
import dis
import inspect
import math
import types
from typing import Any

from torch import Tensor

from permgraph.capture.python_state import held_by

_FUNCTIONS = (abs, min, max, round, pow, divmod, float, int, bool)
_NUMBERS = (int, float, bool, type(None))
_STEPS = (
    "RESUME", "NOP", "CACHE", "EXTENDED_ARG", "PRECALL", "PUSH_NULL", "COPY", "SWAP", "DUP_TOP", "ROT_", "POP_TOP",
    "LOAD_FAST", "STORE_FAST", "LOAD_CONST", "LOAD_SMALL_INT", "LOAD_GLOBAL", "LOAD_DEREF", "COPY_FREE_VARS",
    "LOAD_ATTR", "LOAD_METHOD", "CALL", "KW_NAMES", "BINARY_", "INPLACE_", "UNARY_", "COMPARE_OP", "IS_OP",
    "CONTAINS_OP", "TO_BOOL", "POP_JUMP", "JUMP", "BUILD_TUPLE", "RETURN_",
)  # fmt: skip


def of_each_element(name: str, args: tuple[Any, ...]) -> tuple[Tensor, list[Tensor]] | None:
    """The tensor that a call of `apply_`, `map_` or `map2_` writes to, and the others that it reads.

    None where the function may do more than compute a number from numbers, so that it may tell the elements apart.
    """
    number = {"apply_": 1, "map_": 2, "map2_": 3}.get(name)
    if number is None or len(args) != number + 1 or not computes_a_number(args[-1]):
        return None
    return args[0], list(args[1:-1])


def computes_a_number(function: Any, depth: int = 3) -> bool:
    """Whether a function does no more than compute a number from numbers: it keeps, reads and calls nothing else."""
    if (
        any(function is known for known in _FUNCTIONS)
        or getattr(math, getattr(function, "__name__", ""), 0) is function
    ):
        return True
    if not isinstance(function, types.FunctionType) or depth == 0:
        return False
    if function.__code__.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        return False

    def harmless(value: Any) -> bool:
        return isinstance(value, _NUMBERS) or value is math or computes_a_number(value, depth - 1)

    if not all(map(harmless, held_by(function))):
        return False
    for step in dis.get_instructions(function):
        if not step.opname.startswith(_STEPS):
            return False
        if step.opname == "LOAD_GLOBAL":
            value = function.__globals__.get(step.argval, vars(builtins).get(step.argval))
            if not harmless(value):
                return False
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and not hasattr(math, step.argval):
            return False
    return True
