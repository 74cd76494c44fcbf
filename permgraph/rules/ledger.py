"""What the rules said, kept for the questions that come after: what may depend on what, and why an axis is as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from permgraph.algebra import Axis
from permgraph.rules.typed_tensor import TypedTensor


@dataclass(frozen=True)
class Labelled:
    """A tensor in a link (None: one inside the operator): the axis of each label, and the dimension it stands in."""

    tensor: TypedTensor | None
    axes: Mapping[str, Axis]
    where: Mapping[str, int]


@dataclass(frozen=True)
class Relation:
    """What one link said of each of its tensors, those inside the operator included."""

    node: int
    tensors: tuple[Labelled, ...]


@dataclass(frozen=True)
class Rearrangement:
    """A call which moved whole axes about (view, slice, concatenation): its tensors hold the same atoms.

    Args:
        node: the number of the call.
        tensors: the sources, then the result.
        how: which elements went where: ``("view",)``, the same in row-major order; ``("take", dim, start, keep)``, a
            range of one dimension, which goes where not `keep`; ``("every", dim, start, step)``;
            ``("join", dim)``, one after the other; ``("pad", margins)``, with others before and after.
    """

    node: int
    tensors: tuple[TypedTensor, ...]
    how: tuple[Any, ...]


@dataclass
class Ledger:
    """Everything that the rules said, in the order in which they said it."""

    relations: list[Relation] = field(default_factory=list)
    rearrangements: list[Rearrangement] = field(default_factory=list)
    ties: list[tuple[TypedTensor, int, TypedTensor, int, int]] = field(default_factory=list)  # slot, slot, node
    pins: list[tuple[TypedTensor, int, str, int]] = field(default_factory=list)  # slot, reason, node
    unknown: list[int] = field(default_factory=list)
    # Two dimensions of one axis, which no link ties: slot, slot, node.
    unified: list[tuple[TypedTensor, int, TypedTensor, int, int]] = field(default_factory=list)
    taken: list[TypedTensor] = field(default_factory=list)  # of which a part was taken
    searched: list[tuple[TypedTensor, tuple[int, ...], int]] = field(default_factory=list)  # tensor, dims, node
    # What was searched for its largest elements, in any order, and these; dimension, node.
    unsorted: list[tuple[TypedTensor, TypedTensor, int, int]] = field(default_factory=list)

    def clear(self) -> None:
        for entries in vars(self).values():
            entries.clear()

    @classmethod
    def joined(cls, ledgers: Iterable[Ledger]) -> Ledger:
        """All that several ledgers hold, in one."""
        whole = cls()
        for ledger in ledgers:
            for name, entries in vars(ledger).items():
                vars(whole)[name].extend(entries)
        return whole
