"""Whether a spec's elements leave what a module computes as it is, tried by hand in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import permgraph as pg


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy in float64, every parameter and floating-point buffer of which is random."""
    made = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in made.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(values.abs() + 0.3 if name.endswith("var") else values)
    return made


def results(model: nn.Module, calls: Sequence[tuple[Any, ...]], *, training: bool) -> list[Tensor]:
    """All tensors that these calls, one after the other, return."""
    model = copy.deepcopy(model).train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(0)
    with torch.no_grad():
        return [tensor for call in calls for tensor in _tensors(model(*call))]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def worst_difference(
    model: nn.Module,
    spec: pg.PermutationSpec,
    inputs: Sequence[tuple[Any, ...]],
    *,
    tries: int = 2,
    modes: Sequence[bool] = (False,),
) -> float:
    """The largest difference that random elements of the group make, relative to the largest magnitude of a result.

    Each of `inputs` is given alone, and all one after the other.
    """
    worst = 0.0
    for seed in range(tries):
        plain = randomised(model, seed)
        moved = copy.deepcopy(plain)
        element = spec.random(seed, every_group=bool(seed % 2))
        moved.load_state_dict(element.apply(plain.state_dict()))
        for training in modes:
            for calls in (*([one] for one in inputs), list(inputs)):
                given = [tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in c)
                         for c in calls]  # fmt: skip
                before, after = (results(one, given, training=training) for one in (plain, moved))
                assert len(before) == len(after)
                for a, b in zip(before, after, strict=True):
                    if a.shape != b.shape:
                        return float("inf")
                    if a.numel():
                        scale = max(float(a.double().abs().nan_to_num().max()), 1e-12)
                        same = (a == b) | (a.isnan() & b.isnan())
                        gap = torch.where(same, torch.zeros_like(a.double()), (a.double() - b.double()).abs())
                        worst = max(worst, float(gap.nan_to_num(float("inf")).max()) / scale)
    return worst
