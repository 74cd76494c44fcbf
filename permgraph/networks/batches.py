"""Batches for the matchers that run networks: what they may look like, and random numbers that follow from a seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from permgraph.errors import PermgraphError


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators seeded, and as they were afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def require_rereadable(loader: Iterable[Any]) -> None:
    """Refuse a generator, which gives its batches only once."""
    if isinstance(loader, Iterator):
        raise PermgraphError(
            "the loader is a generator, which can be read only once; give a DataLoader or a list of batches"
        )


def batches(loader: Iterable[Any], what: str) -> Iterator[tuple[int, Any]]:
    """The batches of a loader, counted from 1.

    Raises:
        PermgraphError: there is none; `what` names the method that needs some.
    """
    number = 0
    for number, batch in enumerate(loader, 1):
        yield number, batch
    if not number:
        raise PermgraphError(f"the loader yielded no batch: {what} needs some")


def split(batch: Any, device: torch.device, number: int) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]:
    """A batch as the network's arguments and the targets."""
    if isinstance(batch, Mapping) and "labels" in batch:
        kwargs = {key: to(value, device) for key, value in batch.items()}
        return (), kwargs, kwargs.pop("labels")
    if isinstance(batch, Sequence) and len(batch) > 1:
        *inputs, targets = (to(value, device) for value in batch)
        return tuple(inputs), {}, targets
    raise PermgraphError(
        f"batch {number} of the loader, a {type(batch).__name__}, holds no targets: give tuples (inputs, targets), "
        f"or mappings with 'labels'"
    )


def size(batch: Any) -> int:
    """The number of samples, as the targets count them."""
    targets = batch.get("labels") if isinstance(batch, Mapping) else batch[-1] if isinstance(batch, Sequence) else None
    return len(targets) if isinstance(targets, torch.Tensor) and targets.ndim else 1


def to(value: Any, device: torch.device) -> Any:
    """A tensor on the device; anything else as it is."""
    return value.to(device) if isinstance(value, torch.Tensor) else value
