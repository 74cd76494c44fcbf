"""What a folder of transformers calls its rows: the tokens of its tokenizer's files, and the classes of its config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def tokens_in(folder: Path) -> dict[str, int]:
    """The row of each token, by ``tokenizer.json``, else ``vocab.json`` or ``vocab.txt`` and what was added to them.

    Empty if there is none of them, or what is there says nothing of tokens.
    """
    whole = _read(folder / "tokenizer.json")
    model = whole.get("model") if isinstance(whole, Mapping) else None
    if isinstance(model, Mapping) and model.get("vocab"):
        return {**_pairs(model["vocab"]), **_added(whole.get("added_tokens"))}
    plain = _pairs(_read(folder / "vocab.json"))
    listed = folder / "vocab.txt"
    if not plain and listed.is_file():
        plain = {line: row for row, line in enumerate(listed.read_text(encoding="utf-8").split("\n")) if line}
    return {**plain, **_pairs(_read(folder / "added_tokens.json"))} if plain else {}


def classes_in(folder: Path) -> dict[str, int]:
    """The row of each class, by the ``id2label`` of ``config.json``; empty if it does not say."""
    config = _read(folder / "config.json")
    labels = config.get("id2label") if isinstance(config, Mapping) else None
    if not isinstance(labels, Mapping):
        return {}
    return {str(label): int(row) for row, label in labels.items() if str(row).isdecimal()}


def _read(path: Path) -> Any:
    """What a file says in JSON; None if there is none, or it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _pairs(vocabulary: Any) -> dict[str, int]:
    """Tokens to rows, of a mapping, or of a list of tokens with scores in their order."""
    if isinstance(vocabulary, Mapping):
        return {str(token): row for token, row in vocabulary.items() if isinstance(row, int)}
    if isinstance(vocabulary, list):
        firsts = [each[0] if isinstance(each, list) and each else each for each in vocabulary]
        return {token: row for row, token in enumerate(firsts) if isinstance(token, str)}
    return {}


def _added(tokens: Any) -> dict[str, int]:
    listed = tokens if isinstance(tokens, list) else []
    told = [each for each in listed if isinstance(each, Mapping) and isinstance(each.get("id"), int)]
    return {str(each.get("content")): each["id"] for each in told}
