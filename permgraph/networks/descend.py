"""Training weights from which networks are blended: the bends of a curve, the centre of a star.

What is trained is not one network but tensors of which every network on a path is a linear combination. Each step draws
a place on the path, blends the network there, and follows the gradient of its loss back to the tensors that are free.

Places are drawn at random, so steps are noisy however large the batches, and bends that were trained at a constant
rate may end above the line on which they began. So the rate falls, as Garipov et al. (2018) let it: constant for the
first half of the epochs, then linearly to a hundredth at nine tenths.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from permgraph.errors import EvaluationError, NonFiniteError
from permgraph.networks.evaluate import Loader, batches, device_of, fitting, split_batch

Loss: TypeAlias = Callable[[Any, Any], Tensor]
MakeOptimizer: TypeAlias = Callable[[list[Tensor]], torch.optim.Optimizer]
Perturb: TypeAlias = Callable[[nn.Module, Any], Any]
State: TypeAlias = dict[str, Tensor]
Parts: TypeAlias = Sequence[tuple[float, Mapping[str, Tensor]]]
"""A blended network: coefficients and the tensors that they multiply."""
Blend: TypeAlias = Callable[[torch.Generator], Parts]
"""Draws a place, and returns the network there."""

Ending: TypeAlias = Literal["done", "interrupted"]
"""How a training ended: all of it was done, or the keyboard interrupted it."""

PLACES = 5
"""At how many places, evenly spaced, the loss on a path is measured."""


@dataclass(frozen=True)
class Training:
    """What came of a training.

    Attributes:
        history: the mean loss in each epoch that was finished.
        outcome: "done": all epochs were run; "interrupted": by the keyboard.
    """

    history: tuple[float, ...]
    outcome: Ending


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Adam with learning rate 3e-3."""
    return torch.optim.Adam(parameters, lr=3e-3)


