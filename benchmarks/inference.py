"""What `auto_spec` costs, next to one fake forward pass and next to `torch.export` with decompositions.

    python benchmarks/inference.py [--rounds 5] [--models resnet50 vit_b_16 ...]
    python benchmarks/inference.py --passes [--models resnet50 llama ...]

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

With `--passes`, what all passes cost next to the first alone: `auto_spec(model)` and `auto_spec(model, vary=False)`,
which both find the inputs for themselves, and `auto_spec(model, symmetry="general")`. The least of the rounds of each;
transformers at real size and the largest have no weights (meta device).
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
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch._dynamo  # the first fake tensor imports it, and imports are not what is measured
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.zoo import operators

operators.declare()

from torchvision import models  # noqa: E402

from permgraph import PermutationSpec, auto_spec  # noqa: E402
from permgraph.capture import capture  # noqa: E402
from permgraph.capture.environment import mkldnn  # noqa: E402
from permgraph.inference.auto_spec import spec_of  # noqa: E402

MODELS = ("resnet50", "densenet121", "vit_b_16", "swin_t")
SIZE = (2, 3, 224, 224)
WITH_ALL_PASSES = (*MODELS, "bert", "gpt2", "llama-7b", "mixtral-8x7b", "llama-3-70b")
PASSES = ("all passes", "first alone", "all / first", "general", "general / permutations", "solved", "alike")
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


def built(name: str) -> nn.Module:
    """A model of torchvision, or one of transformers at real size on the meta device."""
    if name in MODELS or hasattr(models, name):
        return cast(nn.Module, getattr(models, name)().eval())
    import transformers

    llama = {"num_key_value_heads": 8, "vocab_size": 128256, "intermediate_size": 28672}
    large = transformers.LlamaConfig(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, **llama)
    kind, config = {
        "bert": (transformers.AutoModel, transformers.BertConfig()),
        "gpt2": (transformers.AutoModelForCausalLM, transformers.GPT2Config()),
        "llama-7b": (transformers.AutoModelForCausalLM, transformers.LlamaConfig()),
        "mixtral-8x7b": (transformers.AutoModelForCausalLM, transformers.MixtralConfig()),
        "llama-3-70b": (transformers.AutoModelForCausalLM, large),
    }[name]
    with torch.device("meta"):
        return cast(nn.Module, kind.from_config(config).eval())


def passes(name: str, rounds: int) -> dict[str, float]:
    """What all passes of a model cost next to the first one alone, and general symmetries next to permutations."""
    model = built(name)
    runs: dict[str, Callable[[], PermutationSpec]] = {
        "all passes": lambda: auto_spec(model),
        "first alone": lambda: auto_spec(model, vary=False),
        "general": lambda: auto_spec(model, symmetry="general"),
    }
    spec = runs["all passes"]()
    found = [{column: seconds(run) for column, run in runs.items()} for _ in range(rounds)]
    row = {column: min(figures[column] for figures in found) for column in runs}
    counts = Counter(one.outcome for one in spec.passes)
    row["all / first"] = row["all passes"] / row["first alone"]
    row["general / permutations"] = row["general"] / row["all passes"]
    return {**row, "solved": counts["solved"], "alike": counts["alike"]}


def resident() -> int:
    """Bytes of this process in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--passes", action="store_true", help="all passes next to the first alone")
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
    if options.passes:
        print("| model | " + " | ".join(PASSES) + " |")
        print("| --- |" + " ---: |" * len(PASSES))
        for name in options.models or WITH_ALL_PASSES:
            row = passes(name, options.rounds)
            print(f"| {name} | " + " | ".join(f"{row[column]:.3g}" for column in PASSES) + " |", flush=True)
        return
    print("| model | | " + " | ".join(COLUMNS) + " |")
    print("| --- | --- |" + " ---: |" * len(COLUMNS))
    for name in options.models or MODELS:
        for how, found in (("warm", warm(name, options.rounds)), ("cold", cold(name))):
            row = {**found, **ratios(found)}
            cells = (f"{row[column]:.3g}" if column in row else "" for column in COLUMNS)
            print(f"| {name} | {how} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
