"""Every matcher on the command line, on networks that are run on data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import permgraph as pg
from permgraph import matching
from permgraph.cli.app import app
from permgraph.cli.matchers import MATCHERS, describe
from permgraph.cli.models import spec_of
from permgraph.cli.options import MatcherName
from permgraph.matching import ActivationMatching, StraightThrough, WeightMatching
from tests.cli.networks import Net, Normed, loader

NETWORKS = Path(__file__).with_name("networks.py")
NET = f"{NETWORKS}:Net(8, depth=2)"


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A network and itself renumbered in a.safetensors and b.safetensors, and data in data.safetensors."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Net(8, depth=2)
        x = torch.randn(64, 5)
    a = network.state_dict()
    save_file(a, "a.safetensors")
    save_file(spec_of(NET).random(1, every_group=True).apply(a), "b.safetensors")
    with torch.no_grad():
        save_file({"x": x, "y": network(x).argmax(1)}, "data.safetensors")
    return a


def align(*args: object, code: int = 0) -> Any:
    return run("align", "a.safetensors", "b.safetensors", "-m", NET, "-o", "c.safetensors", *args, code=code)


@dataclass(frozen=True)
class Still(pg.Matcher):
    """A matcher without settings, and without weight matching in it."""

    def match(self, a: Any, b: Any, spec: Any, seed: int = 0, progress: Any = None) -> pg.MatchResult:
        return pg.MatchResult(spec.identity(), 0.0, 0.0, "converged")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--init", "identity", "--max-sweeps", "3"], "has no weight matching in it: leave out --init --max-sweeps"),
        (["--set", "speed=3"], "Still has no setting 'speed'; it has none"),
    ],
)
def test_what_a_matcher_without_settings_is_not_given(
    pair: Any, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.setitem(MATCHERS, MatcherName.sinkhorn, Still)
    assert said in align("--matcher", "sinkhorn", *options, code=2).stderr


def test_the_table_has_every_matcher_of_the_library() -> None:
    exported = {getattr(matching, name) for name in matching.__all__ if isinstance(getattr(matching, name), type)}
    matchers = {kind for kind in exported if hasattr(kind, "match") and hasattr(kind, "__dataclass_fields__")}
    assert set(MATCHERS) == set(MatcherName)
    assert set(MATCHERS.values()) >= matchers - {pg.matching.streamed.StreamedWeightMatching}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("weight", "--set order=given --set solver=scipy"),
        ("activation", "--data data.safetensors --batch-size 16"),
        ("frank-wolfe", "--set max_steps=5 --restarts 2"),
        ("straight-through", "--data data.safetensors --set epochs=1"),
        ("learned", "--data data.safetensors --set steps=4"),
        ("sinkhorn", "--set steps=4"),
    ],
)
def test_every_matcher_brings_a_scrambled_network_back(pair: dict[str, torch.Tensor], name: str, more: str) -> None:
    data = json.loads(align("--matcher", name, *more.split(), "--json").stdout)
    assert data["outcome"] in ("converged", "sweep limit")
    aligned = load_file("c.safetensors")
    assert all(torch.equal(aligned[key], tensor) for key, tensor in pair.items())


def test_sinkhorn_on_data_keeps_the_function(pair: dict[str, torch.Tensor]) -> None:
    """The loss at the midpoint decides, so another permutation than the planted one may be found."""
    data = json.loads(align("--matcher", "sinkhorn", "--data", "data.safetensors", "--set", "steps=2", "--json").stdout)
    assert data["objective"] >= data["objective_before"]
    assert data["objective"] < 0  # minus a loss, not an inner product of weights
    network, x = Net(8, depth=2), load_file("data.safetensors")["x"]
    outputs = []
    for state in (pair, load_file("c.safetensors")):
        network.load_state_dict(state)
        outputs.append(network(x))
    assert torch.allclose(*outputs, atol=1e-6)


def test_a_run_with_data_goes_on_where_it_stopped(pair: dict[str, torch.Tensor], monkeypatch: Any) -> None:
    args = ("--matcher", "activation", "--data", "data.safetensors")

    def stops(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("permgraph.io.write_checkpoint", stops)
        assert "goes on where" in align(*args, code=130).stderr
    with monkeypatch.context() as patch:
        patch.setattr(ActivationMatching, "match", stops)  # what was matched is kept
        assert "going on where an earlier run stopped" in align(*args).stderr
    assert Path("c.safetensors").exists()
    # Other data are another job.
    Path("c.safetensors").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("permgraph.io.write_checkpoint", stops)
        align(*args, code=130)
    assert "going on" not in align(*args, "--limit", 10).stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--matcher activation", "runs the networks: say --data"),
        ("--matcher straight-through", "runs the networks: say --data"),
        ("--matcher learned", "runs the networks: say --data"),
        ("--matcher frank-wolfe --stream", "needs whole networks"),
        ("--set epochs", "give a name and a value"),
        ("--set epochs=3", "WeightMatching has no setting 'epochs'; it has frozen, ignore, init"),
        ("--set max_sweeps=many", "should be like 100"),
        ("--set max_sweeps=True", "should be like 100"),
        ("--set memory=plenty", "should be like a number"),
        ("--set dtype=float64", "has no setting 'dtype'"),
        ("--matcher sinkhorn --set temperature=(1,'a')", "should be like (1.0, 0.1)"),
        ("--set max_sweeps=-1", "give 0 or more sweeps"),
        ("--matcher straight-through --data data.safetensors --set loader=3", "has no setting 'loader'"),
        ("--stream --restarts 2", "leave out --objective"),
        ("--matcher activation --data absent.npz", "no such file"),
    ],
)
def test_options_that_do_not_go_together(pair: object, more: str, said: str) -> None:
    result = align(*more.split(), code=2)
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not Path("c.safetensors").exists()


def test_a_spec_alone_runs_no_network(pair: object) -> None:
    spec_of(NET).save("net.json")
    args = ("align", "a.safetensors", "b.safetensors", "--spec", "net.json", "-o", "c.safetensors")
    said = run(*args, "--matcher", "activation", "--data", "data.safetensors", code=2).stderr
    assert "runs the networks: say --model" in said


def test_a_matcher_as_plain_data_is_the_same_in_every_run() -> None:
    for matcher in (WeightMatching(), StraightThrough([]), ActivationMatching(loader())):
        text = json.dumps(describe(matcher))
        assert " at 0x" not in text
        assert text == json.dumps(describe(type(matcher)(**({"loader": [1]} if hasattr(matcher, "loader") else {}))))
    assert describe(StraightThrough([], epochs=1)) != describe(StraightThrough([], epochs=2))


def test_merge_with_a_matcher_that_runs_networks(pair: dict[str, torch.Tensor]) -> None:
    common = ("-m", NET, "--matcher", "activation", "--data", "data.safetensors", "-o")
    save_file(spec_of(NET).random(2).apply(pair), "c.safetensors")
    for method in ("reference", "merge-many", "joining"):
        run("merge", *(f"{n}.safetensors" for n in "abc"), *common, f"{method}.safetensors", "--method", method)
        merged = load_file(f"{method}.safetensors")
        assert all(torch.allclose(merged[key], tensor, atol=1e-6) for key, tensor in pair.items())


def test_merge_measures_the_statistics_of_batchnorm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        states = [Normed().state_dict() for _ in range(2)]
        x = torch.randn(32, 3, 8, 8)
    for name, state in zip("ab", states, strict=True):
        torch.save(state, f"{name}.pt")
    save_file({"x": x, "y": torch.zeros(32, dtype=torch.long)}, "data.safetensors")
    args = ("merge", "a.pt", "b.pt", "-m", f"{NETWORKS}:Normed", "--no-align")
    result = run(*args, "-o", "m.pt", "--recalibrate", "--data", "data.safetensors")
    assert "BatchNorm" not in result.stderr
    assert "BatchNorm" in run(*args, "-o", "n.pt").stderr
    module = Normed().eval()
    module.load_state_dict(torch.load("n.pt", weights_only=True))
    expected = pg.recalibrate_batchnorm(module, [(x, None)]).state_dict()
    made = torch.load("m.pt", weights_only=True)
    assert all(torch.allclose(made[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(made["1.running_var"], torch.load("n.pt", weights_only=True)["1.running_var"])
    said = run(*args, "-o", "o.pt", "--recalibrate", code=2).stderr
    assert "say --data" in said


def test_barrier_with_another_matcher(pair: object) -> None:
    args = (
        "barrier",
        "a.safetensors",
        "b.safetensors",
        "-m",
        NET,
        "--data",
        "data.safetensors",
        "--points",
        3,
        "--json",
    )
    lines = json.loads(run(*args, "--matcher", "activation").stdout)["lines"]
    assert lines["aligned"]["barriers"]["loss"] < 1e-6
    assert lines["as given"]["barriers"]["loss"] > 1e-4
    assert "say --data" in run("barrier", "a.safetensors", "b.safetensors", "-m", NET, code=2).stderr
