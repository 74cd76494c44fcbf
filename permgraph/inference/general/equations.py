"""What operators say of the unknowns, and what follows: matrices by union-find, scales and signs by elimination.

Each unknown says how the matrix of an atom acts at one leaf. Four readings of the same statements are kept.

- *Linear*: the whole matrix g of the atom acts as D g D⁻¹, or as the inverse transpose of that, or not at all. D is the
  diagonal matrix of a product of gains (norm weights that the axis has been multiplied with). Unknowns that act alike,
  or dually, are joined with the map between them (`Frames`); one that must not act makes its whole class inert.
- *Scales*: index j is multiplied by the product of powers of free positive factors. The logarithms obey linear
  equations with whole coefficients.
- *Signs*: the same with factors ±1, modulo two.
- *Flips*: one factor ±1 for all indices, modulo two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from permgraph.spec.general import Gain

Number = int | Fraction

Gains = tuple[tuple[Gain, int], ...]
"""A product of powers of gains: each with its exponent, by name, none of them zero."""

NO_GAINS: Gains = ()


def times(a: Gains, b: Gains, sign: int = 1) -> Gains:
    """The product of two products of gains, or with `sign` -1 their quotient."""
    powers = dict(a)
    for name, power in b:
        powers[name] = powers.get(name, 0) + sign * power
    return tuple(sorted((name, power) for name, power in powers.items() if power))


def power_of(gains: Gains, sign: int) -> Gains:
    """A product of gains, or with `sign` -1 its inverse."""
    return tuple((name, sign * power) for name, power in gains)


@dataclass(frozen=True)
class Acts:
    """How the matrix of an atom acts at a leaf: itself or its inverse transpose, between gains and their inverse.

    As a map it takes the action at one leaf to that at another.

    Args:
        sign: 1 for the matrix itself, -1 for its inverse transpose.
        gains: the gains before, with exponents, and their inverses after.
        order: how often the indices were put from the order of neighbours, where (2j, 2j + 1) is a pair, to that of
            halves, where (j, j + n/2) is one.
        lost: whether there are gains in more than one order, so that what acts has no name.
    """

    sign: int = 1
    gains: Gains = NO_GAINS
    order: int = 0
    lost: bool = False

    def after(self, first: Acts) -> Acts:
        """This map after another one."""
        gains = times(power_of(first.gains, self.sign), self.gains)
        lost = self.lost or first.lost or bool((self.order and first.gains) or (self.gains and first.order))
        return Acts(self.sign * first.sign, gains, self.order + first.order, lost)

    def inverse(self) -> Acts:
        """The map back."""
        return Acts(self.sign, power_of(self.gains, -self.sign), -self.order, self.lost)


SAME = Acts()
DUAL = Acts(-1)


class Frames:
    """Classes of unknowns that act alike, each with the map from its root; union-find."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}
        self._map: dict[int, Acts] = {}
        self.inert: dict[int, str] = {}  # the roots of classes that must not act, each with the reason
        self.self_dual: dict[int, str] = {}  # the roots of classes that act as their own dual
        self.plain: dict[int, Acts] = {}  # of roots, which map gives a leaf that must act without gains

    def find(self, x: int) -> tuple[int, Acts]:
        """The root of an unknown, and the map from it."""
        path = []
        while x in self._parent:
            path.append(x)
            x = self._parent[x]
        total = SAME
        for node in reversed(path):
            total = self._map[node].after(total)
            self._parent[node], self._map[node] = x, total
        return x, total

    def join(self, x: int, y: int, change: Acts, why: str) -> None:
        """Say that y acts as `change` of what x does."""
        a, to_x = self.find(x)
        b, to_y = self.find(y)
        from_a = change.after(to_x)  # from a's action to y's
        if a == b:
            self._cycle(a, to_y.inverse().after(from_a), why)
            return
        self._parent[b] = a
        self._map[b] = to_y.inverse().after(from_a)
        for reasons in (self.inert, self.self_dual):
            reason = reasons.pop(b, None)
            if reason is not None:
                reasons.setdefault(a, reason)
        plain = self.plain.pop(b, None)
        if plain is not None:
            self._make_plain(a, plain.after(self._map[b]), why)

    def stop(self, x: int, why: str) -> None:
        """Say that x must not act."""
        self.inert.setdefault(self.find(x)[0], why)

    def without_gains(self, x: int, why: str) -> None:
        """Say that x acts without gains."""
        root, to_x = self.find(x)
        self._make_plain(root, to_x, why)

    def _make_plain(self, root: int, to_x: Acts, why: str) -> None:
        known = self.plain.setdefault(root, to_x)
        if to_x.lost or known.lost or power_of(known.gains, known.sign) != power_of(to_x.gains, to_x.sign):
            self.inert.setdefault(root, f"{why}, where a gain is in the way")

    def _cycle(self, root: int, turn: Acts, why: str) -> None:
        """What a class says that acts as `turn` of itself."""
        if turn.order or turn.lost:
            self.inert.setdefault(root, f"{why}, where pairs stand in another order")
        elif turn.sign == 1 and turn.gains:
            self.inert.setdefault(root, f"{why}, where the gain {turn.gains[0][0]} is in the way")
        elif turn.sign == -1 and turn.gains:
            self.inert.setdefault(root, f"{why}, where the gain {turn.gains[0][0]} is on one side alone")
        elif turn.sign == -1:
            self.self_dual.setdefault(root, why)
            self._make_plain(root, SAME, why)

    def action(self, x: int) -> Acts | None:
        """How an unknown acts; None if it must not."""
        root, to_x = self.find(x)
        if root in self.inert:
            return None
        base = SAME
        if root in self.plain:
            plain = self.plain[root]
            base = Acts(1, power_of(plain.gains, -plain.sign))
        found = to_x.after(base)
        return None if found.lost else found


