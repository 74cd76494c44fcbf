"""The commands take each checkpoint for a model of its own: of the same structure, and checked itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import permgraph as pg
from permgraph.cli.app import app
from permgraph.cli.models import spec_of
from permgraph.spec.expressions import Fixed

transformers = pytest.importorskip("transformers")

NETWORKS = Path(__file__).with_name("networks.py")
SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1}


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
    return result


def save(folder: Path, kind: str = "Llama", seed: int = 0, **settings: Any) -> Path:
    config = getattr(transformers, f"{kind}Config")(**SIZES, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return {
        "a": save(root / "a", **heads),
        "alike": save(root / "alike", seed=1, **heads),
        "eight heads": save(root / "eight", seed=1, num_attention_heads=8, num_key_value_heads=8),
        "another activation": save(root / "gelu", seed=1, hidden_act="gelu", **heads),
        "another class": save(root / "mistral", "Mistral", seed=1, sliding_window=None, **heads),
    }


def test_folders_of_another_structure_are_refused_by_every_command(folders: dict[str, Path], tmp_path: Path) -> None:
    a, other = folders["a"], folders["eight heads"]
    torch.save(torch.randint(0, 40, (4, 8)), tmp_path / "text.pt")
    plan = tmp_path / "plan.yaml"
    plan.write_text(json.dumps({"model": f"hf:{a}", "networks": {"a": str(a), "b": str(other)}}))
    spec_of(f"hf:{a}").save(tmp_path / "spec.json")
    commands: list[tuple[object, ...]] = [
        ("align", a, other, "-o", tmp_path / "out"),
        ("merge", a, other, "-o", tmp_path / "out"),
        ("merge", a, other, "-o", tmp_path / "out", "--no-align"),
        ("merge", a, folders["alike"], other, "-o", tmp_path / "out"),
        ("align", a, other, "-o", tmp_path / "out", "--no-check"),
        ("align", a, other, "-o", tmp_path / "out", "--spec", tmp_path / "spec.json"),
        ("align", a, other, "-o", tmp_path / "out", "--model", f"hf:{a}"),
        ("barrier", a, other, "--data", f"{NETWORKS}:loader"),
        ("study", plan, "--store", tmp_path / "store", "--dry-run"),
    ]
    for command in commands:
        said = run(*command, code=2).stderr
        assert "not the same symmetries" in said and "'model.layers.0.self_attn.q_proj.weight', dimension 0" in said
        assert str(other) in said
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["another activation", "another class", "alike"])
def test_folders_of_the_same_structure_are_aligned_and_checked(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    result = run("align", folders["a"], folders[name], "-o", tmp_path / "out")
    assert "computes the same after renumbering: relative error" in result.stderr
    assert " s\n" in result.stderr and "checked in" in result.stderr
    assert ("compute different functions" in result.stderr) is (name == "another activation")
    x = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        before, after = (
            transformers.AutoModelForCausalLM.from_pretrained(place, local_files_only=True).eval()(x).logits
            for place in (folders[name], tmp_path / "out")
        )
    assert torch.allclose(before, after, atol=1e-5)


def test_the_check_is_in_the_result_and_may_be_left_out(folders: dict[str, Path], tmp_path: Path) -> None:
    a, b = folders["a"], folders["alike"]
    check = json.loads(run("align", a, b, "-o", tmp_path / "1", "--json").stdout)["check"]
    assert check["max_error"] < 1e-10 and check["seconds"] > 0 and check["runs"][0]["name"] == "the inputs"
    assert json.loads(run("align", a, b, "-o", tmp_path / "2", "--json", "--no-check").stdout)["check"] == {}
    merged = json.loads(run("merge", a, b, "-o", tmp_path / "3", "--json").stdout)
    assert [each["checkpoint"] for each in merged["checks"]] == [str(b)]
    for name in ("1", "2"):
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == sorted(path.name for path in b.iterdir())


def test_a_network_that_would_not_compute_the_same_is_not_written(folders: dict[str, Path], tmp_path: Path) -> None:
    """A spec that is given, and wrong for the network: its tensors fit."""
    right = spec_of(f"hf:{folders['a']}")
    name = "model.layers.0.mlp.down_proj.weight"
    fixed = tuple(Fixed(size) for size in right.shapes[name])
    pg.PermutationSpec(dict(right.groups), {**right.axes, name: fixed}).save(tmp_path / "wrong.json")
    given = (folders["a"], folders["alike"], "-o", tmp_path / "out", "--spec", tmp_path / "wrong.json")
    said = run("align", *given, code=2).stderr
    assert "does not compute the same after renumbering" in said and "mlp" in said
    assert "does not compute the same" in run("merge", *given, code=2).stderr
    assert not (tmp_path / "out").exists()
    run("align", *given, "--no-check")
    assert (tmp_path / "out").exists()


def test_where_a_check_is_not_possible_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = f"{NETWORKS}:Net"
    spec = spec_of(model)
    spec.save(tmp_path / "spec.json")
    for seed, name in enumerate(("a.pt", "b.pt")):
        generator = torch.Generator().manual_seed(seed)
        torch.save({n: torch.randn(s, generator=generator) for n, s in spec.shapes.items()}, tmp_path / name)
    pair = (tmp_path / "a.pt", tmp_path / "b.pt", "-o")
    said = run("align", *pair, tmp_path / "c.pt", "--spec", tmp_path / "spec.json").stderr
    assert "not checked: --spec does not say" in said
    assert "computes the same" in run("align", *pair, tmp_path / "d.pt", "-m", model).stderr
    monkeypatch.setattr("permgraph.cli.matching_run.machine_memory", lambda: 1000.0)
    said = run("align", *pair, tmp_path / "e.pt", "-m", model, "--no-stream").stderr
    assert "not checked: that takes some" in said and "GiB of memory; --check does" in said
    assert "computes the same" in run("align", *pair, tmp_path / "f.pt", "-m", model, "--no-stream", "--check").stderr
    assert (tmp_path / "e.pt").read_bytes() == (tmp_path / "d.pt").read_bytes()
