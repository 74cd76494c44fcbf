"""Kill -9 at random moments: inputs as they were, output absent or whole, and the next run gives the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import permgraph as pg
from permgraph.cli.models import spec_of

NET = f"{Path(__file__).with_name('networks.py')}:Net(64, depth=6)"
SERVER = """
import os, sys, time
import torch
import permgraph.cli.app as cli
torch.set_num_threads(1)
from safetensors.torch import save_file
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        try:
            cli.app(line.split("\\t")[:-1], standalone_mode=True)
        except SystemExit as done:
            os._exit(done.code or 0)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked, so that imports cost nothing"),
]


class Runner:
    """Runs commands in children of one process that has imported everything."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(pg.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=folder,
            env=environment,
        )

    def run(self, args: list[str], kill_after: float | None = None) -> tuple[bool, float]:
        """Whether it succeeded, and how long it took."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\t".join(args) + "\t\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        started = time.perf_counter()
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        status = int(self.process.stdout.readline())
        return status == 0, time.perf_counter() - started


def whole(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    spec = spec_of(NET)
    spec.save(tmp_path / "net.json")
    generator = torch.Generator().manual_seed(0)
    for model in ("a", "b"):
        (tmp_path / model).mkdir()
        placed = {}
        for name, shape in spec.shapes.items():
            placed[name] = f"{name}.safetensors"
            save_file({name: torch.randn(shape, generator=generator)}, tmp_path / model / placed[name])
        (tmp_path / model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return tmp_path


@pytest.mark.parametrize(
    "command", [["align", "a", "b", "--stream"], ["merge", "a", "b"]], ids=["align, streamed", "merge"]
)
def test_killed_at_any_moment(folder: Path, command: list[str]) -> None:
    runner = Runner(folder)
    args = [*command, "--spec", "net.json", "--json", "-o"]
    succeeded, _ = runner.run([*args, "warm"])
    assert succeeded
    succeeded, seconds = runner.run([*args, "expected"])
    assert succeeded
    inputs = {model: whole(folder / model) for model in ("a", "b")}
    expected = whole(folder / "expected")
    moments = random.Random(0)
    unfinished = 0
    for number in range(4):
        out = folder / f"out{number}"
        for _ in range(moments.randint(1, 3)):  # killed again and again
            runner.run([*args, out.name], kill_after=moments.uniform(0, 1.0) * seconds)
            assert not out.exists() or whole(out) == expected
        unfinished += not out.exists()
        if not out.exists():
            assert runner.run([*args, out.name])[0]
        assert whole(out) == expected
    assert unfinished, "no run was killed before its end"
    assert {model: whole(folder / model) for model in ("a", "b")} == inputs
    runner.process.kill()