@dataclass
class System:
    """Homogeneous linear equations between unknowns, over the rational numbers or modulo two.

    Args:
        modulo_two: whether they are modulo two.
        kinds: what tells the kinds of unknowns apart, none of which meet in an equation: their atoms.
    """

    modulo_two: bool
    kinds: Sequence[object]
    rows: dict[object, list[dict[int, Number]]] = field(default_factory=lambda: defaultdict(list))
    _parent: dict[int, int] = field(default_factory=dict)
    _zero: dict[object, set[int]] = field(default_factory=lambda: defaultdict(set))

    def find(self, x: int) -> int:
        root = x
        while root in self._parent:
            root = self._parent[root]
        while x != root:
            self._parent[x], x = root, self._parent[x]
        return root

    def add(self, terms: Iterable[tuple[int, int | Fraction]]) -> None:
        """Say that this sum of unknowns with coefficients is zero."""
        row: dict[int, Number] = {}
        for x, c in terms:
            row[x] = row.get(x, 0) + c
        if self.modulo_two:
            row = {x: 1 for x, c in row.items() if c % 2}
        row = {x: c for x, c in row.items() if c}
        if len(row) == 1:
            (x,) = row
            self._zero[self.kinds[x]].add(x)
        elif len(row) == 2 and (self.modulo_two or sum(row.values()) == 0):
            a, b = (self.find(x) for x in row)
            if a != b:
                self._parent[b] = a
        elif row:
            self.rows[self.kinds[next(iter(row))]].append(row)

    def solutions(self, of: Sequence[int]) -> list[list[int]]:
        """A basis of the values that these unknowns of a kind may have, in whole numbers, in row echelon form."""
        if not of:
            return []
        zero = {self.find(x) for x in self._zero.get(self.kinds[of[0]], ())}
        pivots: dict[int, dict[int, Number]] = {}
        for given in self.rows.get(self.kinds[of[0]], ()):
            row: dict[int, Number] = defaultdict(int)
            for x, c in given.items():
                root = self.find(x)
                if root not in zero:
                    row[root] += c
            reduced = self._reduce(row, pivots)
            if reduced:
                self._insert(reduced, pivots)
        roots = [self.find(x) for x in of]
        free: dict[int, None] = {}
        for root in roots:
            for x in pivots.get(root, {root: 1}):
                if x not in zero and x not in pivots:
                    free.setdefault(x)

        def value(root: int, x: int) -> Number:
            if root in zero:
                return 0
            if root in pivots:
                return self._tidy(-pivots[root].get(x, 0))
            return int(root == x)

        columns = [[value(root, x) for root in roots] for x in free]
        return [_whole(row) for row in _echelon(columns, self.modulo_two)]

    def _reduce(self, row: Mapping[int, Number], pivots: Mapping[int, Mapping[int, Number]]) -> dict[int, Number]:
        found = {x: c for x, c in row.items() if self._tidy(c)}
        for x in [x for x in found if x in pivots]:
            c = found.get(x, 0)
            for y, d in pivots[x].items():
                found[y] = found.get(y, 0) - c * d
        return {x: self._tidy(c) for x, c in found.items() if self._tidy(c)}

    def _insert(self, row: dict[int, Number], pivots: dict[int, dict[int, Number]]) -> None:
        pivot = next(iter(row))
        row = {x: self._tidy(_over(c, row[pivot])) for x, c in row.items()}
        for x, other in pivots.items():
            c = other.get(pivot, 0)
            if c:
                for y, d in row.items():
                    other[y] = self._tidy(other.get(y, 0) - c * d)
                pivots[x] = {y: d for y, d in other.items() if d}
        pivots[pivot] = row

    def _tidy(self, c: Number) -> Number:
        return int(c) % 2 if self.modulo_two else c


