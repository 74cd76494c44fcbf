"""Parameters in pieces: large ones a part at a time, along a dimension on which no group acts.

A table of a vocabulary is the largest tensor of most language models, and nothing acts on its rows. So each run of rows
is a parameter of its own to all that matching and moving do: pieces have names, axes and actions as parameters have.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from permgraph.matching import tuned
from permgraph.matching.general.acting import Acting
from permgraph.spec.expressions import Axis, Fixed
from permgraph.spec.general import General
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Array, Transformation


class Piece(NamedTuple):
    """A part of a parameter along one dimension; all of it where there is none."""

    parameter: str
    dim: int | None = None
    start: int = 0
    length: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """The part of the parameter's value."""
        return tensor if self.dim is None else tensor.narrow(self.dim, self.start, self.length)


def in_pieces(spec: PermutationSpec, names: Iterable[str]) -> dict[str, Piece]:
    """Parameters, large ones in pieces along a dimension on which nothing acts, by names of their own."""
    found = {}
    for name in names:
        shape = spec.shapes[name]
        free = [dim for dim, axis in enumerate(spec.axes[name]) if isinstance(axis, Fixed)]
        dim = max(free, key=lambda dim: shape[dim], default=None)
        if dim is None or math.prod(shape) <= tuned.STREAMED_PORTION:
            found[name] = Piece(name)
            continue
        rest = math.prod(shape) // shape[dim]
        length = max(tuned.STREAMED_PORTION // rest, tuned.STREAMED_DEPTH)
        for start in range(0, shape[dim], length):
            found[f"{name}[{start}:]"] = Piece(name, dim, start, min(length, shape[dim] - start))
    return found


def acting_on(spec: PermutationSpec, pieces: Mapping[str, Piece], complex_ones: Collection[str] = ()) -> Acting:
    """How the groups of a general spec act on pieces of its parameters; nothing is read.

    Args:
        spec: the spec.
        pieces: what `in_pieces` made of its parameters.
        complex_ones: the parameters that are complex.
    """
    own = spec_of_pieces(spec, pieces)
    shapes = {
        key: (*own.shapes[key], *([2] if piece.parameter in complex_ones else [])) for key, piece in pieces.items()
    }
    return Acting(own, {key: torch.empty(shape, device="meta") for key, shape in shapes.items()})


def spec_of_pieces(spec: PermutationSpec, pieces: Mapping[str, Piece]) -> PermutationSpec:
    """A general spec whose parameters are pieces of another's, and the gains that matrices act between there."""
    assert spec.general is not None
    axes: dict[str, tuple[Axis, ...]] = {}
    actions = {}
    for key, piece in pieces.items():
        own = list(spec.axes[piece.parameter])
        if piece.dim is not None:
            own[piece.dim] = Fixed(piece.length)
        axes[key] = tuple(own)
        if piece.parameter in spec.general.actions:
            actions[key] = spec.general.actions[piece.parameter]
    gains = {gain.name: spec.axes[gain.name] for own in actions.values() for action in own for gain, _ in action.gains}
    return PermutationSpec(dict(spec.groups), {**axes, **gains}, general=General(actions))


class Piecewise:
    """A transformation that acts on large parameters a piece at a time, so that only a piece is held in float64.

    Args:
        element: the transformation.
    """

    def __init__(self, element: Transformation) -> None:
        spec = element.spec
        pieces = in_pieces(spec, [name for name in spec.axes if name not in spec.general_gains])
        self.element, self.spec = element, spec
        self.pieces: dict[str, list[tuple[str, Piece]]] = {}
        for key, piece in pieces.items():
            if piece.dim is not None:
                self.pieces.setdefault(piece.parameter, []).append((key, piece))
        if self.pieces:
            own = spec_of_pieces(spec, {key: piece for each in self.pieces.values() for key, piece in each})
            arrays = {n: array for n, array in element.permutation.arrays.items() if n in own.permutations().moving}

            def standing(held: Mapping[str, Array]) -> dict[str, Array]:
                return {name: array for name, array in held.items() if name in own.acting}

            self.on_pieces = Transformation(
                own,
                Permutation(own.permutations(), arrays),
                standing(element.matrices),
                standing(element.scales),
                standing(element.signs),
                {name: factors for name, factors in element.gains.items() if name in own.general_gains},
            )

    def gains_of(self, name: str) -> tuple[str, ...]:
        """The gains between which the element acts on a parameter: what `apply_to` reads besides it."""
        return self.element.gains_of(name)

    def apply_to(self, name: str, tensor: Tensor, gains: Mapping[str, Tensor]) -> Tensor:
        """A new tensor: the parameter under the element, as `Transformation.apply_to` gives it."""
        if name not in self.pieces:
            return self.element.apply_to(name, tensor, gains)
        new = torch.empty_like(tensor)
        for key, piece in self.pieces[name]:
            piece.of(new).copy_(self.on_pieces.apply_to(key, piece.of(tensor), gains))
        return new
