"""Folders that ``torch.distributed.checkpoint`` wrote: tensors in chunks over many files, and a description of them.

The description, ``.metadata``, is a pickle. It is read by an unpickler that knows the handful of plain classes of which
such descriptions are made, and refuses anything else before it is looked up. The chunks are PyTorch files within files,
read with ``weights_only=True``.
"""

from __future__ import annotations

import io
import math
import os
import pathlib
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from permgraph.errors import CheckpointError, in_one_line
from permgraph.io.tensors import TensorFormat

METADATA = ".metadata"
LARGEST_METADATA = 1 << 30  # bytes

_OF_METADATA = (
    "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
    "TensorProperties", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_DTYPES = {str(value).partition(".")[2] for value in vars(torch).values() if isinstance(value, torch.dtype)}


class _Description(pickle.Unpickler):
    """Reads a description, and nothing but one."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "torch.distributed.checkpoint.metadata": _OF_METADATA,
            "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
            "torch.serialization": ("_get_layout",),
            "torch": ("Size", *_DTYPES),
            "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"),
            "collections": ("OrderedDict",),
        }
        if name not in known.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        if module == "pathlib":  # a path of the writer's system, which may be another; nobody opens it
            return pathlib.PurePosixPath
        return super().find_class(module, name)


@dataclass(frozen=True)
class _Chunk:
    """Where a part of a tensor lies: in the tensor, and in the files."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    path: Path
    offset: int
    length: int

    def overlaps(self, other: _Chunk) -> bool:
        """Whether some element of the tensor lies in both; an empty part lies nowhere."""
        return all(
            max(s, t) < min(s + n, t + m)
            for s, n, t, m in zip(self.start, self.shape, other.start, other.shape, strict=True)
        )


@dataclass(frozen=True)
class DistributedFolder:
    """A folder of ``torch.distributed.checkpoint``, of which each tensor is put together when it is read.

    Attributes:
        path: its description.
        formats: name to dtype and shape, in the order of the description; the names are those of the flat state dict,
            such as ``model.layers.0.weight``.
        dropped: what else it holds that is not a tensor (a step count, an optimiser's settings).
    """

    path: Path
    formats: Mapping[str, TensorFormat]
    dropped: tuple[str, ...]
    _chunks: Mapping[str, tuple[_Chunk, ...]]
    _places: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> DistributedFolder:
        """Read and check the description; no tensor is read.

        Raises:
            CheckpointError: it is damaged or unsafe, its chunks do not cover their tensors, or a file is missing.
        """
        path = Path(folder, METADATA)
        described, stored, places = _describe(path)
        formats: dict[str, TensorFormat] = {}
        chunks: dict[str, tuple[_Chunk, ...]] = {}
        dropped: list[str] = []
        for name, entry in described.items():
            if not hasattr(entry, "chunks"):
                dropped.append(name)
                continue
            shape = tuple(int(size) for size in entry.size)
            formats[name] = TensorFormat(entry.properties.dtype, shape)
            found = []
            for part in entry.chunks:
                start = tuple(int(at) for at in part.offsets)
                place = stored.get((name, start))
                if place is None:
                    raise CheckpointError(f"{path}: the part of {name!r} at {start} is stored nowhere")
                found.append(_chunk(path, name, shape, start, tuple(int(size) for size in part.sizes), place))
            covered = sum(math.prod(chunk.shape) for chunk in found)
            if covered != math.prod(shape) or _overlap(found):
                raise CheckpointError(f"{path}: the parts of {name!r} do not make up its shape {shape}")
            chunks[name] = tuple(found)
        return cls(path, formats, tuple(dropped), chunks, {name: places[name] for name in formats if name in places})

    def read(self, key: str) -> torch.Tensor:
        """Put a tensor together from its parts."""
        form = self.formats[key]
        whole = torch.empty(form.shape, dtype=form.dtype)
        for chunk in self._chunks[key]:
            part = _load(chunk, key)
            if part.dtype != form.dtype or tuple(part.shape) != chunk.shape:
                raise CheckpointError(
                    f"{chunk.path}: the part of {key!r} at {chunk.start} is {part.dtype} of shape {tuple(part.shape)}, "
                    f"not {form.dtype} of shape {chunk.shape}"
                )
            whole[tuple(slice(s, s + n) for s, n in zip(chunk.start, chunk.shape, strict=True))] = part
        return whole

    def part_files(self) -> dict[str, str]:
        """Each tensor to the name of the file that holds it in a folder like this one: one file each."""
        return {name: f"__{number}_0.distcp" for number, name in enumerate(self.formats)}

    def description(self, folder: Path) -> bytes:
        """The description of a folder like this one that holds each tensor in a file of its own."""
        from torch.distributed.checkpoint import metadata
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        described: dict[str, metadata.STORAGE_TYPES] = {}
        stored = {}
        for name, file in self.part_files().items():
            form = self.formats[name]
            whole = metadata.ChunkStorageMetadata(torch.Size([0] * len(form.shape)), torch.Size(form.shape))
            described[name] = metadata.TensorStorageMetadata(
                metadata.TensorProperties(dtype=form.dtype), torch.Size(form.shape), [whole]
            )
            index = metadata.MetadataIndex(name, whole.offsets, 0)
            stored[index] = _StorageInfo(file, 0, (folder / file).stat().st_size)
        return pickle.dumps(metadata.Metadata(described, dict(self._places), stored))


def _overlap(chunks: Sequence[_Chunk]) -> bool:
    """Whether an element of a tensor lies in two of its parts.

    Parts are compared with those before them that reach beyond their beginning, in the order of their beginnings along
    the dimension with the most of these: the one along which the tensor was cut.
    """
    parts = [chunk for chunk in chunks if math.prod(chunk.shape)]
    if len(parts) < 2 or not parts[0].start:
        return len(parts) > 1
    dim = max(range(len(parts[0].start)), key=lambda d: len({part.start[d] for part in parts}))
    reaching: list[_Chunk] = []
    for part in sorted(parts, key=lambda part: part.start[dim]):
        reaching = [earlier for earlier in reaching if earlier.start[dim] + earlier.shape[dim] > part.start[dim]]
        if any(earlier.overlaps(part) for earlier in reaching):
            return True
        reaching.append(part)
    return False


def _describe(path: Path) -> tuple[dict[str, Any], dict[tuple[str, tuple[int, ...]], Any], dict[str, Any]]:
    """The entries by name; where each part is stored, by name and place; and where names lie in a nested state dict."""
    if path.stat().st_size > LARGEST_METADATA:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes are too many for a description")
    try:
        content = _Description(io.BytesIO(path.read_bytes())).load()
        described = dict(content.state_dict_metadata)
        stored = {
            (str(index.fqn), tuple(int(at) for at in index.offset or ())): info
            for index, info in content.storage_data.items()
        }
        places = dict(content.planner_data or {})
    except OSError:
        raise
    except Exception as error:  # whatever a damaged or hostile pickle can raise
        text = in_one_line(error, 160)
        raise CheckpointError(
            f"{path}: refused: not the description of a distributed checkpoint, or a damaged or unsafe one: {text}"
        ) from None
    if not all(isinstance(name, str) for name in described):
        raise CheckpointError(f"{path}: names that are not texts")
    return described, stored, places


def _chunk(
    path: Path, name: str, whole: tuple[int, ...], start: tuple[int, ...], shape: tuple[int, ...], place: Any
) -> _Chunk:
    relative = place.relative_path
    # A name that leads anywhere else could make us read any file on the machine.
    if not isinstance(relative, str) or relative != os.path.basename(relative) or relative in ("", ".", ".."):
        raise CheckpointError(f"{path}: refused: it names {relative!r}, and may name only files in its folder")
    if getattr(place, "transform_descriptors", None):
        raise CheckpointError(f"{path}: {name!r} is stored compressed: save it without transforms")
    fits = len(start) == len(shape) == len(whole) and all(
        min(s, n) >= 0 and s + n <= size for s, n, size in zip(start, shape, whole, strict=True)
    )
    if not fits:
        raise CheckpointError(f"{path}: the part of {name!r} at {start}, of shape {shape}, lies outside of {whole}")
    file = path.with_name(relative)
    if not file.is_file():
        raise CheckpointError(f"{path}: it names {relative!r}, which is not there: the checkpoint is incomplete")
    if not 0 <= place.offset <= place.offset + place.length <= file.stat().st_size:
        raise CheckpointError(f"{file}: it ends before the part of {name!r} at {start}: it has been cut off")
    return _Chunk(start, shape, file, place.offset, place.length)


def _load(chunk: _Chunk, key: str) -> torch.Tensor:
    with chunk.path.open("rb") as file:
        file.seek(chunk.offset)
        content = file.read(chunk.length)
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # as above
        text = in_one_line(error, 160)
        where = f"{chunk.path}: the part of {key!r} at {chunk.start}"
        raise CheckpointError(f"{where} is damaged or unsafe: {text}") from None
    if not isinstance(found, torch.Tensor):
        raise CheckpointError(f"{chunk.path}: the part of {key!r} at {chunk.start} is a {type(found).__name__}")
    return found.detach()
