"""Values that leave torch during a pass on real tensors: what is computed from them outside cannot be followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_library = torch.library.Library("permgraph", "DEF")  # type: ignore[no-untyped-call]
_library.define("values_leave_torch(Tensor tensor) -> ()")  # type: ignore[no-untyped-call]
_library.define("same_memory(Tensor tensor, Tensor turned, int[] dims) -> ()")  # type: ignore[no-untyped-call]

#: Stands in the graph where numpy or Python took a tensor's values, or where an attribute shares the memory of a
#: parameter in another shape. Its rule pins the tensor.
VALUES_LEAVE_TORCH = torch.ops.permgraph.values_leave_torch.default

#: Stands in the graph where a parameter is another one with its dimensions in another order. Its rule ties the two.
SAME_MEMORY = torch.ops.permgraph.same_memory.default

_READERS = frozenset({
    Tensor.numpy, Tensor.tolist, Tensor.data_ptr, Tensor.__array__, Tensor.__dlpack__, Tensor.__deepcopy__,
    Tensor.__reduce_ex__, Tensor.untyped_storage, Tensor.storage, Tensor.apply_, Tensor.map_,
})  # fmt: skip


class WatchEscapes(TorchFunctionMode):
    """Calls `report` with each tensor whose values are read without an operator (`.item()` is one)."""

    def __init__(self, report: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._report = report

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READERS:
            self._report(args[0])
        return func(*args, **(kwargs or {}))
