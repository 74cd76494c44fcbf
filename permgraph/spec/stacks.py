"""Tensors of several modules that change places, as one tensor with a dimension for the modules.

Where modules can change places as wholes, such as the experts of a mixture, their tensors of one kind are taken
together::

    experts.*.up.weight = experts.0.up.weight, experts.1.up.weight, experts.2.up.weight

The spec's axes are those of such a *stack*, ``experts.*.up.weight  3x16x8  experts experts.0.up .``: its first
dimension is the group of the modules, and every other group inside them is fibred over that. What acts on a state
dict stacks it first, and takes the result apart again; whatever else knows groups need not know that the first
dimension is spread over several names. Modules within modules make stacks with as many such dimensions, outermost
first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from permgraph.errors import MismatchError, SpecError

Names: TypeAlias = "str | tuple[Names, ...]"
"""The names in a stack: a tuple for each dimension of modules, outermost first."""

Place: TypeAlias = tuple[int, ...]


def places(names: Names, at: Place = ()) -> Iterator[tuple[Place, str]]:
    """Each name in a stack with its place, in order."""
    if isinstance(names, str):
        yield at, names
        return
    for i, inner in enumerate(names):
        yield from places(inner, (*at, i))


def dimensions(names: Names) -> tuple[int, ...]:
    """How many modules there are along each dimension of a stack.

    Raises SpecError where that differs from place to place.
    """
    if isinstance(names, str):
        return ()
    inner = {dimensions(one) for one in names}
    if len(inner) != 1:
        raise SpecError(f"a stack holds unlike numbers of modules: {names}")
    return (len(names), *inner.pop())


def named(flat: Sequence[str], sizes: Sequence[int]) -> Names:
    """The names of a stack of so many modules along each dimension, from all its names in order."""
    if not sizes:
        return flat[0]
    step = len(flat) // sizes[0]
    return tuple(named(flat[i * step : (i + 1) * step], sizes[1:]) for i in range(sizes[0]))


def stacked(stacks: Mapping[str, Names], state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict with the tensors of each stack as one, in the place of the first of them.

    The tensors are on the device of the first one. A stack that is there as such is left as it is. Of a mapping that is
    no dictionary, and may load a tensor on each access, each stack is made when it is asked for, and not kept.

    Raises MismatchError where one is missing, or of another shape or dtype than the first.
    """
    belongs = {name: stack for stack, names in stacks.items() for _, name in places(names)}
    if not isinstance(state, dict):
        return StackedOnAccess(stacks, state, belongs)
    found: dict[str, Any] = {}
    for key, value in state.items():
        stack = belongs.get(key)
        if stack is None:
            found[key] = value
        elif stack not in found:
            found[stack] = together(stack, stacks[stack], state)
    return found


class StackedOnAccess(Mapping[str, Any]):
    """A mapping with the tensors of each stack as one, which is made when it is asked for; see `stacked`.

    Args:
        stacks: the names in each.
        state: the tensors.
        belongs: for each name in a stack, that stack.
    """

    def __init__(self, stacks: Mapping[str, Names], state: Mapping[str, Any], belongs: Mapping[str, str]) -> None:
        self.stacks, self.state, self.belongs = stacks, state, belongs

    @functools.cached_property
    def keys_in_order(self) -> dict[str, None]:
        """The names, those of stacks in the place of the first of their tensors."""
        return dict.fromkeys(self.belongs.get(key, key) for key in self.state)

    def __getitem__(self, name: str) -> Any:
        if name in self.belongs:
            raise KeyError(name)
        if name in self.stacks and name not in self.state:
            return together(name, self.stacks[name], self.state)
        return self.state[name]

    def __contains__(self, name: object) -> bool:
        return name in self.keys_in_order

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_in_order)

    def __len__(self) -> int:
        return len(self.keys_in_order)


def together(stack: str, names: Names, state: Mapping[str, Any]) -> Tensor:
    """The tensors of one stack as one; see `stacked`."""
    first: Tensor | None = None
    whole: Tensor | None = None
    tensors: list[Tensor] = []
    count = math.prod(dimensions(names))
    for at, (_, name) in enumerate(places(names)):
        if name not in state:
            raise MismatchError(f"the state dict has no {name!r}, which changes places with others of {stack!r}")
        tensor = state[name]
        first = tensor if first is None else first
        if not isinstance(tensor, Tensor) or tensor.shape != first.shape or tensor.dtype != first.dtype:
            raise MismatchError(
                f"{name!r} is {_said(tensor)}, but others of {stack!r}, with which it changes places, "
                f"are {_said(first)}"
            )
        if type(tensor) in (Tensor, nn.Parameter):  # one at a time, which may have been loaded for this
            whole = first.new_empty((count, *first.shape), requires_grad=False) if whole is None else whole
            whole[at].copy_(tensor.detach())
        else:  # in parts on several processes, say
            tensors.append(tensor.detach().to(first.device))
    assert first is not None
    whole = torch.stack(tensors) if tensors else whole
    assert whole is not None
    return whole.reshape(*dimensions(names), *first.shape)


def _said(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def unstacked(stacks: Mapping[str, Names], state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with each stack taken apart into tensors under their own names, each a part of it."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        if key in stacks:
            found |= {name: value[place] for place, name in places(stacks[key])}
        else:
            found[key] = value
    return found
