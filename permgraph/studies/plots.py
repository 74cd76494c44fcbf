"""The picture of a study."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from permgraph.pictures.figures import pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, DOTS = "#222222", "#0072b2"  # distinct in grey and to every kind of colour vision


def plot_barriers(by_matcher: Mapping[str, Sequence[float]], metric: str, *, ax: Axes | None = None) -> Axes:
    """Draw one column of dots for each matcher, with a line at the median."""
    if ax is None:
        _, ax = pyplot().subplots(figsize=(1.6 + 1.2 * len(by_matcher), 3.6), layout="constrained")
    assert ax is not None
    for place, heights in enumerate(by_matcher.values()):
        aside = np.random.default_rng(0).uniform(-0.18, 0.18, len(heights))
        ax.scatter(place + aside, heights, s=14, color=DOTS, alpha=0.55, linewidths=0)
        ax.hlines(statistics.median(heights), place - 0.3, place + 0.3, color=INK, linewidth=2)
    ax.set_xticks(range(len(by_matcher)), [f"{name}\n({len(heights)})" for name, heights in by_matcher.items()])
    ax.set_ylabel(f"barrier ({metric})")
    ax.axhline(0, color=INK, linewidth=0.5)
    return ax
