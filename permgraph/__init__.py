"""Every permutation symmetry of an arbitrary PyTorch module, and the alignment of trained networks over it."""

from __future__ import annotations

from permgraph.connectivity import Barrier, barrier, evaluate_on, interpolate, recalibrate_batchnorm, repair

__version__ = "0.1.0"

__all__ = [
    "Barrier",
    "barrier",
    "evaluate_on",
    "interpolate",
    "recalibrate_batchnorm",
    "repair",
]
