"""Looking up and writing by integer tensors.

An index tensor is read as its one-hot encoding, with the axis that it indexes as one more dimension: then every
operator here is a product of tensors, and is labelled so. An index whose values have no known axis (token ids,
positions, a constant table) singles out what it looks up, which is pinned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from permgraph.rules.call import Call
from permgraph.rules.registry import aten, rule
from permgraph.rules.typed_tensor import TypedTensor

LOOKED_UP = "looked up by values from outside"
LAST_WINS = "of several values written to one place the last one wins"


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


@rule("aten.embedding", values="looked up", acts="moved")
def embedding(call: Call) -> None:
    """The rows of a table (v, c) at given positions."""
    weight, indices = call["weight"], call["indices"]
    row = _mark(call, weight, 0, indices)
    call.link((weight, f"{row} c"), (indices, "... ; e0"), (call.out, "... c"))


@rule(*aten("_embedding_bag _embedding_bag_forward_only embedding_bag"))
def embedding_bag(call: Call) -> None:
    """Sums of rows of a table (v, c)."""
    weight = call["weight"]
    call.pin(weight, 0, LOOKED_UP)
    call.pin_all([t for t in call.tensors if t is not weight], LOOKED_UP)
    call.pin_all(call.results[1:], LOOKED_UP)
    call.link((weight, "_ c"), (call.out, "_ c"))
    call.pin(call.out, 0, LOOKED_UP)


@rule("aten.index_select", values="looked up", zeros="all", acts="moved")
def index_select(call: Call) -> None:
    """Given indices of one dimension."""
    x, index = call["self"], call["index"]
    dim = call.dim(x)
    if index.known is not None and x.ndim:
        call.take_known(x, call.out, dim, index.known)
        return
    looked = call.names(x, named={dim: _mark(call, x, dim, index)} if x.ndim else {})
    call.link((x, looked), (index, f"k ; e{dim}"), (call.out, call.names(x, named={dim: "k"} if x.ndim else {})))
    call.carry_values(x, call.out)


@rule("aten.gather", values="looked up", zeros="all", acts="moved")
def gather(call: Call) -> None:
    """For each position of the index, one element along a dimension; the other dimensions run along."""
    x, index, dim = call["self"], call["index"], call.dim(call["self"])
    _along(call, x, [(index, True), (call.out, False)], index, dim)
    call.carry_values(x, call.out)


@rule(*aten("nll_loss_forward nll_loss2d_forward"), values="derived")
def class_loss(call: Call) -> None:
    """Of x (class), (sample, class) or (sample, class, ...) the element at each sample's class, times its weight."""
    x, target, weight = call["self"], call["target"], call.get("weight")
    out, total = call.results
    dim = min(x.ndim - 1, 1)
    if 0 <= call["ignore_index"] < x.shape[dim]:
        for tensor, where in ((x, dim), (weight, 0)):
            call.pin(tensor, where, "one class is left out")
        call.pin_values(target, "one class is left out")
    looked = _mark(call, x, dim, target)
    if looked == "_":
        call.pin(weight, 0, LOOKED_UP)
    samples = call.names(x, skip=[dim])
    call.link(
        (x, call.names(x, named={dim: looked})), (weight, looked),
        (target, f"{samples} ; e{dim}"), (out, samples if call["reduction"] == 0 else ""), (total, ""),
    )  # fmt: skip


@rule(*aten("scatter scatter_add scatter_reduce"), values="joined")
def scatter(call: Call) -> None:
    """Write at positions along a dimension; the other dimensions run along."""
    x, index, dim = call["self"], call["index"], call.dim(call["self"])
    source = call.get("src")
    others = [(source, False)] if isinstance(source, TypedTensor) else []
    call.pointwise(x, call.out)
    _along(call, call.out, [(index, True), *others], index, dim)
    call.pin_values(x, "indices are mixed with other integers")
    if isinstance(source, TypedTensor):
        if str(call.node.target).removesuffix("_").endswith(("scatter.src", "scatter_.src")):
            call.pin(source, dim, LAST_WINS)
        call.pin_values(source, "indices are mixed with other integers")


def _along(
    call: Call, x: TypedTensor, others: Sequence[tuple[TypedTensor, bool]], index: TypedTensor, dim: int
) -> None:
    """Tie x, looked up along `dim`, to tensors of the index's shape (a flag says which is the index itself)."""
    looked, running = [], []
    for d in range(x.ndim):
        if d == dim:
            looked.append(_mark(call, x, d, index))
            running.append("k" if all(t.shape[d] == index.shape[d] for t, _ in others) else "_")
            if running[-1] == "_":  # `scatter` reads as much of its source as there are indices
                for tensor, _ in others:
                    call.pin(tensor, d, "only a part of it is looked up")
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
    call.link((x, " ".join(looked)), *((t, f"{shared} ; e{dim}" if is_index else shared) for t, is_index in others))


