"""Elements of a spec's group, by themselves or as part of a result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from permgraph.errors import MismatchError
from permgraph.spec.permutation import Permutation
from permgraph.spec.transformation import Transformation

AnyElement: TypeAlias = Permutation | Transformation


def element_of(given: Any) -> AnyElement:
    """What is to be applied to a network: a `Permutation`, a `Transformation`, or that of a result such as `align`'s.

    Raises:
        MismatchError: it is none of these.
    """
    element = getattr(given, "element", given)
    if not isinstance(element, (Permutation, Transformation)):
        raise MismatchError(
            f"a permutation or transformation is needed, such as align(a, b).permutation, not a {type(given).__name__}"
        )
    return element


def elements_of(given: Any) -> list[AnyElement]:
    """Several of them: a sequence, or those of a result such as `merge`'s.

    Raises:
        MismatchError: it is none.
    """
    several = getattr(given, "elements", given)
    if not isinstance(several, Sequence):
        raise MismatchError(f"a list of permutations or transformations is needed, not a {type(given).__name__}")
    return [element_of(each) for each in several]
