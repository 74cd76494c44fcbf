"""What `capture` is given, unwrapped to the module that runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.capture.counting import Outputs
from permgraph.capture.inputs.registry import ExampleInputs
from permgraph.errors import CaptureError


@dataclass(frozen=True, eq=False)
class Subject:
    """`outer` is the module that names parameters, `core` the one inside its wrappers that runs.

    `outputs` says what of its result counts, see `auto_spec`.
    """

    outer: nn.Module
    core: nn.Module
    inputs: ExampleInputs | None
    outputs: Outputs = None


def unwrap(model: Any) -> Subject:
    """Opens exported programs, compiled modules and data-parallel wrappers; refuses what has no Python to run."""
    inputs: ExampleInputs | None = None
    if isinstance(model, torch.export.ExportedProgram):
        if model.example_inputs is not None:
            args, kwargs = model.example_inputs
            inputs = ExampleInputs(tuple(args), dict(kwargs), "exported program")
        model = model.module()
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected an nn.Module or an ExportedProgram, got {type(model).__name__}")
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{path or 'the model'} is a TorchScript module, whose operators cannot be observed: "
                "pass the Python module that it was scripted or traced from"
            )
    model = _unsharded(model)
    core = model
    while (inner := _inner(core)) is not None:
        core = inner
    if inputs is None and isinstance(core, torch.fx.GraphModule):
        inputs = _graph_inputs(core)
    return Subject(model, core, inputs)


def _unsharded(model: nn.Module) -> nn.Module:
    """The module inside a FullyShardedDataParallel that holds its parameters whole; any other is refused."""
    wrappers = [m for m in model.modules() if hasattr(m, "_fsdp_wrapped_module")]
    if not wrappers:
        return model
    inner: Any = wrappers[0]._fsdp_wrapped_module
    handle = getattr(wrappers[0], "_handle", None)
    flat = any(name.rpartition(".")[2] == "_flat_param" for name, _ in model.named_parameters())
    if wrappers != [model] or flat or getattr(handle, "uses_sharded_strategy", False):
        raise CaptureError(
            "FullyShardedDataParallel holds this model's parameters flattened or in shards: pass the module as it was "
            "before it was wrapped, on the meta device if it is large; its names are those of the full state dict"
        )
    assert isinstance(inner, nn.Module)
    return inner


def _inner(module: nn.Module) -> nn.Module | None:
    compiled = vars(module).get("_modules", {}).get("_orig_mod")
    if isinstance(compiled, nn.Module):
        return compiled
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        wrapped: nn.Module = module.module
        return wrapped
    return None


def _graph_inputs(module: torch.fx.GraphModule) -> ExampleInputs | None:
    """Inputs as the placeholders of a traced graph describe them, where they do."""
    values = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    if not values or not all(isinstance(value, Tensor) for value in values):
        return None
    if not all(type(size) is int for value in values for size in value.shape):
        return None
    generator = torch.Generator().manual_seed(0)
    made = []
    for value in values:
        if value.dtype.is_floating_point:
            made.append(torch.randn(value.shape, generator=generator).to(value.dtype))
        else:
            made.append(torch.zeros(tuple(value.shape), dtype=value.dtype))
    return ExampleInputs(tuple(made), {}, "placeholders")
