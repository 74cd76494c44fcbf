"""What is declared of an operator beside its rule: facts about its results' values that hold whatever the weights.

A rule says how dimensions are tied. Some analyses ask for more: where the largest element is looked for, elements that
are equal by more than chance have an order that matters (`permgraph.inference.repeats`); what does not vary along a
dimension ties nothing (`permgraph.inference.constancy`). What they ask is declared where the rule is registered, and an
operator that declares nothing gets the strictest answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Values = Literal[
    "unknown", "repeat", "distinct", "product", "limit", "choice", "same",
    "moved", "joined", "padded", "looked up", "derived", "kept", "reduced", "mixed", "constant",
]  # fmt: skip
"""Where the values of an operator's results come from, and so whether two elements may be equal by more than chance.

Element by element, with broadcasting counted from the last dimension:

- ``"repeat"``: elements may be equal whatever the arguments hold, as the zeros of a ReLU are.
- ``"distinct"``: they are equal only where those of each operand that varies are: affine, strictly monotone or
  analytic in each operand. Of finite values of moderate size, in exact arithmetic.
- ``"product"``: as ``"distinct"``, but nothing is left of one operand where another has a value such as zero.
- ``"limit"``: the larger or the smaller of two operands.
- ``"choice"``: one operand or the other, by a mask.
- ``"same"``: the very values, in a new tensor or as another type.

Otherwise:

- ``"moved"``: all or some elements of one tensor, in other places or another shape.
- ``"joined"``: elements of several tensors side by side, or one written into another.
- ``"padded"``: elements beside slices of one number, or the same elements several times.
- ``"looked up"``: slices of the first tensor at places that an index says.
- ``"derived"``: equal only where elements of an argument are equal or do not vary: what is normalised, pooled, ranked.
- ``"kept"``: dimensions go elsewhere or are expanded as wholes, so that what does not vary is alike still.
- ``"reduced"``: as ``"kept"``, with a sum, mean, norm or extremum over some dimensions.
- ``"mixed"``: sums of products with many terms; equal only where whole slices of an argument are.
- ``"constant"``: one number everywhere.
- ``"unknown"``: nothing is known: elements may be equal, and so may whole slices. This is the default.
"""

Acts = Literal[
    "unknown", "zeros", "constant", "moved", "sum", "product", "quotient", "choice", "gate",
    "homogeneous", "odd", "even", "sign", "absolute", "square", "root", "inverse root", "reciprocal", "power", "slope",
    "clip", "norm", "spread", "rms norm", "layer norm", "group norm", "batch norm", "attention",
]  # fmt: skip
"""How an operator acts, and so which scalings, rotations and other matrices along an axis pass through it.

A rule's labels say which axes are permuted alike; this says what more than a permutation may happen to them. Linear, or
linear in each operand:

- ``"zeros"``: no element is read; the result is zero, or memory that is written before it is read.
- ``"constant"``: no element is read, and all of the result are one number.
- ``"moved"``: elements in other places, all of them unchanged; zeros may be added.
- ``"sum"``: operands are added or subtracted, with broadcasting.
- ``"product"``: the product of the operands, summed over the labels that the result lacks; the operand named by `bias`
  is added. With one operand, any linear map that treats all indices of a label alike: a sum, a mean, a change of sign.
- ``"quotient"``: the first operand over the second.
- ``"choice"``: one operand or another, by a mask of truth values.
- ``"gate"``: the first half of a dimension times a function of the second half.

A function f of each element by itself, or of all those along labels that the result lacks:

- ``"homogeneous"``: f(c x) = c f(x) for c > 0, of all operands together; of maxima and of a ReLU.
- ``"odd"``, ``"even"``: f(-x) = -f(x), f(-x) = f(x).
- ``"sign"``, ``"absolute"``, ``"square"``, ``"root"``, ``"inverse root"``, ``"reciprocal"``: the functions of these
  names.
- ``"power"``: the operand to the power that is the argument ``exponent``.
- ``"clip"``: what lies beyond one or two bounds is set to them: homogeneous if zero is the only number among them,
  odd if they are alike.
- ``"slope"``: homogeneous in the first operand; the second one has a slope for each index.

Along the labels that the result lacks, or those that are normalised:

- ``"norm"``: the root of the sum of squares, and of nothing else.
- ``"spread"``: a variance or a standard deviation.
- ``"rms norm"``, ``"layer norm"``, ``"group norm"``, ``"batch norm"``, ``"attention"``: the layers of these names.

``"unknown"`` is the default: nothing but permutations passes.
"""

ELEMENTWISE = frozenset(["repeat", "distinct", "product", "limit", "choice", "same"])


@dataclass(frozen=True)
class Properties:
    """What an operator declares beside its rule. Each default is the strictest answer.

    Args:
        values: where the values of the results come from, see `Values`.
        repeats_if_zero: arguments that flatten the function if they are the number zero: the slope of a leaky ReLU.
        compares: the result is a mask that tells large elements from small ones.
        zeros: the result is zero throughout where ``"all"`` tensors among the arguments are, or where ``"any"`` is.
        factors: the two factors of a product, each with the dimension over which the product sums.
        bias: the argument that is added to a product, and the dimension of the result along which it varies.
        reads_values: whether any element of the arguments is read, rather than their shape alone.
        acts: how the operator acts on matrices along its axes, see `Acts`.
    """

    values: Values = "unknown"
    repeats_if_zero: tuple[str, ...] = ()
    compares: bool = False
    zeros: Literal["all", "any"] | None = None
    factors: tuple[tuple[str, int], tuple[str, int]] | None = None
    bias: tuple[str, int] | None = None
    reads_values: bool = True
    acts: Acts = "unknown"

    def __post_init__(self) -> None:
        if self.values not in get_args(Values):
            raise ValueError(f"values={self.values!r} is none of {', '.join(map(repr, get_args(Values)))}")
        if self.acts not in get_args(Acts):
            raise ValueError(f"acts={self.acts!r} is none of {', '.join(map(repr, get_args(Acts)))}")
        if self.zeros not in (None, "all", "any"):
            raise ValueError(f"zeros={self.zeros!r} is neither 'all' nor 'any'")

    @property
    def elementwise(self) -> bool:
        """Whether the operator works element by element, with broadcasting counted from the last dimension."""
        return self.values in ELEMENTWISE


UNDECLARED = Properties()
