"""Checkpoints whose tensors transformers joins or splits on loading, such as those of experts stored one by one.

transformers has a table of what it does to the tensors of old checkpoints, and writes new ones in the old form as well.
Its own code for that is run here, on few tensors at a time: to read what the model has, and to write what was on disk.
"""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from permgraph.errors import CheckpointError, in_one_line
from permgraph.io.checkpoint import Checkpoint
from permgraph.io.tensors import TensorFormat, Transform

log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Conversions:
    """What transformers does to the tensors of a model's checkpoints on loading.

    Attributes:
        module: the model, without weights.
        renamings: what changes names only.
        converters: what joins or splits tensors, or turns them.
    """

    module: nn.Module
    renamings: Sequence[Any]
    converters: Sequence[Any]

    @classmethod
    def of(cls, module: nn.Module) -> Conversions | None:
        """Those of a transformers model; None if its version of transformers has no table of them."""
        try:
            loading = importlib.import_module("transformers.core_model_loading")
            found = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(module)
            renamings = [entry for entry in found if isinstance(entry, loading.WeightRenaming)]
            return cls(module, renamings, [entry for entry in found if isinstance(entry, loading.WeightConverter)])
        except UNKNOWN as error:
            log.info("%s: no conversions: %s", type(module).__name__, in_one_line(error))
            return None

    @classmethod
    def of_parts(cls, module: nn.Module) -> Conversions | None:
        """Those of the parts of a model side by side, as far as they change names; None if no part has any."""
        found = {f"{name}.": cls.of(part) for name, part in module.named_children()}
        renamings = [_PartRenaming(prefix, own) for prefix, own in found.items() if own is not None]
        return cls(module, renamings, []) if renamings else None

    def renamed(self, key: str) -> str:
        """A key by the name that it has today, before anything is joined."""
        for renaming in self.renamings:
            key = renaming.rename_source_key(key)[0]
        return key


@dataclass(frozen=True)
class _PartRenaming:
    """What is renamed of one part of a model, whose names begin with a prefix."""

    prefix: str
    conversions: Conversions

    def rename_source_key(self, key: str) -> tuple[str, None]:
        """A key of the part by the name that it has today, any other as it is, as renamings of transformers give it."""
        if not key.startswith(self.prefix):
            return key, None
        return self.prefix + self.conversions.renamed(key.removeprefix(self.prefix)), None


#: There is no such table in this version of transformers, or it is another.
UNKNOWN = (ImportError, AttributeError, TypeError)


def names_on_disk(conversions: Conversions | None, keys: Sequence[str]) -> dict[str, str]:
    """Each key of a checkpoint to the name that the model has for it today.

    transformers renames modules now and then, and goes on writing the names of old. Where it also joins or splits
    tensors, or for models that are not its own, keys stay as they are.
    """
    same = {key: key for key in keys}
    if conversions is None:
        return same
    try:
        renamed = {key: conversions.renamed(key) for key in keys}
    except UNKNOWN:
        return same
    known = conversions.module.state_dict().keys()
    better = len(known & set(renamed.values())) > len(known & same.keys())
    return renamed if better and len(set(renamed.values())) == len(renamed) else same


@dataclass(frozen=True, eq=False)
class Unit:
    """Tensors of a checkpoint that become one or several of the model together.

    Attributes:
        name: under which transformers collects them.
        converter: what it does to them, and the same backwards.
        sources: the checkpoint's keys, each with the name that the converter knows it by and the pattern that this
            matches, in transformers' order.
        targets: the model's names, with what they are.
    """

    name: str
    converter: tuple[Any, Any]
    sources: Mapping[str, tuple[str, str]]
    targets: Mapping[str, TensorFormat]


@dataclass(frozen=True, eq=False)
class ConvertedCheckpoint(Checkpoint):
    """A checkpoint with the model's tensors in the place of those that they are made of.

    Attributes:
        original: the checkpoint as it is.
        module: the model, without weights.
        units: for each of its names that is made of others, how.
        parts: the same for each key on disk.
    """

    original: Checkpoint
    module: nn.Module
    units: Mapping[str, Unit]
    parts: Mapping[str, Unit]

    def __getitem__(self, key: str) -> torch.Tensor:
        unit = self.units.get(key)
        if unit is None:
            return self.original[key]
        return _forward(unit, {source: self.original[source] for source in unit.sources}, self.module)[key]

    def on_disk(self, transform: Transform) -> Transform:
        """What becomes of the tensors on disk where this becomes of the model's.

        ConvertedCheckpoint tensors are taken apart at once, and their parts are kept until each has been asked for.
        """
        waiting: dict[str, Tensors] = {}
        tried: set[int] = set()

        def transformed(key: str, tensor: torch.Tensor) -> torch.Tensor:
            unit = self.parts.get(key)
            if unit is None:
                return transform(key, tensor)
            if key not in waiting.get(unit.name, {}):
                given = {source: self.original[source] for source in unit.sources}
                joined = _forward(unit, given, self.module)
                if id(unit.converter) not in tried:
                    self._require_exact(unit, given, joined)
                    tried.add(id(unit.converter))
                del given
                waiting[unit.name] = _backward(unit, {n: transform(n, t) for n, t in joined.items()}, self.module)
            part = waiting[unit.name].pop(key)
            if not waiting[unit.name]:
                del waiting[unit.name]
            return part

        return transformed

    def _require_exact(self, unit: Unit, given: Tensors, joined: Tensors) -> None:
        for key, tensor in _backward(unit, joined, self.module).items():
            if not torch.equal(tensor, given[key]) and bool(torch.isfinite(given[key]).all()):
                raise CheckpointError(
                    f"{self.path}: {key!r} and others are {unit.name!r} in the model, and transformers does not get "
                    f"them back from it as they were: save the model in a layout of its own first"
                )


