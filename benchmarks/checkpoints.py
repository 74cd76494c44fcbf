"""Align a large sharded checkpoint from the command line, and measure time and peak memory.

A Llama-shaped configuration is filled with random bf16 weights shard by shard, renumbered by a random element of its
spec, and aligned back in a process of its own: the result must be the first checkpoint, byte for byte.

    python benchmarks/checkpoints.py --layers 630 --hidden 1024 --intermediate 1024   # about 8 GB
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from permgraph import PermutationSpec
from permgraph.cli.models import spec_of
from permgraph.io import Staging, open_checkpoint, write_checkpoint

SHARD = 1 << 30  # bytes
ROOT = str(Path(__file__).parent.parent)
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))}


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


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--max-sweeps", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        spec = make(work / "a", options)
        a = open_checkpoint(work / "a")
        scramble = spec.random(0, every_group=True)
        with Staging(work / "b", {}) as staging:
            write_checkpoint(a, staging, lambda name, tensor: scramble.apply_to(name, tensor))
        parameters = sum(torch.Size(form.shape).numel() for form in a.formats.values())
        print(
            f"checkpoint: {parameters / 1e9:.2f} G parameters, {a.nbytes / 1e9:.2f} GB in {len(a.files)} shards",
            flush=True,
        )
        spec.save(work / "spec.json")
        command = [sys.executable, "-m", "permgraph", "align", "a", "b", "-o", "c", "--spec", "spec.json", "--stream"]
        command += ["--max-sweeps", str(options.max_sweeps), "--json"]
        started, used = time.perf_counter(), cpu_seconds()
        done = subprocess.run(command, cwd=work, env=ENVIRONMENT, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(done.stderr)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
        largest = max(a.formats.values(), key=lambda form: form.nbytes).nbytes / 1024**3
        same = all(filecmp.cmp(file.path, work / "c" / file.path.name, shallow=False) for file in a.files)
        report = json.loads(done.stdout)
        print(
            f"align: {report['outcome']}, {report['sweeps']} sweeps, {seconds:.0f} s ({cpu_seconds() - used:.0f} s of "
            f"processor time), peak memory {peak:.2f} GiB; the largest parameter has {largest:.2f} GiB"
        )
        print(f"the aligned shards are {'byte for byte those' if same else 'NOT those'} of the reference")
        sys.exit(0 if same else 1)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
