"""What it may mean that several networks are linearly connected up to permutation: four claims.

Sharma et al. (2024), "Simultaneous Linear Connectivity of Neural Networks Modulo Permutation", tell the first three
apart. Two networks are connected where the barrier between them is at most a tolerance.

- *Weak*: for two networks a and b there is a permutation p such that a and p(b) are connected.
- *Simultaneous*: for two sequences of networks a_1, a_2, ... and b_1, b_2, ... (checkpoints of two trainings, or ever
  sparser networks) there is one p such that a_k and p(b_k) are connected for every k.
- *Strong*: for several networks there is one permutation each such that all pairs are connected, so that their convex
  hull may be low everywhere; no pair has a permutation of its own.
- *Star*: for several networks there are a centre and one permutation each such that the centre is connected to all
  (Sonthalia et al. 2024, "Do Deep Neural Network Solutions Form a Star Domain?"). It is weaker than the strong claim.

A claim that holds is shown by the permutations at hand. One that fails is not refuted: others may do better.

Wherever a permutation is taken, so is a `Transformation` of general symmetries, or the result that has either:
``align(a, b)``, or ``merge(networks)`` for several.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor, nn

from permgraph.connectivity.barriers import Barrier, Evaluate, Prepare, barrier
from permgraph.conventions.displayed import Displayed
from permgraph.errors import EvaluationError, MismatchError
from permgraph.networks.evaluate import template_of
from permgraph.spec.elements import AnyElement, element_of, elements_of
from permgraph.transporting.mover import Mover
from permgraph.weights.state_dict import Network, as_state_dict

if TYPE_CHECKING:
    from permgraph.matching.matcher import MatchResult

Kind = Literal["weak", "simultaneous", "strong", "star"]
End = Callable[[], Network]


class SeveralElements(Protocol):
    """What has one element for each of several networks, such as a `Merge`."""

    @property
    def elements(self) -> Sequence[AnyElement]: ...


Pairs = dict[tuple[int, ...], tuple[End, End]]


@dataclass(frozen=True, repr=False)
class Claim(Displayed):
    """Whether networks are linearly connected up to the permutations at hand.

    Attributes:
        kind: "weak", "simultaneous", "strong" or "star".
        barriers: what was measured between each two networks: by their place in the sequences, by their two numbers,
            or, for a star, by the number of the network that is not the centre.
        tolerance: how high a barrier may be.
    """

    kind: Kind
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
    permutation: AnyElement | MatchResult,
    evaluate: Evaluate,
    tolerance: float,
    points: int | Sequence[float] = 11,
    *,
    model: nn.Module | None = None,
    prepare: Prepare | None = None,
) -> Claim:
    """Measure whether two networks are connected once ``permutation`` is applied to ``b``.

    It is the simultaneous claim about sequences of one network.

    Args:
        a: a module or a state dict.
        b: another of the same architecture.
        permutation: applied to ``b``: an alignment of ``b`` to ``a``, say, or its permutation or transformation.
        evaluate, points, model, prepare: as for ``barrier``.
        tolerance: how high a barrier may be.

    Raises:
        MismatchError: the networks differ, or the permutation is of another spec.
        EvaluationError: as for ``barrier``, or the tolerance is negative or not finite.

    References:
        Sharma et al. 2024.

    Example:
        >>> a, b = (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval() for _ in "ab")
        >>> x = torch.randn(5, 2)
        >>> claim = weak_connectivity(a, b, pg.align(a, b).permutation, lambda net: net(x).square().mean().item(), 9.0)
        >>> claim.kind, claim.holds
        ('weak', True)
    """
    pairs: Pairs = {(0,): (_moved(None, a), _moved(permutation, b))}
    return _claim("weak", pairs, evaluate, tolerance, points, template_of(model, a=a, b=b), prepare)


def simultaneous_connectivity(
    sequence_a: Sequence[Network],
    sequence_b: Sequence[Network],
    permutation: AnyElement | MatchResult,
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
    if len(sequence_a) != len(sequence_b) or not sequence_a:
        raise MismatchError(
            f"the sequences have {len(sequence_a)} and {len(sequence_b)} networks: give equally many, at least one"
        )
    template = _template(model, sequence_a=sequence_a, sequence_b=sequence_b)
    pairs: Pairs = {
        (place,): (_moved(None, a), _moved(permutation, b))
        for place, (a, b) in enumerate(zip(sequence_a, sequence_b, strict=True))
    }
    return _claim("simultaneous", pairs, evaluate, tolerance, points, template, prepare)


def strong_connectivity(
    networks: Sequence[Network],
    permutations: Sequence[AnyElement] | SeveralElements,
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
        permutations: one for each network, such as ``merge(...)`` or its ``.elements``.
        evaluate, points, model, prepare: as for ``barrier``.
        tolerance: how high a barrier may be.

    Raises:
        MismatchError: fewer than three networks, another number of permutations, networks that differ, or a
            permutation of another spec.
        EvaluationError: as for ``barrier``, or the tolerance is negative or not finite.

    References:
        Sharma et al. 2024.

    Example:
        >>> networks = [nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval() for _ in range(3)]
        >>> x = torch.randn(5, 2)
        >>> merged = pg.merge(networks)
        >>> size = lambda net: net(x).square().mean().item()
        >>> sorted(strong_connectivity(networks, merged.permutations, size, 9.0).barriers)
        [(0, 1), (0, 2), (1, 2)]
    """
    if len(networks) < 3:
        raise MismatchError(f"the strong claim is about at least three networks, not {len(networks)}")
    ends = _ends(networks, permutations)
    pairs: Pairs = {(i, j): (ends[i], ends[j]) for i, j in itertools.combinations(range(len(networks)), 2)}
    return _claim("strong", pairs, evaluate, tolerance, points, _template(model, networks=networks), prepare)


