"""What a result has otherwise than the checkpoint that it is like: the rows of all, or a table that was tied before."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from permgraph.capture import untied_config
from permgraph.cli.folders import model_of
from permgraph.cli.models import build
from permgraph.errors import MismatchError, PermgraphError
from permgraph.io import Renamed
from permgraph.io.united import configuration_files, tokenizer_files
from permgraph.io.vocabulary import classes_in, tokens_in
from permgraph.io.write import Changes
from permgraph.matching.rows import Rows, Table, rows_in_union
from permgraph.spec.spec import PermutationSpec


def changes_of(rows: Rows | None, weights: Sequence[Renamed], like: int, spec: PermutationSpec) -> Changes:
    """What a result with the rows of all has otherwise than one of the checkpoints.

    Args:
        rows: which mean the same; nothing changes unless the result has those of all.
        weights: the checkpoints.
        like: the number of the one that the result is like.
        spec: of any of them.

    Raises:
        MismatchError: its folder's configuration or tokenizer cannot say so.
    """
    if rows is None or not rows.union:
        return Changes()
    own = weights[like]
    tables = {spec.aliases.get(name, name): name for name in own.keys_of}
    shapes = {
        key: rows.shape(name, own.checkpoint.formats[key].shape)
        for name, key in own.keys_of.items()
        if spec.aliases.get(name, name) in rows.tables
    }
    folders = [each.checkpoint.home for each in weights]
    if own.checkpoint.folder is None or not all(folders):
        return Changes(shapes)
    known = [folder for folder in folders if folder is not None]
    whole = {name: own.checkpoint.formats[own.keys_of[tables[name]]].shape[table.dim] for name, table in
             rows.tables.items() if name in tables}  # fmt: skip
    files: dict[str, bytes] = {}
    tokens, moved, classes = None, {}, None
    for read, of_tokens in ((tokens_in, True), (classes_in, False)):
        named = [read(folder) for folder in known]
        if not all(named):
            continue
        united = rows_in_union(named)
        table = next((t for name, t in rows.tables.items() if name in whole and _fits(t, united, named)), None)
        if table is None:
            continue
        if of_tokens:
            files |= tokenizer_files(known, united, like)
            tokens = whole[next(name for name, each in rows.tables.items() if each is table)], len(table.partners[0])
            moved = {row: united[token] for token, row in named[like].items() if united[token] != row}
        else:
            classes = united
    return Changes(shapes, files={**files, **configuration_files(known[like], tokens, moved, classes)})


def _fits(table: Table, united: Mapping[str, int], named: Sequence[Mapping[str, int]]) -> bool:
    """Whether these are the names of a table's rows in the result."""
    return max(united.values()) < len(table.partners[0]) and all(
        torch.equal(
            table.partners[number][torch.tensor(list(united.values()))],
            torch.tensor([rows.get(name, -1) for name in united]),
        )
        for number, rows in enumerate(named)
        if number or len(united) == len(rows)
    )


def untied_for(weights: Sequence[Renamed], spec: PermutationSpec) -> tuple[Renamed, Changes]:
    """The first checkpoint with tensors of their own for names that it ties and another one does not, as values.

    Args:
        weights: the checkpoints, all of which have every other name.
        spec: of the first.

    Returns:
        The first one with further names for the tensors that it ties, and what its result has otherwise.

    Raises:
        MismatchError: its folder cannot say that the result is not tied.
    """
    first, *others = weights
    apart = [alias for alias in spec.aliases if any(_is_apart(first, other, alias, spec) for other in others)]
    if not apart:
        return first, Changes()
    added, names = {}, dict(first.keys_of)
    for alias in apart:
        name = spec.aliases[alias]
        key = first.keys_of.get(name, "")
        other = next(each for each in others if _is_apart(first, each, alias, spec))
        said = (
            f"{first.checkpoint.path} ties {alias!r} to {name!r}, and {other.checkpoint.path} has another tensor for "
            "each, which the result has no place for: name that checkpoint first"
        )
        if not key.endswith(name) or not _is_embedding(first, alias, name):
            raise MismatchError(said)
        added[key.removesuffix(name) + alias] = key
        names[alias] = key.removesuffix(name) + alias
    assert first.checkpoint.folder is not None
    config = json.loads((first.checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    content = (json.dumps(untied_config(config), indent=2, ensure_ascii=False) + "\n").encode()
    return dataclasses.replace(first, keys_of=names), Changes(added=added, files={"config.json": content})


def _is_apart(first: Renamed, other: Renamed, alias: str, spec: PermutationSpec) -> bool:
    """Whether a later checkpoint has a tensor of its own, of other values, for a name that the first one ties."""
    name = spec.aliases[alias]
    if alias in first.keys_of or alias not in other or name not in other or other.keys_of[alias] == other.keys_of[name]:
        return False
    one, two = other[alias], other[name]
    return one.shape != two.shape or not torch.equal(one, two)


def _is_embedding(first: Renamed, alias: str, name: str) -> bool:
    """Whether a folder's model ties these two as its word embeddings, which its configuration can undo."""
    own, folder = model_of(first.checkpoint), first.checkpoint.folder
    if not own or folder is None or first.checkpoint.inside or not Path(folder, "config.json").is_file():
        return False
    try:
        module = build(own)
        parts = module.get_input_embeddings(), module.get_output_embeddings()  # type: ignore[operator]
        names = {id(part): path for path, part in module.named_modules()}
    except (PermgraphError, AttributeError, NotImplementedError):
        return False
    return {f"{names.get(id(part), '')}.weight" for part in parts} == {alias, name}
