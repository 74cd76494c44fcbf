"""Example inputs: what a module is run on when the caller gives none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from permgraph.errors import CaptureError


@dataclass(frozen=True, eq=False)
class ExampleInputs:
    """Arguments for a forward pass, and the name of the finder that made them (`"given"` for the caller's own)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    finder: str

    def describe(self) -> str:
        """The arguments' dtypes and shapes, as `(float32[2, 3, 32, 32], mask=bool[2, 7])`."""
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

_finders: dict[str, Finder] = {}


def input_finder(name: str, *, last: bool = False) -> Callable[[Finder], Finder]:
    """Registers a function which proposes inputs for a module: it yields `(args, kwargs)`, the likeliest first.

    A finder that does not know the module yields nothing. The newest finder is asked first; one with the name of
    another replaces it. One that is to be `last` is asked after all others.

    >>> @input_finder("my models")
    ... def my_inputs(model):
    ...     if hasattr(model, "my_input_size"):
    ...         yield (torch.zeros(2, model.my_input_size),), {}
    """

    def register(finder: Finder) -> Finder:
        _finders.pop(name, None)
        others = {} if not last else dict(_finders)
        for other in others:
            del _finders[other]
        _finders.update({name: finder} | others)
        return finder

    return register


def find_inputs(model: nn.Module) -> Iterator[ExampleInputs]:
    """All candidates of all finders, made as they are asked for, the newest finder first; none is given twice.

    Raises `CaptureError` for a module without a forward of its own, which no inputs would make run.
    """
    if type(model).forward is nn.Module.forward and "forward" not in vars(model):
        parts = ", ".join(name for name, _ in model.named_children()) or "none"
        raise CaptureError(f"{type(model).__name__} has no forward of its own: take one of its parts ({parts})")
    seen: set[str] = set()
    for name, finder in reversed(list(_finders.items())):
        for args, kwargs in finder(model):
            candidate = ExampleInputs(tuple(args), dict(kwargs), name)
            description = candidate.describe()
            if description not in seen:
                seen.add(description)
                yield candidate
