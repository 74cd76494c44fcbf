"""Pictures of what lies between networks. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from permgraph.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from permgraph.connectivity.barriers import Barrier

# Okabe and Ito's palette, which the colour-blind can tell apart; styles and markers differ too, for print in grey.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def new_axes(title: str | None = None) -> Axes:
    """Return the axes of a new figure.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib: pip install 'permgraph[plots]'") from error
    _, ax = plt.subplots(figsize=(4.8, 3.6), layout="constrained")
    if title is not None:
        ax.set_title(title)
    return ax


def plot_barrier(result: Barrier, metric: str, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Draw ``metric`` along the line between two networks; see ``Barrier.plot``."""
    height = result.height(metric)
    if ax is None:
        ax = new_axes()
    curves_before = sum(line.get_gid() == "permgraph-curve" for line in ax.lines)
    colour, marker = PALETTE[curves_before % len(PALETTE)], MARKERS[curves_before % len(MARKERS)]
    values = [value if math.isfinite(value) else math.nan for value in result.curves[metric]]
    text = f"{label}, barrier {height:.3g}" if label else f"barrier {height:.3g}"
    ax.plot(result.alphas, values, color=colour, marker=marker, markersize=4, label=text, gid="permgraph-curve")
    ends = (values[0], values[-1])
    ax.plot((0, 1), ends, color=colour, linestyle=":", linewidth=1, gid="permgraph-ends")
    missing = [t for name, t in result.nonfinite if name == metric]
    if missing:
        # In axes coordinates: a value that is not finite has no height of its own.
        ax.plot(
            missing,
            [0.98] * len(missing),
            transform=ax.get_xaxis_transform(),
            color=colour,
            marker="x",
            markersize=8,
            linestyle="none",
            clip_on=False,
            label="not finite",
            gid="permgraph-nonfinite",
        )
    ax.set_xlabel("position on the line, 0 is a and 1 is b")
    ax.set_ylabel(metric)
    ax.set_xlim(-0.02, 1.02)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    return ax
