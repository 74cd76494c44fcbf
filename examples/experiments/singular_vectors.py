"""What weight matching does to singular values and vectors, and how it fares against STE with three models and more.

Ito et al. (2024), "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching": permutations hardly
bring two networks closer in L2 distance and leave singular values alone; what they do is align the singular vectors of
the large ones. Straight-through matching, which follows the loss, aligns them less: each network is then connected to
the one that it was matched to, but not to a third that was matched to the same.

Straight-through matching is run twice: as Ainsworth et al. (2022) do, from weight matching's permutation; and from
the network as it is, so that nothing of weight matching is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from common import (
    Setting,
    arguments,
    bar,
    console,
    figure,
    finished,
    label_rows,
    legend,
    line,
    mean_and_error,
    settings,
    table,
)
from matplotlib.axes import Axes
from rich.console import Console
from torch import Tensor

import permgraph as pg

THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def fast(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """An optimizer whose steps are large enough for other permutations to come nearest."""
    return torch.optim.Adam(parameters, lr=1e-2)


@dataclass(frozen=True)
class Result:
    """Spectra of the first pair, by what was done; and barriers among three networks, by matcher."""

    spectra: dict[str, pg.SpectralComparison]
    barriers: dict[str, tuple[tuple[float, float], tuple[float, float]]]
    accuracy: dict[str, float]


def run(setting: Setting, seeds: Sequence[int], points: int, epochs: int, where: Console) -> Result:
    """One architecture."""
    networks = setting.trained(seeds, where)
    spec = pg.auto_spec(networks[0])
    matchers = {
        "WM": pg.WeightMatching(),
        "STE": pg.StraightThrough(setting.batches(64), epochs=epochs, optimizer=fast),
        "STE from B": pg.StraightThrough(setting.batches(64), epochs=epochs, optimizer=fast, free_weights="b"),
    }
    first, second, *_ = networks
    spectra = {"naive": pg.compare_spectra(first, second)}
    barriers, accuracy = {}, {}
    states = {"naive": [network.state_dict() for network in networks]}
    with bar(where, f"{setting.name}: matching", len(matchers) * (len(networks) - 1)) as step:
        for name, matcher in matchers.items():
            states[name] = [states["naive"][0]]
            for network in networks[1:]:
                states[name].append(finished(pg.align(first, network, matcher, spec=spec)).state_dict)
                step()
            spectra[name] = pg.compare_spectra(first, states[name][1])
    with bar(where, f"{setting.name}: barriers", len(states)) as step:
        for name, brought in states.items():
            to_first = [setting.barrier(first, other, points).barrier for other in brought[1:]]
            others = [
                setting.barrier(setting.network(one), other, points).barrier
                for at, one in enumerate(brought)
                for other in brought[at + 1 :]
                if at > 0
            ]
            barriers[name] = mean_and_error(to_first), mean_and_error(others)
            merged = setting.prepare(setting.network(pg.average(brought)))
            accuracy[name] = setting.evaluate(merged)["accuracy"]
            step()
    return Result(spectra, barriers, accuracy)


def main(given: Sequence[str] | None = None) -> dict[str, Result]:
    """Run the experiment and return what was found."""
    models = ("MLP", "ResNet", "DenseNet", "ViT", "Characters")
    parser = arguments(__doc__, models=models, seeds=(1, 2, 3), least=3, points=7)
    parser.add_argument("--match-epochs", type=int, default=10, help="of straight-through matching (10)")
    options = parser.parse_args(given)
    where = console()
    every: dict[str, Result] = {}
    ways = ("naive", "WM", "STE", "from B")
    layers = table(
        "Singular vectors of networks 1 and 2: <A, B> over its greatest value for these singular values",
        *("", "distance", "least", *ways, "above 0.3:\nnaive", *ways[1:]),
        caption="Distance: L2, naive. Least: of the singular values alone. Above 0.3: of values of at least 0.3 times "
        "the layer's largest.",
    )
    merged = table(
        f"{len(options.seeds)} networks, each brought to the first",
        *("", "distance\nreduced", "alignment", "above 0.3", "barrier\nto the first", "among\nthe others"),
        *("accuracy\nof the mean",),
        caption="Barriers in test loss, means and standard errors. Distance and alignment: of networks 1 and 2.",
    )
    for setting in settings(options):
        found = every[setting.name] = run(setting, options.seeds, options.points, options.match_epochs, where)
        layers.add_row(f"[bold]{setting.name}, width {setting.width}")
        for layer, before in found.spectra["naive"].layers.items():
            ratios = [
                f"{comparison.layers[layer].alignment(above):.3f}"
                for above in (0.0, 0.3)
                for comparison in found.spectra.values()
            ]
            layers.add_row(layer, f"{before.distance:.2f}", f"{before.least_distance:.2f}", *ratios)
        merged.add_row(f"[bold]{setting.name}, width {setting.width}")
        for name, comparison in found.spectra.items():
            ratios = [f"{comparison.alignment(above):.3f}" for above in (0.0, 0.3)]
            heights = [f"{mean:.3f} ± {error:.3f}" for mean, error in found.barriers[name]]
            reduced = f"{found.spectra['naive'].reduction(comparison):.1%}"
            merged.add_row(name, reduced, *ratios, *heights, f"{found.accuracy[name]:.3f}")
    layers.show(where, options.out / "singular_vectors_layers.md", options)
    merged.show(where, options.out / "singular_vectors.md", options)

    def draw(axes: list[Axes]) -> None:
        for ax, (model, found) in zip(axes, every.items(), strict=True):
            for number, (name, comparison) in enumerate(found.spectra.items()):
                line(ax, number, THRESHOLDS, [comparison.alignment(above) for above in THRESHOLDS], name)
            ax.set(title=model, xlabel="singular values above this share of the largest", ylim=(-0.1, 1.02))
        label_rows(axes, "alignment of singular vectors")
        legend(axes)

    figure(len(every), options.out / "singular_vectors.png", draw)
    return every


if __name__ == "__main__":
    main()
