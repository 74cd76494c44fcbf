"""One permutation for whole sequences of networks: three claims of growing strength.

Sharma et al. (2024), "Simultaneous Linear Connectivity of Neural Networks Modulo Permutation", tell apart what it may
mean that networks are linearly connected up to permutation. Two are connected where the barrier between them is at
most a tolerance.

- *Weak*: for two networks a and b there is a permutation p such that a and p(b) are connected.
- *Simultaneous*: for two sequences of networks a_1, a_2, ... and b_1, b_2, ... (checkpoints of two trainings, or ever
  sparser networks) there is one p such that a_k and p(b_k) are connected for every k.
- *Strong*: for several networks there is one permutation each such that all pairs are connected, so that their convex
  hull may be low everywhere; no pair has a permutation of its own.

A claim that holds is shown by the permutations at hand. One that fails is not refuted: others may do better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from permgraph.connectivity.barriers import Barrier, Evaluate, Prepare, barrier
from permgraph.connectivity.interpolation import as_state_dict
from permgraph.errors import EvaluationError, MismatchError

if TYPE_CHECKING:
    from permgraph.permutation import Permutation

Network = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True)
class Claim:
    """Whether networks are linearly connected up to the permutations at hand.

    Attributes:
        kind: "weak", "simultaneous" or "strong".
        barriers: what was measured between each two networks: by their place in the sequences, or their two numbers.
        tolerance: how high a barrier may be.
    """

    kind: Literal["weak", "simultaneous", "strong"]
    barriers: Mapping[tuple[int, ...], Barrier]
    tolerance: float

    @property
    def heights(self) -> dict[tuple[int, ...], float]:
        """The height of each barrier in its first metric."""
        return {key: result.barrier for key, result in self.barriers.items()}

    @property
    def highest(self) -> float:
        """The highest barrier; NaN if one is."""
        heights = list(self.heights.values())
        return math.nan if any(map(math.isnan, heights)) else max(heights)

    @property
    def holds(self) -> bool:
        """Whether no barrier exceeds the tolerance; one that is NaN does."""
        return self.highest <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{self.kind}: {'holds' if self.holds else 'not shown'}, highest of {len(self.barriers)} barriers "
            f"{self.highest:.4g}, tolerance {self.tolerance:.4g}"
        )


def weak_connectivity(
    a: Network,
    b: Network,
    permutation: Permutation,
    evaluate: Evaluate,
    tolerance: float,
    points: int | Sequence[float] = 11,
    *,
    model: nn.Module | None = None,
    prepare: Prepare | None = None,
) -> Claim:
    """Measure whether two networks are connected once ``permutation`` is applied to ``b``.

    The arguments are those of ``barrier``; ``permutation`` is that of an alignment of ``b`` to ``a``.

    Raises:
        MismatchError: the networks differ, or the permutation is of another spec.
        EvaluationError: as for ``barrier``, or the tolerance is negative or not finite.
    """
    _require_tolerance(tolerance)
    end = permutation.apply(as_state_dict(b))
    result = barrier(a, end, evaluate, points, model=_module(model, a, b), prepare=prepare)
    return Claim("weak", MappingProxyType({(0,): result}), tolerance)


def simultaneous_connectivity(
    sequence_a: Sequence[Network],
    sequence_b: Sequence[Network],
    permutation: Permutation,
    evaluate: Evaluate,
    tolerance: float,
    points: int | Sequence[float] = 11,
    *,
    model: nn.Module | None = None,
    prepare: Prepare | None = None,
) -> Claim:
    """Measure whether one permutation connects each network of a sequence with that in the same place of another.

    Args:
        sequence_a: checkpoints of one training, say, or its ever sparser networks.
        sequence_b: as many of the other.
        permutation: applied to every network of ``sequence_b``; found between any two of them.
        evaluate, points, model, prepare: as for ``barrier``.
        tolerance: how high a barrier may be.

    Raises:
        MismatchError: the sequences are empty or of different lengths, networks differ, or the permutation is of
            another spec.
        EvaluationError: as for ``barrier``, or the tolerance is negative or not finite.

    Example:
        >>> spec = pg.PermutationSpec.parse("0.weight 2x1 h . | 1.weight 1x2 . h | groups: h 2".replace(" | ", chr(10)))
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)).eval()
        >>> turn = spec.random(0, every_group=True)
        >>> other = turn.apply(net.state_dict())
        >>> x = torch.ones(1, 1)
        >>> claim = simultaneous_connectivity([net], [other], turn.inverse(), lambda m: m(x).item() ** 2, 1e-6)
        >>> claim.holds
        True
    """
    _require_tolerance(tolerance)
    if len(sequence_a) != len(sequence_b) or not sequence_a:
        raise MismatchError(
            f"the sequences have {len(sequence_a)} and {len(sequence_b)} networks: give equally many, at least one"
        )
    template = _module(model, *sequence_a, *sequence_b)
    barriers: dict[tuple[int, ...], Barrier] = {}
    for place, (a, b) in enumerate(zip(sequence_a, sequence_b, strict=True)):
        end = permutation.apply(as_state_dict(b))
        barriers[(place,)] = barrier(a, end, evaluate, points, model=template, prepare=prepare)
    return Claim("simultaneous", MappingProxyType(barriers), tolerance)


def strong_connectivity(
    networks: Sequence[Network],
    permutations: Sequence[Permutation],
    evaluate: Evaluate,
    tolerance: float,
    points: int | Sequence[float] = 11,
    *,
    model: nn.Module | None = None,
    prepare: Prepare | None = None,
) -> Claim:
    """Measure whether all pairs of networks are connected, each network having one permutation.

    Args:
        networks: three or more, for two this is the weak claim.
        permutations: one for each network, such as ``merge(...).permutations``.
        evaluate, points, model, prepare: as for ``barrier``.
        tolerance: how high a barrier may be.

    Raises:
        MismatchError: fewer than three networks, another number of permutations, networks that differ, or a
            permutation of another spec.
        EvaluationError: as for ``barrier``, or the tolerance is negative or not finite.
    """
    _require_tolerance(tolerance)
    if len(networks) < 3:
        raise MismatchError(f"the strong claim is about at least three networks, not {len(networks)}")
    if len(permutations) != len(networks):
        raise MismatchError(f"{len(permutations)} permutations for {len(networks)} networks: give one for each")
    template = _module(model, *networks)
    moved = [p.apply(as_state_dict(network)) for p, network in zip(permutations, networks, strict=True)]
    barriers: dict[tuple[int, ...], Barrier] = {
        (i, j): barrier(moved[i], moved[j], evaluate, points, model=template, prepare=prepare)
        for i, j in itertools.combinations(range(len(networks)), 2)
    }
    return Claim("strong", MappingProxyType(barriers), tolerance)


def permute_masks(permutation: Permutation, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move the masks of a pruned network with its weights.

    Args:
        permutation: what is applied to the network.
        masks: state-dict name to a mask of the parameter's shape, for as many parameters as are pruned.

    A pruned network and its permuted masks are the permuted network, pruned: ``p(w * m) = p(w) * p(m)``.

    Raises:
        SpecError: the spec does not know a name.
        MismatchError: a mask has another shape than its parameter.
    """
    return {name: permutation.apply_to(name, mask) for name, mask in masks.items()}


def _module(*candidates: Any) -> nn.Module:
    """The first module; all of them must be in evaluation mode, which ``barrier`` sees to for that one."""
    found = next((candidate for candidate in candidates if isinstance(candidate, nn.Module)), None)
    if found is None:
        raise EvaluationError("the networks are all state dicts: pass the module that runs them as model=...")
    return found


def _require_tolerance(tolerance: float) -> None:
    if not math.isfinite(tolerance) or tolerance < 0:
        raise EvaluationError(f"tolerance={tolerance}: how high a barrier may be must be finite and not negative")
