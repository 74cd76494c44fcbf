"""What an alignment will cost, from the spec alone: no weight is needed, so what no machine holds can be planned.

The counts are exact for one full pass of weight matching over all groups, in multiplications and additions, assignment
problems and bytes. Seconds follow from them by a short calibration of this machine. Later passes of `WeightMatching`
skip what nothing around has moved, so the seconds of a run that keeps its matrices are an upper estimate.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from permgraph.assignment.solve import ROUGH, WIDE, assign
from permgraph.conventions.displayed import Displayed
from permgraph.conventions.waiting import waits
from permgraph.errors import MismatchError, PermgraphError
from permgraph.matching import tuned
from permgraph.matching.general.polar import polar
from permgraph.matching.problem.moves import Move, Plan
from permgraph.spec.spec import PermutationSpec

WORKING = 4  # bytes of a float32


@dataclass(frozen=True)
class Rates:
    """How fast a machine is.

    Attributes:
        flops: floating-point operations per second, in float32 matrix products.
        assignment: seconds of one assignment of n rows, as (c, k) for c n^k.
        read: bytes per second from where checkpoints lie.
        network: bytes per second between two workers.
        factor: seconds of one polar factor of n rows in float64, as (c, k) for c n^k.
        copy: bytes per second that are copied in memory.
        blunt: seconds of one assignment whose costs are sums of few products, for some sizes in ascending order; none
            if that takes as long as any. It takes about ten times as long, since very many assignments are nearly as
            good as the best.
    """

    flops: float
    assignment: tuple[float, float]
    read: float = 1e9
    network: float = 1e9
    blunt: tuple[tuple[int, float], ...] = ()
    factor: tuple[float, float] = (0.0, 3.0)
    copy: float = math.inf

    def factoring(self, size: int) -> float:
        """Seconds for one polar factor of this size."""
        c, k = self.factor
        return float(c * size**k)

    def assigning(self, size: int, *, blunt: bool = False) -> float:
        """Seconds for one assignment problem of this size."""
        c, k = self.assignment
        usual = float(c * size**k)
        if not blunt or not self.blunt:
            return usual
        found = usual
        for (small, least), (large, most) in itertools.pairwise(self.blunt):
            found = least * float((size / small) ** (math.log(most / least) / math.log(large / small)))
            if size <= large:
                break
        return max(usual, found)


@dataclass(frozen=True)
class MoveCost:
    """One step: the best renumbering of one group, with those fibred over it.

    Attributes:
        group: the root of the step.
        size: how many indices the root has.
        flops: of its Gram matrices, computed in full.
        gram: bytes of the Gram matrices, in float32; nested ones are made in portions.
        problems: (size, count) of the assignment problems.
        nested: those among them that find what pairs of another group's indices are worth. In the first pass the axes
            around are not in order yet, so that their costs are sums of few products.
        parameters: how many elements the parameters have in which the group stands.
        largest: elements of the largest of them.
        kept: bytes that a run which holds both models may keep between steps, of a group that is renumbered alone.
    """

    group: str
    size: int
    flops: int
    gram: int
    problems: tuple[tuple[int, int], ...]
    parameters: int
    largest: int
    kept: int = 0
    nested: tuple[tuple[int, int], ...] = ()

    def seconds(self, rates: Rates, *, first: bool = False) -> tuple[float, float]:
        """The seconds for the Gram matrices and those for the assignments, in the first pass or a later one."""
        solving = sum(count * rates.assigning(size) for size, count in self.problems)
        if first:
            extra = (count * (rates.assigning(size, blunt=True) - rates.assigning(size)) for size, count in self.nested)
            solving += sum(extra)
        return self.flops / rates.flops, solving


@dataclass(frozen=True, repr=False)
class Estimate(Displayed):
    """What one alignment over a spec costs.

    Attributes:
        moves: one per step of a pass.
        elements: of all parameters and buffers.
        rounds: the groups of steps that may run side by side: no two groups of one share a parameter.
        nested: bytes that the Gram matrices of nested groups take at a time.
    """

    moves: tuple[MoveCost, ...]
    elements: int
    rounds: tuple[tuple[str, ...], ...]
    nested: int = 1 << 29

    @cached_property
    def flops(self) -> int:
        """Of all Gram matrices of one pass."""
        return sum(move.flops for move in self.moves)

    @cached_property
    def problems(self) -> dict[int, int]:
        """How many assignment problems of each size one pass solves."""
        found: dict[int, int] = {}
        for move in self.moves:
            for size, count in move.problems:
                found[size] = found.get(size, 0) + count
        return dict(sorted(found.items(), reverse=True))

    @cached_property
    def gram(self) -> int:
        """Bytes of the largest step's Gram matrices, as far as they are in memory at once."""
        return max((min(move.gram, max(self.nested, WORKING * move.size**2)) for move in self.moves), default=0)

    @cached_property
    def solving(self) -> int:
        """Bytes of the costs that the solver makes of the largest problem: in float64 if it is narrow, none if wide."""
        widths = [2 * WORKING if size < ROUGH else WORKING if size < WIDE else 0 for size in self.problems]
        return max((width * size**2 for width, size in zip(widths, self.problems, strict=True)), default=0)

    def memory(self, width: int = WORKING, *, streamed: bool = False, cache: int = 0) -> int:
        """Peak bytes of a run, above what the process holds before it has read anything.

        Args:
            width: bytes of one weight in the checkpoint.
            streamed: tensors are read when a step needs them (`StreamedWeightMatching`), rather than held.
            cache: of a streamed run.

        Without streaming: both models in float32; B as it is renumbered and the Gram matrices between steps, which
        together take no more than `WeightMatching` allows itself, a model with what a step needs; that step's Gram
        matrices, twice; and the largest parameter in both, or a portion of it. With it: one parameter in both models
        and B's renumbered, a portion of them in float32, as it is and as the products want it, the Gram matrices, and
        the cache. With either: the costs that the solver makes of the Gram matrix.
        """
        largest = max((move.largest for move in self.moves), default=0)
        if not streamed:
            model = WORKING * self.elements
            widest = WORKING * max((move.size for move in self.moves), default=0) ** 2
            room = max(tuned.ROOM, model - 2 * widest - 8 * WORKING * tuned.PORTION)
            kept = min(room, model + sum(move.kept for move in self.moves))
            views = 2 * WORKING * min(largest, 4 * tuned.PORTION)
            return 2 * model + kept + 2 * self.gram + self.solving + views
        widest = max((move.size for move in self.moves), default=0)
        portion = min(max(tuned.STREAMED_PORTION, tuned.STREAMED_DEPTH * widest), largest)
        return 3 * width * largest + 4 * WORKING * portion + self.gram + self.solving + cache

    def read(self, width: int = WORKING) -> int:
        """Bytes that a streamed run reads in one pass: each tensor, of both models, once for each group on it."""
        return 2 * width * sum(move.parameters for move in self.moves)

    def seconds(
        self,
        rates: Rates,
        *,
        passes: int = 1,
        workers: int = 1,
        streamed: bool = False,
        width: int = WORKING,
    ) -> float:
        """Seconds of a run, were each pass to compute everything.

        Args:
            rates: of each worker.
            passes: over all groups; runs took 4 to 12 where they were measured.
            workers: the Gram matrices are sums over shards, so they divide among the workers, whose parts are then
                added up over the network. Assignments divide only among steps that may run side by side.
            streamed: count the reading, which divides among the workers as well.
            width: bytes of one weight in the checkpoint.
        """
        if passes < 1 or workers < 1:
            raise PermgraphError(f"passes={passes}, workers={workers}: give at least 1")
        grams = sum(move.seconds(rates)[0] for move in self.moves) / workers
        adding = 0.0
        if workers > 1:  # a ring: each worker sends and receives the matrix about once, in both halves
            adding = sum(2 * (workers - 1) / workers * move.gram for move in self.moves) / rates.network
        reading = self.read(width) / rates.read / workers if streamed else 0.0
        solving = self._solving(rates, workers, first=True) + (passes - 1) * self._solving(rates, workers, first=False)
        return passes * (grams + adding + reading) + solving

    def _solving(self, rates: Rates, workers: int, *, first: bool) -> float:
        costs = {move.group: move.seconds(rates, first=first)[1] for move in self.moves}
        rounds = ([costs[group] for group in together] for together in self.rounds)
        return sum(max(max(each, default=0.0), sum(each) / workers) for each in rounds)


