"""``--data``: batches from the kinds of folders and files that people have, read as they are needed.

Nothing is unpickled that could run code.
"""

from __future__ import annotations

import importlib
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from permgraph.cli.image_sets import CIFAR, MNIST, cifar, mnist
from permgraph.cli.models import load_object
from permgraph.cli.options import Data, Split
from permgraph.cli.text import tokens_of
from permgraph.errors import EvaluationError, MissingExtraError, PermgraphError, in_one_line
from permgraph.io import open_checkpoint
from permgraph.io.torch_file import load_safely
from permgraph.networks.batches import UNCOUNTED, are_the_tokens, next_tokens

INPUTS = ("inputs", "input", "x", "images", "data")
TARGETS = ("targets", "target", "y", "labels", "label")
TOKENS = "input_ids"
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class Batches(Sequence[Any]):
    """The same batches in the same order each time they are read.

    Attributes:
        numbers: of the samples, in order.
        size: samples in a batch.
        take: makes the batch of some samples, given by their numbers.
    """

    numbers: Sequence[int]
    size: int
    take: Callable[[Sequence[int]], Any]

    def __len__(self) -> int:
        return -(-len(self.numbers) // self.size)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start = index % len(self) * self.size
        return self.take(self.numbers[start : start + self.size])


def load_data(asked: Data, folder: Path | None = None, *, split: Split = Split.train) -> Iterable[Any]:
    """The batches that the options name.

    Args:
        asked: the options.
        folder: a Hugging Face folder, whose tokenizer serves for text.
        split: of a data set that has both, unless the options say.

    Raises:
        EvaluationError: there is no such data, or it is damaged or unsafe, or does not fit the options.
        MissingExtraError: a package that reads it is not installed.
    """
    assert asked.data is not None
    for name, value in (("batch-size", asked.batch_size), ("limit", asked.limit), ("length", asked.length)):
        if value is not None and value < 1:
            raise EvaluationError(f"--{name} {value}: give at least 1")
    path, part = Path(asked.data), asked.split or split
    if path.is_dir():
        return _folder(path, part, asked)
    if path.suffix in (".safetensors", ".pt", ".pth", ".npz"):
        return _tensors(path, asked)
    if path.suffix == ".txt":
        return _text(path, asked.tokenizer or folder, asked)
    if path.is_file():
        raise EvaluationError(f"--data {path}: a {path.suffix or 'nameless'} file is not read here; see --help")
    return _of_code(asked.data)


def identity_of_data(asked: Data) -> list[Any]:
    """What the batches depend on, as plain data: options, and the files' names, sizes and times."""
    path = Path(asked.data or "")
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    status = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [{name: str(value) for name, value in vars(asked).items()}, status]


def _batches(count: int, asked: Data, take: Callable[[Sequence[int]], Any]) -> Batches:
    if not count:
        raise EvaluationError(f"--data {asked.data}: it holds no samples")
    taken = min(count, asked.limit or count)
    return Batches([number * count // taken for number in range(taken)], asked.batch_size, take)


def _of_code(text: str) -> Iterable[Any]:
    loader = load_object(text, "data: give a folder, a file, package.module:loader or file.py:loader")
    if callable(loader) and not hasattr(loader, "__iter__"):
        try:
            loader = loader()
        except PermgraphError:
            raise
        except Exception as error:
            raise EvaluationError(f"--data {text}: it fails: {type(error).__name__}: {error}") from error
    if not hasattr(loader, "__iter__"):
        raise EvaluationError(f"--data {text}: gives a {type(loader).__name__}, not batches")
    # A generator can be read once only, and all of it is needed more than once.
    return list(loader) if iter(loader) is loader else loader


# --- tensors ----------------------------------------------------------------------------------------------------------


def _tensors(path: Path, asked: Data) -> Batches:
    tensors = _arrays(path)
    sizes = {name: (tensor.shape[0] if tensor.ndim else 0) for name, tensor in tensors.items()}
    if len(set(sizes.values())) != 1 or not all(sizes.values()):
        raise EvaluationError(f"{path}: its tensors must have one length, not {sizes}")
    inputs = next((name for name in INPUTS if name in tensors), None)
    targets = next((name for name in TARGETS if name in tensors), None)
    if targets is None and TOKENS in tensors:  # a text by itself: each token is predicted from those before it
        targets, tensors["labels"] = "labels", _labels_of(tensors)
    if targets is None:
        raise EvaluationError(f"{path}: no targets; name them one of {', '.join(TARGETS)}; it has {', '.join(tensors)}")
    if are_the_tokens(tensors[targets], tensors.get(TOKENS)):
        tensors[targets] = next_tokens(tensors[targets])
    finish = _Images(asked).finish if inputs is not None and tensors[inputs].dtype == torch.uint8 else None

    def take(numbers: Sequence[int]) -> Any:
        cut = {name: tensor[list(numbers)] for name, tensor in tensors.items()}
        if inputs is not None:
            return (finish(cut[inputs]) if finish else cut[inputs], cut[targets])
        labels = cut.pop(targets)
        return {**cut, "labels": labels}

    return _batches(next(iter(sizes.values())), asked, take)


def _labels_of(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tokens of a text as its labels; padding does not count."""
    tokens, mask = tensors[TOKENS].long(), tensors.get("attention_mask")
    return tokens if mask is None or mask.shape != tokens.shape else tokens.masked_fill(mask == 0, UNCOUNTED)


def _arrays(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise EvaluationError(f"--data {path}: no such file")
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as archive:
                return {name: torch.from_numpy(archive[name]) for name in archive.files}
        except (ValueError, TypeError, OSError, EOFError, KeyError, zipfile.BadZipFile, MemoryError) as error:
            raise EvaluationError(f"{path}: not an archive of plain arrays: {in_one_line(error, 200)}") from None
    if path.suffix in (".pt", ".pth"):
        content = load_safely(path)
        if isinstance(content, (tuple, list)) and len(content) == 2 and all(map(torch.is_tensor, content)):
            return {"inputs": content[0], "targets": content[1]}
    return dict(open_checkpoint(path))


# --- folders ----------------------------------------------------------------------------------------------------------


def _folder(path: Path, split: Split, asked: Data) -> Batches:
    names = {file.name.removesuffix(".gz") for file in path.iterdir() if file.is_file()}
    for known, read in ((MNIST, mnist), (CIFAR, cifar)):
        if names.intersection(known[split]):
            return _labelled(*read(path, split), asked)
    if any(names.intersection(files) for known in (MNIST, CIFAR) for files in known.values()):
        raise EvaluationError(f"--data {path}: it has no {split.value} part: say --split, or add the files")
    if (path / CIFAR_FOLDER).is_dir():
        return _folder(path / CIFAR_FOLDER, split, asked)
    return _pictures(path, split, asked)


CIFAR_FOLDER = "cifar-10-batches-py"  # in which CIFAR-10 unpacks


def _labelled(images: torch.Tensor, labels: torch.Tensor, asked: Data) -> Batches:
    """Batches of images in uint8, (N, C, H, W), and their classes."""
    finish = _Images(asked).finish

    def take(numbers: Sequence[int]) -> Any:
        chosen = list(numbers)
        return finish(images[chosen]), labels[chosen]

    return _batches(len(images), asked, take)


class _Images:
    """What is done to images, in batches of uint8, (N, C, H, W), before a network sees them."""

    def __init__(self, asked: Data) -> None:
        self.mean, self.std = _channels(asked.mean, "mean"), _channels(asked.std, "std")
        self.flatten, self.side = asked.flatten, asked.image_size
        if self.std is not None and not bool((self.std > 0).all()):
            raise EvaluationError(f"--std {asked.std}: give positive numbers")

    def finish(self, images: torch.Tensor) -> torch.Tensor:
        """In float32, scaled to 0..1, then normalised."""
        x = images.float() / 255
        if self.side is not None and x.ndim == 4 and x.shape[-2:] != (self.side, self.side):
            x = torch.nn.functional.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and (x.ndim < 2 or len(values) not in (1, x.shape[1])):
                raise EvaluationError(f"--{name}: {len(values)} numbers for images of shape {tuple(x.shape[1:])}")
        shape = (1, -1, *[1] * (x.ndim - 2))
        x = x if self.mean is None else x - self.mean.view(shape)
        x = x if self.std is None else x / self.std.view(shape)
        return x.flatten(1) if self.flatten else x


def _channels(text: str | None, name: str) -> torch.Tensor | None:
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(map(math.isfinite, values)):
        raise EvaluationError(f"--{name} {text!r}: give a number for each channel, as in 0.49,0.48,0.45")
    return torch.tensor(values)


def _pictures(path: Path, split: Split, asked: Data) -> Batches:
    """Images in one folder for each class, the classes numbered by the names of the folders."""
    parts = (split.value, *(("val", "valid", "validation") if split is Split.test else ()))
    root = next((path / name for name in parts if (path / name).is_dir()), path)
    classes = sorted(folder.name for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    found = [
        (file, number)
        for number, name in enumerate(classes)
        for file in sorted((root / name).rglob("*"))
        if file.suffix.lower() in PICTURES and file.is_file()
    ]
    if not found:
        raise EvaluationError(
            f"--data {path}: neither MNIST's idx files nor CIFAR's batches, nor folders of images, one for each class"
        )
    try:
        image = importlib.import_module("PIL.Image")
    except ImportError:
        raise MissingExtraError("reading images needs pillow: pip install 'permgraph[zoo]'") from None
    side = asked.image_size or 224
    images = _Images(asked)

    def read(file: Path) -> torch.Tensor:
        try:
            with image.open(file) as picture:
                whole = picture.convert("RGB")
        except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
            raise EvaluationError(f"{file}: not an image that can be read: {in_one_line(error, 200)}") from None
        scale = side / min(whole.size)
        width, height = (max(side, round(length * scale)) for length in whole.size)
        whole = whole.resize((width, height), image.Resampling.BILINEAR)
        left, top = (width - side) // 2, (height - side) // 2
        pixels = np.array(whole.crop((left, top, left + side, top + side)))
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def take(numbers: Sequence[int]) -> Any:
        chosen = [found[number] for number in numbers]
        return images.finish(torch.stack([read(file) for file, _ in chosen])), torch.tensor([k for _, k in chosen])

    return _batches(len(found), asked, take)


# --- text -------------------------------------------------------------------------------------------------------------


def _text(path: Path, folder: Path | None, asked: Data) -> Batches:
    """A text cut into samples of equal length, each token's target being the next token."""
    tokens, length = tokens_of(path, folder), asked.length

    def take(numbers: Sequence[int]) -> Any:
        rows = torch.stack([tokens[number * length : (number + 1) * length + 1] for number in numbers])
        return {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}

    if len(tokens) <= length:
        raise EvaluationError(f"{path}: {len(tokens)} tokens, too few for samples of {length}: say --length")
    return _batches((len(tokens) - 1) // length, asked, take)


def class_dim_of(asked: Data, loader: Iterable[Any] | None) -> int:
    """The dimension of the logits that holds the classes: as asked for; the last for texts, else 1."""
    if asked.class_dim is not None:
        return asked.class_dim
    if asked.data and Path(asked.data).is_dir():  # of images
        return 1
    first = None if loader is None else next(iter(loader), None)
    return -1 if isinstance(first, Mapping) and TOKENS in first else 1


def loss_on(class_dim: int) -> Callable[[Any, Any], torch.Tensor]:
    """Cross-entropy for logits with the classes in that dimension."""

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.movedim(class_dim, 1), targets)

    return loss
