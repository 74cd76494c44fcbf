"""Writing checkpoints whole or not at all, and going on after an interruption."""

from __future__ import annotations

import io
import json
import os
import weakref
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from permgraph.errors import CheckpointError
from permgraph.io import Staging, open_checkpoint, write_checkpoint
from permgraph.io import staging as module_of_staging
from permgraph.io import write as module
from permgraph.io.safetensors_file import write_safetensors
from permgraph.io.tensors import TensorFormat

JOB = {"what": "double"}


def double(key: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 2


def source(folder: Path, shards: int = 4) -> dict[str, torch.Tensor]:
    folder.mkdir()
    placed = {}
    state = {f"layer{i}.weight": torch.full((3, 2), float(i)) for i in range(shards)}
    for name, tensor in state.items():
        placed[name] = f"{name}.safetensors"
        save_file({name: tensor}, folder / placed[name], {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (folder / "sub").mkdir()
    (folder / "sub" / "config.json").write_text("{}")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    return state


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write(path: Path, out: Path, *, transform: object = double, job: object = JOB, overwrite: bool = False) -> None:
    with Staging(out, job, overwrite=overwrite) as staging:  # type: ignore[arg-type]
        write_checkpoint(open_checkpoint(path), staging, transform)  # type: ignore[arg-type]


def test_a_folder_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    state = source(tmp_path / "a")
    before = contents(tmp_path / "a")
    seen: list[tuple[int, int]] = []
    with Staging(tmp_path / "out", JOB) as staging:
        checkpoint = open_checkpoint(tmp_path / "a")
        write_checkpoint(checkpoint, staging, double, progress=lambda done, whole: seen.append((done, whole)))
    assert seen[-1] == (checkpoint.nbytes, checkpoint.nbytes)
    assert contents(tmp_path / "a") == before
    assert contents(tmp_path / "out").keys() == {name for name in before if not name.startswith(".git")}
    written = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(written[name], 2 * tensor) for name, tensor in state.items())
    assert sorted(os.listdir(tmp_path)) == ["a", "out"]


def test_the_header_of_a_safetensors_file_says_the_same(tmp_path: Path) -> None:
    state = {"b": torch.ones(3), "a": torch.zeros(0, 2), "c": torch.tensor(True), "d": torch.ones(2).bfloat16()}
    save_file(state, tmp_path / "a.safetensors", {"format": "pt", "title": "ü"})
    write(tmp_path / "a.safetensors", tmp_path / "b.safetensors", transform=lambda key, tensor: tensor)
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


@pytest.mark.parametrize("after", range(4))
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, after: int) -> None:
    source(tmp_path / "a")
    write(tmp_path / "a", tmp_path / "whole")
    done: list[str] = []

    def fails(key: str, tensor: torch.Tensor) -> torch.Tensor:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(key)
        return double(key, tensor)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", tmp_path / "out", transform=fails)
    assert not (tmp_path / "out").exists()
    again: list[str] = []

    def counts(key: str, tensor: torch.Tensor) -> torch.Tensor:
        again.append(key)
        return double(key, tensor)

    write(tmp_path / "a", tmp_path / "out", transform=counts)
    assert len(again) == 4 - after
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["a", "out", "whole"]


def test_another_job_starts_afresh_and_so_does_a_damaged_shard(tmp_path: Path) -> None:
    source(tmp_path / "a")

    def stop_at_the_third(key: str, tensor: torch.Tensor) -> torch.Tensor:
        if key.startswith("layer2"):
            raise KeyboardInterrupt
        return double(key, tensor)

    def leave_half() -> Path:
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "a", tmp_path / "out", transform=stop_at_the_third)
        return tmp_path / ".out.permgraph" / "out" / "layer0.weight.safetensors"

    leave_half()
    write(tmp_path / "a", tmp_path / "out", transform=lambda key, tensor: tensor * 3, job={"what": "triple"})
    assert float(open_checkpoint(tmp_path / "out")["layer1.weight"][0, 0]) == 3
    write(tmp_path / "a", tmp_path / "whole")
    for spoil in (lambda path: path.write_bytes(b"spoilt"), lambda path: path.unlink()):
        (tmp_path / "out").rename(tmp_path / f"old{len(os.listdir(tmp_path))}")
        spoil(leave_half())
        write(tmp_path / "a", tmp_path / "out")
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_run_killed_after_the_last_rename_has_only_to_tidy_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> None:
        if folder == tmp_path:
            raise KeyboardInterrupt

    source(tmp_path / "a")
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    for path, out in (("a", "out"), ("x.safetensors", "y.safetensors")):
        with monkeypatch.context() as patch:
            patch.setattr("permgraph.io.staging._sync_folder", killed)
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path / path, tmp_path / out)
        assert (tmp_path / out).exists()
        assert (tmp_path / f".{out}.permgraph").exists()
        write(tmp_path / path, tmp_path / out, transform=None)
        assert not (tmp_path / f".{out}.permgraph").exists()
        with pytest.raises(CheckpointError, match="exists already"):
            write(tmp_path / path, tmp_path / out)


