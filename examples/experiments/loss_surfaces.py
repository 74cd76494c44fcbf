"""The loss on the plane through three networks, before and after alignment, and the barrier along their training.

Singh et al. (2024), "Landscaping Linear Mode Connectivity", read the barrier off the landscape between networks. Three
networks are trained from different seeds; the plane through them is drawn as they are, and after cycle-consistent
matching. Beside it, the barrier between the first two at checkpoints along their training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from common import Setting, arguments, bar, console, figure, finished, legend, line, settings, table
from matplotlib.axes import Axes
from rich.console import Console

import permgraph as pg


@dataclass(frozen=True)
class Result:
    """Everything for one architecture."""

    surfaces: dict[str, pg.LossSurface]
    epochs: list[int]
    heights: dict[str, list[float]]


def run(setting: Setting, seeds: Sequence[int], points: int, grid: int, where: Console) -> Result:
    """Planes and heights."""
    last = setting.epochs
    keep = sorted({0, 1, 2, last // 4, last // 2} - {last})
    with bar(where, f"{setting.name}: training", 3 * last) as step:
        trainings = [setting.train(seed, keep=keep, step=step) for seed in seeds]
    ends = [training[-1] for training in trainings]
    model = setting.network(ends[0])
    spec = pg.auto_spec(model)
    merged = finished(pg.merge(ends, spec=spec))
    moved = [p.apply(state) for p, state in zip(merged.permutations, ends, strict=True)]
    surfaces = {}
    with bar(where, f"{setting.name}: planes", 2 * (grid**2 + 3)) as step:
        for name, states in (("naive", ends), ("aligned", moved)):
            surfaces[name] = pg.loss_surface(
                *states, setting.evaluate, grid, model=model, prepare=setting.prepare, progress=step
            )
    heights: dict[str, list[float]] = {"naive": [], "aligned": [], "aligned at the end": []}
    final = finished(pg.align(ends[0], ends[1], spec=spec)).permutation
    with bar(where, f"{setting.name}: along training", len(trainings[0])) as step:
        for a, b in zip(trainings[0], trainings[1], strict=True):
            for name, p in (
                ("naive", spec.identity()),
                ("aligned", finished(pg.align(a, b, spec=spec)).permutation),
                ("aligned at the end", final),
            ):
                heights[name].append(setting.barrier(setting.network(a), p.apply(b), points).barrier)
            step()
    return Result(surfaces, [*keep, last], heights)


def round_levels(values: torch.Tensor) -> list[float]:
    """Round numbers from the lowest value to the highest tenth, about evenly spaced on a logarithmic scale.

    One scale for both planes, on which the valleys of the one can be told apart as well as the peaks of the other.
    """
    low, high = float(values.min()), float(values.quantile(0.9))
    every = [round(step * 10.0**power, 9) for power in range(-4, 4) for step in (1, 1.5, 2, 3, 5, 7)]
    inner = [level for level in every if low < level < high]
    return inner if len(inner) > 1 else [low, (low + high) / 2, high]


def main(given: Sequence[str] | None = None) -> dict[str, Result]:
    """Run the experiment and return what was found."""
    models = ("MLP", "ResNet", "DenseNet", "ViT", "Characters")
    parser = arguments(__doc__, models=models, seeds=(1, 2, 3), least=3, points=7)
    parser.add_argument("--grid", type=int, default=13, help="points of the plane in each direction (13)")
    options = parser.parse_args(given)
    where = console()
    every: dict[str, Result] = {}
    result = table(
        "Barriers in test loss over the triangle of three networks, and along the training of two",
        *("", "triangle", *(f"{share}" for share in ("start", "1 epoch", "2 epochs", "1/4", "1/2", "end"))),
        caption="Triangle: how far the loss rises above the plane of the three losses, inside their triangle.",
    )
    for setting in settings(options):
        found = every[setting.name] = run(setting, options.seeds[:3], options.points, options.grid, where)
        result.add_row(f"[bold]{setting.name}, width {setting.width}")
        places = [0, 1, 2, setting.epochs // 4, setting.epochs // 2, setting.epochs]
        for name, heights in found.heights.items():
            at = dict(zip(found.epochs, heights, strict=True))
            triangle = f"{found.surfaces[name].barrier:.3f}" if name in found.surfaces else ""
            result.add_row(name, triangle, *(f"{at[place]:.3f}" for place in places))
    result.show(where, options.out / "loss_surfaces.md", options)

    def draw(axes: list[Axes]) -> None:
        for column, found in enumerate(every.values()):
            values = torch.tensor([s.losses for s in found.surfaces.values()], dtype=torch.float64)
            levels = round_levels(values[torch.isfinite(values)])
            for row, (name, surface) in enumerate(found.surfaces.items()):
                ax = axes[row * len(every) + column]
                surface.plot(ax=ax, levels=levels)
                ax.set_title(f"{list(every)[column]}, {name}")

    figure(len(every), options.out / "loss_surfaces.png", draw, rows=2, grid=False)

    def draw_heights(axes: list[Axes]) -> None:
        for ax, (name, found) in zip(axes, every.items(), strict=True):
            for number, (kind, heights) in enumerate(found.heights.items()):
                line(ax, number, found.epochs, heights, kind)
            ax.set(title=name, xlabel="epoch")
        axes[0].set_ylabel("barrier in test loss")
        legend(axes)

    figure(len(every), options.out / "loss_surfaces_training.png", draw_heights)
    return every


if __name__ == "__main__":
    main()
