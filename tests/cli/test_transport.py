"""What goes with a checkpoint is moved on the command line as the checkpoint was."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import permgraph as pg
from permgraph.cli.app import app
from permgraph.cli.models import spec_of
from tests.cli.networks import Net, Normed

NETWORKS = Path(__file__).with_name("networks.py")
NET = f"{NETWORKS}:Net"
MOVE = ("transport", "fit.safetensors")

Run = Callable[..., Any]
State = dict[str, torch.Tensor]


@functools.cache
def net_spec() -> pg.PermutationSpec:
    return spec_of(NET)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in a folder with a permutation in fit.safetensors."""
    monkeypatch.chdir(tmp_path)
    net_spec().random(1, every_group=True).save("fit.safetensors")
    net_spec().save("net.json")

    def run(*args: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
        assert code == 0 or len(result.stderr.splitlines()) == 1
        return result

    return run


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net()
        optimizer = torch.optim.Adam(net.parameters())
        for _ in range(3):
            net(torch.randn(8, 5)).square().sum().backward()
            optimizer.step()
    return net, optimizer


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_training_checkpoint_with_all_that_is_in_it(run: Run) -> None:
    net, optimizer = trained(0)
    state = net.state_dict()
    whole = {"epoch": 2, "model": state, "ema": {f"module.{n}": t for n, t in state.items()}}
    torch.save({**whole, "optimizer": optimizer.state_dict()}, "whole.pt")
    before = Path("whole.pt").read_bytes()
    run(*MOVE, "whole.pt", "-m", NET, "-o", "moved.pt")
    moved = torch.load("moved.pt", weights_only=True)
    turn = pg.Permutation.load("fit.safetensors", net_spec())
    there = turn.apply(state)
    assert moved["epoch"] == 2 and equal(moved["model"], there)
    assert equal({name.removeprefix("module."): tensor for name, tensor in moved["ema"].items()}, there)
    names = [name for name, _ in net.named_parameters()]
    for index, name in enumerate(names):
        given = optimizer.state_dict()["state"][index]["exp_avg_sq"]
        assert torch.equal(moved["optimizer"]["state"][index]["exp_avg_sq"], turn.apply_to(name, given))
    assert Path("whole.pt").read_bytes() == before
    assert sorted(p.name for p in Path().iterdir()) == ["fit.safetensors", "moved.pt", "net.json", "whole.pt"]


def test_an_optimizer_with_only_a_spec_needs_its_parameters_names(run: Run) -> None:
    net, optimizer = trained(0)
    torch.save(optimizer.state_dict(), "optimizer.pt")
    said = run(*MOVE, "optimizer.pt", "--spec", "net.json", "-o", "moved.pt", code=2).stderr
    assert "optimizer.pt: " in said and "give --parameters, the module" in said and not Path("moved.pt").exists()
    Path("names.txt").write_text("\n".join(name for name, _ in net.named_parameters()) + "\n")
    run(*MOVE, "optimizer.pt", "--spec", "net.json", "--parameters", "names.txt", "-o", "moved.pt")
    run(*MOVE, "optimizer.pt", "-m", NET, "-o", "by-model.pt")
    one, other = (torch.load(name, weights_only=True)["state"] for name in ("moved.pt", "by-model.pt"))
    assert all(torch.equal(one[n]["exp_avg"], other[n]["exp_avg"]) for n in one)
    Path("names.txt").write_text("head.weight\n")
    said = run(*MOVE, "optimizer.pt", "-m", NET, "--parameters", "names.txt", "-o", "again.pt", code=2).stderr
    assert "8 parameters, but 1 names" in said


def test_checkpoints_averages_and_masks_in_safetensors(run: Run) -> None:
    state, turn = trained(0)[0].state_dict(), pg.Permutation.load("fit.safetensors", net_spec())
    there = turn.apply(state)
    save_file(state, "b.safetensors")
    run(*MOVE, "b.safetensors", "-m", NET, "-o", "moved.safetensors")
    assert equal(load_file("moved.safetensors"), there)
    save_file({f"ema.{name}": tensor for name, tensor in state.items()}, "ema.safetensors")
    run(*MOVE, "ema.safetensors", "-m", NET, "-o", "ema-moved.safetensors")
    assert equal(load_file("ema-moved.safetensors"), {f"ema.{name}": tensor for name, tensor in there.items()})
    masks = {name: tensor > 0 for name, tensor in state.items() if name.endswith("weight")}
    save_file(masks, "masks.safetensors")
    run(*MOVE, "masks.safetensors", "-m", NET, "--kind", "mask", "-o", "masks-moved.safetensors")
    assert equal(load_file("masks-moved.safetensors"), {name: there[name] > 0 for name in masks})


def test_over_general_symmetries(run: Run) -> None:
    net, optimizer = trained(0)
    turn = pg.auto_spec(Net(), symmetry="general").random(1)
    turn.save("g.safetensors")
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, "whole.pt")
    run("transport", "g.safetensors", "whole.pt", "-m", NET, "-o", "moved.pt")
    moved = torch.load("moved.pt", weights_only=True)
    for name, tensor in turn.apply(net.state_dict()).items():
        torch.testing.assert_close(moved["model"][name], tensor)
    expected = pg.transport(turn, optimizer, parameters=net)["state"][1]["exp_avg_sq"]
    assert torch.equal(moved["optimizer"]["state"][1]["exp_avg_sq"], expected)