class Workbench:
    """A scratch copy of a module in which blended weights are run, BatchNorm by the statistics of the batch.

    Running statistics belong to no network between others, so none are read here. Other buffers are those of ``state``.

    Attributes:
        names: the parameters that are blended, by their first name.
    """

    def __init__(
        self, template: nn.Module, state: Mapping[str, Any], loss: Loss, perturb: Perturb | None = None
    ) -> None:
        self.module = copy.deepcopy(template).eval().requires_grad_(False)
        self.module.load_state_dict(state)
        for part in self.module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.train()
        self.loss, self.perturb = loss, perturb
        self.device = device_of(self.module)
        self.names = [name for name, p in self.module.named_parameters() if p.is_floating_point() or p.is_complex()]
        first: dict[int, str] = {}
        every = self.module.named_parameters(remove_duplicate=False)
        self.first_name = {name: first.setdefault(id(parameter), name) for name, parameter in every}

    def parameters_of(self, state: Mapping[str, Tensor], *, free: bool = False) -> State:
        """The parameters among a state dict, to be trained if ``free``; new tensors then, in float32 or better."""
        found = {}
        for name in self.names:
            tensor = state[name].detach()
            work = torch.promote_types(tensor.dtype, torch.float32)
            found[name] = tensor.to(self.device, work, copy=free).requires_grad_(free)
        return found

    def loss_on(self, batch: Any, parts: Parts) -> Tensor:
        """The loss of the blended network on a batch, with a gradient for what is free."""
        state = {
            name: _sum([tensors[name] * coefficient for coefficient, tensors in parts if coefficient])
            for name in self.names
        }
        if self.perturb is not None:
            with torch.no_grad():
                for name, parameter in self.module.named_parameters():
                    if name in state:
                        parameter.copy_(state[name])
            batch = self.perturb(self.module, batch)
        args, kwargs, targets = split_batch(batch, self.device)
        if targets is None:
            raise EvaluationError("a batch holds no targets: give (inputs, targets) tuples, or mappings with 'labels'")
        dtypes = {name: parameter.dtype for name, parameter in self.module.named_parameters()}
        cast: dict[str, Any] = {name: tensor.to(dtypes[name]) for name, tensor in state.items()}
        # Batch normalisation writes to its buffers: give it ones to spoil.
        cast.update({name: buffer.clone() for name, buffer in self.module.named_buffers()})
        with fitting(args, kwargs):
            output = torch.func.functional_call(self.module, cast, args, kwargs)
        logits = output if isinstance(output, Tensor) else output.logits
        with fitting((logits, targets), what="the loss cannot be taken of logits and targets"):
            value = self.loss(logits, targets)
        if not bool(torch.isfinite(value)):
            raise NonFiniteError(
                f"the loss on the path became {value.item()}: lower the rate of optimizer=, or check the data"
            )
        return value

    def state_dict(self, parameters: Mapping[str, Tensor], like: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict with these parameters, and all else as in ``like``; ties, dtypes and devices are kept."""
        result: dict[str, Any] = {}
        for name, value in like.items():
            first = self.first_name.get(name, name)
            if first in parameters and first != name and first in result:
                result[name] = result[first]
            elif first in parameters:
                result[name] = parameters[first].detach().to(value.device, value.dtype, copy=True)
            else:
                result[name] = value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        return result


def descend(
    bench: Workbench,
    free: Sequence[State],
    blend: Blend,
    loader: Loader,
    *,
    epochs: int,
    optimizer: MakeOptimizer,
    seed: int,
    part: tuple[int, int] = (0, 1),
    penalty: Callable[[], Tensor] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Training:
    """Train the tensors of ``free`` in place, for so many epochs or until Ctrl-C.

    Args:
        bench: where the networks run.
        free: what is trained, from `Workbench.parameters_of`.
        blend: draws the network to run.
        part: (k, n) where this is the k-th of n parts of a training, from 0; the rate falls over all of it.
        penalty: added to the loss at each step.
        progress: called as ``progress(done, epochs)`` after each epoch.

    Raises:
        EvaluationError: the loader is empty, or a generator, which cannot be read again.
        NonFiniteError: the loss is NaN or infinite.
    """
    if epochs < 0:
        raise EvaluationError(f"epochs={epochs}: it cannot be negative")
    if epochs > 1:
        require_rereadable(loader)
    history: list[float] = []
    # Adam rejects an empty list, and there is nothing to train in a network without parameters.
    leaves = list(itertools.chain.from_iterable(state.values() for state in free))
    with seeded(seed, bench.device) as draw:
        descent = optimizer(leaves) if leaves and epochs else None
        rates = [group["lr"] for group in descent.param_groups] if descent is not None else []
        try:
            for epoch in range(1, epochs + 1):
                if descent is not None:
                    share = falling((part[0] + (epoch - 0.5) / epochs) / part[1])
                    for group, rate in zip(descent.param_groups, rates, strict=True):
                        group["lr"] = rate * share
                total, count = 0.0, 0
                for batch in batches(loader):
                    with torch.enable_grad():
                        value = bench.loss_on(batch, blend(draw))
                        whole = value if penalty is None else value + penalty()
                    if descent is not None:
                        descent.zero_grad(set_to_none=True)
                        if whole.requires_grad:
                            whole.backward()  # type: ignore[no-untyped-call]
                        descent.step()
                    total, count = total + float(value.detach()), count + 1
                history.append(total / count)
                if progress is not None:
                    progress(epoch, epochs)
        except KeyboardInterrupt:
            return Training(tuple(history), "interrupted")
    return Training(tuple(history), "done")


def require_rereadable(loader: Loader) -> None:
    """Refuse a generator, which gives its batches only once."""
    if isinstance(loader, Iterator):
        raise EvaluationError("the loader is a generator, which can be read only once: give a DataLoader or a list")


def falling(done: float) -> float:
    """The rate as a share of its first value, where this share of the training is done (Garipov et al. 2018)."""
    if done <= 0.5:
        return 1.0
    return max(0.01, 1 - 0.99 * (done - 0.5) / 0.4)


def mean_loss(
    bench: Workbench, chosen: Sequence[Any], parts_at: Callable[[float], Parts], seed: int, *, backward: bool = False
) -> float:
    """The mean loss over batches and evenly spaced places of a path; with its gradient, if asked for."""
    total, count = 0.0, len(chosen) * PLACES
    with seeded(seed, bench.device), torch.set_grad_enabled(backward):
        for batch in chosen:
            for place in range(PLACES):
                value = bench.loss_on(batch, parts_at((place + 0.5) / PLACES)) / count
                if backward:
                    value.backward()  # type: ignore[no-untyped-call]
                total += float(value.detach())
    return total


def first_batches(loader: Loader, count: int, bench: Workbench, seed: int) -> list[Any]:
    """The first batches of a loader, to measure on again and again."""
    with seeded(seed, bench.device):
        return [batch for batch, _ in zip(batches(loader), range(count), strict=False)]


@contextmanager
def seeded(seed: int, device: torch.device | None) -> Iterator[torch.Generator]:
    """A generator, and torch's global ones seeded for as long, and afterwards as they were."""
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for each in devices:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
