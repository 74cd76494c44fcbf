"""What `auto_spec` costs, next to one fake forward pass and next to `torch.export` with decompositions.

    python benchmarks/inference.py [--rounds 5] [--models resnet50 vit_b_16 ...]

What is compared, for one model in evaluation mode and a batch of two images:

- *fake*: parameters, buffers and images are turned into fake tensors, and `forward` runs on them once. `auto_spec`
  has to turn them too, so the turning is part of it.
- *fused off*: the same without the fast path of `nn.MultiheadAttention`, fused attention and mkldnn. A fast path runs
  one opaque operator where there would be many, and is no pass from which structure could be read.
- *auto_spec*: capture and inference, with the inputs given.
- *infer general*: the inference of general symmetries from the same pass, in place of *infer*; *general /
  permutations* is what capture and inference take with it, next to what they take without.
- *export*: `torch.export.export(model, inputs).run_decompositions()`.

*Warm* is the median of rounds in one process that has done all of it before, so that torch's cache of what operators do
to fake tensors is full; the kinds alternate within each round. *Cold* is the first call in a fresh process after all
imports, one process for each kind: what one waits for who asks once. All figures are seconds of processor time on one
thread, which other load disturbs least. Peak memory is that of `auto_spec` alone, of models on the meta device, in a
process of its own, above what importing the libraries takes.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # the first fake tensor imports it, and imports are not what is measured
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.zoo import operators

operators.declare()

from torchvision import models  # noqa: E402

from permgraph.capture import capture  # noqa: E402
from permgraph.capture.environment import mkldnn  # noqa: E402
from permgraph.inference.auto_spec import spec_of  # noqa: E402

MODELS = ("resnet50", "densenet121", "vit_b_16", "swin_t")
SIZE = (2, 3, 224, 224)
COLUMNS = (
    "fake", "fused off", "capture", "infer", "infer general", "general / permutations", "auto_spec / fake",
    "auto_spec / fused off", "export", "export / auto_spec", "MiB",
)  # fmt: skip


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def fake_pass(model: nn.Module, images: Tensor) -> object:
    """One forward pass of the model on fake tensors, and nothing else."""
    mode = FakeTensorMode()
    state = {key: mode.from_tensor(tensor) for key, tensor in model.state_dict().items()}
    with mode, torch.no_grad():
        return torch.func.functional_call(model, state, (mode.from_tensor(images),))


def fake_pass_without_fused_kernels(model: nn.Module, images: Tensor) -> object:
    before = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, before)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(mkldnn(False))
        return fake_pass(model, images)


def parts(name: str) -> dict[str, Callable[[], object]]:
    """What is measured of a model, by the name of its column; to infer, one must have captured."""
    model = getattr(models, name)().eval()
    images = torch.zeros(SIZE)
    caught = []

    def catch() -> None:
        caught[:] = [capture(model, (images,))]

    return {
        "fake": lambda: fake_pass(model, images),
        "fused off": lambda: fake_pass_without_fused_kernels(model, images),
        "capture": catch,
        "infer": lambda: spec_of(caught[0]),
        "infer general": lambda: spec_of(caught[0], symmetry="general"),
        "export": lambda: torch.export.export(model, (images,)).run_decompositions(),
    }


def cold(name: str) -> dict[str, float]:
    """Seconds of the first call of each kind, each in a fresh process."""
    return {**_asked("fake", name), **_asked("fused off", name), **_asked("capture", name), **_asked("export", name)}


def _asked(kind: str, name: str) -> dict[str, float]:
    run = [sys.executable, __file__, "--cold", kind, name]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    return {column: float(figure) for column, _, figure in (line.rpartition(" ") for line in lines)}


def print_cold(kind: str, name: str) -> None:
    made = parts(name)
    for column in (kind, "infer", "infer general") if kind == "capture" else (kind,):
        print(column, seconds(made[column]))


def warm(name: str, rounds: int) -> dict[str, float]:
    """The median of several rounds that follow a first one."""
    made = parts(name)
    export = made.pop("export")
    for part in made.values():
        part()
    found = [{column: seconds(part) for column, part in made.items()} for _ in range(rounds)]
    medians = {column: statistics.median(figures[column] for figures in found) for column in made}
    export()
    return {**medians, "export": seconds(export), "MiB": peak_memory(name)}


def ratios(found: dict[str, float]) -> dict[str, float]:
    total = found["capture"] + found["infer"]
    return {
        "general / permutations": (found["capture"] + found["infer general"]) / total,
        "auto_spec / fake": total / found["fake"],
        "auto_spec / fused off": total / found["fused off"],
        "export / auto_spec": found["export"] / total,
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--cold", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print_memory(options.memory)
        return
    if options.cold:
        print_cold(*options.cold)
        return
    print("| model | | " + " | ".join(COLUMNS) + " |")
    print("| --- | --- |" + " ---: |" * len(COLUMNS))
    for name in options.models:
        for how, found in (("warm", warm(name, options.rounds)), ("cold", cold(name))):
            row = {**found, **ratios(found)}
            cells = (f"{row[column]:.3g}" if column in row else "" for column in COLUMNS)
            print(f"| {name} | {how} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
