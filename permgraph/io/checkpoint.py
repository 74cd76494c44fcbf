"""`open_checkpoint`: a checkpoint of any layout as a mapping from name to tensor, read when it is asked for."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from permgraph.errors import CheckpointError, MismatchError
from permgraph.io.distributed_folder import METADATA, DistributedFolder
from permgraph.io.foreign import require_checkpoint
from permgraph.io.parts import NO_WEIGHTS, PIPELINE, PartFile, chosen_components, components_of, sentence_modules
from permgraph.io.safetensors_file import SafetensorsFile
from permgraph.io.tensors import TensorFile, TensorFormat, Transform
from permgraph.io.torch_file import TorchFile

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
"""The weights of a folder, the first that is there: the order in which transformers looks for them."""


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint, by the names that it gives them.

    Each access reads the tensor anew, and nothing is kept: what is held in memory is what the caller holds. Tensors
    must not be written to.

    Attributes:
        path: what was opened.
        files: the files that hold tensors.
        folder: the folder, if a folder was opened.
        index: its index file, if the tensors are shared out over several files.
        formats: name to dtype and shape; known without reading any tensor.
        inside: the checkpoints that it is made of, where its folder has several; each by what stands before its names.
        components: those of a diffusers pipeline that are among them, if it is one.
    """

    path: Path
    files: tuple[TensorFile, ...]
    folder: Path | None
    index: Path | None
    formats: Mapping[str, TensorFormat]
    _holder: Mapping[str, TensorFile]
    inside: Mapping[str, Checkpoint] = field(default_factory=dict, kw_only=True)
    components: tuple[str, ...] = field(default=(), kw_only=True)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._holder[key].read(key)

    def __contains__(self, key: object) -> bool:
        return key in self.formats

    def __iter__(self) -> Iterator[str]:
        return iter(self.formats)

    def __len__(self) -> int:
        return len(self.formats)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors, {self.nbytes} bytes, {len(self.files)} files)"

    @property
    def home(self) -> Path | None:
        """The folder whose configuration says what this is: its own, or that of a file that a folder is read by."""
        if self.folder is not None or not self.path.is_file():
            return self.folder
        parent = self.path.parent
        if self.path.name in IN_FOLDERS:
            return parent
        others = [p for p in parent.iterdir() if p.is_file() and p.suffix in (".safetensors", *TORCH_SUFFIXES)]
        return parent if others == [self.path] else None

    @property
    def nbytes(self) -> int:
        """How many bytes its tensors take."""
        return sum(form.nbytes for form in self.formats.values())

    def without_values(self) -> dict[str, torch.Tensor]:
        """Every name with a tensor on the meta device: for checks that need shapes only."""
        return {name: form.like() for name, form in self.formats.items()}

    def on_disk(self, transform: Transform) -> Transform:
        """What becomes of the tensors in the files where this becomes of the checkpoint's: the same, if they are."""
        return transform


def open_checkpoint(
    path: str | os.PathLike[str], entry: str | None = None, components: Sequence[str] = ()
) -> Checkpoint:
    """Open a checkpoint: a safetensors or PyTorch file, an index of several, or a folder with any of these.

    A folder may also be one that ``torch.distributed.checkpoint`` wrote; its tensors are put together as they are read.
    Of a folder of sentence-transformers all modules are read, and of a pipeline of diffusers all components that have
    weights; the names of each part's tensors begin with the part's name and a dot.

    PyTorch files are read with ``weights_only=True`` only; a state dict that a training script has wrapped up
    (``"state_dict"``, ``"model"``, ...) is found. A folder's index may name only files in that folder.

    Args:
        path: of the file or folder.
        entry: under which key of a PyTorch file the state dict lies, with dots where it lies deeper; by default the
            usual ones are looked through.
        components: of a pipeline of diffusers, those that are read; the names of a single one are its own.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged, incomplete or unsafe; the message names the file.
        OSError: a file cannot be read.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"fc.weight": torch.eye(2)}, pathlib.Path(folder, "model.safetensors"))
        ...     checkpoint = open_checkpoint(folder)
        ...     checkpoint.formats["fc.weight"].shape, checkpoint["fc.weight"].tolist()
        ((2, 2), [[1.0, 0.0], [0.0, 1.0]])
    """
    path = Path(path)
    folder = path if path.is_dir() else None
    if components and not (folder is not None and components_of(folder)):
        raise CheckpointError(f"{path}: no pipeline of diffusers with a {PIPELINE}: only these have components")
    if folder is not None and (inside := _parts_in(folder, components)):
        if entry is not None:
            raise CheckpointError(f"{path}: only a PyTorch file has entries such as {entry!r}: leave out the entry")
        return _of_parts(folder, inside, tuple(inside) if components_of(folder) else ())
    return _plain(path, entry)


