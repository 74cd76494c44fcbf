"""The base class of matchers, and what they give back."""

from __future__ import annotations

import difflib
import fnmatch
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeGuard, runtime_checkable

import numpy as np
from torch import nn

from permgraph.conventions.displayed import Displayed, plural
from permgraph.conventions.outcomes import Outcome
from permgraph.errors import MismatchError
from permgraph.networks.stacked_module import StackedModule
from permgraph.pictures.tables import alignment_table
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.transporting import transport
from permgraph.weights.state_dict import STATISTICS, StateDict


@dataclass(frozen=True)
class Sweep:
    """One pass over the groups.

    Attributes:
        number: 1 for the first.
        objective: its value after the pass; higher is better.
        moved: for each group that moved, how many of its indices did, over all indices of its parents.
        gains: for each group, or tree of groups named by its root, what moving it added to the objective; empty for a
            first sweep in which the other groups were unknown.
        seconds: since the start of the run.
    """

    number: int
    objective: float
    moved: Mapping[str, int]
    gains: Mapping[str, float]
    seconds: float


Progress = Callable[[Sweep], object]
"""Called with the record of each sweep, after it; see `permgraph.conventions.outcomes`."""

NOTHING_TO_PERMUTE = "nothing to permute: no group of the spec that may move stands in a compared parameter"


def moved_between(before: Permutation, after: Permutation) -> dict[str, int]:
    """For each group that differs between two permutations of a spec, how many of its indices do."""
    counts = {name: int(np.sum(array != before.arrays[name])) for name, array in after.arrays.items()}
    return {name: count for name, count in counts.items() if count}


@dataclass(frozen=True, repr=False)
class MatchResult(Displayed):
    """The permutation of B that a matcher chose, and how it went.

    Attributes:
        permutation: to be applied to B.
        objective: of that permutation, as the matcher defines it; higher is better.
        objective_before: of the identity.
        outcome: "converged": no further step helps; "sweep limit": ask for more sweeps to go on; "interrupted": by the
            keyboard, and this is the best so far. Either of the last two can be resumed with `init=permutation`.
        history: one record per sweep, of the best run where there were restarts.
        runs: the objective that each restart reached.
        seed: what all random choices followed from.
        seconds: of wall time.
        notes: what else the user should know, in sentences.
        details: further figures of the matcher's own.
        transformation: of a spec with general symmetries, the element to be applied to B, of which `permutation` is a
            part; None of permutations alone.
    """

    permutation: Permutation
    objective: float
    objective_before: float
    outcome: Outcome
    history: tuple[Sweep, ...] = ()
    runs: tuple[float, ...] = ()
    seed: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    details: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    transformation: Transformation | None = None

    @property
    def element(self) -> Permutation | Transformation:
        """What is to be applied to B: the transformation of a spec with general symmetries, else the permutation."""
        return self.permutation if self.transformation is None else self.transformation

    @property
    def sweeps(self) -> int:
        """How many passes the best run made."""
        return len(self.history)

    def transport(self, x: Any, **options: Any) -> Any:
        """What goes with B's weights, moved as these are: states of optimizers, averages, masks, adapters, differences.

        See `permgraph.transport`, whose options it takes.
        """
        return transport(self.element, x, **options)

    def __str__(self) -> str:
        done = f"{self.outcome} after {plural(self.sweeps, 'sweep')} in {self.seconds:.2f} s"
        return "\n".join((f"{done}: objective {self.objective_before:.6g} -> {self.objective:.6g}", *self.notes))

    def _repr_html_(self) -> str:
        return alignment_table(self)


@runtime_checkable
class NeedsModels(Protocol):
    """A matcher that must run the networks, in some of its settings at least; `align` gives it the modules."""

    def with_models(self, model_a: nn.Module, model_b: nn.Module) -> SupportsMatch:
        """The same matcher for these two modules, which it will not modify."""
        ...


class SupportsMatch(Protocol):
    """Anything with a method `match` like that of `Matcher`: what `align`, `merge` and the others take."""

    def match(
        self, a: StateDict, b: StateDict, spec: PermutationSpec, seed: int = 0, progress: Progress | None = None
    ) -> MatchResult:
        """Find a permutation of B, a state dict, that brings it to A, another; neither is changed."""
        ...


