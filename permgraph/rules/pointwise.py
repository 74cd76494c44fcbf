"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

from permgraph.rules.call import Call
from permgraph.rules.registry import aten, rule

DISTINCT = """
    acos acosh arccos digamma dequantize erfc exp exp2 frexp lgamma log log10 log2 log_sigmoid log_sigmoid_forward
    logaddexp logaddexp2 polygamma sigmoid softplus special_expit special_ndtr
"""
DISTINCT_AND_ZERO_AT_ZERO = """
    celu conj _conj conj_physical expm1 frac gelu log1p mish selu silu special_expm1 special_log1p
"""
ODD = "arcsin arctan asin asinh atan atanh erf erfinv sin sinh tan tanh"
REPEATING = """
    angle __and__ atan2 bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil
    complex copysign fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine_cachemask
    _fake_quantize_per_tensor_affine_cachemask_tensor_qparams floor floor_divide fmod hardsigmoid heaviside
    __iand__ igamma igammac __ilshift__ imag int_repr __ior__ __irshift__ isfinite isinf isnan isneginf isposinf
    __ixor__ logical_and logical_not logical_or logical_xor logit __lshift__ nan_to_num nextafter __or__ polar
    quantize_per_tensor real remainder __rshift__ signbit __xor__
"""
REPEATING_AND_ZERO_AT_ZERO = "hardswish relu6"
REPEATING_AND_ODD = "hardshrink round softshrink trunc"
CLIPPING = "clamp clamp_max clamp_min clip hardtanh threshold"
PRODUCTS = "addcdiv addcmul lerp"
OF_ONE = """
    special_airy_ai special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1 special_entr special_erfcx
    special_i0e special_i1 special_i1e special_log_ndtr special_modified_bessel_i0 special_modified_bessel_i1
    special_modified_bessel_k0 special_modified_bessel_k1 special_ndtri special_scaled_modified_bessel_k0
    special_scaled_modified_bessel_k1 special_spherical_bessel_j0
"""
OF_TWO = """
    gcd lcm special_chebyshev_polynomial_t special_chebyshev_polynomial_u special_hermite_polynomial_h
    special_hermite_polynomial_he special_laguerre_polynomial_l special_legendre_polynomial_p special_zeta
"""


# Forward-mode derivatives are written in torch's own primitive operators.
@rule(*aten(DISTINCT), values="distinct")
@rule(*aten("add sub subtract rsub"), values="distinct", repeats_if_zero=("alpha",), acts="sum")
@rule("prims.add", "prims.sub", values="distinct")
@rule(*aten(DISTINCT_AND_ZERO_AT_ZERO), values="distinct", zeros="all")
@rule(*aten("neg negative deg2rad rad2deg resolve_neg"), "prims.neg", values="distinct", zeros="all", acts="product")
@rule(*aten(ODD), values="distinct", zeros="all", acts="odd")
@rule(*aten("cos cosh i0 sinc"), values="distinct", acts="even")
@rule("aten.abs", values="distinct", zeros="all", acts="absolute")
@rule("aten.square", values="distinct", zeros="all", acts="square")
@rule("aten.sqrt", values="distinct", zeros="all", acts="root")
@rule("aten.hypot", values="distinct", zeros="all", acts="homogeneous")
@rule("aten.rsqrt", values="distinct", acts="inverse root")
@rule("aten.reciprocal", values="distinct", acts="reciprocal")
@rule("aten.leaky_relu", values="distinct", zeros="all", repeats_if_zero=("negative_slope",), acts="homogeneous")
@rule(*aten("elu"), values="distinct", zeros="all", repeats_if_zero=("alpha", "scale", "input_scale"))
@rule(*aten("pow float_power"), values="product", repeats_if_zero=("self", "exponent"), acts="power")
@rule(*aten("mul multiply"), "prims.mul", values="product", zeros="any", repeats_if_zero=("other",), acts="product")
@rule(*aten("div divide true_divide"), values="product", repeats_if_zero=("self",), acts="quotient")
@rule(*aten(PRODUCTS), "prims.div", values="product", repeats_if_zero=("self",))
@rule(*aten("special_xlog1py xlogy"), values="product", repeats_if_zero=("self", "other"))
@rule(*aten(REPEATING), values="repeat")
@rule(*aten(REPEATING_AND_ZERO_AT_ZERO), values="repeat", zeros="all")
@rule(*aten(REPEATING_AND_ODD), values="repeat", zeros="all", acts="odd")
@rule(*aten("sgn sign"), values="repeat", zeros="all", acts="sign")
@rule(*aten(CLIPPING), values="repeat", acts="clip")
@rule("aten.relu", values="repeat", zeros="all", acts="homogeneous")
@rule(*aten("ge greater gt le less lt"), values="repeat", compares=True)
@rule(*aten("fmax fmin maximum minimum"), values="limit", zeros="all", acts="homogeneous")
@rule(*aten(OF_ONE + OF_TWO))
def arithmetic(call: Call) -> None:
    """Every operand and the result share their dimensions, counted from the last."""
    call.pointwise(*call.tensors, *call.results)
    for tensor in call.tensors:
        call.pin_values(tensor, "arithmetic on an index")


COPIES = """
    alias clone _conj_physical contiguous detach lift lift_fresh lift_fresh_copy positive resolve_conj to _to_copy
    type_as
"""


@rule(*aten(COPIES), values="same", zeros="all", acts="moved")
def copies(call: Call) -> None:
    """The same values in a new tensor."""
    if not call.tensors:  # a plain number, as `flex_attention` casts it
        return
    source = call.tensors[0]
    call.pointwise(source, call.out)
    call.carry_values(source, call.out, all_of_them=True)


