"""What of a model's results is compared before and after an element of the group, and as what.

The result stays what it is. By-products, which do not count as the result, move as the spec says: what the model
returns after the element has acted is moved back. Of some by-products it is not known how they move; they are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from permgraph.capture.outputs import named_tensors
from permgraph.spec.data import SpecData
from permgraph.spec.elements import AnyElement
from permgraph.spec.expressions import Axis, Fixed, size_of
from permgraph.spec.permutation import Permutation

Axes = tuple[Axis, ...]


class ComparedOutputs:
    """Finds in results what is to be compared, and moves by-products back.

    Args:
        spec: which says what the by-products are, and how they move.

    Attributes:
        left_out: the by-products that were met and are not compared.
    """

    def __init__(self, spec: SpecData) -> None:
        self.spec = spec
        self.left_out: dict[str, None] = {}
        self._by_products = frozenset(spec.by_products)

    def among(self, calls: Sequence[Any]) -> list[tuple[Tensor, Axes | None]]:
        """The tensors that some calls returned, once each; of those that move their axes besides."""
        found: dict[int, tuple[Tensor, Axes | None]] = {}
        for result in calls:
            for tensor, names in named_tensors(result):
                if id(tensor) in found:
                    continue
                name = next((name for name in names if name in self._by_products), None)
                if name is None:
                    found[id(tensor)] = tensor, None
                elif (axes := self._axes(name, tensor)) is None:
                    self.left_out[name] = None
                else:
                    found[id(tensor)] = tensor, axes if self._groups(axes) else None
        return list(found.values())

    def moved_back(self, tensors: Sequence[Tensor], axes: Sequence[Axes | None], element: AnyElement) -> list[Tensor]:
        """The tensors that a model returned after an element had acted, as they would be if it had not."""
        if not any(axes):
            return list(tensors)
        permutation = element if isinstance(element, Permutation) else element.permutation
        back = permutation.inverse()
        return [t if own is None else back.apply_axes(own, t) for t, own in zip(tensors, axes, strict=True)]

    def note(self) -> str:
        """What was not compared, in words."""
        return f"by-products that move in a way not known were not compared: {', '.join(self.left_out)}" * bool(
            self.left_out
        )

    def _groups(self, axes: Axes) -> set[str]:
        """The groups that act on an output."""
        return {o.group for o in self.spec.layout(axes).occurrences if o.group in self.spec.acting}

    def _axes(self, name: str, tensor: Tensor) -> Axes | None:
        """The axes of a by-product of whatever size; None if they are not known, or more than permutations act."""
        axes = self.spec.outputs.get(name)
        if axes is None or len(axes) != tensor.ndim:
            return None
        sized = tuple(
            Fixed(size) if isinstance(axis, Fixed) else axis for axis, size in zip(axes, tensor.shape, strict=True)
        )
        if tuple(size_of(axis, self.spec.groups) for axis in sized) != tuple(tensor.shape):
            return None
        plain = all(self.spec.groups[group].structure.is_plain for group in self._groups(sized))
        return sized if plain else None
