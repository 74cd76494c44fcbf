"""What a step of learned matching costs next to one of plain training.

    python benchmarks/learned.py [--widths 64 256] [--rounds 5]

Processor time of one thread, on transformers with two layers whose streams are so wide, over batches of 64 sequences of
16 places: runs of plain training and of matching over the same batches, both with Adam, alternate, and the median of
their ratios is shown. What matching measures on the way is left out; its projections of permutations are in it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import permgraph as pg

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from networks import ViT

from benchmarks._training import plain


def adam(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


class Timed(list):  # type: ignore[type-arg]
    """A loader that notes the processor's time before and after each pass over it."""

    def __iter__(self):  # type: ignore[no-untyped-def]
        self.started = time.process_time()
        yield from super().__iter__()
        self.seconds = time.process_time() - self.started


def matching(a: nn.Module, b: nn.Module, spec: pg.PermutationSpec, batches: list, how: str) -> float:
    """Seconds of one pass of steps; a second pass, of one step, ends the first."""
    loader = Timed(batches)
    settings = {"validation": batches[:1], "measured": (0.5,), "measure_every": 10 * len(batches)}
    matcher = pg.LearnedMatching(
        loader, optimizer=adam, steps=len(batches) + 1, init=spec.identity(), permutations=how, **settings
    )
    pg.align(a, b, matcher, spec=spec)
    return loader.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(64, 1, 8, 8, generator=generator), torch.randint(10, (64,), generator=generator))
        for _ in range(options.batches)
    ]
    for width in options.widths:
        torch.manual_seed(0)
        a, b = (ViT(width, 4, 2).eval() for _ in "ab")
        spec = pg.auto_spec(a, symmetry="general", example_inputs=(batches[0][0][:3],))
        for how in ("fixed", "straight-through"):
            ratios = []
            for _ in range(options.rounds):
                before = plain(a, batches, adam)
                ours = matching(a, b, spec, batches, how)
                ratios.append(2 * ours / (before + plain(a, batches, adam)))
            shown = ", ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
            print(f"width {width:4}, {how:16} {statistics.median(ratios):5.2f} times plain ({shown})", flush=True)


if __name__ == "__main__":
    main()