@rule(*aten("index _unsafe_index"), values="looked up", zeros="all", acts="moved")
def index(call: Call) -> None:
    """``x[i, :, j]``: index tensors, broadcast together, take the place of the dimensions that they look up."""
    x = call["self"]
    given = [(dim, i) for dim, i in enumerate(call["indices"]) if i is not None]
    if len(given) == 1 and given[0][1].known is not None:
        call.take_known(x, call.out, given[0][0], given[0][1].known)
        return
    looked, found, slots = _advanced(call, x, call["indices"])
    call.link((x, looked), *slots, (call.out, found))
    call.carry_values(x, call.out)


@rule(*aten("index_put _index_put_impl _unsafe_index_put"), values="joined", acts="moved")
def index_put(call: Call) -> None:
    """``x[i, :, j] = values``."""
    x, values = call["self"], call["values"]
    call.pointwise(x, call.out)
    given = [(dim, i) for dim, i in enumerate(call["indices"]) if i is not None]
    if len(given) == 1 and given[0][1].known is not None:
        _put_at_known(call, *given[0], values)
        return
    looked, found, slots = _advanced(call, call.out, call["indices"])
    labels = found.split()
    call.link((call.out, looked), *slots, (values, " ".join(labels[len(labels) - values.ndim :])))
    if not call.get("accumulate", False):
        places = [i for i, label in enumerate(labels[len(labels) - values.ndim :]) if label.startswith("b")]
        call.pin(values, places, LAST_WINS)
    call.pin_values(x, "indices are mixed with other integers")
    call.pin_values(values, "indices are mixed with other integers")


def _put_at_known(call: Call, dim: int, index: TypedTensor, values: TypedTensor | None) -> None:
    """Slices of the result at places that the model's code knows are those of `values`, or alike, if that is None."""
    assert index.known is not None
    known = index.known
    there = call.remember("there", lambda: call.tensor_like(call.out, dim, len(known)))
    call.take_known(call.out, there, dim, known)
    if values is not None:
        call.pointwise(there, values)
    for tensor in (call["self"], *([] if values is None else [values])):
        call.pin_values(tensor, "indices are mixed with other integers")


def _advanced(
    call: Call, x: TypedTensor, indices: Sequence[TypedTensor | None]
) -> tuple[str, str, list[tuple[TypedTensor, str]]]:
    """Patterns of x and of the result, and the index tensors with theirs."""
    masks = [(d, i) for d, i in enumerate(indices) if i is not None and i.dtype in (torch.bool, torch.uint8)]
    if masks:
        return _masked(call, x, *masks[0], alone=sum(i is not None for i in indices) == 1)
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


def _masked(
    call: Call, x: TypedTensor, dim: int, mask: TypedTensor, *, alone: bool
) -> tuple[str, str, list[tuple[TypedTensor, str]]]:
    """The dimensions that a mask covers become one, of the elements that it chooses; the others pass.

    Where the same is written to all elements that the mask chooses, their order does not matter.
    """
    why = "a mask chooses its elements"
    looked = [f"d{d}" for d in range(x.ndim)]
    if not alone:
        call.pin_all([*call.tensors, *call.results], why)
        return " ".join("_" for _ in looked), " ".join("_" * call.out.ndim), []
    found = [*looked[:dim], "_", *looked[dim + mask.ndim :]]
    values = call.get("values")
    chosen = values if isinstance(values, TypedTensor) else call.out
    at = dim - len(found) + chosen.ndim  # values may have fewer dimensions
    covered = range(dim, dim + mask.ndim)
    if chosen is values and (at < 0 or chosen.shape[at] == 1):
        return " ".join(looked), " ".join(found), [(mask, " ".join(looked[d] for d in covered))]
    call.pin(x, covered, why)
    call.pin_all([mask], why)
    call.pin(chosen, at, why)
    return " ".join("_" if d in covered else label for d, label in enumerate(looked)), " ".join(found), []


@rule(*aten("index_add index_copy"), values="joined", acts="moved")
@rule("aten.index_reduce", values="joined")
def index_add(call: Call) -> None:
    """Add or write slices at given indices of one dimension."""
    x, index, source = call["self"], call["index"], call["source"]
    dim = call.dim(x)
    call.pointwise(x, call.out)
    if index.known is not None and x.ndim:
        _put_at_known(call, dim, index, source)
        return
    looked = call.names(x, named={dim: _mark(call, call.out, dim, index)})
    call.link((call.out, looked), (index, f"k ; e{dim}"), (source, call.names(x, named={dim: "k"})))
    if "index_copy" in str(call.node.target):
        call.pin(source, dim, LAST_WINS)
    for tensor in (x, source):
        call.pin_values(tensor, "indices are mixed with other integers")


