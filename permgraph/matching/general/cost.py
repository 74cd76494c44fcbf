"""What matching over general symmetries costs, from the spec alone.

The counts are of one pass of an ascent over all groups, as for permutations (`permgraph.matching.cost`), with what the
structures add: polar factors beside assignments, and products with the matrices that act. In memory each step acts on B
once; streamed, what is read is brought into the gauge and under the whole element every time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from permgraph.matching.cost import WORKING, Estimate, MoveCost, Rates, rounds_of
from permgraph.matching.general.acting import Acting
from permgraph.matching.general.ascent import across_from, turning_moves
from permgraph.matching.general.gauge import SMALL, evidence
from permgraph.matching.general.pieces import acting_on, in_pieces
from permgraph.matching.general.weights import starts_of
from permgraph.matching.problem.moves import Move, Node, Place, Plan
from permgraph.spec.spec import PermutationSpec
from permgraph.weights.state_dict import STATISTICS

EXACT = 8
"""Bytes of the numbers that elements are made of."""

HELD = 7
"""How often a run in memory holds a model: both, without gains and balanced; B where the best ascent, the last and the
present one have brought it, and before the present step; and what malloc does not give back between them."""

WORKED = 6
"""How often a streamed run holds the piece at work: A's and B's, on their way into the gauge, and for a product."""

ELEMENTS = 8
"""How often it holds what elements are made of where B's becomes one of its state dict: both models' balance, inverses,
what was found, and their products."""

FACTORED = 6
"""How often a polar factor holds its matrix: the matrix, three factors, and what the decomposition works in."""

WRITTEN = 5
"""How often a tensor is in memory, in float64, as an element is applied to it."""

PAIRED_ROUNDS = 3
"""Rounds over the groups inside a root, where each pair of its indices is an ascent of its own."""

HANDLED = 12
"""How often each weight that a step looks at is written down: brought into the gauge, moved, laid out for products."""

ROUNDS_BETWEEN = 3
"""Rounds over rotations alone between two sweeps, as many as there are about on average."""

PREPARING = 4
"""How often a streamed run reads the models outside its passes: to check, to balance, and for the objective before the
first pass and after it."""


def working_width(elements: int) -> int:
    """Bytes of the numbers in which so many weights are compared."""
    return 8 if elements <= SMALL else 4


def in_memory_bytes(elements: int) -> int:
    """Bytes that models of so many weights take in memory, besides what they are read into."""
    return HELD * working_width(elements) * elements


@dataclass(frozen=True)
class GeneralMoveCost(MoveCost):
    """One step over general symmetries: the best element of one group, with those fibred over it.

    Attributes:
        factors: (size, count) of the polar factors, or of the nuclear norms that take as long.
        moving: operations by which the step's own matrices act on B.
        whole: operations that bring all that the step reads into the gauge and under the element, each time.
        readings: how often it reads its parameters.
        together: elements of the parameters that a streamed step holds at once, where it chooses pair by pair.
    """

    factors: tuple[tuple[int, int], ...] = ()
    moving: int = 0
    whole: int = 0
    readings: int = 1
    together: int = 0


@dataclass(frozen=True, repr=False)
class GeneralEstimate(Estimate):
    """What one alignment over a spec with general symmetries costs.

    Attributes:
        news: the steps of rotations that meet others, once more after all other steps of a pass.
        again: the steps of one of the rounds over rotations alone that follow, with what the rest is worth at hand.
        kept: elements of the Gram matrices of rotations that are kept from step to step, in memory and streamed.
        compared: elements of the parameters that count.
        exact: bytes of the matrices and factors of one element.
        piece: elements of the largest piece that is worked on at a time.
        largest: elements of the largest parameter.
        written: elements of the largest part of a parameter to which an element is applied at once.
    """

    moves: tuple[GeneralMoveCost, ...]
    news: tuple[GeneralMoveCost, ...] = ()
    again: tuple[GeneralMoveCost, ...] = ()
    kept: tuple[int, int] = (0, 0)
    compared: int = 0
    exact: int = 0
    piece: int = 0
    largest: int = 0
    written: int = 0

    def steps(self) -> Iterator[GeneralMoveCost]:
        """All steps of one pass, with those of the rounds over rotations alone that follow it."""
        yield from self.moves
        yield from self.news
        for _ in range(ROUNDS_BETWEEN):
            yield from self.again

    @cached_property
    def factors(self) -> dict[int, int]:
        """How many polar factors of each size the steps of one pass take, without the rounds that follow it."""
        found: dict[int, int] = {}
        for move in self.moves:
            for size, count in move.factors:
                found[size] = found.get(size, 0) + count
        return dict(sorted(found.items(), reverse=True))

    @cached_property
    def gram(self) -> int:
        """Bytes of the largest step's Gram matrices, which are all in memory at once."""
        return working_width(self.compared) // WORKING * max((move.gram for move in self.moves), default=0)

    def memory(self, width: int = WORKING, *, streamed: bool = False, cache: int = 0) -> int:
        """Peak bytes of a run, above what the process holds before it has read anything.

        Args:
            width: bytes of one weight in the checkpoint.
            streamed: tensors are read when a step needs them, rather than held.
            cache: of a streamed run.

        Without streaming: both models as they are, `HELD` times one in working precision, and elements. With it: the
        largest parameter of both as it is, `WORKED` times the largest piece, or the parameters of a step that chooses
        pair by pair, the elements, and the cache; or, if that is more, a part of a tensor in float64 as it is written.
        With either, the Gram matrices of a step and what their polar factors take.
        """
        solving = self.gram + EXACT // WORKING * max(
            (FACTORED * move.gram for move in self.moves if move.factors), default=0
        )
        solving += self.solving
        if not streamed:
            solving += working_width(self.compared) * self.kept[0]
            return 2 * width * self.compared + in_memory_bytes(self.compared) + solving + ELEMENTS * self.exact
        solving += EXACT * self.kept[1]
        raw, held = 2 * width * self.largest, ELEMENTS // 2 * self.exact
        together = max((move.together for move in self.moves), default=0)
        work = WORKED * working_width(self.compared) * max(self.piece, together)
        matching = cache + raw + held + max(work + solving, held)
        return max(matching, 2 * width * self.largest + 2 * self.exact + WRITTEN * EXACT * self.written)

    @property
    def starts(self) -> int:
        """How many ascents a run in memory makes."""
        return starts_of(self.compared)

    def read(self, width: int = WORKING) -> int:
        """Bytes that a streamed run without a cache reads in one pass; beforehand it reads `PREPARING` times."""
        return 2 * width * sum(step.readings * step.parameters for step in self.steps())

    def seconds(
        self, rates: Rates, *, passes: int = 1, workers: int = 1, streamed: bool = False, width: int = WORKING
    ) -> float:
        """Seconds of one ascent, of which a run in memory makes `starts`.

        Args:
            rates: of the machine; `Rates.factor` and `Rates.copy` count here alone.
            passes: over all groups.
            workers: must be one: general symmetries are matched by one process.
            streamed: count the reading, and what has to be done again because nothing is kept.
            width: bytes of one weight in the checkpoint.
        """
        super().seconds(rates, passes=passes, workers=workers)  # which refuses what makes no sense
        slow = working_width(self.compared) / WORKING
        steps = tuple(self.steps())
        operations = sum(m.flops + (m.readings * m.whole if streamed else m.moving) for m in steps)
        solving = sum(count * rates.assigning(size) for size, count in self.problems.items())
        factoring = sum(count * rates.factoring(size) for m in steps for size, count in m.factors)
        looked = sum((2 * m.readings if streamed else 2) * m.parameters for m in steps)
        handling = HANDLED * working_width(self.compared) / rates.copy
        each = operations * slow / rates.flops + solving + factoring + handling * looked
        before = PREPARING * 2 * handling * self.compared
        reading = (passes * self.read(width) + PREPARING * 2 * width * self.elements) / rates.read if streamed else 0.0
        return passes * each + before + reading