def test_a_fine_tuning_from_one_base_to_another(run: Run, tmp_path: Path) -> None:
    """B is A renumbered, so the fine-tuning of A comes out as the fine-tuning of B."""
    base, _ = trained(0)
    tuned = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in base.state_dict().items()}
    turn = pg.Permutation.load("fit.safetensors", net_spec())
    torch.save(base.state_dict(), "a.pt")
    save_file(tuned, "tuned.safetensors")
    save_file(turn.apply(base.state_dict()), "b.safetensors")
    given = ("transport", "a.pt", "tuned.safetensors", "b.safetensors", "-m", NET)
    data = json.loads(run(*given, "-o", "out.safetensors", "--json").stdout)
    assert data["output"] == "out.safetensors" and data["strength"] == 1 and data["outcome"] == "converged"
    for name, tensor in turn.apply(tuned).items():
        torch.testing.assert_close(load_file("out.safetensors")[name], tensor)
    run(*given, "-o", "half.safetensors", "--strength", "0.5")
    half = {name: (tensor + tuned[name]) / 2 for name, tensor in base.state_dict().items()}
    for name, tensor in turn.apply(half).items():
        torch.testing.assert_close(load_file("half.safetensors")[name], tensor)
    run(*given, "-o", "none.safetensors", "--strength", "0")
    assert equal(load_file("none.safetensors"), turn.apply(base.state_dict()))
    run(*given, "-o", "g.safetensors", "--symmetry", "general")
    x = torch.randn(6, 5)
    net, other = Net(), Net()
    net.load_state_dict(tuned)
    other.load_state_dict(load_file("g.safetensors"))
    torch.testing.assert_close(other(x), net(x), rtol=1e-3, atol=1e-4)


def test_statistics_do_not_become_negative(run: Run) -> None:
    for seed, name in enumerate(("a.pt", "tuned.pt", "b.pt")):
        torch.manual_seed(seed)
        net = Normed()
        net[1].running_var.fill_(3.0 if name == "a.pt" else 1.0)
        torch.save(net.state_dict(), name)
    said = run("transport", "a.pt", "tuned.pt", "b.pt", "-m", f"{NETWORKS}:Normed", "-o", "out.pt").stderr
    assert "measure its statistics anew" in said
    assert torch.load("out.pt", weights_only=True)["1.running_var"].tolist() == [0.0] * 8


def test_what_is_refused(run: Run) -> None:
    net, optimizer = trained(0)
    torch.save(net.state_dict(), "a.pt")
    torch.save(optimizer.state_dict(), "optimizer.pt")
    torch.save({"of_another": torch.ones(3)}, "another.pt")
    pg.auto_spec(Net(7)).random(0).save("narrow.safetensors")
    for args, said in (
        (("a.pt",), "1 paths: give two, FIT FILE, or three"),
        (("a.pt", "optimizer.pt"), "a.pt: neither a permutation nor a transformation"),
        (("none.safetensors", "optimizer.pt"), "none.safetensors: no such file"),
        (("fit.safetensors", "none.pt"), "none.pt: no such file"),
        (("fit.safetensors", "another.pt"), "another.pt: none of the checkpoint's 1 keys"),
        (("narrow.safetensors", "optimizer.pt"), "belongs to another spec"),
        (("a.pt", "a.pt", "a.pt", "--strength", "nan"), "give a finite number"),
        (("a.pt", "a.pt", "a.pt", "--kind", "mask"), "go with FIT FILE"),
        (("a.pt", "another.pt", "a.pt"), "another.pt: "),
    ):
        assert said in run("transport", *args, "-m", NET, "-o", "out.pt", code=2).stderr
    assert "does not say what model" in run(*MOVE, "optimizer.pt", "-o", "out.pt", code=2).stderr
    assert "exists already" in run(*MOVE, "optimizer.pt", "-m", NET, "-o", "a.pt", code=2).stderr
    assert "is the input" in run(*MOVE, "a.pt", "-m", NET, "-o", "a.pt", "--overwrite", code=2).stderr
    assert "give it the ending .pt" in run(*MOVE, "a.pt", "-m", NET, "-o", "out.safetensors", code=2).stderr
    assert not Path("out.pt").exists() and not Path("out.safetensors").exists()


def test_a_folder_of_peft(run: Run, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=23, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=4
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = transformers.BertForMaskedLM(config)
    net.save_pretrained("base")
    spec = spec_of("hf:base")
    turn = spec.random(1, every_group=True)
    turn.save("bert.safetensors")
    name = "bert.encoder.layer.0.attention.self.query"
    adapter = Path("adapter")
    adapter.mkdir()
    factors = {
        f"base_model.model.{name}.lora_A.weight": torch.randn(3, 16),
        f"base_model.model.{name}.lora_B.weight": torch.randn(16, 3),
    }
    save_file(factors, adapter / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "r": 3, "base_model_name_or_path": str(tmp_path / "base"), "fan_in_fan_out": False}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    said = run("transport", "bert.safetensors", "adapter", "-o", "moved").stderr
    assert "as its base, as before: load it on the moved base" in said
    moved = load_file("moved/adapter_model.safetensors")
    b, a = (moved[f"base_model.model.{name}.lora_{word}.weight"] for word in "BA")
    b_before, a_before = (factors[f"base_model.model.{name}.lora_{word}.weight"] for word in "BA")
    torch.testing.assert_close(b @ a, turn.apply_to(f"{name}.weight", b_before @ a_before))
    assert json.loads(Path("moved/adapter_config.json").read_text()) == settings
    # The base itself, as a folder, needs no --model either.
    run("transport", "bert.safetensors", "base", "-o", "base-moved")
    there = transformers.BertForMaskedLM.from_pretrained("base-moved", local_files_only=True).eval()
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(there(tokens).logits, net.eval()(tokens).logits)
