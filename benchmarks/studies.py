"""One study on every engine: the same table, what a killed worker costs, what a second run costs, and how it scales.

    python benchmarks/studies.py --networks 20 loky dask ray

Trains small networks on scikit-learn's digits, aligns every pair with two matchers and measures the barriers, once on
each engine with two workers, and compares the tables byte for byte. On local processes it also runs with one worker,
and with one of two killed by signal 9 in the middle. The times of the cells then say what more workers would give.

    python benchmarks/studies.py scaling --networks 5 --width 1024 --figure docs/images/study_scaling.png

runs wider networks, whose cells take seconds, with one process and with two, in turn, and predicts the curve to 64
workers. It counts processor time only, so that other work on the machine does not matter.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import heapq
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
from joblib.externals.loky import get_reusable_executor
from sklearn.datasets import load_digits
from torch import nn

import permgraph as pg
from permgraph.pictures.figures import pyplot
from permgraph.pictures.palette import COLOURS
from permgraph.studies import StudyPlan, StudyResult, backends, cell, study
from permgraph.studies.cell import Task

WORKERS = 2
LARGE = 570  # cells of a study of twenty networks, unaligned and by two matchers


def net(width: int = 64) -> nn.Sequential:
    inner = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(*inner).eval()


def trained(seed: int, x: torch.Tensor, y: torch.Tensor, width: int = 64, steps: int = 100) -> nn.Sequential:
    torch.manual_seed(seed)
    model = net(width)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3 * (64 / width) ** 0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def make_plan(networks: int, width: int = 64, steps: int = 100) -> StudyPlan:
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    train, test = slice(0, 1200), slice(1200, None)
    models = {f"seed {seed:02}": trained(seed, x[train], y[train], width, steps) for seed in range(networks)}
    matchers = {"weights": pg.WeightMatching(), "activations": pg.ActivationMatching([(x[:256],)])}
    return StudyPlan(net(width), models, matchers, pg.evaluate_on([(x[test], y[test])]), points=11)


def table(result: StudyResult, folder: Path) -> bytes:
    result.to_csv(folder / "table.csv", times=False)
    return (folder / "table.csv").read_bytes()


@contextlib.contextmanager
def killer(store: Path, cells: int) -> Iterator[list[str]]:
    """Kill one worker process of this one once a third of the cells are done; yields what was killed."""
    killed: list[str] = []

    def watch() -> None:
        while not killed:
            time.sleep(0.1)
            if len(list(store.glob("cells/*.json"))) > cells / 3:
                busy = [p for p in psutil.Process().children(recursive=True) if "loky" in " ".join(p.cmdline())]
                workers = [p for p in busy if "resource_tracker" not in " ".join(p.cmdline())]
                if workers:
                    workers[0].kill()
                    killed.append(f"pid {workers[0].pid}")

    threading.Thread(target=watch, daemon=True).start()
    yield killed


def predicted(lengths: Sequence[float], each: float, start: float, workers: int) -> float:
    """The time of handing out cells of these lengths, in order, to whichever worker is free.

    Args:
        lengths: seconds of each cell.
        each: seconds that handing one out takes, one after the other, in the process that does so.
        start: seconds that a worker takes before its first cell.
        workers: how many there are.
    """
    free = [start] * workers
    handed = 0.0
    for length in lengths:
        handed = max(handed + each, free[0])
        heapq.heapreplace(free, handed + length)
    return max(free)


@dataclass(frozen=True)
class Spent:
    """Processor seconds of one run of a study.

    Attributes:
        cells: of each cell, in the order in which they were handed out.
        workers: of each process that did cells, from its start.
        here: of the process that handed them out, without the cells that it did itself.
    """

    cells: tuple[float, ...]
    workers: tuple[float, ...]
    here: float

    @property
    def span(self) -> float:
        """How long the run would take if every process had a processor of its own."""
        return self.here + max(self.workers)


def spend(plan: StudyPlan, jobs: int, store: Path) -> Spent:
    """Run a plan in so many new processes; with one job, in this process."""
    cells: list[float] = []

    def timed(task: Task) -> dict[str, Any]:
        begun = time.process_time()
        record = cell.run(task)
        cells.append(time.process_time() - begun)
        return record

    before = time.process_time()
    with mock.patch("permgraph.studies.run.run", timed) if jobs == 1 else contextlib.nullcontext():
        result = study(plan, store, jobs=jobs)
    here = time.process_time() - before - sum(cells)
    assert not result.failed, result.failed
    children = [] if jobs == 1 else psutil.Process().children(recursive=True)
    used = [sum(one.cpu_times()[:2]) for one in children if "resource_tracker" not in " ".join(one.cmdline())]
    get_reusable_executor().shutdown(wait=True)
    return Spent(tuple(cells), tuple(used) or (sum(cells),), here)


def scaling(options: argparse.Namespace) -> None:
    """One process and two, in turn, and the curve that follows."""
    plan = make_plan(options.networks, options.width, steps=10)
    few = dataclasses.replace(plan, matchers={}, pairs="first")
    alone: list[Spent] = []
    two: list[Spent] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            alone.append(spend(plan, 1, Path(folder, f"one-{turn}")))
            two.append(spend(plan, 2, Path(folder, f"two-{turn}")))
            least = spend(few, 2, Path(folder, f"few-{turn}"))
            print(f"one: {alone[-1].span:.1f} s; two: {two[-1].span:.1f} s, of which {two[-1].workers}", flush=True)
    cells = np.median([run.cells for run in alone], axis=0).tolist()
    # What a worker spends beside its cells: starting Python, importing torch, unpacking tasks.
    start = float(np.median([(sum(run.workers) - sum(cells)) / len(run.workers) for run in two]))
    # What handing out a cell takes is what more of them cost in the process that does so.
    each = max(0.0, two[-1].here - least.here) / (len(cells) - len(few.cells))
    print(f"{len(cells)} cells of {min(cells):.2f} to {max(cells):.2f} s, {sum(cells):.1f} s in all")
    print(
        f"a worker's start {start:.2f} s; handing out {len(cells)} cells {two[-1].here:.2f} s, {len(few.cells)} cells "
        f"{least.here:.2f} s, so {each * 1e3:.1f} ms each"
    )
    whole = float(np.median([run.span for run in alone]))
    measured = {1: 1.0, 2: float(np.median([a.span / b.span for a, b in zip(alone, two, strict=True)]))}
    numbers = (1, 2, 4, 8, 16, 32, 64)
    # A study as large as the one of twenty networks: the same lengths, drawn anew.
    many = np.random.default_rng(0).choice(cells, LARGE).tolist()
    curves = {}
    for title, lengths, time_alone in ((f"{len(cells)} cells", cells, whole), (f"{LARGE} cells", many, sum(many))):
        spans = [predicted(lengths, each, 0.0 if workers == 1 else start, workers) for workers in numbers]
        curves[title] = [time_alone / span for span in spans]
        print(
            title,
            *(
                f"{workers}: {span:.1f} s ({time_alone / span:.1f})"
                for workers, span in zip(numbers, spans, strict=True)
            ),
        )
    print("measured", measured)
    if options.figure is not None:
        draw(curves, numbers, measured, options.figure)


def draw(
    curves: Mapping[str, list[float]], numbers: tuple[int, ...], measured: Mapping[int, float], target: Path
) -> None:
    """The speed-up against the number of workers, on logarithmic axes."""
    figure, ax = pyplot().subplots(figsize=(5.2, 3.6), layout="constrained")
    ax.plot(numbers, numbers, color="#8a909a", linewidth=1, linestyle=":", label="ideal")
    for (title, curve), colour, style in zip(curves.items(), COLOURS, ("--", "-"), strict=False):
        ax.plot(numbers, curve, color=colour, linestyle=style, marker="o", markersize=3, label=f"predicted, {title}")
    ax.plot(list(measured), list(measured.values()), "s", color="#30343c", markersize=6, label="measured", zorder=3)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(numbers, [str(number) for number in numbers])
    ax.set_yticks(numbers, [str(number) for number in numbers])
    ax.set_xlabel("workers")
    ax.set_ylabel("times as fast as one process")
    ax.legend(frameon=False)
    figure.savefig(target, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", default=["loky"])
    parser.add_argument("--networks", type=int, default=20)
    parser.add_argument("--width", type=int, default=1024, help="of the hidden layers, for scaling")
    parser.add_argument("--turns", type=int, default=1, help="pairs of runs, for scaling")
    parser.add_argument("--figure", type=Path, help="draw the scaling here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.engines == ["scaling"]:
        scaling(options)
        return
    plan = make_plan(options.networks)
    print(f"{len(plan.cells)} cells, spec {plan.spec.log_order():.1f}")
    tables: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:

        def measure(title: str, engine: str, jobs: int, store: Path) -> tuple[StudyResult, float]:
            with backends.backend(engine, jobs):
                started = time.perf_counter()
                result = study(plan, store)
                wall = time.perf_counter() - started
            tables[title] = table(result, Path(folder))
            print(f"{title:32} {wall:8.1f} s   {result}", flush=True)
            return result, wall

        for engine in options.engines:
            measure(f"{engine}, {WORKERS} workers", engine, WORKERS, Path(folder, engine))
        measure("the same again", options.engines[0], WORKERS, Path(folder, options.engines[0]))
        with killer(Path(folder, "killed"), len(plan.cells)) as killed:
            measure("loky, a worker killed", "loky", WORKERS, Path(folder, "killed"))
        print(f"killed: {killed}")
        alone, wall = measure("loky, 1 worker", "loky", 1, Path(folder, "alone"))
        lengths = [row["seconds"] for row in alone.rows]
        overhead = max(0.0, wall - sum(lengths)) / len(lengths)
        mean = np.mean(lengths)
        print(f"cells: mean {mean:.3f} s, longest {max(lengths):.2f} s, overhead {overhead * 1e3:.1f} ms each")
        for workers in (1, 2, 4, 8, 16, 32, 64):
            print(f"predicted, {workers:2} workers {predicted(lengths, overhead, 0.0, workers):10.1f} s")
    print("all tables are the same, byte for byte" if len(set(tables.values())) == 1 else "THE TABLES DIFFER")


if __name__ == "__main__":
    main()
