"""What is said of a batch that a network cannot take, and what is not said of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import permgraph as pg
from permgraph.errors import EvaluationError
from permgraph.networks.batches import fitting

BATCHES = [(torch.randn(8, 4), torch.randint(3, (8,)))]


class Raises(nn.Module):
    """A network that raises this when it is run on more than a fake tensor."""

    error: BaseException | None = None

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if Raises.error is not None and type(x) is torch.Tensor:
            raise Raises.error
        return self.down(torch.relu(self.up(x)))


RUNS: dict[str, Callable[[nn.Module, nn.Module, pg.PermutationSpec], Any]] = {
    "activations": lambda a, b, spec: pg.align(a, b, pg.ActivationMatching(BATCHES), spec=spec),
    "straight through": lambda a, b, spec: pg.align(a, b, pg.StraightThrough(BATCHES), spec=spec),
    "Sinkhorn": lambda a, b, spec: pg.align(a, b, pg.Sinkhorn("midpoint", BATCHES), spec=spec),
    "barrier": lambda a, b, spec: pg.barrier(a, b, pg.evaluate_on(BATCHES), points=2),
    "curve": lambda a, b, spec: pg.fit_curve(a, b, BATCHES, epochs=1),
    "repair": lambda a, b, spec: pg.repair(a, BATCHES, (a, b)),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("error", "expected", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "^CUDA out of memory$"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError, "^DefaultCPUAllocator"),
        (MemoryError(), MemoryError, "^$"),
        (AttributeError("no mask"), EvaluationError, r"cannot run on .* shape \(8, 4\): no mask"),
    ],
)
def test_memory_is_no_fault_of_the_batch(
    monkeypatch: pytest.MonkeyPatch, run: str, error: BaseException, expected: type[BaseException], said: str
) -> None:
    a, b = Raises().eval(), Raises().eval()
    spec = pg.auto_spec(a, BATCHES[0][0])
    monkeypatch.setattr(Raises, "error", error)
    with pytest.raises(expected, match=said) as caught:
        RUNS[run](a, b, spec)
    assert isinstance(caught.value, EvaluationError) is (expected is EvaluationError)


def test_what_is_said_of_a_batch() -> None:
    with (
        pytest.raises(EvaluationError, match=r"what of shape \(2,\) and \(3,\): 'no'"),
        fitting((torch.zeros(2),), {"mask": torch.zeros(3)}, "what"),
    ):
        raise KeyError("no")
    with pytest.raises(pg.errors.MismatchError, match="^said already$"), fitting(()):
        raise pg.errors.MismatchError("said already")
