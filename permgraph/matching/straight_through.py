"""Straight-through matching: the permutation that makes the midpoint of two networks good at their task.

Ainsworth, Hayase & Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", 2022, section 3.3.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from permgraph.errors import MismatchError, NonFiniteError, PermgraphError
from permgraph.matching.objective import StateDict
from permgraph.matching.result import MatchResult, Outcome, Progress, Sweep
from permgraph.matching.weight_matching import WeightMatching
from permgraph.permutation import Permutation
from permgraph.spec import PermutationSpec

log = logging.getLogger(__name__)

Loss: TypeAlias = Callable[[Any, Any], torch.Tensor]
MakeOptimizer: TypeAlias = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


def adam(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    """Adam with learning rate 1e-3: the default optimizer of `StraightThrough`."""
    return torch.optim.Adam(parameters, lr=1e-3)


@dataclass(frozen=True)
class StraightThrough:
    """Minimise the loss at the midpoint of A and the permuted B, by gradients straight through the projection.

    A free copy of A's weights is trained. Each step projects it, by weight matching of B to it, to a permutation; takes
    the loss at the midpoint of A and B so permuted; and applies the gradient to the free weights as if they themselves
    had stood in the place of the permuted B. So the task, not the weights' likeness, decides what corresponds.

    The loss is not monotone in the steps. What is kept is the best of all permutations whose loss was measured: the
    identity, plain weight matching, and where each epoch ended. So the result is never worse than those two, on the
    batches on which it is measured.

    The networks run in evaluation mode, but batch normalisation with the statistics of the batch, since its running
    statistics are wrong at a midpoint. Everything but what the spec moves stands halfway between A and B too, integers
    as in A.

    Args:
        loader: batches, read once for each epoch and for each measurement: a tuple whose last item is the targets and
            whose others are the inputs; or a mapping of keyword arguments, the targets under "labels". A list or a
            `DataLoader`, but no generator, which cannot be read twice.
        loss: called with the network's output (or its `.logits`) and the targets, gives the mean over the batch.
        optimizer: makes an optimizer for a list of tensors. The free weights must travel far enough for another
            permutation to be nearest, so learning rates are larger rather than smaller than in training.
        epochs: how often to go through the loader; 0 only compares the identity and weight matching.
        project_every: steps from one projection to the next. The paper takes 1; on small networks that is most of the
            time, and 4 found as good permutations.
        measured_batches: measure each candidate on the first so many batches of the loader; None for all.
        projection: the weight matching that projects. Its `init` serves for the first projection.
        init: a permutation to measure and to project from at first, to go on where another run stopped. The free
            weights and the optimizer start afresh, from A.
        models: the modules, which `align` fills in.

    References:
        Ainsworth, Hayase & Srinivasa 2022, section 3.3.

    Example:
        >>> a, b = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in "ab")
        >>> from permgraph.matching import align
        >>> fit = align(a, b, StraightThrough([(torch.randn(32, 3), torch.randint(2, (32,)))], epochs=2))
        >>> fit.objective >= fit.objective_before
        True
    """

    loader: Iterable[Any]
    loss: Loss = nn.functional.cross_entropy
    optimizer: MakeOptimizer = adam
    epochs: int = 5
    project_every: int = 4
    measured_batches: int | None = 32
    projection: WeightMatching = field(default_factory=WeightMatching)
    init: Permutation | None = None
    models: tuple[nn.Module, nn.Module] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.project_every < 1:
            raise PermgraphError(
                f"epochs={self.epochs} and project_every={self.project_every}: give 0 or more epochs, and project "
                f"every 1 or more steps"
            )
        if self.measured_batches is not None and self.measured_batches < 1:
            raise PermgraphError(f"measured_batches={self.measured_batches}: give 1 or more, or None for all")
        if isinstance(self.loader, Iterator):
            raise PermgraphError(
                "the loader is a generator, which can be read only once; give a DataLoader or a list of batches"
            )

    def with_models(self, model_a: nn.Module, model_b: nn.Module) -> StraightThrough:
        """The same matcher for these two modules, of which it runs a copy of A's."""
        return replace(self, models=(model_a, model_b))

    def match(
        self, a: StateDict, b: StateDict, spec: PermutationSpec, seed: int = 0, progress: Progress | None = None
    ) -> MatchResult:
        """Find the permutation of B that brings it to A.

        The objective reported is minus the mean midpoint loss over the measured batches. There is one `Sweep` for each
        epoch, with the objective of its last permutation. Outcome: "sweep limit" once all epochs are done, since there
        is no test of convergence.

        Args:
            a, b: state dicts that fit the spec; the work is done on the device of A's module.
            spec: the group, and where it acts.
            seed: for the order of projections, and for all that the loader and the network draw from torch's global
                generator, whose state is left as it was.
            progress: called after each epoch.

        Raises:
            MismatchError: there are no modules, or they cannot run on a batch, or something does not fit the spec.
            NonFiniteError: a weight or the loss is NaN or infinite.
            PermgraphError: the loader yields nothing, or batches without targets, or the loss is no scalar.
        """
        started = time.perf_counter()
        if self.models is None:
            raise MismatchError("StraightThrough runs the networks: call align() with modules, or with_models() first")
        if self.init is not None and self.init.spec != spec:
            raise MismatchError("init is a permutation of another spec than the one to match over")
        spec.check(a)
        spec.check(b)
        midpoint = _Midpoint(self.models[0], a, b, spec, self.loss)
        with _seeded(seed, midpoint.device):
            return self._search(midpoint, seed, progress, started)

    def _search(self, midpoint: _Midpoint, seed: int, progress: Progress | None, started: float) -> MatchResult:
        spec = midpoint.spec
        identity = spec.identity()
        first = self.projection if self.init is None else replace(self.projection, init=self.init)
        before = self._objective(midpoint, identity)
        best, objective = identity, before
        now = first.match(midpoint.free, midpoint.b, spec, seed).permutation
        history: list[Sweep] = []
        outcome: Outcome = "sweep limit"
        try:
            for candidate in (now, *(() if self.init is None else (self.init,))):
                reached = self._objective(midpoint, candidate)
                if reached > objective:
                    best, objective = candidate, reached
            optimizer = self.optimizer(list(midpoint.free_parameters)) if midpoint.free_parameters else None
            steps = 0
            for epoch in range(1, self.epochs + 1):
                at_start = now
                for number, batch in enumerate(_batches(self.loader), 1):
                    if steps and steps % self.project_every == 0:
                        now = self._project(midpoint, now, seed + steps)
                    steps += 1
                    if optimizer is not None:
                        optimizer.zero_grad(set_to_none=True)
                        with torch.enable_grad():  # the caller may have switched it off
                            midpoint.value(batch, number, now, straight_through=True).backward()  # type: ignore[no-untyped-call]
                        optimizer.step()
                now = self._project(midpoint, now, seed + steps)
                reached = self._objective(midpoint, now)
                if reached > objective:
                    best, objective = now, reached
                sweep = Sweep(epoch, reached, _moved(at_start, now), {}, time.perf_counter() - started)
                history.append(sweep)
                log.debug("%s", sweep)
                if progress is not None:
                    progress(sweep)
        except KeyboardInterrupt:
            outcome = "interrupted"
        return MatchResult(
            best,
            objective,
            before,
            outcome,
            tuple(history),
            (objective,),
            seed,
            time.perf_counter() - started,
            () if midpoint.free_parameters else ("nothing to permute: no group of the spec stands in a parameter",),
        )

    def _project(self, midpoint: _Midpoint, now: Permutation, seed: int) -> Permutation:
        midpoint.require_finite()
        # Where an ascent ends may hang on the order of the groups, so each projection draws its own.
        return (
            replace(self.projection, init=now, restarts=1)
            .match(midpoint.free, midpoint.b, midpoint.spec, seed)
            .permutation
        )

    def _objective(self, midpoint: _Midpoint, permutation: Permutation) -> float:
        """Minus the mean loss over the measured batches."""
        total, count = 0.0, 0
        with torch.no_grad():
            for number, batch in enumerate(_batches(self.loader), 1):
                if self.measured_batches is not None and number > self.measured_batches:
                    break
                size = _size(batch)
                total += float(midpoint.value(batch, number, permutation)) * size
                count += size
        return -total / count


