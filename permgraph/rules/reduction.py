"""Operators that reduce, normalise, rank or accumulate along dimensions."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence

from torch import fx

from permgraph.rules.call import EQUAL, Call
from permgraph.rules.pattern import last_labels
from permgraph.rules.registry import aten, rule
from permgraph.rules.typed_tensor import TypedTensor

REDUCTIONS = "aminmax prod var_mean std_mean nansum"


def _reduced(call: Call, x: TypedTensor, out: TypedTensor, dims: Collection[int]) -> str:
    """The labels of a reduction's result, which keeps the reduced dimensions at size one or drops them."""
    if out.shape == x.shape and x.ndim:
        return call.names(x)  # nothing was reduced
    return call.names(x, blank=dims) if out.ndim == x.ndim else call.names(x, skip=dims)


@rule(*aten(REDUCTIONS), values="reduced", zeros="all")
@rule(*aten("sum mean"), values="reduced", zeros="all", acts="product")
@rule(*aten("amax amin"), values="reduced", zeros="all", acts="homogeneous")
@rule(*aten("var std"), values="reduced", zeros="all", acts="spread")
@rule("aten.frobenius_norm", values="reduced", zeros="all", acts="norm")
@rule(*aten("norm linalg_vector_norm"), values="reduced", zeros="all", repeats_if_zero=("p", "ord"), acts="norm")
@rule("aten.logsumexp", values="reduced")
@rule(*aten("any all count_nonzero _is_all_true"))
def reduction(call: Call) -> None:
    """The result has every dimension of the input but those that are reduced."""
    x = call.tensors[0]
    dims = call.dim_list(x)
    call.link((x, call.names(x)), *((out, _reduced(call, x, out, dims)) for out in call.results))
    call.pin_values(x, "arithmetic on an index")


@rule(*aten("max min median nanmedian mode kthvalue"), values="reduced", zeros="all")
def extremum(call: Call) -> None:
    """Of one tensor along a dimension, values and their positions; of two tensors, elementwise."""
    if len(call.tensors) == 2 and len(call.results) == 1:
        call.pointwise(*call.tensors, call.out)
        for tensor in call.tensors:
            call.pin_values(tensor, "arithmetic on an index")
    elif len(call.results) == 1:
        reduction(call)
    else:
        _positions(call, call.tensors[0], call.dim(call.tensors[0], default=-1), call.results[0], call.results[1])


@rule(*aten("argmax argmin"), values="reduced")
def argmax(call: Call) -> None:
    """The position of the extreme value: an index of the dimension that was searched, or of all of them flattened."""
    x = call["self"]
    if call.get("dim") is None:  # an index of all dimensions, flattened
        _tell_equals_apart(call, x, range(x.ndim), call.out)
        call.number_dims(call.out, x, range(x.ndim))
        call.link((x, call.names(x)), (call.out, "..."))
        call.pin_values(x, "arithmetic on an index")
    else:
        _positions(call, x, call.dim(x), None, call.out)


def _tell_equals_apart(call: Call, x: TypedTensor, dims: Iterable[int], indices: TypedTensor) -> None:
    """Pin what is searched where elements may be equal, and somebody reads which of them was found."""
    if indices.read:
        call.pin(x, [dim for dim in dims if dim in x.uniform or dim in x.may_repeat], EQUAL)
        call.ledger.searched.append((x, tuple(dims), call.number))


def _positions(call: Call, x: TypedTensor, dim: int, values: TypedTensor | None, indices: TypedTensor) -> None:
    _tell_equals_apart(call, x, [dim], indices)
    call.number_dims(indices, x, [dim])
    pattern = _reduced(call, x, indices, [dim])
    call.link((x, call.names(x)), (values, pattern), (indices, f"{pattern} ; d{dim}"))
    call.pin_values(x, "arithmetic on an index")


