"""Which entries of a state dict are statistics that normalisation layers keep, rather than weights."""

from __future__ import annotations

STATISTICS = ("*running_mean", "*running_var", "*num_batches_tracked")
"""Patterns of their names: they are permuted with the rest, but are no evidence of which units correspond."""
