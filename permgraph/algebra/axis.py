"""Nodes of the type graph, and what goes along with them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from permgraph.errors import ConflictError


class TooIntricateError(ConflictError):
    """Types would be nested, or refinements need one another, beyond a limit: a padded matrix was skewed too often.

    The limits are counted here rather than left to Python's own, which is met the sooner the deeper the caller's stack.
    """


class Kind(Enum):
    """The four forms that an axis can take."""

    ATOM = "atom"
    PRODUCT = "product"
    SUM = "sum"
    FAMILY = "family"

    __hash__ = object.__hash__  # an Enum's own hash runs Python code, and types are looked up by their form


class Index:
    """Identity of a sum's list of parts, by which families refer to it; merged by union-find, into the older one."""

    __slots__ = ("age", "link")
    _ages = itertools.count()

    def __init__(self) -> None:
        self.age = next(Index._ages)
        self.link: Index | None = None

    def find(self) -> Index:
        root = self
        while root.link is not None:
            root = root.link
        return root


@dataclass(frozen=True)
class Pinned:
    """Why an axis must stay put, and the number of the graph node whose rule said so (-1: none)."""

    reason: str
    node: int = -1


class Axis:
    """A node of the type graph. Read it through `Axes.resolve`, never directly: it may have been bound since."""

    __slots__ = ("children", "index", "kind", "link", "nesting", "pinned", "size", "stamp")

    def __init__(
        self,
        kind: Kind,
        size: int,
        children: tuple[Axis, ...] = (),
        index: Index | None = None,
        pinned: Pinned | None = None,
    ) -> None:
        self.kind = kind
        self.size = size
        self.children = children
        self.index = index
        self.nesting: int = 1 + max([child.nesting for child in children]) if children else 0
        self.pinned = pinned
        self.link: Axis | None = None
        self.stamp = -1

    def find(self) -> Axis:
        root = self
        while root.link is not None:
            root = root.link
        while self.link is not None and self.link is not root:
            self.link, self = root, self.link
        return root

    def __repr__(self) -> str:
        return show(self)


# What selecting part of one axis does to the other axes of the same tensor: families over an index become the member
# of that part (an int), or families over a shorter sum (its index, and the parts that are left).
Restriction = Mapping[Index, "int | tuple[Index, tuple[int, ...]]"]
FactorKey = tuple[object, ...]
"""The name of a factor that a split made, or of a dimension of a parameter: the same in each run over a graph."""


def show(axis: Axis) -> str:
    """A short text of a type, for error messages and debugging: atoms as ``a3`` or ``.3`` (pinned) by size."""
    axis = axis.find()
    inner = [show(child) for child in axis.children]
    if axis.kind is Kind.ATOM:
        return f"{'.' if axis.pinned else 'a'}{axis.size}"
    if axis.kind is Kind.PRODUCT:
        return f"({' '.join(inner)})"
    if axis.kind is Kind.SUM:
        return f"[{' + '.join(inner)}]"
    return f"{{{' | '.join(inner)}}}"