@rule("aten.index_fill", values="padded")
def index_fill(call: Call) -> None:
    """Write one value at given indices of one dimension."""
    x, index = call["self"], call["index"]
    dim = call.dim(x)
    call.pointwise(x, call.out)
    if index.known is not None and x.ndim:
        _put_at_known(call, dim, index, None)
        return
    call.link((call.out, call.names(x, named={dim: _mark(call, call.out, dim, index)})), (index, f"k ; e{dim}"))


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


@rule(*aten("bincount histc"))
def count(call: Call) -> None:
    """How often each value occurs, whatever the order: the axis that the index numbers becomes that of the counts."""
    x, out, weights = call["self"], call.out, call.get("weights")
    whole = call.get("bins") is None or (call.get("min") in (0, None) and call.get("max") in (out.shape[0] - 1, None))
    every = call.names(x)
    if _follows(x, out.shape[0]) and whole:
        call.link((x, f"{every} ; e"), (weights, every), (out, "e"))
    else:
        call.link((x, every), (weights, every), (out, "_"))
        call.pin_values(x, "it looks up an axis of another size")
        call.pin(out, 0, "counts of values from outside")


@rule("aten.masked_scatter", values="derived")
def masked_scatter(call: Call) -> None:
    """Elements of a source, one after the other, go where a mask is set.

    Along last dimensions in which the mask is the same throughout, whole rows of the source are written.
    """
    x, mask, source = call["self"], call["mask"], call["source"]
    rows = 0
    while (
        rows < min(x.ndim, source.ndim - 1)
        and x.shape[x.ndim - 1 - rows] == source.shape[source.ndim - 1 - rows]
        and _is_constant(mask, mask.ndim - 1 - rows)
    ):
        rows += 1
    same = [f"d{i}" for i in range(rows)]

    def pattern(tensor: TypedTensor) -> str:
        return " ".join([*["_"] * (tensor.ndim - rows), *same][-tensor.ndim :] if tensor.ndim else [])

    slots = [(t, pattern(t)) for t in (x, source, mask, call.out)]
    call.link(*slots)
    for tensor, _ in slots:
        call.pin(tensor, range(max(tensor.ndim - rows, 0)), "a mask chooses its elements")
        call.pin_values(tensor, "indices are mixed with other integers")


def _is_constant(mask: TypedTensor, dim: int) -> bool:
    """Whether a mask is broadcast along a dimension, now or by the operators that made it."""
    return dim < 0 or mask.shape[dim] == 1 or dim in mask.uniform


@rule(*aten("bucketize searchsorted"))
def bucketize(call: Call) -> None:
    """Elementwise: between which two of the boundaries, whose order is fixed."""
    x = call.get("self")
    boundaries: TypedTensor = call.get("boundaries", call.get("sorted_sequence"))
    call.pin_all([boundaries], "boundaries in order")
    if boundaries.ndim > 1 or call.get("sorter") is not None:
        call.pin_all([*call.tensors, *call.results], "boundaries in order")
    elif isinstance(x, TypedTensor):
        call.pointwise(x, call.out)
        call.pin_values(x, "arithmetic on an index")


@rule("aten.take")
def take(call: Call) -> None:
    """Elements by their number in memory."""
    x, index = call["self"], call["index"]
    call.pin_all([x], LOOKED_UP)
    call.pointwise(index, call.out)
    call.pin_values(index, "it looks up several axes at once")


@rule("aten.isin")
def isin(call: Call) -> None:
    """Elementwise: whether it is among others, whose order does not matter."""
    x, others = (call.get(name, call.get(name[:-1])) for name in ("elements", "test_elements"))
    if isinstance(x, TypedTensor):
        call.pointwise(x, call.out)
    for tensor in call.tensors:
        call.pin_values(tensor, "compared with other integers")
    if isinstance(others, TypedTensor):
        call.link((others, call.names(others)))


VALUE_DEPENDENT = """
    nonzero masked_select _unique2 unique_dim unique_consecutive put nonzero_static repeat_interleave.Tensor
"""


@rule(*aten(VALUE_DEPENDENT))
def value_dependent(call: Call) -> None:
    """Which elements are meant depends on values: all that takes part stays put."""
    call.pin_all([*call.tensors, *call.results], f"{call.node.target} depends on values")
