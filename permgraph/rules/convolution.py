"""Convolutions, and what else moves or reads space; windows over space are in `pooling`."""

from __future__ import annotations

from collections.abc import Sequence

from permgraph.rules.call import Call
from permgraph.rules.registry import aten, rule
from permgraph.rules.typed_tensor import TypedTensor

SPACE = "a spatial dimension"


def spread(value: Sequence[int], count: int) -> list[int]:
    """One entry for each spatial dimension, where a single one may stand for all."""
    return list(value) * count if len(value) == 1 else list(value)


@rule(
    *aten("convolution _convolution"), values="mixed", acts="product",
    factors=(("input", 1), ("weight", 1)), bias=("bias", 1),
)  # fmt: skip
@rule(*aten("mkldnn_convolution cudnn_convolution"), values="mixed")
def convolution(call: Call) -> None:
    """x is (n, g·i, space), w is (g·o, i, kernel), or (g·i, o, kernel) if transposed; the result is (n, g·o, space).

    Along a dimension with a kernel of one and a stride of one nothing is mixed, and a kernel that covers the whole of
    a dimension sums over it as a matrix product does.
    """
    x, weight, bias, out = call.get("input", call.get("self")), call["weight"], call.get("bias"), call.out
    *slots, (_, channels), result = convolution_slots(call, x, weight, out)
    call.link(*slots, (bias, channels), result, why=SPACE, g=call["groups"])


Slot = tuple[TypedTensor, str]


def convolution_slots(
    call: Call, x: TypedTensor, weight: TypedTensor, out: TypedTensor
) -> tuple[Slot, Slot, tuple[None, str], Slot]:
    """Labels for a convolution's input, weight, bias and result."""
    space = weight.ndim - 2
    stride = spread(call["stride"], space)
    padding = spread(call["padding"], space)
    dilation = spread(call["dilation"], space)
    transposed = call.get("transposed", False)
    labels: list[tuple[str, str, str]] = []  # of the input, the kernel and the result, along each dimension of space
    for s in range(space):
        kernel, size = weight.shape[2 + s], x.shape[2 + s]
        if kernel == 1 and stride[s] == 1 and padding[s] == 0 and out.shape[2 + s] == size:
            labels.append((f"s{s}", "_", f"s{s}"))
        elif kernel == size and padding[s] == 0 and dilation[s] == 1 and out.shape[2 + s] == 1 and not transposed:
            labels.append((f"s{s}", f"s{s}", "_"))
        else:
            labels.append((f"s{s}!", f"k{s}!", f"t{s}!"))
    channels = "(g i) o" if transposed else "(g o) i"
    before, inside, after = (" ".join(along[i] for along in labels) for i in range(3))
    return (x, f"n (g i) {before}"), (weight, f"{channels} {inside}"), (None, "(g o)"), (out, f"n (g o) {after}")


@rule("aten.constant_pad_nd", values="padded", acts="moved")
def constant_pad(call: Call) -> None:
    """Constants before and after: they have no order of their own, the padded axis is a sum."""
    x, out, pad = call["self"], call.out, call["pad"]
    pairs = [pad[i : i + 2] for i in range(0, len(pad), 2)]  # of the last dimension first
    call.pad(x, out, [(0, 0)] * (x.ndim - len(pairs)) + [(before, after) for before, after in reversed(pairs)])
    call.pin_values(x, "indices are padded with a constant")


@rule(*aten("pixel_shuffle pixel_unshuffle"), values="moved", zeros="all", acts="moved")
def pixel_shuffle(call: Call) -> None:
    """Channels (c, r, r) become c channels of r times the height and width, or the reverse."""
    small, large = "... (c a b) h w", "... c (h a) (w b)"
    r = call.get("upscale_factor") or call["downscale_factor"]
    before, after = (small, large) if "upscale_factor" in call.arguments else (large, small)
    call.link((call["self"], before), (call.out, after), a=r, b=r)


@rule(*aten("channel_shuffle native_channel_shuffle"), values="moved", zeros="all", acts="moved")
def channel_shuffle(call: Call) -> None:
    """Channels (g, c) become (c, g)."""
    call.link((call["self"], "n (g c) ..."), (call.out, "n (c g) ..."), g=call["groups"])


@rule(*aten("grid_sampler grid_sampler_2d grid_sampler_3d"), values="padded")
def grid_sampler(call: Call) -> None:
    """An image (n, c, space) looked up at the points of a grid (n, space, 2 or 3)."""
    x, grid = call["input"], call["grid"]
    space = x.ndim - 2
    ins = " ".join(f"s{i}!" for i in range(space))
    outs = " ".join(f"t{i}" for i in range(space))
    call.link((x, f"n c {ins}"), (grid, f"n {outs} xy!"), (call.out, f"n c {outs}"), why=SPACE)
