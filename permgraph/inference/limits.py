"""How long inference goes on, and from what size it takes numbers for a text."""

from __future__ import annotations

MAX_RUNS = 6
"""How often a graph is typed anew because factors turned out to be cut; two are enough unless cuts lie within cuts."""

MAX_VISITS = 12
"""How often all rules are run with leave to cut axes; most networks need two. As often again without, and then what has
still not come to rest is pinned."""

QUICK_VISITS = 4
"""So many visits are mostly enough, and before them it is not worth while to compare forms."""

SAME_VISITS = 3
"""How many visits in a row must leave types of the same form to count as rest."""

SHORTEST_TEXT = 8
"""Rows shorter than this are sizes or coordinates rather than tokens: their order means something."""
