"""Linear assignment: solvers, proofs that a solution is optimal, and bounds where it may not be. Knows no network."""

from permgraph.assignment.solve import Assignment, assign, assign_limited, certify
from permgraph.assignment.wide import assign_wide

__all__ = ["Assignment", "assign", "assign_limited", "assign_wide", "certify"]
