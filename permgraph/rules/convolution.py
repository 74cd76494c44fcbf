"""Convolutions, pooling, resampling and what else runs over space."""

from __future__ import annotations

from collections.abc import Sequence

from permgraph.rules.call import Call
from permgraph.rules.registry import aten, rule
from permgraph.rules.typed_tensor import TypedTensor

SPACE = "a spatial dimension"


def _spread(value: Sequence[int], count: int) -> list[int]:
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
    stride = _spread(call["stride"], space)
    padding = _spread(call["padding"], space)
    dilation = _spread(call["dilation"], space)
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


LARGEST = """
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d
    adaptive_max_pool3d
"""
MEANS = """
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d
    _adaptive_avg_pool3d
"""
RESAMPLING = """
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d
    upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d
"""
BORDERS = """
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
"""


# Along space, which stays put, neighbours may be equal; the channels at one place are so only where they were before.
@rule(*aten(LARGEST), values="derived", zeros="all", acts="homogeneous")
@rule(*aten(MEANS + RESAMPLING + BORDERS), values="derived", zeros="all", acts="product")
@rule(*aten("max_unpool2d max_unpool3d"), values="padded", zeros="all")
def over_space(call: Call) -> None:
    """Each channel by itself; the last dimensions, as many as the operator's name says, are space."""
    name = str(call.node.target)
    _over_space(call, next(int(digit) for digit in "123" if f"{digit}d" in name))


def _over_space(call: Call, space: int) -> None:
    x, *others = call.tensors
    lead = call.names(x.ndim - space)
    # the mean over the whole of a dimension singles nothing out
    whole = ["adaptive_avg" in str(call.node.target) and call.out.shape[d] == 1 for d in range(x.ndim - space, x.ndim)]
    ins = [f"s{i}" if whole[i] else f"s{i}!" for i in range(space)]
    outs = ["_" if whole[i] else f"t{i}!" for i in range(space)]
    before, after = (" ".join([lead, *space]) for space in (ins, outs))
    indices = [(other, before) for other in others]  # of max_unpool
    call.link((x, before), *indices, *((out, after) for out in call.results), why=SPACE)


@rule(*aten("fractional_max_pool2d fractional_max_pool3d"), values="derived", zeros="all")
def fractional_max_pool(call: Call) -> None:
    """Each channel by itself, with random samples (n, c, 2 or 3) that say where its windows lie."""
    x, samples = call.tensors
    space = samples.shape[-1]
    lead = call.names(x.ndim - space)
    if samples.ndim != x.ndim - space + 1:
        call.pin_all([*call.tensors, *call.results], "windows that are drawn at random")
        return
    ins, outs = (" ".join([lead, *(f"{label}{i}!" for i in range(space))]) for label in "st")
    call.link((x, ins), (samples, f"{lead} k!"), *((out, outs) for out in call.results), why=SPACE)


@rule(*aten("pad _pad_circular"), values="padded")
def pad(call: Call) -> None:
    """Constants around the last dimensions, or what these hold themselves, in order."""
    if call.get("mode") == "constant":
        constant_pad(call)
    else:
        _over_space(call, len(call["pad"]) // 2)


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


@rule(*aten("im2col col2im"), values="padded", zeros="all", acts="product")
def columns(call: Call) -> None:
    """Windows of an image as columns, (n, c·kernel, windows); or such columns, added up into an image."""
    x: TypedTensor = call["self"]
    lead = "n " if max(x.ndim, call.out.ndim) == 4 else ""
    image, windows = f"{lead}c h! w!", f"{lead}(c k!) l!"
    before, after = (image, windows) if x.ndim > call.out.ndim else (windows, image)
    call.link((x, before), (call.out, after), why=SPACE, k=call["kernel_size"][0] * call["kernel_size"][1])


@rule(*aten("grid_sampler grid_sampler_2d grid_sampler_3d"), values="padded")
def grid_sampler(call: Call) -> None:
    """An image (n, c, space) looked up at the points of a grid (n, space, 2 or 3)."""
    x, grid = call["input"], call["grid"]
    space = x.ndim - 2
    ins = " ".join(f"s{i}!" for i in range(space))
    outs = " ".join(f"t{i}" for i in range(space))
    call.link((x, f"n c {ins}"), (grid, f"n {outs} xy!"), (call.out, f"n c {outs}"), why=SPACE)
