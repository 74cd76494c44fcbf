"""Every permutation symmetry of an arbitrary PyTorch module, and the alignment of trained networks over it."""

from __future__ import annotations

from permgraph import errors
from permgraph.capture import Captured, ExampleInputs, capture, input_finder
from permgraph.connectivity import (
    Barrier,
    ChannelStatistics,
    Claim,
    FeatureAgreement,
    FeatureConnectivity,
    LayerwiseBarriers,
    barrier,
    barrier_along,
    channel_statistics,
    evaluate_on,
    feature_connectivity,
    interpolate,
    layerwise_barriers,
    permute_masks,
    recalibrate_batchnorm,
    repair,
    simultaneous_connectivity,
    star_connectivity,
    strong_connectivity,
    weak_connectivity,
)
from permgraph.infer import auto_spec
from permgraph.matching import (
    ActivationMatching,
    Alignment,
    FrankWolfe,
    Matcher,
    MatchResult,
    Sinkhorn,
    StraightThrough,
    WeightMatching,
    align,
)
from permgraph.merging import CycleConsistent, Merge, MergeMany, MergeMethod, ToReference, average, merge
from permgraph.permutation import Permutation
from permgraph.rules import rule
from permgraph.rules.check import RuleReport, check_rule
from permgraph.spec import Group, PermutationSpec
from permgraph.studies import StudyPlan, StudyResult, study
from permgraph.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "ActivationMatching",
    "Alignment",
    "Barrier",
    "Captured",
    "ChannelStatistics",
    "Claim",
    "CycleConsistent",
    "ExampleInputs",
    "FeatureAgreement",
    "FeatureConnectivity",
    "FrankWolfe",
    "Group",
    "LayerwiseBarriers",
    "MatchResult",
    "Matcher",
    "Merge",
    "MergeMany",
    "MergeMethod",
    "Permutation",
    "PermutationSpec",
    "RuleReport",
    "Sinkhorn",
    "StraightThrough",
    "StudyPlan",
    "StudyResult",
    "ToReference",
    "Verification",
    "WeightMatching",
    "__version__",
    "align",
    "auto_spec",
    "average",
    "barrier",
    "barrier_along",
    "capture",
    "channel_statistics",
    "check_rule",
    "errors",
    "evaluate_on",
    "feature_connectivity",
    "input_finder",
    "interpolate",
    "layerwise_barriers",
    "merge",
    "permute_masks",
    "recalibrate_batchnorm",
    "repair",
    "rule",
    "simultaneous_connectivity",
    "star_connectivity",
    "strong_connectivity",
    "study",
    "verify",
    "weak_connectivity",
]
