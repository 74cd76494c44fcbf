"""Matrix groups that may act on an axis: their lattice, and elements of them."""

from permgraph.structures.lattice import NAMES, is_member, is_within, larger, meet, random_element
from permgraph.structures.structure import LINEAR, Structure

__all__ = ["LINEAR", "NAMES", "Structure", "is_member", "is_within", "larger", "meet", "random_element"]
