"""The loss on the plane through three networks.

Garipov et al. (2018) draw the loss on the plane through two networks and the bend of a curve between them; Singh et al.
(2024), "Landscaping Linear Mode Connectivity", look at the barrier as a feature of such landscapes. The plane through
networks a, b and c is a + x e + y f with e and f orthonormal in the space of parameters, e along b - a, so that
distances on it are distances of weights.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from permgraph.connectivity.barriers import Evaluate, Prepare, measure, prepared
from permgraph.conventions.displayed import Displayed
from permgraph.conventions.outcomes import StepProgress
from permgraph.conventions.waiting import waits
from permgraph.errors import EvaluationError
from permgraph.networks.batches import undisturbed
from permgraph.networks.evaluate import template_of
from permgraph.weights.combine import blend
from permgraph.weights.identity import SameTensor
from permgraph.weights.state_dict import (
    STATISTICS,
    Network,
    as_state_dict,
    check_same_keys,
    is_continuous,
    require_finite,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, repr=False)
class LossSurface(Displayed):
    """What was measured on the plane through three networks.

    Attributes:
        x, y: the coordinates of the grid's columns and rows, as L2 distances from network a.
        grids: for each metric, its values, ``grids[metric][row][column]``.
        corners: where networks a, b and c lie: a at the origin, b on the x axis.
        ends: for each metric, its values at a, b and c.
        higher_is_better: the metrics that fall when a network gets worse.
        metric: the metric that ``losses`` and ``barrier`` speak of.
        seconds: how long it took.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    grids: Mapping[str, tuple[tuple[float, ...], ...]]
    corners: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
    ends: Mapping[str, tuple[float, float, float]]
    higher_is_better: frozenset[str] = frozenset()
    metric: str = "loss"
    seconds: float = field(default=0.0, compare=False)

    @property
    def losses(self) -> tuple[tuple[float, ...], ...]:
        """The values of the first metric on the grid."""
        return self.grids[self.metric]

    @property
    def barrier(self) -> float:
        """How far the loss rises above the plane of the three networks' losses, inside their triangle; at least 0.

        Taken over the grid's points that lie in the triangle, NaN or infinite where a loss there is. It is 0 for three
        networks of a convex low-loss set, and bounds the three barriers between them from above as the grid gets finer.
        """
        sign = -1.0 if self.metric in self.higher_is_better else 1.0
        highest = 0.0
        for row, y in enumerate(self.y):
            for column, x in enumerate(self.x):
                shares = barycentric(self.corners, x, y)
                if min(shares) < -1e-9:
                    continue
                level = sum(share * end for share, end in zip(shares, self.ends[self.metric], strict=True))
                excess = sign * (self.losses[row][column] - level)
                if math.isnan(excess):
                    return math.nan
                highest = max(highest, excess)
        return highest

    @property
    def nonfinite(self) -> int:
        """How many values are NaN or infinite, over all metrics."""
        return sum(not math.isfinite(value) for grid in self.grids.values() for row in grid for value in row)

    def plot(
        self,
        metric: str | None = None,
        *,
        ax: Axes | None = None,
        names: Sequence[str] = ("A", "B", "C"),
        levels: Sequence[float] | int = 12,
    ) -> Axes:
        """Draw one metric as filled contours with the three networks on it, and return the axes.

        Values that are not finite are left white and hatched. Give the same ``levels`` to compare two surfaces; each
        step between them takes an equal share of the colours, so they may be spaced as one likes.

        Raises:
            MissingExtraError: matplotlib is not installed.
            EvaluationError: no such metric was measured.
        """
        metric = metric or self.metric
        if metric not in self.grids:
            raise EvaluationError(f"no metric {metric!r} was measured, only {', '.join(map(repr, self.grids))}")
        if ax is None:
            from permgraph.connectivity.plots import new_axes

            ax = new_axes()
        ax.set_facecolor("white")
        ax.patch.set_hatch("//")
        ax.patch.set_edgecolor("0.8")
        grid = torch.tensor(self.grids[metric], dtype=torch.float64)
        values = torch.where(torch.isfinite(grid), grid, torch.nan).numpy()
        bounded: dict[str, Any] = {}
        if not isinstance(levels, int):
            from matplotlib.colors import BoundaryNorm

            bounded = {"extend": "both", "norm": BoundaryNorm(levels, 256, extend="both")}
        drawn = ax.contourf(self.x, self.y, values, levels=levels, cmap="cividis", **bounded)
        ax.figure.colorbar(drawn, ax=ax, label=metric, format="%.3g", shrink=0.85)
        ax.contour(self.x, self.y, values, levels=drawn.levels, colors="white", linewidths=0.4)
        around = [*self.corners, self.corners[0]]
        for width, colour in ((2.5, "black"), (1.2, "white")):  # seen on both the darkest and the lightest colours
            sides = [c[0] for c in around], [c[1] for c in around]
            ax.plot(*sides, color=colour, linestyle=(0, (2, 2)), linewidth=width)
        for (x, y), name, marker in zip(self.corners, names, "os^", strict=False):
            ax.plot(x, y, marker=marker, color="#D55E00", markeredgecolor="white", markersize=8, linestyle="none")
            behind = {"boxstyle": "round,pad=0.15", "facecolor": "black", "alpha": 0.5, "linewidth": 0}
            ax.annotate(name, (x, y), textcoords="offset points", xytext=(7, 7), color="white", bbox=behind)
        ax.set(xlabel="L2 distance", ylabel="L2 distance", aspect="equal")
        return ax


