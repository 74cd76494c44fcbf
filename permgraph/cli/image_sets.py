"""MNIST's and CIFAR's files, read as they are given out.

Nothing is unpickled that could run code; the pickles in which CIFAR comes may hold arrays and plain values only.
"""

from __future__ import annotations

import gzip
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from permgraph.cli.options import Split
from permgraph.errors import EvaluationError, PermgraphError, in_one_line

LARGEST_SET = 1 << 32  # bytes; a file that claims more is refused before anything is allocated
MNIST = {
    Split.train: ("train-images-idx3-ubyte", "train-images.idx3-ubyte"),
    Split.test: ("t10k-images-idx3-ubyte", "t10k-images.idx3-ubyte"),
}
CIFAR = {Split.train: ("data_batch_1", "train"), Split.test: ("test_batch", "test")}


def mnist(path: Path, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of MNIST's idx files, (N, 1, H, W) in uint8, and their classes."""
    images, labels = None, None
    for name in MNIST[split]:
        images = images if images is not None else _idx(path / name, 3)
        labels = labels if labels is not None else _idx(path / name.replace("images", "labels").replace("3", "1"), 1)
    if images is None or labels is None:
        raise EvaluationError(
            f"--data {path}: it has no {'images' if images is None else 'labels'} of the {split.value} part"
        )
    if len(images) != len(labels):
        raise EvaluationError(f"--data {path}: {len(images)} images and {len(labels)} labels")
    return images[:, None], labels.long()


def _idx(path: Path, dims: int) -> torch.Tensor | None:
    """An array of bytes in the idx format, or None if there is no such file."""
    zipped = path.with_name(path.name + ".gz")
    if not path.is_file() and not zipped.is_file():
        return None
    opened: IO[bytes]
    try:
        with path.open("rb") if path.is_file() else gzip.open(zipped) as opened:  # type: ignore[assignment]
            head = opened.read(4 + 4 * dims)
            if len(head) < 4 + 4 * dims or head[:4] != bytes((0, 0, 8, dims)):
                raise EvaluationError(f"{path}: not an idx file of bytes in {dims} dimensions")
            shape = [int.from_bytes(head[at : at + 4], "big") for at in range(4, len(head), 4)]
            size = math.prod(shape)
            if size > LARGEST_SET:
                raise EvaluationError(f"{path}: it claims to hold {size} bytes")
            content = opened.read(size + 1)
    except (OSError, EOFError, ValueError) as error:  # a damaged gzip file raises any of these
        if isinstance(error, PermgraphError):
            raise
        raise EvaluationError(f"{path}: it cannot be read: {in_one_line(error, 200)}") from None
    if len(content) != size:
        raise EvaluationError(f"{path}: its header says {shape}, but {len(content)} bytes or more follow")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(shape) if size else torch.empty(shape)


def cifar(path: Path, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of CIFAR's batches, (N, 3, 32, 32) in uint8, and their classes."""
    names = [f"data_batch_{number}" for number in range(1, 6)] if split is Split.train else ["test_batch"]
    files = [path / name for name in names if (path / name).is_file()] or [path / split.value]
    images, labels = [], []
    for file in files:
        content = _plain(file)
        pixels = content.get(b"data", content.get("data"))
        classes = next(
            (content[key] for name in ("fine_labels", "labels") for key in (name, name.encode()) if key in content),
            None,
        )
        if (
            not isinstance(pixels, np.ndarray)
            or pixels.dtype != np.uint8
            or pixels.ndim != 2
            or pixels.shape[1] != 3072
            or not isinstance(classes, (list, tuple))
            or len(classes) != len(pixels)
            or not all(type(label) is int and 0 <= label < 1 << 31 for label in classes)
        ):
            raise EvaluationError(f"{file}: not a batch of CIFAR: it needs rows of 3072 bytes, and a label for each")
        images.append(torch.from_numpy(np.ascontiguousarray(pixels)).view(-1, 3, 32, 32))
        labels.append(torch.tensor(classes, dtype=torch.long))
    return torch.cat(images), torch.cat(labels)


class _PlainUnpickler(pickle.Unpickler):
    """Reads arrays and plain values, and refuses everything else: what it may call is listed here."""

    ALLOWED = frozenset({
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
        ("numpy", "dtype"), ("_codecs", "encode"),
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may name."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and calling that could run code")
        return super().find_class(module.replace("numpy.core", "numpy._core") if NEW_NUMPY else module, name)


NEW_NUMPY = int(np.__version__.split(".")[0]) >= 2


def _plain(path: Path) -> Mapping[Any, Any]:
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file, encoding="bytes").load()
    except OSError:
        raise
    except Exception as error:  # whatever a damaged or hostile pickle can raise
        said = in_one_line(error, 200)
        raise EvaluationError(f"{path}: refused: not a pickle of arrays and plain values: {said}") from None
    if not isinstance(content, Mapping):
        raise EvaluationError(f"{path}: it holds a {type(content).__name__}, not a table with 'data' and 'labels'")
    return content
