"""Looking up and writing by integer tensors.

An index tensor is read as its one-hot encoding, with the axis that it indexes as one more dimension: then every
operator here is a product of tensors, and is labelled so. An index whose values have no known axis (token ids,
positions, a constant table) singles out what it looks up, which is pinned.
"""

from __future__ import annotations

from collections.abc import Sequence

from permgraph.rules.call import Call, TypedTensor
from permgraph.rules.registry import rule

LOOKED_UP = "looked up by values from outside"


def _follows(index: TypedTensor, size: int) -> bool:
    """Whether the index's values are known to number an axis of this size."""
    return index.value is not None and index.value.size == size


def _mark(call: Call, tensor: TypedTensor, dim: int, index: TypedTensor) -> str:
    """The label of a dimension that is looked up; pinned, and open, unless the index's values number that axis."""
    if _follows(index, tensor.shape[dim]):
        return f"e{dim}"
    call.pin(tensor, dim, LOOKED_UP)
    call.pin_values(index, "it looks up an axis of another size")
    return "_"


@rule("aten.embedding")
def embedding(call: Call) -> None:
    """The rows of a table (v, c) at given positions."""
    weight, indices = call["weight"], call["indices"]
    row = _mark(call, weight, 0, indices)
    call.link((weight, f"{row} c"), (indices, "... ; e0"), (call.out, "... c"))


@rule("aten._embedding_bag", "aten._embedding_bag_forward_only", "aten.embedding_bag")
def embedding_bag(call: Call) -> None:
    """Sums of rows of a table (v, c)."""
    weight = call["weight"]
    call.pin(weight, 0, LOOKED_UP)
    call.pin_all([t for t in call.tensors if t is not weight], LOOKED_UP)
    call.pin_all(call.results[1:], LOOKED_UP)
    call.link((weight, "_ c"), (call.out, "_ c"))
    call.pin(call.out, 0, LOOKED_UP)


@rule("aten.index_select")
def index_select(call: Call) -> None:
    """Given indices of one dimension."""
    x, index = call["self"], call["index"]
    dim = call.dim(x)
    names = [f"d{d}" for d in range(x.ndim)]
    looked = [_mark(call, x, dim, index) if d == dim else name for d, name in enumerate(names)]
    found = ["k" if d == dim else name for d, name in enumerate(names)]
    call.link((x, " ".join(looked)), (index, f"k ; e{dim}"), (call.out, " ".join(found)))
    call.carry_values(x, call.out)


@rule("aten.gather")
def gather(call: Call) -> None:
    """For each position of the index, one element along a dimension; the other dimensions run along."""
    x, index, dim = call["self"], call["index"], call.dim(call["self"])
    _along(call, x, [(index, True), (call.out, False)], index, dim)
    call.carry_values(x, call.out)


@rule("aten.scatter", "aten.scatter_add", "aten.scatter_reduce")
def scatter(call: Call) -> None:
    """Write at positions along a dimension; the other dimensions run along."""
    x, index, dim = call["self"], call["index"], call.dim(call["self"])
    source = call.get("src")
    others = [(source, False)] if isinstance(source, TypedTensor) else []
    call.pointwise(x, call.out)
    _along(call, x, [(index, True), *others], index, dim)
    call.pin_values(x, "indices are mixed with other integers")
    if isinstance(source, TypedTensor):
        call.pin_values(source, "indices are mixed with other integers")


def _along(
    call: Call, x: TypedTensor, others: Sequence[tuple[TypedTensor, bool]], index: TypedTensor, dim: int
) -> None:
    """Tie x, looked up along `dim`, to tensors of the index's shape (a flag says which is the index itself)."""
    looked, running = [], []
    for d in range(x.ndim):
        if d == dim:
            looked.append(_mark(call, x, d, index))
            running.append("k")
        elif x.shape[d] == index.shape[d] and all(t.shape[d] == x.shape[d] for t, _ in others):
            looked.append(f"d{d}")
            running.append(f"d{d}")
        else:  # only the first part of a dimension takes part
            looked.append("_")
            running.append("_")
            call.pin(x, d, "only a part of it is looked up")
            for tensor, _ in others:
                call.pin(tensor, d, "only a part of it is looked up")
    shared = " ".join(running)
    call.link(
        (x, " ".join(looked)), *((t, f"{shared} ; e{dim}" if is_index else shared) for t, is_index in others)
    )  # fmt: skip


@rule("aten.index", "aten._unsafe_index")
def index(call: Call) -> None:
    """``x[i, :, j]``: index tensors, broadcast together, take the place of the dimensions that they look up."""
    x = call["self"]
    looked, found, slots = _advanced(call, x, call["indices"])
    call.link((x, looked), *slots, (call.out, found))
    call.carry_values(x, call.out)


