"""What the commands answer, write and refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import permgraph as pg
from permgraph.cli import models, options
from permgraph.cli.app import app
from permgraph.cli.models import spec_of
from tests.cli.networks import Net, Normed, Waves, loader

NETWORKS = Path(__file__).with_name("networks.py")
NET = f"{NETWORKS}:Net"

Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder; returns the result of click's runner."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
        assert "Traceback" not in result.stderr
        return result

    return run


def trained(seed: int, spec: pg.PermutationSpec) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in spec.shapes.items()}
    return {name: tensor * (0.1 if name.endswith("bias") else 1.0) for name, tensor in made.items()}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A network and itself renumbered, written as a.safetensors and b.safetensors."""
    spec = spec_of(NET)
    a = trained(0, spec)
    b = spec.random(1, every_group=True).apply(a)
    save_file(a, tmp_path / "a.safetensors", {"format": "pt"})
    save_file(b, tmp_path / "b.safetensors", {"format": "pt"})
    return a, b


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# --- structure --------------------------------------------------------------------------------------------------------


def test_spec_prints_and_saves(run: Run) -> None:
    result = run("spec", NET, "-o", "net.json")
    spec = pg.PermutationSpec.load("net.json")
    assert spec.fingerprint == spec_of(NET).fingerprint
    assert pg.PermutationSpec.parse(result.stdout).fingerprint == spec.fingerprint
    assert "saved to net.json" in result.stderr
    assert "saved" not in run("spec", NET, "-o", "net.json", "--quiet").stderr


def test_spec_as_json(run: Run) -> None:
    data = json.loads(run("spec", NET, "--json", "--pins").stdout)
    assert sorted(group["size"] for group in data["groups"].values() if not group["fixed"]) == [24, 24, 24]
    assert data["axes"]["head.weight"]["shape"] == [3, 24]
    assert {"parameter": "head.weight", "dim": 0} in [
        {"parameter": pin["parameter"], "dim": pin["dim"]} for pin in data["pins"]
    ]


def test_structures_of_a_spec(run: Run) -> None:
    general = pg.auto_spec(Net(), symmetry="general")
    result = run("spec", NET, "--symmetry", "general", "-o", "general.json")
    assert pg.PermutationSpec.load("general.json").fingerprint == general.fingerprint
    assert f"dimension of the continuous part: {general.dimension():,}" in result.stdout
    assert pg.PermutationSpec.parse(result.stdout).log_order() == general.log_order()
    data = json.loads(run("spec", "general.json", "--symmetry", "general", "--json").stdout)
    assert data["dimension"] == general.dimension() == sum(e["dimension"] for e in data["structures"].values())
    assert {n: e["structure"] for n, e in data["structures"].items()} == {
        name: str(group.structure) for name, group in general.acting.items()
    }
    assert "dimension" not in json.loads(run("spec", NET, "--json").stdout)
    run("spec", NET, "-o", "plain.json")
    assert "infer the spec again" in run("spec", "plain.json", "--symmetry", "general", code=2).stderr


def test_verify_of_general_symmetries(run: Run) -> None:
    data = json.loads(run("verify", NET, "--symmetry", "general", "--json").stdout)
    assert data["passed"] and data["maximal"] and not data["beyond"]


def test_spec_of_a_model_with_arguments(run: Run) -> None:
    data = json.loads(run("spec", f"{NET}(7, depth=2)", "--json").stdout)
    assert sorted(group["size"] for group in data["groups"].values() if not group["fixed"]) == [7, 7]


def test_a_model_by_package(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "zoo_of_mine.py").write_text(NETWORKS.read_text())
    assert json.loads(run("spec", "zoo_of_mine:net", "--json").stdout)["model"].endswith("Net")


def test_example_inputs_by_shape(run: Run) -> None:
    run("spec", NET, "--input", "2,5")
    run("spec", f"{NETWORKS}:Tied", "--input", "tokens=int:2,4")
    assert "give a shape" in run("spec", NET, "--input", "2x5", code=2).stderr


