"""What a state dict is to this package, and which of its entries are statistics rather than weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch

StateDict: TypeAlias = Mapping[str, torch.Tensor]
"""Names to tensors; it may load a tensor each time that it is asked for one."""

STATISTICS = ("*running_mean", "*running_var", "*num_batches_tracked")
"""Patterns of names that normalisation layers keep: permuted with the rest, but no evidence of which units match."""
