"""The colours of groups: told apart by the colour-blind, and never the only sign."""

from __future__ import annotations

# Okabe and Ito's palette without its yellow, which is lost on white paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B")
STYLES = 3  # borders: solid, dashed, double; on the page each colour comes with each of them
DASHES = ("-", (0, (4, 1)), (0, (1, 1)), (0, (4, 1, 1, 1)))
