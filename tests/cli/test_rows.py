"""Folders of other vocabularies and classes, tied and untied, are aligned and merged without anything to do by hand."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import permgraph as pg
from permgraph.cli.app import app
from permgraph.io.vocabulary import classes_in, tokens_in
from permgraph.matching.rows import resized

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}  # of BERT
WORDS = [f"word{n}" for n in range(20)]
OTHER_WORDS = ["<pad>", *WORDS[10:], "new", *WORDS[:8]]  # 20 too, of which 18 in common
MORE_WORDS = [*WORDS, "extra1", "extra2", "extra3"]


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
    return result


def gpt2(vocabulary: int, tied: bool = False, seed: int = 0) -> Any:
    config = transformers.GPT2Config(
        vocab_size=vocabulary, tie_word_embeddings=tied, n_embd=16, n_layer=1, n_head=2, n_positions=12, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.GPT2LMHeadModel(config).eval()


@functools.cache
def spec() -> pg.PermutationSpec:
    return pg.auto_spec(gpt2(20))


def scrambled(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a model of any vocabulary, renumbered."""
    own = resized(spec(), {name: tuple(tensor.shape) for name, tensor in state.items()})
    return own.random(1, every_group=True).apply(state)


def save(
    model: Any, folder: Path, words: list[str] | None = None, state: dict[str, torch.Tensor] | None = None
) -> Path:
    if state is not None:
        model.load_state_dict(state)
    model.save_pretrained(folder)
    if words is not None:
        vocabulary = {word: row for row, word in enumerate(words[:-1])}
        added = [{"id": len(words) - 1, "content": words[-1]}]
        content = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": added}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def by_words(model: Any, other: Any, words: list[str]) -> dict[str, torch.Tensor]:
    """The other's state with the model's weights, each row where the other has that word."""
    state = other.state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.shape == state[name].shape and tensor.shape[0] != len(WORDS):
            state[name] = tensor.clone()
        else:
            rows = [(row, WORDS.index(word)) for row, word in enumerate(words) if word in WORDS]
            new = state[name].clone()
            new[[row for row, _ in rows]] = tensor[[at for _, at in rows]]
            state[name] = new
    return state


@pytest.mark.parametrize("words", [OTHER_WORDS, MORE_WORDS], ids=["as many", "more"])
def test_other_tokens_are_aligned_by_the_tokenizers(tmp_path: Path, words: list[str]) -> None:
    a, b = gpt2(20), gpt2(len(words), seed=1)
    state = by_words(a, b, words)
    save(a, tmp_path / "a", WORDS)
    save(b, tmp_path / "b", words, scrambled(state))
    fit = tmp_path / "fit.safetensors"
    said = run("align", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out", "-p", fit).stderr
    common = len(set(words) & set(WORDS))
    assert f"{common} are in common, by their tokens" in said and "computes the same after renumbering" in said
    moved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(moved[name], tensor) for name, tensor in state.items())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (tmp_path / "b" / "tokenizer.json").read_text()
    if words is MORE_WORDS:  # what goes with B goes by B's own configuration
        run("transport", fit, tmp_path / "b", "-o", tmp_path / "again")
        again = load_file(tmp_path / "again" / "model.safetensors")
        assert all(torch.equal(again[name], tensor) for name, tensor in moved.items())


def test_a_merge_has_the_first_ones_tokens(tmp_path: Path) -> None:
    a, b = gpt2(20), gpt2(23, seed=1)
    state = by_words(a, b, MORE_WORDS)
    save(a, tmp_path / "a", WORDS)
    save(b, tmp_path / "b", MORE_WORDS, scrambled(state))
    said = run("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out", "--no-check").stderr
    assert "each the mean of those that have it" in said
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(merged[name], tensor)