@rule("aten.index_put", "aten._index_put_impl", "aten._unsafe_index_put")
def index_put(call: Call) -> None:
    """``x[i, :, j] = values``."""
    x, values = call["self"], call["values"]
    call.pointwise(x, call.out)
    looked, found, slots = _advanced(call, x, call["indices"])
    labels = found.split()
    call.link((x, looked), *slots, (values, " ".join(labels[len(labels) - values.ndim :])))
    call.pin_values(x, "indices are mixed with other integers")
    call.pin_values(values, "indices are mixed with other integers")


def _advanced(
    call: Call, x: TypedTensor, indices: Sequence[TypedTensor | None]
) -> tuple[str, str, list[tuple[TypedTensor, str]]]:
    """Patterns of x and of the result, and the index tensors with theirs."""
    masks = [i for i in indices if i is not None and i.dtype.itemsize == 1 and not i.is_integral]
    if masks:
        call.pin_all([x, *masks], "a mask chooses its elements")
        call.pin_all([t for t in (*call.results, call.get("values")) if isinstance(t, TypedTensor)], "chosen by a mask")
        return " ".join("_" * x.ndim), " ".join("_" * call.out.ndim), []
    given = {d: i for d, i in enumerate(indices) if i is not None}
    rank = max(i.ndim for i in given.values())
    shared = [f"b{rank - 1 - k}" for k in range(rank)]
    slots = [(i, f"{' '.join(shared[rank - i.ndim :])} ; e{d}") for d, i in given.items()]
    looked = [_mark(call, x, d, given[d]) if d in given else f"d{d}" for d in range(x.ndim)]
    dims = sorted(given)
    adjacent = dims == list(range(dims[0], dims[-1] + 1))
    before = [f"d{d}" for d in range(x.ndim) if d not in given and adjacent and d < dims[0]]
    after = [f"d{d}" for d in range(x.ndim) if d not in given and f"d{d}" not in before]
    return " ".join(looked), " ".join([*before, *shared, *after]), slots


@rule("aten.index_add", "aten.index_copy", "aten.index_reduce")
def index_add(call: Call) -> None:
    """Add or write slices at given indices of one dimension."""
    x, index, source = call["self"], call["index"], call["source"]
    dim = call.dim(x)
    call.pointwise(x, call.out)
    names = [f"d{d}" for d in range(x.ndim)]
    looked = [_mark(call, x, dim, index) if d == dim else name for d, name in enumerate(names)]
    written = ["k" if d == dim else name for d, name in enumerate(names)]
    call.link((x, " ".join(looked)), (index, f"k ; e{dim}"), (source, " ".join(written)))


@rule("aten.index_fill")
def index_fill(call: Call) -> None:
    """Write one value at given indices of one dimension."""
    x, index = call["self"], call["index"]
    dim = call.dim(x)
    call.pointwise(x, call.out)
    looked = [_mark(call, x, dim, index) if d == dim else f"d{d}" for d in range(x.ndim)]
    call.link((x, " ".join(looked)), (index, f"k ; e{dim}"))


@rule("aten.one_hot")
def one_hot(call: Call) -> None:
    """The axis that the index numbers becomes the last dimension."""
    x, out = call["self"], call.out
    if _follows(x, out.shape[-1]):
        call.link((x, "... ; e"), (out, "... e"))
    else:
        call.pin(out, out.ndim - 1, LOOKED_UP)
        call.pin_values(x, "it looks up an axis of another size")
        call.link((x, "..."), (out, "... _"))


@rule("aten.bincount", "aten.histc")
def count(call: Call) -> None:
    """How often each value occurs: the axis that the index numbers becomes the dimension of the counts."""
    x, out = call["self"], call.out
    whole = call.get("bins") is None or (call.get("min") in (0, None) and call.get("max") in (out.shape[0] - 1, None))
    if _follows(x, out.shape[0]) and whole and call.get("weights") is None:
        call.link((x, " ".join([*(f"d{d}" for d in range(x.ndim)), "; e"])), (out, "e"))
    else:
        call.pin_all([x, out], "counts of values from outside")


@rule(
    "aten.nonzero", "aten.masked_select", "aten.masked_scatter", "aten.searchsorted", "aten.bucketize", "aten.unique",
    "aten._unique2", "aten.unique_dim", "aten.unique_consecutive", "aten.isin", "aten.take", "aten.put",
    "aten.nonzero_static",
)  # fmt: skip
def value_dependent(call: Call) -> None:
    """Which elements are meant depends on values: all that takes part stays put."""
    call.pin_all([*call.tensors, *call.results], f"{call.node.target} depends on values")
