"""`Structure`: the group that acts on an axis, with permutations and all."""

from __future__ import annotations

import re
from dataclasses import dataclass

from permgraph.errors import SpecError
from permgraph.structures.lattice import dimension

PAIRED = ("T", "T2", "R", "R2")
LINEAR = ("GL", "O", "O1", *PAIRED)
_TERM = re.compile(r"(GL|O1|O|T2|T|R2|R|S±|[SPBM])(?:\^(\d+))?")


@dataclass(frozen=True)
class Structure:
    """A matrix group on an axis of n indices.

    It is one of `GL`, `O` and `O1`, or permutations with factors for each index. One permutation may go with several
    factors, each on other tensors: the gate and the values of a gated unit are permuted alike and scaled apart. All of
    these hold every permutation. `T` and `T2`, a complex factor for each pair of indices, and `R` and `R2`, a real
    one, hold none but the identity.

    Args:
        linear: ``"GL"``, ``"O"``, ``"O1"``, ``"T"``, ``"T2"``, ``"R"``, ``"R2"``, or empty.
        scales: how many independent positive factors each index has.
        signs: how many independent signs each index has.
        flips: how many further signs all indices have in common.

    >>> str(Structure.parse("M×P")), Structure.parse("M×P").dimension(5)
    ('M×P', 10)
    """

    linear: str = ""
    scales: int = 0
    signs: int = 0
    flips: int = 0

    def __post_init__(self) -> None:
        if self.linear not in ("", *LINEAR) or (self.linear and (self.scales or self.signs or self.flips)):
            raise SpecError(f"{self.linear!r} with factors is no structure: it is one of {', '.join(LINEAR)}, alone")

    @property
    def is_plain(self) -> bool:
        """Whether it is that of permutations, and of nothing else."""
        return self == Structure()

    @property
    def is_paired(self) -> bool:
        """Whether it acts on pairs of indices, and permutes none."""
        return self.linear in PAIRED

    def dimension(self, size: int) -> int:
        """The dimension of its continuous part on an axis of this size."""
        return dimension(self.linear, size) if self.linear else self.scales * size

    def __str__(self) -> str:
        if self.linear:
            return self.linear
        both = min(self.scales, self.signs)
        counts = {"M": both, "P": self.scales - both, "B": self.signs - both, "S±": self.flips}
        return "×".join(name + (f"^{n}" if n > 1 else "") for name, n in counts.items() if n) or "S"

    @classmethod
    def parse(cls, text: str) -> Structure:
        """Read what `str` wrote.

        Raises SpecError if it is none.
        """
        counts: dict[str, int] = {}
        for word in text.split("×"):
            found = _TERM.fullmatch(word)
            if found is None:
                raise SpecError(
                    f"{text!r} is no structure: write {', '.join(LINEAR)}, or S, S±, B, P, M and products such as M×P"
                )
            counts[found[1]] = counts.get(found[1], 0) + int(found[2] or 1)
        linear = [name for name in LINEAR if name in counts]
        if linear:
            if len(counts) > 1 or counts[linear[0]] > 1:
                raise SpecError(f"{text!r} is no structure: {linear[0]} stands alone")
            return cls(linear[0])
        m = counts.get("M", 0)
        return cls("", m + counts.get("P", 0), m + counts.get("B", 0), counts.get("S±", 0))
