"""An independent, element by element, reading of the convention: slow, and simple enough to be believed."""

from __future__ import annotations

import itertools
import math

import torch

from permgraph.spec.expressions import Family, Fixed, Label, Product, Ref, Sum, size_of
from permgraph.spec.permutation import Permutation


def brute_force(p: Permutation, axes, tensor: torch.Tensor) -> torch.Tensor:
    """``p.apply_axes(axes, tensor)``, one element at a time."""
    groups = p.spec.groups
    layout = p.spec.layout(axes)
    parents = {(o.dim, o.path): o.parents for o in layout.occurrences}

    def take_apart(new: tuple[int, ...]) -> dict:
        """The new coordinate of every node that is there."""
        found: dict = {}

        def visit(axis, dim, path, coordinate):
            found[dim, path] = coordinate
            if isinstance(axis, Product):
                sizes = [size_of(factor, groups) for factor in axis.factors]
                for step in reversed(range(len(sizes))):
                    visit(axis.factors[step], dim, (*path, step), coordinate % sizes[step])
                    coordinate //= sizes[step]
            elif isinstance(axis, Sum):
                for step, part in enumerate(axis.parts):
                    size = size_of(part, groups)
                    if 0 <= coordinate < size:
                        visit(part, dim, (*path, step), coordinate)
                    coordinate -= size
            elif isinstance(axis, Label):
                visit(axis.expr, dim, (*path, 0), coordinate)
            elif isinstance(axis, Family):
                for step, member in enumerate(axis.members):
                    visit(member, dim, (*path, step), coordinate)

        for dim, axis in enumerate(axes):
            visit(axis, dim, (), new[dim])
        return found

    def put_together(axis, dim, path, new: dict) -> int:
        if isinstance(axis, Fixed):
            return new[dim, path]
        if isinstance(axis, Ref):
            array = p.arrays.get(axis.group)
            if array is None:
                return new[dim, path]
            at = [new[o.dim, o.path] for o in parents[dim, path]]
            return int(array[(*at, new[dim, path])])
        if isinstance(axis, Product):
            old = 0
            for step, factor in enumerate(axis.factors):
                old = old * size_of(factor, groups) + put_together(factor, dim, (*path, step), new)
            return old
        if isinstance(axis, Sum):
            start = 0
            for step, part in enumerate(axis.parts):
                if (dim, (*path, step)) in new:
                    return start + put_together(part, dim, (*path, step), new)
                start += size_of(part, groups)
        if isinstance(axis, Label):
            return put_together(axis.expr, dim, (*path, 0), new)
        assert isinstance(axis, Family)
        at, labelled = layout.families[dim, path]
        (step,) = (step for step in range(len(axis.members)) if (at, (*labelled, step)) in new)
        return put_together(axis.members[step], dim, (*path, step), new)

    out = torch.empty_like(tensor)
    for index in itertools.product(*map(range, tensor.shape)):
        new = take_apart(index)
        out[index] = tensor[tuple(put_together(axis, dim, (), new) for dim, axis in enumerate(axes))]
    return out


def every_element(spec) -> list[Permutation]:
    """All elements of a small spec's group."""
    choices = []
    for name in spec.moving:
        group = spec.groups[name]
        sizes = tuple(spec.groups[parent].size for parent in group.parents)
        rows = list(itertools.permutations(range(group.size)))
        choices.append(
            [
                torch.tensor(picked).reshape(*sizes, group.size).numpy()
                for picked in itertools.product(rows, repeat=math.prod(sizes))
            ]
        )
    return [Permutation(spec, dict(zip(spec.moving, picked, strict=True))) for picked in itertools.product(*choices)]
