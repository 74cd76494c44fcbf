"""Example inputs: what a module is run on when the caller gives none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class ExampleInputs:
    """Arguments for a forward pass, and the name of the finder that made them (`"given"` for the caller's own)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    finder: str

    def describe(self) -> str:
        """The shapes, as `(2, 3, 32, 32) float32`, keyword arguments by name."""
        parts = [_describe(value) for value in self.args]
        parts += [f"{name}={_describe(value)}" for name, value in self.kwargs.items()]
        return "(" + ", ".join(parts) + ")"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_describe(item) for item in value) + "]"
    return repr(value)[:40]


Candidate = tuple[tuple[Any, ...], dict[str, Any]]
Finder = Callable[[nn.Module], Iterable[Candidate]]

FINDERS: dict[str, Finder] = {}


def input_finder(name: str) -> Callable[[Finder], Finder]:
    """Registers a function from a module to candidates, each `(args, kwargs)`; a later one of the same name replaces it."""

    def register(finder: Finder) -> Finder:
        FINDERS[name] = finder
        return finder

    return register


def find_inputs(model: nn.Module) -> Iterator[ExampleInputs]:
    """All candidates of all finders, lazily, in the order in which the finders were registered."""
    for name, finder in list(FINDERS.items()):
        for args, kwargs in finder(model):
            yield ExampleInputs(args, kwargs, name)
