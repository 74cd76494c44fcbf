"""Safetensors files: a header in JSON, then the bytes of one tensor after the other.

The header is read and checked here rather than by the safetensors package for two reasons: every refusal can name what
is wrong, and tensors are read into memory of their own instead of a mapping of the whole file, so that what was read is
given back at once and a file that shrinks while it is read is an error rather than a crash.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import mmap
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from permgraph.errors import CheckpointError
from permgraph.io.tensors import TensorFormat

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
MAPPED = 1 << 18  # bytes from which a tensor is read into a mapping of its own


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file whose header has been checked.

    Attributes:
        path: where it is.
        formats: name to dtype and shape, in the order of the bytes.
        metadata: the strings that the header carries.
        header_digest: SHA-256 of the header, in hexadecimal.
    """

    path: Path
    formats: Mapping[str, TensorFormat]
    metadata: Mapping[str, str]
    header_digest: str
    _starts: Mapping[str, int]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SafetensorsFile:
        """Read and check the header of a file; no tensor is read.

        Raises:
            CheckpointError: it is truncated, the header is malformed, or the tensors that it lists do not fill the
                rest of the file exactly, without holes and overlaps.
            OSError: the file cannot be read.
        """
        path = Path(path)
        with path.open("rb") as file:
            whole = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if whole < 8 or length > min(whole - 8, LARGEST_HEADER):
                raise CheckpointError(
                    f"{path}: not a safetensors file, or a truncated one: it has {whole} bytes, and its header would "
                    f"take {length}"
                )
            raw = file.read(length)
        header = _header(raw, path)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(f"{path}: the header's __metadata__ must map names to strings")
        listed = sorted(((_span(entry, name, path), name) for name, entry in header.items()), key=lambda item: item[0])
        starts: dict[str, int] = {}
        formats: dict[str, TensorFormat] = {}
        end = 0
        for (begin, stop), name in listed:
            entry = header[name]
            form = TensorFormat(DTYPES[entry["dtype"]], tuple(entry["shape"]))
            if begin != end or stop - begin != form.nbytes:
                raise CheckpointError(
                    f"{path}: {name!r}, {entry['dtype']} of shape {form.shape}, takes {form.nbytes} bytes, but the "
                    f"header gives it bytes {begin} to {stop}, and the one before it ends at {end}"
                )
            starts[name], formats[name] = 8 + length + begin, form
            end = stop
        if 8 + length + end != whole:
            raise CheckpointError(
                f"{path}: the file has {whole} bytes, but its header accounts for {8 + length + end}: "
                + ("it is truncated" if whole < 8 + length + end else "something was appended to it")
            )
        return cls(path, formats, metadata, hashlib.sha256(raw).hexdigest(), starts)

    def read(self, key: str) -> torch.Tensor:
        """The tensor of that name, in memory of its own.

        Raises CheckpointError if the file has become shorter than it was.
        """
        form = self.formats[key]
        if not form.nbytes:
            return torch.empty(form.shape, dtype=form.dtype)
        content = _room(form.nbytes)
        view = content.numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._starts[key])
            done = 0
            while done < form.nbytes:
                count = file.readinto(view[done : done + (1 << 30)])
                if not count:
                    raise CheckpointError(f"{self.path}: the file ends in the middle of {key!r}: it has been changed")
                done += count
        return content.view(form.dtype).view(form.shape)


def _room(count: int) -> torch.Tensor:
    """So many bytes, not filled yet.

    Between tensors that are read and dropped in turn, malloc keeps what does not fit the next one: twice the bytes that
    are in use, where measured. Large tensors therefore get a mapping of their own, which goes when they go.
    """
    if count >= MAPPED and sys.platform != "win32":
        with contextlib.suppress(OSError):  # there are as many mappings as the system allows
            room = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            return torch.frombuffer(room, dtype=torch.uint8)
    return torch.empty(count, dtype=torch.uint8)


def write_safetensors(
    file: IO[bytes],
    formats: Mapping[str, TensorFormat],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
) -> str:
    """Write a safetensors file, taking one tensor at a time, and return its SHA-256.

    Args:
        file: open for writing.
        formats: what is to come.
        tensors: every name of `formats` with its tensor, in the same order.
        metadata: strings for the header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, form in formats.items():
        if form.dtype not in NAMES:
            raise CheckpointError(f"{name!r} is {form.dtype}, which safetensors cannot hold: write a PyTorch file")
        header[name] = {"dtype": NAMES[form.dtype], "shape": list(form.shape), "data_offsets": [end, end + form.nbytes]}
        end += form.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # so that the data is aligned
    digest = hashlib.sha256()
    for content in itertools.chain((len(raw).to_bytes(8, "little"), raw), _contents(formats, tensors)):
        file.write(content)
        digest.update(content)
    return digest.hexdigest()


def _contents(
    formats: Mapping[str, TensorFormat], tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[bytes | memoryview]:
    for (expected, form), (name, tensor) in zip(formats.items(), tensors, strict=True):
        if name != expected or TensorFormat(tensor.dtype, tuple(tensor.shape)) != form:
            raise CheckpointError(
                f"{expected!r} was to be written as {form.dtype} of shape {form.shape}, but {name!r}, {tensor.dtype} "
                f"of shape {tuple(tensor.shape)}, came"
            )
        if tensor.numel():
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(raw: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name stands in it twice")
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: its header is damaged: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file: its header is not a table of tensors")
    return header


def _span(entry: Any, name: str, path: Path) -> tuple[int, int]:
    """Where a tensor's bytes lie, after everything that the header says of it has been checked."""

    def sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 62 for size in value)

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{path}: the header must give {name!r} a dtype, a shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{path}: {name!r} has the dtype {str(entry['dtype'])[:40]!r}, which is not read here; those are: "
            f"{', '.join(DTYPES)}"
        )
    offsets = entry["data_offsets"]
    if not sizes(entry["shape"]) or not sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path}: {name!r} has a malformed shape or malformed data_offsets in the header")
    if math.prod(entry["shape"]) >= 1 << 62:
        raise CheckpointError(f"{path}: {name!r} would have {math.prod(entry['shape'])} elements")
    return offsets[0], offsets[1]
