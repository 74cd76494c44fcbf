"""The specification of a model's symmetries, as data: groups, where they act, why, and their permutations."""

from __future__ import annotations

from permgraph.spec.binding import Group, Occurrence
from permgraph.spec.expressions import Axis, Family, Fixed, Label, Product, Ref, Sum, parse_axes, parse_axis
from permgraph.spec.permutation import Permutation
from permgraph.spec.provenance import Constraints, Explanation, SlotPin, Tie
from permgraph.spec.spec import PermutationSpec, Pin, UnknownOp

__all__ = [
    "Axis",
    "Constraints",
    "Explanation",
    "Family",
    "Fixed",
    "Group",
    "Label",
    "Occurrence",
    "Permutation",
    "PermutationSpec",
    "Pin",
    "Product",
    "Ref",
    "SlotPin",
    "Sum",
    "Tie",
    "UnknownOp",
    "parse_axes",
    "parse_axis",
]
