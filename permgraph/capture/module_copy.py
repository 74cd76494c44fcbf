"""A copy of a module which shares its Python structure and none of its tensors."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from permgraph.capture.following_copy import Memo, copy_following
from permgraph.capture.python_state import CopiedState, variables_of_classes
from permgraph.capture.saved_layout import MAX_BYTES_TO_TRY, Loading, loading, needs_loading, not_restored, random_like
from permgraph.capture.state import StateTensor, have_common_elements, shared_memory, tensor_key

logger = logging.getLogger(__name__)

StandIn = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ModuleCopy:
    """`module` runs in place of the original: its flags, attributes and configs may be changed at will.

    `tensors` pairs each tensor of the state with what stands in for it. `paths` gives the path of a module by the `id`
    of the copy or of the original, since a closure may still hold the latter. `overlapping` holds stand-ins for state
    of which a plain attribute or other state is another view, such as `self.decoder = self.encoder.weight.t()`.
    `transposed_aliases` holds pairs of which the second is the first with its dimensions in another order, and that
    order. `memo` says what each part of the original was copied as. `loading` is what is to be loaded into the copy
    before each pass, if anything is; `layout` says why what the module saves cannot be told from what it holds, and
    `not_restored` names what it does not have again when it loads what it has saved.
    """

    module: nn.Module
    modules: list[nn.Module]
    memo: Memo
    tensors: list[tuple[StateTensor, Tensor]]
    paths: dict[int, str]
    overlapping: list[Tensor]
    transposed_aliases: list[tuple[Tensor, Tensor, tuple[int, ...]]]
    loading: Loading | None = None
    layout: str | None = None
    not_restored: frozenset[str] = frozenset()

    def attribute_name(self, tensor: Tensor) -> tuple[str, ...]:
        """The dotted name of a plain tensor attribute, such as a table of rotary angles; empty for other tensors."""
        return self._attributes.get(id(tensor), ())

    @contextlib.contextmanager
    def state_restored(self) -> Iterator[None]:
        """Undo what a forward pass changes on the modules of the copy and on what else was copied with them."""
        state = CopiedState(self.modules, self.memo)
        try:
            yield
        finally:
            state.restore()

    @cached_property
    def _attributes(self) -> dict[int, tuple[str, ...]]:
        return {
            id(value): (f"{path}.{name}" if path else name,)
            for path, module in self.module.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor)
        }


class _CopiesTensors(TorchFunctionMode):
    """While this is active, `copy.deepcopy` of a tensor gives its stand-in."""

    def __init__(self, stand_in: StandIn) -> None:
        super().__init__()
        self._stand_in = stand_in

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            memo[id(tensor)] = copied = self._stand_in(tensor)
            return copied
        return func(*args, **(kwargs or {}))


def copy_with(value: Any, stand_in: StandIn, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy`, with each tensor replaced by what `stand_in` makes of it."""
    with _CopiesTensors(stand_in):
        return copy.deepcopy(value, memo)


def copy_inputs(value: Any, stand_in: StandIn, copied: ModuleCopy) -> Any:
    """`copy_with` for the arguments of a module: a function among them that holds the module gets the copy."""
    modules = {key: made for key, made in copied.memo.items() if isinstance(made, nn.Module)}
    with _CopiesTensors(stand_in):
        made, memo = copy_following(value, modules, copied.memo.outer.values(), patient=False)
    copied.memo.take(memo, [original for original in memo.originals() if not isinstance(original, Tensor)])
    return made


def copy_module(
    outer: nn.Module,
    core: nn.Module,
    state: Sequence[StateTensor],
    stand_in_for_state: Callable[[StateTensor], Tensor],
    stand_in: StandIn,
    not_restored: frozenset[str] | None = None,
) -> ModuleCopy:
    """Copies `core`, the module that runs; `outer` is the module whose state dict and paths name things.

    Whether it loads what it saves is tried unless `not_restored` says what it does not, see `ModuleCopy`.

    A deep copy reaches what a walk over submodules does not: modules in plain lists, bound methods, shared configs, and
    whatever else hooks and other functions hold. What refuses to be copied, such as a lock, is shared with the
    original; where a module refuses, only the module objects are copied, and besides what can be by itself.
    """
    copied = _copy(outer, core, state, stand_in_for_state, stand_in)
    if not needs_loading(core, state):
        return copied
    lost = _not_restored(outer, core, state) if not_restored is None else not_restored
    copied = replace(copied, not_restored=lost)
    if not lost:
        return replace(copied, loading=loading(outer, core, copied.module, copied.tensors))
    uncertain = [m for entry, m in copied.tensors if entry.role == "saved" or not lost.isdisjoint(entry.names)]
    first = f"{min(lost)} and {len(lost) - 1} more" if len(lost) > 1 else min(lost)
    reason = f"what is saved stays put where it is not the module's own, since loading it does not give back {first}"
    return replace(copied, overlapping=[*copied.overlapping, *uncertain], layout=reason)


def _not_restored(outer: nn.Module, core: nn.Module, state: Sequence[StateTensor]) -> frozenset[str]:
    """The names of what a module does not have again when it loads what it has saved, tried on a copy of its own.

    Nothing is tried on the meta device, and where the copy would be too large.
    """
    tensors = [tensor for entry in state for tensor in entry.objects[:1]]
    if any(t.is_meta for t in tensors) or sum(t.numel() * t.element_size() for t in tensors) > MAX_BYTES_TO_TRY:
        return frozenset()
    with torch.no_grad():
        tried = _copy(
            outer, core, state, lambda e: as_parameter_like(e.objects[0], random_like(e.objects[0])), random_like
        )
        try:
            return not_restored(tried.module, loading(outer, core, tried.module, tried.tensors))
        except Exception as error:
            logger.debug("%s does not load what it saves: %s: %s", type(core).__name__, type(error).__name__, error)
            return frozenset(name for entry in state if entry.role != "own" for name in entry.names)