def estimate(spec: PermutationSpec) -> Estimate:
    """Count what one pass of weight matching over a spec computes, reads and holds.

    Args:
        spec: of any model, also one that was built on the meta device. Of general symmetries, the cost of matching
            over all of them.

    Raises:
        MismatchError: it is something else than a spec.

    Example:
        >>> spec = pg.auto_spec(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
        >>> estimate(spec).flops  # two Gram matrices (16, 16), and the bias's
        6656
    """
    if not isinstance(spec, PermutationSpec):
        raise MismatchError(f"estimate() takes a spec, such as auto_spec(model), not a {type(spec).__name__}")
    if spec.general is not None:
        from permgraph.matching.general.cost import estimate_general

        return estimate_general(spec)
    plan = Plan(spec, [name for name in spec.axes if name not in spec.aliases])
    elements = {name: math.prod(shape) for name, shape in spec.shapes.items()}
    costs: dict[str, MoveCost] = {}
    for move in plan.moves:
        cost = _cost(spec, move, elements)
        if move.name in costs:  # a second step of the same root, for groups that one nested assignment cannot take
            cost = _together(costs[move.name], cost)
        costs[move.name] = cost
    return Estimate(tuple(costs.values()), sum(elements.values()), rounds_of(spec, list(costs)))


@waits("measuring this machine")
def calibrate(seconds: float = 2.0) -> Rates:
    """Measure this machine, with torch's present number of threads.

    Args:
        seconds: about how long to take.

    Example:
        >>> rates = calibrate(0.1)
        >>> rates.assigning(1000) > rates.assigning(100)
        True
    """
    side = 512
    one, other = torch.ones(side, side), torch.ones(side, side)
    product = _repeat(lambda: one @ other, seconds / 4)
    small, large = 512, 2048
    times = {}
    for size in (small, large):
        solve = functools.partial(assign, _costs(size), maximise=True)
        # The solver runs in this thread, whose own time says how long it takes also where others take turns with it.
        times[size] = _repeat(solve, seconds / 4, time.thread_time)
    blunt = []
    for size in (128, small, large):
        solve = functools.partial(assign, _costs(size, tuned.FEW_PRODUCTS), maximise=True)
        blunt.append((size, _repeat(solve, seconds / 12, time.thread_time)))
    rate = 2 * side**3 / product
    copied = torch.ones(1 << 21, dtype=torch.float64)
    copying = _repeat(copied.clone, seconds / 16)
    few, many = 128, 512
    random = torch.Generator().manual_seed(0)
    found = {}
    for size in (few, many):
        gram = torch.randn(size, size, generator=random, dtype=torch.float64)
        found[size] = _repeat(functools.partial(polar, gram), seconds / 16)
    return Rates(
        flops=rate,
        assignment=_power_law(times, 2.0),
        blunt=tuple(blunt),
        factor=_power_law(found, 2.5),
        copy=copied.nbytes / copying,
    )


