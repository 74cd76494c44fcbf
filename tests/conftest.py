"""What every test shares: one thread, deterministic hypothesis, a torchvision that imports on any build of torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from benchmarks.zoo import operators

torch.set_num_threads(1)

settings.register_profile(
    "deterministic",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("deterministic")

operators.declare()

LISTED_AS_SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text().splitlines())
"""Single cases of tests that take more than some three seconds, as ``pytest --durations=0`` names them."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid in LISTED_AS_SLOW:
            item.add_marker(pytest.mark.slow)
