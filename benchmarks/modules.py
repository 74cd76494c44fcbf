"""What it costs to look for modules that change places: inference with them, next to inference without.

    python -m benchmarks.modules [--rounds 3] [--models mlp resnet50 ...]

Each figure is processor time on one thread: *without* and *with* the least of the rounds, which alternate, and
*ratio* is the median of their quotients. Models of libraries are without weights (meta device).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.zoo import operators
from permgraph import auto_spec


class Experts(nn.Module):
    """Experts that a token goes to two of, as Hugging Face wrote Mixtral's."""

    def __init__(self, count: int, width: int = 16, hidden: int = 8) -> None:
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width)) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        mask = nn.functional.one_hot(chosen, len(self.experts)).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            slot, token = torch.where(mask[number])
            made = expert(x[token]) * weights[token, slot, None]
            out.index_add_(0, token, made)
        return out


class Refused(nn.Module):
    """Modules that look alike and do not change places: each result is seen in a place of its own."""

    def __init__(self, count: int, width: int = 16) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width)) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([expert(x) for expert in self.experts], 1)


class Head(nn.Module):
    """One head of attention."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, size) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1) @ self.v(x)


class Block(nn.Module):
    """Attention whose heads are modules, and a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(width, width // heads) for _ in range(heads))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x = x + self.out(torch.cat([head(y) for head in self.heads], -1))
        return cast(Tensor, x + self.down(torch.relu(self.up(self.second(x)))))


class Ensemble(nn.Module):
    """Networks whose results are averaged."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members]).mean(0)


class Residual(nn.Module):
    """A perceptron beside a connection around it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, x + self.down(torch.relu(self.up(x))))


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _torchvision(name: str, **given: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    from torchvision import models

    size = 299 if name.startswith("inception") else 224
    with torch.device("meta"):
        model: nn.Module = getattr(models, name)(**given).eval()
    return model, (torch.zeros(2, 3, size, size),)


def _llama() -> tuple[nn.Module, tuple[Tensor, ...]]:
    import transformers

    config = transformers.LlamaConfig(num_hidden_layers=8)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return model, (torch.zeros(2, 9, dtype=torch.int64),)


def _vectors(model: nn.Module) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return model, (torch.randn(64, 16),)


def _sequences(width: int) -> tuple[Tensor, ...]:
    return (torch.randn(2, 5, width),)


def _ensemble() -> tuple[nn.Module, tuple[Tensor, ...]]:
    members, inputs = zip(*(_torchvision("resnet18") for _ in range(5)), strict=True)
    return Ensemble(list(members)), inputs[0]


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "mlp": lambda: _vectors(_mlp(16, 32, 32, 32, 10)),
    "chain of 64 equal layers": lambda: _vectors(_mlp(*[16] * 65)),
    "64 equal residual blocks": lambda: _vectors(nn.Sequential(*[Residual(16) for _ in range(64)])),
    "resnet50": lambda: _torchvision("resnet50"),
    "vit_b_16": lambda: _torchvision("vit_b_16"),
    "densenet121": lambda: _torchvision("densenet121"),
    "inception_v3": lambda: _torchvision("inception_v3", init_weights=False, aux_logits=False),
    "llama of 8 layers": _llama,
    "8 experts": lambda: _vectors(Experts(8)),
    "64 experts": lambda: _vectors(Experts(64)),
    "256 experts in each of two layers": lambda: _vectors(nn.Sequential(Experts(256), Experts(256))),
    "128 refused": lambda: _vectors(Refused(128)),
    "12 heads in each of 12 layers": lambda: (
        nn.Sequential(*[Block(48, 12) for _ in range(12)]),
        (torch.randn(2, 5, 48),),
    ),
    "ensemble of 5 resnet18": _ensemble,
}


def measured(name: str, rounds: int) -> tuple[float, float, float, str]:
    """Seconds without and with modules, the median of their quotients, and the groups of modules."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    found: list[list[float]] = []
    spec = auto_spec(model, inputs, modules=True, vary=False)
    for _ in range(rounds):
        pair = []
        for modules in (False, True):
            start = time.process_time()
            auto_spec(model, inputs, modules=modules, vary=False)
            pair.append(time.process_time() - start)
        found.append(pair)
    groups = " · ".join(f"{spec.groups[n].size}" for n in sorted(spec.groups_of_modules)) or "none"
    return min(a for a, _ in found), min(b for _, b in found), statistics.median(b / a for a, b in found), groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    operators.declare()
    print("| model | without, s | with, s | ratio | groups of modules |\n| --- | ---: | ---: | ---: | ---: |")
    for name in options.models:
        without, with_modules, ratio, groups = measured(name, options.rounds)
        print(f"| {name} | {without:.2f} | {with_modules:.2f} | {ratio:.2f} | {groups} |", flush=True)


if __name__ == "__main__":
    main()
