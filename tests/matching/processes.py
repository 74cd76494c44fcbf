"""Several processes on this machine, for tests of what they do together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, TensorDataset


def free_port() -> int:
    """A port at which processes can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def run_two(work: Callable[[int, int, str], None], folder: Path) -> None:
    """Call ``work(rank, port, folder)`` in two new processes, with a port that is free for them to meet at."""
    mp.spawn(work, (free_port(), str(folder)), nprocs=2)


def run_alone_and_two(module: str, folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Run a module, which calls `share`, as one process and as two: for each number, what each process has written."""
    place = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {**os.environ, **place}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    found = {}
    for world in (1, 2):
        files = [folder / f"{world}-{rank}.pt" for rank in range(world)]
        running = []
        for rank, file in enumerate(files):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} if world > 1 else {}
            command = [sys.executable, "-m", module, str(file)]
            running.append(subprocess.Popen(command, env={**environment, **own}, cwd=Path(__file__).parents[2]))
        assert [process.wait(timeout=300) for process in running] == [0] * world
        found[world] = [torch.load(file, weights_only=True) for file in files]
    return found


def share(samples: tuple[torch.Tensor, ...], match: Callable[[DataLoader, Any], Any]) -> None:
    """In one process that `run_alone_and_two` starts: match on these samples, and write down what came of it.

    Args:
        samples: tensors of inputs and targets.
        match: what to do with a loader and an accelerator; gives the alignment.
    """
    from accelerate import Accelerator, DataLoaderConfiguration

    torch.set_num_threads(1)
    # The loader's batch is that of all processes together, so each step sees the same samples.
    engine = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    order = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(*samples), batch_size=64, shuffle=True, generator=order)
    fit = match(loader, engine)
    written = {
        "arrays": {name: torch.tensor(array) for name, array in fit.permutation.arrays.items()},
        "state": fit.state_dict,
        "objective": fit.objective,
        "history": [sweep.objective for sweep in fit.history],
        "world": engine.num_processes,
    }
    torch.save(written, sys.argv[1])
    engine.end_training()
