"""`RenumberedMean`: the weighted mean of checkpoints, a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from permgraph.cli.checkpoints import in_parts, moved_by, require_finite, tensor_of, whole_state
from permgraph.cli.matching_run import MatchingRun
from permgraph.cli.models import build
from permgraph.connectivity import recalibrate_batchnorm
from permgraph.errors import MismatchError
from permgraph.io import Renamed
from permgraph.spec.elements import AnyElement
from permgraph.spec.spec import PermutationSpec
from permgraph.weights.combine import mean, shares_of
from permgraph.weights.ratios import Ratios, ratios_of


def shares_from(text: str | None, count: int) -> tuple[float, ...]:
    """How much each checkpoint counts, from ``--weights``; the rules are those of `permgraph.merge`.

    Raises MismatchError if it is not as many numbers, or one is negative or not finite, or all are 0.
    """
    if count < 2:
        raise MismatchError("a merge takes two checkpoints or more")
    try:
        return shares_of(None if text is None else [float(part) for part in text.split(",")], count)
    except MismatchError as error:
        raise MismatchError(f"--weights {text!r}: {error}") from None
    except ValueError:
        raise MismatchError(f"--weights {text!r}: give numbers, as in 0.5,0.5") from None


def ratios_from(texts: Sequence[str]) -> Ratios:
    """How far each parameter goes to the second checkpoint, from ``--ratios``: patterns with numbers, or a schedule.

    Raises MismatchError if a text is neither.
    """
    named = [text.rpartition("=") for text in texts if "=" in text]
    try:
        if named:
            if len(named) < len(texts):
                raise ValueError
            return {pattern: float(number) for pattern, _, number in named}
        (text,) = texts
        schedule = [float(part) for part in text.split(",")]
    except ValueError:
        raise MismatchError(
            f"--ratios {' '.join(texts)!r}: give numbers that are spread over the layers, as in 0,0.5,1; or a pattern "
            "and a number each time, as in --ratios 'head.*=0.9' --ratios '*=0.5'"
        ) from None
    return schedule[0] if len(schedule) == 1 else schedule


def ratios_for(run: MatchingRun, ratios: Ratios) -> dict[str, float]:
    """The ratio of each parameter of the first checkpoint, by the model's name and in the model's order."""
    places = {name: at for at, name in enumerate(run.spec.tensors)}
    aliases = run.spec.aliases
    return ratios_of(sorted(run.weights[0], key=lambda name: places.get(aliases.get(name, name), len(places))), ratios)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision that sums are taken in: float32 or better."""
    return torch.promote_types(dtype, torch.float32) if dtype.itemsize > 1 else torch.float32


class RenumberedMean:
    """The weighted mean of the renumbered checkpoints, a tensor at a time.

    Args:
        run: the checkpoints.
        permutations: of each; None where it stays as it is.
        shares: how much each counts.
        ratios: of two, how far each parameter goes to the second, in place of the shares.
    """

    def __init__(
        self,
        run: MatchingRun,
        permutations: Sequence[AnyElement | None],
        shares: Sequence[float],
        ratios: Ratios | None = None,
    ) -> None:
        self.run, self.shares = run, shares
        self.ratios = None if ratios is None else ratios_for(run, ratios)
        owned = [None if each is None else run.own(n, each) for n, each in enumerate(permutations)]
        elements = [None if each is None else in_parts(each) for each in owned]
        whole = [run.whole(number) for number in range(len(run.weights))]
        self.members = tuple(zip(run.checkpoints, whole, elements, strict=True))
        self.names = {key: name for name, key in run.weights[0].keys_of.items()}
        self.differing: set[str] = set()
        self.measured: dict[str, torch.Tensor] | None = None

    def of(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """What stands in the place of a tensor of the first checkpoint."""
        first = self.run.checkpoints[0].path
        require_finite(key, tensor, first)
        if key not in self.names:
            return tensor
        name = self.names[key]
        if self.measured is not None and name in self.measured:
            return self.measured[name].to(tensor.dtype)
        if not (tensor.is_floating_point() or tensor.is_complex()):
            if any(name in weights and not torch.equal(tensor, weights[name]) for _, weights, _ in self.members[1:]):
                self.differing.add(key)
            return tensor
        shares = self.shares if self.ratios is None else (1 - self.ratios[name], self.ratios[name])
        members: Iterable[torch.Tensor] = self._renumbered(key, name, tensor)
        rows = self.run.rows
        if rows is not None and self.run.spec.aliases.get(name, name) in rows.tables:
            members = rows.filled(name, list(members), shares)
        return mean(members, shares).to(tensor.dtype)

    def _renumbered(self, key: str, name: str, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        """The tensor in each checkpoint, in working precision, one after the other."""
        yield tensor.to(working_dtype(tensor.dtype))
        for checkpoint, weights, permutation in self.members[1:]:
            other = tensor_of(weights, name, self.run.spec)
            require_finite(key, other, checkpoint.path)
            if permutation is not None:
                other = moved_by(permutation, name, other, weights)
            yield other.to(working_dtype(other.dtype))

    def measure(self) -> None:
        """Measure the statistics of the merged network's BatchNorm, in the place of the mean of the networks' own."""
        run = self.run
        assert run.loader is not None
        module = build(run.model, device=None)
        state = whole_state(run.whole(0), run.spec_of(0), module)
        keys = run.weights[0].keys_of
        merged = {name: self.of(keys[name], tensor) if name in keys else tensor for name, tensor in state.items()}
        module.load_state_dict(merged)
        given = module.state_dict()
        fresh = recalibrate_batchnorm(module, run.loader).state_dict()
        self.measured = {name: tensor for name, tensor in fresh.items() if not torch.equal(tensor, given[name])}

    def notes(self) -> list[str]:
        """What whoever uses the result should know."""
        found = []
        if self.run.rows is not None:
            whose = "all" if self.run.rows.union else self.run.checkpoints[0].path
            found.append(f"the result has the rows of {whose}, each the mean of those that have it")
        if self.differing:
            found.append(
                f"{len(self.differing)} integer tensors differ: those of {self.run.checkpoints[0].path} were taken: "
                f"{min(self.differing)}"
            )
        if self.measured is None and any(name.endswith("running_var") for name in self.run.spec.axes):
            found.append("the model has BatchNorm: measure its statistics anew on data, as --recalibrate does")
        return found


def require_same_names(named: Sequence[Renamed], spec: PermutationSpec) -> None:
    """Raise MismatchError where a checkpoint lacks a floating-point tensor that another has."""

    def floating(weights: Renamed) -> set[str]:
        return {spec.aliases.get(name, name) for name in weights if name in spec.unused} | set(spec.tensors)

    first = named[0]
    names = floating(first)
    for other in named[1:]:
        for name in sorted(names ^ floating(other)):
            has, lacks = (first, other) if name in names else (other, first)
            raise MismatchError(f"{has.checkpoint.path} has {name!r}, and {lacks.checkpoint.path} has not")
