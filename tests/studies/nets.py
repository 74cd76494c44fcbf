"""Small networks for studies, and things to measure on them; importable by workers."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import torch
from torch import nn

import permgraph as pg


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    return [(x, x[:, :3].argmax(1))]


def plan(networks: int = 3, **changes: object) -> pg.StudyPlan:
    how: dict[str, object] = {
        "matchers": {"weights": pg.WeightMatching(order="random"), "activations": pg.ActivationMatching(batches())},
        "evaluate": pg.evaluate_on(batches()),
        "points": 3,
    }
    return pg.StudyPlan(net(), {f"n{i}": net(i) for i in range(networks)}, **{**how, **changes})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Deadly:
    """Kills its process at a certain network: the first time, or every time. Others have a loss of 1."""

    weight: float
    marker: str
    always: bool = False

    def __call__(self, model: nn.Module) -> float:
        if model[0].bias[0].item() == self.weight and (self.always or not os.path.exists(self.marker)):
            open(self.marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0


@dataclass(frozen=True)
class Picky:
    """Fails at a certain network."""

    weight: float

    def __call__(self, model: nn.Module) -> float:
        if model[0].bias[0].item() == self.weight:
            raise ArithmeticError("this network\nis not to my taste")
        return 1.0
