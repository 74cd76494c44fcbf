"""More than permutations: the largest group of matrices that the operators let act on each axis."""

from permgraph.inference.general.structures import statements, with_structures

__all__ = ["statements", "with_structures"]
