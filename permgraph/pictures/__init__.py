"""Pictures of a spec and of what was done with it: lanes, a page to click through, tables for notebooks."""

from __future__ import annotations

from permgraph.pictures.page import Report, report
from permgraph.pictures.similarity import Similarity, layer_similarity

__all__ = ["Report", "Similarity", "layer_similarity", "report"]
