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
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import permgraph as pg
from permgraph.cli.models import spec_of

MODELS = "abc"
NET = f"{Path(__file__).with_name('networks.py')}:Net(64, depth=6)"
SERVER = """
import os, sys, time
import torch
import permgraph.cli.app as cli
torch.set_num_threads(1)
from safetensors.torch import save_file
for line in sys.stdin:
    folder, *args = line.split("\\t")[:-1]
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.chdir(folder)
        try:
            cli.app(args, standalone_mode=True)
        except SystemExit as done:
            os._exit(done.code or 0)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked, so that imports cost nothing")


class Runner:
    """Runs commands in children of one process that has imported everything."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(pg.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def run(
        self, folder: Path, args: list[str], kill_after: float | None = None, begun: Path | None = None
    ) -> tuple[int, float]:
        """How it ended, as `os.waitpid` says, and how long it took; killed so long after `begun` is there, if given."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\t".join([str(folder), *args]) + "\t\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        started = time.perf_counter()
        if kill_after is not None:
            while begun is not None and not begun.exists() and time.perf_counter() - started < 5:
                time.sleep(0.001)
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        status = int(self.process.stdout.readline())
        return status, time.perf_counter() - started


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    runner = Runner()
    yield runner
    runner.process.kill()
    runner.process.wait()


def whole(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three sharded checkpoints, a, b and c, of the spec in net.json."""
    spec = spec_of(NET)
    spec.save(tmp_path / "net.json")
    spec_of(NET, symmetry="general").save(tmp_path / "general.json")
    generator = torch.Generator().manual_seed(0)
    for model in MODELS:
        (tmp_path / model).mkdir()
        placed = {}
        for name, shape in spec.shapes.items():
            placed[name] = f"{name}.safetensors"
            save_file({name: torch.randn(shape, generator=generator)}, tmp_path / model / placed[name])
        (tmp_path / model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return tmp_path


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "command",
    [
        "align a b",
        "align a b --stream",
        "align a b --stream --symmetry general",
        "merge a b c",
        "merge a b c --stream",
        "merge a b c --method reference",
    ],
)
def test_killed_at_any_moment(folder: Path, runner: Runner, command: str, kills: int) -> None:
    spec = "general.json" if "general" in command else "net.json"
    args = [*command.split(), "--spec", spec, "--json", "-o"]
    assert runner.run(folder, [*args, "warm"])[0] == 0
    status, seconds = runner.run(folder, [*args, "expected"])
    assert status == 0
    inputs = {model: whole(folder / model) for model in MODELS}
    expected = whole(folder / "expected")
    moments = random.Random(0)
    number = killed = going_on = 0
    while killed < kills:
        out = folder / f"out{number}"
        staging = folder / f".{out.name}.permgraph"
        # Every other time the clock starts once something is written, and half of these kills come at once: however
        # fast the rest is written, some runs are killed in it.
        begun = staging / "journal.json" if moments.random() < 0.5 else None
        share = 1.1 if begun is None else moments.choice((0, 0.5))
        status, _ = runner.run(folder, [*args, out.name], moments.uniform(0, share) * seconds, begun)
        assert status in (0, signal.SIGKILL)
        killed += status == signal.SIGKILL
        assert {model: whole(folder / model) for model in MODELS} == inputs
        if out.exists():
            assert whole(out) == expected
            number += 1
        elif moments.random() < 0.5:  # else it is killed again on its way
            going_on += staging.exists()
            assert runner.run(folder, [*args, out.name])[0] == 0
            assert whole(out) == expected
            assert not staging.exists()
            number += 1
    assert {model: whole(folder / model) for model in MODELS} == inputs
    assert going_on or kills < 10, "no run had begun to write when it was killed"
