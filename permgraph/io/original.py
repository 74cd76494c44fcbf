"""Single files with the keys of the code that latent diffusion came with, read by the names that diffusers has today.

diffusers converts such files on loading. Its own code for that is run here once, on tensors that each hold a number of
their own: what comes out tells which key has become which name, and the tensors themselves are read when they are used.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from permgraph.errors import MismatchError
from permgraph.io.checkpoint import Checkpoint
from permgraph.io.tensors import TensorFormat, Transform

PREFIXES = {"UNet2DConditionModel": "model.diffusion_model.", "AutoencoderKL": "first_stage_model."}
"""What stands before the keys of each model of diffusers that is read."""
CONVERTERS = {"UNet2DConditionModel": "convert_ldm_unet_checkpoint", "AutoencoderKL": "convert_ldm_vae_checkpoint"}
AVERAGES = "model_ema."


@dataclass(frozen=True, eq=False)
class OriginalCheckpoint(Checkpoint):
    """A file in its original keys, by the names of one model of diffusers; what is not of that model is left as it is.

    Attributes:
        original: the checkpoint as it is.
        keys: each name to the key that holds it.
    """

    original: Checkpoint = field(kw_only=True)
    keys_by_name: Mapping[str, str] = field(kw_only=True)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.original[self.keys_by_name[name]].reshape(self.formats[name].shape)

    def on_disk(self, transform: Transform) -> Transform:
        """What becomes of the tensors in the file where this becomes of the model's."""
        names = {key: name for name, key in self.keys_by_name.items()}

        def transformed(key: str, tensor: torch.Tensor) -> torch.Tensor:
            if key not in names:
                return tensor
            name = names[key]
            return transform(name, tensor.reshape(self.formats[name].shape)).reshape(tensor.shape)

        return transformed


def is_original(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has the keys of latent diffusion's own code."""
    return any(key.startswith(tuple(PREFIXES.values())) for key in checkpoint)


def of_diffusers(checkpoint: Checkpoint, module: nn.Module) -> OriginalCheckpoint:
    """A checkpoint in its original keys, by the names that a model of diffusers has for what is of that model.

    Args:
        checkpoint: no tensor of it is read.
        module: as diffusers builds it from its configuration; on any device.

    Raises:
        MismatchError: the model is of another kind or another size, or the file has averages of the weights, which
            would no longer fit.
    """
    named = next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in PREFIXES), None)
    if named is None:
        raise MismatchError(
            "it has the keys of latent diffusion's own code, which do not say its sizes: say --model FOLDER with the "
            f"config.json of its {' or '.join(PREFIXES)} in diffusers"
        )
    if any(key.startswith(AVERAGES) for key in checkpoint):
        raise MismatchError(
            f"it has averages of its weights under {AVERAGES!r}, which would no longer fit: leave them out"
        )
    loaders: Any = importlib.import_module("diffusers.loaders.single_file_utils")
    config: Any = module.config
    keys = list(checkpoint)
    marks = {}
    for number, key in enumerate(keys, start=1):
        shape = checkpoint.formats[key].shape
        marks[key] = torch.full((1,) * len(shape), float(number), dtype=torch.float64).expand(shape)
    try:
        made = getattr(loaders, CONVERTERS[named])(dict(marks), config=dict(config))
    except Exception as error:  # whatever it raises for keys that are others than it looks for
        raise MismatchError(f"diffusers cannot convert its keys: {type(error).__name__}: {error}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found: dict[str, str] = {}
    formats: dict[str, TensorFormat] = {}
    for name, mark in made.items():
        number = int(mark.flatten()[0]) if isinstance(mark, torch.Tensor) and mark.numel() else 0
        key = keys[number - 1]
        form = checkpoint.formats[key]
        whole = torch.Size(form.shape).numel()
        if not number or key in found.values() or not bool((mark == number).all()) or mark.numel() != whole:
            raise MismatchError(f"diffusers makes its {name!r} of more than one tensor, which is not taken apart again")
        same = torch.Size(shapes.get(name, form.shape)).numel() == whole
        found[name], formats[name] = (
            key,
            TensorFormat(form.dtype, shapes[name] if same and name in shapes else form.shape),
        )
    missing = sorted(shapes.keys() - found.keys())
    if missing:
        raise MismatchError(f"it has no {missing[0]!r}, which {named} has: is --model of another size?")
    left = [key for key in keys if key.startswith(PREFIXES[named]) and key not in set(found.values())]
    if left:
        raise MismatchError(f"{left[0]!r} is nothing that {named} has: is --model of another size?")
    return OriginalCheckpoint(
        checkpoint.path,
        checkpoint.files,
        checkpoint.folder,
        checkpoint.index,
        MappingProxyType(formats),
        checkpoint._holder,
        original=checkpoint,
        keys_by_name=MappingProxyType(found),
    )
