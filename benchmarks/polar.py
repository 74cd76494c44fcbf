"""Polar factors several ways: by singular values, as the matchers compute them, and by iterations.

    python benchmarks/polar.py --sizes 1024 2048 4096
    python benchmarks/polar.py --sizes 8192 --dtypes float32 --ways "singular values" halley

Newton's iteration X ← (γX + X⁻ᵀ/γ)/2 is scaled by the 1- and ∞-norms (Higham, "Computing the polar decomposition with
applications", SIAM J. Sci. Stat. Comput. 1986, section 4), and ends where a step changes nothing that counts. Halley's
with dynamic weights is QDWH (Nakatsukasa, Bai & Gygi, "Optimizing Halley's iteration for computing the matrix polar
decomposition", 2010). What takes products alone are polynomials of the fifth degree, best for singular values from
0.001 to one (Amsel et al., "The Polar Express", 2025), and then of Newton and Schulz. One thread, processor time; how
far the factors are from orthogonal, and, over √n, from the first way's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from permgraph.matching.general.polar import polar

STEPS = 30
STEEP = 100.0
"""Where Halley's weights are larger, a step takes a QR decomposition, and else Cholesky's."""

POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.875, -1.25, 0.375),
)
"""The coefficients of x, x³ and x⁵, one step after the other, of which the last are repeated."""

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


def halley(matrix: Tensor) -> Tensor:
    """The polar factor of an invertible matrix (n, n) by Halley's iteration with dynamic weights."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    x = matrix / torch.linalg.matrix_norm(matrix)
    least = float(1 / (torch.linalg.matrix_norm(torch.linalg.inv(x), 1) * len(matrix) ** 0.5))
    for _ in range(STEPS):
        if abs(1 - least) < 10 * torch.finfo(matrix.dtype).eps:
            break
        square = least**2
        d = (4 * (1 - square) / square**2) ** (1 / 3)
        a = (1 + d) ** 0.5 + (8 - 4 * d + 8 * (2 - square) / (square * (1 + d) ** 0.5)) ** 0.5 / 2
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        if c > STEEP:
            upper, lower = torch.linalg.qr(torch.cat([c**0.5 * x, eye]))[0].chunk(2)
            x = b / c * x + (a - b / c) / c**0.5 * (upper @ lower.mT)
        else:
            root = torch.linalg.cholesky(eye + c * (x.mT @ x))
            x = b / c * x + (a - b / c) * torch.cholesky_solve(x.mT, root).mT
        least *= (a + b * square) / (1 + c * square)
    return x


def products(matrix: Tensor) -> Tensor:
    """The polar factor by matrix products alone, each step the polynomial that lifts small singular values most."""
    x = matrix / torch.linalg.matrix_norm(matrix)
    for step in range(STEPS):
        a, b, c = POLYNOMIALS[min(step, len(POLYNOMIALS) - 1)]
        square = x.mT @ x
        off = float((square - torch.eye(len(x), dtype=x.dtype)).abs().max())
        if step >= len(POLYNOMIALS) and off < 100 * torch.finfo(x.dtype).eps:
            break
        x = a * x + x @ (b * square + c * (square @ square))
    return x


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "singular values": polar,
    "newton": newton,
    "halley": halley,
    "products": products,
}


def timed(compute: Callable[[Tensor], Tensor], matrix: Tensor) -> tuple[Tensor, float]:
    """What it gives, and its processor time."""
    started = time.process_time()
    found = compute(matrix)
    return found, time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--dtypes", nargs="+", choices=["float64", "float32"], default=["float64", "float32"])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    print("| n | precision | way | s | orthogonal to | apart |")
    print("| ---: | --- | --- | ---: | ---: | ---: |")
    for n in chosen.sizes:
        matrix = torch.randn(n, n, generator=generator, dtype=torch.float64)
        eye = torch.eye(n, dtype=torch.float64)
        for name in chosen.dtypes:
            first: Tensor | None = None
            for way in chosen.ways:
                factor, seconds = timed(WAYS[way], matrix.to(getattr(torch, name)))
                exact = factor.double()
                first = exact if first is None else first
                off = float((exact @ exact.mT - eye).abs().max())
                apart = float((exact - first).norm()) / n**0.5
                print(f"| {n:,} | {name} | {way} | {seconds:.2f} | {off:.0e} | {apart:.0e} |", flush=True)


if __name__ == "__main__":
    main()
