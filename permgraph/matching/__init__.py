"""Matching: finding the element of a spec's group that brings one network to another."""

from permgraph.matching.alignment import Alignment, align
from permgraph.matching.assignment import Assignment, assign, certify
from permgraph.matching.result import Matcher, MatchResult, Sweep
from permgraph.matching.weight_matching import WeightMatching

__all__ = [
    "Alignment",
    "Assignment",
    "MatchResult",
    "Matcher",
    "Sweep",
    "WeightMatching",
    "align",
    "assign",
    "certify",
]
