"""Control flow and other operators that take functions: run as the plain Python that they stand for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator, OpOverload

from permgraph.errors import CaptureError


def is_higher_order(func: Any) -> bool:
    """Whether an operator takes functions, as `torch.cond` and `flex_attention` do."""
    return isinstance(func, HigherOrderOperator)


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


def _scan(step: Callable[..., Any], init: Any, xs: Any, additional_inputs: Any) -> Any:
    module: Any = importlib.import_module("torch._higher_order_ops.scan")  # its package has a function of that name
    return module.generic_scan(step, init, xs, additional_inputs=additional_inputs)
