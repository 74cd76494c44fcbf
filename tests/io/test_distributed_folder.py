"""Folders of torch.distributed.checkpoint, in and out."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from permgraph.errors import CheckpointError
from permgraph.io import Staging, open_checkpoint, write_checkpoint
from permgraph.io.distributed_folder import _Chunk, _overlap

STATE = {
    "weight": torch.arange(12.0).reshape(4, 3),
    "half": torch.arange(4).to(torch.bfloat16),
    "count": torch.tensor(7),
    "nothing": torch.zeros(0, 2),
}


def save(folder: Path, state: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        dcp.save(state, checkpoint_id=folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a model, a step count and a small config beside it."""
    made = save(tmp_path / "in", {"model": STATE, "step": 3})
    (made / "config.json").write_text("{}")
    return made


def described(folder: Path, change: Callable[[metadata.Metadata], None]) -> None:
    """Change the description of a folder."""
    content = pickle.loads((folder / ".metadata").read_bytes())
    change(content)
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def test_reads_what_torch_writes(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint) == {f"model.{name}" for name in STATE}
    for name, tensor in STATE.items():
        found = checkpoint[f"model.{name}"]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    assert checkpoint.files[0].dropped == ("step",)  # type: ignore[attr-defined]


def test_parts_are_put_together(folder: Path) -> None:
    halves = [STATE["weight"][:, :1].clone(), STATE["weight"][:, 1:].clone()]
    for number, half in enumerate(halves):
        torch.save(half, folder / f"part{number}.distcp")

    def split(content: metadata.Metadata) -> None:
        entry = content.state_dict_metadata["model.weight"]
        entry.chunks = [
            metadata.ChunkStorageMetadata(torch.Size([0, at]), torch.Size([4, width])) for at, width in ((0, 1), (1, 2))
        ]
        for number, chunk in enumerate(entry.chunks):
            name = f"part{number}.distcp"
            index = metadata.MetadataIndex("model.weight", chunk.offsets, number)
            content.storage_data[index] = _StorageInfo(name, 0, os.path.getsize(folder / name))

    described(folder, split)
    assert torch.equal(open_checkpoint(folder)["model.weight"], STATE["weight"])


def test_torch_reads_what_is_written(folder: Path, tmp_path: Path) -> None:
    source = open_checkpoint(folder)
    target = tmp_path / "out"
    seen: list[tuple[int, int]] = []
    with Staging(target, {"job": 1}) as staging:
        write_checkpoint(source, staging, lambda name, tensor: tensor + 1, progress=lambda *done: seen.append(done))
    assert seen[-1] == (source.nbytes, source.nbytes)
    assert (target / "config.json").read_text() == "{}"
    assert not (target / "__0_0.distcp").samefile(folder / "__0_0.distcp")
    found = {"model": {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, checkpoint_id=target)
    for name, tensor in STATE.items():
        assert torch.equal(found["model"][name], tensor + 1)
    again = open_checkpoint(target)
    assert {name: again.formats[name] for name in source} == dict(source.formats)


def test_writing_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    source, target = open_checkpoint(folder), tmp_path / "out"
    written: list[str] = []

    def once(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(name)
        return tensor

    with pytest.raises(KeyboardInterrupt), Staging(target, {"job": 1}) as staging:
        write_checkpoint(source, staging, once)
    assert not target.exists()
    more: list[str] = []
    with Staging(target, {"job": 1}) as staging:
        write_checkpoint(source, staging, lambda name, tensor: (more.append(name), tensor)[1])
    assert written + more == list(source)
    assert all(torch.equal(open_checkpoint(target)[name], source[name]) for name in source)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch was-here",)


def test_a_description_that_would_run_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"refused.*names (posix|nt)\.system"):
        open_checkpoint(folder)
    assert not (tmp_path / "was-here").exists()


def _elsewhere(content: metadata.Metadata) -> None:
    for index, info in content.storage_data.items():
        content.storage_data[index] = _StorageInfo("../" + info.relative_path, info.offset, info.length)


def _gone(content: metadata.Metadata) -> None:
    for index, info in content.storage_data.items():
        content.storage_data[index] = _StorageInfo("gone.distcp", info.offset, info.length)


def _beyond(content: metadata.Metadata) -> None:
    for index, info in content.storage_data.items():
        content.storage_data[index] = _StorageInfo(info.relative_path, info.offset, info.length + 10**6)


def _nowhere(content: metadata.Metadata) -> None:
    content.storage_data.clear()


def _doubled(content: metadata.Metadata) -> None:
    entry = content.state_dict_metadata["model.weight"]
    half = metadata.ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))
    entry.chunks = [half, half]


def _outside(content: metadata.Metadata) -> None:
    content.state_dict_metadata["model.weight"].size = torch.Size([3, 3])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_elsewhere, "may name only files in its folder"),
        (_gone, "which is not there"),
        (_beyond, "cut off"),
        (_nowhere, "stored nowhere"),
        (_doubled, "do not make up its shape"),
        (_outside, "lies outside of"),
    ],
)
def test_descriptions_that_lie(folder: Path, change: Callable[[metadata.Metadata], None], said: str) -> None:
    described(folder, change)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"a": 1}), pickle.dumps(torch.Size([1]))])
def test_damaged_descriptions(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="refused"):
        open_checkpoint(folder)


def test_damaged_parts(folder: Path) -> None:
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 3 :] = bytes(len(content) - len(content) // 3)
    file.write_bytes(bytes(content))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="damaged or unsafe"):
        dict(checkpoint)


def parts_of(shape: tuple[int, ...], cuts: tuple[int, ...]) -> list[_Chunk]:
    """A tensor cut into a grid of parts."""
    steps = [size // cut for size, cut in zip(shape, cuts, strict=True)]
    places = itertools.product(*(range(cut) for cut in cuts))
    starts = [tuple(at * step for at, step in zip(place, steps, strict=True)) for place in places]
    return [_Chunk(start, tuple(steps), Path(), 0, 0) for start in starts]


@pytest.mark.parametrize("cuts", [(64, 1), (1, 64), (8, 8), (64, 64)])
def test_parts_that_lie_side_by_side(cuts: tuple[int, int]) -> None:
    parts = parts_of((64, 64), cuts)
    random.Random(0).shuffle(parts)
    assert not _overlap(parts)
    assert _overlap([*parts, parts[17]])
    assert _overlap([*parts, dataclasses.replace(parts[17], shape=tuple(n + 1 for n in parts[17].shape))])


def test_empty_parts_and_numbers_lie_nowhere() -> None:
    part = _Chunk((0, 0), (4, 4), Path(), 0, 0)
    assert not _overlap([part, dataclasses.replace(part, shape=(0, 4))])
    number = _Chunk((), (), Path(), 0, 0)
    assert not _overlap([number])
    assert _overlap([number, number])


def test_many_parts_are_not_compared_each_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    overlaps = _Chunk.overlaps
    monkeypatch.setattr(_Chunk, "overlaps", lambda self, other: compared.append(1) or overlaps(self, other))
    assert not _overlap(parts_of((1024, 8), (1024, 1)))
    assert len(compared) < 1024
