"""`write_checkpoint`: a checkpoint like another, with other values in its tensors, a file at a time."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import torch

from permgraph.errors import CheckpointError
from permgraph.io.checkpoint import TORCH_SUFFIXES, Checkpoint
from permgraph.io.distributed_folder import METADATA, DistributedFolder
from permgraph.io.safetensors_file import SafetensorsFile, write_safetensors
from permgraph.io.staging import Staging
from permgraph.io.tensors import TensorFile, TensorFormat, Transform
from permgraph.io.torch_file import TorchFile

WEIGHTS = (".safetensors", *TORCH_SUFFIXES, ".distcp", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz", ".tflite")
LARGEST_COMPANION = 200_000_000  # bytes; a tokenizer is smaller, and what is larger holds weights


def write_checkpoint(
    source: Checkpoint, staging: Staging, transform: Transform, *, progress: Callable[[int, int], object] | None = None
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

    Raises:
        CheckpointError: the target is not of a kind that can hold this checkpoint, or lies inside it, or the disk has
            no room.
    """
    if staging.complete:
        staging.finish()
        return
    target = staging.target
    check_target(source, target)
    left = source.nbytes - sum(f.stat().st_size for f in (staging.path(n) for n in staging.finished) if f.is_file())
    free = shutil.disk_usage(staging.folder).free
    if left > free:
        raise CheckpointError(f"{target} takes {left / 1e6:,.1f} MB more, and the disk has {free / 1e6:,.1f} MB")
    done = 0
    transform = source.on_disk(transform)

    def counted(name: str, tensor: torch.Tensor) -> torch.Tensor:
        nonlocal done
        result = transform(name, tensor)
        if result.shape != tensor.shape or result.dtype != tensor.dtype:
            raise CheckpointError(
                f"{name!r}: {result.dtype} of shape {tuple(result.shape)} cannot take the place of {tensor.dtype} of "
                f"shape {tuple(tensor.shape)}"
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
        name = target.name if single else file.path.name
        if name in staging.finished:
            done += sum(form.nbytes for form in file.formats.values())
        staging.make(name, functools.partial(_write_file, file, name, counted))
    if not single:
        for path in companions(source):
            staging.make(str(path), functools.partial(_copy, _base(source) / path))
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
    """What else lies in the checkpoint's folder and belongs to it: config, tokenizer, the index, small files."""
    base = _base(source)
    found = []
    for root, folders, files in os.walk(base):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(root, name)
            weights = name.endswith((*WEIGHTS, ".index.json")) and path != source.index
            if not name.startswith(".") and not weights and path.is_file() and path.stat().st_size < LARGEST_COMPANION:
                found.append(path.relative_to(base))
    return found


def not_carried_over(source: Checkpoint) -> str:
    """A sentence on the files of tensors in the checkpoint's folder that no copy of it is given; empty without any."""
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


def _write_file(file: TensorFile, name: str, transform: Transform, out: IO[bytes]) -> str | None:
    if name.endswith(".safetensors"):
        metadata: Mapping[str, str] = file.metadata if isinstance(file, SafetensorsFile) else {"format": "pt"}
        formats: Mapping[str, TensorFormat] = file.formats
        tensors = ((key, transform(key, file.read(key))) for key in formats)
        return write_safetensors(out, formats, tensors, metadata)
    if isinstance(file, TorchFile):
        file.rewrite(out, transform)
    else:
        torch.save({key: transform(key, file.read(key)) for key in file.formats}, out)
    return None


def _copy(path: Path, out: IO[bytes]) -> None:
    with path.open("rb") as file:
        shutil.copyfileobj(file, out)
