"""After the merge: what recalibrating BatchNorm and REPAIR bring back, with every kind of normalisation.

Two networks are averaged half-way, naively and after weight matching. Averaged weights give activations of too little
variance (Jordan et al. 2023, "REPAIR: REnormalizing Permuted Activations for Interpolation Repair"). Where there is
BatchNorm, resetting its statistics to the data's mends that; REPAIR does the same for every linear and convolution
layer of any network, and folds it into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common import RECIPES, Setting, arguments, bar, console, figure, finished, legend, mean_and_error, settings, table
from matplotlib.axes import Axes
from rich.console import Console

import permgraph as pg

TREATMENTS = ("as averaged", "BatchNorm reset", "REPAIR")
COLOURS = {"as averaged": "#E69F00", "BatchNorm reset": "#56B4E9", "REPAIR": "#0072B2"}
MARKERS = {"as averaged": "o", "BatchNorm reset": "s", "REPAIR": "^"}
KINDS = ("naive", "aligned")
MODELS = ("ConvBatchNorm", "ResNet", "ConvLayerNorm", "ViT", "Characters", "ConvGroupNorm", "DenseNet", "Conv", "MLP")


@dataclass(frozen=True)
class Result:
    """Test metrics of one architecture, for each pair: of the two ends, and of each treatment of the middle."""

    ends: list[dict[str, float]]
    middles: Mapping[tuple[str, str], list[dict[str, float]]]

    @property
    def end(self) -> float:
        """The mean accuracy of the networks that were averaged."""
        return mean_and_error([found["accuracy"] for found in self.ends])[0]

    def figure(self, kind: str, treatment: str, metric: str) -> tuple[float, float]:
        """The mean over pairs, and its standard error."""
        return mean_and_error([found[metric] for found in self.middles[kind, treatment]])

    def mean(self, kind: str, treatment: str, metric: str) -> float:
        """The mean over pairs."""
        return self.figure(kind, treatment, metric)[0]

    def lost(self, kind: str) -> float:
        """The accuracy that is lost in the middle."""
        return self.end - self.mean(kind, "as averaged", "accuracy")

    def recovered(self, kind: str, treatment: str) -> float:
        """The share of it that a treatment brings back."""
        return 1 - (self.end - self.mean(kind, treatment, "accuracy")) / self.lost(kind)


def run(setting: Setting, seeds: Sequence[int], where: Console) -> Result:
    """Every treatment of every pair."""
    networks = setting.trained([s for seed in seeds for s in (seed, seed + 1000)], where)
    pairs = list(zip(networks[::2], networks[1::2], strict=True))
    ends = [setting.evaluate(network) for network in networks]
    middles: dict[tuple[str, str], list[dict[str, float]]] = {}
    with bar(where, f"{setting.name}: middles", 2 * len(pairs)) as step:
        for a, b in pairs:
            for kind, other in zip(KINDS, (b, finished(pg.align(a, b)).model()), strict=True):
                middle = setting.network(pg.interpolate(a, other, 0.5))
                for treatment, network in (
                    ("as averaged", middle),
                    ("BatchNorm reset", pg.recalibrate_batchnorm(middle, setting.loader)),
                    ("REPAIR", pg.repair(middle, setting.loader, parents=(a, other))),
                ):
                    middles.setdefault((kind, treatment), []).append(setting.evaluate(network))
                step()
    return Result(ends, middles)


def main(given: Sequence[str] | None = None) -> dict[str, Result]:
    """Run the experiment and return what was found."""
    options = arguments(__doc__, models=MODELS, seeds=(1, 2, 3), points=None).parse_args(given)
    where = console()
    every: dict[str, Result] = {}
    result = table(
        f"Test accuracy half-way, mean of {len(options.seeds)} pairs and standard error, and loss",
        *("", "as averaged", "loss", "BatchNorm reset", "loss", "REPAIR", "loss", "recovered"),
        caption="Reset: of BatchNorm's statistics. Recovered: the share of the lost accuracy that REPAIR brings back.",
    )
    for setting in settings(options):
        found = every[setting.name] = run(setting, options.seeds, where)
        result.add_row(f"[bold]{setting.name}, width {setting.width}, ends {found.end:.3f}")
        for kind in KINDS:
            cells = []
            for treatment in TREATMENTS:
                shown = setting.recipe.batchnorm or treatment != "BatchNorm reset"
                mean, error = found.figure(kind, treatment, "accuracy")
                loss = found.mean(kind, treatment, "loss")
                cells += [f"{mean:.3f} ± {error:.3f}", f"{loss:.2f}"] if shown else ["", ""]
            share = f"{found.recovered(kind, 'REPAIR'):.0%}" if found.lost(kind) > 0.005 else ""
            result.add_row(kind, *cells, share)
    result.show(where, options.out / "after_merge.md", options)

    def draw(axes: list[Axes]) -> None:
        places = list(range(len(every)))
        for ax, kind in zip(axes, KINDS, strict=True):
            for place, found in zip(places, every.values(), strict=True):
                heights = [found.mean(kind, treatment, "accuracy") for treatment in TREATMENTS]
                ax.plot([min(heights), found.end], [place, place], color="0.8", zorder=0)
            for treatment in TREATMENTS:
                at = [n for n in places if treatment != "BatchNorm reset" or RECIPES[list(every)[n]].batchnorm]
                heights = [list(every.values())[n].mean(kind, treatment, "accuracy") for n in at]
                how = {"color": COLOURS[treatment], "marker": MARKERS[treatment], "label": treatment}
                ax.plot(heights, at, linestyle="none", markersize=7, markeredgecolor="white", **how)
            ends = [found.end for found in every.values()]
            ax.plot(ends, places, linestyle="none", marker="|", color="black", markersize=13, label="ends")
            ax.set_yticks(places, list(every) if kind == "naive" else [""] * len(places))
            ax.invert_yaxis()
            ax.set(title=kind, xlabel="test accuracy half-way", xlim=(0, 1.03))
        legend(axes)

    figure(2, options.out / "after_merge.png", draw)
    return every


if __name__ == "__main__":
    main()
