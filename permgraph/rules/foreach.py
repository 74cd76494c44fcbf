"""Operators on lists of tensors, each of which is treated by itself."""

from __future__ import annotations

from permgraph.rules.call import Call
from permgraph.rules.registry import aten, rule
from permgraph.rules.typed_tensor import TypedTensor

ELEMENTWISE = """
    abs acos add addcdiv addcmul asin atan ceil clamp_max clamp_min clone cos cosh div erf erfc exp expm1 floor frac
    lerp lgamma log log10 log1p log2 maximum minimum mul neg pow reciprocal round rsqrt sigmoid sign sin sinh sqrt sub
    tan tanh trunc
"""


@rule(*aten(" ".join(f"_foreach_{name}" for name in ELEMENTWISE.split())))
def elementwise(call: Call) -> None:
    """The tensors at one place of all lists, element by element; numbers may come as a tensor too."""
    if not call.results:
        call.pin_all(call.tensors, "written into in a list")
        return
    lists = [given for given in call.arguments.values() if isinstance(given, list) and _has_tensors(given)]
    for tensors in zip(*lists, call.results, strict=True):
        call.pointwise(*tensors)
    for tensor in call.tensors:
        call.pin_values(tensor, "arithmetic on an index")
    for tensor in call.arguments.values():
        if isinstance(tensor, TypedTensor):
            call.pin_all([tensor], "a number for each tensor of a list")


@rule(*aten("_foreach_norm _foreach_max"))
def reduction(call: Call) -> None:
    """One number for each tensor, whatever the order of its elements."""
    for tensor, out in zip(call["self"], call.results, strict=True):
        call.link((tensor, call.names(tensor)), (out, ""))
        call.pin_values(tensor, "arithmetic on an index")


def _has_tensors(given: list[object]) -> bool:
    return any(isinstance(item, TypedTensor) for item in given)