def test_where_no_example_input_is_found_every_command_takes_one(run: Run) -> None:
    model, shape = f"{NETWORKS}:Waves", ("--input", "2,3700")
    for seed, name in enumerate(("a.pt", "b.pt")):
        torch.manual_seed(seed)
        torch.save(Waves().state_dict(), name)
    torch.save({"x": torch.randn(8, 3700), "y": torch.arange(8) % 3}, "data.pt")
    commands: list[tuple[str, ...]] = [
        ("spec", model, "-o", "spec.json"),
        ("explain", model, "up.weight", "0"),
        ("diff", "spec.json", model),
        ("verify", model),
        ("plan", model, "--calibration", "0.01"),
        ("align", "a.pt", "b.pt", "-m", model, "-o", "aligned.pt"),
        ("merge", "a.pt", "b.pt", "-m", model, "-o", "merged.pt"),
        ("barrier", "a.pt", "b.pt", "-m", model, "--data", "data.pt", "--points", "3"),
    ]
    for command in commands:
        said = run(*command, code=2).stderr
        assert "no example inputs for Waves were found; it takes forward(wave: " in said
        assert "--input 1,3,224,224" in said and "Tried" not in said
        assert len(said.splitlines()) == 1
        run(*command, *shape)


def test_what_was_tried_is_listed_for_debug(run: Run) -> None:
    result = CliRunner().invoke(app, ["spec", f"{NETWORKS}:Waves", "--debug"])
    assert result.exit_code == 2
    assert "too few samples, or too many" in result.stderr


def test_explain(run: Run) -> None:
    result = run("explain", NET, "layers.1.weight", 0)
    assert "layers.1.weight[0] (24) is group" in result.stdout
    data = json.loads(run("explain", NET, "layers.1.weight", 0, "--json").stdout)
    assert "layers.2.weight[1]" in data["parts"][0]["tied_to"]
    assert "near: layers.1.weight" in run("explain", NET, "layers.1.weigt", 0, code=2).stderr
    assert "no dimension 5" in run("explain", NET, "layers.1.weight", 5, code=2).stderr


def test_diff_tells_by_its_exit_code(run: Run) -> None:
    run("spec", NET, "-o", "net.json", "-q")
    assert "no difference" in run("diff", "net.json", NET).stdout
    result = run("diff", "net.json", f"{NET}(7)", "--json", code=1)
    assert not json.loads(result.stdout)["same"]
    assert json.loads(result.stdout)["differences"]


def test_verify(run: Run, pair: object) -> None:
    data = json.loads(run("verify", NET, "--checkpoint", "a.safetensors", "--json").stdout)
    assert data["passed"]
    assert data["groups"] == data["controls"] == 3
    assert data["checkpoint"]["max_error"] < 1e-12


def test_verify_says_no_to_a_wrong_spec(run: Run) -> None:
    right = spec_of(NET)
    wrong = pg.PermutationSpec(
        groups=right.groups,
        axes={n: (axes if n != "layers.1.weight" else (axes[1], axes[0])) for n, axes in right.axes.items()},
    )
    wrong.save("wrong.json")
    assert "FAILED" in run("verify", NET, "--spec", "wrong.json", code=1).stdout


def test_doctor(run: Run) -> None:
    data = json.loads(run("doctor", "--json").stdout)
    assert data["healthy"]
    assert data["trial"] == "works"
    assert data["packages"]["torch"]


def test_models_of_libraries(run: Run) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    one = json.loads(run("spec", "torchvision:resnet18", "--json").stdout)
    other = json.loads(run("spec", "timm:resnet18(num_classes=1000)", "--json").stdout)
    assert one["fingerprint"] == other["fingerprint"]
    assert "it has" in run("spec", "torchvision:resnet", code=2).stderr
    assert "timm has no model 'resnet17000'" in run("spec", "timm:resnet17000", code=2).stderr


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nonsense", "names no model"),
        ("absent.py:Net", "absent.py: no such file"),
        ("no.such.package:thing", "cannot be imported"),
        (f"{NETWORKS}:Nett", "has no 'Nett'"),
        (f"{NETWORKS}:not_a_model", "is a int: name a module"),
        (f"{NETWORKS}:fails", "ValueError: out of cheese"),
        (f"{NETWORKS}:loader", "gives a list, not a torch.nn.Module"),
        (f"{NET}(width=open('x'))", "literal arguments"),
        (f"{NET}(nonsense=3)", "cannot be built: TypeError"),
        ("hf:absent", "there is no config.json"),
        ("absent.json", "absent.json: no such file"),
    ],
)
def test_models_that_are_none(run: Run, model: str, said: str) -> None:
    result = run("spec", model, code=2)
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    error = json.loads(run("spec", model, "--json", code=2).stdout)["error"]
    assert said in error["message"]


