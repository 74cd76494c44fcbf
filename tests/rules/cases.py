# ruff: noqa: E501 (it is a table)
# fmt: off
"""The table of cases: for each operator, arguments and the axes that its rule should give, a row each.

Sizes that have nothing to do with each other are different primes. In the axes a letter is a free axis, a dot stays
put, ``;`` comes before the axis that an index tensor's values number, ``where a per b`` says which axes may be permuted
differently where. Names of letters do not matter. After ``~`` stands why a rule denies a symmetry that is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from permgraph.rules import rule
from permgraph.rules.recurrent import gru_cell, lstm_cell
from permgraph.verification.rule import RuleReport, check_rule
from permgraph.verification.trial_of_rule import attempt, undivided

aten = torch.ops.aten


@dataclass(frozen=True)
class Made:
    """A tensor that each case makes anew, from a generator of its own."""

    kind: str
    shape: tuple[int, ...]
    high: int = 2

    def make(self, generator: torch.Generator) -> torch.Tensor:
        if self.kind == "float":
            return torch.rand(self.shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1
        if self.kind == "normal":
            return torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if self.kind == "complex":
            return torch.randn(self.shape, generator=generator, dtype=torch.complex128)
        if self.kind == "distinct":
            return torch.randperm(self.high, generator=generator)[: self.shape[0]]
        if self.kind == "bool":
            return torch.rand(self.shape, generator=generator) < 0.5
        count = math.prod(self.shape)  # as many different ones as there can be
        return (torch.randperm(count, generator=generator) % self.high).reshape(self.shape)


def F(*shape: int) -> Made:
    """Between 0.1 and 0.9, where every function is defined."""
    return Made("float", shape)


def N(*shape: int) -> Made:
    """Standard normal."""
    return Made("normal", shape)


def C(*shape: int) -> Made:
    """Complex."""
    return Made("complex", shape)


def Z(high: int, *shape: int) -> Made:
    """Integers from zero to below `high`, all of them if there is room."""
    return Made("int", shape, high)


def D(high: int, count: int) -> Made:
    """Distinct integers from zero to below `high`."""
    return Made("distinct", (count,), high)


def B(*shape: int) -> Made:
    """True or false."""
    return Made("bool", shape)


@dataclass(frozen=True)
class Case:
    """One row of the table; `strict` says why the rule denies some symmetry, where it knowingly does."""

    name: str
    op: Callable[..., Any]
    args: tuple[Any, ...]
    axes: str
    strict: str = ""

    def check(self) -> RuleReport:
        args, kwargs = self._arguments()
        return check_rule(self.op, *args, **kwargs)

    def operators(self) -> tuple[str, ...]:
        """The operators that run."""
        return attempt(self.op, *self._arguments()).operators

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        args = tree_map(lambda leaf: leaf.make(generator) if isinstance(leaf, Made) else leaf, self.args)
        kwargs = args[-1] if args and isinstance(args[-1], dict) else {}
        return args[:-1] if kwargs else args, kwargs


def fused(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, scale: torch.Tensor, channels: int, by: bool) -> Any:
    """What training for quantised inference runs: observe, then round, here by the channels of the first dimension."""
    on, zero = torch.ones(1, dtype=torch.int64), torch.zeros(channels, dtype=torch.int32)
    seen = [tensor.float() for tensor in (low, high, scale)]
    return aten._fused_moving_avg_obs_fq_helper(x.float(), on, on, *seen, zero, 0.01, -8, 7, 0, by, True)


def op(name: str) -> Any:
    """``"add.Tensor"``, or ``"mm"`` for the default overload."""
    base, _, overload = name.partition(".")
    return getattr(getattr(aten, base), overload or "default")


def rows(*table: Sequence[Any]) -> list[Case]:
    """A row is an operator's name (or a title and a function), arguments, and the axes; a dict at the end is keywords.

    Operators that this version of torch has not got are left out.
    """
    cases = []
    for name, *rest, axes in table:
        titled = rest and callable(rest[0]) and not isinstance(rest[0], Made)
        if not titled and not hasattr(aten, name.partition(".")[0]):
            continue
        function = rest.pop(0) if titled else op(name)
        expected, _, strict = axes.partition(" ~ ")
        cases.append(Case(name, function, tuple(rest), expected, strict))
    return cases


def each(names: str, *args: Any) -> list[Case]:
    """The same arguments and axes for several operators."""
    return rows(*((name, *args) for name in names.split()))


PAIR = "(a b) -> (a b) where b per a"
TWO = "(a b), (a b) -> (a b) where b per a"

def _marked(size: int, at: int) -> torch.Tensor:
    """Zeros with a one, written through a view."""
    zeros = torch.zeros(size, dtype=torch.float64)
    zeros.narrow(0, at, 1).fill_(1.0)
    return zeros


POINTWISE = [
    *each(
        """abs acosh angle arccos arcsin arctan acos asin asinh atan atanh ceil celu conj conj_physical cos cosh deg2rad
        digamma elu erf erfc erfinv exp exp2 expm1 floor frac gelu hardshrink hardsigmoid hardswish hardtanh i0 isfinite
        isinf isnan isneginf isposinf leaky_relu lgamma log log10 log1p log2 log_sigmoid logical_not logit mish
        nan_to_num neg negative positive rad2deg real reciprocal relu relu6 round rsqrt selu sgn sigmoid sign signbit
        silu sin sinc sinh softplus softshrink special_expit special_expm1 special_log1p special_ndtr sqrt square tan
        tanh trunc resolve_conj resolve_neg alias clone contiguous detach lift lift_fresh lift_fresh_copy _to_copy
        relu_ sigmoid_ neg_ detach_ exp_ square_ silu_ hardswish_ leaky_relu_ tanh_""",
        N(2, 3), PAIR,
    ),
    *each(
        """add.Tensor sub.Tensor subtract.Tensor mul.Tensor multiply.Tensor div.Tensor divide.Tensor true_divide.Tensor
        atan2 fmax fmin fmod.Tensor float_power.Tensor_Tensor floor_divide ge.Tensor greater.Tensor
        gt.Tensor hypot le.Tensor less.Tensor logaddexp logaddexp2 lt.Tensor maximum minimum polar
        complex pow.Tensor_Tensor remainder.Tensor rsub.Tensor special_xlog1py xlogy.Tensor clamp_min.Tensor clamp_max.Tensor max.other min.other
        add_.Tensor mul_.Tensor div_.Tensor sub_.Tensor""",
        F(2, 3), F(2, 3), TWO,
    ),
    *each("add.Scalar sub.Scalar mul.Scalar div.Scalar pow.Tensor_Scalar fmod.Scalar remainder.Scalar rsub.Scalar "
          "ge.Scalar gt.Scalar le.Scalar lt.Scalar eq.Scalar ne.Scalar clamp_min clamp_max add_.Scalar "
          "float_power.Tensor_Scalar copysign.Scalar", N(2, 3), 0.5, PAIR),
    *each("__and__.Tensor __or__.Tensor __xor__.Tensor __iand__.Tensor __ior__.Tensor __ixor__.Tensor __ilshift__.Tensor __irshift__.Tensor __lshift__.Tensor "
          "__rshift__.Tensor bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor bitwise_left_shift.Tensor "
          "bitwise_right_shift.Tensor", Z(9, 2, 3), Z(9, 2, 3), TWO),
    *each("eq.Tensor ne.Tensor not_equal.Tensor", Z(3, 3, 5), Z(3, 3, 5), TWO),
    *each("copysign.Tensor", N(3, 5), N(3, 5), TWO),
    *each("logical_and logical_or logical_xor", B(3, 5), B(3, 5), TWO),
    *rows(
        ("heaviside", N(3, 5), N(3, 5), TWO + " ~ the second matters only where the first is zero"),
        ("nextafter", F(2, 3), F(2, 3), TWO + " ~ the results differ by less than can be told"),
        ("type_as", F(2, 3), F(5), "(a b), (c) -> (a b) where b per a"),
        ("copy", F(2, 3), F(2, 3), "(c d), (a b) -> (a b) where b per a, d per c"),
        ("copy_", F(2, 3), F(2, 3), TWO + " ~ what was there before no longer matters, but it is the same memory"),
        ("add.Tensor", F(7, 1, 3), F(5, 3), "(a 1 b), (c b) -> (a c b) where a per b, c per b"),
        ("mul.Tensor", F(3), F(2, 3), "(b), (a b) -> (a b) where a per b"),
        ("add.Tensor", F(2, 3), F(), "(a b), () -> (a b) where b per a"),
        ("bitwise_not", Z(9, 2, 3), PAIR),
        ("addcmul", F(2, 3), F(2, 1), F(3), "(a b), (a 1), (b) -> (a b)"),
        ("addcdiv", F(2, 3), F(2, 3), F(2, 3), "(a b), (a b), (a b) -> (a b) where b per a"),
        ("lerp.Tensor", F(2, 3), F(2, 3), F(3), "(a b), (a b), (b) -> (a b) where a per b"),
        ("clamp", N(2, 3), 0.1, 0.5, PAIR),
        ("clip", N(2, 3), 0.1, 0.5, PAIR),
        ("clamp.Tensor", N(2, 3), F(3), None, "(a b), (b) -> (a b) where a per b"),
        ("threshold", N(2, 3), 0.1, 0.5, PAIR),
        ("polygamma", 1, F(2, 3), PAIR),
        ("pow.Scalar", 2, F(2, 3), PAIR),
        ("imag", C(2, 3), PAIR),
        ("_conj", C(2, 3), PAIR),
        ("_conj_physical", C(2, 3), PAIR),
        ("log_sigmoid_forward", F(2, 3), "(a b) -> (a b), (a b) where b per a"),
        ("quantize then dequantize",
         lambda x: aten.dequantize(aten.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)), F(2, 3), PAIR),
        ("int_repr", lambda x: aten.int_repr(aten.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)), F(2, 3), PAIR),
        ("fake_quantize_per_tensor_affine", F(2, 3), 0.1, 0, -8, 7, PAIR),
        ("fake_quantize_per_tensor_affine_cachemask", F(2, 3), 0.1, 0, -8, 7, "(a b) -> (a b), (a b) where b per a"),
        ("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
         lambda x: aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(
             x, torch.full((1,), 0.1), torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int64), -8, 7),
         F(2, 3), "(a b) -> (a b), (a b) where b per a"),
        ("fake_quantize_per_channel_affine_cachemask",
         lambda x, scale, zero: aten.fake_quantize_per_channel_affine_cachemask(
             x.float(), scale.float() / 9, zero.int(), 1, -8, 7),
         F(2, 5, 3), F(5), Z(4, 5), "(a b c), (b), (b) -> (a b c), (a b c) where a per b, c per a b"),
        ("_fused_moving_avg_obs_fq_helper, by channel", lambda x, low, high, scale: fused(x, low, high, scale, 5, True),
         F(5, 2, 3), F(5), F(5), F(5), "(a b c), (a), (a), (a) -> (a b c), (a b c) where b per a, c per a b ~ the old scale is not read, and rounding hides others"),
        ("_fused_moving_avg_obs_fq_helper", lambda x, low: fused(x, low, low, low, 1, False),
         F(2, 5, 3), F(1), "(a b c), (1) -> (a b c), (a b c) where b per a c, c per a"),
        ("rrelu", N(2, 3), PAIR),
        ("rrelu_with_noise", lambda x: aten.rrelu_with_noise(x, torch.zeros_like(x)), N(2, 3), PAIR),
        ("rrelu_with_noise, training", lambda x: aten.rrelu_with_noise(x, torch.zeros_like(x), training=True), N(2, 3),
         "(. .) -> (. .)"),
        ("frexp.Tensor", F(2, 3), "(a b) -> (a b), (a b) where b per a"),
        ("igamma", F(2, 3), F(3), "(a b), (b) -> (a b) where a per b"),
        ("igammac", F(2, 3), F(3), "(a b), (b) -> (a b) where a per b"),
        ("_linalg_check_errors",
         lambda x: (aten._linalg_check_errors(torch.zeros((), dtype=torch.int32), "inv", is_matrix=True), x * 2)[1],
         F(2, 3), PAIR),
        ("to.dtype", F(2, 3), torch.float32, PAIR),
        ("copy_", F(2, 3), F(3), "(a b), (b) -> (a b) where a per b ~ as above"),
        ("where.self", B(2, 3), F(2, 3), F(3), "(a b), (a b), (b) -> (a b) where a per b"),
        ("where.ScalarOther", B(2, 3), F(2, 3), 0.0, TWO),
        ("where.ScalarSelf", B(2, 3), 0.0, F(2, 3), TWO),
        ("where.Scalar", B(2, 3), 0.0, 1.0, PAIR),
        ("masked_fill.Scalar", F(2, 3), B(2, 3), -1.0, TWO),
        ("masked_fill_.Scalar", F(2, 5), torch.tensor([True, False, True, True, False]), -1.0,
         "(a b), (b) -> (a b) where a per b"),
        ("masked_fill.Tensor", F(2, 3), B(2, 3), F(), "(a b), (a b), () -> (a b) where b per a"),
        ("fill_.Tensor", F(2, 3), F(), "(a b), () -> (a b) where b per a"),
        ("prelu", N(2, 3, 5), F(3), "(n c s), (c) -> (n c s) where n per c, s per c n"),
        ("prelu", N(2, 3), F(1), "(n c), (1) -> (n c) where c per n"),
        ("_prelu_kernel", N(2, 3, 5), F(1, 3, 1), "(n c s), (1 c 1) -> (n c s) where n per c, s per c n"),
        ("prelu", N(3), F(1), "(c), (1) -> (c)"),
        ("glu", F(2, 6), -1, "(a [b + b]) -> (a b) where b per a"),
        ("glu", F(6, 2), 0, "([b + b] a) -> (b a) where b per a"),
        ("native_dropout", F(2, 3), 0.5, False, "(a b) -> (a b), (a b) where b per a"),
        ("native_dropout", F(2, 3), 0.5, True, "(. .) -> (. .), (. .) ~ which elements survive depends on the seed"),
        *((name, F(2, 3), 0.5, False, PAIR) for name in ("dropout", "feature_dropout", "alpha_dropout")),
        ("alpha_dropout", F(2, 3), 0.5, True, "(. .) -> (. .) ~ as above"),
    ),
]

NOISE = [
    *each("rand_like randn_like uniform exponential random", F(2, 3), "(a b) -> (. .) where b per a"),
    *rows(
        ("uniform_", F(2, 3), "(. .) -> (. .) ~ what was there before no longer matters, but it is the same memory"),
        ("randint_like", F(2, 3), 9, "(a b) -> (. .) where b per a"),
        ("bernoulli", F(2, 3), "(. .) -> (. .) ~ two elements may draw the same number by chance"),
        ("normal.Tensor_float", F(2, 3), 1.0, "(. .) -> (. .)"),
        ("multinomial", F(2, 3), 2, "(. .) -> (. .) ~ as above"),
        ("rand", [2, 3], "() -> (. .)"),
        ("randn", [2, 3], "() -> (. .)"),
        ("randint", 9, [2, 3], "() -> (. .)"),
        ("randperm", 5, "() -> (.)"),
    ),
]

READS = rows(
    ("_assert_tensor_metadata", F(2, 3), "(a b) -> () where b per a"),
    ("_assert_async", lambda x: (aten._assert_async(x.sum() > 0), x * 2)[1], F(2, 3), PAIR),
    ("_assert_scalar", lambda x: (aten._assert_scalar(True, "no"), x * 2)[1], F(2, 3), PAIR),
    ("sym_size.int", F(2, 3), 0, "(a b) -> () where b per a"),
    ("is_pinned", lambda x: (undivided(aten.is_pinned.default)(x), x * 2)[1], F(2, 3), PAIR),
    ("item", lambda x: x * undivided(aten.item.default)(x[0, 0]), F(2, 3), "(s:[1 + 1] [1 + {a | b}@s]) -> (s:[1 + 1] [1 + {a | b}@s])"),
    ("item of an index", lambda x: x * x.argmax().item(), F(5), "(.) -> (.)"),
    ("_local_scalar_dense", lambda x, y: x * y.sum().item(), F(2, 3), F(5), "(a b), (c) -> (a b) where b per a"),
    ("is_nonzero", lambda x: x * undivided(aten.is_nonzero.default)(x.sum()), F(2, 3), PAIR),
    ("equal", lambda x, y: x * (not torch.equal(x, y)), F(2, 3), F(2, 3),
     "(a b), (a b) -> (a b) where b per a ~ the tensors are not equal, however one is numbered"),
    ("allclose", lambda x, y: x * (not undivided(aten.allclose.default)(x, y)), F(2, 3), F(2, 3),
     "(a b), (a b) -> (a b) where b per a ~ as above"),
    ("is_same_size", lambda x, y: x * undivided(aten.is_same_size.default)(x, y), F(2, 3), F(2, 3),
     "(a b), (c d) -> (a b) where b per a, d per c"),
    ("_has_same_storage_numel", lambda x, y: x * undivided(aten._has_same_storage_numel.default)(x, y), F(2, 3), F(2, 3),
     "(a b), (c d) -> (a b) where b per a, d per c"),
    ("_is_all_true", B(2, 3), "(a b) -> () where b per a"),
)

LINEAR = rows(
    ("addmm", F(5), F(2, 3), F(3, 5), "(o), (m k), (k o) -> (m o)"),
    ("addmm", F(2, 5), F(2, 3), F(3, 5), "(m o), (m k), (k o) -> (m o)"),
    ("addmm", F(2, 1), F(2, 3), F(3, 5), "(m 1), (m k), (k o) -> (m o)"),
    ("addmm_", F(2, 5), F(2, 3), F(3, 5), "(m o), (m k), (k o) -> (m o)"),
    ("_addmm_activation", F(5), F(2, 3), F(3, 5), "(o), (m k), (k o) -> (m o)"),
    ("mm", F(2, 3), F(3, 5), "(m k), (k o) -> (m o)"),
    ("mm", lambda x: x @ x, F(3, 3), "(a a) -> (a a)"),
    ("mm", lambda x: x @ x.t(), F(2, 3), "(a b) -> (a a)"),
    ("bmm", F(7, 2, 3), F(7, 3, 5), "(b m k), (b k o) -> (b m o) where m per b, k per b, o per b"),
    ("baddbmm", F(5), F(7, 2, 3), F(7, 3, 5), "(o), (b m k), (b k o) -> (b m o) where m per b, k per b"),
    ("baddbmm", F(2, 5), F(7, 2, 3), F(7, 3, 5), "(m o), (b m k), (b k o) -> (b m o) where k per b"),
    ("baddbmm", F(7, 1, 5), F(7, 2, 3), F(7, 3, 5),
     "(b 1 o), (b m k), (b k o) -> (b m o) where m per b, k per b, o per b"),
    ("mv", F(2, 3), F(3), "(m k), (k) -> (m)"),
    ("addmv", F(2), F(2, 3), F(3), "(m), (m k), (k) -> (m)"),
    ("dot", F(3), F(3), "(k), (k) -> ()"),
    ("vdot", F(3), F(3), "(k), (k) -> ()"),
    ("ger", F(2), F(3), "(m), (n) -> (m n)"),
    ("outer", F(2), F(3), "(m), (n) -> (m n)"),
    ("addr", F(2, 3), F(2), F(3), "(m n), (m), (n) -> (m n)"),
    ("addr", F(3), F(2), F(3), "(n), (m), (n) -> (m n)"),
    ("addbmm", F(2, 5), F(7, 2, 3), F(7, 3, 5), "(m o), (b m k), (b k o) -> (m o) where b per k"),
    ("addbmm", F(5), F(7, 2, 3), F(7, 3, 5), "(o), (b m k), (b k o) -> (m o) where b per k"),
    ("linear", F(7, 2, 3), F(5, 3), F(5), "(b m k), (o k), (o) -> (b m o) where b per m"),
    ("linear", F(2, 3), F(5, 3), None, "(m k), (o k) -> (m o)"),
    ("bilinear", lambda x, y, w: torch.nn.functional.bilinear(x, y, w), F(2, 3), F(2, 5), F(7, 3, 5),
     "(n a), (n b), (o a b) -> (n o)"),
    ("_trilinear", F(2, 3), F(2, 5), F(3, 5, 7), [2, 3], [1, 3], [0], [1, 2], "(n a), (n b), (a b o) -> (n o)"),
    ("_cdist_forward", F(7, 2, 3), F(7, 5, 3), 2.0, None,
     "(b m k), (b n k) -> (b m n) where m per b, k per b, n per b"),
    ("_euclidean_dist", F(2, 3), F(5, 3), "(m k), (n k) -> (m n)"),
    ("cdist", F(2, 3), F(5, 3), "(m k), (n k) -> (m n)"),
    ("linalg_matrix_exp", F(2, 3, 3), "(b m m) -> (b m m) where m per b"),
    ("matrix_exp", F(3, 3), "(m m) -> (m m)"),
    ("matrix_power", F(3, 3), 3, "(m m) -> (m m)"),
    ("linalg_inv_ex", F(2, 3, 3), "(b r c) -> (b c r), (b) where r per b, c per b"),
    ("linalg_solve_triangular", F(2, 5, 5), F(2, 5, 3), {"upper": False}, "(a . .), (a . b) -> (a . b) where b per a"),
)

CONVOLUTION = rows(
    ("convolution", F(2, 5, 7, 11), F(3, 5, 2, 2), F(3), [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
     "(n i . .), (o i . .), (o) -> (n o . .)"),
    ("convolution", F(2, 5, 7), F(3, 5, 3), None, [2], [1], [1], False, [0], 1, "(n i .), (o i .) -> (n o .)"),
    ("convolution", F(2, 6, 7), F(15, 2, 3), F(15), [1], [0], [1], False, [0], 3,
     "(n (g i) .), ((g o) i .), ((g o)) -> (n (g o) .) where n per g, i per g, o per g"),
    ("convolution", F(2, 5, 7), F(5, 1, 3), F(5), [1], [0], [1], False, [0], 5,
     "(n g .), (g 1 .), (g) -> (n g .) where n per g"),
    ("convolution", F(2, 5, 7), F(5, 3, 3), F(3), [1], [0], [1], True, [0], 1, "(n i .), (i o .), (o) -> (n o .)"),
    ("convolution", F(2, 6, 7), F(6, 5, 3), F(15), [2], [1], [1], True, [1], 3,
     "(n (g i) .), ((g i) o .), ((g o)) -> (n (g o) .) where n per g, i per g, o per g"),
    ("convolution", F(2, 5, 7), F(3, 5, 1), F(3), [1], [0], [1], False, [0], 1,
     "(n i s), (o i 1), (o) -> (n o s) where s per n"),
    ("convolution", F(2, 5, 7), F(3, 5, 1), F(3), [2], [0], [1], False, [0], 1, "(n i .), (o i 1), (o) -> (n o .) ~ each position by itself"),
    ("convolution", F(2, 5, 7), F(3, 5, 1), F(3), [1], [1], [1], False, [0], 1,
     "(n i .), (o i 1), (o) -> (n o .) ~ as above"),
    ("convolution", F(2, 5, 7), F(3, 5, 7), F(3), [1], [0], [1], False, [0], 1, "(n i k), (o i k), (o) -> (n o 1) where k per i"),
    ("convolution", F(2, 5, 7), F(3, 5, 7), F(3), [1], [1], [1], False, [0], 1, "(n i .), (o i .), (o) -> (n o .)"),
    ("_convolution", F(2, 5, 7), F(3, 5, 2), F(3), [1], [0], [1], False, [0], 1, False, False, True, True,
     "(n i .), (o i .), (o) -> (n o .)"),
    ("mkldnn_convolution", lambda x, w, b: undivided(aten.mkldnn_convolution.default)(
        x.float(), w.float(), b.float(), [0, 0], [1, 1], [1, 1], 1), F(2, 5, 7, 7), F(3, 5, 2, 2), F(3),
     "(n i . .), (o i . .), (o) -> (n o . .)"),
)

_IMAGE = "(n c . .) -> (n c . .) where n per c"
_LINE = "(n c .) -> (n c .) where n per c"
_CUBE = "(n c . . .) -> (n c . . .) where n per c"
SPACE = rows(
    ("max_pool1d", F(3, 2, 7), [3], [1], _LINE),
    ("max_pool2d", F(3, 2, 7, 5), [3, 2], [1, 1], _IMAGE),
    ("max_pool3d", F(3, 2, 7, 5, 4), [2, 2, 2], [1, 1, 1], _CUBE),
    ("max_pool2d_with_indices", F(3, 2, 7, 5), [2, 2], "(n c . .) -> (n c . .), (n c . .) where n per c"),
    ("max_pool3d_with_indices", F(3, 2, 7, 5, 4), [2, 2, 2], "(n c . . .) -> (n c . . .), (n c . . .) where n per c"),
    ("avg_pool1d", F(3, 2, 7), [3], [1], _LINE),
    ("avg_pool2d", F(3, 2, 7, 5), [3, 2], [1, 1], _IMAGE),
    ("avg_pool2d", F(3, 7, 5), [3, 2], [1, 1], "(c . .) -> (c . .)"),
    ("avg_pool3d", F(3, 2, 7, 5, 4), [2, 2, 2], [1, 1, 1], _CUBE),
    ("adaptive_avg_pool1d", F(3, 2, 7), [5], _LINE),
    ("adaptive_avg_pool2d", F(3, 2, 7, 5), [5, 4], _IMAGE),
    ("adaptive_avg_pool3d", F(3, 2, 7, 5, 4), [5, 4, 3], _CUBE),
    ("_adaptive_avg_pool2d", F(3, 2, 7, 5), [1, 1], "(n c h w) -> (n c 1 1) where n per c, w per c n, h per c n w"),
    ("_adaptive_avg_pool2d", F(3, 2, 7, 5), [5, 1], "(n c h! w) -> (n c . 1) where n per c, w per c h! n"),
    ("_adaptive_avg_pool3d", F(3, 2, 7, 5, 4), [5, 4, 3], _CUBE),
    ("adaptive_max_pool2d", F(3, 2, 7, 5), [2, 2], "(n c . .) -> (n c . .), (n c . .) where n per c"),
    ("adaptive_max_pool3d", F(3, 2, 7, 5, 4), [2, 2, 2], "(n c . . .) -> (n c . . .), (n c . . .) where n per c"),
    ("fractional_max_pool2d", F(3, 2, 7, 11), [2, 2], [3, 5], F(3, 2, 2),
     "(n c . .), (n c .) -> (n c . .), (n c . .) where n per c"),
    ("max_unpool2d", lambda x: aten.max_unpool2d(*aten.max_pool2d_with_indices(x, [2, 2]), [7, 5]), F(3, 2, 7, 5),
     _IMAGE + " ~ windows that do not overlap"),
    ("max_unpool3d", lambda x: aten.max_unpool3d(*aten.max_pool3d_with_indices(x, [2, 2, 2]), [7, 5, 4], [2, 2, 2], [0, 0, 0]),
     F(3, 2, 7, 5, 4), _CUBE + " ~ as above"),
    ("fractional_max_pool3d", F(3, 2, 7, 11, 5), [2, 2, 2], [3, 5, 2], F(3, 2, 3),
     "(n c . . .), (n c .) -> (n c . . .), (n c . . .) where n per c"),
    ("upsample_nearest1d", F(3, 2, 7), [11], _LINE + " ~ space stays put also where it need not"),
    ("upsample_nearest2d", F(3, 2, 7, 5), [11, 13], _IMAGE + " ~ as above"),
    ("upsample_nearest3d", F(3, 2, 7, 5, 4), [9, 8, 9], _CUBE + " ~ as above"),
    ("upsample_linear1d", F(3, 2, 7), [11], False, _LINE),
    ("upsample_bilinear2d", F(3, 2, 7, 5), [11, 13], False, _IMAGE),
    ("upsample_trilinear3d", F(3, 2, 7, 5, 4), [9, 8, 9], False, _CUBE),
    ("upsample_bicubic2d", F(3, 2, 7, 5), [11, 13], False, _IMAGE),
    ("_upsample_bilinear2d_aa", F(3, 2, 7, 5), [11, 13], False, _IMAGE),
    ("_upsample_bicubic2d_aa", F(3, 2, 7, 5), [11, 13], False, _IMAGE),
    ("_upsample_nearest_exact1d", F(3, 2, 7), [11], _LINE),
    ("_upsample_nearest_exact2d", F(3, 2, 7, 5), [11, 13], _IMAGE),
    ("_upsample_nearest_exact3d", F(3, 2, 7, 5, 4), [9, 8, 9], _CUBE + " ~ as above"),
    ("reflection_pad1d", F(3, 2, 7), [1, 2], _LINE + " ~ the middle has no order"),
    ("reflection_pad2d", F(3, 2, 7, 5), [1, 2, 1, 0], _IMAGE + " ~ as above"),
    ("reflection_pad3d", F(3, 2, 7, 5, 4), [1, 2, 1, 0, 1, 1], _CUBE + " ~ as above"),
    ("replication_pad1d", F(3, 2, 7), [1, 2], _LINE + " ~ as above"),
    ("replication_pad2d", F(3, 2, 7, 5), [1, 2, 1, 0], _IMAGE + " ~ as above"),
    ("replication_pad3d", F(3, 2, 7, 5, 4), [1, 2, 1, 0, 1, 1], _CUBE + " ~ as above"),
    ("_pad_circular", F(3, 2, 7, 5), [1, 2, 1, 0], _IMAGE + " ~ as above"),
    ("pad", F(3, 2, 7), [1, 2], "reflect", _LINE + " ~ as above"),
    ("pad", F(2, 3), [2, 0], "(a b) -> (a [c + b]) where b per a, c per a"),
    ("constant_pad_nd", F(2, 3), [2, 5], 1.5, "(a b) -> (a [c + b + d]) where b per a, c per a, d per a"),
    ("constant_pad_nd", F(2, 5), [-2, 0], "(a [c + b]) -> (a b) where b per a, c per a"),
    ("constant_pad_nd", F(2, 3), [0, 0, 2, 1], "(a b) -> ([c + a + 1] b) where a per b, c per b"),
    ("pixel_shuffle", F(2, 12, 5, 7), 2, "(n (c p q) h w) -> (n c (h p) (w q)) where n per p q, c per n p q, p per q, h per c n p q, w per c h n p q"),
    ("pixel_unshuffle", F(2, 3, 10, 14), 2, "(n c (h p) (w q)) -> (n (c p q) h w) where n per p q, c per n p q, h per c n p q, p per q, w per c h n p q"),
    ("channel_shuffle", F(2, 6, 5), 3, "(n (g c) s) -> (n (c g) s) where n per c, g per c n, s per c g n"),
    ("native_channel_shuffle", F(2, 6, 5, 7), 3, "(n (g c) s t) -> (n (c g) s t) where n per c, g per c n, s per c g n, t per c g n s"),
    ("im2col", F(2, 3, 5, 7), [2, 2], [1, 1], [0, 0], [1, 1], "(n c . .) -> (n (c 4) .) where c per n"),
    ("im2col", F(3, 5, 7), [2, 2], [1, 1], [0, 0], [1, 1], "(c . .) -> ((c 4) .)"),
    ("col2im", F(2, 12, 24), [5, 7], [2, 2], [1, 1], [0, 0], [1, 1], "(n (c 4) .) -> (n c . .) where c per n"),
    ("col2im", F(12, 24), [5, 7], [2, 2], [1, 1], [0, 0], [1, 1], "((c 4) .) -> (c . .)"),
    ("grid_sampler", F(2, 3, 5, 7), N(2, 11, 13, 2), 0, 0, False, "(n c . .), (n s t .) -> (n c s t) where c per n, s per n, t per n s"),
    ("grid_sampler_2d", F(2, 3, 5, 7), N(2, 11, 13, 2), 0, 0, False, "(n c . .), (n s t .) -> (n c s t) where c per n, s per n, t per n s"),
    ("grid_sampler_3d", F(2, 3, 5, 7, 4), N(2, 5, 3, 4, 3), 0, 0, False,
     "(n c . . .), (n s t u .) -> (n c s t u) where c per n, s per n t u, t per n, u per n t"),
)

_NORMED = "(n c s), (c), (c), (c), (c) -> "
NORMALISATION = rows(
    ("native_batch_norm", F(2, 3, 5), F(3), F(3), F(3), F(3), False, 0.1, 1e-5,
     _NORMED + "(n c s), (.), (.) where n per c, s per c n"),
    ("native_batch_norm", F(2, 3, 5), F(3), F(3), None, None, True, 0.1, 1e-5,
     "(n c s), (c), (c) -> (n c s), (c), (c) where n per c, s per c n"),
    ("_native_batch_norm_legit", F(2, 3, 5), F(3), F(3), F(3), F(3), True, 0.1, 1e-5,
     _NORMED + "(n c s), (c), (c), (c), (c) where n per c, s per c n"),
    ("_native_batch_norm_legit.no_stats", F(2, 3, 5), F(3), F(3), True, 0.1, 1e-5,
     "(n c s), (c), (c) -> (n c s), (c), (c) where n per c, s per c n"),
    ("_native_batch_norm_legit_no_training", F(2, 3, 5), F(3), F(3), F(3), F(3), 0.1, 1e-5,
     _NORMED + "(n c s), (.), (.) where n per c, s per c n"),
    ("_native_batch_norm_legit_functional", F(2, 3, 5), F(3), F(3), F(3), F(3), True, 0.1, 1e-5,
     _NORMED + "(n c s), (c), (c), (c), (c) where n per c, s per c n"),
    ("batch_norm", F(2, 3, 5), F(3), None, F(3), F(3), False, 0.1, 1e-5, False,
     "(n c s), (c), (c), (c) -> (n c s) where n per c, s per c n"),
    ("_batch_norm_with_update", F(2, 3, 5), F(3), F(3), F(3), F(3), 0.1, 1e-5,
     _NORMED + "(n c s), (c), (c), (.), (c), (c) where n per c, s per c n"),
    ("_batch_norm_no_update", F(2, 3, 5), F(3), F(3), F(3), F(3), 0.1, 1e-5,
     _NORMED + "(n c s), (.), (.), (.) where n per c, s per c n"),
    ("native_layer_norm", F(2, 3, 5), [5], F(5), F(5), 1e-5, "(a b c), (c), (c) -> (a b c), (a b 1), (a b 1) where b per a"),
    ("native_layer_norm", F(2, 3, 5), [5], None, None, 1e-5,
     "(a b c) -> (a b c), (a b 1), (a b 1) where b per a, c per a b"),
    ("layer_norm", F(2, 3, 5), [3, 5], F(3, 5), F(3, 5), "(a b c), (b c), (b c) -> (a b c) where c per b"),
    ("_fused_rms_norm", F(2, 3), [3], F(3), 1e-5, "(a b), (b) -> (a b), (a 1)"),
    ("rms_norm", F(2, 3), [3], F(3), "(a b), (b) -> (a b)"),
    ("native_group_norm", F(2, 15, 7), F(15), F(15), 2, 15, 7, 3, 1e-5,
     "(n (g i) s), ((g i)), ((g i)) -> (n (g i) s), (n g), (n g) where n per g, i per g, s per g i n"),
    ("native_group_norm", F(2, 15, 7), None, None, 2, 15, 7, 3, 1e-5,
     "(n (g i) s) -> (n (g i) s), (n g), (n g) where g per n, i per g n, s per g i n"),
    ("group_norm", F(2, 15, 7, 11), 3, F(15), F(15), "(n (g i) s t), ((g i)), ((g i)) -> (n (g i) s t) where n per g, i per g, s per g i n, t per g i n s"),
    ("_weight_norm_interface", F(2, 3, 5), F(2, 1, 1), 0, "(a b c), (a 1 1) -> (a b c), (a 1 1) where b per a, c per a b"),
    ("_weight_norm_interface", F(2, 3, 5), F(1, 1, 5), 2, "(a b c), (1 1 c) -> (a b c), (1 1 c) where a per c, b per a c"),
    ("_weight_norm", F(2, 3), F(2, 1), 0, "(a b), (a 1) -> (a b) where b per a"),
)

_SDPA = "(b h s d), (b h t d), (b h t e)"
_EACH = " where h per b, s per b h, t per b h, d per b h, e per b h"
ATTENTION = rows(
    ("scaled_dot_product_attention", F(2, 3, 5, 7), F(2, 3, 11, 7), F(2, 3, 11, 13), _SDPA + " -> (b h s e)" + _EACH),
    ("_scaled_dot_product_flash_attention_for_cpu", F(2, 3, 5, 7), F(2, 3, 11, 7), F(2, 3, 11, 7),
     "(b h s d), (b h t d), (b h t e) -> (b h s e), (b h s)" + _EACH),
    ("_scaled_dot_product_attention_math", F(2, 3, 5, 7), F(2, 3, 11, 7), F(2, 3, 11, 13),
     _SDPA + " -> (b h s e), (b h s t)" + _EACH),
    ("scaled_dot_product_attention", F(2, 3, 5, 7), F(2, 3, 11, 7), F(2, 3, 11, 13), F(5, 11),
     "(b h s d), (b h t d), (b h t e), (s t) -> (b h s e) where h per b, d per b h, e per b h"),
    ("scaled_dot_product_attention", F(2, 3, 5, 7), F(2, 3, 11, 7), F(2, 3, 11, 13), F(3, 1, 11),
     "(b h s d), (b h t d), (b h t e), (h 1 t) -> (b h s e) where b per h, s per b h, t per h, d per b h, e per b h"),
    ("scaled_dot_product_attention", F(2, 3, 5, 7), F(2, 3, 5, 7), F(2, 3, 5, 11), None, 0.0, True,
     "(b h . d), (b h . d), (b h . e) -> (b h . e) where h per b, d per b h, e per b h ~ the first query sees one key"),
    ("scaled_dot_product_attention", F(1, 6, 5, 7), F(1, 3, 11, 7), F(1, 3, 11, 13), {"enable_gqa": True},
     "(1 (h r) s d), (1 h t d), (1 h t e) -> (1 (h r) s e) where r per h, s per h r, d per h, t per h, e per h"),
)

# The fused cells run on a GPU only: here is what they compute, as operators of the same schema with the same rules.
_library = torch.library.Library("permgraph_cells", "DEF")
_library.define(
    "lstm(Tensor input_gates, Tensor hidden_gates, Tensor cx, Tensor? input_bias, Tensor? hidden_bias) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "gru(Tensor input_gates, Tensor hidden_gates, Tensor hx, Tensor? input_bias, Tensor? hidden_bias) -> (Tensor, Tensor)"
)
rule("permgraph_cells.lstm")(lstm_cell)
rule("permgraph_cells.gru")(gru_cell)


def _lstm(a: torch.Tensor, b: torch.Tensor, cx: torch.Tensor, c: Any, d: Any) -> tuple[torch.Tensor, ...]:
    gates = a + b + (0 if c is None else c + d)
    i, f, g, o = gates.chunk(4, 1)
    cell = f.sigmoid() * cx + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell, torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], 1)


def _gru(a: torch.Tensor, b: torch.Tensor, hx: torch.Tensor, c: Any, d: Any) -> tuple[torch.Tensor, ...]:
    (r, z, n), (hr, hz, hn) = (a if c is None else a + c).chunk(3, 1), (b if d is None else b + d).chunk(3, 1)
    reset, update = (r + hr).sigmoid(), (z + hz).sigmoid()
    new = (n + reset * hn).tanh()
    return new + update * (hx - new), torch.cat([reset, update, new, hx, hn], 1)


_library.impl("lstm", _lstm, "CompositeExplicitAutograd")
_library.impl("gru", _gru, "CompositeExplicitAutograd")
_cells = torch.ops.permgraph_cells
_FOUR = "(b (4 h)), (b (4 h)), (b h)"
RECURRENT = rows(
    ("lstm cell", _cells.lstm.default, F(2, 12), F(2, 12), F(2, 3), F(12), F(12),
     _FOUR + ", ((4 h)), ((4 h)) -> (b h), (b h), (b (4 h)) where b per h"),
    ("lstm cell", _cells.lstm.default, F(2, 12), F(2, 12), F(2, 3), None, None, _FOUR + " -> (b h), (b h), (b (4 h)) where h per b"),
    ("_pack_padded_sequence", lambda x: aten._pack_padded_sequence(x, torch.tensor([5, 4, 2]), True)[0], F(3, 5, 2), "(. . a) -> (. a) ~ rows only move about"),
    ("gru cell", _cells.gru.default, F(2, 9), F(2, 9), F(2, 3), F(9), F(9), "(b (3 h)), (b (3 h)), (b h), ((3 h)), ((3 h)) -> (b h), (b (5 h)) where b per h"),
)

CREATION = [
    *each("zeros_like ones_like", F(2, 3),
          "(a b) -> (c d) where b per a, d per c"),
    *rows(
        ("zeros", [2, 3], "() -> (a b) where b per a"),
        ("ones", [2, 3], "() -> (a b) where b per a"),
        ("full", [2, 3], 1.5, "() -> (a b) where b per a"),
        ("full_like", F(2, 3), 1.5, "(a b) -> (c d) where b per a, d per c"),
        ("empty.memory_format", lambda: torch.empty(2, 3).zero_(), "() -> (a b) where b per a"),
        ("empty_like", lambda x: torch.empty_like(x).fill_(1.5), F(2, 3), "(a b) -> (c d) where b per a, d per c"),
        ("new_zeros", F(2, 3), [5, 7], "(a b) -> (c d) where b per a, d per c"),
        ("new_ones", F(2, 3), [5, 7], "(a b) -> (c d) where b per a, d per c"),
        ("new_full", F(2, 3), [5, 7], 1.5, "(a b) -> (c d) where b per a, d per c"),
        ("new_empty", lambda x: x.new_empty([5, 7]).zero_(), F(2, 3), "(a b) -> (c d) where b per a, d per c"),
        ("new_empty_strided", lambda x: x.new_empty_strided([5, 7], [7, 1]).zero_(), F(2, 3),
         "(a b) -> (c d) where b per a, d per c"),
        ("empty_strided", lambda: torch.empty_strided([5, 7], [7, 1]).zero_(), "() -> (a b) where b per a"),
        ("empty_permuted", lambda: torch.empty_permuted([5, 7], [1, 0]).zero_(), "() -> (a b) where b per a"),
        ("scalar_tensor", 1.5, "() -> ()"),
        ("zero", F(2, 3), "(a b) -> (c d) where b per a, d per c"),
        ("zero_", F(2, 3), PAIR),
        ("fill.Scalar", F(2, 3), 1.5, "(a b) -> (c d) where b per a, d per c"),
        ("_efficientzerotensor", lambda: aten._efficientzerotensor([2, 3]).clone(), "() -> (a b) where b per a"),
        ("arange", 5, "() -> (a ; a)"),
        ("arange.start", 0, 5, "() -> (a ; a)"),
        ("arange.start", 1, 5, "() -> (.)"),
        ("arange.start_step", 0, 5, 2, "() -> (.)"),
        ("arange", 5.0, "() -> (.)"),
        ("arange to float", lambda: torch.arange(5).double(), "() -> (.)"),
        ("arange times two", lambda: torch.arange(5) * 2, "() -> (.)"),
        ("linspace", 0, 1, 5, "() -> (.)"),
        ("logspace", 0, 1, 5, "() -> (.)"),
        ("tril_indices", 3, 3, "() -> (. .)"),
        ("triu_indices", 3, 3, "() -> (. .)"),
        *((f"{name}_window", 5, "() -> (.)") for name in ("hann", "hamming", "bartlett", "blackman")),
        ("eye", 3, "() -> (a a)"),
        ("eye.m", 3, 5, "() -> (. .)"),
        ("writing into zeros", lambda x: torch.zeros(7).double().index_fill_(0, torch.tensor([2]), 1.0) * x, F(7),
         "(.) -> (.) ~ only one element is singled out"),
        ("writing one element of zeros", lambda x: _marked(7, 2) * x, F(7), "([a + 1 + b]) -> ([a + 1 + b])"),
    ),
]

REDUCTION = [
    *each("sum mean prod var std norm.Scalar linalg_vector_norm any all nansum count_nonzero amax amin max "
          "min median nanmedian", F(2, 3), "(a b) -> () where b per a"),
    *each("var_mean std_mean aminmax", F(2, 3), "(a b) -> (), () where b per a"),
    *each("sum.dim_IntList mean.dim amax amin var.dim std.dim nansum logsumexp frobenius_norm.dim", F(2, 3, 5), [-1],
          "(a b c) -> (a b) where b per a, c per a b"),
    *each("sum.dim_IntList mean.dim amax logsumexp frobenius_norm.dim", F(2, 3, 5), [0, 2], True,
          "(a b c) -> (1 b 1) where a per b, c per a b"),
    *each("prod.dim_int any.dim all.dim count_nonzero", F(2, 3), 1, PAIR.replace("(a b) where", "(a) where")),
    *each("max.dim min.dim median.dim nanmedian.dim mode", F(2, 5), 1, "(a b) -> (a), (a ; b) where b per a"),
    *each("max.dim min.dim median.dim mode", F(2, 5), -1, True, "(a b) -> (a 1), (a 1 ; b) where b per a"),
    *each("argmax argmin", F(2, 5), 1, "(a b) -> (a ; b) where b per a"),
    *each("argmax argmin", F(5), "(a) -> (; a)"),
    *each("_softmax _log_softmax", F(2, 5, 3), -2, False, "(a b c) -> (a b c) where b per a c, c per a"),
    *each("softmax.int log_softmax.int _safe_softmax", F(2, 5), 0, "(a b) -> (a b) where a per b"),
    *each("cumsum cumprod logcumsumexp", F(2, 5), -1, "(a .) -> (a .)"),
    *each("cummax cummin", F(2, 5), -1, "(a .) -> (a .), (a .)"),
    *rows(
        ("linalg_vector_norm", F(2, 3), 3, [1], True, "(a b) -> (a 1) where b per a"),
        ("norm.ScalarOpt_dim", F(2, 3), 3, [1], "(a b) -> (a) where b per a"),
        ("linalg_norm", F(2, 3), "(a b) -> () where b per a"),
        ("linalg_norm", F(2, 3), 1, "(a b) -> () ~ here rows may differ from column to column"),
        ("linalg_norm", F(2, 3), 3, [1], "(a b) -> (a) where b per a"),
        ("linalg_norm", F(5, 2, 3), 1, [1, 2], "(n a b) -> (n) where a per n, b per n ~ as above"),
        ("linalg_norm.ord_str", F(2, 3), "nuc", "(a b) -> ()"),
        ("linalg_norm.ord_str", F(2, 3), "fro", "(a b) -> () where b per a"),
        ("var.correction", F(2, 3), [1], {"correction": 0}, "(a b) -> (a) where b per a"),
        ("aminmax", F(2, 3), {"dim": 0}, "(a b) -> (b), (b) where a per b"),
        ("any.dims", B(2, 3), [], PAIR),
        ("sum of an index", lambda x: x.argmax(1).sum(), F(2, 5), "(a .) -> ()"),
        ("arithmetic on an index", lambda x: x.argmax(1) * 3, F(2, 5), "(a .) -> (a)"),
        ("kthvalue", F(2, 5), 2, 1, "(a b) -> (a), (a ; b) where b per a"),
        ("argmax", F(2, 5), "(a b) -> (; (a b)) where b per a"),
        ("argmax", F(2, 5), 0, True, "(a b) -> (1 b ; a) where a per b"),
        ("topk", F(2, 5), 3, "(a b) -> (a .), (a . ; b) where b per a"),
        ("topk", F(5, 2), 3, 0, "(b a) -> (. a), (. a ; b) where b per a"),
        ("sort", F(2, 5), "(a b) -> (a .), (a . ; b) where b per a"),
        ("sort.stable", F(2, 5), {"stable": True, "dim": 0}, "(b a) -> (. a), (. a ; b) where b per a"),
        ("argsort", F(2, 5), "(a b) -> (a . ; b) where b per a"),
        ("argsort.stable", F(2, 5), {"stable": True}, "(a b) -> (a . ; b) where b per a"),
            ("a running sum beside its terms", lambda x: x + x.cumsum(1), F(2, 5), "(a .) -> (a .)"),
        ("a transform beside its original", lambda x: x + aten._fft_c2c(x, [1], 0, True), C(2, 5), "(a .) -> (a .)"),
        ("a pool beside its original", lambda x: x + aten.avg_pool1d(x, [3], [1], [1]), F(3, 2, 7), "(a b .) -> (a b .) where a per b"),
        ("diff", F(2, 5), "(a .) -> (a .)"),
        ("diff", F(2, 5), 1, 1, F(2, 3), "(a .), (a .) -> (a .)"),
        ("flip", F(2, 5), [1], "(a .) -> (a .) ~ a reversal is not the same axis"),
        ("roll", F(2, 5), [2], [-1], "(a .) -> (a .) ~ as above"),
        ("roll", F(2, 5), [2], "(. .) -> (. .) ~ as above"),
        ("rot90", F(2, 5, 3), 1, [1, 2], "(a . .) -> (a . .) ~ as above"),
        ("rot90", F(2, 5), 2, [0, 1], "(. .) -> (. .) ~ as above"),
        ("cosine_similarity", F(2, 5), F(2, 5), "(a b), (a b) -> (a) where b per a"),
        ("cosine_similarity", F(2, 5), F(1, 5), "(a b), (1 b) -> (a)"),
        ("trace", F(5, 5), "(a a) -> ()"),
        ("trace", F(3, 5), "(. .) -> () ~ the rows beyond the diagonal may move"),
        ("renorm", F(2, 5, 3), 2, 0, 0.5, "(a b c) -> (a b c) where b per a c, c per a"),
        ("renorm", F(2, 5), 2, -1, 0.5, "(a b) -> (a b) where a per b"),
        ("linalg_cross", F(2, 3), F(2, 3), "(a .), (a .) -> (a .)"),
        ("linalg_cross", F(1, 3), F(2, 3), "(1 .), (a .) -> (a .)"),
        ("linalg_cross", F(3, 5), F(3, 5), {"dim": 0}, "(. a), (. a) -> (. a)"),
        ("cross", F(3, 5), F(3, 5), "(. a), (. a) -> (. a)"),
        ("binary_cross_entropy", F(2, 5), F(2, 5), F(5), 1, "(a b), (a b), (b) -> () where a per b"),
        ("binary_cross_entropy", F(2, 5), F(2, 5), F(5), 0, "(a b), (a b), (b) -> (a b) where a per b"),
        ("binary_cross_entropy_with_logits", N(2, 5), F(2, 5), F(2, 1), F(5), 2, "(a b), (a b), (a 1), (b) -> ()"),
        ("mse_loss", F(2, 5), F(2, 1), 1, "(a b), (a 1) -> () where b per a"),
    ),
    *each("mse_loss smooth_l1_loss huber_loss soft_margin_loss", N(2, 5), N(2, 5), 0, TWO),
    *each("mse_loss smooth_l1_loss huber_loss soft_margin_loss", N(2, 5), N(2, 5), "(a b), (a b) -> () where b per a"),
    *rows(
        ("a loss of a running index", lambda x, y: aten.mse_loss(x.argmax(1).double(), y), F(2, 5), F(2), "(a .), (a) -> ()"),
    ),
]

_SPLIT = "(s:[a + b + c] {d | e | f}@s) -> (a d), (b e), (c f) where d per a, e per b, f per c"
_MIDDLE = "(s:[a + b + c] {d | e | f}@s) -> (b e) where d per a, e per b, f per c"
_LIKE = "((a b) c), (d e f) -> (a b c) where b per a, c per a b, e per d, f per d e"
SHAPE = [
    *each("view _unsafe_view reshape _reshape_copy view_copy", F(6, 5), [2, 3, 5], "((a b) c) -> (a b c) where b per a, c per a b"),
    *each("numpy_T mT t adjoint matrix_H", F(2, 3), "(a b) -> (b a) where b per a"),
    *each("squeeze.dim unbind.int", F(1, 3), 0, "(1 a) -> (a)"),
    *each("tril triu", F(2, 5, 5), "(n r! c!) -> (n r! c!) where n per r! c!"),
    *each("swapaxes swapdims transpose.int", F(2, 3, 5), 0, -1, "(a b c) -> (c b a) where b per a, c per a b"),
    *each("unbind.int unbind_copy.int", F(3, 2), 0, "(s:[1 + 1 + 1] {a | b | c}@s) -> (a), (b), (c)"),
    *each("cat concat concatenate", [F(2, 3), F(5, 3)], 0, "(a b), (c d) -> (s:[a + c] {b | d}@s) where b per a, c per d"),
    *each("split_with_sizes unsafe_split_with_sizes split.sizes", F(10, 7), [2, 3, 5], 0, _SPLIT),
    *each("split.Tensor unsafe_split.Tensor split_copy.Tensor", F(6, 7), 2, 0, _SPLIT),
    *each("chunk unsafe_chunk tensor_split.sections", F(6, 7), 3, 0, _SPLIT),
    *rows(
        ("view", F(2, 3, 5), [-1], "(a b c) -> ((a b c)) where b per a, c per a b"),
        ("view", F(6, 5), [3, 10], "((a b) c) -> (a (b c)) where a per b, c per a b"),
        ("view", F(4, 6), [8, 3], "(a (b c)) -> ((a b) c) where a per b c, c per b"),
        ("view.dtype", F(2, 3), torch.int64, "(a b) -> (a b) where b per a"),
        ("view.dtype", F(2, 3), torch.int32, "(. .) -> (. .) ~ whole numbers may be moved"),
        ("_reshape_alias", F(6, 5), [2, 3, 5], [15, 5, 1], "((a b) c) -> (a b c) where b per a, c per a b"),
        ("flatten.using_ints", F(2, 3, 5), 1, "(a b c) -> (a (b c)) where b per a, c per a b"),
        ("unflatten.int", F(2, 15), -1, [3, 5], "(a (b c)) -> (a b c) where b per a, c per a b"),
        ("view_as", F(6, 5), F(2, 3, 5), _LIKE),
        ("reshape_as", F(6, 5), F(2, 3, 5), _LIKE),
        ("ravel", F(2, 3), "(a b) -> ((a b)) where b per a"),
        ("permute", F(2, 3, 5), [-1, 0, 1], "(a b c) -> (c a b) where b per a, c per a b"),
        ("permute_copy", F(2, 3, 5), [2, 0, 1], "(a b c) -> (c a b) where b per a, c per a b"),
        ("mH", C(2, 3, 5), "(a b c) -> (a c b) where b per a, c per a b"),
        ("numpy_T", F(2, 3, 5), "(a b c) -> (c b a) where b per a, c per a b"),
        ("movedim.int", F(2, 3, 5), 0, -1, "(a b c) -> (b c a) where b per a, c per a b"),
        ("movedim.intlist", F(2, 3, 5), [0, 1], [2, 0], "(a b c) -> (b c a) where b per a, c per a b"),
        ("unsqueeze", F(2, 3), -1, "(a b) -> (a b 1) where b per a"),
        ("unsqueeze", F(2, 3), 1, "(a b) -> (a 1 b) where b per a"),
        ("unsqueeze_", F(2, 3), 0, "(a b) -> (1 a b) where b per a"),
        ("squeeze", F(1, 2, 1), "(1 a 1) -> (a)"),
        ("squeeze.dims", F(1, 2, 1), [0, 1], "(1 a 1) -> (a 1)"),
        ("expand", F(2, 1), [5, 2, 3], "(a 1) -> (b a c) where b per a c, c per a"),
        ("expand_copy", F(2, 1), [-1, 3], "(a 1) -> (a b) where b per a"),
        ("broadcast_to", F(2, 1), [2, 3], "(a 1) -> (a b) where b per a"),
        ("expand_as", F(2, 1), F(2, 3), "(a 1), (b c) -> (a d) where c per b, d per a"),
        ("repeat", F(2, 3), [5, 1, 7], "(a b) -> (c a (d b)) where b per a, c per a b d, d per a b"),
        ("repeat", F(2, 1), [1, 7], "(a 1) -> (a d) where d per a"),
        ("tile", F(2, 3), [7], "(a b) -> (a (d b)) where b per a, d per a b"),
        ("repeat_interleave.self_int", F(2, 3), 5, 1, "(a b) -> (a (b c)) where b per a, c per a b"),
        ("repeat_interleave.self_int", F(2, 3), 5, "(. .) -> (.) ~ it arrives taken apart"),
        ("slice.Tensor", F(7, 5), 0, 2, 5, _MIDDLE),
        ("slice.Tensor", F(7, 5), -2, -3, 99, "(s:[a + b] {c | d}@s) -> (b d) where c per a, d per b"),
        ("slice.Tensor", F(6, 5), 0, 1, 6, 3,
         "(({a | b | c}@s s:[1 + 1 + 1]) d) -> (b d) where a per d, b per d, c per d ~ what is left out is free"),
        ("slice.Tensor", F(7, 5), 0, 0, 7, 2, "(. a) -> (. a) ~ every second one of seven"),
        ("slice_copy.Tensor", F(7, 5), 1, 0, 2, "({a | b}@s s:[c + d]) -> (a c) where a per c, b per d"),
        ("narrow", F(7, 5), 0, 2, 3, _MIDDLE),
        ("select.int", F(7, 5), 0, -2, "(s:[a + 1 + 1] {b | c | d}@s) -> (c) where a per b"),
        ("select_copy.int", F(7, 5), 1, 0, "({a | b}@s s:[1 + c]) -> (a) where b per c"),
        ("tensor_split.indices", F(10, 7), [2, 5], 0, _SPLIT),
        ("parts of parts", lambda w: [t for e in range(2) for t in w[e].chunk(2, 0)], F(2, 10, 3),
         "(s:[1 + 1] t:[{a | b}@s + {c | d}@s] {{e | f}@t | {g | h}@t}@s) -> (a e), (c f), (b g), (d h) where a per e, b per g, c per f, d per h"),
        ("cat", [F(2, 3), F(2, 5), F(2, 7)], -1,
         "(a b), (c d), (e f) -> ({a | c | e}@s s:[b + d + f]) where b per a, d per c, f per e"),
        ("cat", [F(2, 3)], -1, PAIR),
        ("stack", [F(2, 3), F(2, 3)], 1, "(a b), (c d) -> ({a | c}@s s:[1 + 1] {b | d}@s) where b per a, d per c"),
        ("stack", [F(2, 3), F(2, 3)], "(a b), (c d) -> (s:[1 + 1] {a | c}@s {b | d}@s) where b per a, d per c"),
        ("slice_scatter", F(7, 5), F(3, 5), 0, 2, 5,
         "([a + b + c] d), (b d) -> ([a + b + c] d) where a per d, b per d, c per d ~ what is overwritten is free"),
        ("slice_scatter", F(7, 5), F(4, 5), 0, 0, 7, 2, "(. .), (. .) -> (. .) ~ every second one of seven"),
        ("select_scatter", F(7, 5), F(5), 0, 2, "([a + 1 + b] c), (c) -> ([a + 1 + b] c) where a per c, b per c"),
        ("unfold", F(2, 15), 1, 3, 3, "(a (b c)) -> (a b c) where b per a c, c per a"),
        ("unfold", F(2, 15), 1, 5, 2, "(a .) -> (a . .)"),
        ("unfold_copy", F(2, 15), 1, 3, 3, "(a (b c)) -> (a b c) where b per a c, c per a"),
        ("diagonal", F(2, 3, 3), 0, 1, 2, "(a b b) -> (a b) where b per a"),
        ("diagonal", F(3, 5), "(. .) -> (.) ~ not square"),
        ("diagonal", F(3, 3), 1, "(. .) -> (.)"),
        ("diagonal_copy", F(3, 3), "(a a) -> (a)"),
        ("diag_embed", F(2, 3), "(a b) -> (a b b) where b per a"),
        ("diag", F(3), "(a) -> (a a)"),
        ("diag", F(3, 3), "(a a) -> (a)"),
        ("as_strided", F(2, 3), [3, 2], [1, 3], "(a b) -> (b a) where b per a"),
        ("as_strided", F(2, 3), [2, 2], [3, 1], "(. .) -> (. .) ~ a window of memory"),
        ("as_strided_copy", F(2, 3), [3, 2], [1, 3], "(a b) -> (b a) where b per a"),
        ("resize_", F(2, 3), [3, 2], "(. .) -> (. .) ~ as above"),
        ("set_.source_Tensor", F(2, 3), F(5), "(. .), (.) -> (.) ~ as above"),
        ("view_as_complex", F(3, 5, 2),
         "(a b .) -> (a b) where b per a ~ real and imaginary parts of all numbers may change places"),
        ("view_as_complex_copy", F(3, 5, 2), "(a b .) -> (a b) where b per a ~ as above"),
        ("view_as_real", C(3, 5), "(a b) -> (a b .) where b per a"),
        ("view_as_real_copy", C(3, 5), "(a b) -> (a b .) where b per a"),
        ("meshgrid.indexing", [F(2), F(3), F(5)], {"indexing": "ij"},
         "(a), (b), (c) -> (a d e), (f b g), (h i c) where d per a, e per a d, f per b, g per b f, h per c, i per c h"),
        ("meshgrid.indexing", [F(2), F(3), F(5)], {"indexing": "xy"},
         "(a), (b), (c) -> (d a e), (b f g), (h i c) where d per a, e per a d, f per b, g per b f, h per c i, i per c"),
    ),
]

one_hot = undivided(aten.one_hot.default)
INDEX = rows(
    ("embedding", F(5, 3), Z(5, 2, 7), "(. c), (a b) -> (a b c) where b per a"),
    ("embedding by argmax", lambda w, s: aten.embedding(w, s.argmax(1)), F(5, 3), F(2, 5, 7),
     "(v c), (a v b) -> (a b c) where b per a"),
    ("embedding of another size", lambda w, s: aten.embedding(w, s.argmax(1)), F(11, 3), F(2, 5, 7),
     "(. c), (a . b) -> (a b c) where b per a ~ an index below 5 leaves 6 of 11 rows alone"),
    ("_embedding_bag", F(5, 3), Z(5, 7), Z(1, 2), "(. c), (.), (.) -> (. c), (.), (.), (.) ~ all but c is pinned"),
    ("_embedding_bag_forward_only", F(5, 3), Z(5, 7), Z(1, 2), "(. c), (.), (.) -> (. c), (.), (.), (.) ~ as above"),
    ("embedding_bag", F(5, 3), Z(5, 7), Z(1, 2), "(. c), (.), (.) -> (. c), (.), (.), (.) ~ as above"),
    ("index_select", F(5, 3), 0, Z(5, 7), "(. c), (k) -> (k c) ~ rows looked up equally often may change places"),
    ("index_select by argmax", lambda x, s: x.index_select(1, s.argmax(1)), F(3, 5), F(7, 5), "(c e), (k e) -> (c k)"),
    ("index_select of an arange", lambda x: x.index_select(1, torch.arange(5)), F(3, 5), "(a b) -> (a b) where a per b"),
    ("index_select of an index", lambda x, s: x.argmax(1).index_select(0, s), F(3, 5), Z(3, 7), "(. e), (k) -> (k ; e)"),
    ("gather", F(2, 5), 1, Z(5, 2, 3), "(a .), (a b) -> (a b) where b per a"),
    ("gather by topk", lambda x, s: x.gather(1, s.topk(3, 1).indices), F(2, 5), F(2, 5),
     "(a b), (a b) -> (a .) where b per a"),
    ("gather by argmax", lambda x, s: x.gather(1, s.argmax(1, keepdim=True)), F(2, 5), F(2, 5),
     "(a b), (a b) -> (a 1) where b per a"),
    ("gather by another axis", lambda x, s: x.gather(1, s.argmax(1, keepdim=True)), F(2, 7), F(2, 5),
     "(a .), (a .) -> (a 1) ~ an index below 5 leaves two of seven alone"),
    ("nll_loss_forward", F(7, 5), Z(5, 7), None, 1, -100, "(a .), (a) -> (), ()"),
    ("nll_loss_forward", F(7, 5), Z(5, 7), F(5), 0, -100, "(a .), (a), (.) -> (a), ()"),
    ("nll_loss2d_forward", F(2, 5, 3, 7), Z(5, 2, 3, 7), None, 2, -100, "(a . b c), (a b c) -> (), () where b per a, c per a b"),
    ("a loss of the likeliest class", lambda x, s, w: aten.nll_loss_forward(x, s.argmax(1), w, 1, -100), F(2, 5), F(2, 5), F(5),
     "(a b), (a b), (b) -> (), ()"),
    ("a loss but for one class", lambda x, s: aten.nll_loss_forward(x, s.argmax(1), None, 1, 3), F(2, 5), F(2, 5),
     "(a .), (a .) -> (), () ~ the other classes are alike"),
    ("gather", F(5, 5, 3), 2, Z(3, 2, 5, 7),
     "(. a .), (. a b) -> (. a b) where b per a ~ what is not looked up is free"),
    ("scatter.src", F(2, 7), 1, Z(7, 2, 5), F(2, 5),
     "(a .), (a .), (a .) -> (a .) ~ writes to other places may change their order"),
    ("scatter.value", F(2, 7), 1, Z(7, 2, 5), 1.5, "(a .), (a b) -> (a .) where b per a"),
    ("scatter_.value by topk", lambda x, s: x.scatter_(1, s.topk(3, 1).indices, 1.0), F(2, 5), F(2, 5),
     "(a b), (a b) -> (a b) where b per a"),
    ("scatter by topk", lambda x, s, v: x.scatter(1, s.topk(3, 1).indices, v), F(2, 5), F(2, 5), F(2, 3),
     "(a b), (a b), (a .) -> (a b) where b per a ~ the ranks of one row"),
    ("scatter_add", F(2, 7), 1, Z(7, 2, 5), F(2, 5), "(a .), (a b), (a b) -> (a .) where b per a"),
    ("scatter_add by argmax", lambda x, s, v: x.scatter_add(0, s.argmax(1), v), F(5), F(7, 5), F(7),
     "(a), (b a), (b) -> (a)"),
    ("scatter_reduce.two", F(2, 7), 1, Z(7, 2, 5), F(2, 5), "amax", "(a .), (a b), (a b) -> (a .) where b per a"),
    ("index.Tensor", lambda x, i: x[:, i], F(2, 7, 3), Z(7, 11),
     "(a . b), (c) -> (a c b) where b per a ~ rows looked up equally often may change places"),
    ("index two at once", lambda x, i, j: x[i, :, j], F(5, 2, 7), Z(5, 11), Z(7, 11), "(. a .), (b), (b) -> (b a)"),
    ("index two neighbours", lambda x, i, j: x[:, i, j], F(2, 5, 7), Z(5, 11, 1), Z(7, 13),
     "(a . .), (b 1), (c) -> (a b c) ~ as above"),
    ("index by argmax", lambda x, s: x[s.argmax(1)], F(5, 3), F(7, 5), "(a b), (c a) -> (c b)"),
    ("index by arange and argmax", lambda x, s: x[torch.arange(7), s.argmax(1)], F(7, 5, 3), F(7, 5),
     "(a b c), (a b) -> (a c) where b per a, c per a"),
    ("index by topk", lambda w, s: w[s.topk(3, 1).indices], F(5, 3, 2), F(7, 5),
     "(a b c), (d a) -> (d . b c) where b per c"),
    ("index by a mask", lambda x, m: x[m], F(3, 5, 2), B(3, 5),
     "(. . a), (. .) -> (. a) ~ the rows that are chosen change places"),
    ("index by a mask behind", lambda x, m: x[:, m], F(3, 5, 2), B(5),
     "(a . b), (.) -> (a 1 b) where a per b ~ as above"),
    ("index by a mask and numbers", lambda x, m, i: x[m, i], F(3, 5, 2), torch.tensor([True, False, True]), Z(5, 2),
     "(. . .), (.), (.) -> (. .) ~ as above"),
    ("_unsafe_index.Tensor", F(5, 3), [Z(5, 2, 7)], "(. a), (b c) -> (b c a) where c per b"),
    ("index_put", F(7, 3), [Z(7, 11)], F(11, 3), True, "(. a), (b), (b a) -> (. a)"),
    ("index_put", F(7, 3), [Z(7, 11)], F(11, 3), "(. a), (.), (. a) -> (. a) ~ what is overwritten is free"),
    ("index_put", F(7, 3), [D(7, 5)], F(3), "(. a), (b), (a) -> (. a) ~ as above"),
    ("index_put", F(7, 3), [D(7, 5)], F(), "(. a), (b), () -> (. a) ~ as above"),
    ("index_put by argmax", lambda x, s, v: x.index_put((s.argmax(1),), v, accumulate=True), F(5, 3), F(7, 5), F(7, 3),
     "(a b), (c a), (c b) -> (a b)"),
    ("index_put by a mask", lambda x, m, v: x.index_put((m,), v), F(3, 5, 2), B(3, 5), F(2),
     "(a b c), (a b), (c) -> (a b c) where b per a"),
    ("index_put by a mask", lambda x, m, v: x.index_put((m,), v), F(3, 5), torch.arange(15).reshape(3, 5) % 3 == 0, F(5),
     "(. .), (. .), (.) -> (. .) ~ what is overwritten is free"),
    ("_index_put_impl", F(7, 3), [Z(7, 11)], F(11, 3), True, False, "(. a), (b), (b a) -> (. a)"),
    ("_unsafe_index_put", F(7, 3), [Z(7, 11)], F(11, 3), True, "(. a), (b), (b a) -> (. a)"),
    ("index_add", F(7, 3), 0, Z(7, 11), F(11, 3), "(. a), (b), (b a) -> (. a)"),
    ("index_add by argmax", lambda x, s, v: x.index_add(0, s.argmax(1), v), F(5, 3), F(7, 5), F(7, 3),
     "(a b), (c a), (c b) -> (a b)"),
    ("index_copy", F(7, 3), 0, Z(7, 11), F(11, 3), "(. a), (.), (. a) -> (. a) ~ what is overwritten is free"),
    ("index_reduce", F(7, 3), 0, Z(7, 11), F(11, 3), "amax", "(. a), (b), (b a) -> (. a)"),
    ("index_fill.int_Scalar", F(7, 3), 0, D(7, 5), 1.5, "(. a), (b) -> (. a) ~ what is overwritten is free"),
    ("one_hot", lambda s: one_hot(s.argmax(1), 5), F(7, 5), "(a b) -> (a b) where b per a"),
    ("one_hot of another size", lambda s: one_hot(s.argmax(1), 7), F(3, 5),
     "(a .) -> (a .) ~ the classes that occur could move"),
    ("one_hot of numbers", lambda i: one_hot(i, 5), Z(5, 7), "(a) -> (a .)"),
    ("one_hot by hand", lambda s: (s.argmax(1).unsqueeze(-1) == torch.arange(5)).double(), F(7, 5),
     "(a b) -> (a b) ~ the numbers 0 to 4 have no rows for b to depend on"),
    ("an index compared with a number", lambda s: s.argmax(1) == 2, F(7, 5),
     "(a .) -> (a) ~ only one number is singled out"),
    ("an index where", lambda s, t, m: torch.where(m, s.argmax(1), s.argmin(1)), F(7, 5), F(7, 5), B(7),
     "(a b), (c d), (a) -> (a ; b) where b per a, c per d"),
    ("an index filled", lambda s, m: s.argmax(1).masked_fill(m, 0), F(7, 5), B(7), "(a .), (a) -> (a)"),
    ("indices concatenated", lambda s: torch.cat([s.argmax(1), s.argmin(1)]), F(7, 5), "(a b) -> ([a + a] ; b)"),
    ("an index viewed and sliced", lambda s: s.argmax(2).view(6)[:4], F(2, 3, 5),
     "(. [1 + a] b) -> ([1 + a + 1] ; b)"),
    ("an index copied", lambda s, t: s.argmax(1).copy_(t.argmax(1)), F(7, 5), F(7, 5), "(a b), (a b) -> (a ; b) where b per a ~ what was there before no longer matters"),
    ("indices, the greater of two", lambda s, t: undivided(aten.max.other)(s.argmax(1), t.argmin(1)), F(7, 5), F(7, 5), "(a .), (a .) -> (a) ~ numbers that are never the greater"),
    ("indices, the greatest", lambda s: s.argmax(1).max(0), F(7, 5), "(. .) -> (), (; .) ~ of equal ones the first"),
    ("indices, the position of the greatest", lambda s: s.argmax(1).argmax(), F(7, 5), "(. .) -> (; .) ~ as above"),
    ("indices added up", lambda s: s.argmax(1).cumsum(0), F(7, 5), "(. .) -> (.)"),
    ("indices sorted", lambda s: s.argmax(1).sort().values, F(7, 5), "(a .) -> (.)"),
    ("indices reversed", lambda s: s.argmax(1).flip(0), F(7, 5), "(. a) -> (. ; a) ~ a reversal is not the same axis"),
    ("indices repeated", lambda s: s.argmax(1).repeat(2), F(7, 5), "(a b) -> ((c a) ; b) where b per a, c per a b"),
    ("indices repeated in a row", lambda s: undivided(aten.repeat_interleave.self_int)(s.argmax(1), 2, 0), F(7, 5), "(a b) -> ((a c) ; b) where b per a, c per a b"),
    ("indices, every second", lambda s: s.argmax(1)[::2], F(6, 5), "(({a | b}@s s:[1 + 1]) c) -> (a ; c) ~ what is left out is free"),
    ("indices, every second of seven", lambda s: s.argmax(1)[::2], F(7, 5), "(. a) -> (. ; a) ~ as above"),
    ("indices in windows", lambda s: s.argmax(1).unfold(0, 3, 2), F(7, 5), "(. a) -> (. . ; a)"),
    ("indices written into a range", lambda s, t: s.argmax(1).slice_scatter(t.argmax(1), 0, 2, 5), F(7, 5), F(3, 5), "([a + b + c] d), (b d) -> ([a + b + c] ; d) ~ what is overwritten is free"),
    ("indices on a grid", lambda s: undivided(aten.meshgrid.indexing)([s.argmax(1)], indexing="ij"), F(7, 5), "(a .) -> (a)"),
    ("indices gathered", lambda s, i: s.argmax(1).gather(0, i), F(3, 5), Z(3, 7), "(. a), (b) -> (b ; a)"),
    ("indices indexed", lambda s, i: s.argmax(1)[i], F(3, 5), Z(3, 7), "(. a), (b) -> (b ; a)"),
    ("indices scattered", lambda s, i, t: s.argmax(1).scatter(0, i, t.argmax(1)), F(3, 5), Z(3, 7), F(7, 5), "(. .), (.), (. .) -> (.) ~ as above"),
    ("numbers scattered into indices", lambda s, i: s.argmax(1).scatter(0, i, 1), F(3, 5), Z(3, 7), "(. .), (a) -> (.) ~ as above"),
    ("indices put", lambda s, i, t: s.argmax(1).index_put((i,), t.argmax(1)), F(3, 5), Z(3, 7), F(7, 5), "(. .), (.), (. .) -> (.) ~ as above"),
    ("indices put into numbers", lambda x, i, t: x.index_put((i,), t.argmax(1)), Z(9, 3), Z(3, 7), F(7, 5), "(.), (.), (. .) -> (.) ~ as above"),
    ("indices added", lambda s, i, t: s.argmax(1).index_add(0, i, t.argmax(1)), F(3, 5), Z(3, 7), F(7, 5), "(. .), (a), (a .) -> (.)"),
    ("indices padded", lambda s: torch.constant_pad_nd(s.argmax(1), [2, 0], 1), F(7, 5), "(a .) -> ([b + a])"),
    ("indices in a mask's places", lambda s, m, t: s.argmax(1).masked_scatter(m, t.argmax(1)), F(7, 5), B(7), F(7, 5), "(. .), (.), (. .) -> (.) ~ as above"),
    ("indices counted in too few bins", lambda s: undivided(aten.bincount.default)(s.argmax(1), None, 9), F(7, 5), "(a .) -> (.) ~ the classes that occur could move"),
    ("indices in buckets", lambda s: torch.bucketize(s.argmax(1), torch.tensor([1, 3])), F(7, 5), "(a .) -> (a) ~ numbers in one bucket"),
    ("indices among numbers", lambda s: torch.isin(s.argmax(1), torch.tensor([1, 3])), F(7, 5), "(a .) -> (a)"),
    ("elements by an index", lambda x, s: x.take(s.argmax(1)), F(2, 3), F(7, 5), "(. .), (a .) -> (a)"),
    ("the greatest of equal numbers", lambda x: x.index_select(0, torch.zeros(5).argmax().view(1)), F(5, 3), "(. b) -> (1 b) ~ the first of five is taken"),
    ("the greatest of equal rows", lambda x: x.index_select(0, torch.zeros(5, 2).argmax(0)), F(5, 3), "(. b) -> (c b) ~ as above"),
    ("the greatest among equal numbers", lambda x: x.index_select(0, torch.ones(5).topk(2).indices), F(5, 3), "(. b) -> (. b) ~ as above"),
    ("an index made a number", lambda s: s.argmax(1).double(), F(7, 5), "(a .) -> (a)"),
    ("bincount", lambda s: torch.bincount(s.argmax(1), minlength=5), F(7, 5), "(a b) -> (b)"),
    ("bincount with weights", lambda s, w: torch.bincount(s.argmax(1), w, minlength=5), F(7, 5), F(7),
     "(a b), (a) -> (b)"),
    ("histc", F(7), 5, 0, 1, "(a) -> (.)"),
    ("a router and its experts",
     lambda x, r, w: torch.einsum("nkc,nkco->nko", x.unsqueeze(1).expand(7, 2, 3), w[(x @ r).topk(2, 1).indices]),
     N(7, 3), N(3, 5), N(5, 3, 2), "(a b), (b c), (c b d) -> (a . d)"),
    ("masked_scatter", lambda x, m, v: x.masked_scatter(m.unsqueeze(-1).expand_as(x), v), F(3, 5, 2), B(3, 5),
     F(15, 2), "(. . a), (. .), (. a) -> (. . a) ~ elements past the last that is used are free"),
    ("masked_scatter", F(3, 5), B(3, 5), F(15), "(. .), (. .), (.) -> (. .) ~ as above"),
    ("bucketize.Tensor", F(2, 3), torch.tensor([0.2, 0.4, 0.6, 0.7, 0.8]).double(),
     "(a b), (.) -> (a b) where b per a"),
    ("isin.Tensor_Tensor", Z(9, 2, 3), Z(9, 5), "(a b), (c) -> (a b) where b per a"),
    ("nonzero", torch.ones(2, 3), "(. .) -> (. .) ~ here all are chosen"),
    ("nonzero_static", torch.ones(2, 3), {"size": 6}, "(. .) -> (. .) ~ as above"),
    ("masked_select", F(2, 3), torch.ones(2, 3).bool(), "(. .), (. .) -> (.) ~ as above"),
    ("searchsorted.Tensor", torch.tensor([0.2, 0.4, 0.6, 0.7, 0.8]).double(), F(2, 3),
     "(.), (a b) -> (a b) where b per a"),
    ("searchsorted.Tensor", torch.tensor([[0.2, 0.4, 0.6, 0.7, 0.8]] * 2).double(), F(2, 3),
     "(. .), (. .) -> (. .) ~ batches of boundaries could be tied"),
    ("repeat_interleave.Tensor", torch.tensor([2, 1, 3]), "(.) -> (.)"),
    ("_unique2", D(9, 5), "(.) -> (.), (.), (.) ~ the results come sorted"),
    ("unique_dim", F(5, 2), 0, "(. .) -> (. .), (.), (.) ~ as above"),
    ("unique_consecutive", D(9, 5), "(.) -> (.), (.), (.) ~ here no two are equal"),
    ("take", F(2, 3), Z(6, 7), "(. .), (a) -> (a) ~ elements looked up equally often may change places"),
    ("put", F(2, 3), D(6, 5), F(5), "(. .), (.), (.) -> (. .) ~ as above"),
    ("_fft_r2c", F(2, 3, 7), [2], 0, True, "(a b .) -> (a b .) where b per a"),
    ("_fft_c2c", C(2, 3, 7), [1, 2], 0, True, "(a . .) -> (a . .) ~ a reversal of three is an exchange"),
    ("_fft_c2r", C(2, 3, 7), [2], 0, 13, "(a b .) -> (a b .) where b per a"),
)

GRADIENT = [
    *each("tanh_backward sigmoid_backward gelu_backward silu_backward mish_backward hardswish_backward "
          "logit_backward", F(2, 3), F(2, 3), TWO),
    *each("threshold_backward hardshrink_backward softshrink_backward", F(2, 3), F(2, 3), 0.5, TWO),
    *rows(
        ("hardsigmoid_backward", lambda g, x: aten.hardsigmoid_backward(g, 9 * x), F(2, 3), N(2, 3), TWO),
        ("leaky_relu_backward", F(2, 3), N(2, 3), 0.1, False, TWO),
        ("elu_backward", F(2, 3), 1.0, 1.5, 1.0, False, N(2, 3), TWO),
        ("softplus_backward", F(2, 3), N(2, 3), 1.0, 20.0, TWO),
        ("hardtanh_backward", F(2, 3), N(2, 3), -0.5, 0.5, TWO),
        ("log_sigmoid_backward", F(2, 3), N(2, 3), F(2, 3), "(a b), (a b), (a b) -> (a b) where b per a"),
        ("_softmax_backward_data", F(2, 5, 3), F(2, 5, 3), -2, torch.float64, "(a b c), (a b c) -> (a b c) where b per a c, c per a"),
        ("_log_softmax_backward_data", F(2, 5), F(2, 5), 0, torch.float64, "(a b), (a b) -> (a b) where a per b"),
        ("native_layer_norm_backward", F(2, 3, 5), F(2, 3, 5), [5], F(2, 3, 1), F(2, 3, 1), F(5), F(5), [True] * 3,
         "(a b c), (a b c), (a b 1), (a b 1), (c), (d) -> (a b c), (c), (c) where b per a"),
        ("native_layer_norm_backward", F(2, 3, 5), F(2, 3, 5), [3, 5], F(2, 1, 1), F(2, 1, 1), None, None, [True, False, False],
         "(a b c), (a b c), (a 1 1), (a 1 1) -> (a b c) where b per a, c per a b"),
        ("convolution_backward", F(2, 5, 4), F(2, 3, 6), F(5, 3, 3), [5], [1], [0], [1], False, [0], 1, [True] * 3,
         "(n o .), (n i .), (o j .) -> (n j .), (o i .), (o)"),
        ("convolution_backward", F(2, 6, 4), F(2, 10, 6), F(6, 5, 3), [6], [1], [0], [1], False, [0], 2, [True, True, False],
         "(n (g o) .), (n (g i) .), ((g o) j .) -> (n (g j) .), ((g o) i .) where i per g, j per g, n per g, o per g"),
        ("convolution_backward", F(2, 5, 7), F(2, 3, 7), F(5, 3, 1), None, [1], [0], [1], False, [0], 1, [True, False, False],
         "(n o s), (m i t), (o j 1) -> (n j s) where i per m, s per n, t per i m"),
        ("slice_backward", F(2, 3), [2, 7], 1, 2, 5, 1, "(a b) -> (a [c + b + d]) where b per a, c per a, d per a"),
        ("slice_backward", F(2, 2), [2, 7], 1, 2, 5, 2, "(. .) -> (. .) ~ rare"),
        ("select_backward", F(3), [2, 3], 0, 1, "(b) -> (. b)"),
    ),
]

CASES: list[Case] = [
    *POINTWISE, *NOISE, *READS, *LINEAR, *CONVOLUTION, *SPACE, *NORMALISATION, *ATTENTION, *RECURRENT, *CREATION,
    *REDUCTION, *SHAPE, *INDEX, *GRADIENT,
]

# Operators that run on a GPU only; the function that is their rule is tested on another operator of the same form.
ELSEWHERE = {
    "aten._thnn_fused_lstm_cell": "permgraph_cells.lstm",
    "aten._thnn_fused_gru_cell": "permgraph_cells.gru",
    "aten.cudnn_batch_norm": "aten._native_batch_norm_legit",
    "aten.miopen_batch_norm": "aten._native_batch_norm_legit",
    "aten.cudnn_convolution": "aten.mkldnn_convolution",
    **dict.fromkeys(
        ("aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_efficient_attention",
         "aten._scaled_dot_product_cudnn_attention", "aten._scaled_dot_product_attention_math_for_mps",
         "aten._scaled_dot_product_fused_attention_overrideable"),
        "aten._scaled_dot_product_flash_attention_for_cpu",
    ),
}
