"""`capture`: one forward pass, on tensors without memory where that is possible."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import linecache
import logging
import re
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch

from permgraph.capture.captured import Captured
from permgraph.capture.counting import Outputs
from permgraph.capture.draws import drawn_like
from permgraph.capture.environment import (
    WithoutDropout,
    checked_indices,
    make_transparent,
    one_at_a_time,
    reference_kernels,
    train,
)
from permgraph.capture.held_state import HeldState
from permgraph.capture.inputs.registry import ExampleInputs, find_inputs
from permgraph.capture.known import KnownValues
from permgraph.capture.module_copy import as_parameter_like, copy_inputs, copy_module
from permgraph.capture.outputs import returned_tensors, tensor_leaves
from permgraph.capture.passes import Variation
from permgraph.capture.python_state import MAX_LENGTH, OF_MODULES, python_state_restored
from permgraph.capture.record import Limits, Recorder
from permgraph.capture.result import said_of
from permgraph.capture.saved_layout import Loading
from permgraph.capture.schema import signature
from permgraph.capture.state import StateTensor, state_tensors, strided_like
from permgraph.capture.subject import Subject, unwrap
from permgraph.capture.untracked import WatchUntrackedReads, memory_readers_refuse_fakes
from permgraph.errors import CaptureError, NoInputsError, SpecError
from permgraph.weights.distributed import fully_sharded

logger = logging.getLogger(__name__)

Mode = Literal["fake", "real"]

_CPU = torch.device("cpu")
_META = torch.device("meta")

#: A fake pass that ends with one of these says nothing against the inputs: the model asked for values.
_NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    NotImplementedError,
)
_NEEDS_VALUES_WORDS = (
    "fake", "data pointer", "data_ptr", "numpy", "meta tensor", "data-dependent", "shape_env", "local object"
)  # fmt: skip

#: Weights on the meta device are made up for a pass on real tensors, up to this many bytes: where the caller gave the
#: inputs, and where they are guessed, so that a pass may well fail and be tried again.
_MATERIALISE_LIMIT = 8 * 2**30
_MATERIALISE_LIMIT_GUESSED = 2 * 2**30
#: No new candidate for the inputs is tried after this many seconds.
_GUESS_SECONDS = 60.0


def capture(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: Outputs = None,
    max_nodes: int = 200_000,
    max_seconds: float | None = None,
) -> Captured:
    """Runs a module's forward pass once and returns the graph of its ATen operators.

    The pass runs on fake tensors, which have shapes and no memory, so that a model on the meta device will do. Where
    the model asks for a value (`.item()`, `nonzero`, a branch on data), the pass is repeated on real tensors, and
    the result says so. Everything happens on a copy of the module's Python structure, in evaluation mode: the
    model, its tensors, flags, hooks and configs are left alone, and so are the global random generators. Forward
    hooks are part of the model, and run.

    `example_inputs` is the tuple of positional arguments (a lone tensor stands for a tuple of one), `example_kwargs`
    the keyword arguments; `model(*args, **kwargs)` must run. Without either, the registered finders infer them.

    `outputs` says which of the tensors that it returns count as its result, see `auto_spec`; it raises `SpecError`
    where these are not there.

    Raises `CaptureError` if the model cannot be run, if no inputs for it are found, or if the pass takes more than
    `max_nodes` operators or `max_seconds` seconds.

    >>> captured = capture(torch.nn.Linear(3, 5), (torch.zeros(2, 3),))
    >>> [str(node.target) for node in captured.graph.nodes if node.op == "call_function"]
    ['aten.t.default', 'aten.addmm.default']
    """
    with one_at_a_time():  # the time that another thread's capture takes is not this one's
        limits = Limits(max_nodes, max_seconds, time.monotonic())
        return _capture(replace(unwrap(model), outputs=outputs), example_inputs, example_kwargs, limits)


def _capture(
    subject: Subject,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None,
    limits: Limits,
) -> Captured:
    name = type(subject.core).__name__
    if (layer := fully_sharded(subject.core)) is not None:
        raise CaptureError(
            f"{layer or name} has been through fully_shard, which leaves only a part of each parameter here: find the "
            "spec of the model as it was before (on the meta device will do), and pass spec= to align"
        )
    if example_inputs is not None or example_kwargs is not None:
        inputs = ExampleInputs(_as_args(example_inputs), dict(example_kwargs or {}), "given")
        return _attempt_with_given(subject, inputs, limits)
    if subject.inputs is not None:
        return _attempt_with_given(subject, subject.inputs, limits)

    tried: list[tuple[str, BaseException | None]] = []
    first: BaseException | None = None
    for candidate in find_inputs(subject.core):
        if tried and time.monotonic() - limits.started > _GUESS_SECONDS:
            tried.append((f"(no more were tried after {_GUESS_SECONDS:.0f} s)", None))
            break
        try:
            return _attempt(subject, candidate, limits)
        except _PassError as failure:
            if isinstance(failure.cause, ImportError):
                raise CaptureError(
                    f"{name} cannot be run here: {type(failure.cause).__name__}: {first_line(failure.cause)}"
                ) from failure.cause
            first = first or failure.cause
            tried.append((f"{candidate.finder}: {candidate.describe()}", failure.cause))
            logger.debug("%s: candidate failed: %s: %s", name, tried[-1][0], first_line(failure.cause))
    listing = "\n".join(_listing(tried)) if tried else "  (no finder had a candidate)"
    raise NoInputsError(
        f"no example inputs for {name} were found; it takes {_signature(subject.core)}. Tried:\n{listing}\n"
        "Pass example_inputs=(...) or example_kwargs={...} with which model(*example_inputs, **example_kwargs) runs."
    ) from first


def _listing(tried: list[tuple[str, BaseException | None]]) -> list[str]:
    """What was tried, a line for all that failed alike: for the same reason, but for the sizes that it names."""
    alike: dict[str, tuple[str, list[str]]] = {}
    for text, error in tried:
        cause = f"{type(error).__name__}: {first_line(error)}" if error else ""
        alike.setdefault(re.sub(r"\d+(, \d+)*", "#", cause), (cause, []))[1].append(text)
    lines = []
    for cause, described in alike.values():
        first_of_each = {text.partition(":")[0]: text for text in reversed(described)}
        shown = list(dict.fromkeys((*described[:2], *first_of_each.values()))) if len(described) > 3 else described
        more = f" and {len(described) - len(shown)} more" if len(shown) < len(described) else ""
        lines.append(f"  {', '.join(shown)}{more}{f': {cause}' if cause else ''}")
    return lines


class _PassError(CaptureError):
    """A forward pass failed for a reason which other inputs may not have."""

    def __init__(self, message: str, cause: BaseException) -> None:
        super().__init__(message)
        self.cause = cause


class _TooLargeError(Exception):
    """A pass on real tensors would need more memory than is reasonable."""


def _attempt(subject: Subject, inputs: ExampleInputs, limits: Limits) -> Captured:
    """A fake pass, then where that asks for values a real one."""
    name = type(subject.core).__name__
    try:
        return _pass(subject, inputs, limits, "fake", None)
    except (CaptureError, SpecError):
        raise
    except Exception as error:
        first = error
    if not needs_values(first):
        raise _failure(name, inputs, first) from first
    reason = f"{type(first).__name__}: {first_line(first)}"
    logger.info("%s: fake tensors are not enough (%s); using real ones", name, reason)
    try:
        return _pass(subject, inputs, limits, "real", reason)
    except (CaptureError, SpecError):
        raise
    except _TooLargeError as error:
        raise _PassError(f"{name} cannot be captured on fake tensors ({reason}), and {error}", first) from first
    except Exception as error:
        raise _failure(name, inputs, error) from error


def _attempt_with_given(subject: Subject, inputs: ExampleInputs, limits: Limits) -> Captured:
    """`_attempt`, where there are no other inputs to try."""
    try:
        return _attempt(subject, inputs, limits)
    except _PassError as failure:
        raise CaptureError(str(failure)) from failure.cause


def _failure(name: str, inputs: ExampleInputs, error: Exception) -> _PassError:
    whose = "the inputs given" if inputs.finder == "given" else f"the inputs of finder {inputs.finder!r}"
    return _PassError(
        f"{name} does not run on {whose}, {inputs.describe()}: {type(error).__name__}: {first_line(error)}. "
        "Pass example_inputs=(...) or example_kwargs={...} with which model(*example_inputs, **example_kwargs) runs.",
        error,
    )


def needs_values(error: BaseException | None) -> bool:
    """Whether a pass on fake tensors ended because the model asked for values, or for what only real tensors do."""
    while error is not None:
        if isinstance(error, _NEEDS_VALUES) and not _raised_by_model(error):
            return True
        if any(word in str(error).lower() for word in _NEEDS_VALUES_WORDS) or _is_assertion_of_fake_mode(error):
            return True
        error = error.__cause__
    return False


def _raised_by_model(error: BaseException) -> bool:
    """Whether a statement outside torch raised this `NotImplementedError`: what a model has not is not about values."""
    if type(error) is not NotImplementedError or error.__traceback__ is None:
        return False
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    if str(frame.f_globals.get("__name__", "")).partition(".")[0] == "torch":
        return False
    return linecache.getline(frame.f_code.co_filename, line).strip().startswith("raise")


def _is_assertion_of_fake_mode(error: BaseException) -> bool:
    """Whether the fake mode itself, which in older versions of torch knows no nested tensors, did not expect this."""
    if not isinstance(error, AssertionError):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__") == FakeTensorMode.__module__


def _named_tensors(modules: Sequence[nn.Module]) -> dict[tuple[int, str], torch.Tensor]:
    """The tensors that modules hold by themselves, by the number of the module and the name."""
    return {
        (at, name): value
        for at, module in enumerate(modules)
        for name, value in (*vars(module).items(), *module._buffers.items())
        if isinstance(value, torch.Tensor)
    }


def _held_tensors(modules: Sequence[nn.Module]) -> Iterator[tuple[int, str, torch.Tensor]]:
    """These, and those in lists and mappings that modules hold; other objects, such as configurations, are let be.

    With the number of the module and the name of the attribute.
    """
    yield from ((at, name, value) for (at, name), value in _named_tensors(modules).items())
    waiting = [
        (at, name, value, 0)
        for at, module in enumerate(modules)
        for name, value in vars(module).items()
        if name not in OF_MODULES
    ]
    for at, name, value, depth in waiting:
        if isinstance(value, (list, tuple, dict)) and len(value) <= MAX_LENGTH and depth < 3:
            inner = value.values() if isinstance(value, dict) else value
            waiting += [(at, name, item, depth + 1) for item in inner]
        elif depth and isinstance(value, torch.Tensor):
            yield at, name, value


def capture_again(model: Any, captured: Captured, variation: Variation, limits: Limits) -> Captured:
    """A further pass of a module, on the kind of tensors that the first one needed; on real ones if it asks for values.

    Raises whatever the module raises on inputs that it does not take, and `CaptureError` beyond the limits.
    """
    with one_at_a_time():
        subject, known = replace(unwrap(model), outputs=captured.outputs), captured.not_restored
        try:
            with checked_indices() if captured.mode == "real" else contextlib.nullcontext():
                return _pass(
                    subject, variation.inputs, limits, captured.mode, captured.fallback_reason, variation, known
                )
        except Exception as error:
            if captured.mode == "real" or not needs_values(error):
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
        with checked_indices():
            return _pass(subject, variation.inputs, limits, "real", reason, variation, known)


def _pass(
    subject: Subject,
    inputs: ExampleInputs,
    limits: Limits,
    mode: Mode,
    reason: str | None,
    variation: Variation | None = None,
    not_restored: frozenset[str] | None = None,
) -> Captured:
    state = state_tensors(subject.outer)
    device = _CPU if mode == "fake" else _real_device(state)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    stand_in = (
        Fakes(fake_mode)
        if mode == "fake"
        else _Reals(state, device, inputs, None if variation is None else variation.weights)
    )
    kernels = torch._C._get_mkldnn_enabled()
    with reference_kernels(device):
        copied = copy_module(subject.outer, subject.core, state, stand_in.of_state, stand_in.of_attribute, not_restored)
        make_transparent(copied.modules)
        training = variation is not None and variation.training
        if training:
            train(copied.modules)
        recorder = Recorder(
            device=device,
            paths=copied.paths,
            stop=_run.__code__,
            adopt=lambda tensor: (copied.attribute_name(tensor), stand_in.of_unseen(tensor)),
            limits=limits,
            known=KnownValues(stand_in.of_input) if mode == "fake" else None,
            kernels=kernels,
            answers=dict(variation.answers) if variation is not None else None,
        )
        for entry, made in copied.tensors:
            known = entry.kind == "constant" and entry.role == "own" and not entry.objects[0].is_meta
            real = entry.objects[0] if known else None
            recorder.placeholder(entry.kind, entry.names, made, aliases=entry.objects, real=real)
        args, kwargs = copy_inputs((inputs.args, inputs.kwargs), stand_in.of_input, copied)
        for path, made in _named_leaves(args, kwargs):
            recorder.placeholder("input", (path,), made)
        for shared in copied.overlapping:
            recorder.untracked_read(shared)
        for tensor, alias, dims in copied.transposed_aliases:
            recorder.same_memory(tensor, alias, dims)
        held = {id(tensor): tensor for _, _, tensor in _held_tensors(copied.modules)}
        named = _named_tensors(copied.modules)
        watch = fake_mode if mode == "fake" else WatchUntrackedReads(recorder.untracked_read)
        guard = memory_readers_refuse_fakes() if mode == "fake" else contextlib.nullcontext()
        state_in_python = HeldState(copied.modules, copied.memo)
        dropout = WithoutDropout() if training else contextlib.nullcontext()
        with python_state_restored(copied.modules, copied.memo), guard, watch, recorder, dropout:
            if copied.loading is not None:
                _load(copied.loading, mode, any(entry.role == "saved" for entry in state))
            shown_before = state_in_python.shown()  # copies stand in the place of originals by now
            context = contextvars.copy_context()  # what forward sets in it is not the caller's
            results = [context.run(_run, copied.module, args, kwargs)]
            keeps_attributes = state_in_python.shown() != shown_before
            for number in range(1, 1 if variation is None else variation.calls):
                if variation is not None and variation.ends_in_evaluation and number + 1 == variation.calls:
                    train(copied.modules, False)
                results.append(context.run(_run, copied.module, args, kwargs))
        outputs, opaque = returned_tensors(results)
        left = [
            (".".join(filter(None, (copied.paths.get(id(copied.modules[at])), name))), tensor)
            for at, name, tensor in _held_tensors(copied.modules)
            if id(tensor) not in held
        ]
        for place, tensor in _named_tensors(copied.modules).items():
            recorder.replaced(named.get(place), tensor)
    if not outputs:
        raise CaptureError(f"{type(subject.core).__name__} returned no tensor, but a {type(results[0]).__name__}")
    graph = recorder.finish(outputs, left)
    end = next(node for node in reversed(graph.nodes) if node.op == "output")
    end.meta["returned"] = said_of(results, outputs, end.args[0], subject.outputs, strict=variation is None)
    for node in graph.nodes if training else ():
        node.meta["training"] = True
    _note_classes(graph, subject.outer)
    unused = tuple(
        name
        for node in graph.nodes
        if node.op == "placeholder" and node.meta["kind"] in ("parameter", "buffer") and not node.users
        for name in node.meta["names"]
    )
    keeps_state = keeps_attributes or any(
        node.op == "call_function" and _writes_to_buffer(node) for node in graph.nodes
    )
    remarks = () if copied.layout is None else (copied.layout,)
    return Captured(
        graph,
        type(subject.core).__name__,
        mode,
        reason,
        inputs,
        unused,
        opaque,
        keeps_state,
        keeps_attributes,
        remarks,
        copied.not_restored,
        subject.outputs,
    )


def _load(loading: Loading, mode: Mode, needed: bool) -> None:
    """Load what the module saves into the copy, where that is not what it holds."""
    try:
        loading.run()
    except CaptureError:
        raise
    except Exception as error:
        if mode == "fake" and needs_values(error):
            raise
        message = f"{type(loading.module).__name__} does not load what it saves: {type(error).__name__}: {error}"
        if needed:
            raise CaptureError(f"{message}; the state dict has other tensors than the module") from error
        logger.debug(message)


def _note_classes(graph: torch.fx.Graph, module: nn.Module) -> None:
    """Note of each parameter and buffer the classes of the modules that hold it, outermost first."""
    classes = {path: type(held) for path, held in module.named_modules(remove_duplicate=False)}
    for node in graph.nodes:
        if node.op == "placeholder" and node.meta["kind"] in ("parameter", "buffer"):
            parts = node.meta["names"][0].split(".")
            node.meta["classes"] = tuple(classes.get(".".join(parts[:depth])) for depth in range(len(parts)))


def _writes_to_buffer(node: torch.fx.Node) -> bool:
    """Whether an operator writes into a buffer of the module."""
    known = signature(node.target)
    pairs = zip(known.arguments, node.args, strict=False) if known is not None else ()
    written = [value for argument, value in pairs if argument.writes]
    nodes = [value for value in written if isinstance(value, torch.fx.Node)]
    return any(node.meta.get("kind") in ("buffer", "constant") for node in nodes)


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call under observation; source lines are looked for inside this frame."""
    return module(*args, **kwargs)


