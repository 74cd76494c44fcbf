"""Results with the rows of all, tables that the first checkpoint alone ties, and tuning of other vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import permgraph as pg
from permgraph.cli.app import app

transformers = pytest.importorskip("transformers")

WORDS = [f"word{n}" for n in range(20)]
SIZES = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}  # of BERT


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
    return result


def gpt2(vocabulary: int, seed: int = 0, tied: bool = False, **settings: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=vocabulary, tie_word_embeddings=tied, n_embd=16, n_layer=1, n_head=2, n_positions=12,
        **{"bos_token_id": 0, "eos_token_id": 0, **settings},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.GPT2LMHeadModel(config).eval()


def with_tokenizer(folder: Path, added: list[str]) -> Path:
    """A tokenizer of 20 words, to which some were added, as transformers saves it."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: row for row, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="word0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_tokens(added)
    made.save(str(folder / "tokenizer.json"))
    return folder


def save(folder: Path, model: Any, added: list[str]) -> Path:
    model.save_pretrained(folder)
    return with_tokenizer(folder, added)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Any, Any]:
    """Networks alike but for rows: A has added tokens x and y, and a row to spare; B y and z, and is renumbered."""
    a, b = gpt2(23), gpt2(22, seed=1, pad_token_id=21)
    state = {name: tensor.clone() for name, tensor in b.state_dict().items()}
    rows = {20: 21}  # y, in B and in A
    for name, tensor in a.state_dict().items():
        if tensor.shape == state[name].shape:
            state[name] = tensor.clone()
        else:
            state[name][:20] = tensor[:20]
            for own, other in rows.items():
                state[name][own] = tensor[other]
    b.load_state_dict(state)
    save(tmp_path / "a", a, ["x", "y"])
    save(tmp_path / "b", b, ["y", "z"])
    moved = pg.auto_spec(b).random(1, every_group=True).apply(state)
    b.load_state_dict(moved)
    b.save_pretrained(tmp_path / "b")
    return a.state_dict(), state


def united(of_a: torch.Tensor, of_b: torch.Tensor) -> torch.Tensor:
    """A's rows, of which the one to spare becomes z's."""
    return torch.cat([of_a[:22], of_b[21:22]])


@pytest.mark.parametrize("command", ["merge", "align"])
def test_the_result_has_the_tokens_of_both(tmp_path: Path, pair: tuple[Any, Any], command: str) -> None:
    a, b = pair
    out = tmp_path / "out"
    said = run(command, tmp_path / "a", tmp_path / "b", "-o", out, "--rows", "union").stderr
    assert "21 are in common, by their tokens" in said and "and 1 that only others have" in said
    written = load_file(out / "model.safetensors")
    for name, tensor in a.items():
        expected = united(tensor, b[name]) if tensor.shape != b[name].shape else tensor
        torch.testing.assert_close(written[name], expected)
    model = transformers.GPT2LMHeadModel.from_pretrained(out)
    assert model.config.vocab_size == 23
    known = transformers.PreTrainedTokenizerFast(tokenizer_file=str(out / "tokenizer.json"))
    assert known.convert_tokens_to_ids(["word19", "x", "y", "z"]) == [19, 20, 21, 22]
    assert known("word3 y z")["input_ids"] == [3, 21, 22]
    assert model.config.pad_token_id == (22 if command == "align" else None)  # of B it is z


def test_tokenizers_that_differ_in_more_are_refused(tmp_path: Path, pair: tuple[Any, Any]) -> None:
    path = tmp_path / "b" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["word19"], content["model"]["vocab"]["word18"] = 18, 19
    path.write_text(json.dumps(content))
    said = run("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out", "--rows", "union", code=2).stderr
    assert "its 'model' differs" in said.strip().splitlines()[-1]
    path.unlink()
    (tmp_path / "b" / "vocab.json").write_text(json.dumps({word: row for row, word in enumerate([*WORDS, "y", "z"])}))
    said = run("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out", "--rows", "union", code=2).stderr
    assert "no tokenizer.json, to which tokens could be added" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("labels", [["good", "bad", "odd"], ["good", "odd"]], ids=["more", "as many"])