@waits("measuring the plane")
def loss_surface(
    a: Network,
    b: Network,
    c: Network,
    evaluate: Evaluate,
    points: int = 15,
    *,
    margin: float = 0.2,
    model: nn.Module | None = None,
    prepare: Prepare | None = None,
    higher_is_better: Collection[str] = ("accuracy",),
    progress: StepProgress | None = None,
) -> LossSurface:
    """Evaluate the networks on a grid over the plane through three.

    Args:
        a, b, c: modules, or state dicts of the same keys and shapes; aligned, or not.
        evaluate: as for ``barrier``; called ``points`` squared times, and for the three networks.
        points: of the grid in each direction, at least 2.
        margin: how far the grid reaches beyond the triangle, as a share of its extent.
        model: the module to put state dicts in, when none of the three is one.
        prepare: as for ``barrier``, called with 0 at the three networks and 0.5 elsewhere; to recalibrate BatchNorm.
        higher_is_better: the names of the metrics that fall when a network gets worse.
        progress: called as ``progress(done, all)`` after each evaluation.

    Distances are over parameters, and leave running statistics aside. None of the networks is changed.

    Raises:
        MismatchError: the networks differ in a key or a shape.
        EvaluationError: there is no module, or one is in training mode; the three lie on a line, or ``points`` or
            ``margin`` is out of range.
        NonFiniteError: a parameter of one of the three is NaN or infinite.

    Example:
        >>> a, b, c = (nn.Linear(2, 2).eval() for _ in range(3))
        >>> found = loss_surface(a, b, c, lambda net: float(net.weight.square().sum()), points=5)
        >>> found.corners[0], found.corners[1][1], found.barrier  # the loss is convex
        ((0.0, 0.0), 0.0, 0.0)
    """
    began = time.perf_counter()
    if points < 2:
        raise EvaluationError(f"points={points}: a grid has at least 2 in each direction")
    if not 0 <= margin < math.inf:
        raise EvaluationError(f"margin={margin}: it must be finite and not negative")
    template = template_of(model, a=a, b=b, c=c)
    states = [as_state_dict(network) for network in (a, b, c)]
    for name, state in zip("bc", states[1:], strict=True):
        check_same_keys(states[0], state, ("a", name))
    corners = _corners(states)
    x, y = (_grid([corner[axis] for corner in corners], points, margin) for axis in (0, 1))
    found: list[dict[str, float]] = []
    with undisturbed():
        scratch = copy.deepcopy(template)
        places = [*corners, *((u, v) for v in y for u in x)]
        for done, place in enumerate(places):
            shares = barycentric(corners, *place)
            scratch.load_state_dict(blend(states, shares))
            network = prepared(scratch, prepare, 0.0 if done < 3 else 0.5)
            found.append(measure(evaluate, network, found[0] if found else None, f"({place[0]:.3g}, {place[1]:.3g})"))
            if progress is not None:
                progress(done + 1, len(places))
    ends, inside = found[:3], found[3:]
    rows = [inside[at : at + points] for at in range(0, len(inside), points)]
    metrics = list(ends[0])
    return LossSurface(
        x=x,
        y=y,
        grids=MappingProxyType(
            {metric: tuple(tuple(value[metric] for value in row) for row in rows) for metric in metrics}
        ),
        corners=corners,
        ends=MappingProxyType({metric: (ends[0][metric], ends[1][metric], ends[2][metric]) for metric in metrics}),
        higher_is_better=frozenset(higher_is_better) & set(metrics),
        metric="loss" if "loss" in metrics else metrics[0],
        seconds=time.perf_counter() - began,
    )


Corners = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


def barycentric(corners: Corners, x: float, y: float) -> tuple[float, float, float]:
    """How much of each of three corners makes up the point (x, y); they add up to 1."""
    (ax, ay), (bx, by), (cx, cy) = corners
    whole = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
    b = ((x - ax) * (cy - ay) - (cx - ax) * (y - ay)) / whole
    c = ((bx - ax) * (y - ay) - (x - ax) * (by - ay)) / whole
    return 1 - b - c, b, c


def _corners(states: Sequence[Mapping[str, Any]]) -> Corners:
    """Coordinates of the three in their plane: the first at the origin, the second on the x axis."""
    bb, cc, bc = 0.0, 0.0, 0.0
    same = SameTensor()
    for name, x in states[0].items():
        if not isinstance(x, Tensor) or not is_continuous(x):
            continue
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in STATISTICS) or same.first_name(name, x) != name:
            continue
        origin = x.detach().to("cpu", torch.complex128 if x.is_complex() else torch.float64)
        b, c = (state[name].detach().to(origin) - origin for state in states[1:])
        for which, tensor in zip("abc", (origin, b, c), strict=True):
            require_finite(tensor, name, which, ": no plane goes through that network")
        bb += float(torch.linalg.vector_norm(b)) ** 2
        cc += float(torch.linalg.vector_norm(c)) ** 2
        bc += float((b.conj() * c).sum().real)
    along = math.sqrt(bb)
    across = math.sqrt(max(cc - bc**2 / bb, 0.0)) if along else 0.0
    if not across > 1e-6 * along:
        raise EvaluationError(
            "the three networks lie on a line, so that no plane is theirs: two of them may be the same network"
        )
    return (0.0, 0.0), (along, 0.0), (bc / along, across)


def _grid(values: Sequence[float], points: int, margin: float) -> tuple[float, ...]:
    low, high = min(values), max(values)
    low, high = low - margin * (high - low), high + margin * (high - low)
    return tuple(low + (high - low) * k / (points - 1) for k in range(points))
