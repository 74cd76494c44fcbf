"""Matching: finding the element of a spec's group that brings one network to another."""

from collections.abc import Mapping

from permgraph.assignment import Assignment, assign, assign_limited, assign_wide, certify
from permgraph.matching.activation_matching import ActivationMatching
from permgraph.matching.alignment import Alignment, align
from permgraph.matching.cost import Estimate, calibrate, estimate
from permgraph.matching.frank_wolfe import FrankWolfe
from permgraph.matching.learned import LearnedMatching
from permgraph.matching.matcher import Matcher, MatchResult, NeedsModels, SupportsMatch, Sweep
from permgraph.matching.rows import UnionRows
from permgraph.matching.sinkhorn import Sinkhorn
from permgraph.matching.straight_through import StraightThrough
from permgraph.matching.streamed import StreamedWeightMatching
from permgraph.matching.weight_matching import WeightMatching
from permgraph.matching.widths import PartialMatch, match_widths
from permgraph.matching.workers import Workers

MATCHERS: Mapping[str, type[Matcher]] = {
    "weight": WeightMatching,
    "activation": ActivationMatching,
    "frank-wolfe": FrankWolfe,
    "straight-through": StraightThrough,
    "learned": LearnedMatching,
    "sinkhorn": Sinkhorn,
    "streamed": StreamedWeightMatching,
}
"""Every matcher by its name: where a new one is registered. Each is a frozen dataclass of settings."""

__all__ = [
    "MATCHERS",
    "ActivationMatching",
    "Alignment",
    "Assignment",
    "Estimate",
    "FrankWolfe",
    "LearnedMatching",
    "MatchResult",
    "Matcher",
    "NeedsModels",
    "PartialMatch",
    "Sinkhorn",
    "StraightThrough",
    "StreamedWeightMatching",
    "SupportsMatch",
    "Sweep",
    "UnionRows",
    "WeightMatching",
    "Workers",
    "align",
    "assign",
    "assign_limited",
    "assign_wide",
    "calibrate",
    "certify",
    "estimate",
    "match_widths",
]
