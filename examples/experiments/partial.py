"""Two networks of disjoint classes in one, of 1 to 2 times their width (Stoica et al. 2024; Nasery et al. 2025).

The first network sees the lower half of the classes only, the second one the upper half. They are averaged as they are,
and after alignment; with REPAIR, and with layers fitted by least squares; and merged in part, so that units that
correspond least are kept apart, with BatchNorm recalibrated and with least squares. Test accuracy among all classes,
and where it is known of which half an image is; next to the ensemble of the logits, which takes both networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from common import Setting, arguments, bar, console, finished, mean_and_error, settings, table
from disjoint import Ensemble
from networks import Batch
from rich.console import Console
from torch import Tensor, nn

import permgraph as pg

Found = dict[str, list[dict[str, float]]]


def half(data: Batch, upper: bool) -> Batch:
    """The examples of one half of the classes."""
    inputs, labels = data
    chosen = (labels >= 5) == upper
    return inputs[chosen], labels[chosen]


@torch.no_grad()
def accuracies(network: nn.Module, test: Batch) -> dict[str, float]:
    """Accuracy among all ten classes, and among the five of the half that the image is of."""
    inputs, labels = test
    logits = network(inputs)
    known = (labels >= 5)[:, None] == (torch.arange(10) >= 5)
    among: Mapping[str, Tensor] = {"joint": logits, "task": logits.masked_fill(~known, -torch.inf)}
    return {name: float((of.argmax(1) == labels).double().mean()) for name, of in among.items()}


def run(setting: Setting, seeds: Sequence[int], widths: Sequence[float], where: Console) -> Found:
    """Every way, for every pair of networks."""
    parts = [replace(setting, data=half(setting.data, upper)) for upper in (False, True)]
    found: Found = {}
    with bar(where, f"{setting.name}: training", 2 * len(seeds) * setting.epochs) as step:
        pairs = [
            [part.network(part.train(seed + 100 * n, tag=f"-half{n}", step=step)[-1]) for n, part in enumerate(parts)]
            for seed in seeds
        ]
    with bar(where, f"{setting.name}: merging", len(seeds)) as step:
        for a, b in pairs:
            aligned = finished(pg.align(a, b)).model()
            naive, middle = (setting.network(pg.interpolate(a, other, 0.5)) for other in (b, aligned))
            ways: dict[str, Callable[[], nn.Module]] = {
                "one network alone": lambda a=a: a,
                "average": lambda m=naive: setting.recalibrate(m),
                "aligned": lambda m=middle: setting.recalibrate(m),
                "aligned, REPAIR": lambda m=middle, a=a, o=aligned: pg.repair(m, setting.loader, (a, o)),
            }
            for name, m, other in (("least squares", naive, b), ("aligned, least squares", middle, aligned)):
                fit = partial(pg.least_squares, m, setting.loader, (a, other))
                ways[f"{name} on the parents' inputs"] = partial(fit, inputs="parents")
                ways[name] = fit
            for width in widths:
                some = pg.partial_merge(a, b, width=width, loader=setting.loader)
                ways[f"{width:g}x"] = lambda p=some: setting.recalibrate(p.model())
                fit = partial(some.least_squares, setting.loader)
                ways[f"{width:g}x, least squares on the parents' inputs"] = partial(fit, inputs="parents")
                ways[f"{width:g}x, least squares"] = fit
            ways["ensemble"] = lambda a=a, b=b: Ensemble(a, b).eval()
            for name, way in ways.items():
                found.setdefault(name, []).append(accuracies(way(), setting.test))
            step()
    return found


def main(given: Sequence[str] | None = None) -> dict[str, Found]:
    """Run the experiment and return what was found."""
    parser = arguments(__doc__, models=("MLP", "ResNet", "ViT"), seeds=(1, 2, 3), points=None)
    parser.add_argument("--widths", type=float, nargs="+", default=[1.25, 1.5, 2.0], help="of the merge (1.25 1.5 2)")
    options = parser.parse_args(given)
    where = console()
    every: dict[str, Found] = {}
    result = table(
        f"Two networks of five classes each in one, mean of {len(options.seeds)} pairs and standard error",
        *("", "accuracy among all", "where the half is known"),
    )
    for setting in settings(options):
        found = every[setting.name] = run(setting, options.seeds, options.widths, where)
        result.add_row(f"[bold]{setting.name}, width {setting.width}")
        for way, ones in found.items():
            cells = [mean_and_error([one[part] for one in ones]) for part in ("joint", "task")]
            result.add_row(way, *(f"{mean:.3f} ± {error:.3f}" for mean, error in cells))
    result.show(where, options.out / "partial.md", options)
    return every


if __name__ == "__main__":
    main()
