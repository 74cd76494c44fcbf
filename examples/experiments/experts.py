"""Two mixtures of experts brought together with each expert in its place, and with experts that may change places.

Each of a mixture's experts is a module of its own, and a router gives each input to two of them. Two networks trained
apart have learnt their experts in different orders. Networks for digits, for MNIST, and for the characters of Python's
help texts; for each way the barriers in test loss and accuracy on the line from A to what became of B.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from common import arguments, console, finished, mean_and_error, table
from networks import Encoder
from torch import Tensor, nn
from torch.nn.functional import gelu
from whole_group import Case, images, loss, network, text

import permgraph as pg


class Mixture(nn.Module):
    """Feed-forward experts, of which a router takes the two likeliest for each input, weighted by its softmax."""

    def __init__(self, width: int, experts: int, hidden: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        mixed = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mixed = mixed + (weights * (chosen == number)).sum(-1, keepdim=True) * expert(x)
        return mixed


class Mixed(nn.Module):
    """An image classifier: a linear layer, two mixtures, and a linear layer."""

    def __init__(self, side: int, width: int = 128, experts: int = 8, hidden: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(side**2, width)
        self.mixtures = nn.ModuleList(Mixture(width, experts, hidden) for _ in range(2))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = gelu(self.first(images.flatten(1)))
        for mixture in self.mixtures:
            x = gelu(mixture(x))
        return self.head(x)


class MixedEncoder(Encoder):
    """A transformer's block with a mixture in the place of its feed-forward layer."""

    def __init__(self, width: int, heads: int, experts: int) -> None:
        super().__init__(width, heads, causal=True)
        del self.up, self.down
        self.mixture = Mixture(width, experts, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mixture(self.norm2(x))


class MixedGPT(nn.Module):
    """A language model of the shape of GPT-2, with mixtures."""

    def __init__(self, characters: int, width: int = 64, heads: int = 4, depth: int = 2, experts: int = 8) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(characters, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList(MixedEncoder(width, heads, experts) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words) + self.position(torch.arange(words.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


CASES = {
    "Digits": lambda: images(Mixed, False, epochs=20, rate=5e-3, decay=0.2),
    "MNIST": lambda: images(Mixed, True, epochs=15, rate=5e-3, decay=0.2),
    "Characters": lambda: text(MixedGPT),
}


@dataclass(frozen=True)
class Way:
    """How B is brought to A.

    Attributes:
        modules: whether experts may change places.
        symmetry: that of the spec.
        by: weights from twelve starts, or of general symmetries those of `WeightMatching`; activations; both, for a
            start by activations among the others; or the loss along the line, from where weights lead.
    """

    modules: bool
    symmetry: Literal["permutation", "general"] = "permutation"
    by: Literal["weights", "activations", "both", "loss"] = "weights"


WAYS: dict[str, Way | None] = {
    "naive": None,
    "experts in place": Way(False),
    "experts change places": Way(True),
    "the same, by activations": Way(True, by="activations"),
    "whole group, experts in place": Way(False, "general"),
    "whole group, experts change places": Way(True, "general"),
    "whole group with an activation start, experts in place": Way(False, "general", "both"),
    "whole group with an activation start, experts change places": Way(True, "general", "both"),
    "learned, experts in place": Way(False, "general", "loss"),
    "learned, experts change places": Way(True, "general", "loss"),
}


def matched(case: Case, a: nn.Module, b: nn.Module, way: Way | None, steps: int) -> tuple[nn.Module, int, float]:
    """What B becomes, how many experts changed places, and the processor time."""
    if way is None:
        return b, 0, 0.0
    started = time.process_time()
    general = way.symmetry == "general"
    spec = pg.auto_spec(a, (case.test[0][0][:2],), symmetry=way.symmetry, modules=way.modules)
    loader = case.statistics() if way.by in ("activations", "both") or (way.by == "loss" and general) else None
    if way.by == "activations":
        matcher: pg.Matcher = pg.ActivationMatching(loader)
    else:
        matcher = pg.WeightMatching(loader=loader) if general else pg.WeightMatching(restarts=12)
    fit = finished(pg.align(a, b, matcher, spec=spec))
    if way.by == "loss":
        fit = finished(pg.align(a, b, pg.LearnedMatching(case.batches, loss, steps=steps, init=fit), spec=spec))
    moved = sum(n for name, n in fit.permutation.moved().items() if name.endswith("experts.*"))
    return fit.model(), moved, time.process_time() - started


def main(argv: Sequence[str] | None = None) -> list[dict[str, object]]:
    parser = arguments(__doc__, models=(), seeds=(1, 2, 3, 4, 5, 6), least=2, points=25)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--steps", type=int, default=400, help="of learning")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, object]] = []
    for name in options.cases:
        case = CASES[name]()
        for pair in zip(options.seeds[::2], options.seeds[1::2], strict=False):
            a, b = (network(case, f"Experts-{name}", seed, options.out / "networks") for seed in pair)
            for way in options.ways:
                moved, count, seconds = matched(case, a, b, WAYS[way], options.steps)
                line = pg.barrier(a, moved, case.evaluate, options.points)
                row = {"case": name, "pair": pair, "way": way, "loss": line.height("loss")}
                found.append(row | {"accuracy": line.height("accuracy"), "experts": count, "seconds": seconds})
                console().print(json.dumps(found[-1]))
    _show(found, options)
    return found


def _show(found: Sequence[dict[str, object]], options: argparse.Namespace) -> None:
    sheet = table("Barriers on the line from A to B", "", "test loss", "error", "accuracy", "error", "moved", "s")
    for name in options.cases:
        sheet.add_row(f"[bold]{name}")
        for way in options.ways:
            rows = [row for row in found if (row["case"], row["way"]) == (name, way)]
            cells = [cell for key in ("loss", "accuracy") for cell in mean_and_error([float(r[key]) for r in rows])]
            counts = [sum(float(r[key]) for r in rows) / len(rows) for key in ("experts", "seconds")]
            sheet.add_row(way, *(f"{cell:.3f}" for cell in cells), *(f"{count:.1f}" for count in counts))
    sheet.show(console(), options.out / "experts.md", options)


if __name__ == "__main__":
    main()
