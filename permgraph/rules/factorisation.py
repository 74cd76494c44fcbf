"""Functions of whole matrices: determinants, inverses, solutions, singular values and factors.

What is a function of the matrix alone follows when its rows and its columns are renumbered, each by themselves where it
is a determinant's size, an inverse, a solution or the singular values. Factors do not: which they are depends on the
order in which rows and columns are eliminated, their signs on that too, and some operators read one triangle only.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from permgraph.rules.call import Call
from permgraph.rules.registry import aten, properties_of, rule
from permgraph.rules.typed_tensor import TypedTensor

ORDER = "rows and columns are worked through in order"
WITHOUT_SIGN = ("even", "absolute", "square")  # what such a function of a number does not tell


@rule(*aten("linalg_matrix_exp matrix_exp matrix_power"), values="derived")
def square_matrix(call: Call) -> None:
    """A function of square matrices that commutes with renumbering rows and columns alike."""
    x = call.tensors[0]
    matrices = [t for t in (x, call.out) if t.ndim >= 2]
    call.unify(x, -2, x, -1)
    for tensor in matrices[1:]:
        call.unify(x, -1, tensor, -1)
        call.unify(x, -2, tensor, -2)
    call.link((x, "... _ _"), (call.out, "... _ _"))


@rule(*aten("linalg_inv_ex linalg_pinv"), values="derived")
def inverse(call: Call) -> None:
    """The inverse's rows go with the matrix's columns, and its columns with the rows."""
    (a, *tolerances), (out, *success) = call.tensors, call.results
    if call.get("hermitian", False):
        _in_order(call, [a, out], tolerances)
        return
    call.link((a, "... r c"), (out, "... c r"), *((t, "...") for t in (*tolerances, *success)), via=["... r", "... c"])


@rule(*aten("_linalg_det _linalg_slogdet"))
def determinant(call: Call) -> None:
    """Its size is that of the matrix, however rows and columns are numbered; its sign asks that both are so alike."""
    a = call["A"]
    slogdet = "slogdet" in str(call.node.target)
    numbers, factors = call.results[: 1 + slogdet], call.results[1 + slogdet :]
    every = "... _ _"
    if numbers[0].read and (slogdet or not _sign_is_lost(call.node)):
        call.unify(a, -2, a, -1)
    else:
        every = "... r c"
    call.link((a, every), *((out, "...") for out in numbers), via=["... r", "... c"] if every == "... r c" else [])
    _pin_if_read(call, a, factors)


def _sign_is_lost(node: fx.Node) -> bool:
    """Whether all that is done with the first result does not tell its sign: its size is taken, or its square."""
    uses = [use for item in node.users if item.args[1] == 0 for use in item.users]
    return bool(uses) and all(map(_ignores_sign, uses))


def _ignores_sign(use: fx.Node) -> bool:
    if use.op != "call_function":
        return False
    acts = properties_of(str(use.target)).acts
    exponent = use.args[1] if acts == "power" and len(use.args) > 1 else None
    return acts in WITHOUT_SIGN or (isinstance(exponent, (int, float)) and exponent % 2 == 0)


@rule("aten._linalg_svd")
def singular_values(call: Call) -> None:
    """The singular values in order, however rows and columns are numbered; the sign of each vector has no rule."""
    a = call["A"]
    left, values, right = call.results
    call.link((a, "... r c"), (values, "... _"), via=["... r", "... c"])
    call.pin(values, values.ndim - 1, "an order of rank")
    _pin_if_read(call, a, [left, right])


@rule(*aten("_linalg_solve_ex linalg_lstsq"), values="derived")
def solve(call: Call) -> None:
    """The X with A X = B, or X A = B if not `left`: B has A's rows and X its columns, or the reverse."""
    a, b = call.tensors
    out, *others = call.results
    known, wanted = ("r", "c") if call.get("left", True) else ("c", "r")
    if b.ndim > 1 and b.shape != a.shape[:-1]:  # no vector
        known, wanted = (f"{line} k" if call.get("left", True) else f"k {line}" for line in (known, wanted))
    success = others.pop() if "check_errors" in call.arguments else None
    call.link((a, "... r c"), (b, f"... {known}"), (out, f"... {wanted}"), (success, "..."), via=["... r", "... c"])
    _pin_if_read(call, a, others)


def _pin_if_read(call: Call, a: TypedTensor, factors: Sequence[TypedTensor]) -> None:
    """Pin the rows and columns of a matrix whose factors somebody reads, and theirs; they have its batch."""
    read = [factor for factor in factors if factor.read and 0 not in factor.shape]
    if read:
        _in_order(call, [a, *read], [])


@rule("aten.linalg_solve_triangular", values="derived")
def solve_triangular(call: Call) -> None:
    """The X with A X = B, or X A = B if not `left`: A's rows are in the order of its triangle."""
    a, b, out = call["self"], call["B"], call.out
    right = "... s! k" if call.get("left", True) else "... k s!"
    call.link((a, "... r! c!"), (b, right), (out, right), via=["... k"], why="a triangle of a matrix")


@rule(*aten("cholesky_solve linalg_lu_solve"), values="derived")
def solve_factored(call: Call) -> None:
    """The X with A X = B, or X A = B if not `left`, where A is given by its factors."""
    b = call.get("self", call.get("B"))
    left = call.get("left", True)
    for side in (b, call.out):
        call.pin(side, side.ndim - (2 if left else 1), ORDER)
    sides = [(side, "... _ k" if left else "... k _") for side in (b, call.out)]
    call.link(*sides, *_ordered(call, [tensor for tensor in call.tensors if tensor is not b]))


FACTORS = """
    linalg_cholesky_ex cholesky cholesky_inverse linalg_qr geqrf linalg_lu linalg_lu_factor_ex lu_unpack
    linalg_householder_product _linalg_eigh linalg_eig
"""


@rule(*aten(FACTORS))
def factor(call: Call) -> None:
    """Matrices in each batch, of which rows and columns have an order."""
    _in_order(call, [t for t in (*call.tensors, *call.results) if 0 not in t.shape], [])


def _in_order(call: Call, tensors: Sequence[TypedTensor], numbers: Sequence[TypedTensor]) -> None:
    """Tie the batches of matrices, of vectors that come with them, and of `numbers`; the rest stays put."""
    call.link(*_ordered(call, tensors), *((number, "...") for number in numbers))


def _ordered(call: Call, tensors: Sequence[TypedTensor]) -> list[tuple[TypedTensor, str]]:
    """Matrices, the first among them, with patterns of which all but the batch is left open; it stays put."""
    lead = tensors[0].ndim - 2
    for tensor in tensors:
        call.pin(tensor, range(lead, tensor.ndim), ORDER)
    return [(tensor, " ".join(["...", *"_" * (tensor.ndim - lead)])) for tensor in tensors]
