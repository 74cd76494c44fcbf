"""`verify`: the proof that a spec preserves a model's function, built so that it can fail.

Every parameter and buffer is made random first, because a zero head, or a BatchNorm at its initial ones, makes any
permutation look harmless. The model then runs in float64 before and after a random element of the group with every
group moved; the outputs must agree. As a control, each group is moved on all of its axes but one: now the output must
*change*, or the test above would have shown nothing about that group. A group that cannot be torn apart so, because it
stands in one axis alone, or because the output stays also when its axes are moved apart, has the weights that it moves
scaled at random instead, to see that they matter. Where that changes nothing either, they have no part in the output:
moving them does no harm, and they are named.

A detector that finds nothing returns empty tensors, and a decoder token ids; little can be seen on those. Weights of
another scale are tried then, and if no scale helps, what the modules inside return is compared as well. A symmetry only
reorders it, so its mean magnitude and its mean square must stay; a torn one changes them.

All this is done on one set of inputs, which need not be those of the inference. `FurtherRuns` then repeats the move,
and not the controls, on others.

One copy of the model is held, in float64. Weights are a function of the seed, so that what a permutation overwrote need
not be kept: it is drawn again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from permgraph.capture import capture
from permgraph.capture.inputs.registry import ExampleInputs
from permgraph.capture.passes import Variation
from permgraph.capture.subject import unwrap
from permgraph.capture.untied import untied
from permgraph.conventions.waiting import waits
from permgraph.errors import CaptureError, EvaluationError, MismatchError, in_one_line
from permgraph.inference.auto_spec import auto_spec
from permgraph.spec.data import SpecData
from permgraph.spec.elements import AnyElement
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.verification.further import LEAST_SECONDS, FurtherRuns
from permgraph.verification.own_precision import in_own_precision
from permgraph.verification.report import Control, GroupReport, Run, Verification
from permgraph.verification.trial import Trial, distance, is_floating, seeded_generator

SCALES = (1.0, 0.7, 0.5, 0.3, 0.05)


@waits("verifying")
def verify(
    model: nn.Module,
    spec: PermutationSpec | None = None,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    permutation: AnyElement | None = None,
    seed: int = 0,
    tolerance: float = 1e-9,
    controls: Literal["one", "all", "none"] = "one",
    further: float = 2.0,
    max_seconds: float | None = None,
) -> Verification:
    """Check, in float64, that a spec's group preserves what a model computes.

    Weights are made random, every group is moved, and the outputs are compared: on the inputs given, with controls, and
    on further ones (larger sizes, training mode, later calls, thousands of rows where units are ranked). The report's
    `runs` say which. What the model does not run on is said there, and is no failure.

    Args:
        model: the module; it is not changed, and may be on the meta device.
        spec: the spec to check; inferred if None. Of one with general symmetries, random elements of the whole group
            are tried, and larger structures are, too: see `GeneralVerification`. Of by-products, it says how they
            move: they are compared after they were moved back.
        example_inputs: positional arguments of forward; found if neither these nor keyword arguments are given.
        example_kwargs: keyword arguments of forward.
        permutation: check this one, on the model's own weights: that they compute the same after it, as
            ``verify(b, permutation=align(a, b).element)`` does. Its spec is the one that counts. It may be a
            `Transformation`, of a spec with general symmetries.
        seed: for the weights and the permutations.
        tolerance: the largest relative error at which outputs count as equal.
        controls: for each group, try axes until leaving one unmoved changes the output (``"one"``), try every axis
            (``"all"``), or none. Groups of which no control changes anything are in the report's `without_influence`.
        further: the further inputs may take so many times the seconds of the given ones, and five seconds in any case;
            0 leaves them out.
        max_seconds: begin with the controls of no further group after this many seconds, for models of which one
            forward pass takes minutes. The groups left out are drawn by the seed, and named in ``.untried``.

    Raises:
        CaptureError: the model cannot be run, or its output is not finite whatever the weights' scale.
        MismatchError: the spec is not of this model, or the permutation not of the spec; or the model's own weights,
            which a permutation is checked on, are not at hand.
        EvaluationError: `controls` is none of the three; or the outputs on the model's own weights depend on rounding.

    >>> import torch, permgraph as pg
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    >>> print(pg.verify(model).runs[0])
    the inputs, (float32[2, 3])
    """
    if controls not in ("one", "all", "none"):
        raise EvaluationError(f"controls is {controls!r}; it may be 'one', 'all' or 'none'")
    if permutation is None:
        acting: SpecData = auto_spec(model, example_inputs, example_kwargs) if spec is None else spec
    else:
        acting = permutation.spec
        if spec is not None and spec.fingerprint != acting.fingerprint:
            raise MismatchError("the permutation is of another spec than the one given with it: leave out spec=")
    unread = tuple(name for name in acting.unused if acting.aliases.get(name, name) in acting.axes)  # not mere counters
    if not acting.acting and not acting.null_directions:
        note = "nothing to permute: the spec has no groups"
        return Verification(True, 0.0, tolerance, {}, note=note, unread=unread)
    if permutation is not None and permutation.is_identity:
        return Verification(True, 0.0, tolerance, {}, note="the permutation moves nothing", unread=unread)
    started = time.monotonic()
    if acting.general is not None and acting.general.untied:
        model = untied(model, share=True)
    if example_inputs is None and example_kwargs is None:
        inputs = capture(model).inputs
    else:
        given = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs or ())
        inputs = ExampleInputs(given, dict(example_kwargs or {}), "given")
    if permutation is None and acting.general is not None:
        from permgraph.verification.general import verify_general

        assert isinstance(acting, PermutationSpec)
        first = Variation("the inputs", frozenset(), inputs)
        return replace(
            verify_general(model, acting, first, seed, tolerance, controls, further, max_seconds), unread=unread
        )
    proof = _Proof(model, acting, inputs, permutation, seed, tolerance, controls, started, max_seconds)
    found = proof.on_the_first_inputs()
    late = max_seconds is not None and time.monotonic() - started > max_seconds
    if further > 0 and not late and (found.passed or found.max_error <= tolerance):
        found = proof.and_on_others(found, max(LEAST_SECONDS, further * (time.monotonic() - started)))
    if isinstance(permutation, Transformation):
        try:
            found = replace(found, own_precision=in_own_precision(model, permutation, inputs.args, inputs.kwargs))
        except RuntimeError as error:  # the inputs were found for another device or precision
            found = replace(found, note=f"not run in its own precision: {in_one_line(error, 160)}")
    return replace(found, unread=unread)


class _Proof:
    """One call of `verify`."""

    def __init__(
        self,
        model: nn.Module,
        spec: SpecData,
        inputs: ExampleInputs,
        permutation: AnyElement | None,
        seed: int,
        tolerance: float,
        controls: Literal["one", "all", "none"],
        started: float,
        max_seconds: float | None,
    ) -> None:
        self.model, self.spec, self.tolerance, self.controls = model, spec, tolerance, controls
        self.started, self.max_seconds = started, max_seconds
        self.own = permutation is not None
        self.first = Variation("the inputs", frozenset(), inputs)
        self.trial = Trial(model, spec, self.first, seed, own_weights=self.own)
        self.everything: AnyElement = permutation or Permutation.random(spec, seed, every_group=True)
        moved = [name for name, count in self.everything.moved().items() if count and name in spec.acting]
        order = torch.randperm(len(moved), generator=seeded_generator(seed)).tolist()
        self.moved, self.order = moved, [moved[at] for at in order]
        self.scales = (1.0,) if self.own else SCALES
        self.scale = self.scales[0]
        self.run_seconds = 0.0

    def on_the_first_inputs(self) -> Verification:
        """Every group moved, and the controls."""
        trial, tolerance = self.trial, self.tolerance
        max_error, outputs = 0.0, 0
        reports: dict[str, GroupReport] = {}
        untried: set[str] = set()
        says_little = False
        for inside, scale in itertools.product((False, True), self.scales):
            # A group that seems to have no influence is tried again on smaller weights: a softmax or a sigmoid that
            # large ones drive to its limit hides what is before it.
            waiting = [name for name in self.order if name not in reports or reports[name].inert_throughout]
            if not waiting or (inside and not says_little):
                break
            reference = trial.randomise(scale, inside)
            run_seconds = trial.run_seconds
            if reference is None:
                continue  # the model blows up
            if not inside and (any(t.numel() == 0 for t in reference) or not any(map(is_floating, reference))):
                says_little = True  # a detector that finds nothing on these weights, or class numbers
                continue
            last = scale == self.scales[-1] and (inside or not says_little)
            if (reports or not last) and trial.rounding(reference) > tolerance / 100:
                continue  # it is chaotic on these weights: its rounding would pass for an error
            if not reports:
                self.scale, self.run_seconds = scale, run_seconds
            outputs = len(reference)
            max_error = max(max_error, distance(reference, trial.outputs(self.everything)))
            ok = max_error <= tolerance
            if self.own and not ok and 100 * (moved := trial.rounding(reference)) > max_error:
                raise EvaluationError(
                    f"{type(unwrap(self.model).core).__name__} amplifies rounding on its own weights: the outputs move "
                    f"by {moved:.1e} when these move in their last place, and {max_error:.1e} when they are permuted, "
                    "so that nothing can be told; pass other example_inputs, or verify the spec on random weights"
                )
            threshold = max(1e-10, 100 * max_error) if ok else tolerance
            for name in waiting:
                late = self.max_seconds is not None and time.monotonic() - self.started > self.max_seconds
                alone = self.everything.restricted_to([name])
                error = max_error if ok else distance(reference, trial.outputs(alone))
                tried: list[Control] = []
                if late and self.controls != "none":
                    untried.add(name)
                elif self.controls != "none":
                    tried = list(self._controls(reference, alone, name, threshold))
                reports[name] = GroupReport(name, self.spec.groups[name].size, error, tuple(tried), error <= tolerance)
            if not ok:
                break
        if not reports:
            weights = "its own" if self.own else "random"
            raise CaptureError(
                f"{type(unwrap(self.model).core).__name__} gives NaN, or nothing finite, on {weights} weights"
            )
        reports = {name: reports[name] for name in self.moved}
        passed = max_error <= tolerance and all(report.passed for report in reports.values())
        looked = (
            "outputs are empty or integers, so what the modules return was compared too" if trial.looks_inside else ""
        )
        note = "; ".join(filter(None, (looked, trial.compared.note())))
        left_out = tuple(name for name in self.moved if name in untried)
        failed = tuple(name for name, report in reports.items() if not report.passed)
        runs = (Run(self.first.name, self.first.inputs.describe(), max_error, failed=failed),)
        return Verification(passed, max_error, tolerance, reports, outputs, note, left_out, runs)

    def _controls(
        self, reference: Sequence[Tensor], alone: AnyElement, name: str, threshold: float
    ) -> Iterator[Control]:
        uses = self.spec.uses(name)
        changed = False
        if len(uses) > 1:
            for parameter, dim in uses:
                change = distance(reference, self.trial.outputs(alone, exclude=[(parameter, dim)]))
                passed = not change <= threshold  # an output that is no longer finite has changed as well
                yield Control(name, parameter, dim, change, passed)
                changed |= passed
                if changed and self.controls == "one":
                    return
        for parameter, dim in () if changed else uses:
            change = distance(reference, self.trial.outputs_scaled(alone, parameter))
            passed = not change <= threshold
            yield Control(name, parameter, dim, change, passed, scaled=True)
            if passed:
                return

    def and_on_others(self, found: Verification, seconds: float) -> Verification:
        """The verdict with what further inputs showed."""
        likeliest = sorted(self.scales, key=lambda scale: scale != self.scale)
        further = FurtherRuns(
            self.trial, self.model, self.everything, self.tolerance, likeliest, seconds, self.run_seconds
        )
        return found.with_runs(further(self.first))