class _Midpoint:
    """The network halfway between A and a permuted B, and the free weights that are trained.

    Attributes:
        b: B's state dict on A's device.
        free: A's state dict with the free weights in the place of the parameters that move.
        names, free_parameters: those, and their canonical names.
    """

    def __init__(self, model: nn.Module, a: StateDict, b: StateDict, spec: PermutationSpec, loss: Loss) -> None:
        self.spec, self.loss = spec, loss
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.model.load_state_dict(a)
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        self.device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        own = {spec.aliases.get(name, name): tensor for name, tensor in reversed(list(a.items()))}
        self.a = {name: tensor.detach().to(self.device) for name, tensor in own.items()}
        self.b = {name: tensor.detach().to(self.device) for name, tensor in b.items()}
        trainable = {spec.aliases.get(name, name) for name, _ in model.named_parameters(remove_duplicate=False)}
        self.names = tuple(
            name
            for name in spec.axes
            if name in trainable
            and self.a[name].is_floating_point()
            and any(occurrence.group in spec.moving for occurrence in spec.occurrences(name))
        )
        # At least float32: in half precision, a small step would leave the weights where they are.
        self.free_parameters = [
            self.a[name].to(torch.promote_types(self.a[name].dtype, torch.float32), copy=True).requires_grad_()
            for name in self.names
        ]
        free = dict(zip(self.names, self.free_parameters, strict=True))
        self.free = {name: free.get(spec.aliases.get(name, name), tensor.detach()) for name, tensor in a.items()}
        self._permuted: tuple[Permutation, dict[str, torch.Tensor]] | None = None

    def value(self, batch: Any, number: int, permutation: Permutation, straight_through: bool = False) -> torch.Tensor:
        """The loss on a batch; with `straight_through`, one that has a gradient for the free weights."""
        args, kwargs, targets = _split(batch, self.device, number)
        state = self._state(permutation, straight_through)
        try:
            output = torch.func.functional_call(self.model, state, args, kwargs)
            value = self.loss(output if isinstance(output, torch.Tensor) else output.logits, targets)
        except Exception as error:
            shape = tuple(getattr(args[0] if args else next(iter(kwargs.values()), None), "shape", ()))
            raise MismatchError(
                f"the network or the loss cannot run on batch {number} of the loader, of shape {shape}, with targets "
                f"of shape {tuple(getattr(targets, 'shape', ()))}: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise PermgraphError("loss must return one number as a tensor: the mean over the batch")
        if not bool(torch.isfinite(value)):
            self.require_finite()
            raise NonFiniteError(
                f"the loss at the midpoint is {value.item()} on batch {number}; check the data and the weights"
            )
        return value

    def require_finite(self) -> None:
        """Refuse free weights that are no longer numbers."""
        for name, tensor in zip(self.names, self.free_parameters, strict=True):
            if not bool(torch.isfinite(tensor.detach()).all()):
                raise NonFiniteError(f"the free weights of {name!r} became NaN or infinite; lower the learning rate")

    def _state(self, permutation: Permutation, straight_through: bool) -> dict[str, torch.Tensor]:
        if self._permuted is None or self._permuted[0] is not permutation:
            aligned = permutation.apply(self.b)
            self._permuted = permutation, {self.spec.aliases.get(name, name): t for name, t in aligned.items()}
        b = self._permuted[1]
        state = {}
        for name, tensor in self.a.items():
            # Integers are A's. All are new tensors, since batch normalisation writes to its buffers.
            state[name] = tensor.lerp(b[name].to(tensor.dtype), 0.5) if tensor.is_floating_point() else tensor.clone()
        if straight_through:
            for name, free in zip(self.names, self.free_parameters, strict=True):
                state[name] = state[name] + (0.5 * (free - free.detach())).to(state[name].dtype)
        return state


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators seeded, and as they were afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _batches(loader: Iterable[Any]) -> Iterator[Any]:
    empty = True
    for batch in loader:
        empty = False
        yield batch
    if empty:
        raise PermgraphError("the loader yielded no batch: straight-through matching needs some")


def _split(batch: Any, device: torch.device, number: int) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]:
    """A batch as the network's arguments and the targets."""
    if isinstance(batch, Mapping) and "labels" in batch:
        kwargs = {key: _to(value, device) for key, value in batch.items()}
        return (), kwargs, kwargs.pop("labels")
    if isinstance(batch, Sequence) and len(batch) > 1:
        *inputs, targets = (_to(value, device) for value in batch)
        return tuple(inputs), {}, targets
    raise PermgraphError(
        f"batch {number} of the loader, a {type(batch).__name__}, holds no targets: give tuples (inputs, targets), "
        f"or mappings with 'labels'"
    )


def _size(batch: Any) -> int:
    targets = batch.get("labels") if isinstance(batch, Mapping) else batch[-1] if isinstance(batch, Sequence) else None
    return len(targets) if isinstance(targets, torch.Tensor) and targets.ndim else 1


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _moved(before: Permutation, after: Permutation) -> dict[str, int]:
    counts = {name: int(np.sum(array != before.arrays[name])) for name, array in after.arrays.items()}
    return {name: count for name, count in counts.items() if count}
