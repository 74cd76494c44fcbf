"""What aligning two models costs, by estimate and in truth: tables of docs/scale.md.

    python benchmarks/scale.py                 # models that no one machine holds, by estimate
    python benchmarks/scale.py check           # smaller ones, each estimate beside what a run took
    python benchmarks/scale.py check resnet18  # of some

The large models are built without weights. Counts come from `permgraph.matching.cost`; seconds from this machine's
calibration with one thread, and from a machine on paper whose figures are stated. A check aligns two random networks of
an architecture in a process of its own, for one sweep of `WeightMatching`, and measures that process's processor time
and how much its peak of resident memory lies above what it held before there were networks.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import permgraph as pg
from benchmarks.zoo import operators
from benchmarks.zoo.sizes import SIZES
from permgraph.matching.cost import Estimate, calibrate, estimate

ON_PAPER = {"flops": 50e12, "read": 5e9, "network": 25e9}  # bytes and operations a second; assignments as on this one
WORKERS = (1, 2, 8, 64)
PASSES = 6
BF16 = 2


def mlp() -> nn.Module:
    layers = [nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)]
    return nn.Sequential(*layers)


def torchvision_model(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name)  # type: ignore[no-any-return]


def vit_small() -> nn.Module:
    import timm

    return timm.create_model("vit_small_patch16_224")  # type: ignore[no-any-return]


def llama() -> nn.Module:
    import transformers

    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 8192}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=12, num_key_value_heads=4)
    return transformers.LlamaForCausalLM(config)


def mixture() -> nn.Module:
    import transformers

    sizes = {"hidden_size": 256, "num_hidden_layers": 3, "vocab_size": 4096, "num_experts": 16}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    config = transformers.Qwen3MoeConfig(
        **sizes, **heads, moe_intermediate_size=256, num_experts_per_tok=2, experts_implementation="eager"
    )
    return transformers.Qwen3MoeForCausalLM(config)


CHECKED: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "resnet18": lambda: torchvision_model("resnet18"),
    "resnet50": lambda: torchvision_model("resnet50"),
    "vit_small": vit_small,
    "llama": llama,
    "mixture": mixture,
}


def check(name: str) -> dict[str, float]:
    """Align two networks of one architecture, and compare with the estimate; in a process of its own."""
    operators.provide()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = CHECKED[name]()
    spec = pg.auto_spec(made)
    cost = estimate(spec)
    rates = calibrate(8)
    a = {key: tensor.clone() for key, tensor in made.state_dict().items()}
    with torch.no_grad():
        for tensor in a.values():
            if tensor.is_floating_point():
                tensor.normal_()
    del made
    gc.collect()
    size = sum(tensor.nbytes for tensor in a.values())
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    held = _resident("VmRSS") - size
    b = spec.random(1, every_group=True).apply(a)
    with torch.no_grad():
        for tensor in b.values():
            if tensor.is_floating_point():
                tensor += torch.randn_like(tensor)
    started = time.process_time()
    fit = pg.WeightMatching(max_sweeps=1).match(a, b, spec)
    used = time.process_time() - started
    gram = sum(move.seconds(rates)[0] for move in cost.moves)
    return {
        "parameters": cost.elements,
        "flops": cost.flops,
        "gram": gram,
        "solving": sum(move.seconds(rates)[1] for move in cost.moves),
        "estimated": cost.seconds(rates, passes=len(fit.runs) * len(fit.history)),
        "measured": used,
        "memory": cost.memory(),
        "peak": _resident("VmHWM") - held,
        "rate": rates.flops,
    }


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def check_all(names: list[str]) -> None:
    """Each in a process of its own, as rows of a table."""
    print("| model | parameters | estimated s | measured s | ratio | estimated GiB | measured GiB | ratio |")
    print("| --- " * 8 + "|", flush=True)
    for name in names:
        command = [sys.executable, __file__, "check", "--one", name]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        seconds, measured = found["estimated"], found["measured"]
        memory, peak = found["memory"] / 2**30, found["peak"] / 2**30
        print(
            f"| {name} | {found['parameters'] / 1e6:,.1f} M "
            f"| {seconds:.2f} | {measured:.2f} | {seconds / measured:.2f} "
            f"| {memory:.2f} | {peak:.2f} | {memory / peak:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="'check', and which models")
    parser.add_argument("--one", choices=CHECKED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(check(options.one)))
    elif options.what[:1] == ["check"]:
        check_all(options.what[1:] or list(CHECKED))
    else:
        on_paper_and_here()


def on_paper_and_here() -> None:
    """The models that no one machine holds."""
    operators.provide()
    torch.set_num_threads(1)
    here = calibrate(8)
    on_paper = dataclasses.replace(here, **ON_PAPER)
    print(f"this machine: {here}\non paper: {on_paper}\n")
    costs: dict[str, Estimate] = {}
    for name in [name for name in SIZES if "layers" not in name and "nested" not in name]:
        with torch.device("meta"):
            model = SIZES[name]()
        costs[name] = estimate(pg.auto_spec(model))
    print("| model | PFLOP | assignments | largest Gram GiB | in memory GiB | streamed GiB | read GiB |")
    print("| --- " * 7 + "|")
    for name, cost in costs.items():
        problems = ", ".join(f"{count:,} of {size:,}" for size, count in list(cost.problems.items())[:4])
        print(
            f"| {name} | {cost.flops / 1e15:.3g} | {problems} | {cost.gram / 2**30:.2f} "
            f"| {cost.memory(BF16) / 2**30:,.0f} | {cost.memory(BF16, streamed=True) / 2**30:.1f} "
            f"| {cost.read(BF16) / 2**30:,.0f} |"
        )
    print(f"\nHours for {PASSES} passes, streamed from bf16, every pass computed in full:\n")
    print(f"| model | machine | {' | '.join(f'{n} workers' for n in WORKERS)} |")
    print("| --- | --- " + "| --- " * len(WORKERS) + "|")
    for name, cost in costs.items():
        for machine, rates in (("this one, one thread", here), ("on paper", on_paper)):
            hours = [cost.seconds(rates, passes=PASSES, workers=n, streamed=True, width=BF16) / 3600 for n in WORKERS]
            print(f"| {name} | {machine} | {' | '.join(f'{h:,.3g}' for h in hours)} |")


if __name__ == "__main__":
    main()
