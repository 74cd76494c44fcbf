"""Two networks brought together by permutations, by weights over the whole group, and by learning over it.

Vision transformers, MLPs and ResNets on digits and on MNIST; models of characters, on the help texts of Python, of the
shapes of GPT-2, Llama (with grouped queries, with a tied head), Gemma and BERT. For each way the barriers in test loss
and accuracy on the line from A to what became of B.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from common import arguments, console, figure, finished, label_rows, legend, mean_and_error, mnist_sample, table
from common import line as curve
from matplotlib.axes import Axes
from models import BERT, GPT, Llama
from networks import MLP, Batch, ResNet, ViT, digits, train
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import permgraph as pg

LENGTH = 32
"""Places of a text that a language model reads."""

MASKED = 0.15
"""Of these places, how many are masked where a model fills them in."""


@dataclass(frozen=True)
class Case:
    """One architecture, how it is trained and measured, what it is matched on, and by how many steps of learning."""

    build: Callable[[], nn.Module]
    train: Callable[[int], nn.Module]
    batches: list[Batch]
    test: list[Batch]
    steps: int

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Test loss and accuracy."""
        losses, right, total = [], 0, 0
        with torch.no_grad():
            for x, y in self.test:
                logits = network(x)
                losses.append(float(loss(logits, y)))
                right, total = right + int((logits.argmax(-1) == y).sum()), total + int((y >= 0).sum())
        return {"loss": sum(losses) / len(losses), "accuracy": right / total}

    def statistics(self) -> list[Batch]:
        """What activations are measured on: about 1,500 images, or 400 windows."""
        return self.batches[:8]


def loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy at each place; at those that are -100 nothing is asked."""
    return cross_entropy(logits.flatten(0, -2), wanted.flatten())


def images(build: Callable[[int], nn.Module], mnist: bool, epochs: int, rate: float, decay: float) -> Case:
    """A network for images, given their side; matched on batches of 256, drawn with repeats."""
    data, test = mnist_sample() if mnist else digits()
    side = data[0].shape[-1]

    def built() -> nn.Module:
        return build(side)

    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(len(data[1]), (256,), generator=generator) for _ in range(400)]
    return Case(
        built,
        lambda seed: train(built, data, seed=seed, epochs=epochs, rate=rate, decay=decay),
        [(data[0][chosen], data[1][chosen]) for chosen in drawn],
        [test],
        400,
    )


def vit(side: int) -> nn.Module:
    """The demo's, over sixteen patches."""
    network = ViT(width=64, heads=4, depth=2)
    if side != 8:
        network.patch = nn.Conv2d(1, 64, side // 4, side // 4)
    return network


def mlp(side: int) -> nn.Module:
    """Three hidden layers."""
    network = MLP(width=256)
    if side != 8:
        network.hidden[0] = nn.Linear(side**2, 256)
    return network


def text(build: Callable[[int], nn.Module], masked: bool = False) -> Case:
    """A model of characters, given how many there are; trained on 1,500 batches of 64 windows, matched on 48.

    It says at each place what follows, or where a place is masked what stood there.
    """
    from pydoc_data.topics import topics

    whole = "\n".join(topics.values())
    alphabet = {character: at for at, character in enumerate(sorted(set(whole)))}
    codes = torch.tensor([alphabet[character] for character in whole])
    cut = int(0.9 * len(codes))

    def windows(part: Tensor, count: int, generator: torch.Generator) -> Batch:
        at = torch.randint(0, len(part) - LENGTH - 1, (count,), generator=generator)
        taken = part[at[:, None] + torch.arange(LENGTH + 1)]
        if not masked:
            return taken[:, :-1], taken[:, 1:]
        hidden = torch.rand(count, LENGTH, generator=generator) < MASKED
        return taken[:, :-1].masked_fill(hidden, len(alphabet)), taken[:, :-1].masked_fill(~hidden, -100)

    def built() -> nn.Module:
        return build(len(alphabet))

    def trained(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = built()
        generator = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=1500)
        for _ in range(1500):
            x, y = windows(codes[:cut], 64, generator)
            optimiser.zero_grad()
            loss(model(x), y).backward()
            optimiser.step()
            schedule.step()
        return model.eval()

    own, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(9)
    batches = [windows(codes[:cut], 48, own) for _ in range(1500)]
    return Case(built, trained, batches, [windows(codes[cut:], 256, other) for _ in range(3)], 1500)


CASES: dict[str, Callable[[], Case]] = {
    "ViT": lambda: images(vit, False, epochs=20, rate=5e-3, decay=0.5),
    "ViT-MNIST": lambda: images(vit, True, epochs=15, rate=5e-3, decay=0.5),
    "MLP": lambda: images(mlp, False, epochs=20, rate=1e-2, decay=0.2),
    "MLP-MNIST": lambda: images(mlp, True, epochs=15, rate=1e-2, decay=0.2),
    "ResNet": lambda: images(lambda side: ResNet(width=16), False, epochs=8, rate=1e-2, decay=0.5),
    "ResNet-MNIST": lambda: images(lambda side: ResNet(width=16), True, epochs=4, rate=1e-2, decay=0.5),
    "GPT": lambda: text(GPT),
    "Llama": lambda: text(Llama),
    "Llama-units": lambda: text(functools.partial(Llama, units=384)),
    "Llama-grouped": lambda: text(functools.partial(Llama, key_heads=2)),
    "Llama-tied": lambda: text(functools.partial(Llama, tied=True)),
    "Gemma": lambda: text(functools.partial(Llama, tied=True, post_norm=True)),
    "BERT": lambda: text(BERT, masked=True),
}


def network(case: Case, name: str, seed: int, folder: Path) -> nn.Module:
    """A trained network, or what an earlier run has left of it."""
    path = folder / f"whole-group-{name}-s{seed}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(case.train(seed).state_dict(), path)
    model = case.build().eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


Prepare = Callable[[nn.Module, float], nn.Module]


def ways(
    case: Case, a: nn.Module, b: nn.Module, spec: pg.PermutationSpec, steps: int, asked: Sequence[str]
) -> Iterator[tuple[str, nn.Module, Prepare, float]]:
    """What B becomes, each way that is asked for, what is done to networks on the line, and the processor time."""
    data = case.statistics()
    batchnorm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in a.modules())

    def as_it_is(model: nn.Module, t: float) -> nn.Module:
        return pg.recalibrate_batchnorm(model, data) if batchnorm and 0 < t < 1 else model

    def matched(matcher: pg.Matcher | None, over: pg.PermutationSpec) -> tuple[pg.Alignment, float]:
        started = time.process_time()
        fit = finished(pg.align(a, b, matcher, spec=over))
        return fit, time.process_time() - started

    if "naive" in asked:
        yield "naive", b, as_it_is, 0.0
    if "permutations" in asked:
        fit, seconds = matched(None, spec.permutations())
        yield "permutations", fit.model(), as_it_is, seconds
    whole, seconds = matched(None, spec)
    if "whole group" in asked:
        yield "whole group", whole.model(), as_it_is, seconds
    if {"activations", "activations, REPAIR"} & {*asked}:
        fit, seconds = matched(pg.WeightMatching(loader=data), spec)
        moved = fit.model()
        if "activations" in asked:
            yield "activations", moved, as_it_is, seconds
        if "activations, REPAIR" in asked:
            parents = [pg.channel_statistics(network, data) for network in (a, moved)]
            yield (
                "activations, REPAIR",
                moved,
                lambda model, t: pg.repair(model, data, parents, weights=(1 - t, t)),
                seconds,
            )
    for permutations in ("fixed", "straight-through"):
        name = f"learned, {permutations}"
        if name in asked:
            how = pg.LearnedMatching(case.batches, loss, steps=steps, init=whole, permutations=permutations)
            fit, more = matched(how, spec)
            yield name, fit.model(), as_it_is, seconds + more


