"""What lies between two networks: interpolation, barriers, and the repair of activation statistics.

Nothing here knows an operator: it works on modules and state dicts, aligned or not, and applies permutations at most.
"""

from __future__ import annotations

from permgraph.connectivity.barriers import Barrier, barrier, barrier_along
from permgraph.connectivity.curve_alignment import AlignedCurve, fit_aligned_curve
from permgraph.connectivity.curves import Curve, fit_curve
from permgraph.connectivity.features import FeatureAgreement, FeatureConnectivity, feature_connectivity
from permgraph.connectivity.landscape import LossSurface, loss_surface
from permgraph.connectivity.layers import LayerwiseBarriers, layerwise_barriers
from permgraph.connectivity.simultaneous import (
    Claim,
    permute_masks,
    simultaneous_connectivity,
    star_connectivity,
    strong_connectivity,
    weak_connectivity,
)
from permgraph.connectivity.spectra import LayerSpectra, SpectralComparison, compare_spectra
from permgraph.networks.evaluate import evaluate_on
from permgraph.networks.repair import ChannelStatistics, channel_statistics, repair
from permgraph.networks.statistics import recalibrate_batchnorm
from permgraph.weights.combine import interpolate

__all__ = [
    "AlignedCurve",
    "Barrier",
    "ChannelStatistics",
    "Claim",
    "Curve",
    "FeatureAgreement",
    "FeatureConnectivity",
    "LayerSpectra",
    "LayerwiseBarriers",
    "LossSurface",
    "SpectralComparison",
    "barrier",
    "barrier_along",
    "channel_statistics",
    "compare_spectra",
    "evaluate_on",
    "feature_connectivity",
    "fit_aligned_curve",
    "fit_curve",
    "interpolate",
    "layerwise_barriers",
    "loss_surface",
    "permute_masks",
    "recalibrate_batchnorm",
    "repair",
    "simultaneous_connectivity",
    "star_connectivity",
    "strong_connectivity",
    "weak_connectivity",
]