def estimate_general(spec: PermutationSpec) -> GeneralEstimate:
    """Count what one pass over a spec with general symmetries computes, reads and holds; see `estimate`."""
    names = evidence(spec, STATISTICS)
    pieces = in_pieces(spec, names)
    acting = acting_on(spec, pieces)
    plan = Plan(acting.plain, pieces)
    sizes = {key: math.prod(acting.spec.shapes[key]) for key in pieces}
    costs: dict[str, GeneralMoveCost] = {}
    for move in plan.moves:
        cost = _cost(acting, move, sizes)
        if move.paired:
            inside = [_cost(acting, other, sizes) for other in plan.moves if other.name in plan.inside(move.name)]
            cost = _pair_by_pair(cost, inside)
        if move.name in costs:
            cost = _together(costs[move.name], cost)
        costs[move.name] = cost
    turning = turning_moves(acting, plan.moves)
    news: tuple[GeneralMoveCost, ...] = ()
    again: tuple[GeneralMoveCost, ...] = ()
    if len(turning) > 1:
        news = tuple(_cost(acting, move, sizes) for move in turning if not move.root.batch)
        again = tuple(_cost(acting, move, sizes, {m.name for m in turning}) for move in turning)
    kept = _kept(acting, turning)
    whole = {name: math.prod(shape) for name, shape in spec.shapes.items()}
    exact = 0
    for name, group in spec.acting.items():
        number = (
            group.size
            if group.structure.linear
            else group.structure.scales + group.structure.signs + group.structure.flips
        )
        exact += EXACT * spec.multiplicity(name) * group.size * number
    return GeneralEstimate(
        moves=tuple(costs.values()),
        news=news,
        again=again,
        kept=kept,
        elements=sum(whole.values()),
        rounds=rounds_of(acting.plain, list(costs)),
        compared=sum(sizes.values()),
        exact=exact,
        piece=max(sizes.values(), default=0),
        largest=max((whole[name] for name in names), default=0),
        written=max(sizes.values(), default=0),
    )


