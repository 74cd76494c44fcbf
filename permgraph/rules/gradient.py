"""Derivatives: what autograd calls where a model differentiates itself in its forward pass."""

from __future__ import annotations

from permgraph.rules.call import Call
from permgraph.rules.convolution import SPACE, convolution_slots
from permgraph.rules.normalisation import layer_norm_labels
from permgraph.rules.registry import aten, rule
from permgraph.rules.shape import link_windows

SMOOTH = "gelu_backward log_sigmoid_backward mish_backward sigmoid_backward silu_backward tanh_backward"
BROKEN = """
    elu_backward hardshrink_backward hardsigmoid_backward hardswish_backward hardtanh_backward leaky_relu_backward
    logit_backward softplus_backward softshrink_backward threshold_backward
"""  # with a constant slope somewhere


@rule(*aten(SMOOTH), values="product")
@rule(*aten(BROKEN), values="repeat")
def pointwise(call: Call) -> None:
    """A gradient times the derivative at each element."""
    call.pointwise(*call.tensors, *call.results)


@rule(*aten("mse_loss_backward smooth_l1_loss_backward huber_loss_backward binary_cross_entropy_backward"))
def loss(call: Call) -> None:
    """Element by element; the gradient of a mean or a sum is one number."""
    call.pointwise(*call.tensors, call.out)


@rule(*aten("_softmax_backward_data _log_softmax_backward_data"), values="derived")
def softmax(call: Call) -> None:
    """Elementwise, but for a sum along the dimension of the softmax."""
    gradient, y = call["grad_output"], call["output"]
    dim = call.dim(y)
    every = call.names(y)
    call.link((gradient, every), (y, every), (call.out, every), via=[call.names(y, skip=[dim])])


@rule("aten.native_layer_norm_backward", values="derived")
def layer_norm(call: Call) -> None:
    """The gradient of the input has sums over the normalised dimensions; those of weight and bias over the others."""
    x = call["input"]
    lead, last = layer_norm_labels(call)
    every = f"{lead} {last}"
    statistics = [(call[name], " ".join([lead, *("_" for _ in last.split())])) for name in ("mean", "rstd")]
    results = [(out, every if out.shape == x.shape else last) for out in call.results]
    call.link((call["grad_out"], every), (x, every), *statistics, (call.get("weight"), last), *results, via=[lead])


@rule("aten.convolution_backward", values="mixed")
def convolution(call: Call) -> None:
    """Three maps of the result's gradient: with the weight that of the input, with the input that of the weight."""
    slots = convolution_slots(call, call["input"], call["weight"], call["grad_output"])
    x, weight, (_, channels), gradient = slots
    of_x, of_weight, of_bias = call.outs
    for made, (_, pattern), other in ((of_x, x, weight), (of_weight, weight, x)):
        if made is not None:
            call.link(gradient, other, (made, pattern), why=SPACE, g=call["groups"])
    if of_bias is not None:
        call.link(gradient, (of_bias, channels), why=SPACE, g=call["groups"])


@rule(*aten("slice_backward select_backward"), values="padded", zeros="all")
def scattered(call: Call) -> None:
    """Zeros, with the gradient where the slice was."""
    gradient, out = call["grad_output"], call.out
    dim = call.dim(out)
    if "index" in call.arguments:
        at = call["index"] % out.shape[dim]
        call.take(out, gradient, dim, at, at + 1, keep=False)
    elif call["step"] == 1:
        start = min(call["start"] % (out.shape[dim] + 1) if call["start"] < 0 else call["start"], out.shape[dim])
        call.take(out, gradient, dim, start, start + gradient.shape[dim])
    else:
        call.pin_all([gradient, out], "taken with a step")


@rule("aten.unfold_backward", values="padded", zeros="all", acts="product")
def unfold(call: Call) -> None:
    """Each element's gradient is the sum of those that it has in all windows."""
    gradient, out = call["grad_in"], call.out
    link_windows(call, out, gradient, call.dim(out))
