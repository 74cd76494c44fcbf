"""Reading checkpoints of every layout, and refusing what is damaged, incomplete or unsafe."""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import pickle
import struct
import warnings
import weakref
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from permgraph.errors import CheckpointError, MismatchError
from permgraph.io import Renamed, match_names, open_checkpoint
from permgraph.io.safetensors_file import DTYPES, MAPPED


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "fc1.weight": torch.randn(5, 3, generator=generator),
        "fc1.bias": torch.randn(5, generator=generator).to(torch.bfloat16),
        "steps": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "mask": torch.tensor([True, False]),
    }


def same(checkpoint: Mapping[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return set(checkpoint) == set(expected) and all(
        checkpoint[name].dtype == tensor.dtype and torch.equal(checkpoint[name], tensor)
        for name, tensor in expected.items()
    )


def sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    placed = {}
    for number, (name, tensor) in enumerate(tensors.items(), start=1):
        shard = f"model-{number:05}-of-{len(tensors):05}.safetensors"
        save_file({name: tensor}, folder / shard, {"format": "pt"})
        placed[name] = shard
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return index


@pytest.mark.parametrize("mappings", [True, False])
def test_a_large_tensor_is_given_back_to_the_system_when_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mappings: bool
) -> None:
    made: list[weakref.ref[mmap.mmap]] = []

    def mapping(*args: Any, **how: Any) -> mmap.mmap:
        if not mappings:
            raise OSError("there are as many as there may be")
        found = mmap.mmap(*args, **how)
        made.append(weakref.ref(found))
        return found

    large = torch.arange(MAPPED // 4, dtype=torch.int32)
    save_file({"large": large, **state()}, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    monkeypatch.setattr("permgraph.io.safetensors_file.mmap", SimpleNamespace(**{**vars(mmap), "mmap": mapping}))
    read = dict(checkpoint)
    assert same(read, {"large": large, **state()})
    assert len(made) == (1 if mappings and os.name == "posix" else 0)  # small ones have none
    part = read.pop("large")[5:7]
    assert part.tolist() == [5, 6]
    del part
    gc.collect()
    assert all(one() is None for one in made)


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_a_safetensors_file(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "a.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert same(checkpoint, state())
    assert checkpoint.folder is None
    assert checkpoint.formats["fc1.weight"].shape == (5, 3)
    assert {name: t.shape for name, t in checkpoint.without_values().items()} == {
        name: t.shape for name, t in state().items()
    }


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_is_read_as_safetensors_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.arange(48, dtype=torch.uint8)
    tensor = (bits % 2).bool() if dtype == torch.bool else bits.view(dtype)
    save_file({"x": tensor}, tmp_path / "a.safetensors")
    mine = open_checkpoint(tmp_path / "a.safetensors")["x"]
    theirs = load_file(tmp_path / "a.safetensors")["x"]
    assert mine.dtype == theirs.dtype == dtype
    assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


def test_a_folder_of_shards_and_its_index(tmp_path: Path) -> None:
    index = sharded(tmp_path / "model", state())
    assert same(open_checkpoint(tmp_path / "model"), state())
    assert same(open_checkpoint(index), state())
    assert len(open_checkpoint(index).files) == len(state())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3, "optimizer_states": [{"exp_avg": torch.ones(2)}]},
        lambda s: {"model": s, "args": argparse.Namespace(lr=0.1)},
        lambda s: {"state": 1, "model": {"module": s}},
    ],
    ids=["plain", "lightning", "timm", "nested"],
)
def test_a_pytorch_file_however_it_is_wrapped(tmp_path: Path, wrap: object, legacy: bool) -> None:
    torch.save(wrap(state()), tmp_path / "a.ckpt", _use_new_zipfile_serialization=not legacy)  # type: ignore[operator]
    assert same(open_checkpoint(tmp_path / "a.ckpt"), state())


def test_a_folder_prefers_safetensors_as_transformers_does(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "model.safetensors")
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert same(open_checkpoint(tmp_path), state())


def test_a_folder_with_one_file_of_any_name(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "final.safetensors")
    assert same(open_checkpoint(tmp_path), state())
    save_file(state(), tmp_path / "earlier.safetensors")
    with pytest.raises(CheckpointError, match=r"several weight files and no index \(earlier.safetensors, final"):
        open_checkpoint(tmp_path)


def test_reading_takes_memory_of_its_own(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    checkpoint["fc1.weight"].zero_()
    assert same(checkpoint, state())


# --- refusals ---------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> object:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil(), "y": torch.ones(1)}, "evil.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"refused.*(posix|nt)\.system") as caught:
        open_checkpoint("evil.pt")
    assert "\n" not in str(caught.value)
    assert not Path("pwned").exists()


def test_a_bare_malicious_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        open_checkpoint("evil.bin")
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 nonsense", b"\x80\x04.", b"{}", pickle.dumps({"a": 1}), pickle.dumps([1, 2])]
)
def test_what_is_no_pytorch_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "a.pt")
    assert str(tmp_path / "a.pt") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pytorch_file_without_a_state_dict(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"no state dict in it, but a mapping with the keys 'epoch', 'lr'"):
        open_checkpoint(tmp_path / "a.pt")


