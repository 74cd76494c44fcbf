"""From two parameters that are to change places: which nodes change places with them, and which indices."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from permgraph.inference.modules.colours import Colours
from permgraph.inference.modules.moves import Move, Moves, Refused
from permgraph.inference.modules.reading import JOINS, Dataflow, Term, whole
from permgraph.inference.operators import arguments_of
from permgraph.inference.solution import is_weight
from permgraph.rules.typed_tensor import VALUE, TypedTensor

Places = dict[fx.Node, list[tuple[int, int]]]

TermsByNode = dict[tuple[Hashable, int, fx.Node], list[Term]]


@dataclass(frozen=True, eq=False)
class Exchange:
    """Two modules that change places, or several pairs of modules at once.

    Args:
        twins: for each node of either module the one of the other; its own inverse.
        first: the nodes of the first module, or of the first one of each pair.
        fixed: the nodes that these touch, and that stay.
        moves: the indices that change places with them.
        moved_weights: the weights of neither module along whose dimensions there are such indices.
    """

    twins: dict[fx.Node, fx.Node]
    first: frozenset[fx.Node]
    fixed: frozenset[fx.Node]
    moves: Moves
    moved_weights: tuple[tuple[str, TypedTensor], ...]


class Exchanger:
    """Follows an exchange of two parameters through a graph."""

    def __init__(self, flow: Dataflow, colours: Colours) -> None:
        self._flow = flow
        self._colours = colours.of
        self._joins = [node for node in flow.nodes if flow.name(node) in JOINS]
        self._weights: dict[int, list[tuple[fx.Node, TypedTensor]]] = {}
        for node in filter(is_weight, flow.nodes):
            if (tensor := flow.tensor(node)) is not None:
                self._weights.setdefault(id(whole(tensor)), []).append((node, tensor))
        self._parts_of: dict[fx.Node, tuple[int, Places]] = {}
        self._terms: dict[fx.Node, TermsByNode] = {}

    def pairs(self, seeds: Sequence[tuple[fx.Node, fx.Node]]) -> Pairs:
        """Parameters that are to change places, of one colour, none in two pairs; and soon what has to with them."""
        pairs = Pairs(self._flow, self._colours, self._terms)
        for one, other in seeds:
            pairs.add(one, other)
        return pairs

    def followed(self, pairs: Pairs) -> Exchange:
        """The exchange that carries the one parameter of each pair to the other; `pairs` grows.

        Raises Refused where there is none that can be followed.
        """
        moves = self._followed(pairs)
        moved = [weight for at in moves.tensors for weight in self._weights.get(at, ())]
        for node, _ in moved:
            if node in pairs.twins:
                raise Refused(f"{node.meta['names'][0]} changes places, and numbers the modules besides")
        named = tuple((node.meta["names"][0], tensor) for node, tensor in moved)
        return Exchange(pairs.twins, frozenset(pairs.first), frozenset(pairs.fixed), moves, named)

    def _followed(self, pairs: Pairs) -> Moves:
        """The moves that go with nodes that change places, and further nodes that have to with these moves."""
        while True:
            pairs.follow()
            moves = self._moves(pairs)
            known = len(pairs.twins)
            for node in self._joins:
                if node not in pairs.twins:
                    self._pair_parts(node, pairs, moves)
            if len(pairs.twins) == known:
                return moves

    def _moves(self, pairs: Pairs) -> Moves:
        tensors = {
            id(mine): its
            for node, twin in pairs.twins.items()
            if (mine := self._flow.tensor(node)) is not None and (its := self._flow.tensor(twin)) is not None
        }
        moves = Moves(self._flow, tensors)
        for node in pairs.first:
            self._demand(node, pairs.twins[node], moves)
        for node in pairs.fixed:
            if self._flow.name(node) in JOINS:
                self._demand_of_join(node, pairs, moves)
        moves.carry()
        return moves

    def _pair_parts(self, node: fx.Node, pairs: Pairs, moves: Moves) -> None:
        """Where places of a whole change places, the parts do that are put there."""
        joined = self._flow.tensor(node)
        if joined is None or not moves.of(joined):
            return
        dim, places = self._places_of_parts(node)
        move = moves.of(joined).get(dim)
        if move is None:
            return
        at = {place: part for part, found in places.items() for place in found}
        for (start, end), part in at.items():
            if (move.side[start:end] == 1).all() and end > start:
                goes = int(move.to[start])
                other = at.get((goes, goes + end - start))
                if other is not None:
                    pairs.add(part, other)

    def _demand(self, node: fx.Node, twin: fx.Node, moves: Moves) -> None:
        """Where the twins take different parts of one tensor, these change places."""
        mine, its = self._flow.readings[node], self._flow.readings[twin]
        if mine.places == its.places:
            return
        (source,), (other,) = mine.terms[0].nodes, its.terms[0].nodes
        if source is not other:
            raise Refused(f"{node.target} takes other parts of tensors that change places")
        tensor = self._source(source, mine.places)
        if len(mine.places) == 1:
            if tensor.value is None:
                raise Refused(f"{node.target} compares with different numbers")
            a, b = mine.places[0], its.places[0]
            if not (0 <= a < tensor.value.size and 0 <= b < tensor.value.size):
                raise Refused(f"{node.target} compares with a number that the values do not have")
            moves.add(tensor, VALUE, Move.exchange(tensor.value.size, (a, a + 1), (b, b + 1)))
            return
        (dim, *first), (_, *second) = mine.places, its.places
        moves.add(tensor, dim, Move.exchange(tensor.shape[dim], (first[0], first[1]), (second[0], second[1])))

    def _source(self, source: fx.Node, places: Sequence[int]) -> TypedTensor:
        tensor = self._flow.tensor(source)
        if tensor is None and self._flow.readings[source].terms:  # the operator that cuts into a list
            tensor = self._flow.tensor(self._flow.readings[source].terms[0].nodes[0])
        if tensor is None:
            raise Refused(f"the parts {places} are of no tensor")
        return tensor

    def _demand_of_join(self, node: fx.Node, pairs: Pairs, moves: Moves) -> None:
        """Where parts that are put together change places, their places in the whole do."""
        joined = self._flow.tensor(node)
        assert joined is not None
        dim, places = self._places_of_parts(node)
        for part in [part for part in node.all_input_nodes if part in pairs.first]:
            twin = pairs.twins[part]
            if len(places[twin]) != len(places[part]):
                raise Refused(f"{node.target} puts together unlike numbers of two modules")
            for mine, its in zip(places[part], places[twin], strict=True):
                moves.add(joined, dim, Move.exchange(joined.shape[dim], mine, its))

    def _places_of_parts(self, node: fx.Node) -> tuple[int, Places]:
        """Of parts that are put together: along which dimension, and for each where it begins and ends."""
        known = self._parts_of.get(node)
        if known is None:
            known = self._parts_of[node] = self._found_places_of_parts(node)
        return known

    def _found_places_of_parts(self, node: fx.Node) -> tuple[int, Places]:
        given = arguments_of(node)
        ndim = node.meta["val"].ndim
        dim = (given.get("dim") or 0) % ndim
        end, places = 0, defaultdict[fx.Node, list[tuple[int, int]]](list)
        for part in given["tensors"]:
            if not isinstance(part, fx.Node):
                continue
            val = part.meta["val"]
            size = 1 if self._flow.name(node) == "stack" else val.shape[dim] if val.ndim == ndim else 0
            places[part].append((end, end + size))
            end += size
        return dim, places


class Pairs:
    """Nodes that change places, found from one pair along operands and users."""

    def __init__(self, flow: Dataflow, colours: Mapping[fx.Node, int], terms: dict[fx.Node, TermsByNode]) -> None:
        """`terms` keeps what was found of the terms of sums."""
        self._flow = flow
        self._colours = colours
        self._terms = terms
        self.twins: dict[fx.Node, fx.Node] = {}
        self.first: dict[fx.Node, None] = {}
        self.fixed: dict[fx.Node, None] = {}
        self._queue: deque[tuple[fx.Node, fx.Node]] = deque()

    def add(self, one: fx.Node, other: fx.Node) -> None:
        """Say that a node of the first module goes to one of the second; or stays, if it is in neither."""
        if one is other:
            if one in self.twins:
                raise Refused(f"{one} would have to stay, and to change places")
            self.fixed[one] = None
            return
        if one in self.twins or other in self.twins:
            if self.twins.get(one) is not other:
                raise Refused(f"{one} would have to change places with two nodes")
            return
        if one in self.fixed or other in self.fixed:
            raise Refused(f"{one} would have to change places, and to stay")
        if self._colours[one] != self._colours[other]:
            raise Refused(f"{one} and {other} do not stand in like places")
        self.twins[one], self.twins[other] = other, one
        self.first[one] = None
        self._queue.append((one, other))

    def follow(self) -> None:
        """Find all that has to change places with what does."""
        while self._queue or self._follow_terms():
            one, other = self._queue.popleft()
            mine, its = self._flow.readings[one], self._flow.readings[other]
            if mine.key != its.key or len(mine.terms) != len(its.terms):
                raise Refused(f"{one} and {other} compute different things")
            for a, b in (
                self._matched(mine.terms, its.terms)
                if not self._in_order(one)
                else zip(mine.terms, its.terms, strict=True)
            ):
                if a.key != b.key or len(a.nodes) != len(b.nodes):
                    raise Refused(f"{one} and {other} compute different things")
                for node, twin in zip(a.nodes, b.nodes, strict=True):
                    self.add(node, twin)
            self._follow_users(one, other)

    def _follow_terms(self) -> bool:
        """Where a term of a sum that stays becomes another by one of its nodes, so do its others.

        Gives whether any was new.
        """
        for node in list(self.fixed):
            reading = self._flow.readings[node]
            if self._in_order(node):
                continue
            for term in reading.terms:
                if len(term.nodes) > 1:
                    known = [(slot, self.twins[n]) for slot, n in enumerate(term.nodes) if n in self.first]
                    if known:
                        self._follow_term(term, known, self._terms_of(node))
        return bool(self._queue)

    def _terms_of(self, node: fx.Node) -> TermsByNode:
        """The terms of a sum, by their keys and each of their nodes."""
        found = self._terms.get(node)
        if found is None:
            found = self._terms[node] = defaultdict(list)
            for term in self._flow.readings[node].terms:
                for slot, operand in enumerate(term.nodes):
                    found[term.key, slot, operand].append(term)
        return found

    def _follow_term(self, term: Term, known: Sequence[tuple[int, fx.Node]], terms: TermsByNode) -> None:
        slot, twin = known[0]
        for other in terms.get((term.key, slot, twin), ()):
            if all(other.nodes[slot] is twin for slot, twin in known):
                for mine, its in zip(term.nodes, other.nodes, strict=True):
                    self.add(mine, its)
                return

    def _in_order(self, node: fx.Node) -> bool:
        return self._flow.readings[node].ordered or self._flow.name(node) in JOINS

    def _matched(self, mine: Sequence[Term], its: Sequence[Term]) -> list[tuple[Term, Term]]:
        """The terms of two sums in pairs: those that are known to be twins, shared ones, then those that look alike."""
        left = list(its)
        found: list[tuple[Term, Term]] = []
        for certain in (True, False):
            for term in mine if certain else [t for t in mine if not any(t is a for a, _ in found)]:
                options = [o for o in left if o.key == term.key and len(o.nodes) == len(term.nodes)]
                if certain:
                    options = [o for o in options if o.nodes and self._known(term, o)]
                else:
                    options = [o for o in options if self._look(o) == self._look(term)]
                if options:
                    left = [o for o in left if o is not options[0]]
                    found.append((term, options[0]))
                elif not certain:
                    raise Refused("two sums have unlike terms")
        return found

    def _known(self, term: Term, other: Term) -> bool:
        """Whether two terms are one, or have a node whose twin is known and none that contradicts it."""
        pairs = list(zip(term.nodes, other.nodes, strict=True))
        if all(a is b and a not in self.twins for a, b in pairs):
            return True
        return any(self.twins.get(a) is b for a, b in pairs)

    def _look(self, term: Term) -> Hashable:
        return tuple(self._colours[node] for node in term.nodes)

    def _follow_users(self, one: fx.Node, other: fx.Node) -> None:
        """Pair the users of two twins; a user of both stays."""
        mine, its = defaultdict[Hashable, list[fx.Node]](list), defaultdict[Hashable, list[fx.Node]](list)
        for node, found in ((one, mine), (other, its)):
            for user, key in self._flow.users[node]:
                found[key, self._colours[user]].append(user)
        if mine.keys() != its.keys():
            raise Refused(f"what becomes of {one} and of {other} differs")
        for key, users in mine.items():
            others = list(its[key])
            if len(users) != len(others):
                raise Refused(f"what becomes of {one} and of {other} differs")
            rest = []
            for user in users:
                twin = user if user in others and user not in self.twins else self.twins.get(user)
                if twin is not None and twin in others:
                    others.remove(twin)
                    self.add(user, twin)
                else:
                    rest.append(user)
            for user, twin in zip(rest, others, strict=True):
                self.add(user, twin)
