"""Balancing: the doubly stochastic matrices nearest to given scores, differentiated at the fixed point."""

from __future__ import annotations

from typing import Any

import torch


def balance(
    scores: torch.Tensor, iterations: int = 20, *, start: torch.Tensor | None = None, tolerance: float = 1e-4
) -> tuple[torch.Tensor, torch.Tensor]:
    """The doubly stochastic matrices nearest to the scores: exp(scores + row + column) for some row and column terms.

    Args:
        scores: (..., n, n).
        iterations: at most so many times all rows, then all columns, are brought to sum 1.
        start: column terms (..., 1, n) to begin with, from a similar problem.
        tolerance: stop once no row's sum is further from 1.

    Returns:
        The matrices (..., n, n), whose columns sum to 1 but for rounding, and whose rows do to the tolerance where the
        iterations sufficed; and the column terms (..., 1, n), which carry no gradient. The gradient by `scores` is that
        of the exact solution, found by as many sweeps over the adjoint's rows and columns.

    Example:
        >>> matrix, _ = balance(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), iterations=50)
        >>> torch.allclose(matrix.sum(0), torch.ones(2)), torch.allclose(matrix.sum(1), torch.ones(2), atol=1e-4)
        (True, True)
    """
    matrices, columns = _Balance.apply(scores, iterations, start, tolerance)  # type: ignore[no-untyped-call]
    return matrices, columns


class _Balance(torch.autograd.Function):
    """`balance`, differentiated at its fixed point.

    With P = exp(S + r 1' + 1 c') doubly stochastic, the gradient by S is P * (g - a 1' - 1 b'), where g is the gradient
    by P, and a and b solve a + P b = (P * g) 1 and P' a + b = (P * g)' 1: they project out what changes row or column
    sums.
    """

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, iterations: int, start: torch.Tensor | None, tolerance: float) -> Any:
        logs = scores if start is None else scores + start
        logs = logs - logs.logsumexp(-1, keepdim=True)
        tiny = torch.finfo(scores.dtype).tiny ** 0.5
        done = 0
        columns = torch.zeros_like(scores[..., :1, :]) if start is None else start
        while True:
            down = logs.logsumexp(-2, keepdim=True)
            logs, columns = logs - down, columns - down
            matrix = logs.exp()
            done += 1
            # In between, a few iterations on the matrix itself: they take products in the place of exponentials.
            u = torch.ones_like(scores[..., :1])
            v = torch.ones_like(u)
            for _ in range(min(10, iterations - done)):
                rows = matrix @ v
                if bool(((rows * u - 1).abs() <= tolerance).all()):
                    break
                u = 1 / rows.clamp_min(tiny)
                v = 1 / (matrix.mT @ u).clamp_min(tiny)
                done += 1
            logs = logs + u.log() + v.mT.log()
            columns = columns + v.mT.log()
            across = logs.logsumexp(-1, keepdim=True)
            if done >= iterations or bool((across.abs() <= tolerance).all()):
                break
            logs = logs - across
        matrix = logs.exp()
        ctx.save_for_backward(matrix)
        ctx.iterations, ctx.tolerance = iterations, tolerance
        ctx.mark_non_differentiable(columns)
        return matrix, columns

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, of_columns: torch.Tensor) -> Any:
        (matrix,) = ctx.saved_tensors
        flow = matrix * gradient
        across, down = flow.sum(-1, keepdim=True), flow.sum(-2, keepdim=True).mT
        a = b = torch.zeros_like(down)
        small = ctx.tolerance * 1e-2 * across.abs().amax()
        for _ in range(ctx.iterations):
            last, a = a, across - matrix @ b
            b = down - matrix.mT @ a
            if bool(((a - last).abs() <= small).all()):
                break
        return flow - matrix * (a + b.mT), None, None, None
