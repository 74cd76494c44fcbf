"""Further passes with other arguments: larger numbers, flags in each value, optional tensors given and left out."""

from __future__ import annotations

import enum
import inspect
import itertools
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.capture.inputs.layers import for_unread
from permgraph.capture.inputs.registry import ExampleInputs

_INSTEAD_OF_NONE = {bool: True, int: 2, float: 0.5}
"""What is given for an argument that is None, by what its annotation says that it may be."""

MAX_GUESSES = 6
"""So many sets of tensors are made up for the arguments that default to None, each of which costs a pass."""


GIVEN = " given"
"""How the name of a pass ends on tensors made up for arguments that were left out."""


def other_arguments(
    model: nn.Module, inputs: ExampleInputs, unread: Collection[str]
) -> Iterator[tuple[str, frozenset[str], ExampleInputs, bool]]:
    """The name of each pass, what of that which a user may vary it shows, its inputs, and whether flags differ."""
    call = _Call.of(model, inputs)
    if call is None:
        return
    larger = {name: value + 1 for name, value in call.values.items() if type(value) is int}
    if larger:
        yield f"larger {', '.join(larger)}", frozenset(larger), call.with_(larger), False
    for name, value in call.values.items():
        for other in _other_values(value, call.hints.get(name), instead_of_none=bool(unread) or not _is_setting(name)):
            shown = f"{name}={getattr(other, 'name', repr(other))}"
            yield shown, frozenset({shown}), call.with_({name: other}), True
    for name, value in call.values.items():
        for other in _other_numbers(value):
            yield f"{name}={other}", frozenset({f"another {name}"}), call.with_({name: other}), False
    for name in _may_be_left_out(call):
        yield f"without {name}", frozenset({f"without {name}"}), call.with_({name: None}), False
    if unread:
        yield from _given(model, call, unread)


def fixed_arguments(model: nn.Module, inputs: ExampleInputs) -> list[str]:
    """The arguments that choose by a word, where no annotation lists the words."""
    call = _Call.of(model, inputs)
    values = call.values.items() if call is not None else ()
    return [f"{n}={v!r}" for n, v in values if isinstance(v, str) and call and not _other_values(v, call.hints.get(n))]


def _may_be_left_out(call: _Call) -> list[str]:
    """The tensors that the caller gave for arguments that default to None; one other tensor stays."""
    tensors = [name for name, value in call.values.items() if isinstance(value, Tensor)]
    if call.inputs.finder != "given" or len(tensors) < 2:
        return []
    return [name for name in tensors if call.parameters[name].default is None]


def _given(
    model: nn.Module, call: _Call, unread: Collection[str]
) -> Iterator[tuple[str, frozenset[str], ExampleInputs, bool]]:
    """Tensors for the arguments that default to None: all of them together first, then each by itself."""
    absent = [name for name, value in call.values.items() if value is None and call.parameters[name].default is None]
    batch = next((value.shape[0] for value in call.values.values() if isinstance(value, Tensor) and value.ndim), 0)
    made = {
        name: [_of_batch(tensor, batch) for tensor in itertools.islice(for_unread(model, name, unread), MAX_GUESSES)]
        for name in absent
    }
    made = {name: values for name, values in made.items() if values}
    chosen = [dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=False)] if made else []
    alone = [{name: value} for name, values in made.items() for value in values] if len(made) > 1 else []
    for tensors in [*chosen[:MAX_GUESSES], *alone][:MAX_GUESSES]:
        name = f"{', '.join(tensors)}{GIVEN}"
        yield name, frozenset(f"{each} given" for each in tensors), call.with_(tensors), False


def _of_batch(tensor: Tensor, batch: int) -> Tensor:
    """The tensor with as many rows as the other arguments have, its own over and over."""
    return tensor[torch.arange(batch) % len(tensor)] if batch and tensor.ndim else tensor


def _other_values(value: Any, hint: Any, *, instead_of_none: bool = False) -> list[Any]:
    """The other values of a flag, or of an argument that its annotation says is one of several."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, enum.Enum):
        return [other for other in type(value) if other is not value]
    options = (hint, *typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    literals = [typing.get_args(option) for option in options if typing.get_origin(option) is typing.Literal]
    found = [other for values in literals for other in values if other != value]
    if value is None and not found and instead_of_none:
        return [other for kind, other in _INSTEAD_OF_NONE.items() if kind in options][:1]
    return found


#: The names that transformers has for what is returned and cached. Others that sound like these are looked at.
_SETTINGS = frozenset(
    ["output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "return_loss", "use_cache"]
)


def _is_setting(name: str) -> bool:
    """Whether a flag, by its name, says what is returned or cached: it is looked at where a parameter is unread."""
    return name in _SETTINGS


def _other_numbers(value: Any) -> list[float]:
    """Other values of a number that may turn something off: the first that the module takes."""
    if type(value) is not float:
        return []
    return [0.0, value / 2] if value else [0.5]


class _Call:
    """A call of forward with its arguments by name, those left out at their defaults."""

    def __init__(
        self, parameters: Mapping[str, inspect.Parameter], inputs: ExampleInputs, hints: Mapping[str, Any]
    ) -> None:
        self.parameters = parameters
        self.inputs = inputs
        self.hints = hints
        self.values: dict[str, Any] = {}
        for at, (name, parameter) in enumerate(parameters.items()):
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                break
            if at < len(inputs.args):
                self.values[name] = inputs.args[at]
            elif parameter.kind is not parameter.POSITIONAL_ONLY:
                self.values[name] = inputs.kwargs.get(name, parameter.default)

    @classmethod
    def of(cls, model: nn.Module, inputs: ExampleInputs) -> _Call | None:
        """None for a forward of which Python knows no signature."""
        try:
            parameters = inspect.signature(model.forward).parameters
        except (TypeError, ValueError):
            return None
        try:
            hints = typing.get_type_hints(model.forward)
        except Exception:  # names that are known where they are written, and nowhere else
            hints = {}
        return cls(parameters, inputs, hints)

    def with_(self, values: Mapping[str, Any]) -> ExampleInputs:
        """The inputs with other values for some arguments."""
        args, kwargs = list(self.inputs.args), dict(self.inputs.kwargs)
        place = {name: at for at, name in enumerate(self.parameters)}
        for name, value in values.items():
            if place[name] < len(args):
                args[place[name]] = value
            else:
                kwargs[name] = value
        return replace(self.inputs, args=tuple(args), kwargs=kwargs)
