"""What the experiments share: data, recipes, trained networks that are kept between runs, tables and figures."""

from __future__ import annotations

import argparse
import copy
import gzip
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, pad

import permgraph as pg

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the demo's networks stand one folder above
from networks import MLP, Batch, ResNet, ViT, digits, train

State = dict[str, Tensor]
Step = Callable[[], None]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Recipe:
    """How one architecture is built, at a width, and trained."""

    build: Callable[[int], nn.Module]
    width: int
    epochs: int
    rate: float
    decay: float
    batchnorm: bool = False


RECIPES = {
    "MLP": Recipe(lambda width: MLP(width=width), width=512, epochs=20, rate=1e-2, decay=0.2),
    "ResNet": Recipe(lambda width: ResNet(width=width), width=16, epochs=8, rate=1e-2, decay=0.5, batchnorm=True),
    "ViT": Recipe(lambda width: ViT(width=width, heads=4, depth=1), width=64, epochs=15, rate=5e-3, decay=0.5),
}


@dataclass(frozen=True)
class Setting:
    """One architecture on one data set, and where its trained networks are kept."""

    name: str
    width: int
    epochs: int
    data: Batch
    test: Batch
    source: str
    folder: Path

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.name]

    @property
    def loader(self) -> list[Batch]:
        """The training data in a few large batches, always the same."""
        return list(zip(self.data[0].split(480), self.data[1].split(480), strict=True))

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Test loss and accuracy."""
        return pg.evaluate_on([self.test])(network)

    def prepare(self, network: nn.Module, t: float = 0.5) -> nn.Module:
        """Recalibrate BatchNorm, where there is any, between networks; the ends keep their own statistics."""
        return network if t in (0, 1) else self.recalibrate(network)

    def recalibrate(self, network: nn.Module, _: float = 0.5) -> nn.Module:
        """Recalibrate BatchNorm, where there is any, of any network, since hybrids have no statistics of their own."""
        return pg.recalibrate_batchnorm(network, self.loader) if self.recipe.batchnorm else network

    def barrier(self, a: nn.Module, b: nn.Module | Mapping[str, Tensor], points: int) -> pg.Barrier:
        """The barrier in test loss and accuracy, with BatchNorm recalibrated."""
        return pg.barrier(a, b, self.evaluate, points, prepare=self.prepare)

    def network(self, state: Mapping[str, Tensor]) -> nn.Module:
        """A network with these weights."""
        network = self.recipe.build(self.width).eval()
        network.load_state_dict(state)
        return network

    def train(
        self,
        seed: int,
        *,
        start: nn.Module | None = None,
        masks: Mapping[str, Tensor] | None = None,
        epochs: int | None = None,
        keep: Sequence[int] = (),
        tag: str = "",
        step: Step = lambda: None,
    ) -> list[State]:
        """Train one network, or read it from the folder where an earlier run has left it.

        Args:
            seed: of the initial weights, where there is no ``start``, and of the order of the data.
            start: weights to begin at.
            masks: parameters that are pruned, by name: where the mask is 0, weights are and stay 0.
            epochs: how many; the recipe's by default.
            keep: return the states after these epochs too (0: the start), before that at the end.
            tag: what tells this training from others of the same seed.
            step: called after each epoch.
        """
        epochs = self.epochs if epochs is None else epochs
        kept = "-".join(map(str, keep))
        path = self.folder / f"{self.name}-{self.source}-w{self.width}-e{epochs}-s{seed}{tag}-k{kept}.pt"
        if path.exists():
            for _ in range(epochs):
                step()
            return list(torch.load(path, weights_only=True))
        states: list[State] = []
        built: list[nn.Module] = []
        passed = 0

        def build() -> nn.Module:
            network = self.recipe.build(self.width) if start is None else copy.deepcopy(start)
            for name, parameter in network.named_parameters():
                if masks is not None and name in masks:
                    with torch.no_grad():
                        parameter.mul_(masks[name])
                    parameter.register_hook(lambda gradient, mask=masks[name]: gradient * mask)
            built.append(network)
            look()
            return network

        def look() -> None:
            if passed in keep:
                states.append({name: tensor.clone() for name, tensor in built[0].state_dict().items()})

        def after_epoch() -> None:
            nonlocal passed
            passed += 1
            look()
            step()

        r = self.recipe
        with torch.random.fork_rng(devices=[]):
            final = train(build, self.data, seed=seed, epochs=epochs, rate=r.rate, decay=r.decay, progress=after_epoch)
        states.append({name: tensor.detach().clone() for name, tensor in final.state_dict().items()})
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        torch.save(states, partial)
        partial.replace(path)  # a run that is interrupted leaves no half-written network
        return states


def arguments(description: str | None, *, models: Sequence[str], seeds: Sequence[int], points: int = 11):
    """A parser of what all experiments take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = " ".join(map(str, seeds))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds), help=f"of the networks ({default})")
    parser.add_argument("--models", choices=list(RECIPES), nargs="+", default=list(models), help="architectures")
    parser.add_argument("--width", type=int, help="of every network (default: each recipe's)")
    parser.add_argument("--epochs", type=int, help="of training (default: each recipe's)")
    parser.add_argument("--points", type=int, default=points, help=f"on each line ({points})")
    parser.add_argument("--data-dir", type=Path, help="a folder with MNIST's four idx files, instead of digits")
    parser.add_argument("--out", type=Path, default=Path("experiments"), help="folder to write to (experiments)")
    return parser


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """Each architecture asked for."""
    torch.set_num_threads(1)  # computations as small as these gain nothing from a second one
    options.out.mkdir(parents=True, exist_ok=True)
    data, test = digits() if options.data_dir is None else mnist(options.data_dir)
    for name in options.models:
        recipe = RECIPES[name]
        yield Setting(
            name,
            options.width or recipe.width,
            options.epochs or recipe.epochs,
            data,
            test,
            "digits" if options.data_dir is None else "mnist",
            options.out / "networks",
        )