def test_without_a_tokenizer_the_first_rows_are_taken_when_asked_for(tmp_path: Path) -> None:
    a, b = gpt2(20), gpt2(23, seed=1)
    state = by_words(a, b, MORE_WORDS)
    save(a, tmp_path / "a")
    save(b, tmp_path / "b", None, scrambled(state))
    said = run("align", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out", code=2).stderr
    assert "--rows common takes the first of all" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    run("align", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "s", "--rows", "common", "--stream", "--no-check")
    moved = load_file(tmp_path / "s" / "model.safetensors")
    assert all(torch.equal(moved[name], tensor) for name, tensor in state.items())


def test_other_classes_are_matched_by_their_labels(tmp_path: Path) -> None:
    labels = ({0: "bad", 1: "good"}, {0: "none", 1: "good", 2: "bad"})
    models = []
    for seed, each in enumerate(labels):
        config = transformers.BertConfig(vocab_size=23, id2label=each, **SIZES)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models.append(transformers.BertForSequenceClassification(config).eval())
    a, b = models
    head = b.classifier.weight.detach().clone()
    head[[2, 1]] = a.classifier.weight.detach()
    state = {**a.state_dict(), "classifier.weight": head, "classifier.bias": torch.tensor([1.0, 2.0, 3.0])}
    save(a, tmp_path / "a")
    save(b, tmp_path / "b", None, pg.auto_spec(b).random(1, every_group=True).apply(state))
    said = run("align", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out").stderr
    assert "2 are in common, by their classes" in said
    moved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(moved[name], tensor) for name, tensor in state.items())
    run("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "merged", "--weights", "1,3", "--no-check")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    torch.testing.assert_close(merged["classifier.weight"], a.classifier.weight.detach())
    expected = a.classifier.bias.detach() / 4 + torch.tensor([3.0, 2.0]) * 3 / 4
    torch.testing.assert_close(merged["classifier.bias"], expected)


def test_tied_and_untied(tmp_path: Path) -> None:
    tied = gpt2(20, tied=True)
    untied = gpt2(20)
    untied.load_state_dict(tied.state_dict())
    save(tied, tmp_path / "tied")
    save(untied, tmp_path / "untied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    moved = scrambled(tied.state_dict())
    tied.load_state_dict(moved)
    save(tied, tmp_path / "tied-b")
    untied.load_state_dict(moved)
    save(untied, tmp_path / "untied-b")
    for first, second in (("untied", "tied-b"), ("tied", "untied-b")):
        out = tmp_path / f"{first}-{second}"
        said = run("align", tmp_path / first, tmp_path / second, "-o", out).stderr
        if second == "tied-b":
            assert "'lm_head.weight' is tied to 'transformer.wte.weight' by its configuration" in said
        moved, original = (load_file(at / "model.safetensors") for at in (out, tmp_path / second))
        assert moved.keys() == original.keys()
        own = load_file(tmp_path / "tied" / "model.safetensors")
        assert all(torch.equal(moved[name], own[name]) for name in own)
    run("merge", tmp_path / "untied", tmp_path / "tied-b", "-o", tmp_path / "merged", "--no-check")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "untied" / "model.safetensors").items():
        torch.testing.assert_close(merged[name], tensor)
    with torch.no_grad():
        untied.lm_head.weight.add_(1)
    save(untied, tmp_path / "another")
    said = run("merge", tmp_path / "tied", tmp_path / "another", "-o", tmp_path / "apart", "--no-check").stderr
    assert "the result has lm_head.weight besides" in said
    apart = load_file(tmp_path / "apart" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "untied" / "model.safetensors").items():
        torch.testing.assert_close(apart[name], tensor + 0.5 if name == "lm_head.weight" else tensor)


def test_what_folders_say_of_their_rows(tmp_path: Path) -> None:
    assert tokens_in(tmp_path) == {} and classes_in(tmp_path) == {}
    (tmp_path / "tokenizer.json").write_text('{"made": "up"}')
    (tmp_path / "vocab.txt").write_text("a\nb\nc\n")
    (tmp_path / "added_tokens.json").write_text('{"d": 3}')
    assert tokens_in(tmp_path) == {"a": 0, "b": 1, "c": 2, "d": 3}
    (tmp_path / "vocab.json").write_text('{"x": 1, "y": 0}')
    assert tokens_in(tmp_path) == {"x": 1, "y": 0, "d": 3}
    unigram = {"model": {"vocab": [["a", -1.5], ["b", -2]]}, "added_tokens": [{"id": 2, "content": "<s>"}, 3]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram))
    assert tokens_in(tmp_path) == {"a": 0, "b": 1, "<s>": 2}
    (tmp_path / "config.json").write_text('{"id2label": {"0": "no", "1": "yes"}}')
    assert classes_in(tmp_path) == {"no": 0, "yes": 1}
    (tmp_path / "config.json").write_text("not json")
    assert classes_in(tmp_path) == {}
