"""Folders of transformers as people have them: aligned and merged rightly, or refused in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from permgraph.cli.app import app
from tests.cli.untidy_networks import State, near

transformers = pytest.importorskip("transformers")

SIZES = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12, "bos_token_id": 0, "eos_token_id": 0}
WORDS = [f"word{number}" for number in range(20)]
Change = Callable[[State], State]


def gpt2(kind: str = "GPT2LMHeadModel", **more: Any) -> Any:
    sizes = {"vocab_size": 20, "tie_word_embeddings": False, "pad_token_id": 0, **SIZES, **more}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, kind)(transformers.GPT2Config(**sizes)).eval()


def reordered(state: State) -> State:
    """GPT-2 with the hidden units of its MLP in another order: (inputs, units), and (units, outputs)."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    moved = {"c_fc.weight": 1, "c_fc.bias": 0, "mlp.c_proj.weight": 0}
    dims = {name: next((dim for end, dim in moved.items() if name.endswith(end)), None) for name in state}
    return {n: t if dims[n] is None else t.index_select(dims[n], order) for n, t in state.items()}


@dataclass(frozen=True)
class Folders:
    """A pair of folders: what A and B are, and what should come of them.

    Attributes:
        a, b: options of both models.
        kind: their class.
        words: whether both folders have a tokenizer.
        change: what is done to B's state dict before it is written.
        after: what is done to B's folder.
        options: further options of both commands.
        refused: what the one line must say.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    kind: str = "GPT2LMHeadModel"
    words: bool = False
    change: Change = dict
    after: Callable[[Path], object] = str
    options: tuple[str, ...] = ()
    refused: str = ""


def old_buffers(state: State) -> State:
    return {
        **state,
        "transformer.h.0.attn.bias": torch.ones(1, 1, 12, 12),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }


def as_bin(folder: Path) -> None:
    """The folder as older versions of transformers wrote it."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


CASES = {
    "the same": Folders({}, {}),
    "in a .bin": Folders({}, {}, after=as_bin),
    "buffers that old checkpoints have": Folders({}, {}, change=old_buffers),
    "added tokens, told by the tokenizers": Folders({}, {"vocab_size": 23}, words=True),
    "added tokens, and nothing that tells": Folders({}, {"vocab_size": 23}, refused="--rows common takes the first"),
    "the same with --rows common": Folders({}, {"vocab_size": 23}, options=("--rows", "common")),
    "other classes": Folders({"num_labels": 2}, {"num_labels": 5}, kind="GPT2ForSequenceClassification",
                             options=("--rows", "common")),
    "another number of heads": Folders({}, {"n_head": 4}, refused="but not the same symmetries"),
    "a configuration that is no JSON": Folders({}, {}, after=lambda folder: (folder / "config.json").write_text("{"),
                                               refused="config.json: not valid JSON"),
}  # fmt: skip


def pair(root: Path, case: Folders) -> tuple[State, State]:
    """Write both folders; A's state dict, and B's before its units were put in another order."""
    a, b = gpt2(case.kind, **case.a), gpt2(case.kind, **case.b)
    known = a.state_dict()
    draw = near(known)
    state = {
        n: draw[n] if draw.get(n) is not None and draw[n].shape == t.shape else t for n, t in b.state_dict().items()
    }
    for name, tensor in state.items():  # rows that both have mean the same
        if name in known and known[name].shape != tensor.shape:
            rows = min(len(tensor), len(known[name]))
            tensor[:rows] = draw[name][:rows]
    for name, model, tensors in (("a", a, known), ("b", b, reordered(state))):
        model.load_state_dict(tensors)
        model.save_pretrained(root / name)
        if case.words:
            words = [*WORDS, "extra1", "extra2", "extra3"][: model.config.vocab_size]
            content = {"model": {"type": "BPE", "vocab": {word: row for row, word in enumerate(words)}}}
            (root / name / "tokenizer.json").write_text(json.dumps(content))
    save_file(case.change(reordered(state)), root / "b" / "model.safetensors", {"format": "pt"})
    case.after(root / "b")
    return known, state


@pytest.mark.parametrize("name", CASES)
def test_folders(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.chdir(tmp_path)
    known, state = pair(tmp_path, case)
    there = sorted(tmp_path.rglob("*"))
    for command in ("align", "merge"):
        result = CliRunner().invoke(app, [command, "a", "b", "-o", f"{command}ed", *case.options])
        if case.refused:
            assert result.exit_code == 2, f"{result.stdout}\n{result.stderr}"
            errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
            assert len(errors) == 1 and re.search(case.refused, errors[0]), result.stderr
            assert sorted(tmp_path.rglob("*")) == there
            continue
        assert result.exit_code == 0, f"{result.stdout}\n{result.stderr}"
        (file,) = [file for file in Path(f"{command}ed").iterdir() if file.suffix in (".safetensors", ".bin")]
        written = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        expected = state if command == "align" else {n: (t + state[n][: len(t)]) / 2 for n, t in known.items()}
        for key, tensor in expected.items():  # no bit of B's changes; in the mean, rows that only one has are its own
            rows = len(tensor) if command == "align" else min(len(tensor), len(state[key]))
            torch.testing.assert_close(
                written[key][:rows], tensor[:rows], rtol=1e-6, atol=0 if command == "align" else 1e-6
            )
        if command == "align":
            tokens = torch.randint(20, (2, 7))
            logits = [
                getattr(transformers, case.kind).from_pretrained(f).eval()(tokens).logits for f in ("b", "aligned")
            ]
            torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-6)
