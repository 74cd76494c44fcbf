"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

from permgraph.rules.call import Call
from permgraph.rules.registry import rule

ARITHMETIC = """
    abs acos acosh add addcdiv addcmul __and__ angle arccos arcsin arctan asin asinh atan atan2 atanh bitwise_and
    bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min clip
    complex conj _conj conj_physical copysign cos cosh deg2rad dequantize digamma div divide elu erf erfc erfinv exp
    exp2 expm1 fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine_cachemask
    _fake_quantize_per_tensor_affine_cachemask_tensor_qparams float_power floor floor_divide fmax fmin fmod frac frexp
    ge gelu greater gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 __iand__ igamma igammac __ilshift__
    imag int_repr __ior__ __irshift__ isfinite isinf isnan isneginf isposinf __ixor__ le leaky_relu lerp less lgamma log
    log10 log1p log2 log_sigmoid log_sigmoid_forward logaddexp logaddexp2 logical_and logical_not logical_or logical_xor
    logit __lshift__ lt maximum minimum mish mul multiply nan_to_num neg negative nextafter __or__ polar polygamma pow
    quantize_per_tensor rad2deg real reciprocal relu relu6 remainder resolve_conj resolve_neg round __rshift__
    rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink special_expit special_expm1
    special_log1p special_ndtr special_xlog1py sqrt square sub subtract tan tanh threshold true_divide trunc xlogy
    __xor__
"""

COPIES = """
    alias clone contiguous detach lift lift_fresh lift_fresh_copy _to_copy to positive type_as
    resolve_conj _conj_physical
"""


# Forward-mode derivatives are written in torch's own primitive operators.
@rule(*(f"aten.{name}" for name in ARITHMETIC.split()), "prims.add", "prims.sub", "prims.mul", "prims.div", "prims.neg")
def arithmetic(call: Call) -> None:
    """Every operand and the result share their dimensions, counted from the last."""
    call.pointwise(*call.tensors, *call.results)
    for tensor in call.tensors:
        call.pin_values(tensor, "arithmetic on an index")


@rule(*(f"aten.{name}" for name in COPIES.split()))
def copies(call: Call) -> None:
    """The same values in a new tensor."""
    if not call.tensors:  # a plain number, as `flex_attention` casts it
        return
    source = call.tensors[0]
    call.pointwise(source, call.out)
    call.carry_values(source, call.out, all_of_them=True)


@rule("aten.eq", "aten.ne", "aten.not_equal")
def equality(call: Call) -> None:
    """Comparing two indices of one axis is comparing their one-hot codes; with any other number it tells them apart."""
    if len(call.tensors) == 2:
        left, right = call.tensors
        if left.value is not None and right.value is not None and left.value.size == right.value.size:
            call.link((left, "... ; v"), (right, "... ; v"), (call.out, "..."))
            return
    arithmetic(call)


@rule("aten.copy")
def copy(call: Call) -> None:
    """Overwrite a tensor with another, broadcast to it: what it held before no longer matters."""
    call.pointwise(call["src"], call.out)
    call.ignore_values(call["self"])
    call.share_values([call["src"], call.out])


@rule("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar")
def where(call: Call) -> None:
    """One tensor or the other, by a condition."""
    call.pointwise(*call.tensors, call.out)
    _choose(call, ("self", "other"))


@rule("aten.masked_fill", "aten.fill")
def masked_fill(call: Call) -> None:
    """The tensor, or one value where the mask is set."""
    call.pointwise(*call.tensors, call.out)
    _choose(call, ("self", "value"))


def _choose(call: Call, names: tuple[str, str]) -> None:
    """The result's values are those of one of two arguments: indices only if both index the same axis."""
    chosen = [call.get(name) for name in names]
    tensors = [value for value in chosen if not isinstance(value, (int, float, bool, complex, type(None)))]
    if len(tensors) == 2:
        call.share_values([*tensors, call.out])
    else:
        for tensor in tensors:
            call.pin_values(tensor, "an index is mixed with a number")


@rule("aten.prelu", "aten._prelu_kernel")
def prelu(call: Call) -> None:
    """A slope for each channel, the second dimension of a plain tensor."""
    x, weight = call.tensors
    if weight.ndim == 1:
        call.link((x, "b c ..." if x.ndim > 1 else "c"), (weight, "c"), (call.out, "b c ..." if x.ndim > 1 else "c"))
    else:
        call.pointwise(x, weight, call.out)


@rule("aten.glu")
def glu(call: Call) -> None:
    """The first half of a dimension, gated by the second half."""
    x, dim = call["self"], call.dim(call["self"], default=-1)
    half = call.out.shape[dim]
    for start in (0, half):
        call.take(x, call.out, dim, start, start + half)


@rule("aten.native_dropout", "aten.dropout", "aten.feature_dropout", "aten.alpha_dropout")
def dropout(call: Call) -> None:
    """The identity at inference; while training, noise that no numbering survives."""
    x = call.tensors[0]
    call.pointwise(x, *call.results)
    if call.get("train", True):
        call.pin_all([x], "random values")


@rule("aten.rrelu", "aten.rrelu_with_noise")
def rrelu(call: Call) -> None:
    """The mean slope at inference; while training, noise that no numbering survives."""
    call.pointwise(call["self"], call.out)
    call.ignore_values(*call.tensors[1:])
    if call["training"]:
        call.pin_all([call["self"]], "random values")


@rule("aten.bernoulli", "aten.normal", "aten.multinomial")
def random(call: Call) -> None:
    """Random values have an order of their own, and which element they belong to matters."""
    call.pin_all([*call.tensors, *call.results], "random values")


@rule(
    "aten.rand_like", "aten.randn_like", "aten.randint_like", "aten.uniform", "aten.exponential", "aten.random",
    "aten.rand", "aten.randn", "aten.randint", "aten.randperm",
)  # fmt: skip
def noise(call: Call) -> None:
    """Random values in an order of their own, whatever the argument holds."""
    call.ignore_values(*call.tensors)
    call.pin_all(call.results, "random values")


@rule("aten._assert_tensor_metadata", "aten._assert_async", "aten._assert_scalar", "aten.sym_size", "aten.is_pinned",
      "aten.is_same_size", "aten._has_same_storage_numel", "aten._linalg_check_errors")  # fmt: skip
def no_data(call: Call) -> None:
    """Reads no element, or gives nothing back."""
    call.ignore_values(*call.tensors)


@rule("aten.item", "aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.allclose")
def read_value(call: Call) -> None:
    """Python reads one value, which no numbering of what led to it changes, unless it is an index itself."""
    call.pointwise(*call.tensors)
    for tensor in call.tensors:
        call.pin_values(tensor, "its value was read by Python code")


@rule("permgraph.values_leave_torch")
def leave(call: Call) -> None:
    """Code that is not torch reads all values, and may do anything with them."""
    call.pin_all(call.tensors, "its values were read outside torch")


@rule("permgraph.same_memory")
def same_memory(call: Call) -> None:
    """Two parameters are one, the second with the dimensions of the first in another order."""
    tensor, turned, dims = call["tensor"], call["turned"], call["dims"]
    names = [f"d{d}" for d in range(tensor.ndim)]
    call.link((tensor, " ".join(names)), (turned, " ".join(names[d] for d in dims)))
