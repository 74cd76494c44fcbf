"""Operators that move, cut and join whole axes."""

from __future__ import annotations

from collections.abc import Sequence

from permgraph.rules.call import Call
from permgraph.rules.registry import aten, rule
from permgraph.rules.typed_tensor import TypedTensor

TRIANGLE = "a triangle of a matrix"
VIEWS = """
    view _unsafe_view reshape _reshape_alias flatten unflatten view_as reshape_as _reshape_copy view_copy ravel
"""


@rule(*aten(VIEWS), values="moved", zeros="all", acts="moved")
def view(call: Call) -> None:
    """The same elements in row-major order."""
    x = call["self"]
    if call.get("dtype") is not None and x.dtype.itemsize != call.out.dtype.itemsize:
        call.pin_all([x, call.out], "its bytes are read as another type")
    else:
        call.regroup(x, call.out)


@rule(*aten("permute permute_copy"), values="kept", zeros="all", acts="moved")
def permute(call: Call) -> None:
    """Dimensions in the order given."""
    x = call["self"]
    call.move(x, call.out, [d % x.ndim for d in call["dims"]])


@rule(*aten("transpose swapaxes swapdims"), values="kept", zeros="all", acts="moved")
def transpose(call: Call) -> None:
    """Two dimensions change places."""
    x = call["self"]
    order = list(range(x.ndim))
    if order:
        i, j = (call.get(a, call.get(b)) % x.ndim for a, b in (("dim0", "axis0"), ("dim1", "axis1")))
        order[i], order[j] = order[j], order[i]
    call.move(x, call.out, order)


@rule(*aten("t numpy_T mT mH adjoint matrix_H"), values="kept", zeros="all", acts="moved")
def reverse_dimensions(call: Call) -> None:
    """The last two dimensions change places (all of them, in `numpy_T`)."""
    x = call["self"]
    order = list(range(x.ndim))
    name = str(call.node.target)
    call.move(x, call.out, order[::-1] if "numpy_T" in name else [*order[:-2], *order[-2:][::-1]])


@rule("aten.movedim", values="kept", zeros="all", acts="moved")
def movedim(call: Call) -> None:
    """Dimensions go to new places, the others keep their order."""
    x = call["self"]
    as_list = [v if isinstance(v, list) else [v] for v in (call["source"], call["destination"])]
    source, destination = ([d % x.ndim for d in v] for v in as_list)
    rest = iter(d for d in range(x.ndim) if d not in source)
    placed = dict(zip(destination, source, strict=True))
    call.move(x, call.out, [placed[d] if d in placed else next(rest) for d in range(x.ndim)])


@rule("aten.unsqueeze", values="kept", zeros="all", acts="moved")
def unsqueeze(call: Call) -> None:
    """A new dimension of one."""
    x = call["self"]
    at = call["dim"] % (x.ndim + 1)
    order: list[int | None] = list(range(x.ndim))
    order.insert(at, None)
    call.move(x, call.out, order)


@rule("aten.squeeze", values="kept", zeros="all", acts="moved")
def squeeze(call: Call) -> None:
    """Dimensions of one go."""
    x = call["self"]
    dims = call.dim_list(x)
    call.move(x, call.out, [d for d in range(x.ndim) if not (d in dims and x.shape[d] == 1)])


@rule(*aten("expand broadcast_to expand_as expand_copy"), values="kept", zeros="all", acts="moved")
def expand(call: Call) -> None:
    """Dimensions of one, and new ones in front, are repeated: nothing tells the copies apart."""
    x, out = call["self"], call.out
    lead = out.ndim - x.ndim
    order = [None if d < lead or x.shape[d - lead] != out.shape[d] else d - lead for d in range(out.ndim)]
    call.move(x, out, order)


