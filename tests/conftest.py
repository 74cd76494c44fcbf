"""What every test shares: one thread, deterministic hypothesis, a torchvision that imports on any build of torch."""

from __future__ import annotations

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