class Matcher(ABC):
    """Chooses an element of a spec's group that brings B to A.

    The library's matchers are frozen dataclasses of settings, with this base. A class of one's own may have it too; one
    with a method `match` like this one's, and no base, is a matcher as well.

    A setting `init` says where to begin, and may be a `Permutation` of the spec; a setting `models` holds the two
    modules of a matcher that runs them.
    """

    general: ClassVar[bool] = False
    """Whether it takes specs with general symmetries; one that does not is given their permutations."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "match" in vars(cls):
            cls.match = _over_stacks(cls.match)  # type: ignore[method-assign]

    @property
    def needs_models(self) -> bool:
        """Whether it runs the networks in its present settings; `align` then gives it the modules."""
        return False

    @abstractmethod
    def match(
        self, a: StateDict, b: StateDict, spec: PermutationSpec, seed: int = 0, progress: Progress | None = None
    ) -> MatchResult:
        """Find a permutation of B, a state dict, that brings it to A, another; neither is changed.

        Args:
            a, b: state dicts that fit the spec.
            spec: the group, and where it acts.
            seed: for all random choices.
            progress: called with a `Sweep` after each.
        """

    def require_fit(self, spec: PermutationSpec, *states: StateDict) -> None:
        """Raise MismatchError unless the state dicts fit the spec, `init` is of it, and what is to be run is there.

        A pattern of `ignore` that no name of the spec fits is refused too: it is mistyped, or of another model.
        """
        _require_patterns(getattr(self, "ignore", ()), spec)
        if self.needs_models and getattr(self, "models", None) is None:
            raise MismatchError(
                f"{type(self).__name__} runs the networks: call align() with modules, or with_models() first"
            )
        init = getattr(self, "init", None)
        if isinstance(init, Permutation) and init.spec.fingerprint != spec.permutations().fingerprint:
            raise MismatchError("init is a permutation of another spec than the one to match over")
        if isinstance(init, Transformation) and init.spec.fingerprint != spec.fingerprint:
            raise MismatchError("init is a transformation of another spec than the one to match over")
        for state in states:
            spec.check(state)

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return callable(getattr(other, "match", None)) if cls is Matcher else NotImplemented


def _over_stacks(match: Callable[..., MatchResult]) -> Callable[..., MatchResult]:
    """A method `match` that takes specs whose modules change places: it sees the tensors of these as stacks."""

    @functools.wraps(match)
    def matched(
        self: Matcher, a: StateDict, b: StateDict, spec: PermutationSpec, *args: Any, **kwargs: Any
    ) -> MatchResult:
        if not spec.stacks:
            return match(self, a, b, spec, *args, **kwargs)
        self.require_fit(spec, *(state for state in (a, b) if isinstance(state, dict)))  # others load on access
        over = spec.over_stacks()
        changed: dict[str, Any] = {}
        init, models = getattr(self, "init", None), getattr(self, "models", None)
        if isinstance(init, (Permutation, Transformation)):
            changed["init"] = init.of(over if isinstance(init, Transformation) else over.permutations())
        if models is not None:
            changed["models"] = tuple(StackedModule(model, spec) for model in models)
        keep = getattr(self, "keep", None)
        if keep is not None:
            changed["keep"] = lambda sweep, element: keep(sweep, element.of(spec))
        able = replace(self, **changed) if changed else self  # type: ignore[type-var]
        result = match(able, spec.stacked(a), spec.stacked(b), over, *args, **kwargs)
        whole = None if result.transformation is None else result.transformation.of(spec)
        return replace(result, permutation=result.permutation.of(spec.permutations()), transformation=whole)

    return matched


def _require_patterns(ignore: Sequence[str], spec: PermutationSpec) -> None:
    """Refuse patterns of names that fit none, but for those that stand there by default."""
    if isinstance(ignore, str):
        raise MismatchError(f"ignore={ignore!r} is a text: give a tuple of patterns, as in ignore=({ignore!r},)")
    names = [*spec.axes, *spec.aliases, *spec.unused]
    for pattern in ignore:
        if pattern not in STATISTICS and not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3) or names[:1]
            hint = f"; there is {near[0]!r}" if near else ""
            raise MismatchError(f"ignore: no parameter fits the pattern {pattern!r}{hint}")


def runs_networks(matcher: object) -> TypeGuard[NeedsModels]:
    """Whether a matcher is to be given the modules. One without our base that takes any is taken to need them."""
    return isinstance(matcher, NeedsModels) and bool(getattr(matcher, "needs_models", True))
