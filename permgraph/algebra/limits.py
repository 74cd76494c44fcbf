"""How far types are followed; beyond, they are pinned. Each figure is in one place, with what it was measured on."""

from __future__ import annotations

RESTLESS = "cut at ever new places"
OUT_OF_TIME = "max_seconds was up before its operator was looked at"
TOO_INTRICATE = "its axes are cut in too intricate a way to follow"

MAX_DEPTH = 64
"""How many refinements may need one another: in networks that skew no matrix up to 23 do (in Longformer)."""

MAX_NESTING = 160
"""How deep types may be: each concatenation of one with something else adds one. With `MAX_DEPTH` this keeps within
half of the 1,000 frames that Python allows, so that the caller may have used the other half."""

MAX_SKEW = 8
"""How often rows may be cut off the joints of a concatenation within one another: a matrix that is padded and viewed
with longer rows, so that each is shifted against the one before, would be cut once more for every row."""

MAX_PARTS = 256
"""So many parts an axis may tell apart that stands beside rows each of which is cut: 32 in Stable Diffusion."""
