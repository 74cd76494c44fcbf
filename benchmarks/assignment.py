"""Exact assignment solvers on the cost matrices of weight matching: seconds, and the certificate.

    python benchmarks/assignment.py 64 256 1024 4096
    python benchmarks/assignment.py --certify --no-scipy 8192

Each width is solved for three kinds of Gram matrix: of two unrelated layers, of two trained-like layers (a decaying
spectrum, so that all units compete for the same partners), and of a layer and a noisy renumbering of it.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import lap
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from permgraph.matching import assign


def grams(n: int) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    depth = min(n, 2048)
    a, b = (torch.randn(n, depth, generator=generator) for _ in range(2))
    spectrum = torch.arange(1.0, depth + 1) ** -0.7
    order = torch.randperm(n, generator=generator)
    return {
        "unrelated": (a @ b.T).numpy(),
        "decaying": ((a * spectrum) @ (b * spectrum).T).numpy(),
        "planted": (a @ (a[order] + 0.8 * b).T).numpy(),
    }


def seconds(solve: Callable[[], object]) -> float:
    best, spent = float("inf"), 0.0
    while spent < 0.3 or best == float("inf"):
        start = time.perf_counter()
        solve()
        taken = time.perf_counter() - start
        best, spent = min(best, taken), spent + taken
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("widths", nargs="*", type=int, default=[8, 64, 256, 1024])
    parser.add_argument("--certify", action="store_true", help="also prove the answer optimal, and time that")
    parser.add_argument("--no-scipy", action="store_true", help="leave the slower solvers out")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'n':>6} {'matrix':10} {'assign':>9} {'scipy':>9} {'lapjv':>9} {'speed-up':>9} {'certify':>9} {'gap':>9}")
    for n in chosen.widths:
        for kind, gram in grams(n).items():
            ours = seconds(lambda gram=gram: assign(gram, maximise=True))  # type: ignore[misc]
            line = f"{n:6} {kind:10} {ours:9.5f} "
            if chosen.no_scipy:
                line += f"{'':29} "
            else:
                scipy = seconds(lambda gram=gram: linear_sum_assignment(gram, maximize=True))  # type: ignore[misc]
                lapjv = seconds(lambda gram=gram: lap.lapjv(-gram, return_cost=False))  # type: ignore[misc]
                line += f"{scipy:9.5f} {lapjv:9.5f} {scipy / ours:8.1f}x "
            if chosen.certify:
                start = time.perf_counter()
                found = assign(gram, maximise=True, certified=True)
                line += f"{time.perf_counter() - start - ours:9.3f} {found.gap:9.2g}"
            print(line, flush=True)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")


if __name__ == "__main__":
    main()
