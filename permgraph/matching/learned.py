"""Learned matching: the element of the whole group that makes all networks between two good at their task."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from permgraph.conventions.outcomes import Outcome
from permgraph.errors import NonFiniteError, PermgraphError
from permgraph.matching.accelerated import mean_of_all, require_usable
from permgraph.matching.general.acting import Element
from permgraph.matching.general.between import BalancedLine
from permgraph.matching.general.coordinates import Coordinates
from permgraph.matching.general.free_weights import FreeWeights
from permgraph.matching.general.turning import Turning
from permgraph.matching.matcher import NOTHING_TO_PERMUTE, Matcher, MatchResult, Progress, Sweep, moved_between
from permgraph.matching.run_checkpoint import (
    RandomState,
    described,
    identity_of,
    random_state,
    read_run,
    restore_random_state,
    write_run,
)
from permgraph.matching.threads import on_free_cores
from permgraph.matching.weight_matching import WeightMatching
from permgraph.networks.batches import Loader, Loss, MakeOptimizer, batches, require_rereadable, seeded
from permgraph.networks.blended import Between
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.weights.state_dict import StateDict

log = logging.getLogger(__name__)

KIND = "learned"
"""The kind of run that a checkpoint is of."""


@dataclass(frozen=True)
class LearnedMatching(Matcher):
    """Minimise the loss at random points of the line from A to g·B, by gradients over the whole group.

    Weight matching brings weights together; what counts is what the networks between compute. From its solution on, the
    loss there is minimised over rotations, invertible maps and scales, in coordinates of their Lie algebras
    (`permgraph.matching.general.coordinates`), and over permutations and signs straight through a projection, as
    `StraightThrough` does. The orders of heads, and of all else in which other groups are inside, stay as they began.

    A stays as it is. In a gauge in which the group acts linearly, the line from h·A to g·B is that from A to h⁻¹g·B,
    moved by h, and computes the same: so one end is as good as both.

    What is kept is the best of all elements whose loss was measured: B as it is, the start, and where every
    `measure_every` steps led; so the result is never worse than the first two, on what is measured.

    The networks run in evaluation mode, but batch normalisation with the statistics of the batch, since its running
    statistics are wrong between two networks. Everything but what the spec moves stands between A and B too, integers
    as in A.

    Args:
        loader: batches, read again and again: a tuple whose last item is the targets and whose others are the inputs;
            or a mapping of keyword arguments, the targets under "labels". A list or a `DataLoader`, but no generator.
        loss: called with the network's output (or its `.logits`) and the targets, gives the mean over the batch.
        rate: of the optimizer that serves unless another is given (`permgraph.matching.general.turning.Turning`): Adam,
            but for matrices momentum of which every plane turns alike.
        optimizer: makes another for a list of tensors: coordinates of the continuous groups, which it finds at zero
            before each step, and free weights for the permutations. It must make steps by the gradients that it finds,
            without a closure.
        steps: how many; 0 only compares B as it is with the start.
        schedule: how the optimizer's rates fall: along half a cosine to zero, or not at all.
        points: between which points of the line, 0 at A and 1 at B, each step draws one.
        permutations: "straight-through", or "fixed": as they are at the start.
        project_every: steps from one projection of the permutations to the next.
        init: where to begin: a transformation or permutation of B, or what a matcher gave; None: where `matcher` ends.
        matcher: the weight matching from which to begin.
        validation: batches on which candidates are measured; those of the loader by default.
        max_batches: measure on the first so many batches, read once and kept; None for all, read anew each time.
        measured: at these points of the line.
        measure_every: steps from one measurement to the next.
        checkpoint: a file, written after each measurement as a whole or not at all, from which a run with the same
            models, settings, loss, kind of loader and seed goes on and ends with what it would have reached without a
            break; `steps` may differ where the schedule does not depend on it. The random state of torch and of a
            `DataLoader`'s own generator is in it; those of Python and NumPy are not.
        accelerator: an `accelerate.Accelerator`, to run on several devices or machines: start the same program in each
            process. It prepares the loader, which must be a `DataLoader`; all processes draw the same points, and the
            slopes along the coordinates are averaged. Neither float16 nor gradient accumulation.
        models: the modules, which `align` fills in.

    References:
        Ainsworth, Hayase & Srinivasa 2022, section 3.3, for permutations at the midpoint; Theus et al., "Generalized
        Linear Mode Connectivity for Transformers", 2025, for orthogonal matrices.

    Example:
        >>> a, b = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in "ab")
        >>> spec = pg.auto_spec(a, symmetry="general")
        >>> loader = [(torch.randn(32, 3), torch.randint(2, (32,)))]
        >>> fit = pg.align(a, b, pg.LearnedMatching(loader, steps=20), spec=spec)
        >>> fit.objective >= fit.objective_before
        True
    """

    general: ClassVar[bool] = True

    loader: Loader
    loss: Loss = nn.functional.cross_entropy
    rate: float = 5e-3
    optimizer: MakeOptimizer | None = None
    steps: int = 1000
    schedule: Literal["cosine", "constant"] = "cosine"
    points: tuple[float, float] = (0.2, 0.8)
    permutations: Literal["straight-through", "fixed"] = "straight-through"
    project_every: int = 16
    init: Permutation | Transformation | MatchResult | None = None
    matcher: WeightMatching = field(default_factory=WeightMatching)
    validation: Loader | None = None
    max_batches: int | None = 8
    measured: tuple[float, ...] = (0.25, 0.5, 0.75)
    measure_every: int = 100
    checkpoint: str | os.PathLike[str] | None = None
    accelerator: Any = None
    models: tuple[nn.Module, nn.Module] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.init, MatchResult):
            object.__setattr__(self, "init", self.init.element)
        if self.steps < 0 or self.measure_every < 1 or self.project_every < 1:
            raise PermgraphError(
                f"steps={self.steps}, measure_every={self.measure_every} and project_every={self.project_every}: give "
                f"0 or more steps, and measure and project every 1 or more"
            )
        if not self.rate > 0:
            raise PermgraphError(f"rate={self.rate}: give a positive one")
        if not 0 <= self.points[0] <= self.points[1] <= 1:
            raise PermgraphError(f"points={self.points}: draw from the first to the second, both between 0 and 1")
        if not self.measured or not all(0 <= point <= 1 for point in self.measured):
            raise PermgraphError(f"measured={self.measured}: give one or more points between 0 (at A) and 1 (at B)")
        for name, words in (("permutations", ("straight-through", "fixed")), ("schedule", ("cosine", "constant"))):
            if getattr(self, name) not in words:
                raise PermgraphError(f"{name}={getattr(self, name)!r}: it is one of {', '.join(map(repr, words))}")
        if self.max_batches is not None and self.max_batches < 1:
            raise PermgraphError(f"max_batches={self.max_batches}: give 1 or more, or None for all")
        for loader in (self.loader, *([] if self.validation is None else [self.validation])):
            require_rereadable(loader)
            if self.accelerator is not None:
                require_usable(self.accelerator, loader)

    @property
    def needs_models(self) -> bool:
        """It does."""
        return True

    def with_models(self, model_a: nn.Module, model_b: nn.Module) -> LearnedMatching:
        """The same matcher for these two modules, of which it runs a copy of A's."""
        return replace(self, models=(model_a, model_b))

    @on_free_cores
    def match(
        self, a: StateDict, b: StateDict, spec: PermutationSpec, seed: int = 0, progress: Progress | None = None
    ) -> MatchResult:
        """Find the element that brings B to where the networks between it and A are good.

        The objective reported is minus the mean loss over the measured batches and points. There is one `Sweep` for
        each measurement, with the objective of what stood then. Outcome: "sweep limit" once all steps are done.

        Args:
            a, b: state dicts that fit the spec; the work is done on the device of A's module, or the accelerator's.
            spec: the group, and where it acts; of one with permutations alone, permutations are learned.
            seed: for the points, and for all that the loader and the network draw from torch's global generator, whose
                state is left as it was.
            progress: called after each measurement.

        Raises:
            MismatchError: there are no modules, or they cannot run on a batch, or something does not fit the spec, or a
                gain is zero.
            NonFiniteError: a weight or the loss is NaN or infinite.
            PermgraphError: the loader yields nothing, or batches without targets, or the loss is no scalar.
            CheckpointError: the checkpoint is damaged, or of another run.
        """
        started = time.perf_counter()
        self.require_fit(spec, a, b)
        run = _Run(self, a, b, spec, seed, started)
        with seeded(seed, run.line.device), torch.enable_grad():  # the caller may have switched gradients off
            return run.search(progress)


