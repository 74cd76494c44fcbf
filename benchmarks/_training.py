"""Plain training, next to which matchers that train are timed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import nn


def plain(
    model: nn.Module,
    loader: list[tuple[torch.Tensor, torch.Tensor]],
    optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
) -> float:
    """Seconds of training a copy for one pass."""
    model = copy.deepcopy(model).train()
    steps = optimizer(list(model.parameters()))
    started = time.process_time()
    for x, y in loader:
        steps.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        steps.step()
    return time.process_time() - started
