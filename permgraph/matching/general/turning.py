"""The optimizer that learned matching takes by default: every direction of a rotation turns at one rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.9
BETAS = 0.9, 0.999
EPSILON = 1e-8
TURN = 6.0
"""How much further than other coordinates move, in each number, matrices turn in each plane."""

ITERATIONS = 6
QUINTIC = 3.4445, -4.7750, 2.0315


class Turning(torch.optim.Optimizer):
    """Momentum, of which matrices are made orthogonal; Adam for all that is no matrix of a Lie algebra.

    The slopes along the planes of a large rotation differ by orders of magnitude, and no choice of axes is special, so
    rates for each entry of a skew matrix serve badly. The polar factor of the momentum turns every plane that it has
    alike, and depends on no axes; of a skew matrix it is skew.

    Args:
        matrices: coordinates of groups of matrices (..., n, n).
        others: all other coordinates.
        lr: the rate of Adam; matrices turn by `TURN` times as much.

    References:
        Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024, for the momentum and the
        iteration; Kingma & Ba 2015 for Adam.
    """

    def __init__(self, matrices: Iterable[Tensor], others: Iterable[Tensor], lr: float = 5e-3) -> None:
        groups = [
            {"params": list(matrices), "lr": TURN * lr, "turned": True},
            {"params": list(others), "lr": lr, "turned": False},
        ]
        super().__init__([group for group in groups if group["params"]], {"lr": lr, "turned": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    move = _turned if group["turned"] else _adapted
                    parameter.sub_(group["lr"] * move(parameter.grad, self.state[parameter]))


def _turned(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    if not state:
        state["momentum"] = torch.zeros_like(gradient)
    state["momentum"].mul_(MOMENTUM).add_(gradient)
    return nearly_polar(state["momentum"])


def _adapted(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    if not state:
        state.update(step=0, mean=torch.zeros_like(gradient), square=torch.zeros_like(gradient))
    state["step"] += 1
    state["mean"].lerp_(gradient, 1 - BETAS[0])
    state["square"].lerp_(gradient.square(), 1 - BETAS[1])
    mean = state["mean"] / (1 - BETAS[0] ** state["step"])
    square = state["square"] / (1 - BETAS[1] ** state["step"])
    moved: Tensor = mean / (square.sqrt() + EPSILON)
    return moved


def nearly_polar(matrix: Tensor) -> Tensor:
    """Matrices (..., n, n) with singular values near one, between 0.7 and 1.2 but for very small ones.

    It takes matrix products alone, and no decomposition; a skew matrix stays skew, and zero stays zero.
    """
    a, b, c = QUINTIC
    x: Tensor = matrix / torch.linalg.matrix_norm(matrix, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x