def test_a_zip_that_is_no_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(CheckpointError, match="it is an archive that may hold a checkpoint"):
        open_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "shard", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "..\\a.safetensors", "a\0.safetensors"]
)
def test_an_index_may_not_lead_out_of_its_folder(tmp_path: Path, shard: str) -> None:
    save_file(state(), tmp_path / "a.safetensors")
    (tmp_path / "m" / "sub").mkdir(parents=True)
    save_file(state(), tmp_path / "m" / "sub" / "a.safetensors")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc1.weight": shard}}))
    with pytest.raises(CheckpointError, match="refused"):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\xff"])
def test_a_damaged_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match="not a valid index"):
        open_checkpoint(tmp_path)


def test_an_index_that_disagrees_with_its_shards(tmp_path: Path) -> None:
    index = sharded(tmp_path, state())
    listing = json.loads(index.read_text())
    shards = dict(listing["weight_map"])

    def with_map(placed: dict[str, str]) -> None:
        index.write_text(json.dumps({"weight_map": placed}))

    with_map({**shards, "absent": shards["steps"]})
    with pytest.raises(CheckpointError, match="places 'absent' in .* which does not hold it"):
        open_checkpoint(tmp_path)
    with_map({**shards, "fc1.bias": shards["steps"], "steps": shards["fc1.bias"]})
    with pytest.raises(CheckpointError, match="does not place there"):
        open_checkpoint(tmp_path)
    with_map({**shards, "steps": "gone.safetensors"})
    with pytest.raises(CheckpointError, match="'gone.safetensors', which is not there: the checkpoint is incomplete"):
        open_checkpoint(tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "model_a.safetensors")
    with pytest.raises(CheckpointError, match="no such file or folder; did you mean 'model_a.safetensors'"):
        open_checkpoint(tmp_path / "model_b.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no weights in this folder"):
        open_checkpoint(tmp_path / "empty")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="GGUF is not read"):
        open_checkpoint(tmp_path / "a.gguf")


