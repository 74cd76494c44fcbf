"""A module of other widths, for a state dict of them: from its configuration, or as a copy with other tensors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.errors import MismatchError

#: What torch's own layers note of their sizes, as functions of the shape of their weight.
_NOTED: Mapping[type[nn.Module], Mapping[str, int]] = {
    nn.Linear: {"out_features": 0, "in_features": 1},
    nn.Embedding: {"num_embeddings": 0, "embedding_dim": 1},
    nn.modules.batchnorm._NormBase: {"num_features": 0},
    nn.GroupNorm: {"num_channels": 0},
    nn.PReLU: {"num_parameters": 0},
}


def module_of_widths(module: nn.Module, state: Mapping[str, Any], sizes: Mapping[int, int]) -> nn.Module:
    """A module like this one, in whose places a state dict of other widths fits, with these weights.

    A model of transformers is built from its configuration where the widths that it names, changed alike, give these
    shapes. Any other module is copied with the new tensors in their places, and the modules that hold them note the new
    sizes; what a forward pass knows of sizes otherwise stays as it was, and may then refuse to run.

    Args:
        module: the module, in whose mode the result is; it is not changed.
        state: all of its parameters and buffers, some of them in other shapes.
        sizes: of each width that changed the new one, for configurations.

    Raises:
        MismatchError: the state dict lacks something, or the module cannot be copied.
    """
    missing = sorted(module.state_dict().keys() - state.keys())
    if missing:
        raise MismatchError(f"the state dict lacks {missing[0]!r}, which {type(module).__name__} has")
    made = _from_configuration(module, state, sizes) or _with_tensors(module, state)
    made.load_state_dict(dict(state))
    return made


def _from_configuration(module: nn.Module, state: Mapping[str, Any], sizes: Mapping[int, int]) -> nn.Module | None:
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "to_dict") or not sizes:
        return None
    for unset in (None, *sizes.values()):  # a width that is None is some multiple of another until it is set
        widened = copy.deepcopy(config)
        for part in (widened, *vars(widened).values()):
            for name, value in list(getattr(part, "__dict__", {}).items()):
                if type(value) is int and value in sizes and _is_width(name):
                    setattr(part, name, sizes[value])
                elif value is None and unset is not None and _is_width(name):
                    setattr(part, name, unset)
        made = _built(module, widened, state)
        if made is not None:
            return made
    return None


def _built(module: nn.Module, config: Any, state: Mapping[str, Any]) -> nn.Module | None:
    """A module of this class from a configuration; None where its tensors do not have the shapes of a state dict."""
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            made = type(module)(config)
    except Exception:  # of a class that takes more, or of sizes that it refuses
        return None
    shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
    fits = shapes == {name: state[name].shape for name in shapes} and shapes.keys() == module.state_dict().keys()
    first = next(iter(module.parameters()))
    return made.to(first.device, first.dtype).train(module.training) if fits else None


def _is_width(name: str) -> bool:
    return any(word in name for word in ("size", "dim", "width", "inner", "channels", "features", "experts", "ff"))


def _with_tensors(module: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    try:
        made = copy.deepcopy(module)
    except Exception as error:
        raise MismatchError(f"{type(module).__name__} cannot be copied: {type(error).__name__}: {error}") from error
    shared: dict[int, Tensor] = {}
    for path, part in made.named_modules():
        held = [*part._parameters.items(), *part._buffers.items()]
        for name, old in held:
            new = state.get(f"{path}.{name}" if path else name)
            if old is None or not isinstance(new, Tensor) or new.shape == old.shape:
                continue
            if id(old) not in shared:
                values = torch.empty(new.shape, dtype=old.dtype, device=old.device)
                shared[id(old)] = nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values
            (part._parameters if name in part._parameters else part._buffers)[name] = shared[id(old)]
        _note_sizes(part, dict(held))
    return made


def _note_sizes(part: nn.Module, old: Mapping[str, Tensor | None]) -> None:
    """Let a module note the sizes of its new tensors: torch's own by what they mean, others where there is no doubt."""
    pairs = {
        (before, after)
        for name, tensor in old.items()
        if tensor is not None
        for before, after in zip(tensor.shape, getattr(part, name).shape, strict=True)
    }
    new = {before: after for before, after in pairs if before != after and (before, before) not in pairs}
    for name, value in list(vars(part).items()) if not type(part).__module__.startswith("torch.") else ():
        if type(value) is int and value in new and sum(before == value for before, _ in pairs) == 1:
            setattr(part, name, new[value])
    weight = getattr(part, "weight", None)
    before = old.get("weight")
    shape = weight.shape if isinstance(weight, Tensor) else getattr(part, "running_mean", torch.empty(0)).shape
    for kind, noted in _NOTED.items():
        for name, dim in noted.items() if isinstance(part, kind) else ():
            if len(shape) > dim and not (kind is nn.PReLU and shape[0] == 1):
                setattr(part, name, shape[dim])
    if isinstance(part, nn.LayerNorm) and isinstance(weight, Tensor):
        part.normalized_shape = tuple(weight.shape)
    if isinstance(part, nn.modules.conv._ConvNd) and isinstance(weight, Tensor) and isinstance(before, Tensor):
        first, second = (1, 0) if part.transposed else (0, 1)
        if part.groups > 1 and part.groups == before.shape[0]:  # of depthwise convolutions each channel is a group
            part.groups = weight.shape[0]
        part.out_channels = weight.shape[first] * (part.groups if part.transposed else 1)
        part.in_channels = weight.shape[second] * (1 if part.transposed else part.groups)
