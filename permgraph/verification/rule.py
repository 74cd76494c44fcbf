"""`check_rule`: is an operator's rule right? Public, so that whoever writes a rule can tell."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from permgraph.rules.registry import find_rule
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.verification.structure_of_rule import more_than_declared, structure_law, structures_text
from permgraph.verification.trial_of_rule import Trial, Typed, attempt, canonical
from permgraph.verification.witness import denied

SEEDS = (0, 1, 2)
TOLERANCE = {torch.float64: 1e-8, torch.complex128: 1e-8}

Verdict = Literal["ok", "incorrect", "too strict", "no rule"]


@dataclass(frozen=True)
class RuleReport:
    """What `check_rule` found.

    Args:
        verdict: ``"ok"``; ``"incorrect"`` if the rule allows what changes the results; ``"too strict"`` if it denies
            what does not; ``"no rule"`` if an operator that ran has none.
        axes: the axes of inputs and results as the rule ties them, ``"(a), (b c), (c a) -> (b a)"``. A letter is a
            group, a dot stays put, ``(a b)`` inside is a product and ``[a + b]`` a sum; after ``;`` comes the axis
            that an index tensor's values number; ``a!`` is an axis that stays put over which others are fibred; and
            ``where a per b`` says that a may be permuted differently at each index of b.
        problems: what is wrong, one sentence each.
        operators: the operators that ran.
        max_error: the largest difference between results that should be equal.
        spec: the groups that the rule allows on the inputs and results.
        structures: what acts on each of these groups by what the rule declares with ``acts=``, as in ``"a GL · b P"``;
            groups of which nothing is said but permutations are left out.
    """

    verdict: Verdict
    axes: str
    problems: tuple[str, ...]
    operators: tuple[str, ...]
    max_error: float
    spec: PermutationSpec
    structures: str = ""
    _more: Callable[[], Iterator[str]] = field(default=lambda: iter(()), repr=False, compare=False)

    @functools.cached_property
    def beyond(self) -> tuple[str, ...]:
        """What acts on an axis besides what the rule declares, one sentence each; worked out when it is asked for.

        It is no mistake to declare less.
        """
        return tuple(self._more())

    @property
    def passed(self) -> bool:
        """Whether the verdict is ``"ok"``."""
        return self.verdict == "ok"

    def matches(self, expected: str) -> bool:
        """Whether these are the axes that are expected; names of groups do not matter.

        Example: ``"(o), (m k), (k o) -> (m o)"`` is matched by the axes of `torch.addmm`, up to its fibres.
        """
        return canonical(self.axes) == canonical(expected)

    def __str__(self) -> str:
        names = ", ".join(self.operators)
        lines = [f"{names}: {self.axes}: {self.verdict}"]
        lines += [f"  acts: {self.structures}"] if self.structures else []
        return "\n".join([*lines, *(f"  {sentence}" for sentence in (*self.problems, *self.beyond))])


def check_rule(op: Callable[..., Any], *args: Any, **kwargs: Any) -> RuleReport:
    """Test an operator's rule in both directions, on example arguments.

    *Soundness*: random elements of the inferred group act on all inputs, the operator runs, and what comes out must be
    the group's action on the former results, f(πx) = ρf(x). *Exactness*: the axes are returned as text to compare with
    what they should be, and every exchange of two indices, on each axis and set of axes of one size, is tried; if it
    renumbers the results but is not in the group, the rule is too strict.

    What the rule declares with ``acts=`` is tried in the same way: random scales, signs and matrices of the structures
    that follow act on inputs and results; and directions are counted along which no more than these acts, see
    `RuleReport.beyond`.

    Give floating-point tensors random float64 values, and dimensions that have nothing to do with each other different
    sizes, best distinct primes: then nothing is equal by chance.

    Args:
        op: an operator, such as ``torch.ops.aten.addmm.default``, or a function of tensors, of which every operator
            that it calls is recorded; use a function where an index must come from somewhere
            (``lambda x, s: x.gather(1, s.topk(3, 1).indices)``).
        args: positional arguments, lists of tensors among them. None of them is changed.
        kwargs: keyword arguments.

    Returns:
        The report: ``.passed``, ``.axes``, ``.problems``.

    Raises:
        ConflictError: the rule ties axes of different sizes, or fails.

    >>> print(check_rule(torch.ops.aten.mm.default, torch.randn(2, 3).double(), torch.randn(3, 5).double()))
    aten.mm.default: (a b), (b c) -> (a c): ok
      acts: a GL · b GL · c GL
    """
    trial = attempt(op, args, kwargs)
    without = [name for name in dict.fromkeys(trial.operators) if find_rule(name) is None]
    before = trial.call(trial.tensors)
    max_error, problems = _law(trial, before)
    if not problems:
        error, problems = structure_law(trial, before)
        max_error = max(max_error, error)
    verdict: Verdict = "incorrect" if problems else "ok"
    more = functools.partial(more_than_declared, trial, before if not problems else None)
    if not problems:
        problems = list(denied(trial))
        verdict = "too strict" if problems else "ok"
    if without:
        verdict, problems = "no rule", [*(f"there is no rule for {name}" for name in without), *problems]
    return RuleReport(
        verdict, trial.axes_text(), tuple(problems), trial.operators, max_error, trial.spec,
        structures_text(trial), more,
    )  # fmt: skip


def _law(trial: Trial, before: Sequence[Tensor]) -> tuple[float, list[str]]:
    """The largest error over random elements, and a sentence for each group that breaks the law by itself."""
    worst = 0.0
    broken = False
    for seed in SEEDS:
        error, bad = _difference(trial, before, trial.spec.random(seed, every_group=True))
        worst, broken = max(worst, error), broken or bad
    if not broken:
        return worst, []
    problems = []
    for group in trial.spec.moving:
        for seed in SEEDS:
            element = trial.spec.random(seed, every_group=True).restricted_to([group])
            error, bad = _difference(trial, before, element)
            if bad:
                said = f"moving {', '.join(_places(trial, group))} together changes the results by {error:.3g}"
                problems.append(said + _only_as_a_fibre(trial, before, element, group))
                break
    return worst, problems or ["moving all groups at once changes the results, though each alone does not"]


def _only_as_a_fibre(trial: Trial, before: Sequence[Tensor], element: Permutation, group: str) -> str:
    """What to add where a group may be moved, but not otherwise at each index of another."""
    parents = trial.spec.groups[group].parents
    if not parents:
        return ""
    array = element.arrays[group]
    rows = array.reshape(-1, array.shape[-1])
    row = rows[(rows != np.arange(array.shape[-1])).any(axis=1).argmax()]  # one that moves something
    alike = Permutation(trial.spec, {group: np.broadcast_to(row, array.shape)})
    if _difference(trial, before, alike)[1]:
        return ""
    over = " and ".join(_places(trial, parent)[0] for parent in parents)
    return (
        f" if it is done otherwise at each index of {over}, but not if it is done alike at all of them: "
        "via= may lack a tensor inside the operator"
    )


def _difference(trial: Trial, before: Sequence[Tensor], element: Any) -> tuple[float, bool]:
    moved = [typed.act(element, tensor) for typed, tensor in zip(trial.inputs, trial.tensors, strict=True)]
    after = trial.call(moved)
    worst, bad = 0.0, False
    for typed, old, new in zip(trial.outputs, before, after, strict=True):
        if old.shape != new.shape:
            return float("inf"), True
        expected = typed.act(element, old)
        if expected.dtype.is_floating_point or expected.dtype.is_complex:
            tolerance = TOLERANCE.get(new.dtype, 1e-4)
            bad |= not torch.allclose(expected, new, rtol=tolerance, atol=tolerance, equal_nan=True)
            error = torch.nan_to_num((expected - new).abs())
        else:
            bad |= not torch.equal(expected, new)
            error = (expected.double() - new.double()).abs()
        worst = max(worst, float(error.max()) if error.numel() else 0.0)
    return worst, bad


def _places(trial: Trial, group: str) -> list[str]:
    def dims(typed: Typed) -> list[str]:
        occurrences = trial.spec.layout(typed.axes).occurrences
        found = dict.fromkeys(o.dim for o in occurrences if o.group == group)
        last = len(typed.axes) - 1 if typed.indexed is not None else None
        return [f"the values of {typed.name}" if dim == last else f"dimension {dim} of {typed.name}" for dim in found]

    return [place for typed in (*trial.inputs, *trial.outputs) for place in dims(typed)]