def test_overwriting_replaces_files_and_folders(tmp_path: Path) -> None:
    source(tmp_path / "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.txt").write_text("old")
    with pytest.raises(CheckpointError, match="exists already"):
        write(tmp_path / "a", tmp_path / "out")
    write(tmp_path / "a", tmp_path / "out", overwrite=True)
    assert "stale.txt" not in contents(tmp_path / "out")
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_text("old")
    write(tmp_path / "x.safetensors", tmp_path / "y.safetensors", overwrite=True)
    assert torch.equal(load_file(tmp_path / "y.safetensors")["x"], 2 * torch.ones(2))


def test_two_runs_at_once(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with Staging(tmp_path / "out", JOB), pytest.raises(CheckpointError, match="another run is writing"):
        Staging(tmp_path / "out", JOB).__enter__()


def test_a_run_that_ends_while_another_takes_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one opens a lock that the first one removes: it must not believe that it holds the new one's."""
    pytest.importorskip("fcntl")
    target = tmp_path / "out.txt"
    first = Staging(target, JOB).__enter__()
    first.make("out.txt", lambda file: file.write(b"first") and None)
    real, opened = module_of_staging._locked, []

    def locked(file: Any) -> bool:
        opened.append(file)
        if len(opened) == 1:  # now, between opening and locking
            first.finish("out.txt")
            first.__exit__(None, None, None)
            with monkeypatch.context() as patch:
                patch.setattr(module_of_staging, "_locked", real)
                third.append(Staging(target, JOB, overwrite=True).__enter__())
        return real(file)

    third: list[Staging] = []
    monkeypatch.setattr(module_of_staging, "_locked", locked)
    with pytest.raises(CheckpointError, match="another run is writing"):
        Staging(target, JOB, overwrite=True).__enter__()
    third[0].__exit__(None, None, None)
    assert target.read_bytes() == b"first"


def test_the_journal_is_read_once_nobody_else_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another run finishes until it lets go of the lock is known."""
    pytest.importorskip("fcntl")
    first = Staging(tmp_path / "out", JOB).__enter__()
    second, take = Staging(tmp_path / "out", JOB), Staging._take_lock

    def take_when_the_first_ends(self: Staging) -> None:
        first.make("a.txt", lambda file: file.write(b"a") and None)
        first.__exit__(None, None, None)
        take(self)

    monkeypatch.setattr(Staging, "_take_lock", take_when_the_first_ends)
    with second:
        assert list(second.finished) == ["a.txt"]


@pytest.mark.parametrize("again", [JOB, {"what": "another"}])
def test_a_folder_that_was_moved_aside_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: Any) -> None:
    """A run killed between the two renames leaves no folder; the next run has the old one, and replaces that."""
    source(tmp_path / "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    replace = os.replace

    class Killed(BaseException):
        pass

    def killed(source_: Path, target: Path) -> None:
        if Path(target) == tmp_path / "out":
            raise Killed
        replace(source_, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            write(tmp_path / "a", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out").exists()
    with Staging(tmp_path / "out", again, overwrite=True):
        assert (tmp_path / "out" / "old.txt").read_text() == "old"
    write(tmp_path / "a", tmp_path / "out", overwrite=True)
    assert "old.txt" not in contents(tmp_path / "out")


@pytest.mark.parametrize("content", ["", "{}", "[1]", "\xff"])
def test_a_journal_of_somebody_else_s(tmp_path: Path, content: str) -> None:
    (tmp_path / ".out.permgraph").mkdir()
    (tmp_path / ".out.permgraph" / "journal.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a journal of permgraph's"):
        Staging(tmp_path / "out", JOB).__enter__()


def test_a_folder_of_somebody_else_s(tmp_path: Path) -> None:
    (tmp_path / ".out.permgraph").mkdir()
    (tmp_path / ".out.permgraph" / "thesis.txt").write_text("important")
    with pytest.raises(CheckpointError, match=r"holds 'thesis.txt' and no journal"):
        Staging(tmp_path / "out", JOB).__enter__()
    assert (tmp_path / ".out.permgraph" / "thesis.txt").read_text() == "important"


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source(tmp_path / "a")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(100, 99, 1))
    with pytest.raises(CheckpointError, match="the disk has 0.0 MB"):
        write(tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [lambda key, t: t.double(), lambda key, t: t[:1]])
def test_a_transform_must_keep_shape_and_dtype(tmp_path: Path, wrong: object) -> None:
    source(tmp_path / "a")
    with pytest.raises(CheckpointError, match="cannot take the place of"):
        write(tmp_path / "a", tmp_path / "out", transform=wrong)


def test_from_safetensors_to_pytorch_and_back(tmp_path: Path) -> None:
    state = {"x": torch.randn(3, 2), "n": torch.tensor(3)}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "a.ckpt")
    write(tmp_path / "a.ckpt", tmp_path / "b.safetensors")
    write(tmp_path / "b.safetensors", tmp_path / "c.pt")
    for made in (load_file(tmp_path / "b.safetensors"), torch.load(tmp_path / "a.ckpt")["state_dict"]):
        assert made.keys() == state.keys()
    assert torch.equal(torch.load(tmp_path / "c.pt")["x"], 4 * state["x"])


def test_pytorch_files_have_the_same_bytes_each_time(tmp_path: Path) -> None:
    torch.save({"x": torch.randn(3, 2)}, tmp_path / "a.pt")
    write(tmp_path / "a.pt", tmp_path / "b.pt")
    write(tmp_path / "a.pt", tmp_path / "another_name.pt")
    assert (tmp_path / "b.pt").read_bytes() == (tmp_path / "another_name.pt").read_bytes()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_disk_that_fills_up_on_the_way(tmp_path: Path, suffix: str) -> None:
    resource = pytest.importorskip("resource")
    state = {name: torch.full((300, 100), float(number)) for number, name in enumerate("abc")}
    save_file(state, tmp_path / "a.safetensors", {"format": "pt"})
    out = tmp_path / f"b{suffix}"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, old[1]))  # Python ignores the signal, and the write fails
    try:
        with pytest.raises(CheckpointError, match=f"b{suffix} cannot be written: File too large"):
            write(tmp_path / "a.safetensors", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not out.exists()
    left = tmp_path / f".b{suffix}.permgraph"
    assert not list((left / "out").iterdir())  # what was written in vain takes no room
    write(tmp_path / "a.safetensors", out)
    written = open_checkpoint(out)
    assert all(torch.equal(written[name], 2 * tensor) for name, tensor in state.items())
    assert not left.exists()


def test_a_shard_is_written_one_tensor_at_a_time() -> None:
    """However large it is: none of those that went out is kept."""
    formats = {f"w{number}": TensorFormat(torch.float32, (50,)) for number in range(20)}
    alive: list[weakref.ref[torch.UntypedStorage]] = []
    most = 0

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for name in formats:
            tensor = torch.zeros(50)
            alive.append(weakref.ref(tensor.untyped_storage()))
            yield name, tensor
            del tensor
            most = max(most, sum(one() is not None for one in alive))

    write_safetensors(io.BytesIO(), formats, tensors(), {})
    assert 1 <= most <= 2
