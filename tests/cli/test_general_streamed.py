"""General symmetries from the command line where tensors are streamed from shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from typer.testing import CliRunner

import permgraph as pg
from permgraph.cli.app import app
from permgraph.matching import StreamedWeightMatching
from tests.cli.llama_folders import llama_pair

TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_pair(tmp_path_factory.mktemp("llama"))


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return found


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits


def test_streamed_equals_in_memory(folder: Path, tmp_path: Path) -> None:
    args = ("align", folder / "a", folder / "b", "--symmetry", "general", "--init", "identity", "--json", "-o")
    report = json.loads(run(*args, tmp_path / "streamed", "--stream").stdout)
    whole = json.loads(run(*args, tmp_path / "memory", "--no-stream").stdout)
    assert len(list((folder / "b").glob("*.safetensors"))) >= 4
    assert report["objective"] == pytest.approx(whole["objective"], rel=1e-9)
    assert report["objective"] > 2 * abs(report["objective_before"])
    assert 2 < report["sweeps"] < 50
    assert report["sweeps"] == whole["sweeps"] and report["outcome"] == "converged"
    one, other = tensors(tmp_path / "streamed"), tensors(tmp_path / "memory")
    assert one.keys() == other.keys() == tensors(folder / "b").keys()
    # Sums are taken in another order, in float64: what is written differs in the last bit of float32 at most.
    assert all(torch.allclose(one[name], other[name], rtol=1e-6, atol=1e-8) for name in one)
    assert [f.name for f in sorted((tmp_path / "streamed").iterdir())] == [
        f.name for f in sorted((folder / "b").iterdir())
    ]
    before, after = logits(folder / "b"), logits(tmp_path / "streamed")
    assert float((before - after).abs().max() / before.abs().max()) < 1e-5
    assert report["check"]["max_error"] < 1e-5


@pytest.mark.slow
def test_half_precision_stays_half_precision(tmp_path: Path) -> None:
    folder = llama_pair(tmp_path, torch.bfloat16)
    run("align", folder / "a", folder / "b", "--symmetry", "general", "--stream", "-o", tmp_path / "c", "--no-check")
    found = tensors(tmp_path / "c")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    before, after = logits(folder / "b").float(), logits(tmp_path / "c").float()
    assert float((before - after).abs().max() / before.abs().max()) < 0.05


@pytest.mark.slow
def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    folder = llama_pair(tmp_path, tie_word_embeddings=True)
    run("align", folder / "a", folder / "b", "--symmetry", "general", "--stream", "-o", tmp_path / "c")
    assert tensors(tmp_path / "c").keys() == tensors(folder / "b").keys()
    assert "lm_head.weight" not in tensors(tmp_path / "c")
    before, after = logits(folder / "b"), logits(tmp_path / "c")
    assert float((before - after).abs().max() / before.abs().max()) < 1e-5


@pytest.mark.slow
def test_a_run_goes_on_after_its_last_sweep(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("align", folder / "a", folder / "b", "--symmetry", "general", "--stream", "--json", "-o")
    whole = json.loads(run(*args, tmp_path / "whole").stdout)
    assert whole["sweeps"] > 1
    match = StreamedWeightMatching.match
    begun: list[int] = []

    def dying(self: StreamedWeightMatching, *given: Any, progress: Any = None) -> Any:
        begun.append(self.done)

        def stop(sweep: Any) -> None:
            if sweep.number == 1:
                raise RuntimeError("killed")

        return match(self, *given[:4], stop if len(begun) == 1 else None)

    monkeypatch.setattr(StreamedWeightMatching, "match", dying)
    run(*args, tmp_path / "broken", code=70)
    assert not (tmp_path / "broken").exists()
    again = json.loads(run(*args, tmp_path / "broken").stdout)
    assert begun == [0, 1] and again["sweeps"] == whole["sweeps"]
    one, other = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("whole", "broken"))
    assert one == other


@pytest.mark.slow
def test_two_are_merged_streamed_and_three_to_a_reference(folder: Path, tmp_path: Path) -> None:
    a, b = folder / "a", folder / "b"
    general = ("--symmetry", "general", "--stream")
    run("merge", a, b, *general, "-o", tmp_path / "two")
    aligned, mean = tmp_path / "aligned", tensors(tmp_path / "two")
    run("align", a, b, *general, "-o", aligned)
    first, second = tensors(a), tensors(aligned)
    assert all(torch.allclose(mean[name], (first[name] + second[name]) / 2, atol=1e-6) for name in mean)
    run("merge", a, b, aligned, *general, "--method", "reference", "-o", tmp_path / "three", "--no-check")
    said = run("merge", a, b, aligned, *general, "-o", tmp_path / "four", code=2).stderr
    assert "permutations alone" in said and "--method reference" in said


def test_plan_knows_general_symmetries(folder: Path) -> None:
    model = folder / "spec.json"
    args = ("plan", model, "--symmetry", "general", "--calibration", "0.05")
    said = run(*args).stdout
    assert "polar factors, a pass" in said and "one ascent of 3" in said
    data = json.loads(run(*args, "--json", "--dtype-bytes", "2").stdout)
    cost = pg.estimate(pg.PermutationSpec.load(model))
    assert data["read_per_pass"] == cost.read(2) > 0
    assert data["memory"]["streamed"] == cost.memory(2, streamed=True) < data["memory"]["in memory"]
    assert list(data["seconds"]["streamed"]) == ["1"] and data["starts"] == 3
    assert data["polar_factors_per_pass"]["32"] == 1  # the stream
    assert "one process" in run(*args, "--workers", "2", code=2).stderr
