"""The specification of a model's symmetries, as data: groups, where they act, why, and their permutations."""

from __future__ import annotations

from permgraph.spec.binding import Group, Occurrence
from permgraph.spec.data import SpecData
from permgraph.spec.explain import Explanation
from permgraph.spec.expressions import Axis, Family, Fixed, Label, Product, Ref, Sum, parse_axes, parse_axis
from permgraph.spec.general import Action, Gain, General
from permgraph.spec.permutation import Permutation
from permgraph.spec.provenance import Constraints, Pin, SlotPin, Tie, UnknownOp, Unread
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation

__all__ = [
    "Action",
    "Axis",
    "Constraints",
    "Explanation",
    "Family",
    "Fixed",
    "Gain",
    "General",
    "Group",
    "Label",
    "Occurrence",
    "Permutation",
    "PermutationSpec",
    "Pin",
    "Product",
    "Ref",
    "SlotPin",
    "SpecData",
    "Sum",
    "Tie",
    "Transformation",
    "UnknownOp",
    "Unread",
    "parse_axes",
    "parse_axis",
]
