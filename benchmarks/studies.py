"""One study on every engine: the same table, what a killed worker costs, what a second run costs, and how it scales.

    python benchmarks/studies.py --networks 20 loky dask ray

Trains small networks on scikit-learn's digits, aligns every pair with two matchers and measures the barriers, once on
each engine with two workers, and compares the tables byte for byte. On local processes it also runs with one worker,
and with one of two killed by signal 9 in the middle. The times of the cells then say what more workers would give.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from sklearn.datasets import load_digits
from torch import nn

import permgraph as pg
from permgraph.studies import StudyPlan, StudyResult, backends, study

WORKERS = 2


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()


def trained(seed: int, x: torch.Tensor, y: torch.Tensor) -> nn.Sequential:
    torch.manual_seed(seed)
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def make_plan(networks: int) -> StudyPlan:
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    train, test = slice(0, 1200), slice(1200, None)
    models = {f"seed {seed:02}": trained(seed, x[train], y[train]) for seed in range(networks)}
    matchers = {"weights": pg.WeightMatching(), "activations": pg.ActivationMatching([(x[:256],)])}
    return StudyPlan(net(), models, matchers, pg.evaluate_on([(x[test], y[test])]), points=11)


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


def predicted(seconds: list[float], overhead: float, serial: float, workers: int) -> float:
    """The time of handing out cells of these lengths, in order, to whichever worker is free."""
    free = [0.0] * workers
    for length in seconds:
        heapq.heappush(free, heapq.heappop(free) + length + overhead)
    return serial + max(free)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", default=["loky"])
    parser.add_argument("--networks", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
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
