"""Models for the command line to build from this file."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width: int = 24, depth: int = 3) -> None:
        super().__init__()
        sizes = [5, *[width] * depth]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.fc(x).relu())


class Result(NamedTuple):
    logits: torch.Tensor
    features: torch.Tensor


class Features(nn.Module):
    """Returns its 6 features beside the logits, with 4 hidden units between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.hidden, self.head = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> Result:
        features = self.features(x).relu()
        return Result(self.head(self.hidden(features).relu()), features)


def net() -> Net:
    return Net()


def fails() -> Net:
    raise ValueError("out of\ncheese")


def loader() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(16, 5, generator=generator), torch.randint(0, 3, (16,), generator=generator))]


not_a_model = 3


class Waves(nn.Module):
    """Takes waveforms of a length that nobody would guess."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(37, 6), nn.Linear(6, 3)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        if wave.shape[-1] != 3700:
            raise ValueError("too few samples, or too many")
        return self.down(self.up(wave.unflatten(-1, (100, 37)).mean(-2)).relu())


class Mixture(nn.Module):
    """Experts whose outputs a router weighs, and which are modules of their own."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(5, count)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 5)) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = self.router(x).softmax(-1)
        return sum((gates[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts)), torch.zeros_like(x))
