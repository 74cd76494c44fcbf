"""Modules any two of which can change places, put together from exchanges of two."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import fx

from permgraph.inference.modules.colours import Colours
from permgraph.inference.modules.depths import may_change_places
from permgraph.inference.modules.exchange import Exchange, Exchanger
from permgraph.inference.modules.moves import IntArray, Refused
from permgraph.inference.modules.proof import UNREAD, Proof
from permgraph.inference.modules.reading import Dataflow
from permgraph.inference.solution import Solution, is_weight
from permgraph.spec.provenance import Refusal

log = logging.getLogger(__name__)

_NUMBER = re.compile(r"\d+")

MOST_TRIALS = 10_000
"""Exchanges that are tried in one graph; what is left then keeps its place."""


FEWEST_AT_ONCE = 5
"""Of fewer modules than that each exchange is proven by itself."""

MOST_REFUSED = 100
"""Exchanges of weights that look alike that are refused before no more of these are tried; two for each, if more."""


@dataclass(frozen=True)
class Family:
    """Modules any two of which change places.

    Args:
        members: of each module its weights, by their names, in such an order that the i-th ones go to each other.
        blocks: for dimensions of weights outside the modules, whose parts change places along with these: for each
            module the indices of its part.
    """

    members: tuple[tuple[str, ...], ...]
    blocks: Mapping[tuple[str, int], tuple[IntArray, ...]]


@dataclass(frozen=True)
class Found:
    """The families of a graph, outer ones before those inside them, and what was tried but is none.

    Args:
        families: the families.
        refused: for two weights that stand in like places, by their names, why they do not change places.
    """

    families: tuple[Family, ...]
    refused: Mapping[tuple[str, str], str]

    def refusals(self) -> list[Refusal]:
        """What was refused, the weights that do not change places with the same one for the same reason together."""
        together: dict[tuple[str, str], list[str]] = {}
        for (one, other), why in self.refused.items():
            together.setdefault((one, why), [one]).append(other)
        return [Refusal(why, tuple(names)) for (_, why), names in together.items()]


def find_families(solution: Solution, unread: Sequence[Collection[str]] = ()) -> Found:
    """All families of modules of a solved graph; `unread` has the weights that each pass did not read.

    Modules of which some ran in a pass and others did not are none: which of them run depends on what is given.
    """
    if not may_change_places(solution):
        return Found((), {})
    flow = Dataflow(solution, _held(solution, unread))
    colours = Colours(flow)
    unlike = _unlike(flow, colours)
    classes = colours.classes()
    if not classes:
        return Found((), unlike)
    search = _Search(flow, colours)
    for weights in classes:
        search.look_into(weights)
    families = sorted(search.families, key=lambda family: -sum(map(len, family.members)))
    return Found(tuple(families), {**search.refused, **unlike})


def _held(solution: Solution, unread: Sequence[Collection[str]]) -> frozenset[str]:
    """The weights that stay in their modules: no pass read them, or one read some and others not that are named alike.

    Where a part that no pass reached was put in its siblings' places, nothing was seen of how it would run.
    """
    alike: dict[str, list[str]] = {}
    for name in solution.parameters:
        alike.setdefault(_NUMBER.sub("*", name), []).append(name)
    held: set[str] = set(solution.unread)
    for missed in map(frozenset, unread):
        for names in alike.values():
            if not missed.isdisjoint(names) and not missed.issuperset(names):
                held.update(names)
    parts = [part for one in solution.stand_ins for part in (one.part, *one.siblings)]
    return frozenset(held).union(
        name for name in solution.parameters if any(name == part or name.startswith(f"{part}.") for part in parts)
    )


def _unlike(flow: Dataflow, colours: Colours) -> dict[tuple[str, str], str]:
    """Why weights that meet the same tensor, and whose names differ in one number, do not even stand in like places."""
    named: dict[tuple[str, ...], list[fx.Node]] = {}
    for node in filter(is_weight, flow.nodes):
        words = _name(node).split(".")
        for at, word in enumerate(words):
            if word.isdecimal():
                named.setdefault((*words[:at], "*", *words[at + 1 :]), []).append(node)
    found: dict[tuple[str, str], str] = {}
    for first, *others in named.values():
        for other in others:
            if colours.of[first] != colours.of[other] and not _met(flow, first).isdisjoint(_met(flow, other)):
                found[_name(first), _name(other)] = _difference(flow, first, other)
    return found


def _met(flow: Dataflow, weight: fx.Node) -> set[fx.Node]:
    """What a weight meets first that is no weight itself."""
    node = weight
    while len(flow.users[node]) == 1:
        ((user, _),) = flow.users[node]
        beside = {n for term in flow.readings[user].terms for n in term.nodes if n is not node and not is_weight(n)}
        if beside:
            return beside
        node = user
    return set()


def _difference(flow: Dataflow, one: fx.Node, other: fx.Node) -> str:
    if _name(one) in flow.held or _name(other) in flow.held:
        return UNREAD
    mine, its = (tuple(node.meta["val"].shape) for node in (one, other))
    if mine != its:
        return f"{_name(other)} is {'x'.join(map(str, its))}, {_name(one)} {'x'.join(map(str, mine))}"
    mine_by, its_by = (sorted({flow.name(user) for user, _ in flow.users[node]}) for node in (one, other))
    if mine_by != its_by:
        said = (", ".join(names) or "nothing" for names in (mine_by, its_by))
        return f"{_name(one)} is read by {next(said)}, {_name(other)} by {next(said)}"
    return "what they are computed with, or what becomes of it, is not alike"


@dataclass(frozen=True)
class Swap:
    """What a proven exchange of two modules does to weights.

    Args:
        twins: for each weight of the first module that of the second.
        blocks: for dimensions of weights outside that are moved: the indices of the first module, and where each goes.
    """

    twins: Mapping[fx.Node, fx.Node]
    blocks: Mapping[tuple[str, int], tuple[IntArray, IntArray]]

    @classmethod
    def of(cls, exchange: Exchange) -> Swap:
        return cls({n: exchange.twins[n] for n in exchange.first if is_weight(n)}, _moved_weights(exchange))


class _Search:
    def __init__(self, flow: Dataflow, colours: Colours) -> None:
        self._exchanger = Exchanger(flow, colours)
        self._proof = Proof(flow)
        self._trials = 0
        self._levels: dict[fx.Node, int] = {}  # of how many families each weight's module is a member
        self.families: list[Family] = []
        self.refused: dict[tuple[str, str], str] = {}
        self._hopeless: dict[tuple[fx.Node, fx.Node], str] = {}  # weights that an exchange that is refused would carry

    def look_into(self, weights: Sequence[fx.Node]) -> None:
        """Find the families of weights that look alike."""
        left = list(weights)
        refused, most = len(self.refused), max(MOST_REFUSED, 2 * len(weights))
        while len(left) > 1 and self._trials < MOST_TRIALS and len(self.refused) - refused < most:
            first, *others = left
            if self._accounted_for(first, weights):
                return
            gone = {first}
            for members in _levels(self._swaps(first, others)):
                gone.update(self._add(members))
            left = [weight for weight in left if weight not in gone and weight not in self._levels]

    def _accounted_for(self, first: fx.Node, weights: Sequence[fx.Node]) -> bool:
        """Whether the families that are known explain all that look like a weight."""
        number = 1
        for family in self.families:
            if any(_name(first) in member for member in family.members):
                number *= len(family.members)
        return number >= len(weights)

    def _swaps(self, first: fx.Node, others: Sequence[fx.Node]) -> list[Swap]:
        """The exchanges of one weight with others that are proven."""
        found: list[Swap] = []
        for row in _rows(first, others):
            exchange = self._exchange(first, row[0])
            if exchange is not None:
                found.append(Swap.of(exchange))
                together = self._all_at_once(exchange, (first, *row))
                if together is not None:
                    found += together
                    continue
            found += [Swap.of(e) for other in row[1:] if (e := self._exchange(first, other)) is not None]
        return found

    def _all_at_once(self, exchange: Exchange, weights: Sequence[fx.Node]) -> list[Swap] | None:
        """The exchanges of the first of some weights with the third and all further ones, from three proofs in all.

        The exchange of the first two is proven. Two reflections of the row are, one after the other, a turn by one
        place: it carries that exchange to one of any two neighbours, and these make all.
        """
        count = len(weights)
        if count < FEWEST_AT_ONCE:
            return None
        try:
            reflections = []
            for sum_ in (0, 1):
                pairs = [(i, (sum_ - i) % count) for i in range(count)]
                self._trials += 1
                seeds = [(weights[i], weights[j]) for i, j in pairs if i < j]
                found = self._exchanger.followed(self._exchanger.pairs(seeds))
                self._proof.check(found)
                reflections.append(found)
            return list(turned(Swap.of(exchange), reflections, count))
        except Refused as refused:
            log.debug("not all at once: %s", refused)
            return None

    def _exchange(self, one: fx.Node, other: fx.Node) -> Exchange | None:
        """The exchange that carries one weight to another; None where it, or a part of it, is refused."""
        why = self._hopeless.get((one, other))
        if why is None:
            self._trials += 1
            pairs = self._exchanger.pairs([(one, other)])
            try:
                exchange = self._exchanger.followed(pairs)
                self._proof.check(exchange)
            except Refused as refused:
                why = str(refused)
                self._hopeless.update({(n, its): why for n, its in pairs.twins.items() if is_weight(n)})
            else:
                return exchange
        self.refused[_name(one), _name(other)] = why
        return None

    def _add(self, swaps: Sequence[Swap]) -> Iterator[fx.Node]:
        """Keep the family of these exchanges of its first member; give the weights in it."""
        try:
            family = _family(swaps)
        except Refused as refused:
            log.debug("no family: %s", refused)
            return
        if all(_nested_or_apart(family, other) for other in self.families):
            self.families.append(family)
            for swap in swaps:
                for node in (*swap.twins, *swap.twins.values()):
                    self._levels[node] = self._levels.get(node, 0) + 1
                    yield node


def turned(swap: Swap, reflections: Sequence[Exchange], count: int) -> Iterator[Swap]:
    """The exchanges of the first of `count` modules with the third and further ones, that of the first two given.

    Raises Refused where the turn does not carry the first module through all others and back, or is not, from the first
    to the second, what the given exchange is.
    """
    first, second = reflections
    moved = [_all_moves(one) for one in reflections]
    if not swap.blocks.keys() <= moved[0].keys() & moved[1].keys():
        raise Refused("other parts of weights go along")
    twins = {node: node for node in swap.twins}
    blocks = {key: mine for key, (mine, _) in swap.blocks.items()}
    seen = set(twins)
    for number in range(1, count + 1):
        there = {n: first.twins.get(at, at) for n, at in twins.items()}
        twins = {n: second.twins.get(at, at) for n, at in there.items()}
        blocks = {key: moved[1][key][moved[0][key][at]] for key, at in blocks.items()}
        if number == count:
            came_back = all(n is at for n, at in twins.items())
            if not came_back or any(not np.array_equal(blocks[key], mine) for key, (mine, _) in swap.blocks.items()):
                raise Refused("the turn does not come back")
            return
        if not seen.isdisjoint(twins.values()):
            raise Refused("the turn comes back too early")
        seen.update(twins.values())
        if number == 1:
            same = all(at is swap.twins[n] for n, at in twins.items())
            if not same or any(not np.array_equal(blocks[key], its) for key, (_, its) in swap.blocks.items()):
                raise Refused("the turn is not what the exchange is")
            continue
        yield Swap(twins, {key: (mine, blocks[key]) for key, (mine, _) in swap.blocks.items()})


def _all_moves(exchange: Exchange) -> dict[tuple[str, int], IntArray]:
    """For dimensions of weights that are moved: where each index goes."""
    return {
        (name, dim): move.to
        for name, tensor in exchange.moved_weights
        for dim, move in exchange.moves.of(tensor).items()
    }


def _rows(first: fx.Node, others: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Weights in rows, each of those whose names differ from that of the first of them, or `first`, in one number.

    Those in a row with `first` come first.
    """
    words = _name(first).split(".")
    rows: dict[Hashable, list[fx.Node]] = {}
    for other in others:
        its = _name(other).split(".")
        differ = [i for i, (a, b) in enumerate(zip(words, its, strict=False)) if a != b]
        if len(its) != len(words) or not all(its[i].isdecimal() for i in differ):
            rows[other] = [other]
        else:
            rows.setdefault((differ[-1], *its[: differ[-1]], *its[differ[-1] + 1 :]), []).append(other)
    return list(rows.values())


