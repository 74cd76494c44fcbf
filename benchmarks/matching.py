"""Weight matching against a plain reading of the Git Re-Basin paper and the package rebasin: time, objective, memory.

    python benchmarks/matching.py --threads 2 --repeats 3 mlp512 vgg16_bn resnet18 resnet50

    python benchmarks/matching.py --threads 1 --cpu --rebasin --memory resnet18

The plain reading recomputes every Gram matrix in full, solves with scipy, and takes one group at a time, over the
same spec, in random order, from the identity. Pairs of runs alternate; the ratio is the median of the pairs. On a
machine that others use too, `--cpu` counts the process's own time instead of the clock's. `--rebasin` needs the
package of that name (pip install --no-deps rebasin), is given the same two models and a batch of one, and is measured
as users call it; its objective is that of the permuted model that it returns.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

import permgraph
from benchmarks.zoo import operators
from permgraph.expressions import Fixed, Ref
from permgraph.matching import WeightMatching
from permgraph.matching.objective import STATISTICS, pair
from permgraph.spec import PermutationSpec

State = dict[str, torch.Tensor]


def mlp(width: int) -> nn.Sequential:
    sizes = [784, width, width, width, 10]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    """A block of a CIFAR ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.short = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.short(x))


def resnet20(width: int) -> nn.Sequential:
    channels = [16 * width, 32 * width, 64 * width]
    blocks: list[nn.Module] = [nn.Conv2d(3, channels[0], 3, 1, 1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()]
    inputs = channels[0]
    for stage, outputs in enumerate(channels):
        for block in range(3):
            blocks.append(Residual(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def torchvision_model(name: str) -> nn.Module:
    operators.declare()
    import torchvision

    return torchvision.models.get_model(name)  # type: ignore[no-any-return]


def llama() -> nn.Module:
    """The shape of a Llama of 160 million parameters."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp512": lambda: mlp(512),
    "mlp4096": lambda: mlp(4096),
    "vgg16_bn": lambda: torchvision_model("vgg16_bn"),
    "resnet20x1": lambda: resnet20(1),
    "resnet20x4": lambda: resnet20(4),
    "resnet20x16": lambda: resnet20(16),
    "resnet18": lambda: torchvision_model("resnet18"),
    "resnet50": lambda: torchvision_model("resnet50"),
    "vit_b_16": lambda: torchvision_model("vit_b_16"),
    "llama_160m": lambda: llama(),
}
INPUTS = {"mlp512": (1, 784), "mlp4096": (1, 784), "resnet20x1": (1, 3, 32, 32), "resnet20x4": (1, 3, 32, 32),
          "resnet20x16": (1, 3, 32, 32), "vgg16_bn": (1, 3, 224, 224), "resnet18": (1, 3, 224, 224),
          "resnet50": (1, 3, 224, 224), "vit_b_16": (1, 3, 224, 224)}  # fmt: skip


def plain(a: State, b: State, spec: PermutationSpec, seed: int, max_sweeps: int = 100) -> tuple[float, int]:
    """Algorithm 1 of the paper, for specs in which every axis is one group, or fixed. Returns objective and sweeps."""
    compared = pair(a, b, spec)
    where: dict[str, list[tuple[str, int]]] = {name: [] for name in spec.moving}
    for name in compared.a:
        for dim, axis in enumerate(spec.axes[name]):
            if not isinstance(axis, Ref | Fixed):
                raise SystemExit(f"the plain reading knows no axis such as {axis} ({name})")
            if isinstance(axis, Ref) and axis.group in where:
                where[axis.group].append((name, dim))
    permutation = {name: np.arange(spec.groups[name].size) for name in where}

    def permuted(name: str, but: int | None) -> torch.Tensor:
        tensor = compared.b[name]
        for dim, axis in enumerate(spec.axes[name]):
            if isinstance(axis, Ref) and axis.group in permutation and dim != but:
                tensor = tensor.index_select(dim, torch.from_numpy(permutation[axis.group]))
        return tensor

    rng = np.random.default_rng(seed)
    names = list(where)
    sweeps, progress = 0, True
    while progress and sweeps < max_sweeps:
        sweeps, progress = sweeps + 1, False
        for number in rng.permutation(len(names)):
            group = names[number]
            n = spec.groups[group].size
            gram = torch.zeros(n, n)
            for name, dim in where[group]:
                left = compared.a[name].movedim(dim, 0).reshape(n, -1)
                right = permuted(name, dim).movedim(dim, 0).reshape(n, -1)
                gram += left @ right.T
            cost = gram.numpy()
            _, columns = linear_sum_assignment(cost, maximize=True)
            rows = np.arange(n)
            old, new = cost[rows, permutation[group]].sum(dtype=float), cost[rows, columns].sum(dtype=float)
            if new > old * (1 + 1e-6) + 1e-12:
                progress = True
                permutation[group] = columns
    return compared.inner(compared.a, {name: permuted(name, None) for name in compared.a}), sweeps


def models(name: str, seed: int) -> State:
    torch.manual_seed(seed)
    return dict(MODELS[name]().state_dict())


def ours(a: State, b: State, spec: PermutationSpec, seed: int, init: str) -> tuple[float, int]:
    found = WeightMatching(init=init).match(a, b, spec, seed)  # type: ignore[arg-type]
    return found.objective, found.sweeps


def rebasin(name: str, a: State, b: State, spec: PermutationSpec) -> tuple[float, int]:
    from rebasin import PermutationCoordinateDescent

    one, other = MODELS[name](), MODELS[name]()
    one.load_state_dict(a)
    other.load_state_dict(b)
    search = PermutationCoordinateDescent(one, other, torch.zeros(INPUTS[name]))
    search.rebasin()
    compared = pair(a, dict(other.state_dict()), spec)
    return compared.inner(compared.a, compared.b), 0


def timed(run: Callable[[], tuple[float, int]], clock: Callable[[], float]) -> tuple[float, float, int]:
    start = clock()
    objective, sweeps = run()
    return clock() - start, objective, sweeps


def peak(name: str, method: str, threads: int) -> float:
    """Peak memory in MB of one run, in a process of its own, above what holds the two models (Linux only)."""
    init = "identity" if "identity" in method else "barycentre"
    run = "m.plain(a, b, spec, 0, 2)" if method == "plain" else f"m.ours(a, b, spec, 0, {init!r})"
    code = f"""
import re, sys; sys.path.insert(0, "benchmarks")
import torch, matching as m
def status(field): return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
torch.set_num_threads({threads})
spec = m.permgraph.auto_spec(m.MODELS[{name!r}]())
a, b = m.models({name!r}, 0), m.models({name!r}, 1)
open("/proc/self/clear_refs", "w").write("5")  # the peak so far was the imports'
before = status("VmRSS")
{run}
print(status("VmHWM") - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(out.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["mlp512", "resnet20x4", "resnet18"], metavar="MODEL",
                        help=", ".join(MODELS))  # fmt: skip
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="paired runs, each on a pair of models of its own")
    parser.add_argument("--ours-only", action="store_true", help="without the plain reading, which can take minutes")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, in processes of their own")
    parser.add_argument("--rebasin", action="store_true", help="also run the package rebasin")
    parser.add_argument("--cpu", action="store_true", help="measure CPU time of the process, not the clock's")
    chosen = parser.parse_args()
    clock = time.process_time if chosen.cpu else time.perf_counter
    torch.set_num_threads(chosen.threads)
    print(
        f"{chosen.threads} threads, {chosen.repeats} pairs of random models, medians; ignored: {', '.join(STATISTICS)}"
    )
    print(f"{'model':12} {'method':22} {'seconds':>9} {'ratio':>7} {'sweeps':>7} {'objective':>14} {'peak MB':>8}")
    for name in chosen.models:
        spec = permgraph.auto_spec(MODELS[name]())
        methods: dict[str, Callable[[State, State, int], tuple[float, int]]] = {
            "permgraph, identity": lambda a, b, seed, spec=spec: ours(a, b, spec, seed, "identity"),
            "permgraph, barycentre": lambda a, b, seed, spec=spec: ours(a, b, spec, seed, "barycentre"),
        }
        if not chosen.ours_only:
            methods = {"plain": lambda a, b, seed, spec=spec: plain(a, b, spec, seed), **methods}
        if chosen.rebasin and name in INPUTS:
            methods["rebasin"] = lambda a, b, seed, name=name, spec=spec: rebasin(name, a, b, spec)
        runs: dict[str, list[tuple[float, float, int]]] = {method: [] for method in methods}
        for repeat in range(chosen.repeats):
            a, b = models(name, 2 * repeat), models(name, 2 * repeat + 1)
            for method, run in methods.items():
                runs[method].append(timed(lambda run=run, a=a, b=b, repeat=repeat: run(a, b, repeat), clock))
        reference = next(iter(methods))
        for method, results in runs.items():
            ratio = statistics.median(p[0] / r[0] for p, r in zip(runs[reference], results, strict=True))
            measured = chosen.memory and method != "rebasin"
            memory = f"{peak(name, method, chosen.threads):8.0f}" if measured else ""
            seconds, sweeps = (statistics.median(r[column] for r in results) for column in (0, 2))
            objective = statistics.mean(r[1] for r in results)
            print(
                f"{name:12} {method:22} {seconds:9.2f} {ratio:6.1f}x {sweeps:7.0f} {objective:14.4f} {memory}",
                flush=True,
            )


if __name__ == "__main__":
    main()
