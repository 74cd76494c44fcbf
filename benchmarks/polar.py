"""Polar factors two ways: by singular values, as the matchers compute them, and by Newton's iteration.

    python benchmarks/polar.py --sizes 1024 2048 4096

Newton's iteration X ← (γX + X⁻ᵀ/γ)/2 is scaled by the 1- and ∞-norms (Higham, "Computing the polar decomposition with
applications", SIAM J. Sci. Stat. Comput. 1986, section 4), and ends where a step changes nothing that counts. One
thread, float64, processor time; how far the factors are from orthogonal, and from one another.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from permgraph.matching.general.polar import polar

STEPS = 30
ENOUGH = 1e-8
"""A step that changes less: the next one, whose change is of the order of its square, is below rounding."""


def newton(matrix: Tensor) -> Tensor:
    """The polar factor of an invertible matrix (n, n)."""
    x = matrix / matrix.abs().max()
    for _ in range(STEPS):
        inverse = torch.linalg.inv(x).mT
        sizes = [torch.linalg.matrix_norm(m, 1) * torch.linalg.matrix_norm(m, float("inf")) for m in (inverse, x)]
        scale = (sizes[0] / sizes[1]) ** 0.25
        scale = torch.ones_like(scale) if abs(scale - 1) < 1e-2 else scale
        new = (scale * x + inverse / scale) / 2
        change = (new - x).norm() / new.norm()
        x = new
        if change < ENOUGH:
            break
    return x


def timed(compute: Callable[[Tensor], Tensor], matrix: Tensor) -> tuple[Tensor, float]:
    """What it gives, and its processor time."""
    started = time.process_time()
    found = compute(matrix)
    return found, time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 2048])
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    print("| n | singular values, s | Newton, s | ratio | orthogonal to | and | apart |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for n in parser.parse_args().sizes:
        matrix = torch.randn(n, n, generator=generator, dtype=torch.float64)
        (first, seconds), (second, others) = timed(polar, matrix), timed(newton, matrix)
        eye = torch.eye(n, dtype=torch.float64)
        off = [float((q @ q.mT - eye).abs().max()) for q in (first, second)]
        apart = float((first - second).norm()) / n**0.5
        row = (f"{seconds:.2f}", f"{others:.2f}", f"{others / seconds:.2f}", *(f"{x:.0e}" for x in (*off, apart)))
        print(f"| {n:,} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
