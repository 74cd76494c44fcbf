"""`write_checkpoint`: a checkpoint like another, with other values in its tensors, a file at a time."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from permgraph.errors import CheckpointError
from permgraph.io.checkpoint import TORCH_SUFFIXES, Checkpoint
from permgraph.io.distributed_folder import METADATA, DistributedFolder
from permgraph.io.parts import PartFile, components_of
from permgraph.io.safetensors_file import SafetensorsFile, write_safetensors
from permgraph.io.staging import Staging
from permgraph.io.tensors import TensorFile, TensorFormat, Transform
from permgraph.io.torch_file import TorchFile

WEIGHTS = (".safetensors", *TORCH_SUFFIXES, ".distcp", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz", ".tflite")
LARGEST_COMPANION = 200_000_000  # bytes; a tokenizer is smaller, and what is larger holds weights


@dataclass(frozen=True)
class Changes:
    """What a checkpoint that is written has otherwise than the one that it is like.

    Attributes:
        shapes: of the keys whose tensors get another shape.
        added: keys that it has besides, each with the key whose file it goes to; its type is that one's, and the
            transform is given that one's tensor for it.
        files: other content of files beside the weights, by their paths in the folder.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    added: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.shapes or self.added or self.files)

    def formats(self, of: Mapping[str, TensorFormat]) -> dict[str, TensorFormat]:
        """What a file holds in the place of these tensors."""
        found = {key: TensorFormat(form.dtype, self.shapes.get(key, form.shape)) for key, form in of.items()}
        for key, beside in self.added.items():
            if beside in of:
                found[key] = TensorFormat(of[beside].dtype, self.shapes.get(key, found[beside].shape))
        return found


def write_checkpoint(
    source: Checkpoint,
    staging: Staging,
    transform: Transform,
    *,
    progress: Callable[[int, int], object] | None = None,
    changes: Changes | None = None,
) -> None:
    """Write a checkpoint of the same layout as `source` with each tensor replaced, and put it in its place.

    Files of safetensors are written tensor by tensor, so that no more than one is in memory; a PyTorch file is held
    whole. What else a folder holds (config, tokenizer) is copied; other files of weights are not. The kind of a single
    file is that of the target's suffix.

    Args:
        source: what to imitate; it is only read.
        staging: where to write; already entered.
        transform: gives the new values, of the same shape and dtype.
        progress: called with the bytes done and the bytes in all, after each tensor.
        changes: what the result has otherwise than `source`.

    Raises:
        CheckpointError: the target is not of a kind that can hold this checkpoint, or lies inside it, or the disk has
            no room.
    """
    if staging.complete:
        staging.finish()
        return
    target = staging.target
    check_target(source, target)
    changes = Changes() if changes is None else changes
    if changes and any(isinstance(file, DistributedFolder) for file in source.files):
        raise CheckpointError(f"{source.path}: a distributed checkpoint is written in its own shapes: convert it first")
    base = _base(source)
    copies = [] if source.folder is None and source.index is None else companions(source)
    whole = source.nbytes + sum(_size(base / path) for path in copies if path.name.endswith(WEIGHTS))
    left = whole - sum(f.stat().st_size for f in (staging.path(n) for n in staging.finished) if f.is_file())
    free = shutil.disk_usage(staging.folder).free
    if left > free:
        raise CheckpointError(f"{target} takes {left / 1e6:,.1f} MB more, and the disk has {free / 1e6:,.1f} MB")
    done = 0
    transform = source.on_disk(transform)

    def counted(name: str, tensor: torch.Tensor) -> torch.Tensor:
        nonlocal done
        result = transform(name, tensor)
        shape = changes.shapes.get(name, tuple(tensor.shape))
        if tuple(result.shape) != shape or result.dtype != tensor.dtype:
            raise CheckpointError(
                f"{name!r}: {result.dtype} of shape {tuple(result.shape)} cannot take the place of {tensor.dtype} of "
                f"shape {shape}"
            )
        done += tensor.nbytes
        if progress is not None:
            progress(done, source.nbytes)
        return result

    single = source.folder is None and source.index is None
    for file in source.files:
        if isinstance(file, DistributedFolder):
            done += sum(file.formats[key].nbytes for key, part in file.part_files().items() if part in staging.finished)
            _write_distributed(file, staging, counted)
            continue
        name = target.name if single else str(file.path.relative_to(base))
        if name in staging.finished:
            done += sum(form.nbytes for form in file.formats.values())
        staging.make(name, functools.partial(_write_file, file, name, counted, changes))
    for path in copies:
        if str(path) in changes.files:
            staging.make(str(path), functools.partial(_put, content=changes.files[str(path)]))
        elif changes.added and base / path in _indexes(source):
            staging.make(str(path), functools.partial(_put, content=_index_with(base / path, source, changes)))
        else:
            staging.make(str(path), functools.partial(_copy, base / path))
    staging.finish(target.name if single else None)


