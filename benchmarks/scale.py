"""What aligning two models would cost that no one machine holds: the tables of docs/scale.md.

    python benchmarks/scale.py

The models are built without weights. Counts come from `permgraph.planning`; seconds from this machine's calibration
with one thread, and from a machine on paper whose figures are stated.
"""

from __future__ import annotations

import dataclasses

import torch

import permgraph as pg
from benchmarks.zoo import operators
from benchmarks.zoo.sizes import SIZES
from permgraph.planning import Estimate, calibrate, estimate

ON_PAPER = {"flops": 50e12, "read": 5e9, "network": 25e9}  # bytes and operations a second; assignments as on this one
WORKERS = (1, 2, 8, 64)
PASSES = 6
BF16 = 2


def main() -> None:
    operators.provide()
    torch.set_num_threads(1)
    here = calibrate(8)
    on_paper = dataclasses.replace(here, **ON_PAPER)
    print(f"this machine: {here}\non paper: {on_paper}\n")
    costs: dict[str, Estimate] = {}
    for name in [name for name in SIZES if "layers" not in name and "nested" not in name]:
        with torch.device("meta"):
            model = SIZES[name]()
        costs[name] = estimate(pg.auto_spec(model))
    print("| model | PFLOP | assignments | largest Gram GiB | in memory GiB | streamed GiB | read GiB |")
    print("| --- " * 7 + "|")
    for name, cost in costs.items():
        problems = ", ".join(f"{count:,} of {size:,}" for size, count in list(cost.problems.items())[:4])
        print(
            f"| {name} | {cost.flops / 1e15:.3g} | {problems} | {cost.gram / 2**30:.2f} "
            f"| {cost.memory(BF16) / 2**30:,.0f} | {cost.memory(BF16, streamed=True) / 2**30:.1f} "
            f"| {cost.read(BF16) / 2**30:,.0f} |"
        )
    print(f"\nHours for {PASSES} passes, streamed from bf16, every pass computed in full:\n")
    print(f"| model | machine | {' | '.join(f'{n} workers' for n in WORKERS)} |")
    print("| --- | --- " + "| --- " * len(WORKERS) + "|")
    for name, cost in costs.items():
        for machine, rates in (("this one, one thread", here), ("on paper", on_paper)):
            hours = [cost.seconds(rates, passes=PASSES, workers=n, streamed=True, width=BF16) / 3600 for n in WORKERS]
            print(f"| {name} | {machine} | {' | '.join(f'{h:,.3g}' for h in hours)} |")


if __name__ == "__main__":
    main()
