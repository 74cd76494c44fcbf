"""The values of small tensors that do not depend on weights or inputs, kept beside a pass on fake tensors.

A model that builds a table of grid sizes and then reads it with `.item()` asks for nothing that the pass cannot know.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch

from permgraph.capture.schema import is_random

logger = logging.getLogger(__name__)

#: Larger tensors are not worth the time: what a model reads as numbers is small.
MAX_NUMEL = 4096

_ASKS_FOR_VALUES = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
#: Operators whose results have no values yet.
_UNDEFINED = ("aten::empty", "aten::new_empty")


class KnownValues:
    """Real tensors that shadow fake ones; an operator whose arguments are all known is run on them as well."""

    def __init__(self, fake: Callable[[Tensor], Tensor]) -> None:
        self._fake = fake
        self._real: dict[int, Tensor] = {}

    def remember(self, tensor: Tensor, real: Tensor) -> None:
        """Notes the value of a tensor; a copy is kept, since the pass may write to it."""
        if real.numel() <= MAX_NUMEL:
            with no_dispatch():
                self._real[id(tensor)] = real.detach().to("cpu", copy=True)

    def before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """Whether the operator's result is known, and that result, as real tensors."""
        if not self._all_known(func, args, kwargs):
            self._check_places(func, args)
            self._forget_written(func, args, kwargs)
            return False, None
        real_args, real_kwargs = pytree.tree_map_only(Tensor, lambda t: self._real[id(t)], (args, kwargs))
        try:
            with no_dispatch():
                real = func(*real_args, **real_kwargs)
                if func._schema.name.startswith(_UNDEFINED):
                    real.zero_()  # any values will do until the model writes its own
                return True, real
        except Exception as error:  # the fake pass meets the same error, unless only this kernel is missing
            logger.debug("%s on known values failed: %s", func, error)
            self._forget_written(func, args, kwargs)
            return False, None

    def answer(self, func: Any, real: Any) -> tuple[bool, Any]:
        """The operator's result where only values tell its number or its shape, and fakes alone would not do."""
        if _ASKS_FOR_VALUES.isdisjoint(func.tags):
            return False, None
        return True, pytree.tree_map_only(Tensor, self._fake, real)

    def _all_known(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        for argument in args:  # nearly every operator of a model is settled by its first argument
            if isinstance(argument, Tensor) and id(argument) not in self._real:
                return False
        if is_random(func):
            return False
        tensors = [leaf for leaf in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(leaf, Tensor)]
        return all(id(tensor) in self._real for tensor in tensors) if tensors else _is_small(args)

    def _check_places(self, func: Any, args: tuple[Any, ...]) -> None:
        """Raise IndexError where known numbers look up what is not there, as the operator does on real tensors."""
        for index, dim, size in _looked_up(func._schema.name, args):
            places = self._real.get(id(index))
            if places is None or places.dtype in (torch.bool, torch.uint8) or not places.numel():
                continue
            with no_dispatch():
                least, most = int(places.min()), int(places.max())
            if least < -size or most >= size:
                at = most if most >= size else least
                raise IndexError(f"index {at} is out of bounds for dimension {dim} with size {size}")

    def after(self, result: Any, real: Any) -> None:
        """Notes the values of an operator's results."""
        for made, value in zip(pytree.tree_leaves(result), pytree.tree_leaves(real), strict=True):
            if isinstance(made, Tensor) and value.numel() <= MAX_NUMEL:
                self._real[id(made)] = value

    def _forget_written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What is written with unknown values is unknown, and so is every view of the same memory."""
        if not self._real or not func._schema.is_mutable:
            return
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            for written in pytree.tree_leaves(given):
                real = self._real.get(id(written))
                if real is not None:
                    memory = real.untyped_storage()._cdata
                    self._real = {k: v for k, v in self._real.items() if v.untyped_storage()._cdata != memory}


def _looked_up(name: str, args: tuple[Any, ...]) -> Iterator[tuple[Tensor, int, int]]:
    """The tensors by which an operator looks up a dimension of its first one, which it is, and how long it is."""
    table = args[0] if args else None
    if not isinstance(table, Tensor):
        return
    if name == "aten::embedding":
        yield args[1], 0, table.shape[0]
    elif name == "aten::index_select" and table.ndim:
        yield args[2], args[1], table.shape[args[1]]
    elif name in ("aten::index", "aten::_unsafe_index"):
        indices = [(dim, index) for dim, index in enumerate(args[1]) if isinstance(index, Tensor)]
        if all(index.dtype not in (torch.bool, torch.uint8) for _, index in indices):  # masks cover several dimensions
            for dim, index in indices:
                yield index, dim, table.shape[dim]


def _is_small(args: tuple[Any, ...]) -> bool:
    """Whether the sizes given to `arange`, `zeros` and the like make a tensor that is worth knowing."""
    size = 1
    for argument in args:
        if isinstance(argument, (list, tuple)):
            for item in argument:
                size *= item if isinstance(item, int) else 1
        elif isinstance(argument, (int, float)):
            size = max(size, int(abs(argument))) if argument == argument and abs(argument) < 1e9 else size
    return size <= MAX_NUMEL