def _plain(path: Path, entry: str | None = None) -> Checkpoint:
    """A checkpoint that is of one part."""
    folder = path if path.is_dir() else None
    weights = path if folder is None else _weights_in(folder)
    if weights.name.endswith(".index.json"):
        index: Path | None = weights
        files, listed = _shards(weights)
    elif weights.name == METADATA:
        index, files, listed = None, (DistributedFolder.open(weights.parent),), None
    else:
        index, files, listed = None, (_open_file(weights, entry),), None
    if entry is not None and not isinstance(files[0], TorchFile):
        raise CheckpointError(f"{path}: only a PyTorch file has entries such as {entry!r}: leave out the entry")
    formats: dict[str, TensorFormat] = {}
    holder: dict[str, TensorFile] = {}
    for file in files:
        for name, form in file.formats.items():
            if name in holder:
                raise CheckpointError(f"{name!r} is in {holder[name].path.name} and again in {file.path.name}")
            if listed is not None and listed.get(name) != file.path.name:
                raise CheckpointError(f"{file.path} holds {name!r}, which {weights.name} does not place there")
            formats[name], holder[name] = form, file
    for name, shard in (listed or {}).items():
        if name not in holder:
            raise CheckpointError(f"{weights} places {name!r} in {shard}, which does not hold it")
    if not formats:
        raise CheckpointError(f"{path}: it holds no tensors")
    return Checkpoint(path, files, folder, index, MappingProxyType(formats), MappingProxyType(holder))


def _parts_in(folder: Path, asked: Sequence[str]) -> dict[str, Path]:
    """The parts of a folder that have weights, by name; nothing if the folder is of one part."""
    found = {module.name: module.folder for module in sentence_modules(folder)}
    found = found or {name: folder / name for name in components_of(folder)}
    weighted = {name: part for name, part in found.items() if _has_weights(part)}
    if components_of(folder):
        return {name: weighted[name] for name in chosen_components(folder, asked, tuple(weighted))}
    return weighted


def _has_weights(folder: Path) -> bool:
    try:
        return folder.is_dir() and bool(_weights_in(folder))
    except CheckpointError as error:
        if NO_WEIGHTS in str(error):
            return False
        raise


def _of_parts(folder: Path, inside: Mapping[str, Path], components: tuple[str, ...]) -> Checkpoint:
    """The checkpoint of a folder with several parts, whose names begin with the part's."""
    prefixes = {name: "" if len(components) == 1 else f"{name}." for name in inside}
    parts = {prefixes[name]: _plain(part) for name, part in inside.items()}
    files: list[TensorFile] = []
    formats: dict[str, TensorFormat] = {}
    holder: dict[str, TensorFile] = {}
    for prefix, part in parts.items():
        for file in part.files:
            if isinstance(file, DistributedFolder):
                raise CheckpointError(f"{part.path}: a distributed checkpoint cannot be part of a folder: convert it")
            own = PartFile(file, prefix)
            files.append(own)
            formats.update(own.formats)
            holder.update(dict.fromkeys(own.formats, own))
    return Checkpoint(
        folder,
        tuple(files),
        folder,
        None,
        MappingProxyType(formats),
        MappingProxyType(holder),
        inside=MappingProxyType(parts),
        components=components,
    )


def _weights_in(folder: Path) -> Path:
    for name in IN_FOLDERS:
        if (folder / name).is_file():
            return folder / name
    if (folder / METADATA).is_file():
        return folder / METADATA
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder}: it holds an adapter, not a model: name the folder of the model it adapts")
    found = [p for p in sorted(folder.iterdir()) if p.suffix == ".safetensors" and p.is_file()]
    found = found or [p for p in sorted(folder.iterdir()) if p.suffix in TORCH_SUFFIXES and p.is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(p.name for p in found[:4])
        raise CheckpointError(f"{folder}: several weight files and no index ({names}): name one of them")
    raise CheckpointError(f"{folder}: {NO_WEIGHTS}: looked for {', '.join(IN_FOLDERS)}, *.safetensors")


def _open_file(path: Path, entry: str | None = None) -> TensorFile:
    if not path.exists():
        there = [p.name for p in path.parent.iterdir() if _may_hold_weights(p)] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.75)
        raise CheckpointError(f"{path}: no such file or folder" + (f"; did you mean {near[0]!r}?" if near else ""))
    if not path.is_file():
        raise CheckpointError(f"{path}: neither a file nor a folder")
    if path.suffix in (".safetensors", *TORCH_SUFFIXES):
        require_checkpoint(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile.open(path)
    if path.suffix in TORCH_SUFFIXES:
        return TorchFile.open(path, entry)
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path}: GGUF is not read: its tensors are quantised; give the model it was made from")
    raise CheckpointError(f"{path}: a checkpoint is a folder, or ends in .safetensors, {', '.join(TORCH_SUFFIXES)}")


def _may_hold_weights(path: Path) -> bool:
    return path.is_dir() or path.suffix in (".safetensors", *TORCH_SUFFIXES)


