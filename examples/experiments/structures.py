"""Which structure of a vision transformer's group buys what: by kind of structure, by width and by depth.

Between two trained networks the barriers after matching over permutations alone, with the maps inside heads besides,
with the rotation of the stream besides, over the whole group, and after learning over each. Of a Llama-shaped model of
characters (`--shapes Llama`), whose units have scales and signs, over permutations with these besides, too.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from common import arguments, console, figure, finished, label_rows, legend, line, mean_and_error, table
from matplotlib.axes import Axes
from networks import ViT
from torch import nn
from whole_group import CASES, Case, Line, Results, images, loss, network

import permgraph as pg
from permgraph.spec.general import Action
from permgraph.structures import Structure

KINDS = {
    "permutations": (),
    "scales and signs": ("factors",),
    "heads' maps": ("heads",),
    "stream's rotation": ("stream",),
    "whole group": ("factors", "heads", "stream"),
}
"""Of each way, which kinds of structure are kept; what is not keeps its permutations."""

Found = dict[str, dict[str, list[Line]]]
"""For each shape and way what was measured, for each pair."""


def kind_of(spec: pg.PermutationSpec, group: str) -> str:
    """What a group's structure is: factors of units, maps inside heads, or a rotation of a stream."""
    one = spec.groups[group]
    return "heads" if one.parents and one.structure.linear else "stream" if one.structure.linear else "factors"


def only(spec: pg.PermutationSpec, kinds: Collection[str]) -> pg.PermutationSpec:
    """A part of a spec's group: all permutations, and structures of these kinds."""
    general = spec.general
    if general is None or not kinds:
        return spec.permutations()
    kept = {name for name in spec.groups if kind_of(spec, name) in kinds}
    groups = {
        name: group if name in kept else replace(group, structure=Structure()) for name, group in spec.groups.items()
    }
    paired = [name for name, group in spec.groups.items() if group.structure.is_paired and name not in kept]
    actions = {
        name: tuple(
            action if place.group in kept else Action()
            for action, place in zip(own, spec.occurrences(name), strict=True)
        )
        for name, own in general.actions.items()
    }
    return replace(spec, groups=groups, general=replace(general, actions=actions)).without(paired)


def build(side: int, width: int, depth: int) -> nn.Module:
    return ViT(width=width, heads=4, depth=depth)


def case_of(shape: str) -> tuple[Case, str]:
    """A vision transformer of WIDTHxDEPTH, or a case by its name; and what its networks are called."""
    if shape in CASES:
        return CASES[shape](), shape
    width, depth = map(int, shape.split("x"))
    name = "ViT" if (width, depth) == (64, 2) else f"ViT-{shape}"
    built = functools.partial(build, width=width, depth=depth)
    return images(built, False, epochs=20, rate=5e-3, decay=0.5), name


def ways(
    case: Case, a: nn.Module, b: nn.Module, spec: pg.PermutationSpec, steps: int
) -> Iterator[tuple[str, nn.Module, float]]:
    """What B becomes by each kind of structure, by weights and learned, and the processor time."""
    yield "naive", b, 0.0
    kinds = {kind_of(spec, name) for name, group in spec.groups.items() if not group.structure.is_plain}
    for way, kept in KINDS.items():
        if way != "whole group" and not set(kept) <= kinds:
            continue
        part, started = only(spec, kept), time.process_time()
        fit = finished(pg.align(a, b, spec=part))
        yield way, fit.model(), time.process_time() - started
        if steps:
            how = pg.LearnedMatching(case.batches, loss, steps=steps, init=fit)
            learned = finished(pg.align(a, b, how, spec=part))
            yield f"{way}, learned", learned.model(), time.process_time() - started


def main(argv: Sequence[str] | None = None) -> Found:
    parser = arguments(__doc__, models=(), seeds=(1, 2), least=2, points=11)
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["64x2", "32x2", "128x2", "64x1", "64x4"],
        help="of vision transformers, WIDTHxDEPTH, or cases of whole_group.py (64x2 32x2 128x2 64x1 64x4)",
    )
    parser.add_argument("--steps", type=int, default=100, help="of learning over each part (100; 0: none)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    where, pairs = console(), list(zip(options.seeds[::2], options.seeds[1::2], strict=False))
    results = Results(options.out / "structures.jsonl")
    every: Found = {}
    for shape in options.shapes:
        case, name = case_of(shape)
        for pair in pairs:
            key = (shape, *pair, options.points, options.steps)
            if (*key, "done") not in results.known:
                a, b = (network(case, name, seed, options.out / "networks") for seed in pair)
                spec = pg.auto_spec(a, symmetry="general", example_inputs=(case.test[0][0][:2],))
                for way, moved, seconds in ways(case, a, b, spec, options.steps):
                    path = pg.barrier(a, moved, case.evaluate, options.points)
                    found = Line(path.height("loss"), path.height("accuracy"), seconds, path.losses)
                    results.add((*key, way), found)
                    where.print(f"{shape} {pair}, {way}: {found.loss:.3f} {found.accuracy:.3f} {seconds:.0f} s")
                results.add((*key, "done"), found)
            for one, found in results.known.items():
                if one[:-1] == key and one[-1] != "done":
                    every.setdefault(shape, {}).setdefault(str(one[-1]), []).append(found)
    sheet = table(f"Barriers by structure, {len(pairs)} pairs", "", "test loss", "error", "accuracy", "error", "s")
    for shape, rows in every.items():
        sheet.add_row(f"[bold]{shape}")
        for way, lines in rows.items():
            cells = (*mean_and_error([one.loss for one in lines]), *mean_and_error([one.accuracy for one in lines]))
            seconds = mean_and_error([one.seconds for one in lines])[0]
            sheet.add_row(way, *(f"{cell:.3f}" for cell in cells), f"{seconds:.0f}")
    sheet.show(where, options.out / "structures.md", options)

    def draw(axes: list[Axes]) -> None:
        alphas = [at / (options.points - 1) for at in range(options.points)]
        for ax, (shape, rows) in zip(axes, every.items(), strict=True):
            for at, (way, lines) in enumerate((way, lines) for way, lines in rows.items() if "learned" not in way):
                means = [sum(losses) / len(losses) for losses in zip(*(one.losses for one in lines), strict=True)]
                line(ax, at, alphas, means, way)
            ax.set(title=shape, xlabel="from A to B")
        label_rows(axes, "test loss")
        legend(axes)

    figure(len(every), options.out / "structures.png", draw)
    return every


if __name__ == "__main__":
    main()
