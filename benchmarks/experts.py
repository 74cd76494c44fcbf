"""Weight matching of one layer of experts that are modules of their own: time and memory by their number and size.

    python benchmarks/experts.py --experts 8 64 128 256 --hidden 128 --width 448

Each layer is planted: B is A with noise; experts, units and the stream are in another order. With --all, all pairs
of experts are looked at too, as is done up to 64 of them.
"""

from __future__ import annotations

import argparse
import time

import torch

import permgraph as pg
from permgraph.matching import tuned


def layer(experts: int, hidden: int, width: int) -> pg.PermutationSpec:
    """A router, and three matrices for each expert, between a table of 4,096 rows and a head."""
    return pg.PermutationSpec.parse(
        f"up {experts}x{hidden}x{width} e h d\ngate {experts}x{hidden}x{width} e h d\n"
        f"down {experts}x{width}x{hidden} e d h\n"
        f"router {experts}x{width} e d\ntable 4096x{width} . d\nhead 512x{width} . d\n"
        f"groups: e {experts} · d {width} · h {hidden} per e"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 128, 256])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--width", type=int, default=448)
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--all", action="store_true", help="look at all pairs as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for experts in options.experts:
        spec = layer(experts, options.hidden, options.width)
        generator = torch.Generator().manual_seed(0)
        a = {name: torch.randn(shape, generator=generator) for name, shape in spec.shapes.items()}
        moved = spec.random(1, every_group=True)
        b = moved.apply({n: t + options.noise * torch.randn(t.shape, generator=generator) for n, t in a.items()})
        said = []
        for pairs in (tuned.ALL_PAIRS, experts) if options.all else (tuned.ALL_PAIRS,):
            tuned.ALL_PAIRS, before = pairs, tuned.ALL_PAIRS
            started = time.process_time()
            fit = pg.WeightMatching(restarts=1).match(a, b, spec)
            seconds, tuned.ALL_PAIRS = time.process_time() - started, before
            right = int((fit.permutation.arrays["e"] == moved.inverse().arrays["e"]).sum())
            said.append(f"{seconds:.1f} s, {fit.sweeps} sweeps, {right} experts back, objective {fit.objective:.6g}")
        print(
            f"{experts} experts of {options.hidden} units, width {options.width}: {'; all pairs: '.join(said)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