def _write_distributed(folder: DistributedFolder, staging: Staging, transform: Transform) -> None:
    """Make each tensor a file of its own, and then their description."""
    for key, name in folder.part_files().items():

        def write(out: IO[bytes], key: str = key) -> None:
            torch.save(transform(key, folder.read(key)).contiguous().clone(), out)

        staging.make(name, write)
    staging.make(METADATA, lambda out: _put(out, folder.description(staging.path(METADATA).parent)))


def _put(out: IO[bytes], content: bytes) -> None:
    out.write(content)


def _size(path: Path) -> int:
    return path.stat().st_size


def _indexes(source: Checkpoint) -> list[Path]:
    """The index files of a checkpoint and of its parts."""
    return [index for each in (source, *source.inside.values()) if (index := each.index) is not None]


def _index_with(path: Path, source: Checkpoint, changes: Changes) -> bytes:
    """An index that also places the tensors that are added."""
    index = json.loads(path.read_text(encoding="utf-8"))
    for key, beside in changes.added.items():
        index["weight_map"][key] = index["weight_map"][beside]
    total = {key: form for file in source.files for key, form in changes.formats(file.formats).items()}
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = sum(form.nbytes for form in total.values())
    if isinstance(metadata, dict) and "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(form.shape) for form in total.values())
    return json.dumps(index, indent=2, sort_keys=True).encode()


def check_target(source: Checkpoint, target: Path) -> None:
    """Raise CheckpointError unless a checkpoint like `source` can be written to `target`."""
    base = _base(source).resolve()
    resolved = target.resolve()
    if resolved == source.path.resolve() or (source.folder is not None and base in resolved.parents):
        raise CheckpointError(f"{target} is the input itself, or lies inside it: choose another place for the output")
    if resolved in base.parents or (resolved == base and source.folder is not None):
        raise CheckpointError(f"{target} holds the input {source.path}: choose another place for the output")
    if source.folder is None and source.index is None:
        if target.suffix not in (".safetensors", *TORCH_SUFFIXES):
            raise CheckpointError(
                f"{target}: {source.path.name} is a single file, so the output must be one: give it the ending "
                f"{source.path.suffix}"
            )
        if target.is_dir():
            raise CheckpointError(f"{target} is a folder, but the output is a single file")
    elif target.suffix in (".safetensors", *TORCH_SUFFIXES):
        raise CheckpointError(
            f"{target}: {source.path} is a folder, so the output must be one too: drop {target.suffix}"
        )


def companions(source: Checkpoint) -> list[Path]:
    """What else lies in the checkpoint's folder and belongs to it: config, tokenizer, the index, small files.

    Of a pipeline also the components that are not among the checkpoint's, whole.
    """
    base = _base(source)
    found = []
    indexes = _indexes(source)
    copied = {name for name in components_of(base) if name not in source.components} if source.components else set()
    for root, folders, files in os.walk(base):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(root, name)
            inside = path.relative_to(base)
            weights = name.endswith((*WEIGHTS, ".index.json")) and path not in indexes
            small = path.is_file() and not weights and path.stat().st_size < LARGEST_COMPANION
            if not name.startswith(".") and (small or (path.is_file() and inside.parts[0] in copied)):
                found.append(inside)
    return found


def not_carried_over(source: Checkpoint) -> str:
    """A sentence on the files of tensors in the checkpoint's folder that no copy of it is given; empty without any."""
    if source.inside:
        return "; ".join(filter(None, map(not_carried_over, source.inside.values())))
    if source.folder is None and source.index is None:
        return ""
    base, read = _base(source), {file.path.name for file in source.files}
    there = sorted(path.name for path in base.iterdir() if path.is_file())
    weights = [name for name in there if name.endswith(WEIGHTS) and name not in read]
    if not weights or any(isinstance(file, DistributedFolder) for file in source.files):
        return ""
    return f"{source.path}: {', '.join(weights)} not carried over: tensors in there may no longer fit the weights"


def _base(source: Checkpoint) -> Path:
    return source.folder or source.path.parent


def _write_file(file: TensorFile, name: str, transform: Transform, changes: Changes, out: IO[bytes]) -> str | None:
    kind = file.file if isinstance(file, PartFile) else file
    formats = changes.formats(file.formats)
    prefix = file.prefix if isinstance(file, PartFile) else ""

    def made(key: str) -> torch.Tensor:
        return transform(key, file.read(changes.added.get(key, key)))

    if name.endswith(".safetensors"):
        metadata: Mapping[str, str] = kind.metadata if isinstance(kind, SafetensorsFile) else {"format": "pt"}
        own = {key.removeprefix(prefix): form for key, form in formats.items()}
        tensors = ((key.removeprefix(prefix), made(key)) for key in formats)
        return write_safetensors(out, own, tensors, metadata)
    if isinstance(kind, TorchFile):
        new = {key.removeprefix(prefix): made(key) for key in formats if key not in file.formats}
        kind.rewrite(out, lambda key, tensor: transform(prefix + key, tensor), new)
    else:
        torch.save({key.removeprefix(prefix): made(key) for key in formats}, out)
    return None


def _copy(path: Path, out: IO[bytes]) -> None:
    with path.open("rb") as file:
        shutil.copyfileobj(file, out)
