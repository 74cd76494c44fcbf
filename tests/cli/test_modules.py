"""Checkpoints whose experts, modules of their own, are scrambled: found, brought back, merged and moved along."""

from __future__ import annotations

import functools
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
from permgraph.cli.models import spec_of
from tests.cli.networks import Mixture

NET = f"{Path(__file__).with_name('networks.py')}:Mixture"
Run = Callable[..., Any]


@functools.cache
def spec() -> pg.PermutationSpec:
    return spec_of(NET, modules=True)


@functools.cache
def general() -> pg.PermutationSpec:
    return spec_of(NET, modules=True, symmetry="general")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*args: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
        return result

    return run


@pytest.fixture
def pair(tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A network and itself with experts, rows of the router and hidden units scrambled."""
    generator = torch.Generator().manual_seed(0)
    a = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in Mixture().state_dict().items()}
    turn = spec().random(1, every_group=True)
    b = turn.apply(a)
    assert not torch.equal(a["router.weight"], b["router.weight"]) and turn.arrays["experts.*"].tolist() != [0, 1, 2]
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    return a, b


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_spec_with_groups_of_modules_is_shown_saved_verified_and_explained(run: Run) -> None:
    shown = run("spec", NET, "--modules", "-o", "net.json").stdout
    assert "experts.* 3" in shown and pg.PermutationSpec.parse(shown).fingerprint == spec().fingerprint
    assert pg.PermutationSpec.load("net.json").fingerprint == spec().fingerprint
    data = json.loads(run("spec", NET, "--modules", "--json").stdout)
    assert data["stacks"]["experts.*.0.weight"] == [f"experts.{i}.0.weight" for i in range(3)]
    assert json.loads(run("spec", NET, "--json").stdout)["stacks"] == {}
    said = run("explain", NET, "experts.1.0.weight", 0, "--modules").stdout
    assert "tied to experts.1.2.weight[1]" in said and "as group experts.*" in said
    assert "no difference" in run("diff", "net.json", NET, "--modules").stdout
    run("spec", NET, "-o", "plain.json")
    assert "infer the spec again from the model, --modules" in run("spec", "plain.json", "--modules", code=2).stderr
    both = run("spec", NET, "--modules", "--symmetry", "general", "-o", "both.json").stdout
    assert "experts.* 3" in both and pg.PermutationSpec.load("both.json").fingerprint == general().fingerprint


def test_verify_moves_the_modules(run: Run) -> None:
    data = json.loads(run("verify", NET, "--modules", "--json", "--further", 0).stdout)
    assert data["passed"] and data["groups"] == 2
    plain = json.loads(run("verify", NET, "--json", "--further", 0).stdout)
    assert plain["passed"] and plain["groups"] == 3  # the hidden units of each expert, and nothing of the experts


def test_plan_counts_the_modules(run: Run) -> None:
    data = json.loads(run("plan", NET, "--modules", "--json", "--calibration", 0.1).stdout)
    assert data["elements"] == sum(parameter.numel() for parameter in Mixture().parameters())


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_align_brings_scrambled_experts_back(run: Run, pair: Any, stream: str) -> None:
    a, _ = pair
    aligned = ("align", "a.safetensors", "b.safetensors", "-m", NET, stream)
    data = json.loads(run(*aligned, "--modules", "-o", "c.safetensors", "-p", "p.safetensors", "--json").stdout)
    assert equal(load_file("c.safetensors"), a)
    assert data["check"]["max_error"] < 1e-9
    found = pg.Permutation.load("p.safetensors", spec())
    assert equal(found.apply(pair[1]), a)
    run(*aligned, "-o", "d.safetensors")
    assert not equal(load_file("d.safetensors"), a)  # without the modules


def test_a_streamed_run_goes_on_after_its_last_sweep(run: Run, pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from permgraph.matching.streamed import StreamedClimb

    aligned = ("align", "a.safetensors", "b.safetensors", "-m", NET, "--stream", "--modules", "-o", "c.safetensors")
    swept = StreamedClimb.climb

    def stopped(self: Any, progress: Any) -> None:
        swept(self, progress)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StreamedClimb, "climb", stopped)
        CliRunner().invoke(app, list(aligned))
    assert not Path("c.safetensors").exists()
    result = run(*aligned)
    assert "going on where an earlier run stopped" in result.stderr
    assert equal(load_file("c.safetensors"), pair[0])


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
@pytest.mark.parametrize("method", ["reference", "cycle-consistent", "merge-many"])
def test_a_merge_of_scrambled_copies_is_the_network(run: Run, pair: Any, stream: str, method: str) -> None:
    a, _ = pair
    save_file(spec().random(5, every_group=True).apply(a), "third.safetensors")
    files = ("a.safetensors", "b.safetensors", "third.safetensors")
    run("merge", *files, "-m", NET, "--modules", stream, "--method", method, "-o", "merged.safetensors")
    merged = load_file("merged.safetensors")
    assert merged.keys() == a.keys()
    if method != "merge-many":  # which begins with the models as they are, and may end below the best
        for name, tensor in a.items():
            torch.testing.assert_close(merged[name], tensor)


GENERAL = ("-m", NET, "--modules", "--symmetry", "general")


@pytest.fixture
def scaled(tmp_path: Path, pair: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A network, and itself with experts scrambled and hidden units scrambled and scaled."""
    a, _ = pair
    assert general().dimension() > 0
    b = general().random(2, every_group=True).apply(a)
    save_file(b, tmp_path / "scaled.safetensors")
    return a, b


def near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], atol=1e-5) for n in one)


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_align_brings_scrambled_and_scaled_experts_back(run: Run, scaled: Any, stream: str) -> None:
    a, b = scaled
    given = ("a.safetensors", "scaled.safetensors", *GENERAL, stream)
    data = json.loads(run("align", *given, "-o", "c.safetensors", "-p", "p.safetensors", "--json").stdout)
    assert near(load_file("c.safetensors"), a) and data["check"]["max_error"] < 1e-9
    found = pg.Transformation.load("p.safetensors", general())
    assert near(found.apply(b), a)
    run("transport", "p.safetensors", "scaled.safetensors", "-m", NET, "-o", "moved.safetensors")
    assert near(load_file("moved.safetensors"), a)


