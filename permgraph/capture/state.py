"""The tensors of a module's state, each with every name that the state dict gives it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from permgraph.errors import CaptureError

Kind = Literal["parameter", "buffer", "constant", "input"]


@dataclass(frozen=True, eq=False)
class StateTensor:
    """One tensor of the model: tied parameters are one of these with several names and several `objects`.

    `role` is `"own"` where what the state dict holds is the module's own tensor. Where the module computes what it
    saves, that is one tensor which is `"saved"`, and the module's is another, `"made"` from such as it is loaded.
    """

    kind: Kind
    names: tuple[str, ...]
    objects: tuple[Tensor, ...]
    role: Literal["own", "saved", "made"] = "own"


def tensor_key(tensor: Tensor) -> Hashable:
    """Equal for two Python tensors which are the same memory read in the same way.

    No function mode sees it ask, neither the one that watches for values that are read nor one of the model's own.
    """
    try:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors and some subclasses have no storage
        return id(tensor)
    if tensor.numel() == 0:
        return id(tensor)
    return (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def shared_memory(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int, tuple[int, ...] | None]]:
    """Pairs of tensors of one storage that have elements in common, by their numbers.

    With each pair the order of the first one's dimensions that gives the second, or None where none does.
    """
    spans = [_span(tensor) for tensor in tensors]
    by_start = sorted(range(len(tensors)), key=lambda i: spans[i])
    for at, i in enumerate(by_start):
        for j in by_start[at + 1 :]:
            if spans[j][0] >= spans[i][1]:
                break
            order = _order_of_dims(tensors[i], tensors[j])
            if order is not None or have_common_elements(tensors[i], tensors[j]):
                yield i, j, order


def have_common_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage have elements in common."""
    (first, end), (other, other_end) = _span(a), _span(b)
    if end <= other or other_end <= first or not a.numel() or not b.numel():
        return False
    if a.dtype != b.dtype:
        return True
    start = min(a.storage_offset(), b.storage_offset())
    taken = torch.zeros(max(end, other_end) // a.element_size() - start, dtype=torch.bool, device="cpu")
    taken.as_strided(a.shape, a.stride(), a.storage_offset() - start).fill_(True)
    return bool(taken.as_strided(b.shape, b.stride(), b.storage_offset() - start).any())


def _order_of_dims(a: Tensor, b: Tensor) -> tuple[int, ...] | None:
    """The order of a's dimensions that gives b, if there is one."""
    if a.storage_offset() != b.storage_offset() or a.ndim != b.ndim or a.dtype != b.dtype:
        return None
    left = list(range(a.ndim))
    order = []
    for size, stride in zip(b.shape, b.stride(), strict=True):
        dim = next((d for d in left if a.shape[d] == size and (size == 1 or a.stride(d) == stride)), None)
        if dim is None:
            return None
        left.remove(dim)
        order.append(dim)
    return tuple(order)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first byte of its storage that a tensor reads, and the one after the last."""
    start, width = int(tensor.storage_offset()), tensor.element_size()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start * width, (start + last + 1) * width


def state_tensors(model: nn.Module) -> list[StateTensor]:
    """Parameters, then persistent buffers, then the other buffers; the names are the state dict's own.

    A tensor that the state dict does not hold is a constant, for no permutation of the state dict could move it.
    """
    named: list[tuple[str, Tensor]] = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        if is_lazy(tensor):
            raise CaptureError(f"{name} is not initialised yet: call the model once, so that lazy layers take shape")
    saved = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    saved_names: dict[Hashable, list[str]] = {}
    for name, tensor in saved.items():
        saved_names.setdefault(tensor_key(tensor), []).append(name)

    objects: dict[Hashable, list[Tensor]] = {}
    names: dict[Hashable, list[str]] = {}
    for name, tensor in named:
        key = tensor_key(tensor)
        objects.setdefault(key, []).append(tensor)
        names.setdefault(key, []).append(name)

    computed = {
        key: stored for key, stored in saved_names.items() if key not in objects and _may_be_a_weight(saved[stored[0]])
    }
    found: list[StateTensor] = []
    for key, tensors in objects.items():
        is_parameter = any(isinstance(t, nn.Parameter) for t in tensors)
        stored = saved_names.get(key, [])
        kind: Kind = ("parameter" if is_parameter else "buffer") if stored else "constant"
        made = not stored and bool(computed) and (is_parameter or any(name in saved for name in names[key]))
        each = tuple({id(t): t for t in tensors}.values())
        found.append(StateTensor(kind, tuple(stored or names[key]), each, "made" if made else "own"))
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for stored in computed.values():
        kind = "buffer" if buffers.issuperset(stored) else "parameter"
        found.append(StateTensor(kind, tuple(stored), tuple(saved[name] for name in stored), "saved"))
    order = {"parameter": 0, "buffer": 1, "constant": 2}
    return sorted(found, key=lambda state: order[state.kind])


def _may_be_a_weight(tensor: Tensor) -> bool:
    """Whether something of a tensor that a module computes on saving could be permuted."""
    is_real = tensor.is_floating_point() or tensor.is_complex()
    return is_real and tensor.ndim > 0 and tensor.layout == torch.strided and not tensor.is_quantized


def strided_like(tensor: Tensor, device: torch.device | str) -> Tensor:
    """An uninitialised tensor with the shape, strides and dtype of another; under a fake mode it is a fake."""
    if tensor.is_nested:
        raise CaptureError("a nested tensor, whose rows differ in length: pass padded sequences and a mask instead")
    if tensor.is_quantized:
        raise CaptureError(
            f"a quantised tensor of {tensor.dtype} and shape {tuple(tensor.shape)}: its integers and their scales "
            "cannot be renumbered as weights are; pass the model in floating point that it was made from"
        )
    if tensor.layout != torch.strided:
        raise CaptureError(
            f"a tensor of {tensor.layout} and shape {tuple(tensor.shape)}: only dense ones are supported"
        )
    return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=device)
