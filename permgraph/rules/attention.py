"""Attention kernels that arrive whole."""

from __future__ import annotations

from permgraph.rules.call import Call
from permgraph.rules.pattern import last_labels
from permgraph.rules.registry import aten, rule
from permgraph.rules.typed_tensor import TypedTensor

KERNELS = """
    scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_attention_math _scaled_dot_product_cudnn_attention
    _scaled_dot_product_attention_math_for_mps _scaled_dot_product_fused_attention_overrideable
"""


@rule(*aten(KERNELS), values="mixed", acts="attention")
def scaled_dot_product_attention(call: Call) -> None:
    """q is (.., h, s, d), k is (.., h, t, d), v is (.., h, t, e): softmax(q kᵀ) v, with a mask that is added to q kᵀ.

    Where q has several heads for each of k's, head (h, r) of q meets head h of k.
    """
    q, k, v, out = call["query"], call["key"], call["value"], call.out
    lead = [f"b{i}" for i in range(q.ndim - 2)]
    logits = [*lead, "s", "t"]
    copies = {}
    if lead and q.shape[-3] != k.shape[-3]:
        copies = {"r": q.shape[-3] // k.shape[-3]}
        logits[len(lead) - 1] = f"({lead[-1]} r)"
    every, many, few = " ".join(logits), " ".join(logits[:-2]), " ".join(lead)
    slots: list[tuple[TypedTensor | None, str]] = [
        (q, f"{many} s d"), (k, f"{few} t d"), (v, f"{few} t e"), (out, f"{many} s e"),
    ]  # fmt: skip
    mask = call.get("attn_mask", call.get("attn_bias"))
    if isinstance(mask, TypedTensor):
        slots.append((mask, last_labels(every, mask)))
    for more in call.results[1:]:
        if more.shape == (*out.shape[:-1], k.shape[-2]):
            slots.append((more, every))  # the weights
        elif more.shape == out.shape[:-1]:
            slots.append((more, f"{many} s"))  # the logarithm of the sum that softmax divides by
        else:
            call.pin_all([more], "what the kernel keeps for itself")
    call.link(*slots, via=(), why="", **copies)
    if call.get("is_causal", False):
        for tensor in (q, k):
            call.pin(tensor, tensor.ndim - 2, "a causal mask")
