"""Singular values and vectors of two networks' weights, layer by layer.

Ito, Yamada & Kumagai (2024), "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching": a
permutation changes the directions of the singular vectors of a weight and never its singular values, and what weight
matching does is to align the vectors of the large ones. With A = Σ_i s_i u_i v_iᵀ and B = Σ_j t_j x_j y_jᵀ,

    <A, B>  =  Σ_ij s_i t_j (u_i · x_j)(v_i · y_j)  <=  Σ_i s_i t_i

(von Neumann's trace inequality), so that the ratio of the two sides is 1 where singular vectors of the same rank agree,
and sqrt(Σ_i (s_i - t_i)²) is a distance that no permutation, nor any rotation, of a layer can go below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from permgraph.conventions.displayed import Displayed
from permgraph.conventions.waiting import waits
from permgraph.errors import EvaluationError, MismatchError
from permgraph.weights.identity import SameTensor
from permgraph.weights.state_dict import Network, as_state_dict, check_same_keys, require_finite


@dataclass(frozen=True, repr=False)
class LayerSpectra(Displayed):
    """Two networks' versions of one weight, seen as matrices with one row for each output.

    Attributes:
        values_a, values_b: singular values, largest first.
        overlaps: ``overlaps[i, j]`` is (u_i · x_j)(v_i · y_j), how far singular direction i of a and j of b agree.
        distance: the L2 distance of the two.
    """

    values_a: Tensor
    values_b: Tensor
    overlaps: Tensor
    distance: float

    @property
    def least_distance(self) -> float:
        """The distance that is left where all singular vectors agree: of the singular values from each other."""
        return float(torch.linalg.vector_norm(self.values_a - self.values_b))

    def inner(self, above: float = 0.0) -> float:
        """The inner product, of singular values only that are at least ``above`` times the largest of their network."""
        a, b = self._leading(above)
        return float(torch.einsum("i,ij,j->", a, self.overlaps, b))

    def most(self, above: float = 0.0) -> float:
        """The greatest inner product that rotations of the singular vectors could reach, for the same values."""
        a, b = self._leading(above)
        return float(a @ b)

    def alignment(self, above: float = 0.0) -> float:
        """``inner / most``: 1 where singular vectors of the same rank agree, about 0 for unrelated ones."""
        most = self.most(above)
        return self.inner(above) / most if most > 0 else math.nan

    def _leading(self, above: float) -> tuple[Tensor, Tensor]:
        values = self.values_a, self.values_b
        a, b = (torch.where(v >= above * v[0], v, 0.0) if len(v) else v for v in values)
        return a, b


@dataclass(frozen=True, repr=False)
class SpectralComparison(Displayed):
    """How the singular values and vectors of two networks compare.

    Attributes:
        layers: state-dict name to what was found, for each weight of two or more dimensions.
        distance: the L2 distance of the two networks, over all of their parameters that were compared or are vectors.
    """

    layers: Mapping[str, LayerSpectra]
    distance: float

    @property
    def least_distance(self) -> float:
        """What the distance over ``layers`` would be if all singular vectors agreed."""
        return math.sqrt(sum(layer.least_distance**2 for layer in self.layers.values()))

    def alignment(self, above: float = 0.0) -> float:
        """The ratio of inner product to greatest possible inner product, summed over layers.

        Args:
            above: look only at singular values of at least this share of their layer's largest.
        """
        most = sum(layer.most(above) for layer in self.layers.values())
        return sum(layer.inner(above) for layer in self.layers.values()) / most if most > 0 else math.nan

    def reduction(self, after: SpectralComparison) -> float:
        """The share of the distance that is gone in ``after``, of the same networks aligned."""
        return 1 - after.distance / self.distance if self.distance > 0 else math.nan

    def __str__(self) -> str:
        width = max(len("weight"), *(len(name) for name in self.layers))
        lines = [f"{'weight':{width}}  distance  least     alignment  of values above 0.3"]
        lines += [
            f"{name:{width}}  {x.distance:8.4g}  {x.least_distance:8.4g}  {x.alignment():9.3f}  {x.alignment(0.3):.3f}"
            for name, x in self.layers.items()
        ]
        return "\n".join(lines)


@waits("comparing spectra")
def compare_spectra(a: Network, b: Network, *, names: Sequence[str] | None = None) -> SpectralComparison:
    """Compare the singular values and vectors of two networks' weights, and measure their distance.

    A weight of more than two dimensions is a matrix of ``(first dimension, all others)``: for a convolution one row for
    each output channel. Compare before and after an alignment: singular values stay, the vectors' agreement and
    the distance tell what it did.

    Args:
        a: a module, or a state dict.
        b: another of the same keys and shapes.
        names: the weights to decompose; by default each floating-point tensor of two or more dimensions.

    The distance is over all floating-point tensors but running statistics. Each decomposition takes time cubic in the
    smaller side of the matrix.

    Raises:
        MismatchError: the networks differ in a key or a shape, or a name is not that of a matrix of theirs.
        NonFiniteError: a weight is NaN or infinite.
        EvaluationError: there is no weight of two dimensions.

    References:
        Ito, Yamada & Kumagai 2024.

    Example:
        >>> a = nn.Sequential(nn.Linear(3, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
        >>> turn = pg.auto_spec(a).random(1, every_group=True)
        >>> b = turn.apply(a.state_dict())
        >>> found = compare_spectra(a, b)
        >>> found.distance > 0.1, found.least_distance < 1e-5, compare_spectra(a, a).alignment() > 0.999
        (True, True, True)
    """
    first, second = as_state_dict(a), as_state_dict(b)
    check_same_keys(first, second)
    same = SameTensor()
    layers: dict[str, LayerSpectra] = {}
    square = 0.0
    for name in names or ():
        if name not in first or not isinstance(first[name], Tensor) or first[name].ndim < 2:
            raise MismatchError(f"{name!r} is no weight of two or more dimensions of these networks")
    for name, x in first.items():
        y = second[name]
        if not isinstance(x, Tensor) or not x.is_floating_point() or "running_" in name:
            continue
        if same.first_name(name, x) != name:  # a tied name
            continue
        one, other = (tensor.detach().to("cpu", torch.float64) for tensor in (x, y))
        for network, tensor in (("a", one), ("b", other)):
            require_finite(tensor, name, network, ", and has no singular values")
        distance = float(torch.linalg.vector_norm(one - other))
        square += distance**2
        if one.ndim >= 2 and one.numel() and (names is None or name in names):
            layers[name] = _decompose(one.flatten(1), other.flatten(1), distance)
    if not layers:
        raise EvaluationError("the networks have no floating-point weight of two or more dimensions to decompose")
    return SpectralComparison(MappingProxyType(layers), math.sqrt(square))


def _decompose(one: Tensor, other: Tensor, distance: float) -> LayerSpectra:
    u, s, v = torch.linalg.svd(one, full_matrices=False)
    x, t, y = torch.linalg.svd(other, full_matrices=False)
    return LayerSpectra(s, t, (u.mT @ x) * (v @ y.mT), distance)
