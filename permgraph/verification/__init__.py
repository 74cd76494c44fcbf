"""Proofs: that a specification preserves a model's function (`verify`), and that a rule is right (`check_rule`)."""
