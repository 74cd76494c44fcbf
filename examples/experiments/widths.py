"""Width: the barrier between two networks, and the accuracy of averages of several, naive and aligned.

Wider networks are closer to being linearly connected up to permutation (Entezari et al. 2021, Ainsworth et al. 2022).
For each width a set of networks is trained from different seeds. Barriers are measured between neighbours in the set,
before and after weight matching; and the set is averaged, as it is and after cycle-consistent matching. Of the set
so matched, the highest barrier among the first three is the strong claim of Sharma et al. (2024): one permutation each.

Narrow networks learn slowly, and a barrier over ends that have learnt little is small. So networks narrower than 32 are
trained for more epochs, in inverse proportion to their width, and their training loss stands in the table.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from common import (
    COLOURS,
    MARKERS,
    Setting,
    arguments,
    bar,
    console,
    figure,
    finished,
    legend,
    mean_and_error,
    settings,
    table,
)
from matplotlib.axes import Axes
from rich.console import Console

import permgraph as pg

WIDTHS = {
    "Plane": (4, 8, 16, 32, 64, 128),
    "MLP": (8, 16, 32, 64, 128, 256),
    "ResNet": (4, 8, 16, 32),
    "DenseNet": (4, 8, 16, 32),
    "ViT": (16, 32, 64),
}
FULL = 32
"""From this width on, a recipe's epochs suffice."""
Figure = tuple[float, float]
"""A mean and its standard error."""


@dataclass(frozen=True)
class Row:
    """What was found at one width."""

    width: int
    epochs: int
    training_loss: float
    naive: Figure
    aligned: Figure
    three: float
    single: float
    mean_naive: float
    mean_aligned: float


def run(setting: Setting, seeds: Sequence[int], points: int, where: Console) -> Row:
    """One architecture at one width."""
    networks = setting.trained(seeds, where)
    spec = pg.auto_spec(networks[0])
    pairs = list(itertools.pairwise([*networks, networks[0]])) if len(networks) > 2 else [(networks[0], networks[1])]
    naive, aligned = [], []
    three = float("nan")
    with bar(where, f"{setting.name} {setting.width}: barriers", len(pairs) + 1) as step:
        for a, b in pairs:
            naive.append(setting.barrier(a, b, points).barrier)
            aligned.append(setting.barrier(a, finished(pg.align(a, b, spec=spec)).state_dict, points).barrier)
            step()
        merged = finished(pg.merge(networks, spec=spec))
        if len(networks) > 2:
            claim = pg.strong_connectivity(
                networks[:3], merged.permutations[:3], setting.evaluate, 0.0, points, prepare=setting.prepare
            )
            three = claim.highest
        accuracies = [
            setting.evaluate(setting.prepare(setting.network(state)))["accuracy"]
            for state in (pg.average(networks), merged.state_dict)
        ]
        step()
    single = mean_and_error([setting.evaluate(network)["accuracy"] for network in networks])[0]
    fitted = mean_and_error([pg.evaluate_on(setting.loader)(network)["loss"] for network in networks])[0]
    barriers = mean_and_error(naive), mean_and_error(aligned)
    return Row(setting.width, setting.epochs, fitted, *barriers, three, single, *accuracies)


def main(given: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """Run the experiment and return what was found."""
    parser = arguments(__doc__, models=("Plane", "MLP", "ResNet"), seeds=(1, 2, 3, 4, 5), least=2, points=7)
    parser.add_argument("--widths", type=int, nargs="+", help="of the networks (default: each architecture's own)")
    parser.add_argument("--longest", type=int, default=8, help="so many times the epochs at most, where narrow (8)")
    options = parser.parse_args(given)
    where = console()
    every: dict[str, list[Row]] = {}
    count = len(options.seeds)
    result = table(
        f"Barriers in test loss over pairs of {count} networks, and test accuracy of their average, against width",
        *("width", "epochs", "training\nloss", "barrier\nnaive", "barrier\naligned", "of three", "single"),
        *(f"average of {count}\nnaive", "aligned"),
        caption="Barriers: mean and its standard error. Of three: the highest among three, one permutation each.",
    )
    for setting in settings(options):
        result.add_row(f"[bold]{setting.name}")
        for width in options.widths or WIDTHS.get(setting.name, (setting.width // 2, setting.width)):
            longer = max(1, min(options.longest, FULL // width))
            row = run(
                replace(setting, width=width, epochs=longer * setting.epochs), options.seeds, options.points, where
            )
            every.setdefault(setting.name, []).append(row)
            barriers = [f"{mean:.3f} ± {error:.3f}" for mean, error in (row.naive, row.aligned)]
            values = (row.three, row.single, row.mean_naive, row.mean_aligned)
            last = [f"{value:.3f}" if value == value else "" for value in values]
            result.add_row(str(width), str(row.epochs), f"{row.training_loss:.3f}", *barriers, *last)
    result.show(where, options.out / "widths.md", options)

    def draw(axes: list[Axes]) -> None:
        for column, (name, rows) in enumerate(every.items()):
            above, below = axes[column], axes[len(every) + column]
            widths = [row.width for row in rows]
            for number, (label, values) in enumerate(
                (("naive", [row.naive for row in rows]), ("aligned", [row.aligned for row in rows]))
            ):
                above.errorbar(
                    widths,
                    [mean for mean, _ in values],
                    [error for _, error in values],
                    color=COLOURS[number],
                    marker=MARKERS[number],
                    linestyle=("-", "--")[number],
                    capsize=3,
                    label=label,
                )
            for number, (label, heights) in enumerate(
                (
                    ("naive", [row.mean_naive for row in rows]),
                    ("aligned", [row.mean_aligned for row in rows]),
                    ("single network", [row.single for row in rows]),
                )
            ):
                below.plot(
                    widths,
                    heights,
                    color=COLOURS[number],
                    marker=MARKERS[number],
                    linestyle=("-", "--", ":")[number],
                    label=label,
                )
            above.set(title=name, ylabel="barrier in test loss", ylim=(0, None))
            below.set(xlabel="width", ylabel="accuracy of the average", ylim=(0, 1.02))
            for ax in (above, below):
                ax.set_xscale("log", base=2)
                ax.set_xticks(widths, [str(width) for width in widths])
        legend(axes)

    figure(len(every), options.out / "widths.png", draw, rows=2)
    return every


if __name__ == "__main__":
    main()