class Fakes:
    """Stand-ins without memory, all on the CPU, so that a model may lie on several devices, or on none."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._made: dict[int, Tensor] = {}  # kept alive, so that no id is used twice

    def of_state(self, entry: StateTensor) -> Tensor:
        return self.of_input(entry.objects[0])

    def of_attribute(self, tensor: Tensor) -> Tensor:
        # Itself, where it can be: Python may read its values, and an operator that meets it gets a fake.
        return tensor if tensor.device == _CPU else self.of_input(tensor)

    def of_unseen(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is self._mode and id(tensor) not in self._made:
            raise CaptureError(
                f"a tensor of shape {tuple(tensor.shape)} was computed where operators cannot be observed, such as "
                "another thread: run the whole forward pass in the thread that calls it"
            )
        return self.of_input(tensor)

    def of_input(self, tensor: Tensor) -> Tensor:
        fake = self._strided(tensor) if tensor.layout == torch.strided else self._mode.from_tensor(tensor)
        self._made[id(fake)] = fake
        return fake

    def _strided(self, tensor: Tensor) -> Tensor:
        # Made directly and not by `torch.empty` under the mode: a model has hundreds, and a dispatch costs more.
        with no_dispatch():  # a tensor that is met in the middle of a pass would give a fake one
            shape = strided_like(tensor, _META)
        is_parameter = isinstance(tensor, nn.Parameter)
        if is_parameter and (shape.is_floating_point() or shape.is_complex()):
            # Also for frozen ones: `matmul` folds its batch, or does not, by this flag, and one graph is enough.
            shape.requires_grad_()
        fake = FakeTensor(self._mode, shape, _CPU)
        if is_parameter:
            fake._is_param = True  # what `nn.Parameter` sets on tensors of other classes, so that isinstance holds
        return fake


class _Reals:
    """Copies on one device; what lies on the meta device is made up, and so are all weights where there is a seed."""

    def __init__(
        self, state: list[StateTensor], device: torch.device, inputs: ExampleInputs, seed: int | None = None
    ) -> None:
        self._device = device
        self._drawn = None if seed is None else torch.Generator().manual_seed(seed)
        self._values = torch.rand(2**16, generator=torch.Generator().manual_seed(0), device="cpu") * 0.1
        limit = _MATERIALISE_LIMIT if inputs.finder == "given" else _MATERIALISE_LIMIT_GUESSED
        missing = sum(e.objects[0].numel() * e.objects[0].element_size() for e in state if e.objects[0].is_meta)
        if missing > limit:
            raise _TooLargeError(
                f"the model asks for tensors' values, and its {missing / 2**30:.0f} GiB of weights are on the meta "
                "device: build a smaller configuration of the same architecture, or load the weights"
            )

    def of_state(self, entry: StateTensor) -> Tensor:
        tensor = entry.objects[0]
        made = self.of_attribute(tensor)
        if self._drawn is not None and entry.kind in ("parameter", "buffer") and made.is_floating_point():
            made.copy_(drawn_like(made, self._drawn, entry.kind == "parameter"))
        return as_parameter_like(tensor, made)

    def of_unseen(self, tensor: Tensor) -> Tensor:
        return self.of_attribute(tensor) if tensor.device != self._device else tensor

    def of_attribute(self, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor.detach().to(self._device, copy=True)
        made = strided_like(tensor, self._device)
        if not tensor.is_floating_point():
            return made.zero_()
        # Positive, so that variances are; small, so that a deep stack stays finite; repeated, for speed.
        repeats = -(-tensor.numel() // self._values.numel())
        return made.copy_(self._values.repeat(repeats)[: tensor.numel()].view(tensor.shape))

    of_input = of_attribute


def _real_device(state: list[StateTensor]) -> torch.device:
    devices = (entry.objects[0].device for entry in state)
    return next((device for device in devices if device != _META), _CPU)


def _as_args(example_inputs: Any) -> tuple[Any, ...]:
    if example_inputs is None:
        return ()
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs)
    return (example_inputs,)


def _named_leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    found: dict[int, tuple[str, Tensor]] = {}
    for root, value in (("args", args), ("kwargs", kwargs)):
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, Tensor):
                found.setdefault(id(leaf), (root + pytree.keystr(path), leaf))
            else:
                for tensor in tensor_leaves(leaf):
                    found.setdefault(id(tensor), (root + pytree.keystr(path), tensor))
    return list(found.values())


def _signature(module: nn.Module) -> str:
    try:
        return f"forward{inspect.signature(module.forward)}"
    except (TypeError, ValueError):
        return "arguments unknown"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
