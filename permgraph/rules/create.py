"""Tensors made from nothing: constant ones have no order, the others do."""

from __future__ import annotations

from permgraph.rules.call import Call
from permgraph.rules.registry import rule


@rule(
    "aten.zeros", "aten.ones", "aten.full", "aten.empty", "aten.zeros_like", "aten.ones_like", "aten.full_like",
    "aten.empty_like", "aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.new_empty", "aten.new_empty_strided",
    "aten.empty_strided", "aten.empty_permuted", "aten.scalar_tensor", "aten._efficientzerotensor",
)  # fmt: skip
def constant(call: Call) -> None:
    """Every element is the same, so every axis is free; of a tensor to be like, no element is read."""
    call.ignore_values(*call.tensors)


@rule("aten.zero", "aten.fill.Scalar")
def overwritten(call: Call) -> None:
    """Every element becomes the same, so every axis is free; an index would be one no more."""
    call.pin_values(call["self"], "an index was overwritten with a number")


@rule("aten.arange")
def arange(call: Call) -> None:
    """0, 1, 2, …: the value at each index is that index. Anything else is an order of its own."""
    out = call.out
    if call.get("start", 0) == 0 and call.get("step", 1) == 1 and out.is_integral:
        out.value = out.dims[0]
    else:
        call.pin(out, 0, "a sequence of numbers")


@rule("aten.linspace", "aten.logspace", "aten.tril_indices", "aten.triu_indices", "aten.hann_window",
      "aten.hamming_window", "aten.bartlett_window", "aten.blackman_window")  # fmt: skip
def sequence(call: Call) -> None:
    """Values in an order of their own."""
    call.pin_all([*call.tensors, *call.results], "a sequence of numbers")


@rule("aten.eye")
def eye(call: Call) -> None:
    """The identity matrix stays itself if rows and columns are renumbered alike."""
    out = call.out
    if out.shape[0] == out.shape[1]:
        call.axes.unify(out.dims[0], out.dims[1])
    else:
        call.pin_all([out], "an identity matrix that is not square")
