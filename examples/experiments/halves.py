"""What is in the way half-way between two models of characters: their streams, their heads, or their units.

Half-way between A and a matched B, heads and units are averaged by their weights, as a merge must, or by their outputs,
which takes those of both networks side by side. Barriers there for each of the four combinations: as matched by
weights, as learned, and where it is learned anew for what is averaged, for some steps.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from common import arguments, console, finished, table
from models import rotary
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention, silu
from whole_group import CASES, Case, loss, network

import permgraph as pg
from permgraph.matching.general.between import BalancedLine
from permgraph.matching.general.coordinates import Coordinates
from permgraph.matching.general.free_weights import FreeWeights
from permgraph.matching.general.turning import Turning

HEADS, DEPTH = 4, 2
Weights = Mapping[str, Tensor]
Combination = tuple[bool, bool]
"""Whether heads, and whether units, are averaged by their outputs."""

COMBINATIONS: dict[str, Combination] = {
    "heads and units by weights": (False, False),
    "units by outputs": (False, True),
    "heads by outputs": (True, False),
    "both by outputs": (True, True),
}


def normed(x: Tensor) -> Tensor:
    """Without a gain, since in the gauge that all are matched in there is none."""
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def attention(y: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
    batch, length, width = y.shape
    queries, keys, values = ((y @ m.T).view(batch, length, HEADS, -1).transpose(1, 2) for m in (q, k, v))
    mixed = scaled_dot_product_attention(rotary(queries), rotary(keys), values, is_causal=True)
    return mixed.transpose(1, 2).reshape(batch, length, width) @ out.T


def units(y: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (silu(y @ gate.T) * (y @ up.T)) @ down.T


def logits(a: Weights, b: Weights, t: float, text: Tensor, how: Combination) -> Tensor:
    """Of the network at a point of the line between two without gains."""
    x = embedding(text, torch.lerp(a["embed.weight"], b["embed.weight"], t))
    for block in range(DEPTH):
        halves: tuple[tuple[Callable[..., Tensor], str, bool], ...] = (
            (attention, "q k v out", how[0]),
            (units, "gate up down", how[1]),
        )
        for half, words, by_outputs in halves:
            y, names = normed(x), [f"blocks.{block}.{word}.weight" for word in words.split()]
            if by_outputs:
                x = x + (1 - t) * half(y, *(a[name] for name in names)) + t * half(y, *(b[name] for name in names))
            else:
                x = x + half(y, *(torch.lerp(a[name], b[name], t) for name in names))
    return normed(x) @ torch.lerp(a["head.weight"], b["head.weight"], t).T


def height(case: Case, a: Weights, b: Weights, how: Combination, ends: float) -> float:
    """How far the loss half-way lies above the mean of the ends."""
    with torch.no_grad():
        losses = [float(loss(logits(a, b, 0.5, x, how), y)) for x, y in case.test]
    return sum(losses) / len(losses) - ends


def standing(line: BalancedLine, found: pg.Transformation) -> Weights:
    """B as a transformation moves it, without gains."""
    there = Coordinates(line.acting, line.element(found), dtype=line.dtype)
    return line.moved(there.element, there.inverses)


def learned_anew(
    case: Case, line: BalancedLine, start: pg.Transformation, how: Combination, steps: int, windows: int, rate: float
) -> Weights:
    """B where learning leads, as in `LearnedMatching`, if heads or units are averaged so."""
    coordinates = Coordinates(line.acting, line.element(start), dtype=line.dtype)
    free = FreeWeights(line.acting, line.a)
    structures = {group: line.acting.structure(group) for group in coordinates.leaves}
    matrices = [
        coordinates.leaves[g] for g, structure in structures.items() if structure.linear and not structure.is_paired
    ]
    known = {id(leaf) for leaf in matrices}
    every = [*coordinates.leaves.values(), *free.weights.values()]
    optimizer = Turning(matrices, [leaf for leaf in every if id(leaf) not in known], rate)
    rates, chance = [group["lr"] for group in optimizer.param_groups], torch.Generator().manual_seed(0)
    moved = line.moved(coordinates.element, coordinates.inverses)
    for step in range(steps):
        x, y = case.batches[step % len(case.batches)]
        point = 0.2 + 0.6 * float(torch.rand((), generator=chance))
        own = {name: tensor.clone().requires_grad_() for name, tensor in moved.items()}
        value = loss(logits(line.a, own, point, x[:windows], how), y[:windows])
        slopes = dict(zip(own, torch.autograd.grad(value, list(own.values())), strict=True))
        coordinates.pull_back(moved, slopes)
        free.accept(slopes)
        for group, highest in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = highest * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
        coordinates.advance()
        moved = line.moved(coordinates.element, coordinates.inverses)
        if step % 16 == 15:
            coordinates.element = free.project(coordinates.element, moved)
            moved = line.moved(coordinates.element, coordinates.inverses)
    return moved


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    parser = arguments(__doc__, models=(), seeds=(1, 2), least=2, points=None)
    parser.add_argument("--learned", type=int, default=1500, help="steps of learning as usual (1500)")
    parser.add_argument("--steps", type=int, default=120, help="of learning anew (120)")
    parser.add_argument("--windows", type=int, default=24, help="in each of these steps (24)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    case = CASES["Llama"]()
    a, b = (network(case, "Llama", seed, options.out / "networks") for seed in options.seeds[:2])
    return compare(case, a, b, options)


def compare(case: Case, a: nn.Module, b: nn.Module, options: argparse.Namespace) -> dict[str, list[float]]:
    """The table of two networks."""
    spec = pg.auto_spec(a, symmetry="general", example_inputs=(case.test[0][0][:2],))
    ends = sum(case.evaluate(model)["loss"] for model in (a, b)) / 2
    whole = finished(pg.align(a, b, spec=spec))
    how = pg.LearnedMatching(case.batches, loss, steps=options.learned, init=whole)
    learned = finished(pg.align(a, b, how, spec=spec))
    line = BalancedLine(a, a.state_dict(), b.state_dict(), spec, loss)
    by_weights, as_usual = (standing(line, fit.transformation) for fit in (whole, learned))
    sheet = table("Barrier half-way", "", "by weights", "learned", "learned anew")
    found: dict[str, list[float]] = {}
    for name, combination in COMBINATIONS.items():
        anew = learned_anew(
            case, line, whole.transformation, combination, options.steps, options.windows, 1e-2
        )  # fmt: skip
        found[name] = [height(case, line.a, moved, combination, ends) for moved in (by_weights, as_usual, anew)]
        sheet.add_row(name, *(f"{value:.3f}" for value in found[name]))
    sheet.show(console(), options.out / "halves.md", options)
    return found


if __name__ == "__main__":
    main()
