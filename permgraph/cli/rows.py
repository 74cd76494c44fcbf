"""Checkpoints of other vocabularies or classes, and what a tied one leaves out: each with a layout of its own."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from permgraph.cli.folders import model_of
from permgraph.cli.models import build
from permgraph.cli.screen import Screen
from permgraph.errors import MismatchError, PermgraphError
from permgraph.io import Checkpoint, Renamed
from permgraph.io.vocabulary import classes_in, tokens_in
from permgraph.matching.rows import Kind, Rows, tables_of
from permgraph.spec.spec import PermutationSpec


@dataclass(frozen=True, eq=False)
class CommonRows(Renamed):
    """A checkpoint by a model's names, with the rows alone that all checkpoints have."""

    number: int = 0
    rows: Rows | None = field(default=None, repr=False)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = super().__getitem__(name)
        return tensor if self.rows is None else self.rows.pick(self.number, name, tensor)

    def without_values(self) -> dict[str, torch.Tensor]:
        """Every name with a tensor on the meta device."""
        whole = super().without_values()
        if self.rows is None:
            return whole
        shapes = self.rows.spec.shapes
        known = {name: self.rows.spec.aliases.get(name, name) for name in whole}
        return {n: t.new_empty(shapes[known[n]]) if known[n] in self.rows.tables else t for n, t in whole.items()}


def matched_rows(
    spec: PermutationSpec, weights: Sequence[Renamed], asked: str, model: str, screen: Screen
) -> Rows | None:
    """Which rows of checkpoints mean the same; None if all have the same.

    Args:
        spec: of the first.
        weights: of each, by the spec's names.
        asked: "meaning", by the tokens and classes that the folders tell, "union", so that the result has those of all,
            or "common", the first rows of all.
        model: what the first is of, as it is named on the command line.
        screen: is told what was matched and what is left.

    Raises MismatchError if the checkpoints differ in more, or nothing says which rows mean the same.
    """
    folders = [each.checkpoint.home for each in weights]
    names = [str(each.checkpoint.path) for each in weights]
    kinds: list[Kind] = []
    tables: list[str] = []
    if asked != "common" and all(folders):
        known = [folder for folder in folders if folder is not None]
        for what, read in (("tokens", tokens_in), ("classes", classes_in)):
            found = tuple(map(read, known))
            if all(found):
                kinds.append(Kind(what, found))
                if what == "tokens" and any(each != found[0] for each in found) and model.startswith("hf:"):
                    tables = _tables(model, spec)
    states = [each.without_values() for each in weights]
    try:
        union = asked == "union"
        rows = Rows.of(spec, states, kinds, first_ones=asked == "common", tables=tables, names=names, union=union)
    except MismatchError as error:
        said = str(error)
        start, found_it, _ = said.partition(": rows=")
        if found_it:
            said = f"{start}: --rows common takes the first of all; a folder's tokenizer.json or id2label would say it"
        raise MismatchError(said) from None
    for note in () if rows is None else rows.notes:
        screen.note(note)
    return rows


def _tables(model: str, spec: PermutationSpec) -> list[str]:
    try:
        return [name for name in tables_of(build(model)) if name in spec.axes or name in spec.aliases]
    except PermgraphError:  # the spec is known already, and equal numbers of rows are then taken as they stand
        return []


def digest_of(rows: Rows | None) -> str:
    """What tells whether rows are matched as they were."""
    found = hashlib.sha256()
    for name, table in {} if rows is None else rows.tables.items():
        found.update(name.encode())
        for each in table.partners:
            found.update(each.numpy().tobytes())
    return found.hexdigest() if rows is not None else ""


def tied_names(checkpoint: Checkpoint, known: Mapping[str, str], spec: PermutationSpec) -> dict[str, str]:
    """Names that a checkpoint leaves out because its own configuration ties them, with the key that holds each.

    Args:
        checkpoint: whose names these are.
        known: the names that it has, with its keys.
        spec: whose names are wanted.
    """
    have = {spec.aliases.get(name, name) for name in known}
    missing = [name for name in spec.tensors if name not in have]
    found = {}
    for names in _sharing(checkpoint) if missing else ():
        held = next((name for name in names if name in known), None)
        found.update({name: known[held] for name in names if name in missing and held is not None})
    return found


def with_own_ties(spec: PermutationSpec, weights: Renamed) -> PermutationSpec:
    """The spec of permutations of a checkpoint that ties other names than the first one does, as it ties them."""
    keys = weights.keys_of
    doubled = len(set(keys.values())) < len(keys)
    apart = [
        alias for alias, name in spec.aliases.items() if keys.get(alias, "") != keys.get(name, "") and alias in keys
    ]
    if spec.general is not None or not (doubled or apart):
        return spec
    aliases = {other: first for first, *others in _sharing(weights.checkpoint) for other in others}
    if not aliases and not model_of(weights.checkpoint):
        return spec
    axes = {**spec.axes, **{alias: spec.axes[name] for alias, name in spec.aliases.items()}}
    aliases = {alias: name for alias, name in aliases.items() if alias in axes and name in axes}
    kept = {name: own for name, own in axes.items() if name not in aliases}
    return dataclasses.replace(spec, axes=kept, aliases=aliases, shapes={})


def _sharing(checkpoint: Checkpoint) -> list[list[str]]:
    """The names under which the model that a checkpoint's folder describes has one parameter, if there are several."""
    own = model_of(checkpoint)
    if not own:
        return []
    try:
        module = build(own)
    except PermgraphError:  # it is said elsewhere that the configuration cannot be read
        return []
    found: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return [names for names in found.values() if len(names) > 1]
