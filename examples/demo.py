"""Train six small networks, bring each pair into correspondence, and measure what that does to the barrier.

Two multilayer perceptrons, two BatchNorm ResNets and two vision transformers are trained on scikit-learn's digits from
different seeds. For each pair: infer the permutation symmetries from the module, prove them, align B to A by weight
matching, and measure test loss and accuracy on the line between the two, before and after. The transformers are aligned
over their whole group too, with rotations and invertible maps, by weights and learned. Prints a table; writes the
curves to ``report.png`` and each specification to ``NAME.spec.txt``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from networks import MLP, Batch, ResNet, ViT, digits, train
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

import permgraph as pg


@dataclass(frozen=True)
class Recipe:
    """How one architecture is built and trained."""

    name: str
    build: Callable[[], nn.Module]
    epochs: int
    rate: float
    decay: float
    batchnorm: bool = False
    transformer: bool = False


@dataclass(frozen=True)
class Row:
    """What the demo found for one pair of networks over one group, with the lines that belong to it."""

    name: str
    spec: pg.PermutationSpec
    proof: pg.Verification
    fit: pg.Alignment
    lines: dict[str, pg.Barrier]
    seconds: float


RECIPES = (
    Recipe("MLP", lambda: MLP(width=512), epochs=20, rate=1e-2, decay=0.2),
    Recipe("ResNet", lambda: ResNet(width=32), epochs=10, rate=1e-2, decay=0.5, batchnorm=True),
    Recipe("ViT", lambda: ViT(width=64, heads=4, depth=2), epochs=20, rate=5e-3, decay=0.5, transformer=True),
)

LEARNING_STEPS, LEARNING_BATCH, LEARNING_RATE = 100, 256, 1e-2


def run(
    recipe: Recipe, data: Batch, test: Batch, seeds: Sequence[int], points: int, progress: Progress
) -> Iterator[Row]:
    """Train a pair of networks, align it, and measure the line between the two before and after."""
    start = time.perf_counter()
    lines = 2 if recipe.batchnorm else 6 if recipe.transformer else 3
    task = progress.add_task(
        recipe.name, total=2 * recipe.epochs + (7 if recipe.transformer else 3) + lines * points, stage=""
    )

    def step(*_: int) -> None:
        progress.advance(task)

    progress.update(task, stage="training")
    a, b = (
        train(recipe.build, data, seed=s, epochs=recipe.epochs, rate=recipe.rate, decay=recipe.decay, progress=step)
        for s in seeds
    )
    batches = list(zip(data[0].split(480), data[1].split(480), strict=True))
    evaluate = pg.evaluate_on([test])

    def recalibrate(net: nn.Module, _: float) -> nn.Module:
        return pg.recalibrate_batchnorm(net, batches)

    def measure(end: nn.Module, repaired: bool = False) -> pg.Barrier:
        prepare: Callable[[nn.Module, float], nn.Module] | None = recalibrate if recipe.batchnorm else None
        if repaired:
            parents = [pg.channel_statistics(net, batches) for net in (a, end)]
            prepare = lambda net, t: pg.repair(net, batches, parents, weights=(1 - t, t))  # noqa: E731
        return pg.barrier(a, end, evaluate, points, prepare=prepare, progress=step)

    def matched(symmetry: str) -> tuple[pg.PermutationSpec, pg.Verification, pg.Alignment]:
        progress.update(task, stage="symmetries")
        spec = pg.auto_spec(a, symmetry=symmetry)
        step()
        progress.update(task, stage="proof")
        proof = pg.verify(a, spec)
        step()
        progress.update(task, stage="matching")
        fit = pg.align(a, b, spec=spec)
        step()
        progress.update(task, stage="lines")
        return spec, proof, fit

    spec, proof, fit = matched("permutation")
    found = {"naive": measure(b), "aligned": measure(fit.model())}
    if not recipe.batchnorm:  # with BatchNorm, recalibration is REPAIR already
        found["aligned, REPAIR"] = measure(fit.model(), repaired=True)
    yield Row(recipe.name, spec, proof, fit, found, time.perf_counter() - start)

    if recipe.transformer:
        start = time.perf_counter()
        spec, proof, fit = matched("general")
        whole = {"whole group": measure(fit.model()), "whole group, REPAIR": measure(fit.model(), repaired=True)}
        progress.update(task, stage="learning")
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(len(data[1]), (LEARNING_STEPS, LEARNING_BATCH), generator=generator)
        loader = [(data[0][chosen], data[1][chosen]) for chosen in drawn]
        learning = pg.LearnedMatching(loader, steps=LEARNING_STEPS, rate=LEARNING_RATE, init=fit)
        learned = pg.align(a, b, learning, spec=spec)
        step()
        whole["whole group, learned"] = measure(learned.model())
        yield Row(f"{recipe.name}, whole", spec, proof, fit, whole, time.perf_counter() - start)
    progress.update(task, stage="done")


def table(rows: Sequence[Row]) -> Table:
    """Return everything in one table."""
    result = Table(title="Two networks of each architecture on digits, B aligned to A", box=SIMPLE_HEAD, padding=0)
    result.caption_justify = "left"
    result.caption = (
        "ln order: natural logarithm of the number of permutations. Objective: inner product of the weights of A and B."
        "\nBarrier: largest excess on the line over its ends, on test data; ResNet with BatchNorm recalibrated."
        "\nViT, whole: over its whole group, with rotations of the stream and invertible maps inside heads."
    )
    headings = (
        "",
        "groups",
        "ln\norder",
        "verify\nerror",
        "objective",
        "barrier\nin loss",
        "barrier in\naccuracy",
        "s",
    )
    for column in headings:
        result.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        proof = f"{row.proof.max_error:.0e}" if row.proof.passed else "[bold red]FAILED"
        lines = [barriers(row, metric) for metric in ("loss", "accuracy")]
        objective = f"{row.fit.objective_before:.0f} → {row.fit.objective:.0f}"
        order, groups = f"{row.spec.log_order():.1f}", str(len(row.spec.acting or row.spec.moving))
        result.add_row(row.name, groups, order, proof, objective, *lines, f"{row.seconds:.0f}")
    return result


def barriers(row: Row, metric: str) -> str:
    """Return the barriers as text, one below the other: before and after, and with what was done besides."""
    heights = {name: f"{line.height(metric):.3f}" for name, line in row.lines.items()}
    naive, aligned = heights.pop("naive", ""), heights.pop("aligned", "")
    first = [f"{naive} → {aligned}"] if naive else []
    names = {name: name.rpartition(", ")[2].replace("whole group", "weights") for name in heights}
    return "\n".join([*first, *(f"{names[name]} {height}" for name, height in heights.items())])


def picture(rows: Sequence[Row], path: Path) -> None:
    """Draw loss and accuracy along each line; what belongs to one pair of networks in one column."""
    pairs: dict[str, dict[str, pg.Barrier]] = {}
    for row in rows:
        pairs.setdefault(row.name.partition(",")[0], {}).update(row.lines)
    figure = Figure(figsize=(4.2 * len(pairs), 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(pairs), squeeze=False)
    for column, (name, lines) in enumerate(pairs.items()):
        for ax, metric in zip(axes[:, column], ("loss", "accuracy"), strict=True):
            for label, line in lines.items():
                line.plot(metric, ax=ax, label=label)
            ax.set_ylabel(f"{name}: test {metric}")
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the demo and return its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="the folder to write to (default: demo)")
    parser.add_argument("--seeds", type=int, nargs=2, default=(1, 2), help="seeds of the two networks (default: 1 2)")
    parser.add_argument("--points", type=int, default=25, help="points on each line (default: 25)")
    parser.add_argument("--only", choices=[r.name for r in RECIPES], nargs="+", help="these architectures only")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    recipes = [recipe for recipe in RECIPES if options.only is None or recipe.name in options.only]
    torch.set_num_threads(1)  # computations as small as these gain nothing from a second one
    data, test = digits()
    console = Console()
    bar = Progress(
        TextColumn("{task.description:7}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[stage]}"),
        console=console,
    )
    with bar:
        rows = [row for recipe in recipes for row in run(recipe, data, test, options.seeds, options.points, bar)]
    console.print(table(rows))
    for row in rows:
        (options.out / spec_file(row)).write_text(f"{row.spec}\n", encoding="utf-8")
    picture(rows, options.out / "report.png")
    console.print(f"Written: {options.out}/report.png" + "".join(f", {spec_file(row)}" for row in rows))
    return rows


def spec_file(row: Row) -> str:
    """The name of the file that a row's specification is written to."""
    return f"{row.name.lower().replace(', ', '-')}.spec.txt"


if __name__ == "__main__":
    sys.exit(0 if all(row.proof.passed for row in main()) else 1)
