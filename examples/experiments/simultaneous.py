"""One permutation for whole trainings: weak, simultaneous and strong linear connectivity (Sharma et al. 2024).

Two networks are trained from different seeds, and one permutation is fitted at the end of their training. It is applied
to all earlier checkpoints, and to ever sparser networks, found by iterative magnitude pruning of each with rewinding,
whose masks move with the weights. Beside it stand the naive barrier, and that of a permutation fitted anew at each
place (the weak claim). Last, the strong claim: three networks, one permutation each, all three pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from common import Setting, State, Step, arguments, bar, console, figure, finished, legend, line, settings, table
from matplotlib.axes import Axes
from rich.console import Console
from torch import Tensor

import permgraph as pg


@dataclass(frozen=True)
class Row:
    """The barriers at one place of the sequences."""

    place: str
    naive: float
    simultaneous: float
    weak: float
    loss: float


@dataclass(frozen=True)
class Result:
    """Everything for one architecture."""

    trainings: list[Row]
    pruned: list[Row]
    strong: dict[str, pg.Claim]


def prune(state: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Masks that keep the largest weights of all matrices and kernels together, but this share of them."""
    weights = {name: tensor for name, tensor in state.items() if tensor.ndim > 1}
    magnitudes = torch.cat([tensor.abs().flatten() for tensor in weights.values()])
    threshold = magnitudes.kthvalue(max(1, round(share * len(magnitudes)))).values
    return {name: (tensor.abs() > threshold).to(tensor.dtype) for name, tensor in weights.items()}


def sparser(setting: Setting, seed: int, rewind: int, rounds: int, step: Step) -> tuple[list[State], list[State]]:
    """Ever sparser networks and their masks: prune half of what is left, rewind to an early checkpoint, train."""
    early, dense = setting.train(seed, keep=(rewind,), step=step)
    states, masks = [dense], [{name: torch.ones_like(t) for name, t in dense.items() if t.ndim > 1}]
    for level in range(1, rounds + 1):
        mask = prune(states[-1], 1 - 0.5**level)
        start = setting.network(early)
        states += setting.train(seed, start=start, masks=mask, tag=f"-pruned{level}-from{rewind}", step=step)
        masks.append(mask)
    return states, masks


def rows(
    setting: Setting,
    places: Sequence[str],
    a: Sequence[State],
    b: Sequence[State],
    one: pg.Permutation,
    tolerance: float,
    points: int,
    step: Step,
) -> list[Row]:
    """The three barriers at each place of two sequences."""
    model = setting.network(a[0])
    found = []
    for place, x, y in zip(places, a, b, strict=True):
        own = finished(pg.align(x, y, spec=one.spec)).permutation
        claims = [
            pg.simultaneous_connectivity(
                [x], [y], p, setting.evaluate, tolerance, points, model=model, prepare=setting.prepare
            )
            for p in (one.spec.identity(), one, own)
        ]
        loss = (setting.evaluate(setting.network(x))["loss"] + setting.evaluate(setting.network(y))["loss"]) / 2
        found.append(Row(place, *(claim.highest for claim in claims), loss))
        step()
    return found


def run(setting: Setting, seeds: Sequence[int], options: Mapping[str, int | float], where: Console) -> Result:
    """Every claim for one architecture."""
    points, rounds, tolerance = int(options["points"]), int(options["rounds"]), float(options["tolerance"])
    last = setting.epochs
    keep = sorted({0, 1, 2, last // 4, last // 2} - {last})
    first, second, third = seeds[:3]
    with bar(where, f"{setting.name}: training", (3 + 2 * (rounds + 1)) * last) as step:
        a, b, c = (setting.train(seed, keep=keep, step=step) for seed in (first, second, third))
        early = max(1, last // 10)
        (sparse_a, _), (sparse_b, masks_b) = (sparser(setting, seed, early, rounds, step) for seed in (first, second))
    spec = pg.auto_spec(setting.network(a[-1]))
    one = finished(pg.align(a[-1], b[-1], spec=spec)).permutation
    # The masks of B, moved, are the masks of the moved B.
    for state, mask in zip(sparse_b, masks_b, strict=True):
        moved = one.apply(state)
        assert all(torch.equal(moved[name] * m, moved[name]) for name, m in pg.permute_masks(one, mask).items())
    places = [f"epoch {epoch}" for epoch in (*keep, last)]
    levels = [f"{100 * 0.5**level:.3g} % of weights" for level in range(rounds + 1)]
    with bar(where, f"{setting.name}: barriers", len(places) + len(levels) + 2) as step:
        trainings = rows(setting, places, a, b, one, tolerance, points, step)
        pruned = rows(setting, levels, sparse_a, sparse_b, one, tolerance, points, step)
        ends, strong = [a[-1], b[-1], c[-1]], {}
        model = setting.network(a[-1])
        for name, method in (("to the first", pg.ToReference()), ("cycle-consistent", pg.CycleConsistent())):
            permutations = finished(pg.merge(ends, method, spec=spec)).permutations
            strong[name] = pg.strong_connectivity(
                ends, permutations, setting.evaluate, tolerance, points, model=model, prepare=setting.prepare
            )
            step()
    return Result(trainings, pruned, strong)


def main(given: Sequence[str] | None = None) -> dict[str, Result]:
    """Run the experiment and return what was found."""
    parser = arguments(__doc__, models=("MLP", "ResNet", "DenseNet", "ViT"), seeds=(1, 2, 3), least=3, points=7)
    parser.add_argument("--rounds", type=int, default=3, help="of pruning, each of half the weights (3)")
    parser.add_argument("--tolerance", type=float, default=0.05, help="barrier in test loss that counts as none (0.05)")
    options = parser.parse_args(given)
    where = console()
    every: dict[str, Result] = {}
    result = table(
        f"Barriers in test loss, seeds {' '.join(map(str, options.seeds))}",
        *("", "naive", "one permutation\n(simultaneous)", "its own\n(weak)", "loss of\nthe ends"),
        caption="One permutation: fitted at the end of dense training, applied throughout. Strong: highest barrier "
        f"among three networks.\nTolerance {options.tolerance:g}.",
    )
    for setting in settings(options):
        found = every[setting.name] = run(setting, options.seeds, vars(options), where)
        result.add_row(f"[bold]{setting.name}, width {setting.width}")
        for row in (*found.trainings, *found.pruned):
            result.add_row(row.place, *(f"{v:.3f}" for v in (row.naive, row.simultaneous, row.weak, row.loss)))
        for name, claim in found.strong.items():
            shown = "holds" if claim.holds else "not shown"
            result.add_row(f"strong, {name}", "", f"{claim.highest:.3f}", shown, "")
    result.show(where, options.out / "simultaneous.md", options)

    def draw(axes: list[Axes]) -> None:
        for at, found in enumerate(every.values()):
            for ax, sequence in zip(axes[2 * at : 2 * at + 2], (found.trainings, found.pruned), strict=True):
                places = [row.place.removesuffix(" of weights") for row in sequence]
                line(ax, 0, places, [row.naive for row in sequence], "naive")
                line(ax, 1, places, [row.simultaneous for row in sequence], "one permutation")
                line(ax, 2, places, [row.weak for row in sequence], "its own")
                ax.set(title=list(every)[at], ylabel="barrier in test loss")
                ax.tick_params(axis="x", labelrotation=30)
        legend(axes)

    figure(2 * len(every), options.out / "simultaneous.png", draw)
    return every


if __name__ == "__main__":
    main()
