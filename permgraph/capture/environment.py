"""The state of the process around a capture, and the model's own switches that hide its structure."""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

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


def train(modules: Iterable[nn.Module]) -> None:
    """Chooses training mode. Changes its arguments: give it a copy."""
    for module in modules:
        vars(module)["training"] = True


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
    attributes = getattr(value, "__dict__", None)
    if attributes is None or isinstance(value, (type, nn.Module, Tensor)) or id(value) in seen:
        return
    if not any(name in attributes or f"{name}_internal" in attributes for name in TRANSPARENT_CONFIG):
        return
    seen.add(id(value))
    for name, choice in TRANSPARENT_CONFIG.items():
        if name in attributes or f"{name}_internal" in attributes:
            # A config may refuse a value; it then keeps its own, and the pass shows what it shows.
            with contextlib.suppress(Exception):
                setattr(value, name, choice)
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


@contextlib.contextmanager
def calm(device: torch.device) -> Iterator[None]:
    """Fused kernels off, gradients off, new tensors on `device`; restored at the end, and the random generators too.

    Fast paths would show one opaque operator in place of attention or a recurrent layer.
    """
    numpy_random = sys.modules.get("numpy.random")
    python_state = random.getstate()
    numpy_state = None if numpy_random is None else numpy_random.get_state()
    fake_log = logging.getLogger("torch._subclasses.fake_tensor")
    fast = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        # Not `torch.backends.*.flags`: those set unrelated switches as well, and warn about them.
        stack.callback(torch._C._set_cudnn_enabled, torch._C._get_cudnn_enabled())
        torch._C._set_cudnn_enabled(False)
        stack.enter_context(mkldnn(False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is not None:  # only then can anything in the model be compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if torch.get_default_device() != device:  # a function mode, and not free: only where it is needed
            stack.enter_context(device)
        stack.enter_context(gc_paused())  # the recorder keeps alive all that a pass makes
        fake_log.addFilter(_silence)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            fake_log.removeFilter(_silence)
            torch.backends.mha.set_fastpath_enabled(fast)
            random.setstate(python_state)
            if numpy_random is not None:
                numpy_random.set_state(numpy_state)


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
