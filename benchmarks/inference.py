"""What `auto_spec` costs, next to one fake forward pass and next to `torch.export` with decompositions.

    python benchmarks/inference.py [--repeats 5] [--models resnet50 vit_b_16 ...]

Each figure is the median of paired runs in one process on one thread: every round times the fake pass, the capture, the
inference and (in the first round only, for it is slow) the export. Peak memory is that of `auto_spec` alone, of models
on the meta device, in a process of its own, above what importing the libraries takes.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

_torchvision_operators = torch.library.Library("torchvision", "DEF")
_torchvision_operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_torchvision_operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from torchvision import models  # noqa: E402

from permgraph.capture import capture  # noqa: E402
from permgraph.infer import spec_of  # noqa: E402

MODELS = ("resnet50", "densenet121", "vit_b_16", "swin_t")
SIZE = (2, 3, 224, 224)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def fake_pass(name: str) -> Callable[[], object]:
    """One forward pass of the model on fake tensors, and nothing else."""
    mode = FakeTensorMode()
    model = getattr(models, name)().eval()
    state = {key: mode.from_tensor(tensor) for key, tensor in model.state_dict().items()}
    images = mode.from_tensor(torch.zeros(SIZE))

    def run() -> object:
        with mode, torch.no_grad():
            return torch.func.functional_call(model, state, (images,))

    return run


def measure(name: str, repeats: int) -> dict[str, float]:
    with torch.device("meta"):
        model = getattr(models, name)().eval()
    images = torch.zeros(SIZE)
    bare = fake_pass(name)
    bare()  # the first pass fills torch's caches
    captured = capture(model, (images,))
    rounds = [
        (seconds(bare), seconds(lambda: capture(model, (images,))), seconds(lambda: spec_of(captured)))
        for _ in range(repeats)
    ]
    fake, caught, inferred = (statistics.median(column) for column in zip(*rounds, strict=True))
    real = getattr(models, name)().eval()
    export = seconds(lambda: torch.export.export(real, (images,)).run_decompositions())
    return {
        "fake": fake,
        "capture": caught,
        "infer": inferred,
        "total / fake": statistics.median((c + i) / f for f, c, i in rounds),
        "export": export,
        "export / total": export / (caught + inferred),
        "MiB": peak_memory(name),
    }


def peak_memory(name: str) -> float:
    """MiB that `auto_spec` of a model on the meta device adds to a fresh process."""
    run = [sys.executable, __file__, "--memory", name]
    return float(subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1])


def print_memory(name: str) -> None:
    with torch.device("meta"):
        model = getattr(models, name)().eval()
    images = torch.zeros(SIZE)
    before = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    spec_of(capture(model, (images,)))
    done.set()
    watcher.join()
    print((peak - before) / 2**20)


def resident() -> int:
    """Bytes of this process in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print_memory(options.memory)
        return
    columns = ("fake", "capture", "infer", "total / fake", "export", "export / total", "MiB")
    print("| model | " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * len(columns))
    for name in options.models:
        found = measure(name, options.repeats)
        print(f"| {name} | " + " | ".join(f"{found[column]:.3g}" for column in columns) + " |", flush=True)


if __name__ == "__main__":
    main()
