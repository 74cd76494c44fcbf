"""Two networks that never saw each other's data: their merge, next to what else one could do (Ainsworth et al. 2022).

The training data are divided by class: the first network sees 80 % of the examples of the first half of the classes and
20 % of the others, and the second one the rest. Test loss, accuracy and calibration of their naive average, their
average after weight matching (with REPAIR too), the ensemble of their logits, and a network trained on everything. With
`--symmetry general` also the averages after matching over the whole group, by weights and learned, which like REPAIR
takes the training data of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from common import (
    Setting,
    arguments,
    bar,
    console,
    figure,
    finished,
    legend,
    line,
    logarithmic,
    mean_and_error,
    settings,
    table,
)
from matplotlib.axes import Axes
from networks import Batch
from rich.console import Console
from torch import Tensor, nn

import permgraph as pg

METRICS = ("loss", "accuracy", "calibration")
Found = dict[str, list[dict[str, float]]]


class Ensemble(nn.Module):
    """The mean of two networks' logits."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([network(x) for network in self.networks]).mean(0)


def divide(data: Batch, share: float) -> tuple[Batch, Batch]:
    """The data in two parts: the first has this share of the lower half of the classes, the second of the upper."""
    inputs, labels = data
    lower = labels < (int(labels.max()) + 1) / 2
    chance = torch.rand(len(labels), generator=torch.Generator().manual_seed(0))
    first = torch.where(lower, chance < share, chance >= share)
    return (inputs[first], labels[first]), (inputs[~first], labels[~first])


def over_whole_group(setting: Setting, a: nn.Module, b: nn.Module, steps: int) -> dict[str, nn.Module]:
    """B brought to A over the whole group, by weights and learned on the data of both."""
    spec = pg.auto_spec(a, symmetry="general", example_inputs=(setting.test[0][:2],))
    whole = finished(pg.align(a, b, spec=spec))
    learned = finished(pg.align(a, b, pg.LearnedMatching(setting.batches(128), steps=steps, init=whole), spec=spec))
    return {"whole group": whole.model(), "whole group, learned": learned.model()}


def run(
    setting: Setting, seeds: Sequence[int], share: float, points: int, where: Console, steps: int = 0
) -> tuple[Found, list]:
    """Every way to use both data sets; and the paths between the first pair. Over the whole group with `steps`."""
    parts = [replace(setting, data=part) for part in divide(setting.data, share)]
    evaluate = pg.evaluate_on([setting.test], bins=15)
    found: Found = {}
    paths: list[tuple[str, pg.Barrier]] = []
    with bar(where, f"{setting.name}: training", 3 * len(seeds) * setting.epochs) as step:
        trained = [
            (
                *(
                    part.network(part.train(seed + 100 * n, tag=f"-part{n}-{share:g}", step=step)[-1])
                    for n, part in enumerate(parts)
                ),
                setting.network(setting.train(seed, step=step)[-1]),
            )
            for seed in seeds
        ]
    with bar(where, f"{setting.name}: merging", len(seeds)) as step:
        for a, b, whole in trained:
            aligned = finished(pg.align(a, b)).model()
            middles = [setting.network(pg.interpolate(a, other, 0.5)) for other in (b, aligned)]
            further = over_whole_group(setting, a, b, steps) if steps else {}
            general: dict[str, Callable[[], nn.Module]] = {}
            for name, other in further.items():
                middle = setting.network(pg.interpolate(a, other, 0.5))
                general[name] = lambda m=middle: setting.prepare(m)
                general[f"{name}, REPAIR"] = lambda m=middle, a=a, o=other: pg.repair(m, setting.loader, (a, o))
            ways: Mapping[str, Callable[[], nn.Module]] = {
                "first network": lambda a=a: a,
                "second network": lambda b=b: b,
                "naive average": lambda m=middles[0]: setting.prepare(m),
                "merged": lambda m=middles[1]: setting.prepare(m),
                "merged, REPAIR": lambda m=middles[1], a=a, o=aligned: pg.repair(m, setting.loader, (a, o)),
                **general,
                "ensemble": lambda a=a, b=b: Ensemble(a, b).eval(),
                "trained on everything": lambda whole=whole: whole,
            }
            for name, way in ways.items():
                found.setdefault(name, []).append(evaluate(way()))
            if not paths:
                paths += [
                    (name, pg.barrier(a, other, evaluate, points, prepare=setting.prepare))
                    for name, other in (("naive", b), ("aligned", aligned), *further.items())
                ]
            step()
    return found, paths


def main(given: Sequence[str] | None = None) -> dict[str, Found]:
    """Run the experiment and return what was found."""
    parser = arguments(__doc__, models=("MLP", "ResNet", "DenseNet", "ViT"), seeds=(1, 2, 3))
    parser.add_argument("--share", type=float, default=0.8, help="of its own classes that a network sees (0.8)")
    parser.add_argument("--symmetry", choices=("permutation", "general"), default="permutation", help="(permutation)")
    parser.add_argument("--steps", type=int, default=400, help="of learning over general symmetries (400)")
    options = parser.parse_args(given)
    where, steps = console(), options.steps if options.symmetry == "general" else 0
    every: dict[str, Found] = {}
    drawn = {}
    result = table(
        f"Two networks trained on disjoint data, mean of {len(options.seeds)} pairs",
        *("", "test loss", "accuracy", "calibration\nerror"),
        caption="Calibration error: expected, over 15 bins of confidence.",
    )
    for setting in settings(options):
        every[setting.name], drawn[setting.name] = run(
            setting, options.seeds, options.share, options.points, where, steps
        )
        result.add_row(f"[bold]{setting.name}, width {setting.width}")
        for name, ones in every[setting.name].items():
            figures = [mean_and_error([one[metric] for one in ones]) for metric in METRICS]
            result.add_row(name, *(f"{mean:.3f} ± {error:.3f}" for mean, error in figures))
    result.show(where, options.out / "disjoint.md", options)

    def draw(axes: list[Axes]) -> None:
        for ax, (model, paths) in zip(axes, drawn.items(), strict=True):
            for number, (name, path) in enumerate(paths):
                line(ax, number, path.alphas, path.losses, name)
            for name, style in (("ensemble", "--"), ("trained on everything", ":")):
                ax.axhline(every[model][name][0]["loss"], color="black", linestyle=style, linewidth=1, label=name)
            ax.set(title=model, xlabel="position on the line from A to B")
            logarithmic(ax)
        axes[0].set_ylabel("test loss")
        legend(axes)

    figure(len(every), options.out / "disjoint.png", draw)
    return every


if __name__ == "__main__":
    main()
