"""Straight-through matching: the permutation that makes the midpoint of two networks good at their task.

Ainsworth, Hayase & Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", 2022, section 3.3.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from permgraph.conventions.outcomes import Outcome
from permgraph.conventions.renamed import renamed
from permgraph.errors import NonFiniteError, PermgraphError
from permgraph.matching.accelerated import mean_of_all, require_usable
from permgraph.matching.general.kept import kept_part, on_top, permutation_of
from permgraph.matching.matcher import Matcher, MatchResult, Progress, Sweep, moved_between
from permgraph.matching.projection_interval import counted, steps_between
from permgraph.matching.run_checkpoint import identity_of, random_state, read_run, restore_random_state, write_run
from permgraph.matching.threads import on_free_cores
from permgraph.matching.weight_matching import WeightMatching
from permgraph.networks.batches import Loader, Loss, MakeOptimizer, batches, require_rereadable, seeded
from permgraph.networks.blended import Between
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.weights.state_dict import StateDict

log = logging.getLogger(__name__)

KIND = "straight-through"
"""The kind of run that a checkpoint is of."""


def adam(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    """Adam with learning rate 1e-3: the default optimizer of `StraightThrough`."""
    return torch.optim.Adam(parameters, lr=1e-3)


@renamed(projection="matcher", measured_batches="max_batches", start="free_weights")
@dataclass(frozen=True)
class StraightThrough(Matcher):
    """Minimise the loss at the midpoint of A and the permuted B, by gradients straight through the projection.

    A free copy of A's weights is trained. It is projected, by weight matching of B to it, to a permutation; each step
    takes the loss at the midpoint of A and B so permuted, and applies the gradient to the free weights as if they
    themselves had stood in the place of the permuted B. So the task, not the weights' likeness, decides what
    corresponds.

    The midpoint itself changes only when the permutation does, so a step is one of plain training; what is added is
    the projection, now and then.

    The loss is not monotone in the steps. What is kept is the best of all permutations whose loss was measured: the
    identity, plain weight matching (unless `free_weights` is "b"), and where each epoch ended. So the result is never
    worse than those two, on the batches on which it is measured.

    The networks run in evaluation mode, but batch normalisation with the statistics of the batch, since its running
    statistics are wrong at a midpoint. Everything but what the spec moves stands halfway between A and B too, integers
    as in A.

    Over general symmetries (`auto_spec(model, symmetry="general")`) matrices, scales and signs are kept as weight
    matching over the whole group leaves them, or as `init` has them. What is searched for are permutations of the
    groups on which no matrices act, with both models in A's gauge and balanced, where the midpoint computes what it
    does between A and the transformed B; the objective before is then that of the kept part.

    Args:
        loader: batches, read once for each epoch and for each measurement: a tuple whose last item is the targets and
            whose others are the inputs; or a mapping of keyword arguments, the targets under "labels". A list or a
            `DataLoader`, but no generator, which cannot be read twice.
        loss: called with the network's output (or its `.logits`) and the targets, gives the mean over the batch.
        optimizer: makes an optimizer for a list of tensors. The free weights must travel far enough for another
            permutation to be nearest, so learning rates are larger rather than smaller than in training.
        epochs: how often to go through the loader; 0 only compares the identity and weight matching (or `init`).
        project_every: steps from one projection to the next; at the end of each epoch there is one anyway. The paper
            takes 1, which on most networks is most of the time. None: 16, or where layers are wide and batches small,
            as many as keep projections to about a quarter of training, by their floating-point operations.
        max_batches: measure each candidate on the first so many batches of the loader; None for all.
        matcher: the weight matching that projects. Its `init` serves for the first projection.
        init: a permutation to measure and to project from at first, to go on where another run stopped. The free
            weights and the optimizer start afresh. Of a general spec, the element to keep and to begin with.
        free_weights: where they begin. "a", as in the paper: at A, so that the first projection is plain weight
            matching, and the search goes on from there. "b": at B as `init` permutes it, or as it is; a search that
            owes nothing to weight matching, and does not measure it.
        projection_sweeps: how many sweeps over the groups a projection may take, from the permutation before; None for
            as many as it wants. The first, and the one at the end of the last epoch, go on until nothing helps.
        checkpoint: a file, written after each epoch as a whole or not at all, from which a run with the same models,
            settings, loss, kind of loader and seed goes on and ends with what it would have reached without a break;
            `epochs` may differ. The random state of torch and of a `DataLoader`'s own generator is in it; those of
            Python and NumPy are not.
        accelerator: an `accelerate.Accelerator`, to run on several devices or machines: start the same program in each
            process. It prepares the network and the loader, which must be a `DataLoader`, and averages the gradients.
            Its `split_batches` says whether the loader's batch size is that of all processes together. Neither float16
            nor gradient accumulation.
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

    general: ClassVar[bool] = True

    loader: Loader
    loss: Loss = nn.functional.cross_entropy
    optimizer: MakeOptimizer = adam
    epochs: int = 5
    project_every: int | None = None
    max_batches: int | None = 32
    matcher: WeightMatching = field(default_factory=WeightMatching)
    init: Permutation | Transformation | None = None
    free_weights: Literal["a", "b"] = "a"
    projection_sweeps: int | None = 1
    checkpoint: str | os.PathLike[str] | None = None
    accelerator: Any = None
    models: tuple[nn.Module, nn.Module] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.epochs < 0 or (self.project_every is not None and self.project_every < 1):
            raise PermgraphError(
                f"epochs={self.epochs} and project_every={self.project_every}: give 0 or more epochs, and project "
                f"every 1 or more steps, or None for as often as is cheap"
            )
        if self.free_weights not in ("a", "b"):
            raise PermgraphError(f"free_weights={self.free_weights!r}: they begin at 'a' or 'b'")
        if self.projection_sweeps is not None and self.projection_sweeps < 1:
            raise PermgraphError(f"projection_sweeps={self.projection_sweeps}: give 1 or more, or None for no limit")
        if self.max_batches is not None and self.max_batches < 1:
            raise PermgraphError(f"max_batches={self.max_batches}: give 1 or more, or None for all")
        require_rereadable(self.loader)
        if self.accelerator is not None:
            require_usable(self.accelerator, self.loader)

    @property
    def needs_models(self) -> bool:
        """It does."""
        return True

    def with_models(self, model_a: nn.Module, model_b: nn.Module) -> StraightThrough:
        """The same matcher for these two modules, of which it runs a copy of A's."""
        return replace(self, models=(model_a, model_b))

    @on_free_cores
    def match(
        self, a: StateDict, b: StateDict, spec: PermutationSpec, seed: int = 0, progress: Progress | None = None
    ) -> MatchResult:
        """Find the permutation of B that brings it to A.

        The objective reported is minus the mean midpoint loss over the measured batches. There is one `Sweep` for each
        epoch, with the objective of its last permutation. Outcome: "sweep limit" once all epochs are done, since there
        is no test of convergence.

        Args:
            a, b: state dicts that fit the spec; the work is done on the device of A's module, or the accelerator's.
            spec: the group, and where it acts.
            seed: for the order of projections, and for all that the loader and the network draw from torch's global
                generator, whose state is left as it was.
            progress: called after each epoch.

        Raises:
            MismatchError: there are no modules, or they cannot run on a batch, or something does not fit the spec.
            NonFiniteError: a weight or the loss is NaN or infinite.
            PermgraphError: the loader yields nothing, or batches without targets, or the loss is no scalar.
            CheckpointError: the checkpoint is damaged, or of another run.
        """
        started = time.perf_counter()
        self.require_fit(spec, a, b)
        if spec.general is not None:
            kept = kept_part(self.matcher, self.init, a, b, spec, seed, self.models)
            if isinstance(kept, MatchResult):
                return kept
            above = replace(self, init=None, matcher=on_top(self.matcher, spec, kept))
            return kept.result(above.match(kept.a, kept.b, kept.spec, seed, progress), started)
        run = _Run(self, a, b, spec, seed, started)
        with seeded(seed, run.midpoint.device), torch.enable_grad():  # the caller may have switched gradients off
            return run.search(progress)


