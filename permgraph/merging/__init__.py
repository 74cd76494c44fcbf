"""Merging: bringing several networks into correspondence with each other, and averaging them.

Every method chooses one permutation for each model, to a numbering that all then share. It works on state dicts and a
specification, and knows no architecture.
"""

from __future__ import annotations

from permgraph.merging.frank_wolfe import FrankWolfeMany
from permgraph.merging.joining import Joining
from permgraph.merging.learned_ratios import LearnedRatios, learn_ratios
from permgraph.merging.least_squares import least_squares
from permgraph.merging.merge import merge
from permgraph.merging.methods import CycleConsistent, MergeMany, ToReference
from permgraph.merging.partial import PartialMerge, partial_merge
from permgraph.merging.result import Found, Merge, MergeMethod, Models, Round
from permgraph.merging.star import Star, fit_star
from permgraph.weights.combine import average

__all__ = [
    "CycleConsistent",
    "Found",
    "FrankWolfeMany",
    "Joining",
    "LearnedRatios",
    "Merge",
    "MergeMany",
    "MergeMethod",
    "Models",
    "PartialMerge",
    "Round",
    "Star",
    "ToReference",
    "average",
    "fit_star",
    "learn_ratios",
    "least_squares",
    "merge",
    "partial_merge",
]
