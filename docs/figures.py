"""Draw the figures of the documentation: python docs/figures.py [FOLDER]."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor, nn

import permgraph as pg
from permgraph.pictures.palette import COLOURS

FOLDER = Path(__file__).parent / "images"
INK, FAINT = "#30343c", "#8a909a"


def main(folder: Path = FOLDER) -> None:
    """Write every figure to ``folder`` as SVG: the same bytes each time, with one version of matplotlib."""
    plt.rcParams.update({"svg.hashsalt": "permgraph", "font.size": 9, "text.color": INK, "savefig.facecolor": "white"})
    for name, draw in FIGURES.items():
        figure = draw()
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.08)
        plt.close(figure)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose data are inches, from the lower left corner."""
    figure = plt.figure(figsize=(width, height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(0, width)
    ax.set_ylim(0, height)
    ax.set_axis_off()
    return figure, ax


def renumbering() -> Figure:
    """One network, drawn twice: its hidden units in two orders."""
    figure, ax = canvas(6.4, 2.3)
    order = [2, 0, 3, 1]
    for left, shown, title in ((0.35, range(4), "W₁, W₂"), (3.75, order, "P W₁, W₂ Pᵀ")):
        ax.text(left + 1.1, 2.1, title, ha="center", va="center")
        hidden = {unit: (left + 1.1, 1.72 - 0.45 * at) for at, unit in enumerate(shown)}
        for at in range(3):
            for unit, place in hidden.items():
                ax.plot(
                    (left + 0.1, place[0]), (1.5 - 0.45 * at, place[1]), color=COLOURS[unit], alpha=0.55, linewidth=1.2
                )
        for at in range(2):
            for unit, place in hidden.items():
                ax.plot(
                    (place[0], left + 2.1), (place[1], 1.27 - 0.45 * at), color=COLOURS[unit], alpha=0.55, linewidth=1.2
                )
        for at in range(3):
            ax.plot(left + 0.1, 1.5 - 0.45 * at, marker="o", markersize=9, color="white", markeredgecolor=FAINT)
        for at in range(2):
            ax.plot(left + 2.1, 1.27 - 0.45 * at, marker="o", markersize=9, color="white", markeredgecolor=FAINT)
        for unit, (x, y) in hidden.items():
            ax.plot(x, y, marker="o", markersize=13, color=COLOURS[unit])
            ax.text(x, y, str(unit + 1), color="white", ha="center", va="center", fontsize=8)
    ax.text(3.2, 1.05, "=", ha="center", va="center", fontsize=18)
    return figure


def unification() -> Figure:
    """What `view`, `softmax(q k) v` and the output projection tell about the axes of an attention layer."""
    figure, ax = canvas(6.6, 2.75)

    def tensor(x: float, y: float, name: str, axes: list[list[tuple[str, str]]]) -> float:
        ax.text(x, y + 0.3, name, fontsize=8, color=FAINT)
        for factors in axes:  # the factors of one axis touch each other
            for text, colour in factors:
                wide = 0.16 + 0.068 * len(text)
                ax.add_patch(Rectangle((x, y - 0.13), wide, 0.28, facecolor=colour, alpha=0.18, edgecolor=colour))
                ax.text(x + wide / 2, y, text, ha="center", va="center", fontsize=8)
                x += wide
            x += 0.07
        return x

    stream, head = ("stream", COLOURS[0]), ("head", COLOURS[1])
    channel, position = ("channel", COLOURS[2]), ("position", FAINT)
    first = tensor(0.1, 2.2, "v_proj.weight", [[head, channel], [stream]])
    tensor(2.75, 2.2, "v: after view and transpose", [[head], [position], [channel]])
    tensor(2.75, 1.25, "softmax(q kᵀ) v", [[head], [position], [channel]])
    tensor(2.75, 0.3, "after view", [[position], [head, channel]])
    last = tensor(0.1, 0.3, "out_proj.weight", [[stream], [head, channel]])
    arrow = {"arrowstyle": "-|>", "mutation_scale": 9, "color": INK, "linewidth": 0.9}
    for start, stop, text, place in (
        ((first, 2.2), (2.7, 2.2), "mm, view", None),
        ((3.85, 2.02), (3.85, 1.4), "bmm", (3.95, 1.78)),
        ((3.85, 1.07), (3.85, 0.45), "view", (3.95, 0.83)),
        ((2.7, 0.3), (last, 0.3), "addmm", None),
    ):
        ax.add_patch(FancyArrowPatch(start, stop, **arrow))
        where = place or ((start[0] + stop[0]) / 2, start[1] + 0.12)
        ax.text(*where, text, fontsize=7.5, color=INK, ha="left" if place else "center", va="center")
    said = (
        "view cuts one atom into\nhead × channel; the cut\nreaches back to the weight,\n"
        "and on to the output\nprojection"
    )
    ax.text(5.05, 1.25, said, fontsize=8, color=INK, va="center", linespacing=1.5)
    return figure


def wreath() -> Figure:
    """Heads change places, and within each the channels do, in each their own way."""
    figure, ax = canvas(6.2, 1.75)
    heads, orders = [2, 0, 1], {0: [1, 0, 3, 2], 1: [3, 2, 1, 0], 2: [2, 3, 0, 1]}
    below: dict[tuple[int, int], float] = {}
    for row, shown in ((1.15, [(h, list(range(4))) for h in range(3)]), (0.2, [(h, orders[h]) for h in heads])):
        for at, (head, channels) in enumerate(shown):
            x = 0.25 + 1.95 * at
            box = FancyBboxPatch(
                (x, row), 1.7, 0.42, boxstyle="round,pad=0.03", facecolor="none", edgecolor=COLOURS[head]
            )
            ax.add_patch(box)
            for place, channel in enumerate(channels):
                left = x + 0.06 + 0.41 * place
                ax.add_patch(
                    Rectangle((left, row + 0.06), 0.36, 0.3, facecolor=COLOURS[head], alpha=0.25 + 0.2 * channel)
                )
                ink = "white" if channel >= 2 else INK
                ax.text(
                    left + 0.18,
                    row + 0.21,
                    f"{head + 1}.{channel + 1}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=ink,
                )
                if row < 1:
                    ax.plot(
                        (below[head, channel], left + 0.18),
                        (1.1, row + 0.47),
                        color=COLOURS[head],
                        alpha=0.5,
                        linewidth=0.9,
                    )
                else:
                    below[head, channel] = left + 0.18
    return figure


class Block(nn.Module):
    """A transformer's block with separate projections, small enough to draw."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Four blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.blocks = nn.Sequential(*(Block(64, 4) for _ in range(4)))
        self.head = nn.Linear(64, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(tokens)).mean(1))


def lanes() -> Figure:
    """The groups of a small transformer."""
    with torch.random.fork_rng():
        spec = pg.auto_spec(Transformer(), example_inputs=(torch.arange(6)[None],))
    figure = spec.plot().figure
    assert isinstance(figure, Figure)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "renumbering": renumbering,
    "unification": unification,
    "wreath": wreath,
    "lanes": lanes,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
