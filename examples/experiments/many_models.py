"""Merge more and more networks, and see what is left of them.

Networks of each architecture are trained from different seeds and averaged: as they are, each brought to the first, by
MergeMany (Ainsworth et al. 2022) and by cycle-consistent matching (Crisostomi et al. 2024), by coordinate ascent and by
Frank-Wolfe. The mean is then the centre of a star: the barriers from it to each network are measured too, and those
from a centre trained to be connected to all (Sonthalia et al. 2024). Last, what goes wrong where each pair is matched
by itself: the share of units that does not come back after a cycle of three. With `--symmetry general` all is over the
whole group, and what is learned is there too: each network's way to the first, or to the mean of those before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from common import Setting, arguments, bar, console, figure, finished, legend, line, settings, table
from matplotlib.axes import Axes
from rich.console import Console
from torch import nn

import permgraph as pg

METHODS: dict[str, pg.MergeMethod | None] = {
    "naive": None,
    "to the first": pg.ToReference(),
    "MergeMany": pg.MergeMany(),
    "cycle-consistent": pg.CycleConsistent(),
    "Frank-Wolfe": pg.FrankWolfeMany(),
}
STAR = "star"
"""The trained centre, which is no method of merging."""


LEARNED: dict[str, Callable[[pg.LearnedMatching], pg.MergeMethod]] = {
    "learned, to the first": lambda matcher: pg.ToReference(matcher=matcher),
    "learned, joining": lambda matcher: pg.Joining(matcher),
}
"""Ways to bring networks together over general symmetries, learned."""


@dataclass(frozen=True)
class Row:
    """One method on so many networks."""

    method: str
    count: int
    objective: float
    loss: float
    accuracy: float
    star: float | None
    cycle: float | None
    seconds: float


def trained_star(
    setting: Setting, networks: Sequence[nn.Module], spec: pg.PermutationSpec, points: int, epochs: int
) -> Row:
    """A centre trained to be connected to all networks, which are cycle-consistently matched beforehand."""
    began = time.perf_counter()
    merged = finished(pg.merge(networks, spec=spec))
    moved = [p.apply(n.state_dict()) for p, n in zip(merged.elements, networks, strict=True)]
    trained = finished(pg.fit_star(moved, setting.batches(128), model=networks[0], epochs=epochs))
    centre = setting.prepare(setting.network(trained.state_dict))
    claim = pg.star_connectivity(
        centre, moved, None, setting.evaluate, 0.0, points, model=networks[0], prepare=setting.prepare
    )
    found = setting.evaluate(centre)
    seconds = time.perf_counter() - began
    return Row(
        "star, trained", len(networks), float("nan"), found["loss"], found["accuracy"], claim.highest, None, seconds
    )


def learned_rows(
    setting: Setting, networks: Sequence[nn.Module], spec: pg.PermutationSpec, points: int, steps: int, way: str
) -> Iterator[Row]:
    """Means of two and more networks that were brought together by learning; time and barriers for all of them only.

    The first few come together as they would without those that follow.
    """
    began = time.process_time()
    method = LEARNED[way](pg.LearnedMatching(setting.batches(128), steps=steps))
    merged = finished(pg.merge(networks, method, spec=spec))
    seconds = time.process_time() - began
    there = [element.apply(one.state_dict()) for element, one in zip(merged.elements, networks, strict=True)]
    for count in range(2, len(networks) + 1):
        centre = setting.prepare(setting.network(pg.average(there[:count])))
        found = setting.evaluate(centre)
        if count < len(networks):
            yield Row(way, count, float("nan"), found["loss"], found["accuracy"], None, None, 0.0)
            continue
        star = max(setting.barrier(centre, end, points).barrier for end in there)
        yield Row(way, count, float("nan"), found["loss"], found["accuracy"], star, None, seconds)


def run(
    setting: Setting,
    seeds: Sequence[int],
    points: int,
    star_epochs: int,
    methods: Sequence[str],
    where: Console,
    general: bool = False,
    steps: int = 0,
) -> list[Row]:
    """Every method on two and more networks; barriers for all of them only."""
    with bar(where, f"{setting.name}: training", len(seeds) * setting.epochs) as step:
        networks = [setting.network(setting.train(seed, step=step)[-1]) for seed in seeds]
    rows = []
    ends = [setting.evaluate(network) for network in networks]
    mean = {metric: sum(end[metric] for end in ends) / len(ends) for metric in ("loss", "accuracy")}
    rows.append(Row("single, mean", 1, float("nan"), mean["loss"], mean["accuracy"], None, None, 0.0))
    symmetry = "general" if general else "permutation"
    spec = pg.auto_spec(networks[0], symmetry=symmetry, example_inputs=(setting.test[0][:2],))
    counts = range(2, len(networks) + 1)
    chosen_methods = {name: METHODS[name] for name in METHODS if name in methods}
    with bar(where, f"{setting.name}: merging", len(chosen_methods) * len(counts) + (STAR in methods)) as step:
        for name, method in chosen_methods.items():
            for count in counts:
                chosen, start = networks[:count], time.perf_counter()
                merged = finished(pg.merge(chosen, method or pg.ToReference(), spec=spec))
                seconds = time.perf_counter() - start if method else 0.0
                state = merged.state_dict if method else pg.average(chosen)
                centre = setting.prepare(setting.network(state))
                found = setting.evaluate(centre)
                star = None
                if count == len(networks):
                    permuted = [p.apply(n.state_dict()) for p, n in zip(merged.elements, chosen, strict=True)]
                    ends = permuted if method else [network.state_dict() for network in chosen]
                    # The ends of these lines are a network and a mean of networks, with statistics of its own.
                    star = max(setting.barrier(centre, end, points).barrier for end in ends)
                cycle = around(merged) if method and count >= 3 and not general else None
                objective = merged.objective if method else merged.objective_before
                rows.append(Row(name, count, objective, found["loss"], found["accuracy"], star, cycle, seconds))
                step()
        for way in LEARNED:
            if general and way in methods:
                rows += learned_rows(setting, networks, spec, points, steps, way)
        if STAR in methods:
            rows.append(trained_star(setting, networks, spec, points, star_epochs))
            step()
    if len(networks) >= 3 and not general:
        pairs = [
            finished(pg.align(networks[i], networks[j], spec=spec)).permutation for i, j in ((0, 1), (1, 2), (2, 0))
        ]
        rows.append(Row("each pair by itself", 3, *[float("nan")] * 3, None, moved(*pairs), 0.0))
    return rows


def around(merged: pg.Merge) -> float:
    """The share of units that do not come back after going from model to model in a circle of three."""
    return moved(merged.pairwise(0, 1), merged.pairwise(1, 2), merged.pairwise(2, 0))


def moved(one: pg.Permutation, two: pg.Permutation, three: pg.Permutation) -> float:
    """The share of units that three permutations, one after another, move."""
    circle = one @ two @ three
    return sum(circle.moved().values()) / sum(array.size for array in circle.arrays.values())


def main(given: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """Run the experiment and return its rows."""
    parser = arguments(__doc__, models=("MLP", "ResNet", "DenseNet", "ViT"), seeds=(1, 2, 3, 4, 5), least=2)
    parser.add_argument("--star-epochs", type=int, default=5, help="of the centre's training (5)")
    parser.add_argument("--symmetry", choices=("permutation", "general"), default="permutation", help="(permutation)")
    parser.add_argument("--steps", type=int, default=200, help="of learning each over general symmetries (200)")
    every_method = (*METHODS, *LEARNED, STAR)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=every_method,
        default=every_method,
        metavar="METHOD",
        help=f"of {', '.join(map(repr, every_method))} (all)",
    )
    options = parser.parse_args(given)
    where = console()
    found: dict[str, list[Row]] = {}
    result = table(
        f"Merging {len(options.seeds)} networks, seeds {' '.join(map(str, options.seeds))}",
        *("", "networks", "objective", "test loss", "accuracy", "star", "cycle", "s"),
        caption="Objective: sum of inner products over pairs. Star: highest barrier in test loss from the mean to a "
        "network.\nCycle: share of units that do not come back after a circle of three networks.",
    )
    for setting in settings(options):
        rows = found[setting.name] = run(
            setting,
            options.seeds,
            options.points,
            options.star_epochs,
            options.methods,
            where,
            options.symmetry == "general",
            options.steps,
        )
        result.add_row(f"[bold]{setting.name}, width {setting.width}")
        for row in rows:
            always = options.symmetry == "general" or row.method.startswith(("single", "each"))
            if (row.count in (1, 3) and always) or row.count == len(options.seeds):
                values = [
                    *(
                        f"{v:.{d}f}" if v == v else ""
                        for v, d in ((row.objective, 0), (row.loss, 3), (row.accuracy, 3))
                    ),
                    "" if row.star is None else f"{row.star:.3f}",
                    "" if row.cycle is None else f"{row.cycle:.3f}",
                    f"{row.seconds:.1f}" if row.seconds else "",
                ]
                result.add_row(row.method, str(row.count), *values)
    result.show(where, options.out / "many_models.md", options)

    def draw(axes: list[Axes]) -> None:
        for ax, (name, rows) in zip(axes, found.items(), strict=True):
            drawn = (*METHODS, *LEARNED)
            for number, method in enumerate(name for name in drawn if any(row.method == name for row in rows)):
                points = [(row.count, row.accuracy) for row in rows if row.method == method]
                line(ax, number, [1, *(n for n, _ in points)], [rows[0].accuracy, *(a for _, a in points)], method)
            ax.set(title=name, xlabel="networks in the mean", ylabel="test accuracy", ylim=(0, 1.02))
            ax.set_xticks(range(1, len(options.seeds) + 1))
        legend(axes)

    figure(len(found), options.out / "many_models.png", draw)
    return found


if __name__ == "__main__":
    main()
