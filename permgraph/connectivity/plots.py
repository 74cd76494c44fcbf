"""Pictures of what lies between networks. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from permgraph.pictures.figures import pyplot
from permgraph.pictures.palette import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from permgraph.connectivity.barriers import Barrier

# Styles and markers differ too, for print in grey.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def new_axes() -> Axes:
    """Return the axes of a new figure.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    _, ax = pyplot().subplots(figsize=(4.8, 3.6), layout="constrained")
    made: Axes = ax
    return made


def plot_barrier(result: Barrier, metric: str, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Draw ``metric`` along the line between two networks; see ``Barrier.plot``."""
    height = result.height(metric)
    if ax is None:
        ax = new_axes()
    curves_before = sum(line.get_gid() == "permgraph-curve" for line in ax.lines)
    colour, marker = COLOURS[curves_before % len(COLOURS)], MARKERS[curves_before % len(MARKERS)]
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
    ax.set_xlabel("position on the line from a (0) to b (1)")
    ax.set_ylabel(metric)
    ax.set_xlim(-0.02, 1.02)
    ax.grid(alpha=0.25)
    # Above the axes, where no curve can run through it.
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return ax