def header(path: Path, content: object, data: bytes = b"") -> Path:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "size", "said"),
    [
        ({"a": {**GOOD, "shape": [3]}}, 8, "takes 12 bytes, but the header gives it bytes 0 to 8"),
        ({"a": {**GOOD, "data_offsets": [4, 12]}}, 12, "header gives it bytes 4 to 12"),
        ({"a": GOOD, "b": GOOD}, 8, "the one before it ends at 8"),
        ({"a": GOOD}, 6, "it is truncated"),
        ({"a": GOOD}, 9, "something was appended"),
        ({"a": {**GOOD, "dtype": "F31"}}, 8, "'F31', which is not read here"),
        ({"a": {**GOOD, "dtype": ["F32"]}}, 8, "which is not read here"),
        ({"a": {**GOOD, "shape": [-2]}}, 8, "malformed"),
        ({"a": {**GOOD, "shape": [True, 2]}}, 8, "malformed"),
        ({"a": {**GOOD, "shape": [1 << 40, 1 << 40]}}, 8, "elements"),
        ({"a": {**GOOD, "data_offsets": [8, 0]}}, 8, "malformed"),
        ({"a": 3}, 8, "must give 'a' a dtype"),
        ({"a": GOOD, "__metadata__": {"x": 1}}, 8, "__metadata__"),
        ([1, 2], 0, "not a table"),
        (b'{"a": ', 0, "header is damaged"),
        (b"\xff\xfe", 0, "header is damaged"),
        (b'{"a": {}, "a": {}}', 0, "stands in it twice"),
        (b"[" * 100_000, 0, "header is damaged"),
        ({}, 0, "no tensors"),
    ],
)
def test_a_header_that_does_not_fit(tmp_path: Path, content: object, size: int, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(header(tmp_path / "a.safetensors", content, bytes(size)))
    assert "\n" not in str(caught.value)


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(state(), path)
    checkpoint = open_checkpoint(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 40)
    with pytest.raises(CheckpointError, match="ends in the middle of"):
        [checkpoint[name] for name in checkpoint]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 7)), min_size=1, max_size=3), cut=st.integers(0)
)
def test_flipped_bits_and_cut_ends_never_end_in_another_error(
    tmp_path: Path, flips: list[tuple[int, int]], cut: int
) -> None:
    """Either the file is refused, or it is read as the safetensors package reads it."""
    path = tmp_path / "a.safetensors"
    save_file(state(), path)
    content = bytearray(path.read_bytes())
    for place, bit in flips:
        content[place % len(content)] ^= 1 << bit
    if cut % 3 == 0:
        content = content[: cut % len(content)]
    path.write_bytes(content)
    try:
        mine = open_checkpoint(path)
        read = {name: mine[name] for name in mine}
    except CheckpointError:
        return
    theirs = load_file(path)
    assert set(read) == set(theirs)
    for name, tensor in read.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), theirs[name].reshape(-1).view(torch.uint8))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 1 << 30), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_pytorch_file_never_ends_in_another_error(tmp_path: Path, place: int, value: int, cut: bool) -> None:
    path = tmp_path / "a.pt"
    torch.save({"state_dict": state()}, path)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = value
    path.write_bytes(content[: place % len(content)] if cut else content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = open_checkpoint(path)
            for name in checkpoint:
                checkpoint[name].clone()
    except CheckpointError:
        return
    assert set(checkpoint.formats)


# --- names ------------------------------------------------------------------------------------------------------------

NAMES = ("encoder.fc.weight", "encoder.fc.bias", "head.weight")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (NAMES, ""),
        (tuple(f"module.{n}" for n in NAMES), "with 'module.' before them"),
        (tuple(f"model.net.{n}" for n in NAMES), "with 'model.net.' before them"),
        (tuple(f"_orig_mod.{n}" for n in NAMES), "with '_orig_mod.' before them"),
        (("encoder._orig_mod.fc.weight", "encoder.fc.bias", "head.weight"), "with '_orig_mod.' before them"),
    ],
)
def test_a_prefix_is_found_and_named(keys: tuple[str, ...], said: str) -> None:
    renamed, note = match_names(keys, NAMES)
    assert set(renamed.values()) == set(NAMES)
    assert (said in note) if said else not note


def test_a_name_or_two_in_common_are_no_prefix() -> None:
    keys = [f"layer{number}.{end}" for number in range(9) for end in ("weight", "bias")]
    names = ["stem.weight", *(f"stage.block{number}.scale" for number in range(9)), "stage.layer3.weight"]
    with pytest.raises(MismatchError, match="is it of another architecture"):
        match_names(keys, names)
    assert match_names([*keys, "stem.weight"], names) == ({key: key for key in [*keys, "stem.weight"]}, "")


def test_a_backbone_s_own_checkpoint_lacks_the_prefix() -> None:
    renamed, note = match_names(("fc.weight", "fc.bias"), NAMES)
    assert renamed == {"fc.weight": "encoder.fc.weight", "fc.bias": "encoder.fc.bias"}
    assert "without 'encoder.' before them" in note


def test_keys_beside_the_model_stay_as_they_are() -> None:
    renamed, _ = match_names((*(f"model.{n}" for n in NAMES), "loss.weight"), NAMES)
    assert renamed["loss.weight"] == "loss.weight"


def test_names_of_another_model() -> None:
    with pytest.raises(MismatchError, match="none of the checkpoint's 1 keys is one of the model's 3 names"):
        match_names(("conv1.weight",), NAMES)


def test_two_keys_for_one_name() -> None:
    with pytest.raises(MismatchError, match="are one name: 'head.weight'"):
        match_names((*(f"module.{n}" for n in NAMES), "head.weight"), NAMES)


def test_a_renamed_checkpoint_reads_by_the_new_names(tmp_path: Path) -> None:
    save_file({f"module.{name}": tensor for name, tensor in state().items()}, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    keys, _ = match_names(list(checkpoint), list(state()))
    assert same(Renamed(checkpoint, {name: key for key, name in keys.items()}), state())