def mnist(folder: Path) -> tuple[Batch, Batch]:
    """MNIST from its idx files, compressed or not, averaged down to the 8 by 8 pixels that the networks take."""

    def split(name: str) -> Batch:
        images = _idx(folder, f"{name}-images-idx3-ubyte").float()[:, None]
        small = adaptive_avg_pool2d(pad(images, (2, 2, 2, 2)), 8)
        return small, _idx(folder, f"{name}-labels-idx1-ubyte").long()

    (images, labels), (test, answers) = split("train"), split("t10k")
    mean, deviation = images.mean(), images.std()
    return ((images - mean) / deviation, labels), ((test - mean) / deviation, answers)


def _idx(folder: Path, name: str) -> Tensor:
    plain, packed = folder / name, folder / f"{name}.gz"
    if not plain.exists() and not packed.exists():
        raise SystemExit(f"{folder} has neither {plain.name} nor {packed.name}")
    raw = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    dims = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * d : 8 + 4 * d], "big") for d in range(dims)]
    return torch.frombuffer(bytearray(raw[4 + 4 * dims :]), dtype=torch.uint8).view(shape)


def console() -> Console:
    """The terminal, or 110 columns where the output goes elsewhere."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=110)


@contextmanager
def bar(where: Console, description: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar; yields a function that advances it by one, whatever it is given."""
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=where) as progress:
        task = progress.add_task(description, total=total)
        yield lambda *_: progress.advance(task)


def table(title: str, *columns: str, caption: str = "") -> Table:
    """An empty table whose first column is text and whose others are numbers."""
    result = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    for number, column in enumerate(columns):
        result.add_column(column, justify="right" if number else "left", no_wrap=True)
    return result


def figure(columns: int, path: Path, draw: Callable[[list[Axes]], None]) -> None:
    """Draw into a row of axes, and write the figure."""
    fig = Figure(figsize=(4.4 * columns, 3.6), layout="constrained")
    FigureCanvasAgg(fig)
    axes = list(fig.subplots(1, columns, squeeze=False)[0])
    draw(axes)
    for ax in axes:
        ax.grid(alpha=0.25)
    fig.savefig(path, dpi=150)


def line(ax: Axes, number: int, x: Sequence[object], y: Sequence[float], label: str) -> None:
    """One curve, with a colour, a marker and a dash of its own."""
    dash = ("-", "--", "-.", ":")[number % 4]
    ax.plot(x, y, color=COLOURS[number], marker=MARKERS[number], linestyle=dash, markersize=5, label=label)
