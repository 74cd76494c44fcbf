"""What matchers that train ask of an `accelerate.Accelerator`, and have done by it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from permgraph.errors import PermgraphError
from permgraph.networks.batches import Loader


def require_usable(accelerator: Any, loader: Loader) -> None:
    """Refuse what is no accelerator, or scales gradients, and a loader that none can deal out."""
    if not hasattr(accelerator, "prepare_data_loader"):
        raise PermgraphError(
            f"accelerator= takes an accelerate.Accelerator, not a {type(accelerator).__name__}; "
            f"it comes with pip install permgraph[distributed]"
        )
    if not isinstance(loader, DataLoader):
        raise PermgraphError(
            f"an accelerator deals out the batches of a DataLoader, but the loader is a {type(loader).__name__}"
        )
    if accelerator.mixed_precision == "fp16" or accelerator.gradient_accumulation_steps != 1:
        raise PermgraphError(
            f"mixed_precision={accelerator.mixed_precision!r} and "
            f"gradient_accumulation_steps={accelerator.gradient_accumulation_steps}: the accelerator must scale no "
            f"gradients; choose 'no' or 'bf16', and 1"
        )


def mean_of_all(accelerator: Any, total: float, count: int, device: torch.device) -> float:
    """The mean over the samples of all processes, each of which has this total of so many; None is one process."""
    if accelerator is not None:
        sums = torch.tensor([total, count], dtype=torch.float64, device=device)
        total, count = accelerator.reduce(sums, reduction="sum").tolist()
    return total / count