WAYS = (
    "naive", "permutations", "whole group", "activations", "activations, REPAIR", "learned, fixed",
    "learned, straight-through",
)  # fmt: skip


Found = dict[str, dict[str, list["Line"]]]
"""What was measured of each case and way, for each pair."""


class Line(NamedTuple):
    """Barriers in test loss and in accuracy, processor time, and the losses along the line."""

    loss: float
    accuracy: float
    seconds: float
    losses: tuple[float, ...]


class Results:
    """What was measured, each line as soon as it is known, so that a run that was ended goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.known = {
            tuple(key): Line(loss, accuracy, seconds, tuple(losses))
            for key, (loss, accuracy, seconds, losses) in map(json.loads, lines)
        }

    def add(self, key: Sequence[object], found: Line) -> None:
        """Keep one more."""
        self.known[tuple(key)] = found
        with self.path.open("a") as file:
            file.write(json.dumps([key, found]) + "\n")


def main(argv: Sequence[str] | None = None) -> Found:
    parser = arguments(__doc__, models=(), seeds=(1, 2, 3, 4, 5, 6, 7, 8, 9, 10), least=2, points=25)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--circle", action="store_true", help="pairs of neighbours in a circle of the networks")
    parser.add_argument("--steps", type=int, help="of learning (default: each case's)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    where, seeds = console(), options.seeds
    following = [*seeds[1:], seeds[0]]
    pairs = list(zip(seeds, following, strict=True))[:: 1 if options.circle else 2]
    results = Results(options.out / "whole_group.jsonl")
    every: Found = {}
    for name in options.cases:
        case = CASES[name]()
        steps = options.steps or case.steps
        for pair in pairs:
            keys = {way: (name, *pair, way, options.points, steps) for way in options.ways}
            asked = [way for way, key in keys.items() if key not in results.known]
            if not asked:
                continue
            a, b = (network(case, name, seed, options.out / "networks") for seed in pair)
            spec = pg.auto_spec(a, symmetry="general", example_inputs=(case.test[0][0][:2],))
            for way, moved, prepare, seconds in ways(case, a, b, spec, steps, asked):
                line = pg.barrier(a, moved, case.evaluate, options.points, prepare=prepare)
                found = Line(line.height("loss"), line.height("accuracy"), seconds, line.losses)
                results.add(keys[way], found)
                where.print(f"{name} {pair}, {way}: {found.loss:.3f} {found.accuracy:.3f} {seconds:.0f} s")
        every[name] = {
            way: [results.known[(name, *pair, way, options.points, steps)] for pair in pairs] for way in options.ways
        }
    _show(every, len(pairs), where, options)
    return every


def _show(every: Found, pairs: int, where: Console, options: argparse.Namespace) -> None:
    """Print and write the table, and draw the mean losses along the lines."""
    sheet = table(
        f"Barriers on the line from A to B, {pairs} pairs", "", "test loss", "error", "accuracy", "error", "s"
    )
    for name, found in every.items():
        sheet.add_row(f"[bold]{name}")
        for way, lines in found.items():
            cells = (*mean_and_error([one.loss for one in lines]), *mean_and_error([one.accuracy for one in lines]))
            seconds = mean_and_error([one.seconds for one in lines])[0]
            sheet.add_row(way, *(f"{cell:.3f}" for cell in cells), f"{seconds:.0f}")
    sheet.show(where, options.out / "whole_group.md", options)

    def draw(axes: list[Axes]) -> None:
        alphas = [at / (options.points - 1) for at in range(options.points)]
        for ax, (name, found) in zip(axes, every.items(), strict=True):
            for way, lines in found.items():
                means = [sum(losses) / len(losses) for losses in zip(*(one.losses for one in lines), strict=True)]
                curve(ax, WAYS.index(way), alphas, means, way)
            ax.set_title(name)
            ax.set_xlabel("from A to B")
        label_rows(axes, "test loss")
        legend(axes)

    figure(len(every), options.out / "whole_group.png", draw)


if __name__ == "__main__":
    main()