def _copy(
    outer: nn.Module,
    core: nn.Module,
    state: Sequence[StateTensor],
    stand_in_for_state: Callable[[StateTensor], Tensor],
    stand_in: StandIn,
) -> ModuleCopy:
    memo = Memo()
    tensors: list[tuple[StateTensor, Tensor]] = []
    for entry in state:
        made = stand_in_for_state(entry)
        tensors.append((entry, made))
        memo.update({id(tensor): made for tensor in entry.objects})
    given = dict(memo)
    by_key = {tensor_key(tensor): made for entry, made in tensors for tensor in entry.objects}
    by_memory: dict[Hashable, list[tuple[Tensor, Tensor]]] = {}
    for entry, made in ((entry, made) for entry, made in tensors if entry.role != "saved"):
        key = tensor_key(entry.objects[0])
        if isinstance(key, tuple):
            by_memory.setdefault(key[0], []).append((entry.objects[0], made))
    overlapping: dict[int, Tensor] = {}

    def stand_in_for_attribute(tensor: Tensor) -> Tensor:
        key = tensor_key(tensor)
        if key in by_key:
            return by_key[key]
        for held, made in by_memory.get(key[0], ()) if isinstance(key, tuple) else ():
            if have_common_elements(held, tensor):
                overlapping[id(made)] = made
        return stand_in(tensor)

    variables = variables_of_classes(core.modules())
    with _CopiesTensors(stand_in_for_attribute):
        try:
            module, memo = copy_following(core, given, variables)
        except Exception as error:
            logger.debug("deepcopy of %s failed (%s): copying its modules only", type(core).__name__, error)
            memo = Memo(given, variables)
            module = _copy_modules(core, memo)
            _copy_attributes(list(core.modules()), memo)
    copies = {id(value): value for value in memo.values() if isinstance(value, nn.Module)}
    for copied in copies.values():
        _remove_offload_hook(copied)
        vars(copied)["_apply"] = functools.partial(_convert, copied)
    paths: dict[int, str] = {}
    for path, original in outer.named_modules():
        paths[id(original)] = path
        if id(original) in memo:
            paths[id(memo[id(original)])] = path
    transposed_aliases = []
    for found in by_memory.values():
        for i, j, order in shared_memory([held for held, _ in found]):
            first, second = found[i][1], found[j][1]
            if order is None:
                overlapping.update({id(first): first, id(second): second})
            else:
                transposed_aliases.append((first, second, order))
    modules, shared = list(copies.values()), list(overlapping.values())
    return ModuleCopy(module, modules, memo, tensors, paths, shared, transposed_aliases)


def _convert(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What `module.to(...)` and the like do to a copy: its tensors are where they should be, and stay the same ones.

    Of those that get another type, the module holds what was computed from them.
    """
    for held in module.modules() if recurse else [module]:
        for registry in (held._parameters, held._buffers):
            for name, tensor in registry.items():
                if tensor is not None and (made := function(tensor)).dtype != tensor.dtype:
                    registry[name] = made  # type: ignore[assignment]
    return module


def _remove_offload_hook(module: nn.Module) -> None:
    """Take off accelerate's hook, which would put weights fetched from elsewhere in the place of the stand-ins."""
    own = vars(module)
    if type(own.get("_hf_hook")).__module__.startswith("accelerate.") and "_old_forward" in own:
        forward = own.pop("_old_forward")
        if isinstance(forward, types.MethodType):  # still the original's, where only the modules were copied
            forward = types.MethodType(forward.__func__, module)
        own["forward"] = forward
        del own["_hf_hook"]


def _copy_modules(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A new object for each submodule, with its own registries; every other attribute is shared with the original."""
    if id(module) in memo:
        found: nn.Module = memo[id(module)]
        return found
    copied: nn.Module = object.__new__(module.__class__)  # a constructor of its own may want arguments
    memo[id(module)] = copied
    shared = dict(vars(module))
    for name, value in shared.items():
        if isinstance(value, dict) and name.startswith("_"):
            value = copy.copy(value)
        elif isinstance(value, Tensor):
            value = memo.get(id(value), value)
        elif isinstance(value, nn.Module):
            value = _copy_modules(value, memo)
        shared[name] = value
    for registry in ("_parameters", "_buffers"):
        shared[registry] = {k: memo.get(id(v), v) for k, v in shared[registry].items()}
    shared["_modules"] = {k: None if m is None else _copy_modules(m, memo) for k, m in shared["_modules"].items()}
    vars(copied).update(shared)
    return copied


def _copy_attributes(modules: Iterable[nn.Module], memo: Memo) -> None:
    """Of the other attributes of modules that were copied, a deep copy each where they let themselves be copied."""
    for module in modules:
        copied = memo[id(module)]
        for name, value in vars(module).items():
            if name in _REGISTRIES or isinstance(value, (Tensor, nn.Module)):
                continue
            try:
                made, more = copy_following(value, memo, memo.outer.values())
            except Exception as error:
                logger.debug("%s of %s is shared: %s", name, type(module).__name__, error)
                continue
            vars(copied)[name] = made
            memo.take(more, more.originals())


_REGISTRIES = ("_parameters", "_buffers", "_modules")


def as_parameter_like(original: Tensor, made: Tensor) -> Tensor:
    """Wraps a stand-in as a parameter where the original is one: some models ask."""
    return nn.Parameter(made, requires_grad=original.requires_grad) if isinstance(original, nn.Parameter) else made
