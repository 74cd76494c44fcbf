"""What lies between two networks: interpolation, barriers, and the repair of activation statistics.

Nothing here knows an operator: it works on modules and state dicts, aligned or not, and applies permutations at most.
"""

from __future__ import annotations

from permgraph.connectivity.barriers import Barrier, barrier, barrier_along
from permgraph.connectivity.evaluation import evaluate_on
from permgraph.connectivity.features import FeatureAgreement, FeatureConnectivity, feature_connectivity
from permgraph.connectivity.interpolation import interpolate
from permgraph.connectivity.layers import LayerwiseBarriers, layerwise_barriers
from permgraph.connectivity.normalisation import recalibrate_batchnorm
from permgraph.connectivity.renormalisation import ChannelStatistics, channel_statistics, repair
from permgraph.connectivity.simultaneous import (
    Claim,
    permute_masks,
    simultaneous_connectivity,
    star_connectivity,
    strong_connectivity,
    weak_connectivity,
)

__all__ = [
    "Barrier",
    "ChannelStatistics",
    "Claim",
    "FeatureAgreement",
    "FeatureConnectivity",
    "LayerwiseBarriers",
    "barrier",
    "barrier_along",
    "channel_statistics",
    "evaluate_on",
    "feature_connectivity",
    "interpolate",
    "layerwise_barriers",
    "permute_masks",
    "recalibrate_batchnorm",
    "repair",
    "simultaneous_connectivity",
    "star_connectivity",
    "strong_connectivity",
    "weak_connectivity",
]