@rule(*aten("eq ne not_equal"), values="repeat")
def equality(call: Call) -> None:
    """Comparing two indices of one axis is comparing their one-hot codes; with any other number it tells them apart."""
    if len(call.tensors) == 2:
        left, right = call.tensors
        if left.value is not None and right.value is not None and left.value.size == right.value.size:
            call.link((left, "... ; v"), (right, "... ; v"), (call.out, "..."))
            return
    arithmetic(call)


@rule("aten.copy", values="joined", acts="moved")
def copy(call: Call) -> None:
    """Overwrite a tensor with another, broadcast to it: what it held before no longer matters."""
    call.pointwise(call["src"], call.out)
    call.ignore_values(call["self"])
    call.share_values([call["src"], call.out])


@rule(*aten("where.self where.ScalarOther where.ScalarSelf where.Scalar"), values="choice", acts="choice")
def where(call: Call) -> None:
    """One tensor or the other, by a condition."""
    call.pointwise(*call.tensors, call.out)
    _choose(call, ("self", "other"))


@rule("aten.fill", values="padded")
@rule("aten.masked_fill", values="choice", acts="choice")
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


@rule(*aten("prelu _prelu_kernel"), values="derived", acts="slope")
def prelu(call: Call) -> None:
    """A slope for each channel, the second dimension of a plain tensor."""
    x, weight = call.tensors
    if weight.ndim == 1:
        call.link((x, "b c ..." if x.ndim > 1 else "c"), (weight, "c"), (call.out, "b c ..." if x.ndim > 1 else "c"))
    else:
        call.pointwise(x, weight, call.out)


@rule("aten.glu", values="derived", acts="gate")
def glu(call: Call) -> None:
    """The first half of a dimension, gated by the second half."""
    x, dim = call["self"], call.dim(call["self"], default=-1)
    half = call.out.shape[dim]
    for start in (0, half):
        call.take(x, call.out, dim, start, start + half)


@rule(*aten("native_dropout dropout feature_dropout alpha_dropout"), values="derived", acts="moved")
def dropout(call: Call) -> None:
    """The identity at inference; in a pass that training needs, noise whose numbering does not matter."""
    x = call.tensors[0]
    call.pointwise(x, *call.results)
    if call.get("train", True) and not call.exchangeable_noise:
        call.pin_all([x], "random values")


@rule(*aten("rrelu rrelu_with_noise"), values="repeat", acts="homogeneous")
def rrelu(call: Call) -> None:
    """The mean slope at inference; in a pass that training needs, noise whose numbering does not matter."""
    call.pointwise(call["self"], call.out)
    call.ignore_values(*call.tensors[1:])
    if call["training"] and not call.exchangeable_noise:
        call.pin_all([call["self"]], "random values")


@rule(*aten("bernoulli normal"))
def random(call: Call) -> None:
    """Random values have an order of their own, and which element they belong to matters, but for training's noise."""
    if call.exchangeable_noise:
        call.pointwise(*call.tensors, *call.results)
    else:
        call.pin_all([*call.tensors, *call.results], "random values")


@rule(*aten("rand_like randn_like uniform exponential rand randn"))
def noise(call: Call) -> None:
    """Random values in an order of their own, whatever the argument holds; training's noise has none that matters."""
    call.ignore_values(*call.tensors)
    if not call.exchangeable_noise:
        call.pin_all(call.results, "random values")


@rule(*aten("randint_like random randint randperm"))
def random_numbers(call: Call) -> None:
    """Whole numbers that may choose elements, in an order of their own."""
    call.ignore_values(*call.tensors)
    call.pin_all(call.results, "random values")


@rule("aten.multinomial")
def random_choice(call: Call) -> None:
    """Indices of an axis, each drawn by its weight: which one comes out depends on their order."""
    call.pin_all([*call.tensors, *call.results], "random values")


NO_DATA = """
    _assert_tensor_metadata _assert_async _assert_scalar sym_size is_pinned is_same_size _has_same_storage_numel
    _linalg_check_errors is_coalesced
"""


@rule(*aten(NO_DATA))
def no_data(call: Call) -> None:
    """Reads no element, or gives nothing back."""
    call.ignore_values(*call.tensors)


@rule("aten.item", "aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.allclose")
def read_value(call: Call) -> None:
    """Python reads one value, which no numbering of what led to it changes, unless it is an index itself."""
    call.pointwise(*call.tensors)
    for tensor in call.tensors:
        call.pin_values(tensor, "its value was read by Python code")


@rule("permgraph.elementwise")
def elementwise(call: Call) -> None:
    """A function of Python's own makes a number of each element, and of those of other tensors at its place."""
    call.pointwise(*call.tensors, call.out)
    for tensor in call.tensors:
        call.pin_values(tensor, "arithmetic on an index")


@rule("permgraph.values_leave_torch")
def leave(call: Call) -> None:
    """Code that is not torch reads all values, and may do anything with them."""
    call.pin_all(call.tensors, "its values were read outside torch")


@rule("permgraph.cut_anywhere", values="moved")
def cut_anywhere(call: Call) -> None:
    """A value says where the dimension is cut: on another one each of its indices may be on the other side.

    No element is read here, so that a part that nothing else reads counts as unread.
    """
    call.pin(call["tensor"], call["dim"], "where it is cut depends on values")


@rule("permgraph.same_memory")
def same_memory(call: Call) -> None:
    """Two parameters are one, the second with the dimensions of the first in another order."""
    tensor, turned, dims = call["tensor"], call["turned"], call["dims"]
    call.link((tensor, call.names(tensor)), (turned, " ".join(f"d{d}" for d in dims)))
