"""Weight matching over general symmetries beside the same over permutations.

    python benchmarks/general.py --networks llama_160m --threads 2      # the table in docs/matching-benchmarks.md
    python benchmarks/general.py --networks digits_vit64 llama_7m llama_33m

Two kinds of pairs: unrelated networks of random weights; and a network with what an element of its whole group makes of
a noisy copy, whose weights correlate with the original's by `--correlation`. What real pairs are like lies between. The
two matchers take turns on one pair; a row has seconds by the clock and of the processor, how many times as long
general symmetries take by either, sweeps, objectives, and for the second kind the distance that is left beside that of
the noise.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping

import torch

import permgraph
from benchmarks._networks import NETWORKS, Network, State

PAIRS = ("unrelated", "planted")


def pair(
    network: Network, spec: permgraph.PermutationSpec, kind: str, number: int, correlation: float
) -> tuple[State, State]:
    """A, and what is to be brought to it."""
    a = network.state(2 * number)
    other = network.state(2 * number + 1)
    if kind == "unrelated":
        return a, other
    rest = math.sqrt(1 - correlation**2)
    noisy = {n: correlation * w + rest * other[n] if w.ndim > 1 else w for n, w in a.items()}
    return a, spec.random(number).apply(noisy)


def timed(
    matcher: permgraph.WeightMatching, a: State, b: State, spec: permgraph.PermutationSpec
) -> tuple[permgraph.MatchResult, float, float]:
    """What comes out, seconds by the clock, and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = matcher.match(a, b, spec)
    return found, time.perf_counter() - wall, time.process_time() - cpu


def distance(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], names: list[str]) -> float:
    """The root of the sum of squares between two state dicts."""
    return math.sqrt(sum(float((one[n] - other[n]).double().square().sum()) for n in names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=["llama_7m"], metavar="NETWORK",
                        help=", ".join(NETWORKS))  # fmt: skip
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--count", type=int, default=1, help="how many pairs of each kind")
    parser.add_argument("--correlation", type=float, default=0.5, help="of planted pairs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--restarts", type=int, help="starts over general symmetries; by default as many as by default")
    parser.add_argument("--max-sweeps", type=int, default=100)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    columns = ["permutations, s", "processor", "general, s", "processor", "times", "processor", "sweeps", "objective"]
    print("| network | pair | " + " | ".join([*columns, "left"]) + " |")
    print("| --- | --- |" + " ---: |" * (len(columns) + 1), flush=True)
    for name in chosen.networks:
        network = NETWORKS[name]
        spec = permgraph.auto_spec(network.build(), example_inputs=(network.example(),), symmetry="general")
        general = permgraph.WeightMatching(restarts=chosen.restarts, max_sweeps=chosen.max_sweeps)
        for kind in chosen.pairs:
            for number in range(chosen.count):
                a, b = pair(network, spec, kind, number, chosen.correlation)
                _, wall, cpu = timed(permgraph.WeightMatching(), a, b, spec.permutations())
                found, long, longer = timed(general, a, b, spec)
                left = ""
                if kind == "planted":
                    assert found.transformation is not None
                    names = [n for n in spec.axes if n not in spec.general_gains]
                    moved = found.transformation.apply(b)
                    noisy = spec.random(number).inverse().apply(b)
                    left = f"{distance(a, moved, names) / distance(a, noisy, names):.4f}"
                row = (
                    f"{wall:.2f}", f"{cpu:.2f}", f"{long:.2f}", f"{longer:.2f}", f"{long / wall:.2f}",
                    f"{longer / cpu:.2f}", f"{len(found.history)}", f"{found.objective:.2f}", left,
                )  # fmt: skip
                print(f"| {network.label} | {kind} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
