"""Two processes on this machine, for tests of what several do together."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import torch.multiprocessing as mp


def run_two(work: Callable[[int, int, str], None], folder: Path) -> None:
    """Call ``work(rank, port, folder)`` in two new processes, with a port that is free for them to meet at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=2)
