"""PyTorch files, read with ``weights_only=True`` and never otherwise: no code of theirs is run."""

from __future__ import annotations

import argparse
import errno
import functools
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from permgraph.errors import CheckpointError, in_one_line
from permgraph.io.tensors import TensorFormat, Transform

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params")
"""Under which keys training scripts keep the state dict, likeliest first."""


@dataclass(frozen=True)
class TorchFile:
    """A state dict in a PyTorch file.

    The file is mapped into memory where its format allows it, so that a tensor is read when it is used.

    Attributes:
        path: where it is.
        formats: name to dtype and shape.
        wrapper: the keys under which the state dict lies in the file; empty if it is the file's content.
        kept: what else the file holds, without anything that holds tensors.
        dropped: the keys beside the state dict that hold tensors (optimisers, averaged weights), and all that lies
            beside it below the top: they are not carried over, since they would no longer fit.
    """

    path: Path
    formats: Mapping[str, TensorFormat]
    wrapper: tuple[str, ...]
    kept: Mapping[str, Any] = field(repr=False)
    dropped: tuple[str, ...]
    _state: Mapping[str, Any] = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], entry: str | None = None) -> TorchFile:
        """Read a file, and find the state dict in it.

        Args:
            path: of the file.
            entry: under which key it lies, with dots where it lies deeper; by default it is looked for.

        Raises:
            CheckpointError: it is damaged, holds objects other than tensors and plain data, or no state dict.
            OSError: it cannot be read.
        """
        path = Path(path)
        content = load_safely(path)
        state, wrapper, beside = _unwrap(content, path) if entry is None else _at(content, entry, path)
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        for name, tensor in tensors.items():
            if tensor.is_meta:
                raise CheckpointError(f"{path}: {name!r} has no values: it was saved on the meta device")
            if tensor.layout is not torch.strided or tensor.is_quantized:
                raise CheckpointError(
                    f"{path}: {name!r} is {'quantised' if tensor.is_quantized else str(tensor.layout)}: only ordinary "
                    f"dense tensors are read; convert it first"
                )
        formats = {name: TensorFormat(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        dropped = tuple(name for name, value in beside.items() if _holds_tensors(value))
        kept = {name: value for name, value in beside.items() if name not in dropped}
        dropped += _beside_below(content, wrapper)
        return cls(path, formats, wrapper, kept, dropped, state)

    def read(self, key: str) -> torch.Tensor:
        """The tensor of that name; its memory may be the file's."""
        tensor: torch.Tensor = self._state[key]
        return tensor.detach()

    def rewrite(self, file: IO[bytes], transform: Transform, added: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the same content with other values in its tensors; names that share a tensor share the new one.

        Args:
            file: open for writing.
            transform: gives the new values.
            added: tensors that the state dict has besides.
        """
        done: dict[Any, torch.Tensor] = {}
        state: dict[str, Any] = {}
        for name, value in self._state.items():
            if isinstance(value, torch.Tensor):
                where = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
                if where not in done or not value.numel():
                    done[where] = transform(name, value.detach())
                value = done[where]
            state[name] = value
        content: Any = {**state, **(added or {})}
        for key in reversed(self.wrapper):
            content = {key: content}
        if self.wrapper:
            content = {**self.kept, **content}
        torch.save(content, file)


def load_safely(path: Path) -> Any:
    """The content of a PyTorch file, which may be tensors and plain data only.

    Raises CheckpointError if it is damaged, or holds anything else.
    """
    # Others' training scripts store arguments as a Namespace, and scores as NumPy has them: data, which runs nothing.
    with torch.serialization.safe_globals([argparse.Namespace, *_numpy_numbers()]):
        try:
            mapped = zipfile.is_zipfile(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on pickle protocols: what follows is read or refused either way
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except OSError as error:
            if (
                error.filename is None and error.errno == errno.EINVAL
            ):  # a file that was cut off is sought beyond its end
                raise CheckpointError(f"{path}: not a PyTorch file, or a damaged one: it is cut off") from error
            raise
        except Exception as error:  # whatever a damaged or hostile file can make the loader raise
            text = in_one_line(error)
            asked = re.search(r"(?:GLOBAL|global:?|class:?|loads?) ([A-Za-z_][\w]*\.[\w.]+)", text)
            if "weights_only" in text.lower() or "weights only" in text.lower() or "Unsupported" in text:
                raise CheckpointError(
                    f"{path}: refused: it holds more than tensors and plain data"
                    + (f" ({asked.group(1)})" if asked else "")
                    + ", and loading that could run code; save its state_dict() instead, or as safetensors"
                ) from error
            raise CheckpointError(
                f"{path}: not a PyTorch file, or a damaged one: {text.split('. ')[0][:120]}"
            ) from error


@functools.cache
def _numpy_numbers() -> tuple[Any, ...]:
    """What the pickle of a single number of NumPy's names, under NumPy's present name and its old one."""
    make: Any = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(kind)) for kind in (bool, *np.typecodes["AllInteger"], *np.typecodes["Float"])}
    return (make, (make, "numpy.core.multiarray.scalar"), np.dtype, *kinds)


def _unwrap(content: Any, path: Path) -> tuple[Mapping[str, Any], tuple[str, ...], dict[str, Any]]:
    """The state dict, the keys that lead to it, and what lies beside it at the top."""
    at: Any = content
    keys: list[str] = []
    for _ in range(4):
        if not isinstance(at, Mapping):
            break
        if _is_state_dict(at):
            beside = {str(key): value for key, value in content.items() if not keys or key != keys[0]} if keys else {}
            return at, tuple(keys), beside
        key = next((key for key in WRAPPERS if isinstance(at.get(key), Mapping) and at[key]), None)
        if key is None:
            break
        keys.append(key)
        at = at[key]
    entries = list(_entries(content))
    if len(entries) == 1:
        return _at(content, entries[0], path)
    if entries:
        listed = ", ".join(map(repr, entries))
        raise CheckpointError(f"{path}: it has state dicts under {listed}: say which one, as --entry {entries[0]}")
    found = f"a {type(content).__name__}"
    if isinstance(content, Mapping):
        found = f"a mapping with the keys {', '.join(map(repr, list(content)[:6]))}" if content else "an empty mapping"
    raise CheckpointError(
        f"{path}: no state dict in it, but {found}; a state dict is looked for at the top and under "
        f"{', '.join(map(repr, WRAPPERS))}"
    )


def _at(content: Any, entry: str, path: Path) -> tuple[Mapping[str, Any], tuple[str, ...], dict[str, Any]]:
    """The state dict under an entry, the keys that lead to it, and what lies beside it at the top."""
    keys = (entry,) if isinstance(content, Mapping) and entry in content else tuple(entry.split("."))
    at: Any = content
    for key in keys:
        at = at.get(key) if isinstance(at, Mapping) else None
    if not _is_state_dict(at):
        there = ", ".join(map(repr, _entries(content))) or "no state dict beneath a key"
        raise CheckpointError(f"{path}: there is no state dict under {entry!r}; the file has {there}")
    return at, keys, {str(key): value for key, value in content.items() if key != keys[0]}


def _beside_below(content: Any, keys: tuple[str, ...]) -> tuple[str, ...]:
    """What lies beside the way to a state dict below the top, with dots between the keys that lead there."""
    found: list[str] = []
    for depth, key in enumerate(keys):
        if depth:
            found += [".".join((*keys[:depth], str(other))) for other in content if other != key]
        content = content[key]
    return tuple(found)


def _entries(content: Any, before: str = "") -> Iterator[str]:
    """Where state dicts lie in a file, with dots between the keys that lead to them."""
    if not isinstance(content, Mapping) or before.count(".") > 2:
        return
    for key, value in content.items():
        if isinstance(key, str) and _is_state_dict(value):
            yield before + key
        elif isinstance(key, str):
            yield from _entries(value, f"{before}{key}.")


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    return any(isinstance(item, torch.Tensor) for item in value.values())


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    return isinstance(value, (list, tuple, set)) and any(map(_holds_tensors, value))