def _cost(
    acting: Acting, move: Move, sizes: dict[str, int], restless: Collection[str] | None = None
) -> GeneralMoveCost:
    """What a step costs; given groups that turn, a rotation's that knows what all is worth but across from these."""

    def concerns(place: Place) -> bool:
        leaves = place.block.leaves
        return restless is None or any(
            leaf.group in restless for axis, leaf in enumerate(leaves) if axis not in place.own
        )

    def size(group: str) -> int:
        return acting.spec.groups[group].size

    flops = gram = 0
    problems: list[tuple[int, int]] = []
    factors: list[tuple[int, int]] = []

    def count(node: Node) -> None:
        nonlocal flops, gram
        chain, batch = math.prod(map(size, node.chain)), math.prod(map(size, node.batch))
        flops += sum(2 * place.block.size * chain for place in node.places if concerns(place))
        gram += WORKING * chain**2 * batch
        structure = acting.structure(node.group)
        found = (size(node.group), batch * math.prod(size(group) for group in node.chain[:-1]) ** 2)
        if not structure.linear:
            problems.append(found)
        elif not structure.is_paired:  # phases take no time
            factors.append(found)

    for node in (*move.root.nodes(), *(node for then in move.then for node in then.root.nodes())):
        count(node)
    touched = acting.touched([move.name])
    if restless is not None:
        again = {place.block.parameter for node in move.root.nodes() for place in node.places if concerns(place)}
        touched = [name for name in touched if name in again]
        if not move.root.batch:  # before such a step it goes on without looking
            factors *= 2
    return GeneralMoveCost(
        group=move.name,
        size=size(move.name),
        flops=flops,
        gram=gram,
        problems=tuple(problems),
        parameters=sum(sizes[name] for name in touched),
        largest=max((sizes[name] for name in touched), default=0),
        factors=tuple(factors),
        moving=sum(_products(acting, name, move.groups) for name in touched),
        whole=sum(_products(acting, name, None) for name in touched),
        readings=1 + _depth(move.root),
    )


def _kept(acting: Acting, turning: Collection[Move]) -> tuple[int, int]:
    """Elements of the Gram matrices that are kept, by an ascent in memory and by a streamed one."""
    restless = {move.name for move in turning}
    few = many = 0
    for move in turning:
        if not move.root.batch:
            shares = {across for across in map(across_from, move.root.places) if not across & restless}
            many += len(shares) * acting.spec.groups[move.name].size ** 2
            few += min(len(shares), 2) * acting.spec.groups[move.name].size ** 2
    return many, few


def _pair_by_pair(root: GeneralMoveCost, inside: Sequence[GeneralMoveCost]) -> GeneralMoveCost:
    """A step in which an ascent over the groups inside is made for each of A's indices, and one more at the end."""
    times = (root.size + 1) * PAIRED_ROUNDS
    return replace(
        root,
        flops=times * sum(cost.flops for cost in inside),
        gram=max((cost.gram for cost in inside), default=root.gram),
        problems=(*root.problems, *((size, times * count) for cost in inside for size, count in cost.problems)),
        factors=tuple((size, times * count) for cost in inside for size, count in cost.factors),
        moving=root.moving + times * sum(cost.moving for cost in inside),
        whole=root.whole + times * sum(cost.moving for cost in inside),
        together=root.parameters,
    )


def _depth(node: Node) -> int:
    return max((1 + _depth(inner) for inner in node.inner), default=0)


def _products(acting: Acting, name: str, groups: frozenset[str] | None) -> int:
    """Operations by which the matrices of some groups, or of all, act on a parameter."""
    total = 0
    for place in acting.places[name]:
        group = place.leaf.group
        assert group is not None
        if place.action.powers and acting.structure(group).linear and (groups is None or group in groups):
            total += 2 * place.block.size * place.leaf.size
    return total


def _together(one: GeneralMoveCost, other: GeneralMoveCost) -> GeneralMoveCost:
    return GeneralMoveCost(
        group=one.group,
        size=one.size,
        flops=one.flops + other.flops,
        gram=max(one.gram, other.gram),
        problems=one.problems + other.problems,
        parameters=max(one.parameters, other.parameters),
        largest=max(one.largest, other.largest),
        factors=one.factors + other.factors,
        moving=one.moving + other.moving,
        whole=max(one.whole, other.whole),
        readings=one.readings + other.readings,
        together=max(one.together, other.together),
    )
