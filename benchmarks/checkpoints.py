"""Align a large sharded checkpoint from the command line, and measure time and peak memory.

A Llama-shaped configuration is filled with random bf16 weights shard by shard, renumbered by a random element of its
spec, and aligned back in processes of its own: the result must be the first checkpoint, byte for byte, whether one
process did it or several did together. The peak of each process is its own high-water mark of resident memory, as
the kernel keeps it, and so needs Linux.

    # about 8 GB
    python benchmarks/checkpoints.py --layers 630 --hidden 1024 --intermediate 1024 --max-sweeps 1 --workers 2 1
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from benchmarks.zoo import operators
from permgraph import PermutationSpec
from permgraph.cli.models import spec_of
from permgraph.io import Staging, open_checkpoint, write_checkpoint

SHARD = GIB = 1 << 30  # bytes
ROOT = str(Path(__file__).parent.parent)
PATHS = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
ENVIRONMENT = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": PATHS}


def make(folder: Path, options: argparse.Namespace) -> PermutationSpec:
    """Write the configuration and random weights, and return the spec."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": options.hidden,
        "intermediate_size": options.intermediate,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 64,
        "num_key_value_heads": max(1, options.hidden // 128),
        "vocab_size": options.vocabulary,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    started = time.perf_counter()
    spec = spec_of(f"hf:{folder}")
    print(f"spec: {len(spec.moving)} groups from the configuration alone in {time.perf_counter() - started:.1f} s")
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in spec.shapes.items():
        count = 2 * torch.Size(shape).numel()
        if size and size + count > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += count
    placed = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {n: torch.randn(s, generator=generator, dtype=torch.bfloat16) for n, s in names.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        placed.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return spec


@dataclass(frozen=True)
class Run:
    """What one command took.

    Attributes:
        report: what it printed, as JSON.
        seconds: from its start to its end.
        processor: seconds of processor time of each process that did the work.
        peaks: bytes that each of them held at its peak, by the kernel's high-water mark.
    """

    report: dict[str, Any]
    seconds: float
    processor: tuple[float, ...]
    peaks: tuple[int, ...]


def run(command: list[str], folder: Path) -> Run:
    """Run a command, and watch the processes that have ``permgraph align`` on their command lines."""
    started = time.perf_counter()
    peaks: dict[int, int] = {}
    used: dict[int, float] = {}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=out, stderr=told, text=True)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            for one in (root, *_children(root)):
                with contextlib.suppress(psutil.Error, OSError, StopIteration):
                    if "torch.distributed.run" in one.cmdline():
                        continue  # it starts the others
                    peaks[one.pid] = max(peaks.get(one.pid, 0), _peak(one.pid))
                    used[one.pid] = sum(one.cpu_times()[:2])
            time.sleep(0.1)
        out.seek(0)
        told.seek(0)
        if process.returncode:
            sys.exit(told.read())
        report = json.loads(out.read())
    seconds = time.perf_counter() - started
    return Run(report, seconds, tuple(used[pid] for pid in peaks), tuple(peaks.values()))


def _children(root: psutil.Process) -> tuple[psutil.Process, ...]:
    with contextlib.suppress(psutil.Error):
        return tuple(root.children(recursive=True))
    return ()


def _peak(pid: int) -> int:
    """The high-water mark of a process, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def align(work: Path, workers: int, options: argparse.Namespace) -> Run:
    """Align b to a by so many processes, and write c."""
    command = [sys.executable, "-m"]
    if workers > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(workers), "-m"]
    command += ["permgraph", "align", "a", "b", "-o", "c", "--overwrite", "--spec", "spec.json", "--stream"]
    return run([*command, "--max-sweeps", str(options.max_sweeps), "--json"], work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--max-sweeps", type=int, default=100)
    parser.add_argument("--workers", type=int, nargs="*", default=[1], help="numbers of processes, each a run")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--keep", action="store_true", help="work in --folder itself, use what is there, and keep it")
    options = parser.parse_args()
    operators.declare()
    if options.keep and options.folder is None:
        parser.error("--keep needs --folder")
    work = options.folder if options.keep else Path(tempfile.mkdtemp(dir=options.folder))
    try:
        same = measure(work, options)
    finally:
        if not options.keep:
            shutil.rmtree(work)
    sys.exit(0 if same else 1)


def measure(work: Path, options: argparse.Namespace) -> bool:
    if not (work / "spec.json").is_file():
        spec = make(work / "a", options)
        a = open_checkpoint(work / "a")
        scramble = spec.random(0, every_group=True)
        with Staging(work / "b", {}) as staging:
            write_checkpoint(a, staging, lambda name, tensor: scramble.apply_to(name, tensor))
        spec.save(work / "spec.json")
    a = open_checkpoint(work / "a")
    parameters = sum(math.prod(form.shape) for form in a.formats.values())
    largest = max(form.nbytes for form in a.formats.values())
    print(
        f"checkpoint: {parameters / 1e9:.2f} G parameters, {a.nbytes / 1e9:.2f} GB in {len(a.files)} shards; "
        f"the largest parameter has {largest / GIB:.2f} GiB",
        flush=True,
    )
    first: dict[str, str] = {}
    for workers in options.workers:
        done = align(work, workers, options)
        digests = {file.path.name: _digest(work / "c" / file.path.name) for file in a.files}
        restored = digests == {file.path.name: _digest(file.path) for file in a.files}
        first = first or digests
        print(
            f"{workers} workers: {done.report['outcome']}, {done.report['sweeps']} sweeps, {done.seconds:.0f} s; "
            f"processor time {', '.join(f'{used:.0f}' for used in done.processor)} s; "
            f"peak memory {', '.join(f'{peak / GIB:.2f}' for peak in done.peaks)} GiB; "
            f"the shards are {'' if restored else 'NOT '}byte for byte those of the reference"
            f"{'' if digests == first else ', AND NOT those of the first run'}",
            flush=True,
        )
        if not restored or digests != first:
            return False
    return True


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
