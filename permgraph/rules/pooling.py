"""Pooling, resampling, borders and columns: each channel by itself, window by window.

Along each dimension of space such an operator has a *window*: how many indices go into one of the result, if they go
into no other. With a window of one nothing happens along that dimension, and it passes; with a window of k it is
(windows, k), and neither the windows nor the places in one have an order. Where windows overlap, leave something out or
reach into a border, there is no such number (None), and the dimension stays put.
"""

from __future__ import annotations

from collections.abc import Sequence

from permgraph.rules.call import Call
from permgraph.rules.convolution import SPACE, constant_pad, spread
from permgraph.rules.registry import aten, rule
from permgraph.rules.typed_tensor import TypedTensor

Windows = Sequence["int | None"]

LARGEST = """
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices
"""
ADAPTIVE_LARGEST = "adaptive_max_pool2d adaptive_max_pool3d"
MEANS = "avg_pool1d avg_pool2d avg_pool3d"
ADAPTIVE_MEANS = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
"""
RESAMPLING = """
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d
    upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d
"""
BORDERS = """
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
"""


# Neighbours along space may be equal where it stays put; elsewhere elements are so only where they were before.
@rule(*aten(LARGEST), values="derived", zeros="all", acts="homogeneous")
@rule(*aten(MEANS), values="derived", zeros="all", acts="product")
def pool(call: Call) -> None:
    """The largest, or the mean, of the elements in each window."""
    x, out = call["self"], call.out
    kernel = call["kernel_size"]
    space = _space(call)
    given = (kernel, call.get("stride") or kernel, call["padding"], call.get("dilation", [1]))
    sizes = zip(x.shape[-space:], out.shape[-space:], strict=True)
    along = zip(sizes, *(spread(numbers, space) for numbers in given), strict=True)
    _over_space(call, [_window(*ends, *numbers) for ends, *numbers in along])


@rule(*aten(ADAPTIVE_LARGEST), values="derived", zeros="all", acts="homogeneous")
@rule(*aten(ADAPTIVE_MEANS), values="derived", zeros="all", acts="product")
def adaptive_pool(call: Call) -> None:
    """The same, with as many windows as are asked for: they overlap unless their number divides the size."""
    space = _space(call)
    sizes = zip(call["self"].shape[-space:], call.out.shape[-space:], strict=True)
    _over_space(call, [before // after if after and before % after == 0 else None for before, after in sizes])


@rule(*aten(RESAMPLING), values="derived", zeros="all", acts="product")
def resample(call: Call) -> None:
    """Space at another resolution: at the same size it is the same, unless a scale other than one is given."""
    space = _space(call)
    x: TypedTensor = call.get("self", call.tensors[0])
    sizes = zip(x.shape[-space:], call.out.shape[-space:], _scales(call, space), strict=True)
    _over_space(call, [1 if before == after and scale in (None, 1) else None for before, after, scale in sizes])


def _scales(call: Call, space: int) -> Sequence[float | None]:
    """The scale that was given for each dimension of space, or None."""
    if "scale_factors" in call.arguments:
        return call.get("scale_factors") or [None] * space
    if space == 1:
        return [call.get("scales")]
    return [call.get(f"scales_{side}") for side in "dhw"[-space:]]


@rule(*aten(BORDERS), values="derived", zeros="all", acts="product")
def border(call: Call) -> None:
    """Space with a border that is made from it."""
    _bordered(call, call["padding"])


@rule(*aten("pad _pad_circular"), values="padded")
def pad(call: Call) -> None:
    """Constants around the last dimensions, or what these hold themselves, in order."""
    if call.get("mode") == "constant":
        constant_pad(call)
    else:
        _bordered(call, call["pad"])


def _bordered(call: Call, padding: Sequence[int]) -> None:
    margins = [padding[i : i + 2] for i in range(0, len(padding), 2)]  # of the last dimension first
    _over_space(call, [None if any(margin) else 1 for margin in reversed(margins)])


@rule(*aten("max_unpool2d max_unpool3d"), values="padded", zeros="all")
def max_unpool(call: Call) -> None:
    """Elements go where an index says that they came from."""
    _over_space(call, [None] * _space(call))


def _space(call: Call) -> int:
    """How many dimensions of space there are, by the operator's name."""
    name = str(call.node.target)
    return next(int(digit) for digit in "123" if f"{digit}d" in name)


def _window(before: int, after: int, kernel: int, stride: int, padding: int, dilation: int) -> int | None:
    """The window along a dimension with these sizes of the argument and the result."""
    disjoint = padding == 0 and (after == 1 or stride == kernel) and (kernel == 1 or dilation == 1)
    return kernel if disjoint and after * kernel == before else None


def _over_space(call: Call, windows: Windows) -> None:
    """Each channel by itself. Where it is read which element of a window was the largest, all of space stays put."""
    x, *others = call.tensors
    if any(out.read for out in call.results[1:]):
        windows = [None] * len(windows)
    lead = call.names(x.ndim - len(windows))
    ins, outs = ([pattern(i, window) for i, window in enumerate(windows)] for pattern in (_argument, _result))
    before, after = (" ".join([lead, *labels]) for labels in (ins, outs))
    indices = [(other, before) for other in others]  # of max_unpool
    places = {f"k{i}": window for i, window in enumerate(windows) if window is not None and window > 1}
    call.link((x, before), *indices, *((out, after) for out in call.results), via=(), why=SPACE, **places)


def _argument(i: int, window: int | None) -> str:
    """The labels of a dimension of space of the argument."""
    return f"s{i}!" if window is None else f"t{i}" if window == 1 else f"(t{i} k{i})"


def _result(i: int, window: int | None) -> str:
    """The labels of that dimension of the result."""
    return f"t{i}!" if window is None else f"t{i}"


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


@rule(*aten("im2col col2im"), values="padded", zeros="all", acts="product")
def columns(call: Call) -> None:
    """Windows of an image as columns, (n, c·kernel, windows); or such columns, added up into an image."""
    x: TypedTensor = call["self"]
    lead = "n " if max(x.ndim, call.out.ndim) == 4 else ""
    size = max((x.shape, call.out.shape), key=len)[-2:]
    kernel, stride, padding, dilation = (
        spread(call[name], 2) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    sides = list(zip(size, kernel, stride, padding, dilation, strict=True))
    count = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides]
    windows = [_window(n, count[i], k, s, p, d) for i, (n, k, s, p, d) in enumerate(sides)]
    fixed = ["!" if window is None else "" for window in windows]
    image = " ".join(f"s{i}!" if window is None else f"(t{i} k{i})" for i, window in enumerate(windows))
    places, numbers = (" ".join(f"{label}{i}{fixed[i]}" for i in range(2)) for label in "kt")
    before, after = f"{lead}c {image}", f"{lead}(c {places}) ({numbers})"
    if x.ndim < call.out.ndim:
        before, after = after, before
    sizes = {"k0": kernel[0], "k1": kernel[1], "t0": count[0], "t1": count[1]}
    call.link((x, before), (call.out, after), via=(), why=SPACE, **sizes)
