# The public names and the packages they come from: read by type checkers, and by `__init__.py` for its lazy imports.

from . import errors as errors
from .capture import (
    Captured as Captured,
)
from .capture import (
    ExampleInputs as ExampleInputs,
)
from .capture import (
    capture as capture,
)
from .capture import (
    input_finder as input_finder,
)
from .capture import (
    untied as untied,
)
from .capture import (
    untied_config as untied_config,
)
from .connectivity import (
    AlignedCurve as AlignedCurve,
)
from .connectivity import (
    Barrier as Barrier,
)
from .connectivity import (
    ChannelStatistics as ChannelStatistics,
)
from .connectivity import (
    Claim as Claim,
)
from .connectivity import (
    Curve as Curve,
)
from .connectivity import (
    FeatureAgreement as FeatureAgreement,
)
from .connectivity import (
    FeatureConnectivity as FeatureConnectivity,
)
from .connectivity import (
    LayerSpectra as LayerSpectra,
)
from .connectivity import (
    LayerwiseBarriers as LayerwiseBarriers,
)
from .connectivity import (
    LossSurface as LossSurface,
)
from .connectivity import (
    SpectralComparison as SpectralComparison,
)
from .connectivity import (
    barrier as barrier,
)
from .connectivity import (
    barrier_along as barrier_along,
)
from .connectivity import (
    channel_statistics as channel_statistics,
)
from .connectivity import (
    compare_spectra as compare_spectra,
)
from .connectivity import (
    evaluate_on as evaluate_on,
)
from .connectivity import (
    feature_connectivity as feature_connectivity,
)
from .connectivity import (
    fit_aligned_curve as fit_aligned_curve,
)
from .connectivity import (
    fit_curve as fit_curve,
)
from .connectivity import (
    interpolate as interpolate,
)
from .connectivity import (
    layerwise_barriers as layerwise_barriers,
)
from .connectivity import (
    loss_surface as loss_surface,
)
from .connectivity import (
    permute_masks as permute_masks,
)
from .connectivity import (
    recalibrate_batchnorm as recalibrate_batchnorm,
)
from .connectivity import (
    repair as repair,
)
from .connectivity import (
    simultaneous_connectivity as simultaneous_connectivity,
)
from .connectivity import (
    star_connectivity as star_connectivity,
)
from .connectivity import (
    strong_connectivity as strong_connectivity,
)
from .connectivity import (
    weak_connectivity as weak_connectivity,
)
from .inference import (
    BranchCheck as BranchCheck,
)
from .inference import (
    auto_spec as auto_spec,
)
from .inference import (
    check_branches as check_branches,
)
from .matching import (
    ActivationMatching as ActivationMatching,
)
from .matching import (
    Alignment as Alignment,
)
from .matching import (
    Estimate as Estimate,
)
from .matching import (
    FrankWolfe as FrankWolfe,
)
from .matching import (
    LearnedMatching as LearnedMatching,
)
from .matching import (
    Matcher as Matcher,
)
from .matching import (
    MatchResult as MatchResult,
)
from .matching import (
    PartialMatch as PartialMatch,
)
from .matching import (
    Sinkhorn as Sinkhorn,
)
from .matching import (
    StraightThrough as StraightThrough,
)
from .matching import (
    StreamedWeightMatching as StreamedWeightMatching,
)
from .matching import (
    UnionRows as UnionRows,
)
from .matching import (
    WeightMatching as WeightMatching,
)
from .matching import (
    Workers as Workers,
)
from .matching import (
    align as align,
)
from .matching import (
    calibrate as calibrate,
)
from .matching import (
    estimate as estimate,
)
from .matching import (
    match_widths as match_widths,
)
from .merging import (
    CycleConsistent as CycleConsistent,
)
from .merging import (
    FrankWolfeMany as FrankWolfeMany,
)
from .merging import (
    Joining as Joining,
)
from .merging import (
    LearnedRatios as LearnedRatios,
)
from .merging import (
    Merge as Merge,
)
from .merging import (
    MergeMany as MergeMany,
)
from .merging import (
    MergeMethod as MergeMethod,
)
from .merging import (
    PartialMerge as PartialMerge,
)
from .merging import (
    Star as Star,
)
from .merging import (
    ToReference as ToReference,
)
from .merging import (
    average as average,
)
from .merging import (
    fit_star as fit_star,
)
from .merging import (
    learn_ratios as learn_ratios,
)
from .merging import (
    least_squares as least_squares,
)
from .merging import (
    merge as merge,
)
from .merging import (
    partial_merge as partial_merge,
)
from .pictures import (
    Report as Report,
)
from .pictures import (
    layer_similarity as layer_similarity,
)
from .pictures import (
    report as report,
)
from .rules import (
    list_rules as list_rules,
)
from .rules import (
    rule as rule,
)
from .spec import (
    Group as Group,
)
from .spec import (
    Permutation as Permutation,
)
from .spec import (
    PermutationSpec as PermutationSpec,
)
from .spec import (
    Transformation as Transformation,
)
from .studies import (
    StudyPlan as StudyPlan,
)
from .studies import (
    StudyResult as StudyResult,
)
from .studies import (
    study as study,
)
from .transporting import (
    transport as transport,
)
from .verification import (
    GeneralVerification as GeneralVerification,
)
from .verification import (
    RuleReport as RuleReport,
)
from .verification import (
    check_rule as check_rule,
)
from .verify import (
    Verification as Verification,
)
from .verify import (
    verify as verify,
)

__version__: str
