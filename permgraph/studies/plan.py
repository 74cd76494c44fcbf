"""What a study is: a grid of pairs of networks, matchers and seeds, cut into cells that do not depend on each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from permgraph.connectivity.barriers import Evaluate, Prepare
from permgraph.errors import MismatchError, PermgraphError, StudyError
from permgraph.matching import Matcher
from permgraph.spec.spec import PermutationSpec
from permgraph.studies.fingerprint import fingerprint
from permgraph.weights.state_dict import Network, as_state_dict, check_same_keys

UNALIGNED = "none"
"""The matcher that leaves every network as it is."""


@dataclass(frozen=True)
class Named:
    """A value with a name of its own making, for what has no content that could be read.

    A study that meets it takes the name for the content: results are found again while the name stays.

    Args:
        value: an evaluation or a preparation, to be called.
        fingerprint: the name, such as ``"cifar10-test-v1"``.
    """

    value: Callable[..., Any]
    fingerprint: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the value."""
        return self.value(*args, **kwargs)


@dataclass(frozen=True)
class Cell:
    """One task of a study.

    Attributes:
        a, b: the names of two networks of the study; b is aligned to a.
        matcher: the name of a matcher of the study, or "none".
        seed: of the matcher's random choices.
        key: the fingerprint of all that the result depends on.
    """

    a: str
    b: str
    matcher: str
    seed: int
    key: str

    def __str__(self) -> str:
        return f"{self.a} <- {self.b}, {self.matcher}, seed {self.seed}"


@dataclass(frozen=True)
class StudyPlan:
    """A grid: every pair of networks, aligned by every matcher from every seed, and the barrier between them.

    Args:
        model: the module that all networks are weights of, in evaluation mode.
        networks: name to module or state dict, at least two.
        matchers: name to matcher; the name "none" is taken.
        evaluate: what to measure on the line between two networks, see `barrier`; None measures no barrier. It travels
            to the workers, so what it holds (a test set, say) should be small, or be opened where it is called.
        seeds: of the matchers.
        pairs: "all" (each unordered pair once), "ordered" (both ways), "first" (the first network with each other), or
            the pairs themselves, by name.
        points: of the line, ends included.
        prepare: see `barrier`.
        higher_is_better: see `barrier`.
        unaligned: also measure each pair as it is, once, under the matcher "none".
        spec: the symmetries; inferred from `model` if not given.
        build: how a worker makes the module, where the module itself cannot travel because its class is not importable
            there.
        threads: of torch, in each worker. Results differ in their last digits between numbers of threads, so it is part
            of the plan and not of the machine.

    Raises:
        StudyError: fewer than two networks, a pair of unknown ones, the same cell twice, something whose content cannot
            be read.
        MismatchError: a network does not fit the spec, or differs from the first in a key or shape.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).eval()
        >>> plan = StudyPlan(net, {"one": net, "two": net}, {"weights": pg.WeightMatching()})
        >>> [str(cell) for cell in plan.cells]
        ['one <- two, weights, seed 0']
    """

    model: nn.Module
    networks: Mapping[str, Network]
    matchers: Mapping[str, Matcher]
    evaluate: Evaluate | None = None
    seeds: Sequence[int] = (0,)
    pairs: Literal["all", "ordered", "first"] | Sequence[tuple[str, str]] = "all"
    points: int = 25
    prepare: Prepare | None = None
    higher_is_better: Collection[str] = ("accuracy",)
    unaligned: bool = True
    spec: PermutationSpec = field(default=None)  # type: ignore[assignment]
    threads: int = 1
    build: Callable[[], nn.Module] | None = None

    def __post_init__(self) -> None:
        if len(self.networks) < 2:
            raise StudyError(f"a study needs at least two networks, not {len(self.networks)}")
        if UNALIGNED in self.matchers:
            raise StudyError(f"a matcher may not be called {UNALIGNED!r}: that is the name for no matcher")
        if not self.matchers and self.evaluate is None:
            raise StudyError("there is nothing to do: give matchers, or evaluate, or both")
        if self.points < 2 or self.threads < 1:
            raise StudyError(f"points={self.points} and threads={self.threads}: give at least 2 points and 1 thread")
        if self.matchers and not self.seeds:
            raise StudyError("give at least one seed")
        if self.spec is None:
            from permgraph.inference.auto_spec import auto_spec

            object.__setattr__(self, "spec", auto_spec(self.model))
        first, *others = self.networks
        for name, network in self.networks.items():
            try:
                self.spec.check(as_state_dict(network))
            except PermgraphError as error:
                raise MismatchError(f"network {name!r}: {error}") from error
        for name in others:
            one, other = as_state_dict(self.networks[first]), as_state_dict(self.networks[name])
            check_same_keys(one, other, (repr(first), repr(name)))
        object.__setattr__(self, "networks", MappingProxyType(dict(self.networks)))
        object.__setattr__(self, "matchers", MappingProxyType(dict(self.matchers)))

    @cached_property
    def contents(self) -> Mapping[str, str]:
        """The fingerprint of each network."""
        return {name: fingerprint(dict(as_state_dict(network))) for name, network in self.networks.items()}

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell, in the order of the table.

        Raises:
            StudyError: a pair names an unknown network, or the same cell stands twice in the plan.
        """
        from permgraph import __version__

        common = {
            "permgraph": __version__,
            "model": f"{type(self.model).__module__}.{type(self.model).__qualname__} {self.model!r}",
            "spec": self.spec.fingerprint,
            "evaluate": fingerprint(self.evaluate),
            "prepare": fingerprint(self.prepare),
            "points": self.points,
            "higher": sorted(self.higher_is_better),
            "threads": self.threads,
        }
        matchers = {name: fingerprint(matcher) for name, matcher in self.matchers.items()}
        found: dict[tuple[str, str, str, int], Cell] = {}
        for a, b in self._pairs():
            runs = [(UNALIGNED, 0)] if self.unaligned and self.evaluate is not None else []
            for matcher, seed in [*runs, *itertools.product(self.matchers, self.seeds)]:
                place = (a, b, matcher, seed)
                if place in found:
                    raise StudyError(f"the cell {found[place]} stands twice in the plan")
                content = {"a": self.contents[a], "b": self.contents[b], "matcher": matchers.get(matcher), "seed": seed}
                found[place] = Cell(*place, fingerprint({**common, **content}))
        return tuple(found.values())

    def _pairs(self) -> Iterator[tuple[str, str]]:
        names = list(self.networks)
        if self.pairs == "all":
            yield from itertools.combinations(names, 2)
        elif self.pairs == "ordered":
            yield from itertools.permutations(names, 2)
        elif self.pairs == "first":
            yield from ((names[0], name) for name in names[1:])
        elif isinstance(self.pairs, str):
            raise StudyError(f"pairs={self.pairs!r}: give 'all', 'ordered', 'first', or pairs of names")
        else:
            for a, b in self.pairs:
                for name in (a, b):
                    if name not in self.networks:
                        raise StudyError(f"a pair names the network {name!r}; there are {', '.join(names)}")
                yield a, b