class _Run:
    """The element that stands, the free weights and the best so far.

    Attributes:
        line: the network between A and the moved B.
        coordinates: of the continuous groups, at the element that stands.
        free: the free weights that decide permutations.
        moved: B under the element that stands.
    """

    def __init__(
        self, settings: LearnedMatching, a: StateDict, b: StateDict, spec: PermutationSpec, seed: int, started: float
    ) -> None:
        self.settings, self.a, self.b, self.spec, self.seed, self.started = settings, a, b, spec, seed, started
        assert settings.models is not None
        accelerator = settings.accelerator
        device = None if accelerator is None else accelerator.device
        self.line = BalancedLine(settings.models[0], a, b, spec, settings.loss, device)
        self.loader, self.validation = settings.loader, settings.validation
        if accelerator is not None:
            self.loader = accelerator.prepare_data_loader(settings.loader)
            if settings.validation is not None:
                self.validation = accelerator.prepare_data_loader(settings.validation)
        self.kept: list[Any] | None = None
        self._begin_at(Element())
        self.permutation = self._permutation()
        self.best: Permutation | Transformation = spec.identity()
        self.objective = self.before = 0.0
        self.steps = self.read = 0
        self.history: list[Sweep] = []
        self.at_pass: RandomState = {}
        self.identity = {} if settings.checkpoint is None else self._identity()

    def _begin_at(self, element: Element) -> None:
        """Stand at an element, with coordinates and free weights that nothing has moved yet."""
        line, settings = self.line, self.settings
        self.coordinates = Coordinates(line.acting, element, device=line.device, dtype=line.dtype)
        learned = settings.permutations == "straight-through"
        self.free = FreeWeights(line.acting, line.a, learned)
        self.optimizer = self._optimizer()
        self.rates = [] if self.optimizer is None else [group["lr"] for group in self.optimizer.param_groups]
        self._move()

    def _optimizer(self) -> torch.optim.Optimizer | None:
        """What moves the coordinates and the free weights; None if there are none."""
        leaves, make = self.coordinates.leaves, self.settings.optimizer
        every = [*leaves.values(), *self.free.weights.values()]
        if not every or make is not None:
            return make(every) if every and make is not None else None
        structures = {group: self.line.acting.structure(group) for group in leaves}
        matrices = [leaves[g] for g, structure in structures.items() if structure.linear and not structure.is_paired]
        known = {id(leaf) for leaf in matrices}
        return Turning(matrices, [leaf for leaf in every if id(leaf) not in known], self.settings.rate)

    def _move(self) -> None:
        self.moved = self.line.moved(self.coordinates.element, self.coordinates.inverses)

    def search(self, progress: Progress | None) -> MatchResult:
        """Take all steps."""
        outcome: Outcome = "sweep limit"
        learnable = self.optimizer is not None
        self.kept = self._measured_batches()
        fresh = not self._resume()
        if fresh:
            self._measure_before()
        try:
            if fresh:
                self._start()
            while self.steps < self.settings.steps and learnable:
                for record in self._pass():
                    if progress is not None:
                        progress(record)
        except KeyboardInterrupt:
            outcome = "interrupted"
        found = self.best
        general = isinstance(found, Transformation)
        return MatchResult(
            permutation=found.permutation if isinstance(found, Transformation) else found,
            transformation=found if general else None,  # type: ignore[arg-type]
            objective=self.objective,
            objective_before=self.before,
            outcome=outcome,
            history=tuple(self.history),
            runs=(self.objective,),
            seed=self.seed,
            seconds=time.perf_counter() - self.started,
            notes=() if learnable or self.line.acting.of_group else (NOTHING_TO_PERMUTE,),
        )

    def _measure_before(self) -> None:
        """Measure the line to B as it is."""
        settings = self.settings
        plain = Between(settings.models[0], self.a, self.b, self.line.spec, settings.loss, self.line.device)  # type: ignore[index]
        total, count = plain.totals(self._measurable(), self.spec.permutations().identity(), settings.measured)
        self.before = self.objective = self._over_all(total, count)

    def _start(self) -> None:
        """Go to where learning begins."""
        settings = self.settings
        if not self.line.acting.of_group:
            return
        init = settings.init
        if init is None:
            result = settings.matcher.match(self.a, self.b, self.spec, self.seed)
            if result.outcome == "interrupted":  # it swallowed Ctrl-C, which was for the whole run
                self._begin_at(self.line.element(result.element))
                self._keep_if_better()
                raise KeyboardInterrupt
            init = result.element
        assert not isinstance(init, MatchResult)
        self._begin_at(self.line.element(init))
        self.permutation = self._permutation()
        self._keep_if_better()

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _pass(self) -> Iterator[Sweep]:
        """Go through the loader once, or where a checkpoint stopped inside it, through the rest."""
        skip, here = self.read, self._random_state()
        if skip:
            self._set_random_state(self.at_pass)
        else:
            self.at_pass = here
        for number, batch in enumerate(batches(self.loader), start=1):
            if number < skip:
                continue
            if number == skip:  # before the loader goes on, which may draw
                self._set_random_state(here)
                continue
            if self.steps >= self.settings.steps:
                return
            self._step(number, batch)
            self.read = number
            if self.steps % self.settings.measure_every == 0 or self.steps == self.settings.steps:
                yield self._measure_here()
        self.read = 0

    def _step(self, number: int, batch: Any) -> None:
        settings, line = self.settings, self.line
        low, high = settings.points
        chance = torch.Generator().manual_seed(hash((self.seed, self.steps)) % (1 << 62))
        point = low + (high - low) * float(torch.rand((), generator=chance))
        line.place(self.moved, point)
        with contextlib.nullcontext() if settings.accelerator is None else settings.accelerator.autocast():
            value = line.between.value(batch, number)
        if not bool(torch.isfinite(value.detach())):
            self._require_finite()
            line.between.require_finite(value, number, point)
        value.backward()  # type: ignore[no-untyped-call]
        gradients = line.gradients()
        self.coordinates.pull_back(self.moved, gradients, point)
        self.free.accept(gradients, point)
        self._average()
        if self.optimizer is not None:
            if settings.schedule == "cosine":
                for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                    group["lr"] = rate * (1 + math.cos(math.pi * self.steps / settings.steps)) / 2
            self.optimizer.step()
        self.coordinates.advance()
        self.steps += 1
        if self.steps % settings.project_every == 0 or self.steps == settings.steps:
            self._project()
        self._move()

    def _average(self) -> None:
        """Give every process the mean of all processes' slopes."""
        if self.settings.accelerator is None:
            return
        for tensor in (*self.coordinates.leaves.values(), *self.free.weights.values()):
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
            tensor.grad = self.settings.accelerator.reduce(tensor.grad, reduction="mean")

    def _project(self) -> None:
        if not self.free.weights:
            return
        self._require_finite()
        self._move()
        element = self.free.project(self.coordinates.element, self.moved)
        self.coordinates.element = element

    def _require_finite(self) -> None:
        """Refuse an element or free weights that are no longer numbers."""
        element = self.coordinates.element
        for name, tensor in (*element.matrices.items(), *element.scales.items()):
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(f"what moves group {name!r} became NaN or infinite; lower the learning rate")
        for name, tensor in self.free.weights.items():
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(f"the free weights of {name!r} became NaN or infinite; lower the learning rate")

    # -- measuring -----------------------------------------------------------------------------------------------------

    def _measured_batches(self) -> list[Any] | None:
        """The batches on which candidates are measured; None if they are to be read anew."""
        if self.settings.max_batches is None:
            return None
        loader = self.loader if self.validation is None else self.validation
        before = self._random_state()
        kept = list(itertools.islice(batches(loader), self.settings.max_batches))
        self._set_random_state(before)  # so that what is measured has no part in the order of what is learned from
        return kept

    def _measurable(self) -> Loader:
        if self.kept is not None:
            return self.kept
        return self.loader if self.validation is None else self.validation

    def _over_all(self, total: float, count: int) -> float:
        """Minus the mean over all processes."""
        return -mean_of_all(self.settings.accelerator, total, count, self.line.device)

    def _keep_if_better(self) -> float:
        self._require_finite()
        self.coordinates.settle()
        self._move()
        reached = self._over_all(*self.line.totals(self._measurable(), self.moved, self.settings.measured))
        if reached > self.objective:
            self.best, self.objective = self.line.found(self.coordinates.exact()), reached
        return reached

    def _measure_here(self) -> Sweep:
        before, self.permutation = self.permutation, self._permutation()
        moved = moved_between(before, self.permutation)
        reached = self._keep_if_better()
        self.history.append(Sweep(len(self.history) + 1, reached, moved, {}, time.perf_counter() - self.started))
        log.debug("%s", self.history[-1])
        self._save()
        return self.history[-1]

    def _permutation(self) -> Permutation:
        """What the element that stands permutes."""
        arrays = {name: array.cpu().numpy() for name, array in self.coordinates.element.arrays.items()}
        return Permutation(self.line.spec.permutations(), arrays)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, str]:
        """What must be the same for a run to go on."""
        settings = self.settings
        compared = [*_COMPARED, *(["steps"] if settings.schedule == "cosine" else [])]
        weights = _tensors(self.a), _tensors(self.b)
        found = identity_of(self.spec, weights, self.seed, settings, compared, self.optimizer)
        return {**found, "validation": described(settings.validation)}

    def _random_state(self) -> RandomState:
        return random_state(self.line.device, self.settings.loader)

    def _set_random_state(self, state: RandomState) -> None:
        restore_random_state(state, self.line.device, self.settings.loader)

    def _save(self) -> None:
        settings = self.settings
        if settings.checkpoint is None:
            return
        accelerator = settings.accelerator
        if accelerator is None or accelerator.is_main_process:
            state = {
                "element": _as_tensors(self.coordinates.element),
                "free": dict(self.free.weights),
                "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
                "steps": self.steps,
                "read": self.read,
                "best": _as_tensors(self.best),
                "objective": self.objective,
                "before": self.before,
                "history": [[s.number, s.objective, dict(s.moved), s.seconds] for s in self.history],
                "random": self._random_state(),
                "random at the pass": self.at_pass,
            }
            write_run(settings.checkpoint, self.identity, state, KIND)
        if accelerator is not None:
            accelerator.wait_for_everyone()

    def _resume(self) -> bool:
        """Go to where the checkpoint's run stopped; False if there is none."""
        path = self.settings.checkpoint
        saved = None if path is None else read_run(path, self.identity, KIND)
        if saved is None:
            return False
        self._begin_at(Element(**saved["element"]))
        with torch.no_grad():
            for name, weight in self.free.weights.items():
                weight.copy_(saved["free"][name])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
        self.steps, self.read = saved["steps"], saved["read"]
        self.objective, self.before = saved["objective"], saved["before"]
        self.best = _from_tensors(saved["best"], self.spec)
        self.permutation = self._permutation()
        self.history = [Sweep(number, value, moved, {}, seconds) for number, value, moved, seconds in saved["history"]]
        self.at_pass = saved["random at the pass"]
        self._set_random_state(saved["random"])
        return True


