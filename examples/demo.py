"""Train six small networks, bring each pair into correspondence, and measure what that does to the barrier.

Two multilayer perceptrons, two BatchNorm ResNets and two vision transformers are trained on scikit-learn's digits from
different seeds. For each pair: infer the permutation symmetries from the module, prove them, align B to A by weight
matching, and measure test loss and accuracy on the line between the two, before and after. Prints a table; writes the
curves to ``report.png`` and each specification to ``NAME.spec.txt``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class Row:
    """What the demo found for one pair of networks."""

    name: str
    spec: pg.PermutationSpec
    proof: pg.Verification
    fit: pg.Alignment
    naive: pg.Barrier
    aligned: pg.Barrier
    repaired: pg.Barrier | None
    seconds: float


RECIPES = (
    Recipe("MLP", lambda: MLP(width=512), epochs=20, rate=1e-2, decay=0.2),
    Recipe("ResNet", lambda: ResNet(width=32), epochs=10, rate=1e-2, decay=0.5, batchnorm=True),
    Recipe("ViT", lambda: ViT(width=64, heads=4, depth=2), epochs=20, rate=5e-3, decay=0.5),
)


def run(recipe: Recipe, data: Batch, test: Batch, seeds: Sequence[int], points: int, progress: Progress) -> Row:
    """Train a pair of networks, align it, and measure the line between the two before and after."""
    start = time.perf_counter()
    paths = 2 if recipe.batchnorm else 3
    task = progress.add_task(recipe.name, total=2 * recipe.epochs + 3 + paths * points, stage="training")

    def step(*_: int) -> None:
        progress.advance(task)

    a, b = (
        train(recipe.build, data, seed=s, epochs=recipe.epochs, rate=recipe.rate, decay=recipe.decay, progress=step)
        for s in seeds
    )

    progress.update(task, stage="symmetries")
    spec = pg.auto_spec(a)
    step()
    progress.update(task, stage="proof")
    proof = pg.verify(a, spec)
    step()
    progress.update(task, stage="matching")
    fit = pg.align(a, b, spec=spec)
    step()

    batches = list(zip(data[0].split(480), data[1].split(480), strict=True))
    evaluate = pg.evaluate_on([test])

    def measure(end: nn.Module, stage: str, prepare: Callable[[nn.Module, float], nn.Module] | None) -> pg.Barrier:
        progress.update(task, stage=stage)
        return pg.barrier(a, end, evaluate, points, prepare=prepare, progress=step)

    def recalibrate(net: nn.Module, _: float) -> nn.Module:
        return pg.recalibrate_batchnorm(net, batches)

    def repair(net: nn.Module, t: float) -> nn.Module:
        return pg.repair(net, batches, parents, weights=(1 - t, t))

    prepare = recalibrate if recipe.batchnorm else None
    naive = measure(b, "naive line", prepare)
    aligned = measure(fit.model(), "aligned line", prepare)
    repaired = None
    if not recipe.batchnorm:  # with BatchNorm, recalibration is REPAIR already
        parents = [pg.channel_statistics(net, batches) for net in (a, fit.model())]
        repaired = measure(fit.model(), "aligned line, REPAIR", repair)
    progress.update(task, stage="done")
    return Row(recipe.name, spec, proof, fit, naive, aligned, repaired, time.perf_counter() - start)


def table(rows: Sequence[Row]) -> Table:
    """Return everything in one table."""
    result = Table(
        title="Two networks of each architecture on digits, B aligned to A", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    result.caption_justify = "left"
    result.caption = (
        "ln order: natural logarithm of the number of permutations. Objective: inner product of the weights of A and B."
        "\nBarrier: largest excess on the line over its ends, on test data; ResNet with BatchNorm recalibrated."
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
        order, groups = f"{row.spec.log_order():.1f}", str(len(row.spec.moving))
        result.add_row(row.name, groups, order, proof, objective, *lines, f"{row.seconds:.0f}")
    return result


def barriers(row: Row, metric: str) -> str:
    """Return the barrier before and after as text, and with REPAIR in a second line."""
    text = f"{row.naive.height(metric):.3f} → {row.aligned.height(metric):.3f}"
    return text if row.repaired is None else f"{text}\nREPAIR {row.repaired.height(metric):.3f}"


def picture(rows: Sequence[Row], path: Path) -> None:
    """Draw loss and accuracy along each line."""
    figure = Figure(figsize=(4.2 * len(rows), 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(rows), squeeze=False)
    for column, row in enumerate(rows):
        for ax, metric in zip(axes[:, column], ("loss", "accuracy"), strict=True):
            row.naive.plot(metric, ax=ax, label="naive")
            row.aligned.plot(metric, ax=ax, label="aligned")
            if row.repaired is not None:
                row.repaired.plot(metric, ax=ax, label="aligned, REPAIR")
            ax.set_ylabel(f"{row.name}: test {metric}")
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
        rows = [run(recipe, data, test, options.seeds, options.points, bar) for recipe in recipes]
    console.print(table(rows))
    for row in rows:
        (options.out / f"{row.name.lower()}.spec.txt").write_text(f"{row.spec}\n", encoding="utf-8")
    picture(rows, options.out / "report.png")
    console.print(f"Written: {options.out}/report.png" + "".join(f", {r.name.lower()}.spec.txt" for r in rows))
    return rows


if __name__ == "__main__":
    sys.exit(0 if all(row.proof.passed for row in main()) else 1)
