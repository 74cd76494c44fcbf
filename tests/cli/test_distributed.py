"""One command in two processes, started by torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from permgraph.cli.models import spec_of

NET = f"{Path(__file__).with_name('networks.py')}:Net"
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0")

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


def launch(*args: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [*LAUNCH, "--standalone", "-m", "permgraph", *map(str, args)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_write_what_one_does(tmp_path: Path) -> None:
    spec = spec_of(NET)
    generator = torch.Generator().manual_seed(0)
    a = {name: torch.randn(shape, generator=generator) for name, shape in spec.shapes.items()}
    save_file(a, tmp_path / "a.safetensors")
    save_file(spec.random(1, every_group=True).apply(a), tmp_path / "b.safetensors")
    args = ("align", "a.safetensors", "b.safetensors", "-m", NET, "-o", "c.safetensors", "--json")
    together = launch(*args, "--stream", folder=tmp_path)
    assert together.returncode == 0, together.stderr
    assert json.loads(together.stdout)["outcome"] == "converged"  # said once
    found = load_file(tmp_path / "c.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in a.items())
    refused = launch(*args[:-2], "d.safetensors", "--no-stream", folder=tmp_path)  # and nobody waits for ever
    assert refused.returncode != 0
    assert "say --stream" in refused.stderr
    assert not (tmp_path / "d.safetensors").exists()
