"""Control flow and other operators that take functions: run as the plain Python that they stand for."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from permgraph.errors import CaptureError


def is_higher_order(func: Any) -> bool:
    """Whether an operator takes functions, as `torch.cond` and `flex_attention` do."""
    return isinstance(func, HigherOrderOperator)


def show_higher_order(mode: type[TorchDispatchMode]) -> None:
    """Let a kind of dispatch mode see operators that take functions.

    Newer versions of torch ask the mode whether it wants to; older ones (2.7 is one) have a table in each operator.
    """
    if hasattr(TorchDispatchMode, "supports_higher_order_operators"):
        return
    for operator in torch._ops._higher_order_ops.values():
        operator.python_key_table.setdefault(mode, functools.partial(_given_to_mode, operator))


def _given_to_mode(operator: HigherOrderOperator, mode: Any, *args: Any, **kwargs: Any) -> Any:
    return mode.__torch_dispatch__(operator, (), args, kwargs)


def is_composite(func: OpOverload) -> bool:
    """Whether an operator is made of others. Inside an operator that takes functions, it arrives as it was called."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(str(func._name), DispatchKey.CompositeImplicitAutograd)


def run_plainly(func: HigherOrderOperator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run such an operator step by step, so that a dispatch mode sees each operator inside it."""
    return _plain(func)(*args, **kwargs)


def _plain(func: HigherOrderOperator) -> Callable[..., Any]:
    name = str(func)
    if name == "cond":  # torch's own kernels of these two refuse to run under a mode
        return _cond
    if name == "scan":
        return _scan
    kernel = func.py_kernels.get(DispatchKey.CompositeExplicitAutograd)
    if kernel is None:
        raise CaptureError(
            f"the operator {name} takes functions and has no plain implementation, so that the operators inside it "
            "cannot be observed: call those functions directly"
        )
    return kernel


def _cond(condition: Any, if_true: Callable[..., Any], if_false: Callable[..., Any], operands: Any) -> Any:
    return if_true(*operands) if condition else if_false(*operands)


def _scan(step: Callable[..., Any], init: Any, xs: Any, *more: Any) -> Any:
    *course, additional_inputs = more  # torch 2.6 also says along which dimension, and in which direction
    module: Any = importlib.import_module("torch._higher_order_ops.scan")  # its package has a function of that name
    return module.generic_scan(step, init, xs, *course, additional_inputs=additional_inputs)
