"""B where an ascent has brought it, and Gram matrices of rotations that hold from step to step.

A step of a rotated stream concerns all that reads or writes it, and most of that nobody looks at before the next step:
what it is worth is known from its Gram matrix, which turns along. So a parameter is moved when it is read, by all that
has happened since in one product; and the Gram matrix of a rotation is kept, in a share for each set of groups that
stands across from it, until one of these moves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from permgraph.matching.general.acting import Acting, Element

Across = frozenset[str]
"""The groups on the other axes of a block."""


class Step(NamedTuple):
    """What has moved: one group, or any if None, by an element with the inverse transposes of its matrices."""

    group: str | None
    element: Element
    inverses: Mapping[str, Tensor]

    def then(self, other: Step) -> Step | None:
        """This step and one after it as one, where both turn the same group alone."""
        group = self.group
        if group is None or group != other.group:
            return None
        if any(kind for step in (self, other) for kind in (step.element.arrays, step.element.signs)):
            return None
        matrix = other.element.matrices[group] @ self.element.matrices[group]
        return turn(group, matrix)


def turn(group: str, matrix: Tensor) -> Step:
    """One group turning by orthogonal matrices."""
    return Step(group, Element(matrices={group: matrix}), {group: matrix})


class Standing(Mapping[str, Tensor]):
    """Parameters where the steps so far have brought them; each is moved when it is read.

    Args:
        acting: how groups act on the parameters.
        tensors: the parameters at the beginning; they are not changed.
    """

    def __init__(self, acting: Acting, tensors: Mapping[str, Tensor]) -> None:
        self._acting, self._tensors = acting, dict(tensors)
        self._ahead: dict[str, tuple[Step, ...]] = {}

    def __getitem__(self, name: str) -> Tensor:
        for _, element, inverses in self._ahead.pop(name, ()):
            self._tensors[name] = self._acting.act(name, self._tensors[name], element, inverses)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def move(self, step: Step) -> None:
        """Let a step concern all parameters in which its groups stand."""
        joined: dict[int, Step | None] = {}
        for name in self._acting.touched([step.group] if step.group else step.element.groups()):
            before = self._ahead.get(name, ())
            one = None
            if before:
                if id(before[-1]) not in joined:
                    joined[id(before[-1])] = before[-1].then(step)
                one = joined[id(before[-1])]
            self._ahead[name] = (*before, step) if one is None else (*before[:-1], one)

    def copy(self) -> Standing:
        """The same, to be moved on its own."""
        new = Standing(self._acting, self._tensors)
        new._ahead = dict(self._ahead)
        return new


class KeptGrams:
    """Gram matrices of rotations, in shares by the groups across, which hold until one of these moves.

    A rotation's own steps turn its shares, all of those that are equally old by the same matrix: it is applied to their
    sum, when that is asked for.
    """

    def __init__(self) -> None:
        self._shares: dict[str, dict[Across, tuple[int, Tensor]]] = {}
        self._turns: dict[str, dict[int, Tensor]] = {}
        self._steps = 0

    def copy(self) -> KeptGrams:
        """The same, to go on on its own."""
        new = KeptGrams()
        new._shares = {group: dict(shares) for group, shares in self._shares.items()}
        new._turns = {group: dict(turns) for group, turns in self._turns.items()}
        new._steps = self._steps
        return new

    def has(self, group: str, across: Across) -> bool:
        """Whether this share of a group's Gram matrix holds."""
        return across in self._shares.get(group, ())

    def shares(self) -> Iterator[tuple[str, Across, Tensor]]:
        """All shares that hold."""
        for group, shares in self._shares.items():
            for across in shares:
                gram = self.sum(group, [across])
                assert gram is not None
                yield group, across, gram

    def keep(self, group: str, across: Across, gram: Tensor) -> None:
        """Keep a share as it is now."""
        self._shares.setdefault(group, {})[across] = self._steps, gram

    def sum(self, group: str, wanted: Collection[Across]) -> Tensor | None:
        """The sum of some shares, a new tensor; None if there are none."""
        by_age: dict[int, Tensor] = {}
        for across in wanted:
            age, gram = self._shares[group][across]
            by_age[age] = by_age[age].add_(gram) if age in by_age else gram.clone()
        total = None
        for age, gram in by_age.items():
            matrix = self._turns.get(group, {}).get(age)
            turned = gram if matrix is None else torch.matmul(gram, matrix.mT)
            total = turned if total is None else total.add_(turned)
        return total

    def move(self, step: Step) -> None:
        """Let a step turn its own group's shares, and drop those across from which it stands."""
        assert step.group is not None
        for shares in self._shares.values():
            for across in [across for across in shares if step.group in across]:
                del shares[across]
        own = self._shares.get(step.group)
        if not own:
            return
        matrix, turns = step.element.matrices[step.group], self._turns.setdefault(step.group, {})
        ages = {age for age, _ in own.values()}
        self._turns[step.group] = {age: matrix @ turns[age] if age in turns else matrix for age in ages}
        self._steps += 1
