"""`verify`: the proof that a spec preserves a model's function, built so that it can fail.

Every parameter and buffer is made random first, because a zero head, or a BatchNorm at its initial ones, makes any
permutation look harmless. The model then runs in float64 before and after a random element of the group with every
group moved; the outputs must agree. As a control, each group is moved on all of its axes but one: now the output must
*change*, or the test above would have shown nothing about that group. A group that stands in one axis alone cannot be
torn apart so; there the weights that it moves are scaled at random instead, to see that they matter.

A detector that finds nothing returns empty tensors, and a decoder token ids; little can be seen on those. Weights of
another scale are tried then, and if no scale helps, what the modules inside return is compared as well. A symmetry only
reorders it, so its mean magnitude and its mean square must stay; a torn one changes them.

One copy of the model is held, in float64. Weights are a function of the seed, so that what a permutation overwrote need
not be kept: it is drawn again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from permgraph.capture import capture
from permgraph.capture.subject import unwrap
from permgraph.errors import CaptureError, EvaluationError
from permgraph.inference.auto_spec import auto_spec
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.verification.report import Control, GroupReport, Verification
from permgraph.verification.trial import Trial, distance, is_floating, seeded_generator

SCALES = (1.0, 0.7, 0.5, 0.3, 0.05)


def verify(
    model: nn.Module,
    spec: PermutationSpec | None = None,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    tolerance: float = 1e-9,
    controls: Literal["one", "all", "none"] = "one",
    max_seconds: float | None = None,
) -> Verification:
    """Check on random weights, in float64, that a spec's group preserves what a model computes.

    Args:
        model: the module; it is not changed, and may be on the meta device.
        spec: the spec to check; inferred if None. Of one with general symmetries, random elements of the whole group
            are tried, and larger structures are, too: see `GeneralVerification`.
        example_inputs: positional arguments of forward; found if neither these nor keyword arguments are given.
        example_kwargs: keyword arguments of forward.
        seed: for the weights and the permutations.
        tolerance: the largest relative error at which outputs count as equal.
        controls: for each group, try axes until leaving one unmoved changes the output (``"one"``), try every axis
            (``"all"``), or none. A group on which no control changes anything fails.
        max_seconds: begin with the controls of no further group after this many seconds, for models of which one
            forward pass takes minutes. The groups left out are drawn by the seed, and named in ``.untried``.

    Raises:
        CaptureError: the model cannot be run, or its output is not finite whatever the weights' scale.
        MismatchError: the spec is not of this model.
        EvaluationError: `controls` is none of the three.
    """
    if controls not in ("one", "all", "none"):
        raise EvaluationError(f"controls is {controls!r}; it may be 'one', 'all' or 'none'")
    if spec is None:
        spec = auto_spec(model, example_inputs, example_kwargs)
    if spec.general is not None:
        from permgraph.verification.general import verify_general

        if example_inputs is None and example_kwargs is None:
            found = capture(model).inputs
            example_inputs, example_kwargs = found.args, found.kwargs
        return verify_general(model, spec, example_inputs, example_kwargs, seed, tolerance, controls, max_seconds)
    if not spec.moving:
        return Verification(True, 0.0, tolerance, {}, note="nothing to permute: the spec has no groups")
    started = time.monotonic()
    if example_inputs is None and example_kwargs is None:
        found = capture(model).inputs
        example_inputs, example_kwargs = found.args, found.kwargs
    trial = Trial(model, spec, example_inputs, example_kwargs, seed)
    everything = spec.random(seed, every_group=True)
    order = [list(spec.moving)[i] for i in torch.randperm(len(spec.moving), generator=seeded_generator(seed)).tolist()]
    max_error, outputs = 0.0, 0
    reports: dict[str, GroupReport] = {}
    untried: set[str] = set()
    says_little = False
    for inside, scale in itertools.product((False, True), SCALES):
        # A group that seems to have no influence is tried again on smaller weights: a softmax or a sigmoid that large
        # ones drive to its limit hides what is before it.
        waiting = [name for name in order if name not in reports or reports[name].inert_throughout]
        if not waiting or (inside and not says_little):
            break
        reference = trial.randomise(scale, inside)
        if reference is None:
            continue  # the model blows up
        if not inside and (any(t.numel() == 0 for t in reference) or not any(map(is_floating, reference))):
            says_little = True  # a detector that finds nothing on these weights, or class numbers
            continue
        last = scale == SCALES[-1] and (inside or not says_little)
        if (reports or not last) and trial.rounding(reference) > tolerance / 100:
            continue  # it is chaotic on these weights: its rounding would pass for an error
        outputs = len(reference)
        max_error = max(max_error, distance(reference, trial.outputs(everything)))
        ok = max_error <= tolerance
        threshold = max(1e-10, 100 * max_error) if ok else tolerance
        for name in waiting:
            late = max_seconds is not None and time.monotonic() - started > max_seconds
            alone = everything.restricted_to([name])
            error = max_error if ok else distance(reference, trial.outputs(alone))
            tried = []
            if late and controls != "none":
                untried.add(name)
            elif controls != "none":
                tried = list(_controls(trial, reference, alone, name, threshold, controls))
            passed = error <= tolerance and (controls == "none" or late or any(control.passed for control in tried))
            reports[name] = GroupReport(name, spec.groups[name].size, error, tuple(tried), passed)
        if not ok:
            break
    if not reports:
        raise CaptureError(f"{type(unwrap(model).core).__name__} gives NaN, or nothing finite, on random weights")
    reports = {name: reports[name] for name in spec.moving}
    passed = max_error <= tolerance and all(report.passed for report in reports.values())
    note = "outputs are empty or integers, so what the modules return was compared too" if trial.looks_inside else ""
    left_out = tuple(name for name in spec.moving if name in untried)
    return Verification(passed, max_error, tolerance, reports, outputs, note, left_out)


def _controls(
    trial: Trial,
    reference: Sequence[Tensor],
    alone: Permutation,
    name: str,
    threshold: float,
    controls: Literal["one", "all", "none"],
) -> Iterator[Control]:
    uses = trial.spec.uses(name)
    for parameter, dim in uses:
        if len(uses) > 1:
            torn = trial.outputs(alone, exclude=[(parameter, dim)])
        else:
            torn = trial.outputs_scaled(alone, parameter)
        change = distance(reference, torn)
        passed = not change <= threshold  # an output that is no longer finite has changed as well
        yield Control(name, parameter, dim, change, passed)
        if passed and controls == "one":
            return
