"""Every matcher on the same pairs of trained networks: what it reaches, what the networks between are worth, and time.

    python benchmarks/matchers.py [--models MLP ResNet ViT] [--seeds 0 1] [--points 11]

Two networks are trained on scikit-learn's digits from different seeds. For each matcher: the inner product of the
aligned weights, the training loss at the midpoint, the barrier in test loss, test accuracy there, and the processor
time of one thread. BatchNorm is recalibrated between networks. The tables are Markdown.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import permgraph as pg

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from networks import MLP, Batch, ResNet, ViT, digits, train

MODELS: dict[str, tuple[Callable[[], nn.Module], int, float, float]] = {
    "MLP": (lambda: MLP(width=256), 20, 1e-2, 0.2),
    "ResNet": (lambda: ResNet(width=16), 8, 1e-2, 0.5),
    "ViT": (lambda: ViT(width=64, heads=4, depth=1), 15, 5e-3, 0.5),
}


def fast(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=3e-3)


def matchers(loader: list[Batch]) -> dict[str, pg.Matcher | None]:
    none = pg.WeightMatching(max_sweeps=0, init="identity")
    line = {"steps": 230, "init": "matched", "temperature": (0.5, 0.1), "round_every": 23}
    return {
        "none": none,
        "`WeightMatching()`": pg.WeightMatching(),
        "`WeightMatching(restarts=10)`": pg.WeightMatching(restarts=10),
        "`FrankWolfe()`": pg.FrankWolfe(),
        "`Sinkhorn(matcher=None)`": pg.Sinkhorn(matcher=None),
        "`Sinkhorn()`": pg.Sinkhorn(),
        "`ActivationMatching(loader)`": pg.ActivationMatching(loader),
        "`ActivationMatching(loader, tensors='graph')`": pg.ActivationMatching(loader, tensors="graph"),
        "`Sinkhorn('midpoint', loader)`": pg.Sinkhorn("midpoint", loader, **line),
        "`Sinkhorn('random', loader)`": pg.Sinkhorn("random", loader, **line),
        "`StraightThrough(loader)`": pg.StraightThrough(loader, epochs=10, optimizer=fast),
    }


def inner(a: nn.Module, b: dict[str, Tensor], spec: pg.PermutationSpec) -> float:
    fixed = pg.WeightMatching(max_sweeps=0, init="identity")
    return pg.align(a.state_dict(), b, fixed, spec=spec).objective


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs=2, default=[0, 1])
    parser.add_argument("--points", type=int, default=11, help="on the line from A to B")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, test = digits()
    loader = list(zip(data[0].split(64), data[1].split(64), strict=True))
    for name in options.models:
        build, epochs, rate, decay = MODELS[name]
        a, b = (train(build, data, seed=s, epochs=epochs, rate=rate, decay=decay).eval() for s in options.seeds)
        spec = pg.auto_spec(a)

        def prepare(network: nn.Module, t: float, batchnorm: bool = name == "ResNet") -> nn.Module:
            return pg.recalibrate_batchnorm(network, loader) if batchnorm and t not in (0, 1) else network

        print(f"\n### {name}\n")
        print("| matcher | inner product | training loss | barrier | test accuracy | seconds |")
        print("| --- | --- | --- | --- | --- | --- |", flush=True)
        for label, matcher in matchers(loader).items():
            started = time.process_time()
            fit = pg.align(a, b, matcher, spec=spec)
            seconds = time.process_time() - started
            along = pg.barrier(a, fit.model(), pg.evaluate_on([test]), options.points, prepare=prepare)
            seen = pg.barrier(a, fit.model(), pg.evaluate_on([data]), 3, prepare=prepare).losses[1]
            between = along.curves["accuracy"][options.points // 2]
            print(
                f"| {label} | {inner(a, fit.state_dict, spec):.1f} | {seen:.3f} | {along.barrier:.3f} "
                f"| {100 * between:.1f} | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
