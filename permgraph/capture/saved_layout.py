"""State dicts whose tensors are not the module's own: what a module computes on saving, it undoes on loading.

A permutation acts on what is saved. Where hooks transpose, fuse, split or convert weights on their way into the state
dict, the axes of the saved tensors are not those of the parameters. So the run under observation begins with the
loading of a state dict, by the module's own code, and what is permuted are the tensors that it loads.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from permgraph.capture.state import StateTensor

#: Of larger models it is not tried whether what they save is what they load.
MAX_BYTES_TO_TRY = 2**30


@dataclass(frozen=True, eq=False)
class Loading:
    """The state dict that is loaded into a copy of a module before each pass.

    Attributes:
        module: the copy.
        saved: what it loads, under the names of its own.
        tensors: the copy's parameters and buffers.
    """

    module: nn.Module
    saved: OrderedDict[str, Any] = field(repr=False)
    tensors: Sequence[Tensor] = field(repr=False)

    def run(self) -> None:
        """Load. Raises whatever the module's own code raises, and `RuntimeError` for what does not fit."""
        given = OrderedDict(self.saved)
        given._metadata = self.saved._metadata  # type: ignore[attr-defined]
        with torch.no_grad(), _LoadsByMemory(self.tensors):
            self.module.load_state_dict(given, strict=False)


class _LoadsByMemory(TorchFunctionMode):
    """While this is active, what is copied into a parameter is put in the place of its memory instead.

    So whatever holds the parameter has what was loaded, and no weight is written to. One that is its own saved tensor,
    as nearly all are, is left alone.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._tensors = {id(tensor) for tensor in tensors}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.copy_ and len(args) > 1 and id(args[0]) in self._tensors:
            into, values = args[:2]
            if into is not values:
                into.data = values.expand(into.shape).to(into.dtype, copy=True)
            return into
        return func(*args, **(kwargs or {}))


def needs_loading(core: nn.Module, state: Sequence[StateTensor]) -> bool:
    """Whether a module saves other tensors than its own, or has code of its own for loading."""
    return any(entry.role == "saved" for entry in state) or any(map(_has_code_for_loading, core.modules()))


def _has_code_for_loading(module: nn.Module) -> bool:
    hooks = [getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values()]
    code = [*hooks, *(getattr(type(module), name) for name in ("_load_from_state_dict", "load_state_dict"))]
    return not all((getattr(function, "__module__", None) or "").partition(".")[0] == "torch" for function in code)


def loading(
    outer: nn.Module, core: nn.Module, copied: nn.Module, tensors: Sequence[tuple[StateTensor, Tensor]]
) -> Loading:
    """What a copy of `core`, which is a part of `outer`, is to load: the stand-ins for what `outer` saves."""
    place = next(path for path, module in outer.named_modules() if module is core)
    prefix = f"{place}." if place else ""
    stand_ins = {name: made for entry, made in tensors if entry.role != "made" for name in entry.names}
    everything = outer.state_dict(keep_vars=True)
    saved: OrderedDict[str, Any] = OrderedDict(
        (name.removeprefix(prefix), stand_ins.get(name, value))
        for name, value in everything.items()
        if name.startswith(prefix)
    )
    saved._metadata = OrderedDict(  # type: ignore[attr-defined]
        ("" if path == place else path.removeprefix(prefix), version)
        for path, version in getattr(everything, "_metadata", {}).items()
        if path == place or path.startswith(prefix)
    )
    return Loading(copied, saved, [made for _, made in tensors])


def random_like(tensor: Tensor) -> Tensor:
    """Values between zero and one, others at near places and in other tensors, to see where each goes."""
    made = tensor.detach().clone()
    if tensor.is_floating_point():
        start = next(_STARTS) % _PERIOD
        end = start + math.prod(tensor.shape)
        made.copy_(_random_values().repeat(-(-end // _PERIOD))[start:end].view(tensor.shape))
    return made


#: A prime, so that rows and columns are no multiples of it; to draw a number for each weight would take much longer.
_PERIOD = 999_983
_STARTS = itertools.count(step=10_007)


@functools.cache
def _random_values() -> Tensor:
    return torch.rand(_PERIOD, generator=torch.Generator().manual_seed(0), device="cpu")


def not_restored(copied: nn.Module, loaded: Loading) -> frozenset[str]:
    """Save and load a copy with values of its own, and return the names of those that are not what they were."""
    before = {name: tensor.detach().clone() for name, tensor in _tensors(copied)}
    saved: Any = copied.state_dict()
    Loading(copied, saved, loaded.tensors).run()
    after = dict(_tensors(copied))
    return frozenset(
        name
        for name, tensor in before.items()
        if name not in after
        or after[name].shape != tensor.shape
        or not _about_equal(after[name].to(tensor.dtype), tensor)
    )


def _about_equal(a: Tensor, b: Tensor) -> bool:
    """Whether no two values differ by more than rounding; most are the very same, which is found out much sooner."""
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0.02, equal_nan=True)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
