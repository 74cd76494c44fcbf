"""Losses of elements, for forward passes that return one; those of classes by their number are in `index`."""

from __future__ import annotations

from permgraph.rules.call import Call
from permgraph.rules.registry import aten, rule

LOSSES = """
    mse_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy binary_cross_entropy_with_logits
"""


@rule(*aten(LOSSES), values="derived")
def loss(call: Call) -> None:
    """A function of pairs of elements (and of their weights), or its sum or mean over all of them."""
    if call["reduction"] == 0:
        call.pointwise(*call.tensors, call.out)
    else:
        call.link(*((tensor, "...") for tensor in call.tensors), (call.out, ""))
    for tensor in call.tensors:
        call.pin_values(tensor, "arithmetic on an index")
