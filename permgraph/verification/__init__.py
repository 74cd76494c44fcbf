"""Proofs: that a specification preserves a model's function (`verify`), and that a rule is right (`check_rule`)."""

from permgraph.verification.general import GeneralVerification
from permgraph.verification.model import verify
from permgraph.verification.report import Verification
from permgraph.verification.rule import RuleReport, check_rule

__all__ = ["GeneralVerification", "RuleReport", "Verification", "check_rule", "verify"]