def test_a_traceback_only_for_debug(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["spec", f"{NETWORKS}:fails", "--debug"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and "ValueError: out of" in result.stderr


# --- align ------------------------------------------------------------------------------------------------------------


def test_align_brings_a_scrambled_network_back(run: Run, tmp_path: Path, pair: Any) -> None:
    before = (tmp_path / "b.safetensors").read_bytes()
    result = run(
        "align", "a.safetensors", "b.safetensors", "-m", NET, "-o", "c.safetensors", "-p", "p.safetensors", "--json"
    )
    data = json.loads(result.stdout)
    assert data["outcome"] == "converged"
    assert data["objective"] > data["objective_before"]
    assert equal(load_file("c.safetensors"), pair[0])
    permutation = pg.Permutation.load("p.safetensors", spec_of(NET))
    assert equal(permutation.apply(pair[1]), pair[0])
    assert (tmp_path / "b.safetensors").read_bytes() == before
    assert sorted(os.listdir()) == ["a.safetensors", "b.safetensors", "c.safetensors", "p.safetensors"]


def test_align_by_a_saved_spec(run: Run, pair: Any) -> None:
    run("spec", NET, "-o", "net.json")
    run("align", "a.safetensors", "b.safetensors", "--spec", "net.json", "-o", "c.safetensors")
    assert equal(load_file("c.safetensors"), pair[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_align_preserves_every_dtype(run: Run, dtype: torch.dtype) -> None:
    spec = spec_of(NET)
    a = {name: tensor.to(dtype) for name, tensor in trained(0, spec).items()}
    as_bits = {name: tensor.view(torch.uint8) if dtype.itemsize == 1 else tensor for name, tensor in a.items()}
    b = {name: tensor.view(dtype) for name, tensor in spec.random(1, every_group=True).apply(as_bits).items()}
    save_file(a, "a.safetensors")
    save_file(b, "b.safetensors")
    run("align", "a.safetensors", "b.safetensors", "-m", NET, "-o", "c.safetensors")
    c = load_file("c.safetensors")
    assert all(c[name].dtype == dtype and torch.equal(c[name].float(), a[name].float()) for name in a)


def test_align_keeps_keys_wrappers_and_layout(run: Run, pair: Any) -> None:
    a, b = pair
    torch.save({"state_dict": {f"model.{n}": t for n, t in b.items()}, "epoch": 3, "optimizer": {"m": b}}, "b.ckpt")
    result = run("align", "a.safetensors", "b.ckpt", "-m", NET, "-o", "c.ckpt")
    assert "with 'model.' before them" in result.stderr
    assert "b.ckpt: 'optimizer' not carried over" in result.stderr
    content = torch.load("c.ckpt", weights_only=True)
    assert content.keys() == {"state_dict", "epoch"}
    assert equal({n.removeprefix("model."): t for n, t in content["state_dict"].items()}, a)


def test_align_between_kinds_of_file(run: Run, pair: Any) -> None:
    a, b = pair
    torch.save(b, "b.pt")
    run("align", "a.safetensors", "b.pt", "-m", NET, "-o", "c.safetensors")
    run("align", "a.safetensors", "b.safetensors", "-m", NET, "-o", "c.pt")
    assert equal(load_file("c.safetensors"), a)
    assert equal(torch.load("c.pt", weights_only=True), a)


def test_align_writes_shards_as_it_read_them(run: Run, tmp_path: Path, pair: Any) -> None:
    a, b = pair
    (tmp_path / "b").mkdir()
    placed = {}
    for number, (name, tensor) in enumerate(b.items()):
        save_file({name: tensor}, f"b/part-{number}.safetensors", {"format": "pt"})
        placed[name] = f"part-{number}.safetensors"
    Path("b/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    Path("b/tokenizer.json").write_text("{}")
    Path("b/pytorch_model.bin").write_bytes(b"other weights, which would no longer fit")
    run("align", "a.safetensors", "b", "-m", NET, "-o", "c")
    assert sorted(os.listdir("c")) == sorted({*placed.values(), "model.safetensors.index.json", "tokenizer.json"})
    for name, shard in placed.items():
        assert equal(load_file(f"c/{shard}"), {name: a[name]})


def test_align_leaves_tied_weights_tied(run: Run) -> None:
    model = f"{NETWORKS}:Tied"
    spec = spec_of(model)
    a = trained(0, spec)
    b = spec.random(1, every_group=True).apply(a)
    assert set(spec.aliases) == {"head.weight"}
    torch.save({**a, "head.weight": a["embedding.weight"]}, "a.pt")
    torch.save({**b, "head.weight": b["embedding.weight"]}, "b.pt")
    run("align", "a.pt", "b.pt", "-m", model, "-o", "c.pt")
    c = torch.load("c.pt", weights_only=True)
    assert torch.equal(c["embedding.weight"], a["embedding.weight"])
    assert c["head.weight"].data_ptr() == c["embedding.weight"].data_ptr()


def test_align_refuses_what_does_not_fit(run: Run, pair: Any) -> None:
    _, b = pair
    args = ("align", "a.safetensors", "x.safetensors", "-m", NET, "-o", "c.safetensors")

    def refused(state: dict[str, torch.Tensor], *more: str) -> str:
        save_file(state, "x.safetensors")
        result = run(*args, *more, code=2)
        assert len([line for line in result.stderr.splitlines() if line.startswith("error")]) == 1
        assert not Path("c.safetensors").exists()
        return str(result.stderr)

    assert "x.safetensors: 'head.weight' has shape (24, 3), but" in refused({**b, "head.weight": torch.ones(24, 3)})
    assert "that the model does not know: 'extra'" in refused({**b, "extra": torch.ones(2)})
    assert "has no 'head.bias'" in refused({n: t for n, t in b.items() if n != "head.bias"})
    assert "none of the checkpoint's 1 keys" in refused({"conv1.weight": torch.ones(3)})
    assert "'head.bias' is torch.int32, but" in refused({**b, "head.bias": torch.ones(3, dtype=torch.int32)})
    for value in (float("nan"), float("inf")):
        for name in ("layers.0.weight", "head.bias"):
            bad = b[name].clone()
            bad.view(-1)[1] = value
            assert f"x.safetensors: {name!r} holds NaN or infinity in 1 of its" in refused({**b, name: bad})
    save_file({**b, "extra": torch.ones(2)}, "x.safetensors")
    run(*args, "--leave", "ext*")
    assert torch.equal(load_file("c.safetensors")["extra"], torch.ones(2))


def test_align_refuses_outputs_in_the_way(run: Run, pair: Any) -> None:
    common = ("align", "a.safetensors", "b.safetensors", "-m", NET, "-o")
    assert "is the input itself" in run(*common, "b.safetensors", code=2).stderr
    a = Path("a.safetensors").read_bytes()
    for command in ("align", "merge"):
        said = run(command, *common[1:], "a.safetensors", "--overwrite", code=2).stderr
        assert "input" in said and "choose another place" in said
    assert Path("a.safetensors").read_bytes() == a
    assert "give it the ending .safetensors" in run(*common, "out", code=2).stderr
    assert "no such folder" in run(*common, "absent/c.safetensors", code=2).stderr
    run(*common, "c.safetensors")
    assert "exists already" in run(*common, "c.safetensors", code=2).stderr
    run(*common, "c.safetensors", "--overwrite")
    assert "say --model" in run("align", "a.safetensors", "b.safetensors", "-o", "d.safetensors", code=2).stderr
    os.makedirs("folder")
    save_file(pair[1], "folder/model.safetensors")
    inside = run("align", "a.safetensors", "folder", "-m", NET, "-o", "folder/out", code=2)
    assert "lies inside it" in inside.stderr
    assert "must be one too" in run("align", "a.safetensors", "folder", "-m", NET, "-o", "x.pt", code=2).stderr


@pytest.mark.parametrize(
    "command",
    [
        ("spec", NET, "-o"),
        ("align", "a.safetensors", "b.safetensors", "-m", NET, "-o", "c.safetensors", "-p"),
        ("barrier", "a.safetensors", "b.safetensors", "-m", NET, "--data", f"{NETWORKS}:loader", "-o"),
    ],
    ids=["spec", "align", "barrier"],
)
def test_files_that_cannot_be_written_are_refused_before_any_work(
    run: Run, pair: Any, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*arguments: object) -> None:
        raise AssertionError("it should have been refused")

    for place in ("models.spec_of", "matching_run.spec_of_subject"):
        monkeypatch.setattr(f"permgraph.cli.{place}", work)
    ending = ".safetensors" if command[0] == "align" else ".json"
    Path(f"folder{ending}").mkdir()
    for name, said in ((f"absent/x{ending}", "there is no folder absent"), (f"folder{ending}", "it is a folder")):
        assert f"{name}: {said}" in run(*command, name, code=2).stderr
    if command[0] != "spec":
        assert "its ending must be" in run(*command, "x.txt", code=2).stderr
    assert not Path("c.safetensors").exists()


# --- merge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", ["", "--stream", "--method reference --reference 2", "--method merge-many --init barycentre"]
)
def test_merge_of_renumbered_copies_is_the_network(run: Run, pair: Any, how: str) -> None:
    a, b = pair
    save_file(spec_of(NET).random(2).apply(b), "c.safetensors")
    args = ("merge", "a.safetensors", "b.safetensors", "c.safetensors", "-m", NET, "-o", "m.safetensors", "--json")
    data = json.loads(run(*args, *how.split()).stdout)
    assert data["method"] == (how.split()[1] if "method" in how else "cycle-consistent")
    if "reference" in how:
        assert [report["checkpoint"] for report in data["alignments"]] == ["a.safetensors", "b.safetensors"]
    else:
        assert data["outcome"] == "converged"
        assert data["moved"][0] == 0 < data["moved"][1]
    # Numbered as the first is, whatever the method made of the numbering.
    merged = load_file("m.safetensors")
    assert all(torch.allclose(merged[name], tensor, atol=1e-6) for name, tensor in a.items())


def test_merge_finds_what_the_library_finds(run: Run) -> None:
    spec = spec_of(NET)
    states = [trained(seed, spec) for seed in range(3)]
    for number, state in enumerate(states):
        save_file(state, f"{number}.safetensors")
    args = ("merge", *(f"{number}.safetensors" for number in range(3)), "-m", NET, "--seed", 3, "--json", "-o")
    methods = {
        "cycle-consistent": pg.CycleConsistent(),
        "merge-many": pg.MergeMany(),
        "reference": pg.ToReference(),
        "joining": pg.Joining(),
    }
    for name, method in methods.items():
        data = json.loads(run(*args, f"{name}.safetensors", "--method", name).stdout)
        expected = pg.merge(states, method, spec=spec, seed=3)
        if name != "reference":
            assert data["objective"] == pytest.approx(expected.objective)
            assert data["rounds"] == expected.rounds
            # The library's mean is in a numbering of its own; the command's in that of the first.
            renumbered = expected.permutations[0].inverse().apply(expected.state_dict)
            made = load_file(f"{name}.safetensors")
            assert all(torch.allclose(made[key], tensor, atol=1e-5) for key, tensor in renumbered.items())


def test_merge_refuses_what_does_not_go_together(run: Run, pair: Any) -> None:
    args = ("merge", "a.safetensors", "b.safetensors", "-m", NET, "-o", "m.safetensors")
    assert "the checkpoints are 0 to 1" in run(*args, "--reference", 2, code=2).stderr
    assert "say --data" in run(*args, "--recalibrate", code=2).stderr
    assert "say --method cycle-consistent" in run(*args, "--method", "joining", "--stream", code=2).stderr
    assert "by weights" in run(*args, "--method", "cycle-consistent", "--matcher", "frank-wolfe", code=2).stderr
    assert "plain inner products" in run(*args, "--method", "cycle-consistent", "--objective", "cosine", code=2).stderr
    assert not Path("m.safetensors").exists()


def test_merge_is_the_weighted_mean_after_alignment(run: Run, pair: Any) -> None:
    a, _ = pair
    spec = spec_of(NET)
    other = trained(9, spec)
    save_file({n: t.to(torch.bfloat16) for n, t in a.items()}, "x.safetensors")
    save_file({n: t.to(torch.bfloat16) for n, t in other.items()}, "y.safetensors")
    run("merge", "x.safetensors", "y.safetensors", "-m", NET, "-o", "m.safetensors", "--weights", "0.25,0.75")
    x, y = load_file("x.safetensors"), load_file("y.safetensors")
    fit = pg.align(x, y, spec=spec)
    merged = load_file("m.safetensors")
    for name, tensor in x.items():
        expected = 0.25 * tensor.float() + 0.75 * fit.state_dict[name].float()
        assert merged[name].dtype == torch.bfloat16
        assert torch.equal(merged[name], expected.to(torch.bfloat16))
    run("merge", "x.safetensors", "y.safetensors", "-m", NET, "-o", "p.safetensors", "--no-align")
    plain = load_file("p.safetensors")
    assert torch.equal(plain["head.weight"], ((x["head.weight"].float() + y["head.weight"].float()) / 2).bfloat16())


def test_merge_speaks_of_batchnorm_and_of_counters(run: Run) -> None:
    for seed, name in enumerate(("a.pt", "b.pt")):
        torch.manual_seed(seed)
        network = Normed()
        network[1].num_batches_tracked.fill_(seed)
        torch.save(network.state_dict(), name)
    result = run("merge", "a.pt", "b.pt", "-m", f"{NETWORKS}:Normed", "-o", "m.pt")
    assert "BatchNorm" in result.stderr
    assert "1.num_batches_tracked" in result.stderr


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("1", "1 numbers for 2 networks"),
        ("a,b", "give numbers"),
        ("1.5,-0.5", "not negative"),
        ("0.5,inf", "finite"),
        ("0,0", "all 0"),
    ],
)
def test_merge_refuses_odd_weights(run: Run, pair: Any, weights: str, said: str) -> None:
    args = ("merge", "a.safetensors", "b.safetensors", "-m", NET, "-o", "m.safetensors", "--weights", weights)
    assert said in run(*args, code=2).stderr


def test_merge_scales_weights_as_the_library_does(run: Run, pair: Any) -> None:
    run("merge", "a.safetensors", "b.safetensors", "-m", NET, "-o", "m.safetensors", "--no-align", "--weights", "1,3")
    states = [load_file(name) for name in ("a.safetensors", "b.safetensors")]
    merged = load_file("m.safetensors")
    for name, tensor in states[0].items():
        torch.testing.assert_close(merged[name], 0.25 * tensor + 0.75 * states[1][name])


def test_merge_takes_two_or_more(run: Run, pair: Any) -> None:
    assert "two checkpoints or more" in run("merge", "a.safetensors", "-m", NET, "-o", "m.safetensors", code=2).stderr


# --- barrier ----------------------------------------------------------------------------------------------------------


def test_barrier_vanishes_after_alignment(run: Run, pair: Any) -> None:
    network = Net()
    network.load_state_dict(pair[0])
    inputs = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    save_file({"x": inputs, "y": network(inputs).argmax(1)}, "data.safetensors")
    args = ("barrier", "a.safetensors", "b.safetensors", "-m", NET, "--data", "data.safetensors", "--points", 5)
    lines = json.loads(run(*args, "--json").stdout)["lines"]
    assert lines["as given"]["curves"]["accuracy"][0] == 1
    assert lines["as given"]["barriers"]["accuracy"] > 0.05
    assert lines["aligned"]["barriers"]["accuracy"] == 0
    run(*args, "-o", "report.html")
    page = Path("report.html").read_text()
    assert page.count("<svg") == 3  # the objective, the loss and the accuracy
    assert "http" not in page.replace("http-equiv", "")
    assert "must be .html" in run(*args, "-o", "report.txt", code=2).stderr
    run(*args, "-o", "report.pdf")
    assert Path("report.pdf").read_bytes().startswith(b"%PDF")


def test_barrier_on_data_from_a_file(run: Run, pair: Any) -> None:
    ((inputs, targets),) = loader()
    save_file({"inputs": inputs, "targets": targets}, "data.safetensors")
    args = ("barrier", "a.safetensors", "b.safetensors", "-m", NET, "--points", 3, "--no-align", "--json", "--data")
    one = json.loads(run(*args, "data.safetensors", "--batch-size", 16).stdout)
    other = json.loads(run(*args, f"{NETWORKS}:loader").stdout)
    assert one["lines"] == other["lines"]
    save_file({"inputs": inputs}, "data.safetensors")
    assert "no targets" in run(*args, "data.safetensors", code=2).stderr
    save_file({"inputs": inputs, "targets": targets[:3]}, "data.safetensors")
    assert "must have one length" in run(*args, "data.safetensors", code=2).stderr


# --- the program itself -----------------------------------------------------------------------------------------------


def program(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    root = str(Path(pg.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env=environment, check=False, **options
    )


@pytest.mark.slow
def test_python_m_permgraph(tmp_path: Path) -> None:
    result = program("-m", "permgraph", "spec", NET, "--json", cwd=tmp_path)
    assert result.returncode == 0
    assert json.loads(result.stdout)["groups"]
    assert not result.stderr


@pytest.mark.slow
def test_without_the_extra_it_says_so_in_one_line(tmp_path: Path) -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'typer' else find(name, *rest)\n"
        "from permgraph.cli import main; main()"
    )
    result = program("-c", code, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "error: the command line needs typer: pip install 'permgraph[cli]'\n"


def test_every_command_explains_itself_and_speaks_json(run: Run) -> None:
    for command in ("spec", "explain", "diff", "verify", "align", "merge", "barrier", "doctor"):
        shown = run(command, "--help").stdout
        assert "--json" in shown and "--quiet" in shown and "--debug" in shown
    assert pg.__version__ in run("--version").stdout


def test_the_library_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    a = nn.Linear(3, 4)
    pg.auto_spec(nn.Sequential(a, nn.ReLU(), nn.Linear(4, 2)))
    assert capsys.readouterr() == ("", "")


# --- what is declined is said -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("an operator is absent"), "\npermgraph: timm cannot be imported: an operator is absent\n"),
        (ModuleNotFoundError(), ""),
    ],
)
def test_completion_says_what_is_wrong_with_a_package(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(options.importlib, "import_module", fail)
    assert options.complete_model("timm:resnet") == []
    assert capsys.readouterr().err == said


def test_a_constructor_that_needs_values_is_built_on_the_cpu_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\ndef make():\n    width = int(torch.tensor([3]).sum())\n    return torch.nn.Linear(width, 2)\n"
    )
    with caplog.at_level("INFO", "permgraph.cli.models"):
        built = models.build(f"{tmp_path / 'model.py'}:make")
    assert built.weight.device.type == "cpu"
    assert "cannot be built on meta" in caplog.text


def test_outputs_that_count(run: Run, tmp_path: Path) -> None:
    """Features beside the logits move, unless all outputs count, or they are named."""
    features = f"{NETWORKS}:Features"
    found = {
        words: json.loads(run("spec", features, *words, "--json").stdout)
        for words in ((), ("--outputs", "final"), ("--outputs", "all"), ("--outputs", "logits, features"))
    }
    assert [list(data["groups"]) for data in found.values()] == [["features", "hidden"]] * 2 + [["hidden"]] * 2
    assert [data["by_products"] for data in found.values()] == [["features"]] * 2 + [[]] * 2
    assert json.loads(run("verify", features, "--outputs", "features", "--json").stdout)["groups"] == 2  # hidden, head
    assert "it returns logits, features" in run("spec", features, "--outputs", "logit", code=2).stderr
    assert "say final, all, or names" in run("spec", features, "--outputs", "logits,", code=2).stderr

    run("spec", features, "-o", "spec.json")
    assert "infer the spec again" in run("spec", "spec.json", "--outputs", "all", code=2).stderr
    assert "infer the spec again" in run("verify", features, "--spec", "spec.json", "--outputs", "all", code=2).stderr
    spec = pg.PermutationSpec.load(tmp_path / "spec.json")
    a = trained(0, spec)
    for name, weights in (("a", a), ("b", spec.random(1, every_group=True).apply(a))):
        save_file(weights, tmp_path / f"{name}.safetensors", {"format": "pt"})
    for words, same in (((), True), (("--outputs", "all"), False)):
        run("align", "a.safetensors", "b.safetensors", "-m", features, *words, "-o", "c.safetensors", "--overwrite")
        aligned = load_file(tmp_path / "c.safetensors")
        assert all(torch.equal(a[name], aligned[name]) for name in a) == same
