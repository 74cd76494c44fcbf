"""A text as tokens, by the tokenizer that lies in a folder."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from permgraph.errors import EvaluationError, MissingExtraError, in_one_line

TOKENIZER = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
"""The files of which the folder of a tokenizer has one at least."""


def tokens_of(path: Path, folder: Path | None) -> torch.Tensor:
    """The tokens of a text in UTF-8.

    Args:
        path: of the text.
        folder: in which the tokenizer lies, if one is known.

    Raises:
        EvaluationError: there is no such text or no tokenizer, or it makes nothing of the text.
        MissingExtraError: transformers is not installed.
    """
    if not path.is_file():
        raise EvaluationError(f"--data {path}: no such file")
    if folder is None:
        raise EvaluationError(f"--data {path}: text needs a tokenizer: say --tokenizer FOLDER")
    if not (folder.is_dir() and any(list(folder.glob(pattern)) for pattern in TOKENIZER)):
        raise EvaluationError(
            f"{folder}: no tokenizer that can be used: there is neither {' nor '.join(TOKENIZER)} in it: say "
            f"--tokenizer FOLDER, or give the tokens, input_ids in a .safetensors file, in place of {path.name}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: not a text in UTF-8: {error}") from None
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise MissingExtraError("text needs a tokenizer of transformers: pip install 'permgraph[zoo]'") from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
    except Exception as error:  # whatever a folder without a good tokenizer makes transformers raise
        raise EvaluationError(f"{folder}: no tokenizer that can be used: {in_one_line(error, 200)}") from None
    if not len(tokens):
        raise EvaluationError(f"{path}: the tokenizer of {folder} makes no token of it: is it that of the model?")
    return tokens
