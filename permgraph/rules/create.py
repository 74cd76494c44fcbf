"""Tensors made from nothing: constant ones have no order, the others do."""

from __future__ import annotations

from permgraph.rules.call import Call
from permgraph.rules.registry import aten, rule

ZEROS = "zeros zeros_like new_zeros _efficientzerotensor"
ONES = "ones full ones_like full_like new_ones new_full scalar_tensor"
EMPTY = "empty empty_like new_empty new_empty_strided empty_strided empty_permuted"


@rule(*aten(ZEROS), values="constant", zeros="all", reads_values=False, acts="zeros")
@rule(*aten(ONES), values="constant", reads_values=False, acts="constant")
@rule(*aten(EMPTY), values="derived", reads_values=False, acts="zeros")
def constant(call: Call) -> None:
    """Every element is the same, so every axis is free; of a tensor to be like, no element is read."""
    call.ignore_values(*call.tensors)


@rule(*aten("zero fill.Scalar"), values="padded")
def overwritten(call: Call) -> None:
    """Every element becomes the same, so every axis is free; an index would be one no more."""
    call.pin_values(call["self"], "an index was overwritten with a number")


@rule("aten.arange", values="derived")
def arange(call: Call) -> None:
    """0, 1, 2, …: the value at each index is that index. Anything else is an order of its own."""
    out = call.out
    if call.get("start", 0) == 0 and call.get("step", 1) == 1 and out.is_integral:
        out.value = out.dims[0]
        out.counts = not out.written
    else:
        call.pin(out, 0, "a sequence of numbers")


@rule(*aten("linspace logspace"), values="derived")
@rule(*aten("tril_indices triu_indices hann_window hamming_window bartlett_window blackman_window"))
def sequence(call: Call) -> None:
    """Values in an order of their own."""
    call.pin_all([*call.tensors, *call.results], "a sequence of numbers")


@rule("aten.eye", values="padded")
def eye(call: Call) -> None:
    """The identity matrix stays itself if rows and columns are renumbered alike."""
    out = call.out
    if out.shape[0] == out.shape[1]:
        call.unify(out, 0, out, 1)
    else:
        call.pin_all([out], "an identity matrix that is not square")
