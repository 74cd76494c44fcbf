"""Folders whose weights lie in several places: modules of sentence-transformers, components of a diffusers pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import torch

from permgraph.errors import CheckpointError
from permgraph.io.tensors import TensorFile, TensorFormat

MODULES = "modules.json"
"""The list of a sentence-transformers folder: its modules in order, each with its own folder."""
PIPELINE = "model_index.json"
"""The list of a diffusers pipeline: its components, each in a folder of its name."""
NO_WEIGHTS = "no weights in this folder"


@dataclass(frozen=True, eq=False)
class PartFile:
    """A file of tensors of one part of a model, whose names begin with the part's.

    Attributes:
        file: as it is.
        prefix: what stands before each of its names.
    """

    file: TensorFile
    prefix: str

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.file.path

    @property
    def formats(self) -> Mapping[str, TensorFormat]:
        """What it holds, by the model's names."""
        return MappingProxyType({self.prefix + key: form for key, form in self.file.formats.items()})

    def read(self, key: str) -> torch.Tensor:
        """The tensor of that name, as `TensorFile.read` says."""
        return self.file.read(key.removeprefix(self.prefix))


@dataclass(frozen=True)
class SentenceModule:
    """One module of a sentence-transformers folder.

    Attributes:
        name: that of the module, by which its tensors are called.
        kind: the class, without its package.
        package: the class's package.
        folder: in which its configuration lies, and its weights if it has any.
    """

    name: str
    kind: str
    package: str
    folder: Path


def sentence_modules(folder: Path) -> tuple[SentenceModule, ...]:
    """The modules of a sentence-transformers folder in the order in which they run; nothing in any other folder.

    Raises:
        CheckpointError: ``modules.json`` is no list of modules, or one lies outside the folder.
    """
    path = folder / MODULES
    if not path.is_file():
        return ()
    found: list[SentenceModule] = []
    listed = _read(path)
    for entry in listed if isinstance(listed, list) and listed else [None]:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "path", "type")):
            raise CheckpointError(f"{path}: it must list modules, each with a name, a path and a type")
        package, _, kind = entry["type"].rpartition(".")
        name, own = entry["name"], entry["path"]
        if not name or "." in name or name in {module.name for module in found}:
            raise CheckpointError(f"{path}: {name!r} cannot be the name of a module: each has one, without a dot")
        found.append(SentenceModule(name, kind, package, _inside(folder, own, path)))
    return tuple(found)


def components_of(folder: Path) -> tuple[str, ...]:
    """The components of a diffusers pipeline that have a folder of their own; nothing in any other folder.

    Raises:
        CheckpointError: ``model_index.json`` is no table of components, or one lies outside the folder.
    """
    path = folder / PIPELINE
    if not path.is_file():
        return ()
    listed = _read(path)
    if not isinstance(listed, dict):
        raise CheckpointError(f"{path}: it must be a table of a pipeline's components")
    named = [name for name, value in listed.items() if isinstance(value, list) and not name.startswith("_")]
    return tuple(name for name in named if _inside(folder, name, path).is_dir() and name)


def chosen_components(folder: Path, asked: Sequence[str], weighted: Sequence[str]) -> tuple[str, ...]:
    """The components of a pipeline that are asked for: by name, or all that have weights.

    Args:
        folder: of the pipeline.
        asked: names; all if there are none.
        weighted: the names of those that have weights.

    Raises:
        CheckpointError: a name is none of these.
    """
    unknown = [name for name in asked if name not in weighted]
    if unknown or not weighted:
        have = ", ".join(weighted) or "none"
        raise CheckpointError(
            f"{folder}: no component {', '.join(unknown) or 'has weights'}: those with weights: {have}"
        )
    return tuple(dict.fromkeys(asked)) or tuple(weighted)


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a pipeline of diffusers."""
    return (folder / PIPELINE).is_file()


def _inside(folder: Path, own: str, listing: Path) -> Path:
    """A folder inside another; a name that leads anywhere else could make us read any file on the machine."""
    parts = PurePosixPath(own).parts
    if PurePosixPath(own).is_absolute() or ".." in parts or "\\" in own or "\0" in own or ":" in own:
        raise CheckpointError(f"{listing}: refused: it names {own!r}, and may name only folders in its own")
    return folder.joinpath(*parts)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a valid list of parts: {error}") from None
