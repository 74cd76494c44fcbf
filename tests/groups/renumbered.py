"""What a model computes when it is renumbered by a random element of its spec: on inputs that inference did not see."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

import permgraph as pg


def factorials(*sizes: int) -> float:
    """The log of the order of a product of symmetric groups."""
    return sum(math.lgamma(size + 1) for size in sizes)


def error(model: nn.Module, spec: pg.PermutationSpec, *inputs: Any) -> float:
    """The largest relative difference that three random permutations make, with random weights in float64."""
    model = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.3)
                tensor.mul_(torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1 if tensor.ndim > 1 else 1)
    given = [value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs]
    worst = 0.0
    for seed in range(3):
        other = copy.deepcopy(model)
        other.load_state_dict(spec.random(seed=seed).apply(model.state_dict()))
        with torch.no_grad():
            a, b = model(*given), other(*given)
        worst = max(worst, float((a - b).abs().max() / a.abs().max()))
    return worst
