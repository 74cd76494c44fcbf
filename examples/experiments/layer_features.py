"""Are the features of the network between two networks the features between? (Zhou et al. 2023)

At each layer, the features of the interpolated network are compared with the interpolated features: their cosine, and
the scale between them. Three kinds of pair are measured: spawned ones, which part after some epochs of common
training; independent ones as they are; and independent ones after weight matching.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common import Setting, arguments, bar, console, figure, finished, legend, line, name_places, settings, table
from matplotlib.axes import Axes
from rich.console import Console
from torch import Tensor, nn

import permgraph as pg

Found = dict[str, list[pg.FeatureConnectivity]]


def run(setting: Setting, seeds: Sequence[int], together: int, where: Console) -> Found:
    """For each kind of pair, what was found for each seed."""
    found: Found = {"spawned": [], "independent": [], "aligned": []}
    epochs = setting.epochs
    with bar(where, f"{setting.name}: training", len(seeds) * (4 * epochs + together)) as step:
        pairs = []
        for seed in seeds:
            a, b = (setting.network(setting.train(s, step=step)[-1]) for s in (seed, seed + 1000))
            root = setting.network(setting.train(seed, epochs=together, tag="-root", step=step)[-1])
            tag = f"-spawned{seed}-at{together}"
            spawned = [
                setting.network(setting.train(seed + child, start=root, tag=tag, step=step)[-1])
                for child in (2000, 3000)
            ]
            pairs.append((a, b, *spawned))
    with bar(where, f"{setting.name}: features", 3 * len(seeds)) as step:
        for a, b, first, second in pairs:
            aligned = finished(pg.align(a, b)).state_dict
            ends: list[tuple[str, nn.Module, nn.Module | Mapping[str, Tensor]]] = [
                ("spawned", first, second),
                ("independent", a, b),
                ("aligned", a, aligned),
            ]
            for kind, one, other in ends:
                found[kind].append(pg.feature_connectivity(one, other, [setting.test], prepare=setting.prepare))
                step()
    return found


def mean(found: Sequence[pg.FeatureConnectivity], layer: str, what: str) -> float:
    """The mean over seeds of one figure at one layer."""
    return sum(getattr(one.layers[layer], what) for one in found) / len(found)


def main(given: Sequence[str] | None = None) -> dict[str, Found]:
    """Run the experiment and return what was found."""
    parser = arguments(__doc__, models=("MLP", "ResNet", "DenseNet", "ViT"), seeds=(1, 2, 3), points=None)
    parser.add_argument("--together", type=int, default=3, help="epochs before spawned pairs part (3)")
    options = parser.parse_args(given)
    where = console()
    every: dict[str, Found] = {}
    names: dict[str, list[str]] = {}
    kinds = ("spawned", "independent", "aligned")
    result = table(
        f"Layerwise linear feature connectivity in the middle, mean of seeds {' '.join(map(str, options.seeds))}",
        *("", *(f"cosine\n{kind}" for kind in kinds), *(f"scale\n{kind}" for kind in kinds), "cosine of\nindep. ends"),
        caption="Cosine and scale of the features of the interpolated network against the interpolated features.",
    )
    for setting in settings(options):
        found = every[setting.name] = run(setting, options.seeds, options.together, where)
        result.add_row(f"[bold]{setting.name}, width {setting.width}")
        names[setting.name] = leaves(setting, found)
        for layer in names[setting.name]:
            cosines = [f"{mean(found[kind], layer, 'cosine'):.3f}" for kind in kinds]
            scales = [f"{mean(found[kind], layer, 'scale'):.3f}" for kind in kinds]
            result.add_row(layer, *cosines, *scales, f"{mean(found['independent'], layer, 'cosine_ends'):.3f}")
    result.show(where, options.out / "layer_features.md", options)

    def draw(axes: list[Axes]) -> None:
        for ax, (name, found) in zip(axes, every.items(), strict=True):
            layers = names[name]
            for number, kind in enumerate(kinds):
                cosines = [mean(found[kind], layer, "cosine") for layer in layers]
                line(ax, number, range(len(layers)), cosines, kind)
            name_places(ax, layers)
            ax.set(title=name, ylabel="cosine", ylim=(0, 1.05))
        legend(axes)

    figure(len(every), options.out / "layer_features.png", draw)
    return every


def leaves(setting: Setting, found: Found) -> list[str]:
    """The layers to print: those without others inside."""
    network = setting.build()
    inner = {name for name, module in network.named_modules() if not list(module.children())}
    return [name for name in found["spawned"][0].layers if name in inner]


if __name__ == "__main__":
    main()
