"""Checkpoints as they come: keys that nobody needs, files with several state dicts, folders with more than weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import permgraph as pg
from permgraph.cli.app import app

NETS = """
import torch
from torch import nn


class Mlp(nn.Module):
    _keys_to_ignore_on_load_unexpected = ["old.mask"]

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("table", torch.ones(5), persistent=False)

    def forward(self, x):
        return self.head(self.b(self.a(x * self.table).relu()).relu())


class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
"""

Run = Callable[..., Any]
State = dict[str, torch.Tensor]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder that has net.py; returns the result of click's runner."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETS)

    def run(*args: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
        return result

    return run


def weights(seed: int) -> State:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a": (8, 5), "b": (8, 8), "head": (3, 8)}
    return {
        f"{name}.{kind}": torch.randn(shape if kind == "weight" else shape[:1], generator=draw)
        for name, shape in shapes.items()
        for kind in ("weight", "bias")
    }


@pytest.fixture
def align(run: Run) -> Run:
    """Align a file or folder to a.safetensors."""
    save_file(weights(0), "a.safetensors")

    def align(other: str, *more: str, out: str = "out.safetensors", code: int = 0) -> Any:
        return run("align", "a.safetensors", other, "-m", "net.py:Mlp", "-o", out, *more, code=code)

    return align


def test_keys_that_the_model_computes_or_ignores_stay_as_they_are(align: Run) -> None:
    extra = {"table": torch.ones(5), "x.old.mask": torch.ones(8), "x.masked_bias": torch.tensor(-1e4)}
    save_file({**weights(1), **extra}, "b.safetensors")
    said = align("b.safetensors").stderr
    assert "3 keys that the model leaves unread stay as they are" in said
    assert torch.equal(load_file("out.safetensors")["x.old.mask"], torch.ones(8))


def test_other_keys_are_named_together_with_the_options_that_leave_them(align: Run) -> None:
    extra = {f"{n}.{k}": torch.ones(2) for n in ("h.0", "h.11") for k in ("m", "bias")}
    save_file({**weights(1), **extra}, "b.safetensors")
    said = align("b.safetensors", code=2).stderr
    assert "4 keys that the model does not know" in said and "--leave 'h.*.m'" in said and "--leave 'h.*.bias'" in said
    # What it knows is not taken away, though the pattern matches it.
    said = align("b.safetensors", "--leave", "*.m", "--leave", "*bias").stderr
    assert "4 keys left as they are" in said
    assert "matches no key" in align("b.safetensors", "--leave", "n.*", out="c.safetensors", code=2).stderr


def test_averages_that_are_left_are_said_to_fit_no_more(align: Run) -> None:
    state = weights(1)
    save_file({**state, **{f"ema.{name}": tensor.clone() for name, tensor in state.items()}}, "b.safetensors")
    assert (
        "of these 6 have the names and shapes of the model's own weights"
        in align("b.safetensors", "--leave", "ema.*").stderr
    )


def test_an_entry_of_a_file_is_read_and_the_others_are_not_carried_over(align: Run) -> None:
    torch.save({"ema": weights(1), "raw": weights(2)}, "b.pt")
    assert "state dicts under 'ema', 'raw': say which one, as --entry ema" in align("b.pt", out="c.pt", code=2).stderr
    assert (
        "there is no state dict under 'emma'; the file has 'ema', 'raw'"
        in align("b.pt", "--entry", "emma", out="c.pt", code=2).stderr
    )
    torch.save({"params": weights(0)}, "a.pt")
    torch.save({"gan": {"generator": weights(0), "step": 3}, "epoch": 7}, "deep.pt")  # the only one is found
    torch.save({"ema": weights(0), "raw": weights(3)}, "first.pt")
    command = ("align", "first.pt", "b.pt", "-m", "net.py:Mlp", "--entry", "ema", "-o", "c.pt")
    assert CliRunner().invoke(app, command).exit_code == 0
    written = torch.load("c.pt", weights_only=True)
    assert written.keys() == {"ema"}
    spec = pg.PermutationSpec.parse(CliRunner().invoke(app, ["spec", "net.py:Mlp"]).stdout)
    assert torch.equal(written["ema"]["a.weight"].sort(0).values, weights(1)["a.weight"].sort(0).values)
    assert spec.moving
    said = align("deep.pt", out="d.pt").stderr
    assert "'gan.step' not carried over" in said
    assert torch.load("d.pt", weights_only=True).keys() == {"gan", "epoch"}


def test_a_folder_says_which_weights_were_read_and_what_is_not_carried_over(align: Run) -> None:
    folder = Path("b")
    folder.mkdir()
    save_file(weights(1), folder / "model.safetensors")
    torch.save(weights(2), folder / "pytorch_model.bin")
    torch.save({"state": torch.ones(2)}, folder / "optimizer.pt")
    said = align("b", out="c").stderr
    assert "model.safetensors was read, not pytorch_model.bin" in said
    assert "b: optimizer.pt, pytorch_model.bin not carried over" in said
    assert {path.name for path in Path("c").iterdir()} == {"model.safetensors"}


def test_files_that_are_no_checkpoint_are_called_by_their_name(align: Run) -> None:
    Path("b.gguf").write_bytes(b"GGUF")
    assert "GGUF is not read" in align("b.gguf", code=2).stderr
    Path("adapter").mkdir()
    Path("adapter", "adapter_config.json").write_text("{}")
    assert "an adapter, not a model" in align("adapter", code=2).stderr
    assert "no such file or folder\n" in align("nope.pt", code=2).stderr  # net.py is no near name
    assert "did you mean 'a.safetensors'" in align("aa.safetensors", code=2).stderr


def test_a_folder_of_diffusers_is_not_taken_for_one_of_transformers(run: Run) -> None:
    Path("unet").mkdir()
    Path("unet", "config.json").write_text(json.dumps({"_class_name": "NoSuchModel", "sample_size": 8}))
    assert "it is the NoSuchModel of diffusers" in run("spec", "unet", code=2).stderr


def test_barrier_says_that_statistics_are_only_interpolated(run: Run) -> None:
    for number in (0, 1):
        torch.manual_seed(number)
        net = torch.nn.Sequential(
            torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
        )
        save_file(net.state_dict(), f"{number}.safetensors")
    save_file({"x": torch.randn(12, 5), "y": torch.arange(12) % 3}, "data.safetensors")
    command = ("barrier", "0.safetensors", "1.safetensors", "-m", "net.py:Normed", "--data", "data.safetensors")
    assert "the networks have BatchNorm" in run(*command, "--points", 3).stderr
    assert "the networks have BatchNorm" not in run(*command, "--points", 3, "--recalibrate").stderr


def test_lists_need_no_syntax_of_python(align: Run) -> None:
    save_file(weights(1), "b.safetensors")
    data = json.loads(align("b.safetensors", "--set", "frozen=a", "--json").stdout)
    assert 0 < data["moved"] <= 8 < data["of"]  # of the two groups of eight, one moves
    assert json.loads(align("b.safetensors", "--set", "frozen=a,b", "--json", out="c.safetensors").stdout)["moved"] == 0
    said = align("b.safetensors", "--set", "ignore=haed.*", out="d.safetensors", code=2).stderr
    assert "no parameter fits the pattern 'haed.*'; there is 'head." in said


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        (["0.25"], {"a": 0.25, "b": 0.25, "head": 0.25}),
        (["0,0.5,0.8"], {"a": 0.0, "b": 0.5, "head": 0.8}),
        (["head.*=1", "*=0.5"], {"a": 0.5, "b": 0.5, "head": 1.0}),
    ],
)
def test_merge_with_a_ratio_for_each_layer(run: Run, ratios: list[str], expected: dict[str, float]) -> None:
    a, b = ({name: torch.full_like(t, float(value)) for name, t in weights(0).items()} for value in (0, 1))
    save_file(a, "a.safetensors")
    save_file(b, "b.safetensors")
    options = [part for ratio in ratios for part in ("--ratios", ratio)]
    run("merge", "a.safetensors", "b.safetensors", "-m", "net.py:Mlp", "-o", "c.safetensors", "--no-align", *options)
    merged = load_file("c.safetensors")
    assert {name: float(merged[f"{name}.weight"].mean()) for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ratios", "haed.*=1", "--ratios", "*=0"], "no parameter fits the pattern 'haed.*'"),
        (["--ratios", "head.*=1"], "no pattern of the ratios fits 'a.weight'"),
        (["--ratios", "much"], "give numbers that are spread over the layers"),
        (["--ratios", "0.5", "--weights", "1,1"], "leave out --weights"),
        (["--ratios", "nan"], "must be finite"),
    ],
)
def test_ratios_that_say_nothing_are_refused(run: Run, options: list[str], said: str) -> None:
    save_file(weights(0), "a.safetensors")
    save_file(weights(1), "b.safetensors")
    command = ("merge", "a.safetensors", "b.safetensors", "-m", "net.py:Mlp", "-o", "c.safetensors", "--no-align")
    assert said in run(*command, *options, code=2).stderr
    assert not Path("c.safetensors").exists()


def test_an_explanation_has_a_reason_for_each_axis_and_lines_that_fit(run: Run) -> None:
    said = run("explain", "net.py:Mlp", "a.weight", 0).stdout
    lines = said.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0] == "a.weight[0] (8) is group a:"
    tied = [at for at, line in enumerate(lines) if line.startswith("  tied to")]
    assert any(lines[at].startswith("  tied to b.weight[1] by") for at in tied)
    for at in tied:
        reason = lines[at].endswith(" by") and lines[at + 1].startswith("      ")
        assert reason or ": directly" in lines[at] or ": of one group" in lines[at]
    still = run("explain", "net.py:Mlp", "head.weight", 0).stdout
    assert still.startswith("head.weight[0] (3) stays put:\n  ") and len(still.splitlines()) > 1
