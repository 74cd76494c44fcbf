"""Which layers make the barrier? (Adilova et al. 2023, Singh et al. 2024)

One layer at a time goes from network A to network B, and back, while the rest stays at A: naively, and after weight
matching. The barrier is over the line between the losses of the two whole networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common import (
    Setting,
    arguments,
    bar,
    console,
    figure,
    finished,
    legend,
    line,
    mean_and_error,
    name_places,
    settings,
    table,
)
from matplotlib.axes import Axes
from rich.console import Console

import permgraph as pg

Found = dict[str, list[pg.LayerwiseBarriers]]
GROUPS: Mapping[str, Mapping[str, str | Sequence[str]]] = {
    "ResNet": {
        "stem": ["conv.*", "bn.*"],
        "stage1 conv1": ["stage1.0.conv1.*", "stage1.0.bn1.*"],
        "stage1 conv2": ["stage1.0.conv2.*", "stage1.0.bn2.*"],
        "stage1 shortcut": "stage1.0.shortcut.*",
        "stage2 conv1": ["stage2.0.conv1.*", "stage2.0.bn1.*"],
        "stage2 conv2": ["stage2.0.conv2.*", "stage2.0.bn2.*"],
        "stage2 shortcut": "stage2.0.shortcut.*",
        "head": "head.*",
    },
}


def run(setting: Setting, seeds: Sequence[int], points: int, where: Console) -> Found:
    """For naive and aligned pairs, the barriers of each layer for each seed."""
    with bar(where, f"{setting.name}: training", 2 * len(seeds) * setting.epochs) as step:
        pairs = [[setting.network(setting.train(s, step=step)[-1]) for s in (seed, seed + 1000)] for seed in seeds]
    found: Found = {"naive": [], "aligned": []}
    groups = GROUPS.get(setting.name)
    with bar(where, f"{setting.name}: layers", 2 * len(pairs)) as step:
        for a, b in pairs:
            for kind, end in (("naive", b), ("aligned", finished(pg.align(a, b)).model())):
                found[kind].append(
                    pg.layerwise_barriers(a, end, setting.evaluate, points, layers=groups, prepare=setting.recalibrate)
                )
                step()
    return found


def height(found: Sequence[pg.LayerwiseBarriers], layer: str) -> tuple[float, float]:
    """The mean barrier of one layer over seeds, and its standard error."""
    return mean_and_error([one.height(layer) for one in found])


def main(given: Sequence[str] | None = None) -> dict[str, Found]:
    """Run the experiment and return what was found."""
    options = arguments(__doc__, models=("MLP", "ResNet", "DenseNet", "ViT"), seeds=(1, 2, 3), points=7).parse_args(
        given
    )
    where = console()
    every: dict[str, Found] = {}
    result = table(
        f"Layerwise barriers in test loss, mean of seeds {' '.join(map(str, options.seeds))}",
        *("", "naive", "aligned", "loss with B's layer\nnaive", "loss with B's layer\naligned"),
        caption="Barrier of one layer that goes from A to B while the others stay at A, over the line between A and B.",
    )
    for setting in settings(options):
        found = every[setting.name] = run(setting, options.seeds, options.points, where)
        result.add_row(f"[bold]{setting.name}, width {setting.width}")
        for layer in found["naive"][0].paths:
            heights = [height(ones, layer) for ones in found.values()]
            hybrids = [mean_and_error([one.hybrid(layer) for one in ones]) for ones in found.values()]
            result.add_row(layer, *(f"{mean:.3f} ± {error:.3f}" for mean, error in (*heights, *hybrids)))
        whole = [mean_and_error([one.whole.barrier for one in ones]) for ones in found.values()]
        result.add_row("all at once", *(f"{mean:.3f} ± {error:.3f}" for mean, error in whole))
    result.show(where, options.out / "layer_barriers.md", options)

    def draw(axes: list[Axes]) -> None:
        for ax, (name, found) in zip(axes, every.items(), strict=True):
            layers = list(found["naive"][0].paths)
            for number, (kind, ones) in enumerate(found.items()):
                line(ax, number, range(len(layers)), [height(ones, layer)[0] for layer in layers], kind)
            name_places(ax, layers)
            ax.set(title=name, ylabel="barrier in test loss", ylim=(0, None))
        legend(axes)

    figure(len(every), options.out / "layer_barriers.png", draw)
    return every


if __name__ == "__main__":
    main()
