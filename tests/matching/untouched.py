"""What a matcher must leave as it was."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def untouched(a: nn.Module, b: nn.Module) -> Iterator[None]:
    """Around a match without gradients, of A in training mode: the models and the random state are left alone."""
    a.train()
    copies = [copy.deepcopy(model.state_dict()) for model in (a, b)]
    random_state = torch.get_rng_state()
    with torch.no_grad():
        yield
    assert torch.equal(torch.get_rng_state(), random_state)
    assert a.training and not b.training
    assert all(p.requires_grad and p.grad is None for model in (a, b) for p in model.parameters())
    for model, state in zip((a, b), copies, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
