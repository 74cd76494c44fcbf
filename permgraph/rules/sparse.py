"""Sparse matrices: typed as the dense ones that they stand for, which of their elements are zero included."""

from __future__ import annotations

from permgraph.rules.call import Call
from permgraph.rules.linear import addmm
from permgraph.rules.registry import aten, rule


@rule(*aten("_to_sparse _to_dense _coalesce"))
def layout(call: Call) -> None:
    """The same matrix in another form."""
    call.pointwise(call["self"], call.out)


rule("aten._sparse_addmm")(addmm)


@rule("aten._sparse_coo_tensor_with_dims_and_tensors")
def from_elements(call: Call) -> None:
    """Elements (element, ...), or slices, put where a table of numbers (dimension, element) says."""
    indices, values, out = call["indices"], call["values"], call.out
    sparse = call["sparse_dim"]
    call.pin_all([indices], "it says where the elements of a sparse matrix stand")
    call.pin(values, 0, "placed by numbers from outside")
    call.pin(out, range(sparse), "placed by numbers from outside")
    call.link((values, "_ ..."), (out, " ".join([*"_" * sparse, "..."])))
