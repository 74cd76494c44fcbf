"""The files beside the weights where a result has the rows of several networks: its configuration and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from permgraph.errors import MismatchError

TOKENIZER, TOKENIZER_SETTINGS, CONFIGURATION = "tokenizer.json", "tokenizer_config.json", "config.json"
GENERATION = "generation_config.json"
OWN = ("added_tokens", "padding", "truncation", "version")
"""What of ``tokenizer.json`` may differ: how texts are cut and filled up, and tokens that were added to the others."""


def tokenizer_files(folders: Sequence[Path], rows: Mapping[str, int], like: int) -> dict[str, bytes]:
    """The tokenizer's files of a folder that has the tokens of several, the first one's by their own numbers.

    Args:
        folders: with a ``tokenizer.json`` each; all but the first may only have added tokens that it has not.
        rows: the row of each token in the result.
        like: the number of the folder whose other files the result has.

    Returns:
        The content of ``tokenizer.json``, and of ``tokenizer_config.json`` if that lists tokens.

    Raises:
        MismatchError: the tokenizers differ in more than the tokens that were added to them.
    """
    first, *others = [_read(folder / TOKENIZER) for folder in folders]
    if not all(isinstance(each, dict) for each in (first, *others)):
        lacks = next(f for f, each in zip(folders, (first, *others), strict=True) if not isinstance(each, dict))
        raise MismatchError(
            f"{lacks}: it has no {TOKENIZER}, to which tokens could be added: save its tokenizer anew as a fast one"
        )
    if any(not isinstance(each.get("added_tokens") or [], list) for each in (first, *others)):
        raise MismatchError(f"{folders[0]}: {TOKENIZER} does not list its added tokens")
    for folder, other in zip(folders[1:], others, strict=True):
        differing = [key for key in {**first, **other} if key not in OWN and first.get(key) != other.get(key)]
        if differing:
            raise MismatchError(
                f"{folder / TOKENIZER}: its {differing[0]!r} differs from that of {folders[0]}: only tokens that were "
                "added to a common tokenizer can be added to the other one; --rows meaning keeps the first one's rows"
            )
    tokens = {each["content"]: each for each in first.get("added_tokens") or ()}
    for other in others:
        for each in other.get("added_tokens") or ():
            tokens.setdefault(each["content"], {**each, "id": rows[each["content"]]})
    first["added_tokens"] = sorted(tokens.values(), key=lambda token: int(token["id"]))
    found = {TOKENIZER: _written(first)}
    settings = _read(folders[like] / TOKENIZER_SETTINGS)
    if isinstance(settings, dict) and "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"] = {
            str(each["id"]): {key: value for key, value in each.items() if key != "id"}
            for each in first["added_tokens"]
        }
        found[TOKENIZER_SETTINGS] = _written(settings)
    return found


def configuration_files(
    folder: Path, tokens: tuple[int, int] | None, moved: Mapping[int, int], classes: Mapping[str, int] | None
) -> dict[str, bytes]:
    """The configuration of a folder whose model gets other numbers of tokens or classes.

    Args:
        folder: with a ``config.json``.
        tokens: how many rows for tokens it had, and how many the result has; None if these are as they were.
        moved: the folder's tokens that have another row in the result.
        classes: the row of each class in the result; None if these are as they were.

    Raises:
        MismatchError: the configuration does not say how many tokens there are.
    """
    config = _read(folder / CONFIGURATION)
    if not isinstance(config, dict):
        return {}
    found = {}
    if tokens is not None:
        holders = [part for part in (config, *config.values()) if isinstance(part, dict)]
        holders = [part for part in holders if part.get("vocab_size") == tokens[0]]
        if not holders:
            raise MismatchError(
                f"{folder / CONFIGURATION}: no vocab_size of {tokens[0]}, which the result has {tokens[1]} of: merge "
                "with --rows meaning"
            )
        for part in holders:
            part["vocab_size"] = tokens[1]
            _renumber(part, moved)
        _renumber(config, moved)
        generation = _read(folder / GENERATION)
        if moved and isinstance(generation, dict):
            _renumber(generation, moved)
            found[GENERATION] = _written(generation)
    if classes is not None:
        config["id2label"] = {str(row): label for label, row in sorted(classes.items(), key=lambda pair: pair[1])}
        config["label2id"] = dict(sorted(classes.items(), key=lambda pair: pair[1]))
        for name in ("num_labels", "_num_labels"):
            if name in config:
                config[name] = len(classes)
    return {CONFIGURATION: _written(config), **found}


def _renumber(config: dict[str, Any], moved: Mapping[int, int]) -> None:
    """Give the tokens that a configuration names by number the rows that they have in the result."""
    for key, value in config.items():
        if key.endswith(("token_id", "token_ids")) and isinstance(value, int):
            config[key] = moved.get(value, value)
        elif key.endswith(("token_id", "token_ids")) and isinstance(value, list):
            config[key] = [moved.get(each, each) if isinstance(each, int) else each for each in value]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _written(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
