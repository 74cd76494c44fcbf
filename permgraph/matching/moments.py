"""Sums over samples of the activations of two networks, from which the agreement of their units follows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from permgraph.errors import PermgraphError
from permgraph.matching.workers import Workers
from permgraph.weights.state_dict import as_real


def _masked(x: torch.Tensor) -> torch.Tensor:
    """The samples in which all units, (units, samples), are minus infinity or near the least number of their type."""
    least = torch.finfo(x.dtype).min if x.is_floating_point() else -torch.inf
    return (x <= least / 2).all(0)


class Moments:
    """Running sums over samples of two sets of units, from which correlations follow; float64 after each batch.

    Each unit is shifted by its mean over the first batch, so that no large mean drowns its variance.
    """

    def __init__(self) -> None:
        self.count = 0
        self.whole = True  # false only where an interruption came in the middle of adding

    def _begin(self, x: torch.Tensor, y: torch.Tensor) -> None:
        zeros = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
        self.shifts, self.products = (x, y), zeros
        self.sums, self.squares = ([zeros.sum(1), zeros.sum(0)] for _ in range(2))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add a batch: (units, samples) of A and of B; real and imaginary parts are samples like others."""
        x, y = as_real(x).flatten(1), as_real(y).flatten(1)
        # Scores that a mask has set to minus infinity, or to the least number there is, are so in all units of both:
        # no sample at all.
        masked = _masked(x) & _masked(y)
        x, y = x.float(), y.float()
        if bool(masked.any()):
            x, y = x[:, ~masked], y[:, ~masked]
            if not x.shape[1]:
                return
        if not self.count:
            self._begin(x.mean(1, keepdim=True), y.mean(1, keepdim=True))
        x, y = x - self.shifts[0], y - self.shifts[1]
        product = (x @ y.mT).double()
        sums = [total + z.sum(1).double() for total, z in zip(self.sums, (x, y), strict=True)]
        squares = [total + z.square().sum(1).double() for total, z in zip(self.squares, (x, y), strict=True)]
        self.whole = False
        self.products += product
        self.sums, self.squares, self.count = sums, squares, self.count + x.shape[1]
        self.whole = True

    def add_up(self, workers: Workers, shifts: Sequence[torch.Tensor]) -> None:
        """Make these the sums over all processes, each unit shifted by `shifts` on all of them."""
        if not self.count:
            self._begin(shifts[0], shifts[1])
        to = [shift.to(self.products.device) for shift in shifts]
        x, y = ((mine - other).double()[:, 0] for mine, other in zip(self.shifts, to, strict=True))
        self.products = (
            self.products + torch.outer(x, self.sums[1]) + torch.outer(self.sums[0], y) + self.count * torch.outer(x, y)
        )
        for k, z in enumerate((x, y)):
            self.squares[k] = self.squares[k] + 2 * z * self.sums[k] + self.count * z.square()
            self.sums[k] = self.sums[k] + self.count * z
        self.shifts = (to[0], to[1])
        self.products = workers.sum(self.products)
        self.sums, self.squares = ([workers.sum(z) for z in both] for both in (self.sums, self.squares))
        self.count = int(workers.sum(torch.tensor(self.count)))

    def gram(self, measure: str, name: str) -> torch.Tensor:
        """The agreement of each unit of A (rows) with each of B, by one of the measures of `ActivationMatching`."""
        return {"correlation": self.correlation, "covariance": self.covariance, "inner": self.product}[measure](name)

    def product(self, name: str = "") -> torch.Tensor:
        """The mean of A's activation times B's, for each pair of units."""
        x, y = (shift.double()[:, 0] for shift in self.shifts)
        mean_x, mean_y = (total / self.count for total in self.sums)
        return self.products / self.count + torch.outer(x, mean_y) + torch.outer(mean_x, y) + torch.outer(x, y)

    def covariance(self, name: str) -> torch.Tensor:
        """The covariance of each pair of units."""
        if self.count < 2:
            raise PermgraphError(
                f"the loader gave a single sample for {name!r}: a correlation or covariance needs two or more; "
                f"give more data, or measure='inner'"
            )
        means = [total / self.count for total in self.sums]
        return self.products / self.count - torch.outer(means[0], means[1])

    def variances(self) -> list[torch.Tensor]:
        """The variance of each unit of A, and of each of B."""
        return [
            square / self.count - (total / self.count).square()
            for total, square in zip(self.sums, self.squares, strict=True)
        ]

    def correlation(self, name: str) -> torch.Tensor:
        """Pearson's correlation of each pair of units; 0 for a unit that does not vary."""
        covariance = self.covariance(name)
        means = [total / self.count for total in self.sums]
        scale = []
        for mean, square, shift in zip(means, self.squares, self.shifts, strict=True):
            variance = square / self.count - mean.square()
            # What float32 leaves of a unit that is constant is not variance.
            constant = variance <= 1e-12 * (square / self.count + shift.double()[:, 0].square())
            scale.append(torch.where(constant, 0.0, variance.clamp_min(1e-300).rsqrt()))
        return covariance * torch.outer(scale[0], scale[1])
