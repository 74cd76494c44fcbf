"""Models whose tensors lie in parts on two processes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import permgraph as pg

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
    fit = pg.align(net(0), state, spec=spec)
    assert all(fit.state_dict[name].placements == state[name].placements for name in state)
    also = {name: fit.permutation.apply_to(name, tensor).full_tensor() for name, tensor in state.items()}
    parted.load_state_dict(fit.state_dict)  # FSDP takes its own layout back
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    found = {name: tensor.full_tensor() for name, tensor in parted.state_dict().items()}
    torch.save({"state": found, "also": also, "output": parted(inputs).detach()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_fsdp_models_align_as_whole_ones_do(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=2)
    expected = pg.align(net(0), net(1))
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, tensor in expected.state_dict.items():
            assert torch.equal(found["state"][name], tensor)
            assert torch.equal(found["also"][name], tensor)
        torch.testing.assert_close(found["output"], net(1)(inputs))
