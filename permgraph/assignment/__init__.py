"""Linear assignment: solvers, proofs that a solution is optimal, and bounds where it may not be. Knows no network."""

from permgraph.assignment.certificate import Assignment, certify
from permgraph.assignment.solve import assign, assign_limited
from permgraph.assignment.wide import assign_wide

__all__ = ["Assignment", "assign", "assign_limited", "assign_wide", "certify"]
