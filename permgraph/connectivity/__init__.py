"""What lies between two networks: interpolation, barriers, and the repair of activation statistics.

Nothing here knows an operator or a specification: it works on modules and state dicts, aligned or not.
"""

from __future__ import annotations

from permgraph.connectivity.barriers import Barrier, barrier
from permgraph.connectivity.evaluation import evaluate_on
from permgraph.connectivity.interpolation import interpolate
from permgraph.connectivity.normalisation import recalibrate_batchnorm
from permgraph.connectivity.renormalisation import ChannelStatistics, channel_statistics, repair

__all__ = [
    "Barrier",
    "ChannelStatistics",
    "barrier",
    "channel_statistics",
    "evaluate_on",
    "interpolate",
    "recalibrate_batchnorm",
    "repair",
]