def which_was_read(checkpoint: Checkpoint) -> str:
    """A sentence on which of a folder's weights were read, where others lie beside them; empty if none do."""
    if checkpoint.inside:
        return "; ".join(filter(None, map(which_was_read, checkpoint.inside.values())))
    if checkpoint.folder is None:
        return ""
    there = [name for name in IN_FOLDERS if (checkpoint.folder / name).is_file()]
    return f"{checkpoint.path}: {there[0]} was read, not {', '.join(there[1:])}" if len(there) > 1 else ""


def _shards(index: Path) -> tuple[tuple[TensorFile, ...], dict[str, str]]:
    """The files that an index names, in its order, and where it places each tensor."""
    try:
        content: Any = json.loads(index.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a valid index: {error}") from None
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise CheckpointError(f"{index}: not a valid index: it must have a 'weight_map' from names to files")
    files = []
    for shard in dict.fromkeys(listed.values()):
        # A name that leads anywhere else could make us read, and later write, any file on the machine.
        if shard != os.path.basename(shard) or shard in ("", ".", "..") or "\\" in shard or "\0" in shard:
            raise CheckpointError(f"{index}: refused: it names {shard!r}, and may name only files in its folder")
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index}: it names {shard!r}, which is not there: the checkpoint is incomplete")
        files.append(_open_file(index.parent / shard))
    return tuple(files), listed


# --- names ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Renamed(Mapping[str, torch.Tensor]):
    """A checkpoint by other names.

    Attributes:
        checkpoint: whose tensors these are.
        keys_of: each name to the checkpoint's own.
    """

    checkpoint: Checkpoint
    keys_of: Mapping[str, str]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.checkpoint[self.keys_of[name]]

    def __contains__(self, name: object) -> bool:
        return name in self.keys_of

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)

    def without_values(self) -> dict[str, torch.Tensor]:
        """Every name with a tensor on the meta device."""
        return {name: self.checkpoint.formats[key].like() for name, key in self.keys_of.items()}


def match_names(keys: Collection[str], wanted: Collection[str]) -> tuple[dict[str, str], str]:
    """Read a checkpoint's keys as a model's names where they differ by a prefix, and say so.

    Wrappers such as DataParallel, Lightning and ``torch.compile`` put something before every name, and a model with a
    head has a backbone whose own checkpoints know nothing of that prefix.

    Args:
        keys: the checkpoint's.
        wanted: the model's names; of tied ones, all.

    Returns:
        Each key to its name, and a sentence on what was changed; empty if nothing was. Keys that have nothing to do
        with any name stay as they are.

    Raises:
        MismatchError: no way of reading the keys gives a single one of the names, or two keys get one name.
    """
    names = set(wanted)
    best, note = {key: key for key in keys}, ""
    score = len(names & best.keys())
    for prefix, strip in _prefixes(keys, names):
        if strip:
            trial = {key: name if (name := _stripped(key, prefix)) in names else key for key in keys}
            said = f"the checkpoint's keys are the model's names with {prefix!r} before them: read without it"
        else:
            trial = {key: prefix + key if prefix + key in names else key for key in keys}
            said = f"the checkpoint's keys are the model's names without {prefix!r} before them: read with it"
        found = len(names & set(trial.values()))
        # Any two architectures have a few names with endings in common; a wrapper stands before nearly all.
        if found > score and 2 * found > min(len(keys), len(names)):
            best, note, score = trial, said, found
    if not score and names:
        raise MismatchError(
            f"none of the checkpoint's {len(keys)} keys is one of the model's {len(names)} names: it has "
            f"{next(iter(keys), None)!r}, for example, and the model {min(names)!r}: is it of another architecture?"
        )
    taken: dict[str, str] = {}
    for key, name in best.items():
        if name in taken:
            raise MismatchError(f"the checkpoint has both {taken[name]!r} and {key!r}, which are one name: {name!r}")
        taken[name] = key
    return best, note


def _stripped(key: str, prefix: str) -> str:
    if prefix not in WITHIN:
        return key.removeprefix(prefix)
    for word in WITHIN[WITHIN.index(prefix) :]:
        key = key.replace(word, "")
    return key


WITHIN = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What `torch.compile`, FSDP and activation checkpointing put before any part of a name; where one is stripped, those
after it are too."""


def _prefixes(keys: Collection[str], names: set[str]) -> Iterator[tuple[str, bool]]:
    """Every prefix worth a try, and whether to strip it from the keys (else to add it)."""
    for word in WITHIN:
        if any(word in key for key in keys):
            yield word, True
            break
    endings: dict[str, list[str]] = {}
    for name in names:
        endings.setdefault(name.rpartition(".")[2], []).append(name)
    seen: set[tuple[str, bool]] = set()
    for key in list(keys)[:50]:  # a prefix that none of these has is not before every name
        for name in endings.get(key.rpartition(".")[2], ()):
            if key.endswith("." + name):
                found = (key.removesuffix(name), True)
            elif name.endswith("." + key):
                found = (name.removesuffix(key), False)
            else:
                continue
            if found not in seen:
                seen.add(found)
                yield found