@pytest.mark.parametrize(
    ("method", "stream"),
    [("reference", "--stream"), ("reference", "--no-stream"), ("cycle-consistent", "--no-stream")],
)
def test_a_merge_of_scaled_copies_is_the_network(run: Run, scaled: Any, method: str, stream: str) -> None:
    a, _ = scaled
    save_file(general().random(5, every_group=True).apply(a), "third.safetensors")
    files = ("a.safetensors", "scaled.safetensors", "third.safetensors")
    run("merge", *files, *GENERAL, stream, "--method", method, "-o", "merged.safetensors")
    assert near(load_file("merged.safetensors"), a)


def test_gradients_go_with_scaled_experts(scaled: Any) -> None:
    """Of a loss that does not change the gradient at moved weights is the moved gradient."""
    element, (a, _) = general().random(2, every_group=True), scaled
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gradients(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        net = Mixture().double()
        net.load_state_dict(state)
        net(x).square().sum().backward()
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    double = {name: tensor.double() for name, tensor in a.items()}
    moved = pg.transport(element, gradients(double), kind="gradient")
    due = gradients(element.apply(double))
    assert moved.keys() == due.keys()
    for name, tensor in due.items():
        torch.testing.assert_close(moved[name], tensor)


def test_barrier_is_gone_after_alignment(run: Run, pair: Any) -> None:
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    save_file({"inputs": x, "targets": torch.arange(20) % 5}, "data.safetensors")
    told = ("barrier", "a.safetensors", "b.safetensors", "-m", NET, "--modules", "--data", "data.safetensors")
    data = json.loads(run(*told, "--points", 5, "--json").stdout)["lines"]
    spread = {title: max(line["curves"]["loss"]) - min(line["curves"]["loss"]) for title, line in data.items()}
    assert spread["aligned"] < 1e-5 < 1e-2 < spread["as given"]


def test_what_goes_with_the_checkpoint_is_moved_with_the_saved_permutation(run: Run, pair: Any) -> None:
    a, b = pair
    run("align", "a.safetensors", "b.safetensors", "-m", NET, "--modules", "-o", "c.safetensors", "-p", "p.safetensors")
    found = pg.Permutation.load("p.safetensors", spec())
    net = Mixture()
    net.load_state_dict(b)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    torch.save({"optimizer": optimizer.state_dict(), "ema": b}, "training.pt")
    run("transport", "p.safetensors", "training.pt", "-m", NET, "-o", "moved.pt")  # the file tells of the modules
    moved = torch.load("moved.pt")
    assert equal(moved["ema"], a)
    names = [name for name, _ in net.named_parameters()]
    averages = {name: optimizer.state[p]["exp_avg"] for name, p in net.named_parameters()}
    due = found.apply({**b, **averages})
    assert all(torch.equal(moved["optimizer"]["state"][i]["exp_avg"], due[name]) for i, name in enumerate(names))
    run("transport", "p.safetensors", "b.safetensors", "-m", NET, "-o", "moved.safetensors")
    assert equal(load_file("moved.safetensors"), a)


def test_a_fine_tuning_is_brought_to_a_scrambled_base(run: Run, pair: Any) -> None:
    a, b = pair
    change = {name: torch.full_like(tensor, 0.5) for name, tensor in a.items() if name.startswith("experts.1.")}
    save_file({name: tensor + change.get(name, 0) for name, tensor in b.items()}, "tuned.safetensors")
    told = ("transport", "b.safetensors", "tuned.safetensors", "a.safetensors", "-m", NET, "--modules")
    run(*told, "-o", "out.safetensors")
    out = load_file("out.safetensors")
    changed = {name.split(".")[1] for name in a if not torch.allclose(out[name], a[name])}
    assert len(changed) == 1
    (place,) = changed
    for name in (n for n in a if n.startswith(f"experts.{place}.")):
        torch.testing.assert_close(out[name], a[name] + 0.5)


def test_a_checkpoint_without_one_of_the_experts_is_refused(run: Run, pair: Any) -> None:
    _, b = pair
    save_file({n: t for n, t in b.items() if n != "experts.2.0.weight"}, "less.safetensors")
    told = ("align", "a.safetensors", "less.safetensors", "-m", NET, "--modules", "-o", "c.safetensors")
    said = " ".join(run(*told, code=2).stderr.split())
    assert "less.safetensors" in said and "'experts.2.0.weight'" in said


def test_a_study_matches_modules_if_its_plan_says_so(run: Run, pair: Any) -> None:
    pytest.importorskip("yaml")
    Path("plan.yaml").write_text(
        f"model: {NET}\nmodules: true\nnetworks: {{a: a.safetensors, b: b.safetensors}}\n"
        "matchers: {weights: {matcher: weight}}\nseeds: [0]\n"
    )
    run("study", "plan.yaml", "--store", "results", "--backend", "sequential", "-o", "table.csv")
    Path("plan.yaml").write_text(Path("plan.yaml").read_text().replace("true", "perhaps"))
    assert "neither true nor false" in run("study", "plan.yaml", "--store", "results", code=2).stderr


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_experts_in_several_shards_come_back(run: Run, pair: Any, stream: str) -> None:
    for folder, state in zip("ab", pair, strict=True):
        Path(folder).mkdir()
        shards: dict[str, dict[str, torch.Tensor]] = {"1": {}, "2": {}}
        for name, tensor in state.items():
            shards["2" if name.startswith("experts.1.") else "1"][name] = tensor.to(torch.bfloat16)
        for number, held in shards.items():
            save_file(held, f"{folder}/model-0000{number}-of-00002.safetensors", {"format": "pt"})
        where = {name: f"model-0000{number}-of-00002.safetensors" for number, held in shards.items() for name in held}
        Path(folder, "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    run("align", "a", "b", "-m", NET, "--modules", stream, "-o", "out")
    found = {name: t for shard in Path("out").glob("*.safetensors") for name, t in load_file(shard).items()}
    assert equal(found, {name: tensor.to(torch.bfloat16) for name, tensor in pair[0].items()})
