"""The words in which operators speak of structure: what is the same, what is dual, what stays; and what was said."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from torch import fx

from permgraph.algebra import Axis
from permgraph.inference.general.equations import DUAL, SAME, Acts, Frames, System
from permgraph.inference.general.leaves import Leaves
from permgraph.spec.general import Gain

ORTHOGONAL, CENTRED = "O", "O1"


class Statements:
    """All that the operators of a graph say of its unknowns.

    Attributes:
        frames, scales, signs, flips: the four readings, see `permgraph.inference.general.equations`.
        at_most: for an atom the structures within which its matrices must lie, and the unknowns where, with reasons.
        plain: the atoms that keep permutations alone, each with the reason.
        why_not: for an atom the first operators that kept something from it, by what it kept.
        absorbed: the gains that a class has been multiplied with: parameters that do not move with the axis; each with
            the operators that multiply, and the unknowns of their results.
    """

    def __init__(self, leaves: Leaves) -> None:
        self.leaves = leaves
        self.frames = Frames()
        self.scales = System(modulo_two=False, kinds=leaves.atoms)
        self.signs = System(modulo_two=True, kinds=leaves.atoms)
        self.flips = System(modulo_two=True, kinds=leaves.atoms)
        self.at_most: dict[Axis, dict[tuple[str, int], str]] = {}
        self.plain: dict[Axis, str] = {}
        self.absorbed: dict[Gain, dict[fx.Node, list[int]]] = {}

    def keep_plain(self, atoms: Iterable[Axis], why: str) -> None:
        """Say that nothing but permutations acts on these atoms."""
        for atom in atoms:
            self.plain.setdefault(atom, why)

    def absorb(self, gain: Gain, node: fx.Node, out: int) -> None:
        """Say that this operator multiplies with a gain, and its result has it at this unknown."""
        self.absorbed.setdefault(gain, {}).setdefault(node, []).append(out)

    # -- all readings at once ------------------------------------------------------------------------------------------

    def same(self, x: int, y: int, why: str) -> None:
        """What acts at x acts at y."""
        if x != y:
            self.frames.join(x, y, SAME, why)
            for system in (self.scales, self.signs, self.flips):
                system.add([(x, 1), (y, -1)])

    def dual(self, x: int, y: int, why: str) -> None:
        """At y acts the inverse transpose of what acts at x, so that sums of products stay."""
        self.frames.join(x, y, DUAL, why)
        self.scales.add([(x, 1), (y, 1)])
        for system in (self.signs, self.flips):
            system.add([(x, 1), (y, 1)])

    def still(self, unknowns: Iterable[int], why: str) -> None:
        """Only permutations act."""
        for x in unknowns:
            self.frames.stop(x, why)
            for system in (self.scales, self.signs, self.flips):
                system.add([(x, 1)])

    # -- one at a time -------------------------------------------------------------------------------------------------

    def no_matrix(self, unknowns: Iterable[int], why: str) -> None:
        """No matrix but monomial ones acts."""
        for x in unknowns:
            self.frames.stop(x, why)

    def matrix(self, x: int, y: int, change: Acts, why: str) -> None:
        """At y acts the matrix at x, changed so; scales and signs are another matter."""
        self.frames.join(x, y, change, why)

    def within(self, x: int, structure: str, why: str) -> None:
        """The matrix at x lies within a structure, and is not between gains."""
        self.at_most.setdefault(self.leaves.atoms[x], {}).setdefault((structure, x), why)
        self.frames.without_gains(x, why)

    def factors(
        self, terms: Iterable[tuple[int, int | Fraction]], *, signs: Iterable[int] | None = None, flips: bool = True
    ) -> None:
        """The product of these powers of the scales is one, and so is that of the signs of `signs` (of all of them)."""
        terms = list(terms)
        self.scales.add(terms)
        odd = [(x, 1) for x in ([x for x, _ in terms] if signs is None else signs)]
        self.signs.add(odd)
        if flips:
            self.flips.add(odd)
