"""One run of a module on guessed arguments, watched: how far it came, and on which of them it failed."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from permgraph.capture.inputs.layers import placed
from permgraph.errors import CaptureError


@dataclass(frozen=True)
class Operand:
    """A tensor that a function was called on: its shape, and the arguments from which it was computed."""

    shape: tuple[int, ...]
    floating: bool
    origins: frozenset[str]


@dataclass(frozen=True)
class Failure:
    """Why a run ended: the error, the torch function that raised it, if one did, and what that was called on."""

    error: Exception
    function: str = ""
    operands: tuple[Operand, ...] = ()
    arguments: tuple[Any, ...] = ()
    #: What the model looked at last before the error.
    last: Operand | None = None
    #: The argument of whose value an attribute or a key was asked that it does not have.
    asked: str | None = None


class Watch(TorchFunctionMode):
    """Follows, through the functions of torch that a run calls, which arguments each tensor comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.begin({})

    def begin(self, values: dict[str, Any]) -> None:
        """Forget the run before, and follow these arguments."""
        self.progress = 0
        self._kept: list[Any] = []
        self._origins: dict[int, frozenset[str]] = {}
        self._last: Operand | None = None
        #: How many rows the smallest table has in which an argument was looked up.
        self.rows: dict[str, int] = {}
        self._failed: tuple[Exception, str, tuple[Operand, ...], tuple[Any, ...]] | None = None
        for name, value in values.items():
            self._follow(value, name)

    def _follow(self, value: Any, name: str) -> None:
        self._kept.append(value)
        self._origins[id(value)] = frozenset({name})
        if isinstance(value, Tensor):
            return
        inner = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        for key, held in inner.items():
            self._follow(held, f"{name}.{key}")
        for held in value if isinstance(value, (list, tuple)) else ():
            self._kept.append(held)
            self._origins[id(held)] = frozenset({name})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = list(_tensors((args, tuple((kwargs or {}).values()))))
        operands = tuple(self._operand(tensor) for tensor in given)
        with_origin = [operand for operand in operands if operand.origins]
        self._last = with_origin[-1] if with_origin else self._last
        try:
            if _mixes(getattr(func, "__name__", ""), operands):
                raise TypeError("expected floating-point numbers, and found integers")
            result = func(*args, **(kwargs or {}))
        except Exception as error:
            plain = tuple(value for value in (*args, *(kwargs or {}).values()) if not isinstance(value, Tensor))
            self._failed = (error, getattr(func, "__name__", ""), operands, plain)
            raise
        self.progress += 1
        if func is nn.functional.embedding:
            for name in operands[0].origins:
                self.rows[name] = min(operands[-1].shape[0], self.rows.get(name, operands[-1].shape[0]))
        origins = frozenset().union(*(operand.origins for operand in operands))
        if origins:
            for tensor in _tensors(result):
                self._kept.append(tensor)
                self._origins[id(tensor)] = origins
        return result

    def _operand(self, tensor: Tensor) -> Operand:
        # The mode is not on while it handles a call, so that these are not seen.
        return Operand(tuple(tensor.shape), tensor.is_floating_point(), self._origins.get(id(tensor), frozenset()))

    def failure(self, error: Exception) -> Failure:
        """What is known of an error that ended the run."""
        asked = self._origins.get(id(getattr(error, "obj", None)), frozenset())
        name = next(iter(asked), None)
        if self._failed is not None and self._failed[0] is error:
            return Failure(error, *self._failed[1:], last=self._last, asked=name)
        return Failure(error, last=self._last, asked=name)


def _mixes(function: str, operands: tuple[Operand, ...]) -> bool:
    """Whether a product is asked of integers and numbers, which tensors without memory let pass."""
    multiplies = function in ("linear", "matmul", "__matmul__", "bmm", "mm", "addmm", "layer_norm", "group_norm")
    if not (multiplies or function.startswith("conv")):
        return False
    return len({operand.floating for operand in operands}) > 1


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)) and depth < 4:
        for item in value:
            yield from _tensors(item, depth + 1)


@dataclass
class Trial:
    """The outcome of a run: how many functions ran, and why it failed, if it did."""

    progress: int = 0
    failure: Failure | None = None
    watch: Watch = field(default_factory=Watch)


_current: contextvars.ContextVar[Trial] = contextvars.ContextVar("trial")


class _Watched(nn.Module):
    """The module under trial, called with arguments by name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **values: Any) -> Any:
        trial = _current.get()
        trial.watch.begin(values)
        trial.failure = None
        args, kwargs = placed(self.model, values)
        try:
            with trial.watch:
                return self.model(*args, **kwargs)
        except Exception as error:
            trial.failure = trial.watch.failure(error)
            raise
        finally:
            trial.progress = trial.watch.progress


def attempt(model: nn.Module, values: dict[str, Any], max_seconds: float) -> Trial:
    """Runs a module as a capture does; the trial has a failure if it did not come to an end."""
    from permgraph.capture.run import capture  # which asks the finders, and they ask it

    trial = Trial()
    token = _current.set(trial)
    try:
        capture(_Watched(model), (), values, max_seconds=max_seconds)
    except CaptureError as error:
        trial.failure = trial.failure or Failure(error)
    finally:
        _current.reset(token)
    return trial
