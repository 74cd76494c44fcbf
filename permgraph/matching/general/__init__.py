"""Matching over groups with structures beyond permutations: rotations, invertible maps, scales and signs."""
