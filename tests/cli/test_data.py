"""Data for the commands that run networks: every layout, and what is damaged or unsafe."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from permgraph.cli.data import Batches, class_dim_of, load_data, loss_on
from permgraph.cli.options import Data, Split
from permgraph.errors import EvaluationError, PermgraphError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (10, 28, 28), dtype=np.uint8)
LABELS = RNG.integers(0, 10, 10, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist(folder: Path, part: str = "train", zipped: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    for name, array in (("images-idx3-ubyte", IMAGES), ("labels-idx1-ubyte", LABELS)):
        content = idx(array)
        path = folder / f"{part}-{name}{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(content) if zipped else content)
    return folder


def cifar(folder: Path, *, text_keys: bool = False) -> tuple[Path, np.ndarray, list[int]]:
    folder.mkdir()
    pixels = RNG.integers(0, 256, (4, 3072), dtype=np.uint8)
    labels = [3, 1, 4, 1]
    for number in range(1, 6):
        batch: dict[Any, Any] = {b"data": pixels, b"labels": labels, b"filenames": [b"x.png"] * 4}
        if text_keys:
            batch = {key.decode(): value for key, value in batch.items()}
        (folder / f"data_batch_{number}").write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": pixels[:2], b"labels": labels[:2]}, protocol=2))
    return folder, pixels, labels


def pictures(folder: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    for number, (name, size) in enumerate({"cat": (40, 20), "ant": (24, 24), "bee": (16, 32)}.items()):
        (folder / "train" / name).mkdir(parents=True)
        for copy in range(2):
            pixels = np.full((size[1], size[0], 3), 60 * number + 10 * copy, dtype=np.uint8)
            image.fromarray(pixels).save(folder / "train" / name / f"{copy}.png")
    return folder


def load(path: object, split: Split = Split.train, **options: Any) -> Any:
    return load_data(Data(data=str(path), **options), split=split)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist(tmp_path: Path, zipped: bool) -> None:
    mnist(tmp_path / "m", "train", zipped)
    batches = load(tmp_path / "m", batch_size=4)
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([y for _, y in batches]), torch.from_numpy(LABELS).long())
    x = torch.cat([x for x, _ in batches])
    assert x.shape == (10, 1, 28, 28) and x.dtype == torch.float32
    assert torch.equal(x[:, 0] * 255, torch.from_numpy(IMAGES).float())
    assert torch.equal(batches[-1][0], batches[2][0]) and len(batches[:2]) == 2
    flat = load(tmp_path / "m", flatten=True, mean="0.5", std="0.25")[0][0]
    assert torch.allclose(flat, (x.flatten(1) - 0.5) / 0.25)
    with pytest.raises(EvaluationError, match="no test part"):
        load(tmp_path / "m", Split.test)
    mnist(tmp_path / "m", "t10k")
    assert len(load(tmp_path / "m", Split.test)[0][1]) == 10


@pytest.mark.parametrize("text_keys", [False, True])
def test_cifar(tmp_path: Path, text_keys: bool) -> None:
    folder, pixels, labels = cifar(tmp_path / "cifar-10-batches-py", text_keys=text_keys)
    ((x, y),) = load(tmp_path)  # the folder in which it was unpacked
    assert x.shape == (20, 3, 32, 32)
    assert torch.equal((x[:4] * 255).round().byte().reshape(4, -1), torch.from_numpy(pixels))
    assert y.tolist() == labels * 5
    ((x, y),) = load(folder, Split.test, mean="0.5,0.4,0.3", std="0.2,0.3,0.4", image_size=16)
    assert x.shape == (2, 3, 16, 16) and y.tolist() == labels[:2]
    with pytest.raises(EvaluationError, match="2 numbers for images of shape"):
        load(folder, mean="0.5,0.4")[0]


def test_cifar_100_has_fine_labels(tmp_path: Path) -> None:
    content = {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [7, 99], "coarse_labels": [0, 1]}
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol=2))
    assert load(tmp_path)[0][1].tolist() == [7, 99]


def test_folders_of_images(tmp_path: Path) -> None:
    folder = pictures(tmp_path)
    ((x, y),) = load(folder, image_size=8)
    assert y.tolist() == [0, 0, 1, 1, 2, 2]  # ant, bee, cat
    assert x.shape == (6, 3, 8, 8)
    assert torch.allclose(x[2], torch.tensor(120 / 255))
    assert load(folder)[0][0].shape == (6, 3, 224, 224)
    (folder / "train" / "cat" / "broken.png").write_bytes(b"not a png")
    with pytest.raises(EvaluationError, match=r"broken\.png: not an image"):
        list(load(folder, image_size=8))


def test_files_of_tensors(tmp_path: Path) -> None:
    x, y = torch.randn(6, 5), torch.arange(6)
    save_file({"x": x, "y": y}, tmp_path / "d.safetensors")
    torch.save({"inputs": x, "targets": y}, tmp_path / "d.pt")
    torch.save((x, y), tmp_path / "pair.pt")
    np.savez(tmp_path / "d.npz", images=x.numpy(), labels=y.numpy())
    for name in ("d.safetensors", "d.pt", "pair.pt", "d.npz"):
        batches = load(tmp_path / name, batch_size=4)
        assert torch.equal(torch.cat([b[0] for b in batches]), x), name
        assert torch.equal(torch.cat([b[1] for b in batches]), y), name
    save_file({"input_ids": y, "mask": y + 1, "labels": y + 2}, tmp_path / "k.safetensors")
    assert load(tmp_path / "k.safetensors", batch_size=4)[1].keys() == {"input_ids", "mask", "labels"}


def test_bytes_in_a_file_are_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=IMAGES[:, None], y=LABELS.astype(np.int64))
    x, _ = load(tmp_path / "d.npz", mean="0.5")[0]
    assert torch.allclose(x[:, 0], torch.from_numpy(IMAGES).float() / 255 - 0.5)


def test_a_limit_takes_samples_from_all_over(tmp_path: Path) -> None:
    save_file({"x": torch.arange(10.0), "y": torch.arange(10)}, tmp_path / "d.safetensors")
    assert torch.cat([y for _, y in load(tmp_path / "d.safetensors", limit=5, batch_size=2)]).tolist() == [
        0,
        2,
        4,
        6,
        8,
    ]
    assert len(load(tmp_path / "d.safetensors", limit=50)[0][1]) == 10
    with pytest.raises(IndexError):
        Batches([1], 1, lambda numbers: numbers)[1]


def test_the_targets_of_tokens_by_themselves_are_the_next_ones(tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    save_file({"input_ids": ids, "attention_mask": mask}, tmp_path / "alone.safetensors")
    save_file({"input_ids": ids, "labels": ids.clone()}, tmp_path / "same.safetensors")
    save_file({"input_ids": ids, "labels": ids + 1}, tmp_path / "other.safetensors")
    (alone,), (same,), (other,) = (load(tmp_path / f"{name}.safetensors") for name in ("alone", "same", "other"))
    assert alone["labels"].tolist() == [[6, 7, -100], [9, -100, -100]]
    assert same["labels"].tolist() == [[6, 7, -100], [9, 0, -100]]
    assert other["labels"].tolist() == (ids + 1).tolist()


def test_text_for_a_language_model(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "sat", "on", "the", "log"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    model = tokenizers.models.WordLevel({**vocabulary, "[UNK]": 99}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "hf").mkdir()
    tokenizer.save(str(tmp_path / "hf" / "tokenizer.json"))
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "t.txt").write_text(" ".join(words))
    tokens = [vocabulary[word] for word in words]
    (batch,) = load(tmp_path / "t.txt", tokenizer=tmp_path / "hf", length=4)
    assert batch["input_ids"].tolist() == [tokens[0:4], tokens[4:8], tokens[8:12]]
    assert batch["labels"].tolist() == [tokens[1:5], tokens[5:9], tokens[9:13]]
    assert class_dim_of(Data(), [batch]) == -1 and class_dim_of(Data(class_dim=2), [batch]) == 2
    assert class_dim_of(Data(), [(torch.zeros(1, 3), torch.zeros(1))]) == 1
    logits = torch.randn(3, 4, 9)
    assert loss_on(-1)(logits, batch["labels"]) == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()))
    )
    with pytest.raises(EvaluationError, match="too few for samples of 128"):
        load(tmp_path / "t.txt", tokenizer=tmp_path / "hf")
    with pytest.raises(EvaluationError, match="say --tokenizer"):
        load(tmp_path / "t.txt")
    with pytest.raises(EvaluationError, match="no tokenizer that can be used"):
        load(tmp_path / "t.txt", tokenizer=tmp_path)


# --- refusals ---------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> object:
        return os.system, ("touch pwned",)


def written(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def in_cifar(content: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        cifar(folder / "c")[0].joinpath("data_batch_3").write_bytes(pickle.dumps(content, protocol=2))
        return folder / "c"

    return make


def in_mnist(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        mnist(folder / "m").joinpath(name).write_bytes(content)
        return folder / "m"

    return make


def npz(**arrays: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.savez(folder / "d.npz", **arrays)
        return folder / "d.npz"

    return make


def folder_with(*names: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "f").mkdir()
        for name in names:
            (folder / "f" / name).write_bytes(b"")
        return folder / "f"

    return make


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (in_cifar(Evil()), r"refused: .*system"),
        (in_cifar({"data": Evil()}), r"refused: .*system"),
        (in_cifar([1, 2]), "it holds a list"),
        (in_cifar({"data": np.zeros((2, 3072)), "labels": [1, 2]}), "not a batch of CIFAR"),
        (in_cifar({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}), "not a batch of CIFAR"),
        (in_cifar({"data": np.zeros((1, 3072), np.uint8), "labels": ["cat"]}), "not a batch of CIFAR"),
        (npz(x=np.array([Evil()], dtype=object), y=np.zeros(1)), "not an archive of plain arrays"),
        (npz(x=np.array(["a"]), y=np.zeros(1)), "not an archive of plain arrays"),
        (npz(x=np.zeros((3, 2)), y=np.zeros(2)), "must have one length"),
        (npz(x=np.zeros((3, 2))), "no targets"),
        (npz(x=np.zeros((0, 2)), y=np.zeros(0)), "must have one length"),
        (written("d.npz", b"PK nonsense"), "not an archive"),
        (written("d.pt", pickle.dumps(Evil())), "d.pt"),
        (written("d.csv", b"1,2"), r"a \.csv file is not read here"),
        (written("d.txt", b"\xff\xfe\xff"), "say --tokenizer"),
        (in_mnist("train-images-idx3-ubyte", b"\0\0\x08\x03" + b"\xff" * 12), "claims to hold"),
        (in_mnist("train-images-idx3-ubyte", idx(IMAGES)[:-1]), "or more follow"),
        (in_mnist("train-images-idx3-ubyte", idx(IMAGES) + b"x"), "or more follow"),
        (in_mnist("train-images-idx3-ubyte", b"hello"), "not an idx file"),
        (in_mnist("train-labels-idx1-ubyte", idx(LABELS[:3])), "10 images and 3 labels"),
        (folder_with("train-images-idx3-ubyte.gz"), "it cannot be read|not an idx file"),
        (folder_with("notes.md"), "neither MNIST's idx files"),
        (lambda folder: folder / "absent.npz", "no such file"),
    ],
)
def test_what_is_damaged_or_unsafe_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PermgraphError, match=said) as caught:
        list(load(make(tmp_path)))
    assert "\n" not in str(caught.value)
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "--batch-size 0"),
        ({"limit": 0}, "--limit 0"),
        ({"mean": "a"}, "--mean 'a'"),
        ({"mean": "nan"}, "--mean 'nan'"),
        ({"std": "0"}, "positive"),
    ],
)
def test_options_that_are_wrong(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    mnist(tmp_path / "m")
    with pytest.raises(EvaluationError, match=said):
        load(tmp_path / "m", **options)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.integers(0, 1 << 30), value=st.integers(0, 255), cut=st.booleans(), kind=st.sampled_from(["m", "c", "z"])
)
def test_damaged_data_never_end_in_another_error(tmp_path: Path, place: int, value: int, cut: bool, kind: str) -> None:
    folder = tmp_path / kind
    if kind == "m":
        path, target = mnist(folder) / "train-images-idx3-ubyte", folder
    elif kind == "c":
        path = (folder if folder.exists() else cifar(folder)[0]) / "test_batch"
        path.write_bytes(pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2]}, protocol=2))
        target = folder
    else:
        folder.mkdir(exist_ok=True)
        path = target = folder / "d.npz"
        np.savez(path, x=np.zeros((4, 3)), y=np.arange(4))
    content = bytearray(path.read_bytes())
    content[place % min(len(content), 400)] = value
    path.write_bytes(content[: place % len(content)] if cut else content)
    said = ""
    try:
        for batch in load(target, Split.test if kind == "c" else Split.train):
            assert len(batch) == 2
    except PermgraphError as error:
        said = str(error)
    assert "\n" not in said


# --- on the command line ----------------------------------------------------------------------------------------------


def test_code_that_is_no_loader(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("three = 3\ndef fails():\n    raise ValueError('no')\ndef once():\n    yield 1\n")
    with pytest.raises(EvaluationError, match="gives a int, not batches"):
        load(f"{tmp_path / 'mine.py'}:three")
    with pytest.raises(EvaluationError, match="it fails: ValueError: no"):
        load(f"{tmp_path / 'mine.py'}:fails")
    assert load(f"{tmp_path / 'mine.py'}:once") == [1]
    with pytest.raises(PermgraphError, match="names no data"):
        load("mnist")
    assert json.dumps(vars(Data(data="x"))["data"])