def test_the_result_has_the_classes_of_both(tmp_path: Path, labels: list[str]) -> None:
    own = ["bad", "good"]
    models = []
    for seed, each in enumerate((own, labels)):
        config = transformers.BertConfig(vocab_size=23, id2label=dict(enumerate(each)), **SIZES)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models.append(transformers.BertForSequenceClassification(config).eval())
    a, b = models
    head = b.classifier.weight.detach().clone()
    state = {**a.state_dict(), "classifier.weight": head, "classifier.bias": torch.arange(1.0, len(labels) + 1)}
    a.save_pretrained(tmp_path / "a")
    b.load_state_dict(pg.auto_spec(b).random(1, every_group=True).apply(state))
    b.save_pretrained(tmp_path / "b")
    run("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out", "--rows", "union", "--no-check")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "bad", 1: "good", 2: "odd"}
    assert model.config.label2id == {"bad": 0, "good": 1, "odd": 2} and model.config.num_labels == 3
    for row, label in enumerate(["bad", "good", "odd"]):
        having = [m for m, names in ((a.classifier.weight, own), (head, labels)) if label in names]
        rows = [m[names.index(label)] for m, names in ((a.classifier.weight, own), (head, labels)) if label in names]
        assert len(having) == (1 if label == "odd" or (label == "bad" and len(labels) == 2) else 2)
        torch.testing.assert_close(model.classifier.weight[row], torch.stack(rows).mean(0))


def test_without_names_there_is_no_union(tmp_path: Path) -> None:
    gpt2(20).save_pretrained(tmp_path / "a")
    gpt2(23, seed=1).save_pretrained(tmp_path / "b")
    said = run("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out", "--rows", "union", code=2).stderr
    assert "tokenizer.json or id2label would say it" in said and len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_a_tied_checkpoint_and_an_untied_one_make_an_untied_result(tmp_path: Path, shards: bool) -> None:
    a, b = gpt2(20, tied=True), gpt2(20, seed=1)
    state = {**a.state_dict(), "lm_head.weight": b.lm_head.weight.detach().clone()}
    b.load_state_dict(pg.auto_spec(b).random(1, every_group=True).apply(state))
    options = {"max_shard_size": 4000} if shards else {}
    a.save_pretrained(tmp_path / "a", **options)
    b.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors.index.json").exists() == shards
    said = run("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out", "--weights", "1,3").stderr
    assert "is tied where others are not" in said
    merged, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not merged.config.tie_word_embeddings
    for name, tensor in a.state_dict().items():
        expected = tensor / 4 + state[name] * 3 / 4
        torch.testing.assert_close(merged.state_dict()[name], expected)


def test_a_file_that_is_tied_cannot_say_that_its_result_is_not(tmp_path: Path) -> None:
    a, b = gpt2(20, tied=True), gpt2(20, seed=1)
    for name, model in (("a", a), ("b", b)):
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").rename(tmp_path / f"{name}.safetensors")
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    said = run("merge", *files, "-m", tmp_path / "a", "-o", tmp_path / "out.safetensors", code=2).stderr
    assert "name that checkpoint first" in said and not (tmp_path / "out.safetensors").exists()


def test_a_tuning_of_another_vocabulary_is_brought_to_a_base(tmp_path: Path) -> None:
    base_b, base_a, tuned = gpt2(20), gpt2(22, seed=1), gpt2(23, seed=2)
    state = base_a.state_dict()
    for name, tensor in base_b.state_dict().items():
        state[name] = torch.cat([tensor, state[name][20:]]) if tensor.shape != state[name].shape else tensor.clone()
    generator = torch.Generator().manual_seed(3)
    steps = {name: 0.01 * torch.randn(t.shape, generator=generator) for name, t in base_b.state_dict().items()}
    of_tuned = tuned.state_dict()
    for name, step in steps.items():
        rows = of_tuned[name].shape != state[name].shape
        of_tuned[name] = torch.cat([state[name][:20] + step, of_tuned[name][20:]]) if rows else state[name] + step
    for name, model, own, words in (
        ("b", base_b, base_b.state_dict(), []),
        ("a", base_a, state, ["x", "y"]),
        ("tuned", tuned, of_tuned, ["x", "y", "z"]),
    ):
        if name != "b":
            own = pg.auto_spec(model).random(1, every_group=True).apply(own)
        model.load_state_dict(dict(own))
        save(tmp_path / name, model, words)
    out = tmp_path / "out"
    said = run("transport", tmp_path / "a", tmp_path / "tuned", tmp_path / "b", "-o", out, "--strength", "2").stderr
    assert "20 are in common, by their tokens" in said
    written = load_file(out / "model.safetensors")
    for name, tensor in base_b.state_dict().items():
        torch.testing.assert_close(written[name], tensor + 2 * steps[name], atol=1e-6, rtol=1e-5)
