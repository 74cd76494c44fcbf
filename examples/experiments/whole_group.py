"""Two transformers brought together by permutations, by weights over the whole group, and by learning over it.

The demo's vision transformer with two layers, on digits, and a Llama-shaped model of characters, on the help texts of
Python. For each way the barriers in test loss and accuracy on the line from A to what became of B.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import arguments, console, finished, mean_and_error, table
from models import Llama
from networks import Batch, ViT, digits, train
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import permgraph as pg

LENGTH = 32
"""Places of a text that a language model reads."""


@dataclass(frozen=True)
class Case:
    """One architecture, how it is trained and measured, and what it is matched on."""

    build: Callable[[], nn.Module]
    train: Callable[[int], nn.Module]
    batches: list[Batch]
    test: list[Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    steps: int

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Test loss and accuracy."""
        losses, right, total = [], 0, 0
        with torch.no_grad():
            for x, y in self.test:
                logits = network(x)
                losses.append(float(self.loss(logits, y)))
                right, total = right + int((logits.argmax(-1) == y).sum()), total + y.numel()
        return {"loss": sum(losses) / len(losses), "accuracy": right / total}


def vision() -> Case:
    """The vision transformer; matched on batches of 256 images, drawn with repeats."""
    data, test = digits()

    def build() -> nn.Module:
        return ViT(width=64, heads=4, depth=2)

    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(len(data[1]), (256,), generator=generator) for _ in range(400)]
    return Case(
        build,
        lambda seed: train(build, data, seed=seed, epochs=20, rate=5e-3, decay=0.5),
        [(data[0][chosen], data[1][chosen]) for chosen in drawn],
        [test],
        cross_entropy,
        400,
    )


def language() -> Case:
    """The model of characters; trained on 1,500 batches of 64 windows, matched on batches of 48."""
    from pydoc_data.topics import topics

    text = "\n".join(topics.values())
    alphabet = {character: at for at, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([alphabet[character] for character in text])
    cut = int(0.9 * len(codes))

    def windows(part: Tensor, count: int, generator: torch.Generator) -> Batch:
        at = torch.randint(0, len(part) - LENGTH - 1, (count,), generator=generator)
        taken = part[at[:, None] + torch.arange(LENGTH + 1)]
        return taken[:, :-1], taken[:, 1:]

    def build() -> nn.Module:
        return Llama(len(alphabet))

    def loss(logits: Tensor, following: Tensor) -> Tensor:
        return cross_entropy(logits.flatten(0, 1), following.flatten())

    def trained(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build()
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
    return Case(build, trained, batches, [windows(codes[cut:], 256, other) for _ in range(3)], loss, 1500)


CASES = {"ViT": vision, "Llama": language}


def network(case: Case, name: str, seed: int, folder: Path) -> nn.Module:
    """A trained network, or what an earlier run has left of it."""
    path = folder / f"whole-group-{name}-s{seed}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(case.train(seed).state_dict(), path)
    model = case.build().eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def ways(
    case: Case, a: nn.Module, b: nn.Module, spec: pg.PermutationSpec, steps: int, asked: Sequence[str]
) -> Iterator[tuple[str, nn.Module, float]]:
    """What B becomes, each way that is asked for, and the processor time that it took."""

    def matched(matcher: pg.LearnedMatching | None, over: pg.PermutationSpec) -> tuple[pg.Alignment, float]:
        started = time.process_time()
        fit = finished(pg.align(a, b, matcher, spec=over))
        return fit, time.process_time() - started

    if "naive" in asked:
        yield "naive", b, 0.0
    if "permutations" in asked:
        fit, seconds = matched(None, spec.permutations())
        yield "permutations", fit.model(), seconds
    whole, seconds = matched(None, spec)
    yield "whole group", whole.model(), seconds
    for permutations in ("fixed", "straight-through"):
        name = f"learned, {permutations}"
        if name in asked:
            how = pg.LearnedMatching(case.batches, case.loss, steps=steps, init=whole, permutations=permutations)
            fit, more = matched(how, spec)
            yield name, fit.model(), seconds + more


WAYS = ("naive", "permutations", "whole group", "learned, fixed", "learned, straight-through")


Found = dict[str, dict[str, list[tuple[float, float, float]]]]
"""For each case and way, for each pair: barriers in test loss and in accuracy, and seconds."""


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
    sheet = table(
        f"Barriers on the line from A to B, {len(pairs)} pairs", "", "test loss", "error", "accuracy", "error", "s"
    )
    every: Found = {}
    for name in options.cases:
        case = CASES[name]()
        sheet.add_row(f"[bold]{name}")
        found = every[name] = {}
        for pair in pairs:
            a, b = (network(case, name, seed, options.out / "networks") for seed in pair)
            spec = pg.auto_spec(a, symmetry="general", example_inputs=(case.test[0][0][:2],))
            for way, moved, seconds in ways(case, a, b, spec, options.steps or case.steps, options.ways):
                line = pg.barrier(a, moved, case.evaluate, options.points)
                found.setdefault(way, []).append((line.height("loss"), line.height("accuracy"), seconds))
                where.print(f"{name} {pair}, {way}: {found[way][-1]}")
        for way, values in found.items():
            losses, accuracies, seconds = zip(*values, strict=True)
            cells = (*mean_and_error(losses), *mean_and_error(accuracies))
            sheet.add_row(way, *(f"{cell:.3f}" for cell in cells), f"{mean_and_error(seconds)[0]:.0f}")
    sheet.show(where, options.out / "whole_group.md", options)
    return every


if __name__ == "__main__":
    main()
