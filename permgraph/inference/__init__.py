"""Inference: from a captured graph to the specification of its symmetries."""

from permgraph.inference.auto_spec import auto_spec
from permgraph.inference.branches import BranchCheck, check_branches

__all__ = ["BranchCheck", "auto_spec", "check_branches"]
