"""Values that are read without an operator: what is computed from them outside of torch cannot be followed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from permgraph.capture.elementwise import of_each_element

_library = torch.library.Library("permgraph", "DEF")  # type: ignore[no-untyped-call]
_library.define("values_leave_torch(Tensor tensor) -> ()")  # type: ignore[no-untyped-call]
_library.define("same_memory(Tensor tensor, Tensor turned, int[] dims) -> ()")  # type: ignore[no-untyped-call]
_library.define("cut_anywhere(Tensor tensor, int dim) -> ()")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "elementwise_(Tensor(a!) tensor, Tensor[] others) -> Tensor(a!)",
    tags=(torch.Tag.nondeterministic_seeded,),  # what the tensor held before is not to be taken for what it holds
)
_library.impl("elementwise_", lambda tensor, others: tensor, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]

#: Stands in the graph where numpy or Python took a tensor's values, or where an attribute shares the memory of a
#: parameter in another shape. Its rule pins the tensor.
VALUES_LEAVE_TORCH = torch.ops.permgraph.values_leave_torch.default

#: Stands in the graph where a parameter is another one with its dimensions in another order. Its rule ties the two.
SAME_MEMORY = torch.ops.permgraph.same_memory.default

#: Stands in the graph where a dimension is cut at a place that depends on values. Its rule pins the dimension.
CUT_ANYWHERE = torch.ops.permgraph.cut_anywhere.default

#: Stands in the graph where a tensor's elements were replaced by what a function makes of them, each by itself.
ELEMENTWISE = torch.ops.permgraph.elementwise_.default

_PER_ELEMENT = frozenset({Tensor.apply_, Tensor.map_, Tensor.map2_})
_READERS = frozenset({
    Tensor.numpy, Tensor.tolist, Tensor.data_ptr, Tensor.__array__, Tensor.__dlpack__, Tensor.__deepcopy__,
    Tensor.__reduce_ex__, Tensor.untyped_storage, Tensor.storage, Tensor.apply_, Tensor.map_, Tensor.map2_,
})  # fmt: skip


class WatchUntrackedReads(TorchFunctionMode):
    """Calls `report` with each tensor whose values are read without an operator (`.item()` is one).

    What a function computes of each element by itself is an operator, and is written down as one.
    """

    def __init__(self, report: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._report = report

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        each = of_each_element(func.__name__, args) if func in _PER_ELEMENT else None
        if func in _READERS and each is None:
            self._report(args[0])
        if func is torch.nn.functional.one_hot and (made := _one_hot(*args, **(kwargs or {}))) is not None:
            return made
        result = func(*args, **(kwargs or {}))
        return result if each is None else ELEMENTWISE(*each)


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor | None:
    """A one-hot code without the smallest and largest value, which torch reads to check them; None if needed."""
    if num_classes < 1 or tensor.numel() == 0:
        return None
    return torch.zeros((*tensor.shape, num_classes), dtype=torch.int64).scatter_(-1, tensor.unsqueeze(-1), 1)


@contextlib.contextmanager
def memory_readers_refuse_fakes() -> Iterator[None]:
    """Make those functions of torch refuse fake tensors that would read the memory which these have not got.

    Each ends the process otherwise; whatever else reads values raises by itself.
    """
    with contextlib.ExitStack() as restore:
        for owner, name in _OF_MEMORY:
            if hasattr(owner, name):  # not in every version
                if name in vars(owner):
                    restore.callback(setattr, owner, name, vars(owner)[name])
                else:  # inherited
                    restore.callback(delattr, owner, name)
                setattr(owner, name, _refusing_fakes(getattr(owner, name)))
        yield


_OF_MEMORY: tuple[tuple[Any, str], ...] = (
    (Tensor, "apply_"), (Tensor, "map_"), (Tensor, "map2_"), (torch, "to_dlpack"), (torch.utils.dlpack, "to_dlpack"),
    (torch._C, "_to_dlpack"), (torch._C, "_to_dlpack_versioned"),
)  # fmt: skip


def _refusing_fakes(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tensor, FakeTensor):
            if (each := of_each_element(function.__name__, (tensor, *args))) is not None:
                return ELEMENTWISE(*each)
            raise NotImplementedError(f"{function.__name__} reads a tensor's memory, and a fake tensor has none")
        return function(tensor, *args, **kwargs)

    return guarded
