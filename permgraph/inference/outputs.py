"""What becomes of a model's outputs: the expression of the axes of each, where inference knows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from permgraph.capture.counting import counting, returned_by
from permgraph.errors import SpecError
from permgraph.inference.solution import Solution
from permgraph.rules.typed_tensor import TypedTensor
from permgraph.spec import PermutationSpec
from permgraph.spec.expressions import Axis, Fixed

Axes = tuple[Axis, ...]


def with_outputs(spec: PermutationSpec, solution: Solution, axes_of: Callable[[TypedTensor], Axes]) -> PermutationSpec:
    """The same spec, which says of each output of the model how it moves.

    By-products of which that cannot be said in axes are named in a note: those that differ from pass to pass in more
    than their sizes, and whole numbers that number an axis which moves.
    """
    found: dict[str, Axes | None] = {}
    by_products: dict[str, None] = {}
    for end in (node for node in solution.nodes if node.op == "output"):
        results = end.args[0] if isinstance(end.args[0], (list, tuple)) else ()
        for node, one, counts in zip(results, returned_by(end), counting(end), strict=True) if results else ():
            axes = _expressed(spec, solution, solution.values[node], axes_of)
            for name in one.names:
                by_products |= {} if counts else {name: None}
                if name in found and not _same(found[name], axes):
                    found[name] = None
                else:
                    found.setdefault(name, axes)
    unknown = [name for name in by_products if found[name] is None]
    more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    note = f"how by-products move is not known of {', '.join(unknown[:3])}{more}"
    return replace(
        spec,
        outputs={name: axes for name, axes in found.items() if axes is not None},
        by_products=tuple(by_products),
        notes=(*spec.notes, note) if unknown else spec.notes,
    )


def _expressed(
    spec: PermutationSpec, solution: Solution, tensor: object, axes_of: Callable[[TypedTensor], Axes]
) -> Axes | None:
    """The axes of an output, where they say all of how it moves."""
    if not isinstance(tensor, TypedTensor):
        return None
    if tensor.value is not None and any(atom.pinned is None for atom in solution.axes.atoms(tensor.value)):
        return None
    axes = axes_of(tensor)
    try:
        spec.layout(axes)
    except SpecError:
        return None
    return axes


def _same(one: Axes | None, other: Axes | None) -> bool:
    """Whether two passes say the same but for the sizes of dimensions that stay put."""
    if one is None or other is None or len(one) != len(other):
        return False
    return all(a == b or (isinstance(a, Fixed) and isinstance(b, Fixed)) for a, b in zip(one, other, strict=True))
