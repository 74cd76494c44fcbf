"""Files that are no checkpoint, whatever their names say: told by their first bytes, before anything reads more."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

from permgraph.errors import CheckpointError

_BYTES = 512
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"Rar!")
_ARCHIVE = "an archive that may hold a checkpoint: unpack it, and name the checkpoint in it"


def require_checkpoint(path: Path) -> None:
    """Raise CheckpointError if a file's first bytes say that it is something other than its name does.

    Args:
        path: of a file that should be safetensors, or PyTorch's.
    """
    try:
        what = _what(path)
    except OSError:
        raise
    except Exception:  # whatever a damaged archive can raise: reading the checkpoint says that it is one
        return
    if what:
        raise CheckpointError(f"{path}: it is {what}")


def _what(path: Path) -> str:
    """What a file is instead of a checkpoint, and what to do; empty if nothing tells."""
    with path.open("rb") as file:
        head = file.read(_BYTES)
    safetensors = path.suffix == ".safetensors"
    if not head:
        return "empty: copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file that it stands for: fetch that, with git lfs pull"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page, such as that of an error, and no checkpoint: download it again"
    if head.startswith(b"GGUF"):
        return "a GGUF file, whose tensors are quantised: give the model it was made from"
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file, as Keras writes: load it there, and save its weights as safetensors"
    if head.startswith(_COMPRESSED):
        return _ARCHIVE
    if head.startswith(b"PK\x03\x04") and zipfile.is_zipfile(path):
        return _in_zip(path, safetensors)
    if safetensors:
        pickled = (
            head.startswith(b"\x80") and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and head[2:8].strip(b"\0")
        )
        return "a PyTorch file: rename it to end in .pt" if pickled else ""
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8:
        return "a safetensors file: rename it to end in .safetensors"
    return _ARCHIVE if tarfile.is_tarfile(path) and not _is_old_torch(path) else ""


def _in_zip(path: Path, safetensors: bool) -> str:
    """The same of a ZIP archive, which PyTorch's own files are too."""
    with zipfile.ZipFile(path) as archive:
        inside = {name.rpartition("/")[2] for name in archive.namelist()}
    if "data.pkl" not in inside:
        if {"archive_format", "serialized_exported_program.json"} & inside:
            return "a program that torch.export has saved: load it, and save its state_dict"
        return _ARCHIVE
    if "constants.pkl" in inside:
        return "a network compiled by TorchScript: load it with torch.jit.load, and save its state_dict()"
    return "a PyTorch file: rename it to end in .pt" if safetensors else ""


def _is_old_torch(path: Path) -> bool:
    """Whether a TAR archive is what PyTorch wrote before its version 0.2."""
    with tarfile.open(path) as archive:
        return {"sys_info", "pickle"} <= set(archive.getnames())
