"""`FurtherRuns`: a spec tried on inputs other than those of which it is known to hold.

A spec is inferred from some passes and used for a model that runs on others. So after the inputs that were given, the
weights are moved on larger sizes, in training mode with dropout as identity, in later calls, with larger whole numbers
among the arguments; and on thousands of rows where the model ranks units, since two equal ones, of which the first one
is taken, may be found in few rows only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from permgraph.capture import capture
from permgraph.capture.arguments import GIVEN
from permgraph.capture.environment import checked_indices
from permgraph.capture.inputs.registry import ExampleInputs
from permgraph.capture.module_copy import copy_with
from permgraph.capture.outputs import tensor_leaves
from permgraph.capture.passes import IF_DIFFERENT, Variation, larger_by_one, variations
from permgraph.capture.subject import unwrap
from permgraph.errors import CaptureError, in_one_line
from permgraph.spec.elements import AnyElement
from permgraph.verification.report import Run
from permgraph.verification.trial import Trial, distance, is_floating, seeded_generator

#: So many seconds are always there for further runs, however little the first one took.
LEAST_SECONDS = 5.0
#: Where units are ranked, they are in so many rows.
ROWS = 10_000
#: So many times the rows are tried next, until they are as many.
MORE_ROWS = 4
#: A model that keeps something from call to call is called so often.
CALLS = 6
#: Inputs of many rows take no more memory.
MOST_BYTES = 2**28


@dataclass
class FurtherRuns:
    """The runs of one trial beside its first.

    Args:
        trial: which has been run on the inputs given.
        model: of which it is a copy.
        everything: the permutation, or transformation, to apply.
        tolerance: the largest relative error.
        scales: of the weights, the likeliest first; the next one is tried where the outputs are not finite.
        seconds: that all runs may take together.
        run_seconds: that one run on the inputs given took.
        move: what the model returns when all is moved; by default by `everything` alone.
    """

    trial: Trial
    model: Any
    everything: AnyElement
    tolerance: float
    scales: Sequence[float]
    seconds: float
    run_seconds: float
    move: Callable[[], list[Tensor]] | None = None
    runs: list[Run] = field(default_factory=list)

    def __call__(self, first: Variation) -> tuple[Run, ...]:
        """Run all that there is time for; what seems to take too long is put off, until more is known of its cost."""
        deadline = time.monotonic() + self.seconds
        shown = set(IF_DIFFERENT) if self.trial.keeps_state else {"calls", *IF_DIFFERENT}
        rankings = set(self.trial.rankings)
        costs = _Costs([(1.0, self.run_seconds)])
        core = unwrap(self.model).core
        waiting = [*variations(core, first.inputs, self._unread(core, first)), *_odd_sizes(first)]
        put_off: list[Variation] = []
        for variation, again in _twice(waiting, put_off):
            if variation.shows <= shown or (variation.flags and self._adds_by_products(variation)):
                continue
            if variation.calls > 1:
                variation = replace(variation, name=f"{CALLS} calls", calls=CALLS)
            growth = variation.calls * _growth(first.inputs, variation.inputs)
            if 2 * costs.of(growth) > deadline - time.monotonic():
                if again:
                    self._say(variation, "no time was left")
                else:
                    put_off.append(variation)
            elif self._compare(variation):
                shown |= variation.shows
                costs.measured.append((growth, self.trial.run_seconds))
        for variation in self._rows(first, rankings, deadline):
            self._compare(variation)
        self.trial.vary(first)
        return tuple(self.runs)

    def _unread(self, core: Any, first: Variation) -> Sequence[str]:
        """The parameters that the first run does not read, if the spec knows of runs that are given more tensors."""
        if not any(run.name.endswith(GIVEN) and run.outcome == "solved" for run in self.everything.spec.passes):
            return ()
        try:
            return capture(core, first.inputs.args, first.inputs.kwargs).unused
        except CaptureError:
            return ()

    def _adds_by_products(self, variation: Variation) -> bool:
        """Whether a flag makes the model return more than its result, or it is not known that it does not."""
        known = {run.name: run for run in self.everything.spec.passes if run.outcome in ("solved", "alike")}
        return variation.name not in known or known[variation.name].by_products > 0

    def _say(self, variation: Variation, reason: str) -> None:
        self.runs.append(Run(variation.name, variation.inputs.describe(), reason=reason))

    def _compare(self, variation: Variation) -> bool:
        """Compare outputs before and after; whether that was possible."""
        with checked_indices():
            return self._compared(variation)

    def _compared(self, variation: Variation) -> bool:
        try:
            self.trial.vary(variation)
            reference, reason = None, "the outputs are not finite"
            for scale in self.scales:
                reference = self.trial.randomise(scale, self.trial.looks_inside)
                if reference is None:
                    continue
                moved = self.trial.outputs(self.everything) if self.move is None else self.move()
                error = distance(reference, moved)
                if error <= self.tolerance:
                    break
                if self.trial.draws(reference):
                    reference, reason = None, "the outputs depend on random numbers"
                    break
                if self.trial.rounding(reference) <= self.tolerance / 100:
                    break
                reference, reason = None, "the outputs depend on rounding"
        except Exception as failure:  # the module's own, on inputs that it was not written for
            if "rows" not in variation.shows:  # which most models refuse
                self._say(variation, in_one_line(failure.__cause__ or failure, 160))
            return False
        if reference is None:
            self._say(variation, reason)
            return False
        failed: list[str] = []
        if not error <= self.tolerance:
            for name in self.everything.moved():
                alone = self.everything.restricted_to([name])
                if not distance(reference, self.trial.outputs(alone)) <= self.tolerance:
                    failed.append(name)
        self.runs.append(Run(variation.name, variation.inputs.describe(), error, failed=tuple(failed)))
        return True

    def _rows(self, first: Variation, rankings: set[tuple[int, int]], deadline: float) -> Iterator[Variation]:
        """The inputs with so large a batch that units are ranked in thousands of rows, or as many as time allows."""
        sizes = {group.size for group in self.trial.spec.moving.values()}
        ranked = [rows for count, rows in rankings if any(count % size == 0 for size in sizes)]
        if not ranked or min(ranked) >= ROWS:
            return
        wanted = math.ceil(ROWS / max(1, min(ranked)))
        held = sum(tensor.nbytes for tensor in tensor_leaves((first.inputs.args, first.inputs.kwargs)))
        wanted = max(1, min(wanted, MOST_BYTES // max(1, held)))
        factor, seconds, power = 1, self.run_seconds, 1.0
        while factor < wanted:
            step = min(wanted, MORE_ROWS * factor)
            if 3 * seconds * (step / factor) ** power > deadline - time.monotonic():
                break
            larger = replace(first, inputs=many(first.inputs, step))
            try:
                self.trial.vary(larger)
                began = time.monotonic()
                self.trial.outputs(None)
                took = time.monotonic() - began
            except Exception as failure:  # the module takes this batch only
                self._say(replace(first, name="many rows", inputs=larger.inputs), in_one_line(failure, 160))
                return
            if 3 * took > deadline - time.monotonic():
                break
            # Such as 2 where all rows meet each other.
            power = max(1.0, math.log(max(took, 1e-6) / max(seconds, 1e-6), step / factor))
            seconds, factor = took, step
        rows = f"units ranked in {factor * min(ranked):,} rows"
        if factor == 1:
            self._say(replace(first, name=f"units ranked in {ROWS:,} rows"), "no time was left")
            return
        yield Variation(rows, frozenset({"rows"}), many(first.inputs, factor))


@dataclass
class _Costs:
    """What a run takes by how many times as large its inputs are: what was measured, and a line through that beyond."""

    measured: list[tuple[float, float]]

    def of(self, growth: float) -> float:
        """The seconds of a run."""
        (least, fewest), (most, longest) = min(self.measured), max(self.measured)
        if most <= least or longest <= fewest:
            return longest * max(1.0, growth / most)
        return max(longest, fewest + (longest - fewest) * (growth - least) / (most - least))


def _twice(first: Sequence[Variation], second: Sequence[Variation]) -> Iterator[tuple[Variation, bool]]:
    """Those of the first list, and of the second, which grows meanwhile; with whether it is the second."""
    yield from ((variation, False) for variation in first)
    yield from ((variation, True) for variation in list(second))


def _odd_sizes(first: Variation) -> Iterator[Variation]:
    """Each size that a user may vary larger by one: what is a multiple of a patch or a stride is one no more."""
    inputs = larger_by_one(first.inputs)
    if inputs.describe() != first.inputs.describe():
        yield Variation("sizes larger by one", frozenset({"odd sizes"}), inputs)


def _growth(first: ExampleInputs, second: ExampleInputs) -> float:
    """How many times as many elements the second inputs have."""
    sizes = [sum(t.numel() for t in tensor_leaves((given.args, given.kwargs))) for given in (first, second)]
    return sizes[1] / max(1, sizes[0])


def many(inputs: ExampleInputs, factor: int) -> ExampleInputs:
    """The inputs with so many times the batch, and other values in each row: random ones of the same spread.

    What does not vary, such as a mask of ones, and what counts or says yes or no, is repeated.
    """
    generator = seeded_generator(0)

    def larger(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0:
            return tensor
        if is_drawn(tensor):
            shape = (tensor.shape[0] * factor, *tensor.shape[1:])
            low, high = tensor.min(), tensor.max()
            if not is_floating(tensor):
                return torch.randint(int(low), int(high) + 1, shape, generator=generator).to(tensor.dtype)
            made = torch.randn(shape, generator=generator, dtype=torch.float64) * tensor.double().std()
            return (made + tensor.double().mean()).to(tensor.dtype)
        return tensor.repeat(factor, *[1] * (tensor.ndim - 1))

    args, kwargs = copy_with((inputs.args, inputs.kwargs), _on_cpu(larger), {})
    return replace(inputs, args=args, kwargs=kwargs)


def is_drawn(tensor: Tensor) -> bool:
    """Whether a tensor holds values that may as well be others."""
    if (
        tensor.dtype == torch.bool
        or tensor.is_complex()
        or tensor.numel() < 2
        or bool((tensor == tensor.flatten()[0]).all())
    ):
        return False
    if is_floating(tensor):
        return bool(torch.isfinite(tensor).all())
    return not any(size > 1 and bool((tensor.diff(dim=d) == 1).all()) for d, size in enumerate(tensor.shape))


def _on_cpu(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda tensor: change(tensor.detach().cpu())
