"""Matrix products."""

from __future__ import annotations

from permgraph.rules.call import Call
from permgraph.rules.pattern import last_labels
from permgraph.rules.registry import aten, rule
from permgraph.rules.typed_tensor import TypedTensor


@rule("aten.addmm", values="mixed", factors=(("mat1", -1), ("mat2", -2)), bias=("self", -1), acts="product")
@rule("aten._addmm_activation")
def addmm(call: Call) -> None:
    """``self + mat1 @ mat2``: x is (m, k), w is (k, o); the bias spans the last dimensions of the result."""
    bias: TypedTensor = call["self"]
    call.link((call["mat1"], "m k"), (call["mat2"], "k o"), (bias, last_labels("m o", bias)), (call.out, "m o"))


@rule("aten.mm", values="mixed", zeros="any", factors=(("self", -1), ("mat2", -2)), acts="product")
def mm(call: Call) -> None:
    """(m, k) times (k, o)."""
    call.link((call["self"], "m k"), (call["mat2"], "k o"), (call.out, "m o"))


@rule("aten.bmm", values="mixed", zeros="any", factors=(("self", -1), ("mat2", -2)), acts="product")
def bmm(call: Call) -> None:
    """(b, m, k) times (b, k, o)."""
    call.link((call["self"], "b m k"), (call["mat2"], "b k o"), (call.out, "b m o"))


@rule("aten.baddbmm", values="mixed", factors=(("batch1", -1), ("batch2", -2)), bias=("self", -1), acts="product")
def baddbmm(call: Call) -> None:
    """``self + batch1 @ batch2`` for each b."""
    call.link(
        (call["batch1"], "b m k"), (call["batch2"], "b k o"), (call["self"], last_labels("b m o", call["self"])),
        (call.out, "b m o"),
    )  # fmt: skip


@rule("aten.addbmm", values="mixed", bias=("self", -1), acts="product")
def addbmm(call: Call) -> None:
    """``self`` and the sum over b of ``batch1 @ batch2``."""
    call.link(
        (call["batch1"], "b m k"), (call["batch2"], "b k o"), (call["self"], last_labels("m o", call["self"])),
        (call.out, "m o"),
    )  # fmt: skip


@rule("aten.addr", values="derived")
def addr(call: Call) -> None:
    """``self`` and every product of two vectors' elements."""
    call.link(
        (call["vec1"], "m"), (call["vec2"], "n"), (call["self"], last_labels("m n", call["self"])), (call.out, "m n")
    )


@rule("aten.mv", values="mixed", zeros="any", factors=(("self", -1), ("vec", -1)), acts="product")
def mv(call: Call) -> None:
    """(m, k) times (k)."""
    call.link((call["self"], "m k"), (call["vec"], "k"), (call.out, "m"))


@rule("aten.addmv", values="mixed", factors=(("mat", -1), ("vec", -1)), bias=("self", -1), acts="product")
def addmv(call: Call) -> None:
    """``self + mat @ vec``."""
    call.link((call["mat"], "m k"), (call["vec"], "k"), (call["self"], last_labels("m", call["self"])), (call.out, "m"))


@rule("aten.dot", values="mixed", zeros="any", factors=(("self", -1), ("tensor", -1)), acts="product")
@rule("aten.vdot", values="mixed", zeros="any", factors=(("self", -1), ("other", -1)), acts="product")
def dot(call: Call) -> None:
    """The sum of products."""
    call.link((call.tensors[0], "k"), (call.tensors[1], "k"))


@rule(*aten("ger outer"), values="derived", zeros="any", acts="product")
def outer(call: Call) -> None:
    """Every product of two vectors' elements."""
    call.link((call["self"], "m"), (call["vec2"], "n"), (call.out, "m n"))


@rule("aten.linear", values="mixed", factors=(("input", -1), ("weight", -1)), bias=("bias", -1), acts="product")
def linear(call: Call) -> None:
    """x's last axis is w's second; w's first is b's; the result is x's leading axes, then w's first."""
    call.link((call["input"], "... k"), (call["weight"], "o k"), (call["bias"], "o"), (call.out, "... o"))


@rule("aten._trilinear", values="mixed", zeros="any", acts="product")
def trilinear(call: Call) -> None:
    """What `bilinear` runs: a product of three tensors, each broadcast along some dimensions, summed over others."""
    total = call.out.ndim + len(call["sumdim"])
    factors = ((call[f"i{k}"], call.names(total, skip=call[f"expand{k}"])) for k in (1, 2, 3))
    call.link(*factors, (call.out, call.names(total, skip=call["sumdim"])))


@rule(*aten("_cdist_forward cdist"), values="derived", repeats_if_zero=("p",))
@rule("aten._euclidean_dist", values="derived")
def cdist(call: Call) -> None:
    """Distances between the rows of two matrices, in each batch."""
    call.link((call["x1"], "... m k"), (call["x2"], "... n k"), (call.out, "... m n"))


@rule("aten._pdist_forward", values="derived", repeats_if_zero=("p",))
def pairs(call: Call) -> None:
    """Distances between the rows of a matrix, pair by pair in an order of their own."""
    x, out = call["self"], call.out
    call.link((x, "_ k"), (out, "_"))
    for tensor in (x, out):
        call.pin(tensor, 0, "pairs in order")


@rule("aten.dist")
def distance(call: Call) -> None:
    """The distance between two tensors."""
    call.link(*((tensor, "...") for tensor in call.tensors))


@rule(*aten("linalg_cross cross"), values="derived", zeros="any")
def cross(call: Call) -> None:
    """The product of vectors in space, whose three components stay put; the other dimensions are broadcast."""
    out = call.out
    dim = out.shape.index(3) if call.get("dim") is None else call["dim"] % out.ndim
    every = call.names(out, blank=[dim])
    call.link(*((tensor, last_labels(every, tensor)) for tensor in (*call.tensors, out)))
    for tensor in (*call.tensors, out):
        call.pin(tensor, dim - out.ndim + tensor.ndim, "its order matters")
