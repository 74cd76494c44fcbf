"""Assignment solvers on the cost matrices of weight matching: seconds of processor time, and the proof.

    python benchmarks/assignment.py 64 256 1024 4096
    python benchmarks/assignment.py 8192 14336 --no-scipy --kinds decaying
    python benchmarks/assignment.py 28672 --no-scipy --no-dense --depth 256 --kinds decaying

Each width is solved for three kinds of Gram matrix: of two unrelated layers, of two trained-like layers (a decaying
spectrum, so that all units compete for the same partners), and of a layer and a noisy renumbering of it. `dense` is
`assign(solver="lapx")`, and `auto` is `assign`. The last columns have the gap of `assign_wide`, which is 0 where its
answer is proven optimal; how much more than that the answer of `assign` is worth; and the peak memory so far, of
which the matrix and what it is made from take their part.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from permgraph.matching import assign, assign_wide

KINDS = ("unrelated", "decaying", "planted")


def grams(n: int, kinds: tuple[str, ...] = KINDS, depth: int = 2048) -> Iterator[tuple[str, np.ndarray]]:
    depth = min(n, depth)
    for kind in kinds:
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(n, depth, generator=generator) for _ in range(2))
        if kind == "decaying":
            spectrum = torch.arange(1.0, depth + 1) ** -0.7
            a.mul_(spectrum)
            b.mul_(spectrum)
        elif kind == "planted":
            b = a[torch.randperm(n, generator=generator)] + 0.8 * b
        yield kind, (a @ b.T).numpy()


def seconds(solve: Callable[[], Any]) -> tuple[float, Any]:
    """The least time of several runs, of one if it is long; and the answer."""
    best, spent, found = float("inf"), 0.0, None
    while spent < 0.3 or best == float("inf"):
        start = time.process_time()
        found = solve()
        taken = time.process_time() - start
        best, spent = min(best, taken), spent + taken
    return best, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("widths", nargs="*", type=int, default=[8, 64, 256, 1024])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--depth", type=int, default=2048, help="of the layers that are compared")
    parser.add_argument("--no-scipy", action="store_true", help="leave scipy's solver out, which is the slowest")
    parser.add_argument("--no-dense", action="store_true", help="only `assign_wide`, which makes no second matrix")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    heads = ("auto", "dense", "scipy", "wide")
    print(f"{'n':>6} {'matrix':10} " + " ".join(f"{head:>9}" for head in heads) + f"{'gap':>9} {'more':>9} {'GB':>6}")
    for n in chosen.widths:
        for kind, gram in grams(n, tuple(chosen.kinds), chosen.depth):
            taken: dict[str, float] = {}
            taken["wide"], wide = seconds(lambda gram=gram: assign_wide(gram, maximise=True))  # type: ignore[misc]
            more = float("nan")
            if not chosen.no_dense:
                for head in ("auto", "lapx"):
                    spent, found = seconds(lambda gram=gram, head=head: assign(gram, maximise=True, solver=head))  # type: ignore[misc]
                    taken["dense" if head == "lapx" else head] = spent
                    more = float(found.value - wide.value)
            if not chosen.no_scipy:
                taken["scipy"], _ = seconds(lambda gram=gram: linear_sum_assignment(gram, maximize=True))  # type: ignore[misc]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            times = " ".join(f"{taken[head]:9.4f}" if head in taken else " " * 9 for head in heads)
            print(f"{n:6} {kind:10} {times}{wide.gap:9.2g} {more:9.2g} {peak:6.2f}", flush=True)


if __name__ == "__main__":
    main()
