"""The experiments run, at a size that shows nothing, and measure what they say."""

from __future__ import annotations

import gzip
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.slow

EXPERIMENTS = Path(__file__).resolve().parents[2] / "examples" / "experiments"
SMALL = ["--models", "MLP", "--width", "16", "--epochs", "2", "--points", "3"]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Import an experiment as its script would be run; its folder is on the path during the test only."""
    monkeypatch.setattr(sys, "path", [str(EXPERIMENTS), *sys.path])

    def module(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield module
    for name in ("common", "networks", "many_models", "layer_features", "layer_barriers", "simultaneous"):
        sys.modules.pop(name, None)


def test_many_models(load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*SMALL, "--seeds", "1", "2", "3", "--out", str(tmp_path)]
    found = load("many_models").main(given)["MLP"]
    by = {row.method: row for row in found if row.count == 3}
    for method in ("MergeMany", "cycle-consistent", "to the first"):
        assert by[method].objective > by["naive"].objective
        assert by[method].cycle == 0
    assert by["each pair by itself"].cycle > 0
    assert by["cycle-consistent"].loss < by["naive"].loss
    assert "cycle-consistent" in capsys.readouterr().out
    assert (tmp_path / "many_models.png").stat().st_size > 10_000
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "networks").iterdir()}
    assert len(kept) == 3
    again = load("many_models").main(given)["MLP"]  # resumes from the trained networks
    assert [row.loss for row in again[:-1]] == [row.loss for row in found[:-1]]
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "networks").iterdir()}


def test_layer_features(load, tmp_path: Path) -> None:
    found = load("layer_features").main([*SMALL, "--seeds", "1", "--together", "1", "--out", str(tmp_path)])["MLP"]
    assert set(found) == {"spawned", "independent", "aligned"}
    last = {kind: ones[0].layers["head"].cosine for kind, ones in found.items()}
    assert last["independent"] < last["aligned"] and last["independent"] < last["spawned"]
    assert (tmp_path / "layer_features.png").exists()


def test_layer_barriers(load, tmp_path: Path) -> None:
    found = load("layer_barriers").main([*SMALL, "--seeds", "1", "--out", str(tmp_path)])["MLP"]
    naive, aligned = found["naive"][0], found["aligned"][0]
    assert set(naive.paths) == {"hidden.0", "hidden.1", "hidden.2", "head"}
    assert aligned.height("head") < naive.height("head")
    assert (tmp_path / "layer_barriers.png").exists()


def test_simultaneous(load, tmp_path: Path) -> None:
    module = load("simultaneous")
    found = module.main([*SMALL, "--seeds", "1", "2", "3", "--rounds", "2", "--out", str(tmp_path)])["MLP"]
    assert [row.place for row in found.trainings] == ["epoch 0", "epoch 1", "epoch 2"]
    assert [row.place for row in found.pruned] == [f"{level} % of weights" for level in (100, 50, 25)]
    end = found.trainings[-1]
    assert end.simultaneous == end.weak < end.naive
    assert {claim.kind for claim in found.strong.values()} == {"strong"}
    for level in (1, 2):  # pruned weights have stayed 0
        (path,) = (tmp_path / "networks").glob(f"*-s1-pruned{level}-*")
        (state,) = torch.load(path, weights_only=True)
        matrices = [tensor for tensor in state.values() if tensor.ndim > 1]
        left = sum(int(tensor.count_nonzero()) for tensor in matrices) / sum(tensor.numel() for tensor in matrices)
        assert left == pytest.approx(0.5**level, abs=0.01)


def test_mnist_is_read_from_its_files(load, tmp_path: Path) -> None:
    common = load("common")
    for part, count in (("train", 5), ("t10k", 3)):
        images = torch.zeros(count, 28, 28, dtype=torch.uint8)
        images[:, :14] = 200
        header = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in images.shape)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        labels = bytes([0, 0, 8, 1]) + count.to_bytes(4, "big") + bytes(range(count))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    (images, labels), (test, answers) = common.mnist(tmp_path)
    assert images.shape == (5, 1, 8, 8) and test.shape == (3, 1, 8, 8)
    assert labels.tolist() == [0, 1, 2, 3, 4] and answers.tolist() == [0, 1, 2]
    assert images[0, 0, 2, 3] > images[0, 0, 6, 3]
    assert abs(float(images.mean())) < 1e-5
    (tmp_path / "train-images-idx3-ubyte").unlink()
    with pytest.raises(SystemExit, match="neither train-images-idx3-ubyte nor"):
        common.mnist(tmp_path)
