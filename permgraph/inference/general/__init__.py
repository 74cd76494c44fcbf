"""More than permutations: the largest group of matrices that the operators let act on each axis."""

from permgraph.inference.general.structures import statements, with_structures
from permgraph.inference.general.turns import free_turns

__all__ = ["free_turns", "statements", "with_structures"]