def _levels(swaps: Sequence[Swap]) -> Iterator[list[Swap]]:
    """Exchanges in lists, one for each module that a weight is in, that carry it each to another such module."""
    by_first: dict[frozenset[fx.Node], dict[frozenset[fx.Node], Swap]] = {}
    for swap in swaps:
        by_first.setdefault(frozenset(swap.twins), {}).setdefault(frozenset(swap.twins.values()), swap)
    for first in sorted(by_first, key=len, reverse=True):
        yield list(by_first[first].values())


def _family(swaps: Sequence[Swap]) -> Family:
    """The family of exchanges of one member with each other one.

    Raises Refused where the parts that go with them do not fit together.
    """
    weights = sorted(swaps[0].twins, key=_name)
    members = [tuple(map(_name, weights)), *(tuple(_name(swap.twins[w]) for w in weights) for swap in swaps)]
    if len({name for member in members for name in member}) < sum(map(len, members)):
        raise Refused("two of the modules share a weight")
    blocks: dict[tuple[str, int], list[IntArray]] = {}
    for number, swap in enumerate(swaps):
        for (name, dim), (mine, its) in swap.blocks.items():
            known = blocks.setdefault((name, dim), [mine])
            if len(known) != number + 1 or not np.array_equal(known[0], mine):
                raise Refused(f"the part of {name} that goes with a module depends on which it changes places with")
            known.append(its)
    for (name, dim), parts in blocks.items():
        if len(parts) != len(members) or len(np.unique(np.concatenate(parts))) != sum(map(len, parts)):
            raise Refused(f"the parts of {name} along dimension {dim} overlap")
    order = list(range(len(members)))
    if blocks:
        first = next(iter(blocks.values()))
        order.sort(key=lambda i: int(first[i].min()))
    return Family(
        tuple(members[i] for i in order), {key: tuple(parts[i] for i in order) for key, parts in blocks.items()}
    )


def _moved_weights(exchange: Exchange) -> dict[tuple[str, int], tuple[IntArray, IntArray]]:
    """For dimensions of weights that are moved: the indices of the first module, and where each goes."""
    found = {}
    for name, tensor in exchange.moved_weights:
        for dim, move in exchange.moves.of(tensor).items():
            mine = np.flatnonzero(move.side == 1)
            found[name, dim] = (mine, move.to[mine])
    return found


def _nested_or_apart(one: Family, other: Family) -> bool:
    """Whether two families have no weight in common, or one lies within a single member of the other."""
    mine, its = ({name for member in family.members for name in member} for family in (one, other))
    if mine.isdisjoint(its):
        return True
    return any(mine <= set(member) for member in other.members) or any(its <= set(member) for member in one.members)


def _name(node: fx.Node) -> str:
    name: str = node.meta["names"][0]
    return name