def converted(checkpoint: Checkpoint, conversions: Conversions | None) -> Checkpoint:
    """The checkpoint as the model has its tensors, or itself where these are the same, or nobody knows how.

    Args:
        checkpoint: no tensor of it is read.
        conversions: those of the model that it holds the weights of.
    """
    if conversions is None:
        return checkpoint
    try:
        units = _units(checkpoint, conversions)
    except UNKNOWN:
        return checkpoint
    if not units:
        return checkpoint
    parts = {key: unit for unit in units for key in unit.sources}
    made = {name: form for unit in units for name, form in unit.targets.items()}
    kept = {key: form for key, form in checkpoint.formats.items() if key not in parts}
    return ConvertedCheckpoint(
        checkpoint.path,
        checkpoint.files,
        checkpoint.folder,
        checkpoint.index,
        MappingProxyType({**kept, **made}),
        checkpoint._holder,
        checkpoint,
        conversions.module,
        {name: unit for unit in units for name in unit.targets},
        parts,
    )


def _units(checkpoint: Checkpoint, conversions: Conversions) -> list[Unit]:
    """What of a checkpoint becomes something else in the model, and can be had back."""
    loading = importlib.import_module("transformers.core_model_loading")
    module, converters = conversions.module, conversions.converters
    pairs = {pattern: (each, each.reverse_transform()) for each in converters for pattern in each.source_patterns}
    known = module.state_dict()
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for key in sorted(checkpoint, key=loading.dot_natural_key):
        if key in known and checkpoint.formats[key].shape == tuple(known[key].shape):
            continue
        old = conversions.renamed(key)
        new, pattern = loading.apply_converters(old, converters)
        if pattern is not None:
            found.setdefault(new, {})[key] = old, pattern
    units = []
    for name, sources in found.items():
        _, pattern = next(iter(sources.values()))
        unit = Unit(name, pairs[pattern], sources, {})
        like = {key: checkpoint.formats[key].like() for key in sources}
        try:
            made = _forward(unit, like, module)
            back = _backward(unit, made, module)
        except Exception as error:  # whatever another library's code raises: these are not tensors for it
            log.info("%s stays as it is on disk: %s: %s", name, type(error).__name__, in_one_line(error))
            continue
        if {key: (tensor.shape, tensor.dtype) for key, tensor in back.items()} == {
            key: (tensor.shape, tensor.dtype) for key, tensor in like.items()
        }:
            targets = {name: TensorFormat(tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()}
            units.append(Unit(name, pairs[pattern], sources, targets))
    return units


def _forward(unit: Unit, given: Tensors, module: nn.Module) -> Tensors:
    """What the tensors of a checkpoint are in the model."""
    entries = ((key, pattern, given[key]) for key, (_, pattern) in unit.sources.items())
    return _convert(unit.converter[0], unit.name, entries, module)


def _backward(unit: Unit, given: Tensors, module: nn.Module) -> Tensors:
    """What tensors of the model are in the checkpoint."""
    back = unit.converter[1]
    names = {name: back.rename_source_key(name) for name in given}
    first = next(iter(names.values()))[0]
    made = _convert(back, first, ((name, pattern, given[name]) for name, (_, pattern) in names.items()), module)
    keys = {old: key for key, (old, _) in unit.sources.items()}
    return {keys[old]: tensor for old, tensor in made.items()}


def _convert(converter: Any, name: str, entries: Iterable[tuple[str, str, torch.Tensor]], module: nn.Module) -> Tensors:
    fresh = copy.deepcopy(converter)
    for key, pattern, tensor in entries:
        fresh.add_tensor(name, key, pattern, tensor)
    made = fresh.convert(name, model=module, config=module.config)
    single = {key: tensor[0] if isinstance(tensor, list) else tensor for key, tensor in made.items()}
    return {key: tensor.contiguous() for key, tensor in single.items()}