class _Run:
    """The free weights, the present permutation and the best so far.

    Attributes:
        midpoint: the network halfway, whose parameters that move require gradients.
        free_parameters: the free weights, one for each name of `midpoint.names`.
        free: A's state dict with the free weights in the place of the parameters that move.
    """

    def __init__(
        self, settings: StraightThrough, a: StateDict, b: StateDict, spec: PermutationSpec, seed: int, started: float
    ) -> None:
        self.settings, self.spec, self.seed, self.started = settings, spec, seed, started
        assert settings.models is not None
        self.init: Permutation = spec.identity() if settings.init is None else permutation_of(settings.init)
        device = None if settings.accelerator is None else settings.accelerator.device
        self.midpoint = Between(settings.models[0], a, b, spec, settings.loss, device)
        own = self.midpoint.model.named_parameters(remove_duplicate=False)
        by_name = {spec.aliases.get(name, name): parameter for name, parameter in own}
        self.parameters = [by_name[name].requires_grad_() for name in self.midpoint.names]
        begin = self.midpoint.a
        if settings.free_weights == "b":
            begin = self.midpoint.permuted(self.init)
        # At least float32: in half precision, a small step would leave the weights where they are.
        self.free_parameters = [
            begin[name].to(torch.promote_types(begin[name].dtype, torch.float32), copy=True).requires_grad_()
            for name in self.midpoint.names
        ]
        self.free = {**self.midpoint.a, **dict(zip(self.midpoint.names, self.free_parameters, strict=True))}
        self.loader = settings.loader
        if settings.accelerator is not None and self.parameters:
            self.midpoint.network = settings.accelerator.prepare_model(self.midpoint.model)
            self.loader = settings.accelerator.prepare_data_loader(settings.loader)
        self.optimizer = settings.optimizer(list(self.free_parameters)) if self.free_parameters else None
        self.best = self.now = spec.identity()
        self.objective = self.before = 0.0
        self.measured: tuple[Permutation, float] | None = None  # the last, which the next is where training has settled
        self.prices: dict[str, np.ndarray] = {}  # of the last projection, near which the next one's are
        self.steps = 0
        self.every = settings.project_every  # None until the first step has been counted
        self.history: list[Sweep] = []
        # Before the optimizer's rates fall, say.
        weights = self.midpoint.a, self.midpoint.b
        self.identity: dict[str, str] = {}
        if settings.checkpoint is not None:
            self.identity = identity_of(spec, weights, seed, settings, _COMPARED, self.optimizer)

    def search(self, progress: Progress | None) -> MatchResult:
        """Go through all epochs."""
        outcome: Outcome = "sweep limit"
        if not self._resume():
            self.before = self.objective = self._measure(self.best)
        try:
            if not self.history and not self.steps:
                self._begin()
            while len(self.history) < self.settings.epochs:
                self._epoch()
                if progress is not None:
                    progress(self.history[-1])
        except KeyboardInterrupt:
            outcome = "interrupted"
        return MatchResult(
            self.best,
            self.objective,
            self.before,
            outcome,
            tuple(self.history),
            (self.objective,),
            self.seed,
            time.perf_counter() - self.started,
            () if self.free_parameters else ("nothing to permute: no group of the spec stands in a parameter",),
        )

    def _begin(self) -> None:
        if self.settings.free_weights == "b":  # the free weights are B so permuted, and nothing lies nearer to them
            self.now = self.init
            self._keep_if_better(self.now)
            return
        matcher = self.settings.matcher
        init = None if self.settings.init is None else self.init
        self.now = self._nearest(matcher if init is None else replace(matcher, init=init), self.seed)
        for candidate in (self.now, *(() if init is None else (init,))):
            self._keep_if_better(candidate)

    def _epoch(self) -> None:
        at_start = self.now
        self._place(self.now)
        for number, batch in enumerate(batches(self.loader), start=1):
            if self.steps and self.steps % (self.every or 1) == 0:
                self._project(self.settings.projection_sweeps)
            self._step(number, batch)
        # Free weights that have travelled far take many sweeps, so only the end is worth going on until nothing helps.
        last = len(self.history) + 1 == self.settings.epochs
        self._project(None if last else self.settings.projection_sweeps)
        reached = self._keep_if_better(self.now)
        moved = moved_between(at_start, self.now)
        self.history.append(Sweep(len(self.history) + 1, reached, moved, {}, time.perf_counter() - self.started))
        log.debug("%s", self.history[-1])
        self._save()

    def _step(self, number: int, batch: Any) -> None:
        self.steps += 1
        if self.optimizer is None:
            return
        if self.every is None:
            with counted() as work:
                self._differentiate(number, batch)
            self.every = self._interval(work.operations)
        else:
            self._differentiate(number, batch)
        for free, parameter in zip(self.free_parameters, self.parameters, strict=True):
            free.grad = None if parameter.grad is None else parameter.grad.to(free.dtype)
        self.optimizer.step()

    def _interval(self, operations: int) -> int:
        if self.settings.accelerator is not None:  # batches may differ between processes, the interval must not
            of_all = torch.tensor([float(operations)], device=self.midpoint.device)
            operations = int(self.settings.accelerator.reduce(of_all, reduction="mean").item())
        every = steps_between(self.spec, operations, sum(tensor.numel() for tensor in self.free_parameters))
        log.debug("a projection every %d steps", every)
        return every

    def _differentiate(self, number: int, batch: Any) -> None:
        """Leave the gradients of half the loss on a batch with the network's own parameters."""
        for parameter in self.parameters:
            parameter.grad = None
        value = self.midpoint.value(batch, number)
        if not bool(torch.isfinite(value.detach())):
            self.require_finite()
            self.midpoint.require_finite(value, number)
        # The midpoint has half of the free weights in it, so half of its gradient is theirs.
        half = 0.5 * value
        if self.settings.accelerator is not None:
            self.settings.accelerator.backward(half)
        else:
            half.backward()  # type: ignore[no-untyped-call]

    def _project(self, sweeps: int | None) -> None:
        self.require_finite()
        limit = self.settings.matcher.max_sweeps if sweeps is None else min(sweeps, self.settings.matcher.max_sweeps)
        # Where an ascent ends may hang on the order of the groups, so each projection draws its own.
        matcher = replace(self.settings.matcher, init=self.now, restarts=1, max_sweeps=limit)
        nearest = self._nearest(matcher, self.seed + self.steps)
        if nearest != self.now:
            self.now = nearest
            self._place(nearest)

    def _nearest(self, matcher: WeightMatching, seed: int) -> Permutation:
        """The permutation of B that weight matching takes for the nearest to the free weights."""
        result = matcher.match_warm(self.free, self.midpoint.b, self.spec, seed, prices=self.prices)
        if result.outcome == "interrupted":  # it swallowed Ctrl-C, which was for the whole run
            raise KeyboardInterrupt
        return result.permutation

    def _place(self, permutation: Permutation) -> None:
        self.midpoint.place(self.midpoint.permuted(permutation))

    def require_finite(self) -> None:
        """Refuse free weights that are no longer numbers."""
        for name, tensor in zip(self.midpoint.names, self.free_parameters, strict=True):
            if not bool(torch.isfinite(tensor.detach()).all()):
                raise NonFiniteError(f"the free weights of {name!r} became NaN or infinite; lower the learning rate")

    def _measure(self, permutation: Permutation) -> float:
        """Minus the mean loss over the measured batches, of all processes."""
        if self.measured is not None and self.measured[0] == permutation:
            return self.measured[1]
        total, count = self.midpoint.totals(self.loader, permutation, limit=self.settings.max_batches)
        self.measured = permutation, -mean_of_all(self.settings.accelerator, total, count, self.midpoint.device)
        return self.measured[1]

    def _keep_if_better(self, permutation: Permutation) -> float:
        reached = self._measure(permutation)
        if reached > self.objective:
            self.best, self.objective = permutation, reached
        return reached

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        settings = self.settings
        if settings.checkpoint is None:
            return
        accelerator = settings.accelerator
        if accelerator is None or accelerator.is_main_process:
            state = {
                "free": [tensor.detach() for tensor in self.free_parameters],
                "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
                "steps": self.steps,
                "every": self.every,
                "now": {name: torch.tensor(array) for name, array in self.now.arrays.items()},
                "best": {name: torch.tensor(array) for name, array in self.best.arrays.items()},
                "objective": self.objective,
                "before": self.before,
                "history": [[s.number, s.objective, dict(s.moved), s.seconds] for s in self.history],
                **random_state(self.midpoint.device, settings.loader),
            }
            write_run(settings.checkpoint, self.identity, state, KIND)
        if accelerator is not None:
            accelerator.wait_for_everyone()

    def _resume(self) -> bool:
        """Go to where the checkpoint's run stopped; False if there is none."""
        saved = None if self.settings.checkpoint is None else read_run(self.settings.checkpoint, self.identity, KIND)
        if saved is None:
            return False
        with torch.no_grad():
            for free, kept in zip(self.free_parameters, saved["free"], strict=True):
                free.copy_(kept)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
        self.steps, self.every = saved["steps"], saved["every"]
        self.objective, self.before = saved["objective"], saved["before"]
        self.now, self.best = (
            Permutation(self.spec, {name: array.numpy() for name, array in saved[which].items()})
            for which in ("now", "best")
        )
        self.history = [Sweep(number, value, moved, {}, seconds) for number, value, moved, seconds in saved["history"]]
        restore_random_state(saved, self.midpoint.device, self.settings.loader)
        return True


_COMPARED = ("project_every", "projection_sweeps", "free_weights", "max_batches")
"""Settings that must be the same for a run to go on."""
