"""The state of the process around a capture, and the model's own switches that hide its structure."""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import random
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from permgraph.capture.python_state import attributes_of

logger = logging.getLogger(__name__)

#: Attributes of a config object (Hugging Face's convention) and the value under which the model shows most.
TRANSPARENT_CONFIG: dict[str, Any] = {
    "_attn_implementation": "eager",
    "_experts_implementation": "batched_mm",
    "use_cache": False,
}
#: Attributes of a module (timm's convention) and the value under which it shows most.
TRANSPARENT_MODULE: dict[str, Any] = {"fused_attn": False}


def make_transparent(modules: Iterable[nn.Module]) -> None:
    """Chooses evaluation mode and the implementation that shows most. Changes its arguments: give it a copy.

    Flags are set one by one; `module.eval()` may be overridden to do more, such as to merge adapters into weights.
    """
    seen: set[int] = set()
    for module in modules:
        vars(module)["training"] = False
        _drop_sharding(module)
        for name, value in TRANSPARENT_MODULE.items():
            if isinstance(vars(module).get(name), type(value)):
                vars(module)[name] = value
        for value in list(vars(module).values()):
            _make_config_transparent(value, seen)


def train(modules: Iterable[nn.Module], training: bool = True) -> None:
    """Chooses training mode, or evaluation mode again. Changes its arguments: give it a copy."""
    for module in modules:
        vars(module)["training"] = training


class WithoutDropout(TorchFunctionMode):
    """Dropout as identity, in this thread: its random zeros would only hide what a pass in training mode shows."""

    FUNCTIONS = frozenset(
        getattr(where, name)
        for where in (torch, nn.functional)
        for name in dir(where)
        if name.rstrip("123d_").endswith("dropout") and not name.startswith(("native", "_"))
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in self.FUNCTIONS:
            return args[0] if args else given["input"]
        if func is nn.functional.multi_head_attention_forward:  # what it calls inside is not seen here
            bound = inspect.signature(func).bind(*args, **given)
            bound.arguments["dropout_p"] = 0.0
            return func(*bound.args, **bound.kwargs)
        if getattr(func, "__name__", "") in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            args = tuple(0.0 if type(value) is float else value for value in args)  # the one number that is no count
        if func is nn.functional.scaled_dot_product_attention:
            args, given["dropout_p"] = (*args[:4], *args[5:]), 0.0
            if len(args) > 4:
                given["is_causal"], args = args[4], args[:4]
        return func(*args, **given)


def _drop_sharding(module: nn.Module) -> None:
    """Removes the hooks by which `fully_shard` gathers parameters: the copy has whole ones."""
    for registry in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(registry.items()):
            if str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp"):
                del registry[key]


def _make_config_transparent(value: Any, seen: set[int]) -> None:
    attributes = attributes_of(value)
    if attributes is None or isinstance(value, (type, nn.Module, Tensor)) or id(value) in seen:
        return
    if not any(name in attributes or f"{name}_internal" in attributes for name in TRANSPARENT_CONFIG):
        return
    seen.add(id(value))
    for name, choice in TRANSPARENT_CONFIG.items():
        if name in attributes or f"{name}_internal" in attributes:
            try:
                setattr(value, name, choice)
            except Exception as error:  # a config may refuse a value: it keeps its own, and the pass shows less
                logger.info("%s keeps its %s: %s: %s", type(value).__name__, name, type(error).__name__, error)
    for inner in list(attributes.values()):
        _make_config_transparent(inner, seen)


@contextlib.contextmanager
def mkldnn(enabled: bool) -> Iterator[None]:
    """Switches mkldnn's kernels on or off for a while."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(enabled)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def _silence(record: logging.LogRecord) -> bool:
    """Fake tensors log each error with its stack before they raise it; here, raising is enough."""
    return False


class _Process:
    """The flags of this process that a pass changes; one thread at a time may, however deeply its passes are nested."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.inside: set[object] = set()
        self.restore = contextlib.ExitStack()

    def enter(self, token: object) -> None:
        """Set the flags, unless somebody is inside already."""
        self.inside.add(token)
        if len(self.inside) == 1:
            _set_flags(self.restore)

    def leave(self, token: object) -> None:
        """Restore the flags, unless somebody else is still inside."""
        self.inside.discard(token)
        if not self.inside:
            self.restore.close()


_process = _Process()


def one_at_a_time() -> contextlib.AbstractContextManager[bool]:
    """A context in which no other thread's pass runs."""
    return _process.lock


@contextlib.contextmanager
def reference_kernels(device: torch.device) -> Iterator[None]:
    """Fused kernels off, gradients off, new tensors on `device`; restored at the end, and the random generators too.

    Fast paths would show one opaque operator in place of attention or a recurrent layer. Other threads that want this
    wait until it ends. Within one thread, the first to enter sets the flags and the last to leave restores them, in
    whatever order they leave.
    """
    with _process.lock, contextlib.ExitStack() as stack:
        token = object()
        stack.callback(_process.leave, token)  # first, so that an interruption inside `enter` is undone as well
        _process.enter(token)
        if device.type == "cuda":
            stack.enter_context(torch.random.fork_rng(devices=[device]))
        if torch.get_default_device() != device:  # a function mode, and not free: only where it is needed
            stack.enter_context(device)
        yield


def _set_flags(restore: contextlib.ExitStack) -> None:
    """Set what does not depend on the device; `restore` learns how each was, so that a failure half way is undone."""
    restore.callback(random.setstate, random.getstate())
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        restore.callback(numpy_random.set_state, numpy_random.get_state())
    restore.enter_context(torch.random.fork_rng(devices=[]))
    # Not `torch.backends.*.flags`: those set unrelated switches as well, and warn about them.
    restore.callback(torch._C._set_cudnn_enabled, torch._C._get_cudnn_enabled())
    torch._C._set_cudnn_enabled(False)
    restore.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
    torch.backends.mha.set_fastpath_enabled(False)
    restore.enter_context(mkldnn(False))
    restore.enter_context(sdpa_kernel(SDPBackend.MATH))
    restore.enter_context(torch.inference_mode(False))
    restore.enter_context(torch.no_grad())
    restore.enter_context(torch.autocast("cpu", enabled=False))
    if "torch._dynamo" in sys.modules:  # only then can anything in the model be compiled
        restore.enter_context(torch.compiler.set_stance("force_eager"))
    restore.enter_context(gc_paused())  # the recorder keeps alive all that a pass makes
    fake_log = logging.getLogger("torch._subclasses.fake_tensor")
    restore.callback(fake_log.removeFilter, _silence)
    fake_log.addFilter(_silence)


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Disable cyclic garbage collection while large graphs are built that stay alive: the search would be time lost."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def checked_indices() -> contextlib.AbstractContextManager[Any]:
    """A context in which sparse tensors cannot be made with indices beyond their sizes.

    A module makes such of inputs that do not belong together; torch multiplies them unseen, which may end the process.
    """
    return torch.sparse.check_sparse_tensor_invariants(enable=True)  # type: ignore[no-untyped-call]