def _over(a: Number, b: Number) -> Number:
    """A quotient, as a whole number if it is one: these are many, and fractions are slow."""
    if b in (1, -1):
        return a * b
    found = Fraction(a) / b
    return found.numerator if found.denominator == 1 else found


def beyond(rows: Sequence[Sequence[int]], known: Sequence[Sequence[int]]) -> list[list[int]]:
    """Of vectors modulo two, so many that together with the known ones they span what all span."""
    found: list[list[int]] = []
    rank = len(known)
    for row in rows:
        together: list[list[Number]] = [list(r) for r in (*known, *found, row)]
        if len(_echelon(together, True)) > rank:
            rank += 1
            found.append(list(row))
    return found


def independent(row: Sequence[int], known: Sequence[Sequence[int]], modulo_two: bool) -> bool:
    """Whether a vector is no combination of the known ones."""
    rows: list[list[Number]] = [[c % 2 if modulo_two else c for c in r] for r in (*known, row)]
    return len(_echelon(rows, modulo_two)) > len(_echelon(rows[:-1], modulo_two))


def _echelon(rows: list[list[Number]], modulo_two: bool) -> list[list[Number]]:
    """The reduced row echelon form, without rows of zeros."""
    rows = [list(row) for row in rows]
    done = 0
    for column in range(len(rows[0]) if rows else 0):
        at = next((i for i in range(done, len(rows)) if rows[i][column]), None)
        if at is None:
            continue
        rows[done], rows[at] = rows[at], rows[done]
        first = rows[done][column]
        rows[done] = [_over(c, first) for c in rows[done]]
        for i, row in enumerate(rows):
            if i != done and row[column]:
                c = row[column]
                rows[i] = [x - c * y for x, y in zip(row, rows[done], strict=True)]
                if modulo_two:
                    rows[i] = [int(x) % 2 for x in rows[i]]
        done += 1
    return rows[:done]


def _whole(row: Sequence[Number]) -> list[int]:
    """The smallest multiple in whole numbers."""
    denominator = 1
    for c in row:
        denominator *= c.denominator // _gcd(denominator, c.denominator)
    return [int(c * denominator) for c in row]


def _gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a
