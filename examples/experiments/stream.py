"""How much the units of two transformers' residual streams have in common, before and after matching.

The streams of two networks after their last block, on test data, each unit centred and scaled to length one. Their
cosines, unit against unit, are drawn as they are, after permutations, and after the whole group, both by weights: no
activation was looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import arguments, console, figure, finished, table
from matplotlib.axes import Axes
from torch import Tensor, nn
from whole_group import CASES, Case, network

import permgraph as pg

WAYS = ("as trained", "permutations", "whole group")


def stream(case: Case, model: nn.Module) -> Tensor:
    """The stream after the last block, as (examples and places, units), with units centred."""
    blocks = model.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    seen: list[Tensor] = []
    handle = blocks[-1].register_forward_hook(lambda module, args, result: seen.append(result.flatten(0, -2)))
    with torch.no_grad():
        for x, _ in case.test:
            model(x)
    handle.remove()
    units = torch.cat(seen).double()
    return units - units.mean(0)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of each unit of one stream with each of another."""
    return (a / a.norm(dim=0)).T @ (b / b.norm(dim=0))


Found = dict[str, dict[str, Tensor]]
"""For each case, the cosines of each way."""


def main(argv: Sequence[str] | None = None) -> Found:
    parser = arguments(__doc__, models=(), seeds=(1, 2), least=2, points=None)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["ViT"])
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    sheet = table("Cosines of units and their partners", "", *WAYS)
    every: Found = {}
    for name in options.cases:
        case = CASES[name]()
        a, b = (network(case, name, seed, options.out / "networks") for seed in options.seeds[:2])
        spec = pg.auto_spec(a, symmetry="general", example_inputs=(case.test[0][0][:2],))
        moved = {WAYS[0]: b}
        for way, over in zip(WAYS[1:], (spec.permutations(), spec), strict=True):
            moved[way] = finished(pg.align(a, b, spec=over)).model()
        ours = stream(case, a)
        found = every[name] = {way: cosines(ours, stream(case, model)) for way, model in moved.items()}
        sheet.add_row(name, *(f"{found[way].diagonal().mean():.2f}" for way in WAYS))
    sheet.show(console(), options.out / "stream.md", options)

    def draw(axes: list[Axes]) -> None:
        panels = [(name, way) for name in every for way in WAYS]
        for ax, (name, way) in zip(axes, panels, strict=True):
            image = ax.imshow(every[name][way], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            ax.set_title(f"{name}, {way}", fontsize=10)
            ax.set_xlabel("units of B")
            ax.set_ylabel("units of A")
        axes[0].figure.colorbar(image, ax=axes, shrink=0.7, label="cosine")

    figure(len(every) * len(WAYS), options.out / "stream.png", draw, grid=False)
    return every


if __name__ == "__main__":
    main()
