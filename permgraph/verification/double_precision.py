"""Running a model in float64 throughout, also where its code asks for less."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from permgraph.capture.control import is_higher_order, run_plainly, show_higher_order
from permgraph.capture.environment import reference_kernels

LOW_PRECISION = (torch.float32, torch.float16, torch.bfloat16)
SINGLE_ONLY = (
    torch.ops.aten.fake_quantize_per_channel_affine_cachemask,
    torch.ops.aten._fused_moving_avg_obs_fq_helper,
)
"""Operators that know no float64. Both round to few values, which are the same for float32."""
RANKING = frozenset(
    getattr(torch.ops.aten, name)
    for name in [
        "topk",
        "sort",
        "argmax",
        "argmin",
        "max",
        "min",
        "median",
        "nanmedian",
        "mode",
        "kthvalue",
        "cummax",
        "cummin",
    ]
)
"""Operators that may tell which of several values is the largest, and so which of two equal ones comes first."""


class InDoublePrecision(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reads every request for a lower precision as one for float64, so that what remains is rounding of that kind.

    `originals` gives the stand-in for each tensor of the caller's model: a function that closes over the model meets
    the latter. Operators that take functions are run step by step. `rankings` grows by the number of values and of rows
    of each operator that ranks values.
    """

    supports_higher_order_operators = True

    def __init__(self, originals: Mapping[int, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        show_higher_order(type(self))
        self._originals = originals
        self.rankings: set[tuple[int, int]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in LOW_PRECISION:
            kwargs["dtype"] = torch.float64
        if is_higher_order(func):
            with self:
                return run_plainly(func, args, kwargs)
        args = tuple(self._stand_in(a) for a in args)
        kwargs = {k: self._stand_in(v) for k, v in kwargs.items()}
        if func.overloadpacket in RANKING:
            self._note_ranking(func, args, kwargs)
        if func.overloadpacket in SINGLE_ONLY:
            args, kwargs = floating_to(torch.float32, (args, kwargs))
            return floating_to(torch.float64, func(*args, **kwargs))
        return func(*args, **kwargs)

    def _note_ranking(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        names = [argument.name for argument in func._schema.arguments]
        if "dim" not in names:  # the largest value of all, or the larger of two tensors' elements
            return
        given = {argument.name: argument.default_value for argument in func._schema.arguments}
        given.update(zip(names, args, strict=False))
        given.update(kwargs)
        tensor, dim = given["self"], given.get("dim")
        if not isinstance(tensor, Tensor) or tensor.ndim == 0:
            return
        count = math.prod(tensor.shape) if dim is None else tensor.shape[dim]
        if count > 1:
            self.rankings.add((count, tensor.numel() // count))

    def _stand_in(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._originals.get(id(value), value)
        if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
            return [self._stand_in(item) for item in value]
        return value


def floating_to(dtype: torch.dtype, values: Any) -> Any:
    """The values with every floating-point tensor in them cast."""
    return pytree.tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, values)


def in_double(tensor: Tensor) -> Tensor:
    """A copy on the CPU in float64 (integers as they are); zeros in place of a tensor without data."""
    dtype = torch.float64 if tensor.is_floating_point() else torch.complex128 if tensor.is_complex() else tensor.dtype
    if not has_values(tensor):
        return torch.zeros(tensor.shape, dtype=dtype)
    return tensor.detach().to(device="cpu", dtype=dtype, copy=True)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor's values are all at hand: neither fake, nor on the meta device, nor in parts on processes."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor) or is_traceable_wrapper_subclass(tensor))


@contextmanager
def double_by_default() -> Iterator[None]:
    """Make new tensors float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def in_double_precision() -> Iterator[None]:
    """Run a model whose weights are float64 in that precision throughout, also where it asks for less."""
    with reference_kernels(torch.device("cpu")), double_by_default(), torch.no_grad(), InDoublePrecision({}):
        yield
