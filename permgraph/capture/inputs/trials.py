"""One run of a module on guessed arguments, watched: how far it came, and on which of them it failed."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from permgraph.capture.environment import make_transparent, reference_kernels
from permgraph.capture.inputs.layers import placed
from permgraph.capture.module_copy import copy_module, copy_with
from permgraph.capture.python_state import python_state_restored
from permgraph.capture.state import state_tensors
from permgraph.capture.subject import unwrap
from permgraph.capture.untracked import memory_readers_refuse_fakes
from permgraph.errors import CaptureError

logger = logging.getLogger(__name__)


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

    def __init__(self, until: float) -> None:
        super().__init__()
        self._until = until
        self.begin({})

    def begin(self, values: dict[str, Any]) -> None:
        """Forget the run before, and follow these arguments."""
        self.progress = 0
        self.failure: Failure | None = None
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
        if time.process_time() > self._until:
            raise CaptureError("the trial took too long")
        given = list(_tensors((args, tuple((kwargs or {}).values()))))
        operands = tuple(self._operand(tensor) for tensor in given)
        with_origin = [operand for operand in operands if operand.origins]
        self._last = with_origin[-1] if with_origin else self._last
        try:
            if _mixes(getattr(func, "__name__", ""), operands):
                raise TypeError("expected floating-point numbers, and found integers")
            if _lacks_batch(getattr(func, "__name__", ""), operands):
                raise TypeError("expected a batch, and found a single sample")
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

    def failure_of(self, error: Exception) -> Failure:
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


#: The rank of a batch for functions that take a single sample as well.
BATCH_RANKS = {
    "conv1d": 3, "conv2d": 4, "conv3d": 5, "conv_transpose1d": 3, "conv_transpose2d": 4, "conv_transpose3d": 5,
    "avg_pool2d": 4, "max_pool2d": 4, "_max_pool2d": 4,
}  # fmt: skip


def _lacks_batch(function: str, operands: tuple[Operand, ...]) -> bool:
    """Whether a convolution takes the samples of an argument for its channels, as it does where they are as many."""
    wanted = BATCH_RANKS.get(function)
    return wanted is not None and bool(operands and operands[0].origins) and len(operands[0].shape) == wanted - 1


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)) and depth < 4:
        for item in value:
            yield from _tensors(item, depth + 1)


@dataclass(frozen=True)
class Trial:
    """The outcome of a run: how many functions ran, why it failed if it did, and what tables were looked into."""

    progress: int
    failure: Failure | None
    rows: dict[str, int]


class _Watched(nn.Module):
    """The module under trial, called with arguments by name, while the watch of the bench follows them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **values: Any) -> Any:
        watch = _watch.get()
        watch.begin(values)
        args, kwargs = placed(self.model, values)
        try:
            with watch:
                return self.model(*args, **kwargs)
        except Exception as error:
            watch.failure = watch.failure_of(error)
            raise


_watch: contextvars.ContextVar[Watch] = contextvars.ContextVar("watch")


class Bench:
    """Runs a module on one set of arguments after another.

    All runs on tensors without memory share a copy of the module, which is where most of the time of a capture of a
    small module goes. What a run leaves behind in the copy, the next one finds: what is found here is to be captured
    anew. Where the module asks for values, a run is a capture of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._watched = _Watched(model)
        self._stack = contextlib.ExitStack()
        self._call: Callable[[dict[str, Any]], Any] | None = None

    def __enter__(self) -> Bench:
        try:
            self._call = self._on_fakes()
        except Exception as error:  # whatever keeps a module from being copied, a capture knows how to say it
            logger.debug("no bench for %s: %s: %s", type(self._watched.model).__name__, type(error).__name__, error)
            self._stack.close()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _on_fakes(self) -> Callable[[dict[str, Any]], Any] | None:
        from permgraph.capture.run import Fakes  # which asks the finders, and they ask it

        subject = unwrap(self._watched)
        state, fake_mode = state_tensors(subject.outer), FakeTensorMode(allow_non_fake_inputs=True)
        fakes = Fakes(fake_mode)
        self._stack.enter_context(reference_kernels(torch.device("cpu")))
        copied = copy_module(subject.outer, subject.core, state, fakes.of_state, fakes.of_attribute)
        if copied.loading is not None:
            return None
        make_transparent(copied.modules)
        self._stack.enter_context(python_state_restored(copied.modules, copied.memo))
        self._stack.enter_context(memory_readers_refuse_fakes())

        def call(values: dict[str, Any]) -> Any:
            made = copy_with(values, fakes.of_input, {})
            with fake_mode:
                return contextvars.copy_context().run(copied.module, **made)

        return call

    def attempt(self, values: dict[str, Any], max_seconds: float) -> Trial:
        """Runs the module; the trial has a failure if it did not come to an end, or not in time."""
        from permgraph.capture.run import capture, needs_values

        watch = Watch(time.process_time() + max_seconds)
        token = _watch.set(watch)
        try:
            if self._call is not None:
                try:
                    self._call(values)
                    return Trial(watch.progress, None, watch.rows)
                except Exception as error:
                    if not needs_values(error):
                        return Trial(watch.progress, watch.failure or Failure(error), watch.rows)
            try:
                capture(self._watched, (), values, max_seconds=max_seconds)
                return Trial(watch.progress, None, watch.rows)
            except CaptureError as error:
                return Trial(watch.progress, watch.failure or Failure(error), watch.rows)
        finally:
            _watch.reset(token)