def star_connectivity(
    centre: Network,
    networks: Sequence[Network],
    permutations: Sequence[AnyElement] | SeveralElements | None,
    evaluate: Evaluate,
    tolerance: float,
    points: int | Sequence[float] = 11,
    *,
    model: nn.Module | None = None,
    prepare: Prepare | None = None,
) -> Claim:
    """Measure whether one network, the centre of a star, is connected to each of several others.

    Args:
        centre: the mean of merged networks, say, or what ``fit_star`` has trained.
        networks: one or more others.
        permutations: one for each of them, such as ``merge(...)`` or its ``.elements``; None if they are in the
            centre's numbering.
        evaluate, points, model, prepare: as for ``barrier``.
        tolerance: how high a barrier may be.

    Raises:
        MismatchError: no networks, another number of permutations, networks that differ, or a permutation of another
            spec.
        EvaluationError: as for ``barrier``, or the tolerance is negative or not finite.

    Example:
        >>> net = lambda w: nn.Linear(1, 1, bias=False).eval().requires_grad_(False)
        >>> centre, left, right = (net(w) for w in (0.0, -1.0, 1.0))
        >>> _ = [m.weight.fill_(w) for m, w in ((centre, 0.0), (left, -1.0), (right, 1.0))]
        >>> flat_beyond_one_half = lambda m: min(abs(m.weight.item()), 0.5)
        >>> claim = star_connectivity(centre, [left, right], None, flat_beyond_one_half, 0.3)
        >>> claim.holds, round(claim.highest, 2)
        (True, 0.25)
    """
    if not networks:
        raise MismatchError("a star needs at least one network beside its centre")
    ends = _ends(networks, permutations)
    template = _template(model, centre=[centre], networks=networks)
    pairs: Pairs = {(number,): (_moved(None, centre), end) for number, end in enumerate(ends)}
    return _claim("star", pairs, evaluate, tolerance, points, template, prepare)


def permute_masks(permutation: AnyElement | MatchResult, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move the masks of a pruned network with its weights.

    Args:
        permutation: what is applied to the network.
        masks: state-dict name to a mask of the parameter's shape, for as many parameters as are pruned.

    A pruned network and its permuted masks are the permuted network, pruned: ``p(w * m) = p(w) * p(m)``.

    Raises:
        SpecError: the spec does not know a name.
        MismatchError: a mask has another shape than its parameter, or matrices act on it; or one is not there, of a
            module that takes the place of another one.

    Example:
        >>> spec = pg.PermutationSpec.parse("0.weight 2x1 h . | 1.weight 1x2 . h | groups: h 2".replace(" | ", chr(10)))
        >>> turn = spec.random(0, every_group=True)  # changes the two places
        >>> permute_masks(turn, {"1.weight": torch.tensor([[True, False]])})
        {'1.weight': tensor([[False,  True]])}
    """
    mover = Mover(element_of(permutation))
    moved = {}
    for name, mask in masks.items():
        source, moves = mover.source(name)
        if name in mover.element.spec.in_stack:
            if source not in masks:
                raise MismatchError(
                    f"there is a mask of {name!r}, but none of {source!r}, whose module takes its place: give masks of "
                    "all modules that change places, of ones where nothing is pruned"
                )
            mask = masks[source]
        moved[name] = moves.parameter(source, mask, "mask")
    return moved


def _claim(
    kind: Kind,
    pairs: Pairs,
    evaluate: Evaluate,
    tolerance: float,
    points: int | Sequence[float],
    template: nn.Module,
    prepare: Prepare | None,
) -> Claim:
    """Measure the barrier of each pair. Its ends are made when their turn comes, so that few are in memory at once."""
    if not math.isfinite(tolerance) or tolerance < 0:
        raise EvaluationError(f"tolerance={tolerance}: how high a barrier may be must be finite and not negative")
    barriers = {
        key: barrier(one(), other(), evaluate, points, model=template, prepare=prepare)
        for key, (one, other) in pairs.items()
    }
    return Claim(kind, MappingProxyType(barriers), tolerance)


def _moved(element: Any, network: Network) -> End:
    if element is None:
        return lambda: network
    chosen = element_of(element)
    return lambda: chosen.apply(as_state_dict(network))


def _ends(networks: Sequence[Network], elements: Any) -> list[End]:
    if elements is None:
        return [_moved(None, network) for network in networks]
    chosen = elements_of(elements)
    if len(chosen) != len(networks):
        raise MismatchError(f"{len(chosen)} permutations for {len(networks)} networks: give one for each")
    return [_moved(element, network) for element, network in zip(chosen, networks, strict=True)]


def _template(model: nn.Module | None, **sequences: Sequence[Network]) -> nn.Module:
    every = {f"{name}[{at}]": network for name, sequence in sequences.items() for at, network in enumerate(sequence)}
    return template_of(model, **every)