@rule(*aten("repeat tile"), values="padded", zeros="all", acts="moved")
def repeat(call: Call) -> None:
    """Each dimension several times over: (copies, dimension)."""
    x, out = call["self"], call.out
    lead = out.ndim - x.ndim
    sizes: dict[str, int] = {}
    pattern = ["_"] * lead
    for d, size in enumerate(x.shape):
        copies = out.shape[lead + d] // max(size, 1)
        pattern.append(f"d{d}" if copies == 1 else "_" if size == 1 else f"(r{d} d{d})")
        if copies != 1 and size != 1:
            sizes[f"r{d}"] = copies
    call.link((x, call.names(x)), (out, " ".join(pattern)), via=(), why="", **sizes)
    call.carry_values(x, out)


@rule("aten.repeat_interleave.self_int", values="padded", zeros="all", acts="moved")
def repeat_interleave(call: Call) -> None:
    """Each index of a dimension several times in a row: (dimension, copies)."""
    x, out = call["self"], call.out
    if call.get("dim") is None:
        call.pin_all([x, out], "flattened and repeated")
        return
    dim = call.dim(x)
    repeated = call.names(x, named={dim: f"(d{dim} r)"})
    call.link((x, call.names(x)), (out, repeated), r=out.shape[dim] // max(x.shape[dim], 1))
    call.carry_values(x, out)


@rule(*aten("slice narrow slice_copy"), values="moved", zeros="all", acts="moved")
def slice_(call: Call) -> None:
    """A range of one dimension. With a step that divides the dimension, one column of (steps, step)."""
    x, out = call["self"], call.out
    dim = call.dim(x, default=0)
    size, step = x.shape[dim], call.get("step", 1)
    start = min(max(call.get("start", 0) + (size if call.get("start", 0) < 0 else 0), 0), size)
    if step == 1:
        call.take(x, out, dim, start, start + out.shape[dim])
    elif size % step == 0 and start < step and out.shape[dim] == size // step:
        call.take_every(x, out, dim, start, step)
    else:
        others = call.names(x, blank=[dim])
        call.link((x, others), (out, others))
        for tensor in (x, out):
            call.pin(tensor, dim, f"every {step}th index of {size} was taken from {start}")
        call.carry_values(x, out)


@rule(*aten("select select_copy"), values="moved", zeros="all", acts="moved")
def select(call: Call) -> None:
    """One index of a dimension."""
    x = call["self"]
    dim = call.dim(x)
    at = call["index"] % x.shape[dim]
    call.take(x, call.out, dim, at, at + 1, keep=False)


SPLITS = "split split_with_sizes chunk unsafe_split unsafe_chunk tensor_split unsafe_split_with_sizes split_copy"


@rule(*aten(SPLITS), values="moved", zeros="all", acts="moved")
def split(call: Call) -> None:
    """Consecutive ranges of one dimension."""
    x: TypedTensor = call.get("self", call.tensors[0])
    dim = call.dim(x, default=0)
    start = 0
    for out in call.results:
        call.take(x, out, dim, start, start + out.shape[dim])
        start += out.shape[dim]


@rule(*aten("unbind unbind_copy"), values="moved", zeros="all", acts="moved")
def unbind(call: Call) -> None:
    """Each index of one dimension by itself."""
    x = call["self"]
    dim = call.dim(x, default=0)
    for at, out in enumerate(call.results):
        call.take(x, out, dim, at, at + 1, keep=False)


@rule(*aten("cat concat concatenate"), values="joined", zeros="all", acts="moved")
def cat(call: Call) -> None:
    """Tensors one after the other along a dimension."""
    call.concatenate(call["tensors"], call.out, call.dim(call.out, default=0))


@rule("aten.stack", values="joined", zeros="all", acts="moved")
def stack(call: Call) -> None:
    """Tensors side by side along a new dimension."""
    out = call.out
    dim = call.dim(out, default=0)
    rows = call.remember("rows", lambda: [call.tensor_like(out, dim, 1) for _ in call["tensors"]])
    for part, row in zip(call["tensors"], rows, strict=True):
        order: list[int | None] = list(range(part.ndim))
        order.insert(dim, None)
        call.move(part, row, order)
    call.concatenate(rows, out, dim)


@rule("aten.block_diag", values="padded", zeros="all", acts="moved")
def block_diagonal(call: Call) -> None:
    """Matrices (vectors: as rows) along the diagonal of a large one, zeros around them."""
    out, parts = call.out, call["tensors"]
    row = column = 0
    for part, (rows, block) in zip(parts, call.remember("blocks", lambda: _blocks(call, parts, out)), strict=True):
        height, width = block.shape
        call.take(out, rows, 0, row, row + height)
        call.take(rows, block, 1, column, column + width)
        call.move(part, block, [*[None] * (2 - part.ndim), *range(part.ndim)])
        row, column = row + height, column + width


def _blocks(call: Call, parts: Sequence[TypedTensor], out: TypedTensor) -> list[tuple[TypedTensor, TypedTensor]]:
    """For each part the rows of the large matrix in which it stands, and itself as a matrix."""
    sizes = [(1,) * (2 - part.ndim) + part.shape for part in parts]
    rows = [call.tensor_like(out, 0, height) for height, _ in sizes]
    return [(row, call.tensor_like(row, 1, width)) for row, (_, width) in zip(rows, sizes, strict=True)]


@rule(*aten("slice_scatter select_scatter"), values="joined", zeros="all", acts="moved")
def scatter_into_range(call: Call) -> None:
    """A copy of a tensor with a range of one dimension overwritten."""
    x, src, out = call["self"], call["src"], call.out
    call.pointwise(x, out)
    dim = call.dim(x, default=0)
    if call.get("step", 1) != 1:
        call.pin_all([x, src, out], "written with a step")
    elif "index" in call.arguments:
        at = call["index"] % x.shape[dim]
        call.take(out, src, dim, at, at + 1, keep=False)
    else:
        start = call.get("start", 0)
        start = min(max(start + (x.shape[dim] if start < 0 else 0), 0), x.shape[dim])
        call.take(out, src, dim, start, start + src.shape[dim])
    call.share_values([x, src, out])


@rule(*aten("unfold unfold_copy"), values="derived", zeros="all", acts="moved")
def unfold(call: Call) -> None:
    """Windows of one dimension, in a new last dimension. Windows that do not overlap are a view."""
    x, out = call["self"], call.out
    link_windows(call, x, out, call.dim(x, "dimension"))
    call.carry_values(x, out)


def link_windows(call: Call, whole: TypedTensor, windows: TypedTensor, dim: int) -> None:
    """Tie a dimension to its windows, (windows, ..., size): a view if each index is in exactly one."""
    size = call["size"]
    disjoint = call["step"] == size or windows.shape[dim] == 1
    if disjoint and windows.shape[dim] * size == whole.shape[dim]:
        every = call.names(whole)
        call.link((whole, call.names(whole, named={dim: f"(d{dim} w)"})), (windows, f"{every} w"), via=(), w=size)
    else:
        blank = call.names(whole, blank=[dim])
        call.link((whole, blank), (windows, f"{blank} _"))
        call.pin(whole, dim, "cut into windows")
        call.pin(windows, [dim, windows.ndim - 1], "cut into windows")


@rule(*aten("tril triu"), values="padded", zeros="all", acts="moved")
def triangle(call: Call) -> None:
    """Part of a matrix is set to zero: rows and columns stay put, but for the first that are kept or set whole.

    How many these are, the number of the diagonal says, whatever the size of the matrix.
    """
    x, out, diagonal = call["self"], call.out, call.get("diagonal", 0)
    every = call.names(x)
    call.link((x, every), (out, every))
    rows, columns = (1 - diagonal, diagonal) if "triu" in str(call.node.target) else (-diagonal, diagonal + 1)
    for dim, alike in ((x.ndim - 2, rows), (x.ndim - 1, columns)):
        if alike < 2:
            for tensor in (x, out):
                call.pin(tensor, dim, TRIANGLE)
        elif alike < out.shape[dim]:
            rest = call.remember(f"rest {dim}", lambda d=dim, n=out.shape[dim] - alike: call.tensor_like(out, d, n))
            call.take(out, rest, dim, alike, out.shape[dim])
            call.pin(rest, dim, TRIANGLE)


@rule(*aten("diagonal diagonal_copy"), values="moved", zeros="all")
@rule(*aten("diag_embed diag"), values="padded", zeros="all")
def diagonal(call: Call) -> None:
    """The diagonal of a matrix: rows and columns are one axis."""
    x, out = call["self"], call.out
    matrix, line = (x, out) if x.ndim > out.ndim else (out, x)
    i = call.get("dim1", -2 if matrix is out else 0) % matrix.ndim
    j = call.get("dim2", -1 if matrix is out else 1) % matrix.ndim
    if call.get("offset", call.get("diagonal", 0)) != 0 or matrix.shape[i] != matrix.shape[j]:
        call.pin_all([x, out], "an off-diagonal")
        return
    call.unify(matrix, i, matrix, j)
    call.link((matrix, call.names(matrix, named={i: "v", j: "_"})), (line, f"{call.names(matrix, skip=(i, j))} v"))


@rule("permgraph.off_diagonal")
def off_diagonal(call: Call) -> None:
    """All of a square matrix but its diagonal, each element where it was: rows and columns are one axis."""
    x = call["matrix"]
    call.link((x, "i j"), (call.out, "i j"))
    call.unify(x, 0, x, 1)


@rule("aten.trace", values="reduced", zeros="all")
def trace(call: Call) -> None:
    """The sum of the diagonal of a matrix: rows and columns are one axis."""
    x = call["self"]
    if x.shape[0] != x.shape[1]:
        call.pin(x, (0, 1), "the diagonal of a matrix that is not square")
    else:
        call.unify(x, 0, x, 1)
        call.link((x, "v _"), (call.out, ""))


@rule(*aten("as_strided as_strided_copy"), values="derived", zeros="all", acts="moved")
def as_strided(call: Call) -> None:
    """Memory read in another pattern: understood where that only moves dimensions, recognised by their strides."""
    x, out = call["self"], call.out
    source = call.node.args[0].meta["val"]  # type: ignore[union-attr]
    strides = {(n, s): d for d, (n, s) in enumerate(zip(source.shape, source.stride(), strict=True)) if n > 1}
    wanted = list(zip(call["size"], call["stride"], strict=True))
    order = [strides.get(pair) for pair in wanted]
    whole = len(strides) == sum(n > 1 for n in x.shape) == sum(n > 1 for n, _ in wanted)
    same_place = call.get("storage_offset", source.storage_offset()) == source.storage_offset()
    if whole and same_place and all(d is not None or n == 1 for d, (n, _) in zip(order, wanted, strict=True)):
        call.move(x, out, order)
    else:
        call.pin_all([x, out], "its memory was read with other strides")


@rule(*aten("set_ resize_"))
def replace_storage(call: Call) -> None:
    """A tensor is given other memory."""
    call.pin_all([*call.tensors, *call.results], "its memory was replaced")


@rule(*aten("view_as_complex view_as_complex_copy"), values="derived", zeros="all")
def view_as_complex(call: Call) -> None:
    """The last dimension holds real and imaginary parts."""
    x = call["self"]
    call.link((x, "... p!"), (call.out, "..."), why="real and imaginary part")


@rule(*aten("view_as_real view_as_real_copy"), zeros="all")
def view_as_real(call: Call) -> None:
    """A new last dimension holds real and imaginary parts."""
    x = call["self"]
    call.link((x, "..."), (call.out, "... p!"), why="real and imaginary part")


@rule("aten.meshgrid", zeros="all")
def meshgrid(call: Call) -> None:
    """Each vector along a dimension of its own."""
    vectors = call["tensors"]
    order = list(range(len(vectors)))
    if call.get("indexing") == "xy" and len(order) > 1:
        order[:2] = [1, 0]
    for vector, out, at in zip(vectors, call.results, order, strict=True):
        if vector.ndim == 1:
            call.link((vector, "v"), (out, call.names(0, blank=range(out.ndim), named={at: "v"})))
        call.pin_values(vector, "arithmetic on an index")