@rule(*aten("topk sort argsort"), values="derived", zeros="all")
def ranking(call: Call) -> None:
    """Values in order, and where they stood: an index of the dimension that was searched. The ranks stay put.

    Where they need not be in order, their places among the values searched decide it, so that nothing may mind it.
    """
    x = call["self"]
    dim = call.dim(x, default=-1)
    *values, indices = call.results
    indices.permutes = dim if x.ndim and indices.shape == x.shape else None
    if x.permutes == dim and indices.permutes == dim and _is_as_sorted(call, x):
        _invert(call, x, dim, values, indices)
        return
    _tell_equals_apart(call, x, [dim], indices)
    call.number_dims(indices, x, [dim])
    ordered = call.get("sorted", True) or indices.shape[dim : dim + 1] == (1,)
    ranked = call.names(x, named={dim: f"r{dim}{'!' * ordered}"} if x.ndim else {})
    if not ordered:
        call.ledger.unsorted.append((x, indices, dim, call.number))
    call.link(
        (x, call.names(x)), *((value, ranked) for value in values), (indices, f"{ranked} ; d{dim}"),
        why="an order of rank",
    )  # fmt: skip
    call.pin_values(x, "indices are put in order of their numbers")


def _is_as_sorted(call: Call, x: TypedTensor) -> bool:
    """Whether the places that sorting gave are sorted upwards, and nothing can have been written over them since."""
    source = call.node.args[0]
    unwritten = isinstance(source, fx.Node) and source.target is operator.getitem and not x.viewed
    return unwritten and x.value is not None and call.get("descending", True) is False


def _invert(call: Call, x: TypedTensor, dim: int, values: Sequence[TypedTensor], indices: TypedTensor) -> None:
    """Where a permutation is sorted, the places are its inverse: in the one-hot code both axes change places."""
    call.number_dims(indices, x, [dim])
    at, number = (f"{call.names(x, named={dim: label})} ; {other}" for label, other in (("p", "v"), ("v", "p")))
    call.link((x, at), (indices, number))
    for ranked in values:  # 0, 1, 2, and so on
        call.pin(ranked, dim, "an order of rank")


@rule(*aten("_softmax _log_softmax softmax log_softmax _safe_softmax"), values="derived")
def softmax(call: Call) -> None:
    """Elementwise, but for a sum along one dimension."""
    x = call["self"]
    every = call.names(x)
    call.link((x, every), (call.out, every), via=[call.names(x, skip=[call.dim(x)])])


@rule("aten.cumsum", values="reduced", acts="product")
@rule(*aten("cumprod logcumsumexp"), values="reduced")
@rule(*aten("cummax cummin"))
@rule("aten.diff", values="derived")
@rule(*aten("flip roll rot90"), values="moved", zeros="all", acts="moved")
def ordered(call: Call) -> None:
    """Neighbours along a dimension matter: it stays put, the others pass."""
    x = call.tensors[0]
    name = next(name for name in ("dim", "dims") if name in call.arguments)
    dims = call.dim_list(x, name)
    pattern = call.names(x, blank=dims)
    everything = [*call.tensors, *call.results]  # `diff` has tensors to put before and after
    call.link(*((tensor, pattern) for tensor in everything))
    for tensor in everything:
        call.pin(tensor, dims, "its order matters")
    if name == "dims":  # flips, rolls and rotations only move values about
        call.carry_values(x, call.out)
    else:
        call.pin_values(x, "arithmetic on an index")


@rule("aten.linalg_norm", values="reduced", zeros="all", repeats_if_zero=("ord",))
def linalg_norm(call: Call) -> None:
    """Of vectors elementwise, of matrices a function that renumbering rows and columns leaves alone."""
    x = call["self"]
    dims = call.dim_list(x)
    as_vector = call.get("ord") in (None, "fro") or len(dims) == 1
    every = call.names(x)
    lead = call.names(x, skip=dims)
    via = [] if as_vector else [f"{lead} d{dim}" for dim in dims]
    call.link((x, every), *((out, _reduced(call, x, out, dims)) for out in call.results), via=via)


@rule("aten.cosine_similarity", values="derived")
def cosine_similarity(call: Call) -> None:
    """A normalised inner product along one dimension of tensors that are broadcast to each other."""
    a, b = call.tensors
    ndim = max(a.ndim, b.ndim)
    slots = [(t, last_labels(call.names(ndim), t)) for t in (a, b)]
    call.link(*slots, (call.out, call.names(ndim, skip=[call["dim"] % ndim])))


@rule(*aten("_fft_r2c _fft_c2r _fft_c2c"), values="derived", zeros="all")
def fourier(call: Call) -> None:
    """Fourier transforms along some dimensions, which have an order; the others pass."""
    x, out, dims = call["self"], call.out, call.dim_list(call["self"])
    pattern = call.names(x, blank=dims)
    call.link((x, pattern), (out, pattern))
    for tensor in (x, out):
        call.pin(tensor, dims, "frequencies and times have an order")
