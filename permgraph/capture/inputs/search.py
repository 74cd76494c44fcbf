"""The finder that is asked last: it runs the module on guesses, and mends them by what each failure says.

A best-first search. What came furthest before it failed is mended next; every third time it is the least far-fetched
guess, so that a wrong turn which came far does not hold the search up.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from permgraph.capture.inputs.denoisers import begun
from permgraph.capture.inputs.forms import Form, accepted
from permgraph.capture.inputs.graphs import graphs
from permgraph.capture.inputs.guesses import (
    Guess,
    Guesses,
    annotations_of,
    beginnings,
    paired,
    parameters_of,
    values_of,
)
from permgraph.capture.inputs.layers import SECONDS_FOR_LAYERS, layers_at_length, placed, required, within_seconds
from permgraph.capture.inputs.mends import mends
from permgraph.capture.inputs.registry import Candidate, input_finder
from permgraph.capture.inputs.trials import Bench

MAX_SECONDS = 3.0
#: So long the search goes on after a trial that came further than all before, and no longer than that in all.
MORE_SECONDS, MOST_SECONDS = 1.5, 8.0
FIRST_SECONDS = 15.0
MAX_TRIALS = 250
#: So many trials are made even where each takes long, as long as they take no more than MOST_SECONDS.
FEW_TRIALS = 20
#: After so many trials, none of which came further than one before, the search gives up.
PATIENCE = 60
#: Forms whose first proposals the search begins with as well: they may lack but one argument.
SEEDS: tuple[Form, ...] = (begun, graphs)
MAX_SEEDS = 3
#: So many mends of one failure are kept, the cheapest.
MAX_MENDS = 24


@input_finder("search", last=True)
def from_search(model: nn.Module) -> Iterator[Candidate]:
    """Guesses at each required argument, mended by what the module complains of, until one runs.

    If none does, the one that came furthest, so that the error says how far that was.
    """
    with Bench(model) as bench:
        found = _searched(model, bench)
    if found is not None:
        yield found


@input_finder("other sizes", last=True)
def from_other_sizes(model: nn.Module) -> Iterator[Candidate]:
    """What the finder of layers had no time for."""
    yield from within_seconds(layers_at_length(model), SECONDS_FOR_LAYERS)


def _searched(model: nn.Module, bench: Bench) -> Candidate | None:
    queue = _Queue()
    for cost, first in _beginnings(model):
        queue.add(cost, 0, first)
    until = latest = math.inf  # the first trial may load much of torch
    furthest: tuple[int, Candidate | None] = (-1, None)
    since = 0
    for number in range(MAX_TRIALS):
        if number == 1:
            until, latest = time.process_time() + MAX_SECONDS, time.process_time() + MOST_SECONDS
        now = time.process_time()
        taken = queue.take(number % 3 == 2)
        if taken is None or now > latest or (now > until and number >= FEW_TRIALS) or since > PATIENCE:
            break
        cost, guesses = taken
        try:
            values = values_of(model, guesses)
        except (RuntimeError, IndexError):  # sizes that contradict each other
            continue
        since += 1
        trial = bench.attempt(values, min(max(until - now, 2.0), FIRST_SECONDS))
        if trial.failure is None:
            return placed(model, values_of(model, {n: _within(g, trial.rows.get(n)) for n, g in guesses.items()}))
        if trial.progress > furthest[0]:
            furthest, since = (trial.progress, placed(model, values)), 0
            until = max(until, min(time.process_time() + MORE_SECONDS, latest))
        found = sorted(mends(model, guesses, trial.failure), key=lambda mend: mend[0])
        for more, mended in found[:MAX_MENDS]:
            queue.add(cost + more, trial.progress, mended)
    return furthest[1]


def _within(guess: Guess, rows: int | None) -> Guess:
    """A guess at integers that are all below a number of rows."""
    return guess if rows is None or guess.bound <= rows or guess.kind != "ids" else guess.with_(bound=rows)


class _Queue:
    """Guesses to try, by how far what they mend came and by what they cost; none is tried twice."""

    def __init__(self) -> None:
        self._furthest: list[tuple[float, float, int, Guesses]] = []
        self._likeliest: list[tuple[float, int, Guesses]] = []
        self._known: dict[tuple[tuple[str, Guess], ...], tuple[int, int]] = {}
        self._taken: set[int] = set()
        self._numbers = itertools.count()

    def add(self, cost: float, progress: int, guesses: Guesses) -> None:
        """Queue guesses; those that are queued already move up if they mend what came further than before."""
        key = tuple(guesses.items())
        number, before = self._known.get(key) or (next(self._numbers), -1)
        if progress > before:
            self._known[key] = (number, progress)
            heapq.heappush(self._furthest, (-progress, cost, number, guesses))
            if before < 0:
                heapq.heappush(self._likeliest, (cost, number, guesses))

    def take(self, likeliest: bool) -> tuple[float, Guesses] | None:
        heap: list[tuple] = self._likeliest if likeliest else self._furthest  # type: ignore[type-arg]
        while heap:
            *_, cost, number, guesses = heapq.heappop(heap)
            if number not in self._taken:
                self._taken.add(number)
                return cost, guesses
        return None


def _beginnings(model: nn.Module) -> Iterator[tuple[float, dict[str, Guess]]]:
    """What each required argument may be to begin with: all at their likeliest, then one of them otherwise."""
    hints = annotations_of(model)
    choices = {name: beginnings(model, name, at, hints.get(name)) for at, name in enumerate(required(model))}
    likeliest = paired({name: guesses[0] for name, guesses in choices.items()})
    names, order = accepted(model), list(parameters_of(model))
    for form in SEEDS:
        for at, proposed in enumerate(itertools.islice(form(model, names), MAX_SEEDS)):
            made = {name: _guessed(name, value) for name, value in proposed.items()}
            known = {name: guess for name, guess in made.items() if guess is not None}
            if len(known) == len(made):
                every = paired({**likeliest, **known})
                yield 0.1 * at - 0.5, {name: every[name] for name in order if name in every}
    yield 0.0, likeliest
    for name, guesses in choices.items():
        for at, guess in enumerate(guesses[1:4]):
            yield 1.0 + at, {**likeliest, name: guess}


def _guessed(name: str, value: object) -> Guess | None:
    """The guess that would make values like these; None where there is no such kind."""
    if not isinstance(value, Tensor):
        return None
    shape = tuple(value.shape)
    if value.is_complex():
        return Guess("complex", shape)
    if "edge_index" in name:
        return Guess("edges", shape)
    if value.is_floating_point():
        return Guess("real", shape)
    return Guess("mask", shape) if value.dtype == torch.bool else Guess("ids", shape, int(value.max()) + 1)
