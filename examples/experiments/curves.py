"""Curves of low loss between two networks, naive and aligned; clean and robust pairs.

Tatro et al. (2020), "Optimizing Mode Connectivity via Neuron Alignment": a quadratic Bézier curve (or a polygon)
between aligned networks has lower loss along it than one between networks as they are, and is found sooner. The
permutation can also take part in the training of the curve (proximal alternating minimisation, PAM). For robust pairs,
networks and curves are trained on adversarial examples (projected gradient descent, PGD), and the loss is measured on
such too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import (
    COLOURS,
    MARKERS,
    RECIPES,
    Recipe,
    Setting,
    State,
    Step,
    arguments,
    bar,
    console,
    figure,
    finished,
    label_rows,
    legend,
    logarithmic,
    settings,
    table,
)
from matplotlib.axes import Axes
from networks import Batch
from rich.console import Console
from torch import nn
from torch.nn.functional import cross_entropy

import permgraph as pg

SHOWN = ("line", "bezier", "PAM")
"""The paths that are drawn."""

Attack = Callable[[nn.Module, Batch], Batch]


def pgd(radius: float, steps: int) -> Attack:
    """Projected gradient ascent of the loss in a box of this radius around each input (Madry et al. 2018)."""

    def attack(network: nn.Module, batch: Batch) -> Batch:
        inputs, targets = batch
        shift = torch.zeros_like(inputs)
        with torch.enable_grad():
            for _ in range(steps):
                shift.requires_grad_(True)
                (slope,) = torch.autograd.grad(cross_entropy(network(inputs + shift), targets), shift)
                shift = (shift.detach() + 2.5 * radius / steps * slope.sign()).clamp(-radius, radius)
        return inputs + shift, targets

    return attack


def train_robust(setting: Setting, seed: int, attack: Attack, step: Step) -> State:
    """Adversarial training by the recipe's schedule."""

    def make() -> State:
        recipe: Recipe = setting.recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = setting.build()
            order = torch.Generator().manual_seed(seed)
            inputs, labels = setting.data
            descent = torch.optim.AdamW(network.parameters(), weight_decay=recipe.decay)
            steps = setting.epochs * -(-len(labels) // 64)
            schedule = torch.optim.lr_scheduler.OneCycleLR(descent, recipe.rate, total_steps=steps)
            for _ in range(setting.epochs):
                for chosen in torch.randperm(len(labels), generator=order).split(64):
                    x, y = attack(network.eval(), (inputs[chosen], labels[chosen]))
                    network.train()
                    descent.zero_grad()
                    cross_entropy(network(x), y).backward()
                    descent.step()
                    schedule.step()
                step()
        return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    return setting.kept(f"s{seed}-robust", make)


@dataclass(frozen=True)
class Row:
    """One path between the two networks, and what was measured on it."""

    path: str
    found: pg.Barrier
    history: tuple[float, ...]
    moves: int | None = None


def run(
    setting: Setting, pair: tuple[State, State], options: Any, where: Console, attack: Attack | None, tag: str
) -> list[Row]:
    """Every path between two networks."""
    a, b = (setting.network(state) for state in pair)
    spec = pg.auto_spec(a)
    turn = finished(pg.align(a, b, spec=spec)).permutation
    identity = spec.identity()
    loader = setting.batches(128)

    def evaluate(network: nn.Module) -> dict[str, float]:
        test = setting.test if attack is None else attack(network, setting.test)
        return pg.evaluate_on([test])(network)

    rows: list[Row] = []

    def measure(
        name: str, path: Callable[[float], Any], history: Sequence[float] = (), moves: int | None = None
    ) -> None:
        found = pg.barrier_along(path, evaluate, options.points, model=a, prepare=setting.prepare)
        rows.append(Row(name, found, tuple(history), moves))

    starts = (("naive", identity), ("aligned", turn))
    with bar(where, f"{setting.name} {tag}: curves", 2 * 4) as step:
        for name, permutation in starts:
            end = permutation.apply(pair[1])
            measure(f"{name}, line", pg.Curve((pair[0], end)))
            step()
            for shape in ("bezier", "polygon"):

                def fit(end: State = end, shape: Any = shape) -> list[Any]:
                    curve = finished(
                        pg.fit_curve(a, end, loader, shape=shape, epochs=options.curve_epochs, perturb=attack, model=a)
                    )
                    return [list(curve.points), list(curve.history)]

                key = f"{tag}-{name}-{shape}-{options.curve_epochs}-{'-'.join(map(str, options.seeds))}"
                points, history = setting.kept(key, fit)
                measure(f"{name}, {shape}", pg.Curve(tuple(points), shape), history)
                step()

            def fit_both(permutation: pg.Permutation = permutation) -> list[Any]:
                fitted = finished(
                    pg.fit_aligned_curve(
                        a,
                        pair[1],
                        loader,
                        spec,
                        init=permutation,
                        rounds=options.rounds,
                        epochs=max(1, options.curve_epochs // options.rounds),
                        proximity=options.proximity,
                        perturb=attack,
                    )
                )
                return [list(fitted.curve.points), list(fitted.losses), sum(fitted.moved)]

            key = f"{tag}-{name}-pam-{options.curve_epochs}-{options.rounds}-{options.proximity:g}"
            points, history, moves = setting.kept(f"{key}-{'-'.join(map(str, options.seeds))}", fit_both)
            measure(f"{name}, PAM", pg.Curve(tuple(points)), history, moves)
            step()
    return rows


def main(given: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """Run the experiment and return what was found."""
    parser = arguments(__doc__, models=("MLP", "ResNet", "DenseNet", "ViT"), seeds=(1, 2), least=2)
    parser.add_argument("--curve-epochs", type=int, default=20, help="of the bends' training (20)")
    parser.add_argument("--rounds", type=int, default=5, help="of alternating minimisation (5)")
    parser.add_argument("--proximity", type=float, default=1000.0, help="how far its steps may go (1000)")
    parser.add_argument(
        "--robust", nargs="*", choices=RECIPES, metavar="NAME", default=["MLP"], help="trained robustly as well (MLP)"
    )
    parser.add_argument("--radius", type=float, default=0.2, help="of adversarial shifts of the inputs (0.2)")
    options = parser.parse_args(given)
    where = console()
    every: dict[str, list[Row]] = {}
    result = table(
        "Paths between two networks, test data",
        *(
            "",
            "barrier\nin loss",
            "highest\nloss",
            "mean\nloss",
            "lowest\naccuracy",
            "training loss\nfirst",
            "last",
            "steps\nof p",
        ),
        caption="PAM: curve and permutation minimised in turn; steps of p: rounds in which the permutation changed. "
        "Robust: trained and tested on adversarial inputs.",
    )
    attack = pgd(options.radius, 5)
    for setting in settings(options):
        with bar(where, f"{setting.name}: training", 2 * setting.epochs) as step:
            pair = tuple(setting.train(seed, step=step)[-1] for seed in options.seeds[:2])
        every[setting.name] = run(setting, (pair[0], pair[1]), options, where, None, "clean")
        if setting.name in options.robust:
            with bar(where, f"{setting.name}: robust training", 2 * setting.epochs) as step:
                pair = tuple(train_robust(setting, seed, attack, step) for seed in options.seeds[:2])
            every[f"{setting.name}, robust"] = run(setting, (pair[0], pair[1]), options, where, attack, "robust")
    for name, rows in every.items():
        result.add_row(f"[bold]{name}")
        for row in rows:
            losses = row.found.losses
            values = [row.found.barrier, max(losses), sum(losses) / len(losses), min(row.found.curves["accuracy"])]
            training = [f"{row.history[0]:.3f}", f"{row.history[-1]:.3f}"] if row.history else ["", ""]
            moves = "" if row.moves is None else str(row.moves)
            result.add_row(row.path, *(f"{value:.3f}" for value in values), *training, moves)
    result.show(where, options.out / "curves.md", options)

    def draw(axes: list[Axes]) -> None:
        for ax, (name, rows) in zip(axes, every.items(), strict=True):
            for row in rows:
                kind, shape = row.path.split(", ")
                if shape in SHOWN:
                    at = SHOWN.index(shape)
                    ax.plot(
                        row.found.alphas,
                        row.found.losses,
                        color=COLOURS[at],
                        marker=MARKERS[at],
                        markersize=5,
                        linestyle="--" if kind == "naive" else "-",
                        markerfacecolor="white" if kind == "naive" else COLOURS[at],
                        label=row.path,
                    )
            ax.set(title=name, xlabel="position on the path from A to B")
            logarithmic(ax)
        label_rows(axes, "test loss")
        legend(axes)

    figure(len(every), options.out / "curves.png", draw)
    return every


if __name__ == "__main__":
    main()
