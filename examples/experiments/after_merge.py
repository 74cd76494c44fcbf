"""After the merge: what recalibrating BatchNorm and REPAIR bring back, with every kind of normalisation.

Two networks are averaged half-way, naively and after weight matching. Averaged weights give activations of too little
variance (Jordan et al. 2023, "REPAIR: REnormalizing Permuted Activations for Interpolation Repair"). Where there is
BatchNorm, resetting its statistics to the data's mends that; REPAIR does the same for every linear and convolution
layer of any network, and folds it into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from common import Setting, arguments, bar, console, figure, mean_and_error, settings, table
from matplotlib.axes import Axes
from rich.console import Console

import permgraph as pg

TREATMENTS = ("as averaged", "BatchNorm reset", "REPAIR")
SHORT = {"as averaged": "averaged", "BatchNorm reset": "reset", "REPAIR": "REPAIR"}
COLOURS = {"as averaged": "#56B4E9", "BatchNorm reset": "#E69F00", "REPAIR": "#0072B2"}
HATCHES = {"as averaged": "", "BatchNorm reset": "//", "REPAIR": ".."}
MODELS = ("ConvBatchNorm", "ResNet", "ConvLayerNorm", "ViT", "Characters", "ConvGroupNorm", "DenseNet", "Conv", "MLP")


@dataclass(frozen=True)
class Result:
    """Test metrics of one architecture, for each pair: of the two ends, and of each treatment of the middle."""

    ends: list[dict[str, float]]
    middles: Mapping[tuple[str, str], list[dict[str, float]]]

    def mean(self, kind: str, treatment: str, metric: str) -> float:
        """The mean over pairs."""
        return mean_and_error([found[metric] for found in self.middles[kind, treatment]])[0]

    def recovered(self, kind: str, treatment: str) -> float:
        """The share of the accuracy lost in the middle that a treatment brings back."""
        end = mean_and_error([found["accuracy"] for found in self.ends])[0]
        lost = end - self.mean(kind, "as averaged", "accuracy")
        return (self.mean(kind, treatment, "accuracy") - self.mean(kind, "as averaged", "accuracy")) / lost


def run(setting: Setting, seeds: Sequence[int], where: Console) -> Result:
    """Every treatment of every pair."""
    networks = setting.trained([s for seed in seeds for s in (seed, seed + 1000)], where)
    pairs = list(zip(networks[::2], networks[1::2], strict=True))
    ends = [setting.evaluate(network) for network in networks]
    middles: dict[tuple[str, str], list[dict[str, float]]] = {}
    with bar(where, f"{setting.name}: middles", 2 * len(pairs)) as step:
        for a, b in pairs:
            for kind, other in (("naive", b), ("aligned", pg.align(a, b).model())):
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
    options = arguments(__doc__, models=MODELS, seeds=(1, 2, 3)).parse_args(given)
    where = console()
    every: dict[str, Result] = {}
    result = table(
        f"Test accuracy half-way, mean of {len(options.seeds)} pairs, and loss in brackets",
        *("", "ends", *(f"{kind}\n{SHORT[treatment]}" for kind in ("naive", "aligned") for treatment in TREATMENTS)),
        "recovered",
        caption="Reset: of BatchNorm's statistics. Recovered: the share of the accuracy lost half-way after alignment "
        "that REPAIR brings back.",
    )
    for setting in settings(options):
        found = every[setting.name] = run(setting, options.seeds, where)
        cells = [
            f"{found.mean(kind, treatment, 'accuracy'):.3f} ({found.mean(kind, treatment, 'loss'):.2f})"
            if setting.recipe.batchnorm or treatment != "BatchNorm reset"
            else "-"
            for kind in ("naive", "aligned")
            for treatment in TREATMENTS
        ]
        end = mean_and_error([found["accuracy"] for found in found.ends])[0]
        lost = end - found.mean("aligned", "as averaged", "accuracy")
        share = f"{found.recovered('aligned', 'REPAIR'):.0%}" if lost > 0.005 else "-"
        result.add_row(f"{setting.name}, {setting.width}", f"{end:.3f}", *cells, share)
    result.show(where, options.out / "after_merge.md", options)

    def draw(axes: list[Axes]) -> None:
        places = torch.arange(len(every), dtype=torch.float64)
        for ax, kind in zip(axes, ("naive", "aligned"), strict=True):
            for number, treatment in enumerate(TREATMENTS):
                heights = [found.mean(kind, treatment, "accuracy") for found in every.values()]
                ax.barh(
                    (places + 0.27 * (number - 1)).tolist(),
                    heights,
                    0.25,
                    color=COLOURS[treatment],
                    hatch=HATCHES[treatment],
                    edgecolor="white",
                    label=treatment,
                )
            ends = [mean_and_error([e["accuracy"] for e in found.ends])[0] for found in every.values()]
            ax.plot(ends, places, linestyle="none", marker="|", color="black", markersize=16, label="ends")
            ax.set_yticks(places.tolist(), list(every))
            ax.invert_yaxis()
            ax.set(title=kind, xlabel="test accuracy half-way", xlim=(0, 1.02))
        # Above the title, where no bar can run through it.
        axes[0].legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.08), ncols=4, fontsize=8)

    figure(2, options.out / "after_merge.png", draw)
    return every


if __name__ == "__main__":
    main()
