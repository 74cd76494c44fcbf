"""Components of a diffusers pipeline side by side, and what models of diffusers are run on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.capture import capture
from permgraph.capture.inputs import input_finder

SIDE, TOKENS, BATCH = 16, 5, 2


class Components(nn.Module):
    """Several networks of a pipeline as one, none of which sees what another computes.

    ``forward`` takes for each component, by its name, its arguments and keyword arguments, and returns what each of
    them returns. A parameter's name begins with its component's.
    """

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in components.items():
            self.add_module(name, module)

    def forward(self, inputs: Mapping[str, tuple[tuple[Any, ...], dict[str, Any]]]) -> dict[str, Any]:
        """What each component makes of its inputs."""
        return {name: module(*inputs[name][0], **inputs[name][1]) for name, module in self.named_children()}


def as_pipelines_use_it(module: nn.Module) -> nn.Module:
    """A model of diffusers; an autoencoder so that its forward shows the latents, whose channels other models read.

    Its own forward goes from image to image, and would say of the latents' order that nothing depends on it.
    """
    own = type(module)
    if callable(getattr(own, "encode", None)) and callable(getattr(own, "decode", None)):
        module.__class__ = type(own.__name__, (_Autoencoder, own), {})
    return module


class _Autoencoder(nn.Module):
    """What an autoencoder does for a pipeline: encode one image, decode the latents of another."""

    def forward(self, sample: Tensor, latents: Tensor) -> dict[str, Any]:
        """The code of an image, or the parameters of its distribution, and the image of latents."""
        encoded = self.encode(sample)  # type: ignore[operator]
        first = next(iter(encoded.values())) if isinstance(encoded, dict) else encoded[0]
        return {"latents": getattr(first, "parameters", first), "sample": self.decode(latents)[0]}  # type: ignore[operator]


@input_finder("components")
def of_components(model: nn.Module) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """For each component what is found for it alone."""
    if isinstance(model, Components):
        found = {name: capture(module).inputs for name, module in model.named_children()}
        yield ({name: (inputs.args, inputs.kwargs) for name, inputs in found.items()},), {}


@input_finder("diffusers")
def of_diffusers(model: nn.Module) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """A noisy sample, its time, and for a model with cross-attention what it attends to."""
    config = getattr(model, "config", None)
    named = getattr(config, "get", None)
    if named is None or (not named("_class_name") and not named("_diffusers_version")):
        return
    channels, width = named("in_channels"), named("cross_attention_dim")
    if isinstance(model, _Autoencoder) and isinstance(channels, int) and isinstance(named("latent_channels"), int):
        image = _floats(model, BATCH, channels, 2 * SIDE, 2 * SIDE)
        yield (image, _floats(model, BATCH, named("latent_channels"), SIDE // 2, SIDE // 2)), {}
    if type(model).__name__ != "UNet2DConditionModel" or not isinstance(channels, int) or not isinstance(width, int):
        return
    kwargs: dict[str, Any] = {
        "sample": _floats(model, BATCH, channels, SIDE, SIDE),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": _floats(model, BATCH, TOKENS, named("encoder_hid_dim") or width),
    }
    if named("addition_embed_type") == "text_time":
        times = named("addition_time_embed_dim")
        text = (named("projection_class_embeddings_input_dim") or 0) - 6 * times
        kwargs["added_cond_kwargs"] = {
            "text_embeds": _floats(model, BATCH, text),
            "time_ids": torch.arange(6.0 * BATCH).reshape(BATCH, 6),
        }
    yield (), kwargs


def _floats(model: nn.Module, *shape: int) -> Tensor:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
