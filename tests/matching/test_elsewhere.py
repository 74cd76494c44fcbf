"""Models whose tensors lie in parts on two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import permgraph as pg
from tests.matching.processes import run_two

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3)).eval()


def work(rank: int, port: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    spec = pg.auto_spec(net(0))
    parted = net(1)
    for layer in parted:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    state = parted.state_dict()
    assert all(isinstance(tensor, DTensor) for tensor in state.values())
    assert state["0.weight"].to_local().shape == (6, 5)
    with pytest.raises(pg.errors.CaptureError, match=r"^0 has been through fully_shard.*pass spec="):
        pg.auto_spec(parted, torch.randn(2, 5))
    fit = pg.align(net(0), state, spec=spec)
    assert all(fit.state_dict[name].placements == state[name].placements for name in state)
    also = {name: fit.permutation.apply_to(name, tensor).full_tensor() for name, tensor in state.items()}
    parted.load_state_dict(fit.state_dict)  # FSDP takes its own layout back
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    found = {name: tensor.full_tensor() for name, tensor in parted.state_dict().items()}
    merged = pg.merge([net(0), state], spec=spec)
    mean, between = pg.average([state, net(0)]), pg.interpolate(state, net(0), 0.25)
    for mixed in (mean, between):
        assert all(mixed[name].placements == state[name].placements for name in state)
    barrier = pg.barrier(net(0), state, lambda model: float(model(inputs).square().mean()), points=3)
    combined = {
        "merged": merged.state_dict,
        "mean": {name: tensor.full_tensor() for name, tensor in mean.items()},
        "between": {name: tensor.full_tensor() for name, tensor in between.items()},
        "losses": torch.tensor(barrier.losses),
    }
    torch.save({"state": found, "also": also, "output": parted(inputs).detach(), **combined}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_fsdp_models_align_as_whole_ones_do(tmp_path: Path) -> None:
    run_two(work, tmp_path)
    expected = pg.align(net(0), net(1))
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, tensor in expected.state_dict.items():
            assert torch.equal(found["state"][name], tensor)
            assert torch.equal(found["also"][name], tensor)
        aligned = net(1)  # as `parted` was, by the time that it was merged
        aligned.load_state_dict(expected.state_dict)
        whole = net(0), aligned
        losses = pg.barrier(*whole, lambda model: float(model(inputs).square().mean()), points=3).losses
        assert found["losses"].tolist() == pytest.approx(losses)
        for key, state in (
            ("merged", pg.merge(whole).state_dict),
            ("mean", pg.average(whole[::-1])),
            ("between", pg.interpolate(whole[1], whole[0], 0.25)),
        ):
            assert all(torch.equal(found[key][name], tensor) for name, tensor in state.items())
        torch.testing.assert_close(found["output"], net(1)(inputs))


def offloaded(seed: int, how: str, folder: Path) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    if how == "cpu":
        return accelerate.cpu_offload(net(seed), execution_device="cpu")
    if how == "disk":
        return accelerate.disk_offload(net(seed), folder / str(seed), execution_device="cpu")
    places = {"0": "cpu", "2": "disk", "4": "cpu"}
    return accelerate.dispatch_model(net(seed), places, main_device="cpu", offload_dir=folder / str(seed))


@pytest.mark.parametrize("how", ["cpu", "disk", "both"])
def test_offloaded_models_align_as_whole_ones_do(how: str, tmp_path: Path) -> None:
    a, b = (offloaded(seed, how, tmp_path) for seed in (0, 1))
    inputs = torch.randn(4, 5)
    before = b(inputs)
    assert pg.auto_spec(b) == pg.auto_spec(net(1))
    assert pg.auto_spec(b).moving
    found, expected = pg.align(a, b), pg.align(net(0), net(1))
    for name, tensor in expected.state_dict.items():
        assert torch.equal(found.state_dict[name], tensor)
    with pytest.raises(pg.errors.MismatchError, match="offloaded"):
        found.model()
    assert torch.equal(b(inputs), before)
    assert b[0].weight.is_meta == (how != "both")  # the hooks are still at work


class Stubborn(nn.Sequential):
    """Cannot be copied."""

    def __deepcopy__(self, memo: object) -> nn.Module:
        raise TypeError("no")


def test_an_offloaded_model_that_cannot_be_copied() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = Stubborn(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    whole = pg.auto_spec(model)
    assert pg.auto_spec(accelerate.cpu_offload(model, execution_device="cpu")) == whole