def _power_law(times: dict[int, float], least: float) -> tuple[float, float]:
    """(c, k) for c n^k, with k from `least` to 3, from the seconds for two sizes."""
    small, large = sorted(times)
    power = min(3.0, max(least, math.log(times[large] / times[small]) / math.log(large / small)))
    return times[large] / large**power, power


def _costs(size: int, products: int | None = None) -> np.ndarray:
    """A Gram matrix of two random layers, each entry the sum of so many products; of as many as rows if not said."""
    random = np.random.default_rng(0)
    one, other = (random.standard_normal((size, products or size), dtype=np.float32) for _ in range(2))
    return one @ other.T


def _repeat(work: Callable[[], object], seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """The least time of one run, by the clock, among those that fit."""
    work()
    best, until = math.inf, time.perf_counter() + seconds
    while True:
        started = clock()
        work()
        best = min(best, clock() - started)
        if time.perf_counter() >= until:
            return best


def _cost(spec: PermutationSpec, move: Move, elements: dict[str, int]) -> MoveCost:
    def size(group: str) -> int:
        return spec.groups[group].size

    flops, gram = 0, 0
    problems: list[tuple[int, int]] = []
    nested: list[tuple[int, int]] = []
    for node in (*move.root.nodes(), *(node for then in move.then for node in then.root.nodes())):
        chain, batch = math.prod(map(size, node.chain)), math.prod(map(size, node.batch))
        flops += sum(2 * place.block.size * chain for place in node.places)
        gram += WORKING * chain**2 * batch
        problems.append((size(node.group), batch * math.prod(size(group) for group in node.chain[:-1]) ** 2))
        if len(node.chain) > 1:
            nested.append(problems[-1])
    standing = [elements[name] for name in move.parameters]
    kept = gram if len(move.groups) == 1 and not move.quadratic else 0
    whole, largest = sum(standing), max(standing, default=0)
    return MoveCost(move.name, size(move.name), flops, gram, tuple(problems), whole, largest, kept, tuple(nested))


def _together(one: MoveCost, other: MoveCost) -> MoveCost:
    return MoveCost(
        one.group,
        one.size,
        one.flops + other.flops,
        max(one.gram, other.gram),
        one.problems + other.problems,
        one.parameters + other.parameters,
        max(one.largest, other.largest),
        max(one.kept, other.kept),
        one.nested + other.nested,
    )


def rounds_of(spec: PermutationSpec, roots: list[str]) -> tuple[tuple[str, ...], ...]:
    """Steps that may run side by side: colours of the graph whose edges join groups that meet in some parameter."""
    import networkx as nx  # as in `PermutationSpec.coupling`

    graph = nx.Graph()
    graph.add_nodes_from(roots)
    root_of = {name: next((p for p in group.parents if p in graph), name) for name, group in spec.groups.items()}
    for one, other, data in spec.coupling().edges(data=True):
        a, b = root_of[one], root_of[other]
        if a != b and a in graph and b in graph and data["meeting"]:
            graph.add_edge(a, b)
    rounds: dict[int, list[str]] = {}
    for group, colour in nx.greedy_color(graph, strategy="largest_first").items():
        rounds.setdefault(colour, []).append(group)
    return tuple(tuple(together) for _, together in sorted(rounds.items()))