_COMPARED = (
    "schedule", "points", "permutations", "project_every", "max_batches", "measured", "measure_every"
)  # fmt: skip
"""Settings that must be the same for a run to go on."""

_KINDS = ("matrices", "scales", "signs", "gains")


def _tensors(state: StateDict) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _as_tensors(element: Element | Permutation | Transformation) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds of an element."""
    if isinstance(element, Element):
        return {kind: dict(getattr(element, kind)) for kind in ("arrays", *_KINDS[:3])}
    permutation = element.permutation if isinstance(element, Transformation) else element
    found = {"arrays": {name: torch.tensor(array) for name, array in permutation.arrays.items()}}
    if isinstance(element, Transformation):
        for kind in _KINDS:
            found[kind] = {name: torch.tensor(array) for name, array in getattr(element, kind).items()}
    return found


def _from_tensors(saved: Mapping[str, Mapping[str, Tensor]], spec: PermutationSpec) -> Permutation | Transformation:
    """What `_as_tensors` made of an element of a spec."""
    permutation = Permutation(spec.permutations(), {name: array.numpy() for name, array in saved["arrays"].items()})
    if spec.general is None:
        return permutation
    parts = ({name: array.numpy() for name, array in saved[kind].items()} for kind in _KINDS)
    return Transformation(spec, permutation, *parts)
