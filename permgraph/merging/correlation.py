"""How alike the channels of two networks are on some data, layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from permgraph.errors import NonFiniteError
from permgraph.networks.batches import Loader, batches, evaluating, observed, run_on, undisturbed
from permgraph.networks.repair import affine_layers, channel_dim


def channel_correlations(model_a: nn.Module, model_b: nn.Module, loader: Loader) -> dict[str, Tensor]:
    """The correlation of each channel that a linear layer or convolution puts out in A with the same channel in B.

    Over examples and positions, both networks in evaluation mode. A channel that is constant in either has 0.

    Returns:
        For each layer that both forward passes call a float64 tensor (channels,).

    Raises:
        EvaluationError: the loader is empty, or a model cannot run on it.
        NonFiniteError: a layer puts out NaN or infinity.
    """
    sums: dict[str, Tensor] = {}
    with undisturbed(), evaluating(model_a, model_b):
        for batch in batches(loader):
            seen = [outputs_of_layers(model, batch) for model in (model_a, model_b)]
            for name in seen[0].keys() & seen[1].keys():
                x, y = (one[name].to(torch.float64) for one in seen)
                count = torch.full((x.shape[0],), float(x.shape[1]), dtype=torch.float64)
                moments = [m.cpu() for m in (x.sum(1), y.sum(1), (x * x).sum(1), (y * y).sum(1), (x * y).sum(1))]
                before = sums.get(name, torch.zeros(6, len(x), dtype=torch.float64))
                sums[name] = before + torch.stack([count, *moments])
    found: dict[str, Tensor] = {}
    for name, (count, x, y, xx, yy, xy) in sums.items():
        if not bool(torch.isfinite(sums[name]).all()):
            raise NonFiniteError(f"layer {name!r} puts out NaN or infinity, so that its channels cannot be compared")
        spread = ((xx - x * x / count).clamp(min=0) * (yy - y * y / count).clamp(min=0)).sqrt()
        constant = spread <= 1e-12 * (xx * yy).sqrt()
        found[name] = torch.where(constant, 0.0, (xy - x * y / count) / spread.clamp(min=1e-300))
    return found


def outputs_of_layers(model: nn.Module, batch: object) -> dict[str, Tensor]:
    """What each linear layer and convolution puts out on a batch, (channels, examples times positions)."""
    found: dict[str, Tensor] = {}

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        flat = x.detach().movedim(channel_dim(layer, x), 0).flatten(1)
        found[name] = torch.cat([found[name], flat], 1) if name in found else flat

    with observed(affine_layers(model), see):
        run_on(model, batch)
    return found
