"""What a step of straight-through matching costs next to one of plain training, and what projecting seldom loses.

    python benchmarks/straight_through.py [--models MLP-512 ...] [--rounds 5]

The first table has processor time of one thread: runs of plain training and of matching, over the same batches with the
same optimizer, alternate, and the median of their ratios is shown. Matching here includes its projections, the one at
the end of each epoch too, but not the measuring of candidates, of which there is one pass for each epoch over at most
`max_batches`. The second has the training loss at the midpoint that is reached from the same pair.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import permgraph as pg

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from networks import MLP, ResNet, ViT, digits, train

from benchmarks._networks import resnet20
from benchmarks._training import plain

MODELS: dict[str, tuple[Callable[[], nn.Module], float, float]] = {
    "MLP-64": (lambda: MLP(64), 1e-2, 0.2),
    "MLP-512": (lambda: MLP(512), 1e-2, 0.2),
    "ResNet-16": (lambda: ResNet(16), 1e-2, 0.5),
    "ResNet-64": (lambda: ResNet(64), 1e-2, 0.5),
    "ResNet-20": (lambda: resnet20(1, 1), 1e-2, 0.5),
    "ViT-64": (lambda: ViT(64, 4, 1), 5e-3, 0.5),
}
EVERY = (4, 16, 32, None)  # None: the default, which counts


def adam(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=3e-3)


def matching(a: nn.Module, b: nn.Module, spec: pg.PermutationSpec, how: pg.StraightThrough) -> tuple[float, float]:
    """Seconds that one epoch adds to a run, and the objective."""
    seen: list[float] = []
    fit = pg.align(a, b, how, spec=spec, progress=lambda _: seen.append(time.process_time()))
    return (seen[-1] - seen[0]) / (len(seen) - 1), fit.objective


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=4, help="over the digits in what counts as an epoch")
    parser.add_argument(
        "--every",
        type=lambda text: None if text == "default" else int(text),
        nargs="+",
        default=list(EVERY),
        help="steps from projection to projection, or 'default'",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, _ = digits()
    batches = list(zip(data[0].split(64), data[1].split(64), strict=True))
    loader = batches * options.passes
    print(f"{'':10} " + " ".join(f"{f'every {k}' if k else 'default':>9}" for k in options.every), flush=True)
    for name in options.models:
        build, rate, decay = MODELS[name]
        a, b = (train(build, data, seed=seed, epochs=8, rate=rate, decay=decay).eval() for seed in (0, 1))
        spec = pg.auto_spec(a)
        ratios: dict[int | None, list[float]] = {k: [] for k in options.every}
        for _ in range(options.rounds):
            for k in options.every:
                before = plain(a, loader, adam)
                how = pg.StraightThrough(loader, epochs=3, project_every=k, max_batches=1, optimizer=adam)
                ours, _ = matching(a, b, spec, how)
                ratios[k].append(2 * ours / (before + plain(a, loader, adam)))
        print(f"{name:10} " + " ".join(f"{statistics.median(r):9.2f}" for r in ratios.values()) + "  time", flush=True)
        losses = []
        for k in options.every:
            how = pg.StraightThrough(loader, epochs=4, project_every=k, max_batches=None, optimizer=adam)
            losses.append(-matching(a, b, spec, how)[1])
        print(f"{'':10} " + " ".join(f"{loss:9.4f}" for loss in losses) + "  loss", flush=True)


if __name__ == "__main__":
    main()
