"""Batch, layer, group and root-mean-square normalisation."""

from __future__ import annotations

from permgraph.rules.call import Call
from permgraph.rules.registry import aten, rule

BATCH_NORMS = """
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _native_batch_norm_legit_functional
    cudnn_batch_norm batch_norm _batch_norm_with_update _batch_norm_no_update miopen_batch_norm
"""


@rule(*aten(BATCH_NORMS), values="derived", acts="batch norm")
def batch_norm(call: Call) -> None:
    """x is (b, c, space); weight, bias and running statistics are (c). Statistics are over all but c."""
    x = call["input"]
    every = call.names(x, named={1: "c"})
    parameters = [t for t in call.tensors if t is not x and t.shape == (x.shape[1],)]
    saved = [t for t in call.results if t.shape == (x.shape[1],) and t.ndim == 1]
    call.link((x, every), *((t, "c") for t in (*parameters, *saved)), (call.out, every))


@rule(*aten("_fused_rms_norm rms_norm"), values="derived", zeros="any", acts="rms norm")
@rule(*aten("native_layer_norm layer_norm"), values="derived", acts="layer norm")
def layer_norm(call: Call) -> None:
    """Statistics over the last dimensions, those of the weight; each leading index has its own."""
    x = call["input"]
    lead, last = layer_norm_labels(call)
    every = f"{lead} {last}"
    blanks = " ".join("_" for _ in last.split())
    statistics = [(out, f"{lead} {blanks}") for out in call.results[1:] if out.ndim == x.ndim]
    parameters = [(call.get(name), last) for name in ("weight", "bias")]
    call.link((x, every), *parameters, (call.out, every), *statistics, via=[lead])


def layer_norm_labels(call: Call) -> tuple[str, str]:
    """Labels for the leading dimensions of the input, and for those that are normalised."""
    count = len(call["normalized_shape"])
    lead = " ".join(f"b{i}" for i in range(call["input"].ndim - count))
    return lead, " ".join(f"n{i}" for i in range(count))


@rule(*aten("native_group_norm group_norm"), values="derived", acts="group norm")
def group_norm(call: Call) -> None:
    """x is (n, g·i, space); statistics for each n and g.

    Where channels come from several tensors whose seams are no borders of groups, whatever leaves each group in itself
    is free: see `Call.cut_into_cells`.
    """
    x = call["input"]
    groups = call.get("group", call.get("num_groups"))
    if not call.is_product(x, 1, groups):
        every = call.names(x, named={1: "c"})
        statistics = [(out, "d0 _") for out in call.results[1:]]
        call.link((x, every), (call["weight"], "c"), (call["bias"], "c"), (call.out, every), *statistics, via=["d0"])
        call.cut_into_cells(x, 1, groups, via="d0")
        for out in call.results[1:]:
            call.pin(out, 1, "groups of channels from several tensors")
        return
    every = call.names(x, named={1: "(g i)"})
    statistics = [(out, "d0 g") for out in call.results[1:]]
    call.link(
        (x, every), (call["weight"], "(g i)"), (call["bias"], "(g i)"), (call.out, every), *statistics,
        via=["d0 g"], g=groups,
    )  # fmt: skip


@rule(*aten("_weight_norm_interface _weight_norm"), values="derived")
def weight_norm(call: Call) -> None:
    """``g · v / |v|``, the norm over every dimension of v but one; g keeps the others at size one."""
    v, dim = call["v"], call.dim(call["v"], default=0)
    every, norm = call.names(v), call.names(v, blank=[d for d in range(v.ndim) if d != dim])
    norms = [(out, norm if out.ndim == v.ndim else f"d{dim}") for out in call.results[1:]]
    g = call["g"]
    call.link((v, every), (g, norm if g.ndim == v.ndim else f"d{dim}"), (call.out, every), *norms)


@rule("aten.renorm", values="derived", zeros="all")
def renorm(call: Call) -> None:
    """Each part along a dimension, shortened to a norm of its own."""
    x = call["self"]
    every = call.names(x)
    call.link((x, every), (call.out, every), via=[f"d{call.dim(x)}"])
