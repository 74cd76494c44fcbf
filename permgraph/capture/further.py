"""Running a module again, differently, until nothing new is seen or enough has run."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from permgraph.capture.arguments import fixed_arguments
from permgraph.capture.by_products import without_by_products
from permgraph.capture.captured import Captured
from permgraph.capture.draws import draws, mark_cuts, more_draws
from permgraph.capture.joined import alike
from permgraph.capture.passes import ASPECTS, IF_DIFFERENT, Variation, variations
from permgraph.capture.record import Limits
from permgraph.capture.run import capture_again, first_line
from permgraph.capture.subject import unwrap

log = logging.getLogger(__name__)

Outcome = Literal["solved", "alike", "failed", "not run"]


@dataclass(frozen=True)
class Tried:
    """A pass, and what became of it.

    Attributes:
        variation: how it differs from the first.
        outcome: ``"solved"`` together with the others; ``"alike"``: it differs from one of them in its sizes, and in
            the mode of batch norms, alone, so that it says nothing new; ``"failed"``; or ``"not run"``.
        says: what it added, or why it did not run.
        operators: how many operators ran.
        by_products: how many of its outputs are left out, see `without_by_products`.
    """

    variation: Variation
    outcome: Outcome
    says: str
    operators: int = 0
    by_products: int = 0


class FurtherPasses:
    """The passes of one module that say something new, the first of them given; and what became of the others.

    At most `max_passes` run, the first one among them.

    Attributes:
        passes: those that are to be solved together.
        in_training: those that differ from one of them in the mode of their batch norms, which matters to scales alone.
        tried: every pass that was thought of, and what became of it.
        limits: when the time is up.
        fixed: the arguments of which nothing says what else they may be.
    """

    def __init__(self, model: Any, captured: Captured, max_passes: int, limits: Limits) -> None:
        self.passes = [captured]
        self.in_training: list[Captured] = []
        self.limits = limits
        self.fixed = fixed_arguments(unwrap(model).core, captured.inputs)
        first = Variation("the first pass", frozenset(), captured.inputs)
        self.tried = [Tried(first, "solved", "", _count(captured))]
        shown = set(IF_DIFFERENT) if captured.keeps_state else {"calls", *IF_DIFFERENT}  # else one call is like another
        runs = 1
        unread = _unread(captured)
        kinds = draws(captured), variations(unwrap(model).core, captured.inputs, unread, shown)
        later: list[Variation] = []
        refused: set[str] = set()
        bases: dict[str, Captured] = {}
        for variation in itertools.chain(_alternating(*kinds), later) if max_passes > 1 else ():
            if variation.shows <= shown:
                continue
            if runs >= max_passes or limits.over():
                bound = f"max_passes={max_passes}" if runs >= max_passes else f"max_seconds={limits.max_seconds}"
                self.tried.append(Tried(variation, "not run", bound))
                continue
            if "training" in shown and variation.inputs.describe() in refused:
                continue  # training mode runs, so that it were the inputs that it refused
            try:
                again = capture_again(model, captured, variation, limits)
            except Exception as error:  # the module's own: it was not written for these inputs, or has no such values
                reason = f"{type(error).__name__}: {first_line(error)[:120]}"
                if variation.training:
                    refused.add(variation.inputs.describe())
                if "rows" not in variation.shows:  # which most models refuse
                    self.tried.append(Tried(variation, "failed", reason))
                log.debug("a pass with %s failed: %s", variation.name, reason)
                continue
            runs += 1
            shown |= variation.shows
            if variation.training and again.keeps_attributes and variation.calls == 1:
                shown.discard("calls in training")
            unread &= _unread(again)
            if variation.on_other_values:
                mark_cuts(bases.get(variation.name, captured), again)
            elif again.mode == "real":
                more = list(more_draws(variation, again, self.passes))
                later += more
                bases.update((one.name, again) for one in more)
            left_out = 0
            if variation.flags:
                again, left_out = without_by_products(again, captured)
            if any(alike(one, again) for one in (*self.passes, *self.in_training)):
                self.tried.append(Tried(variation, "alike", "nothing new", _count(again), left_out))
            elif any(alike(one, again, in_any_mode=True) for one in self.passes):
                self.tried.append(Tried(variation, "alike", "statistics of the batch", _count(again), left_out))
                self.in_training.append(again)
            else:
                if unread or _unread(again) != _unread(captured):
                    shown -= _to_be_told_apart(variation, captured, again)
                says = _added(self.passes, again, left_out)
                self.tried.append(Tried(variation, "solved", says, _count(again), left_out))
                self.passes.append(again)

    def keep_the_first(self, reason: str) -> None:
        """Let go of all passes but the first, since they cannot be solved together."""
        self.passes, self.in_training = self.passes[:1], []
        self.tried = [replace(one, outcome="failed", says=reason) if at else one for at, one in enumerate(self.tried)]

    def notes(self) -> tuple[str, ...]:
        """What of that which a user may vary no pass has shown, in sentences."""
        fixed = f"no pass ran with another {', '.join(self.fixed)}: nothing says what else it may be"
        real = next((one.fallback_reason for one in self.passes if one.mode == "real"), None)
        branch = f"a further pass ran on real tensors, for the branch that they took, because {real}"
        said = [(fixed, bool(self.fixed)), (branch, real is not None and self.passes[0].mode == "fake")]
        return (*_uncovered(self.tried), *(note for note, holds in said if holds))


#: What could not be shown where something else could not: of two, the second is not said besides.
_PARTS = (("batch", "sizes alone"), ("sizes", "batch"), ("training", "training alone"), ("calls", "calls in training"))


def _uncovered(tried: Sequence[Tried]) -> tuple[str, ...]:
    shown = {aspect for one in tried if one.outcome in ("solved", "alike") for aspect in one.variation.shows}
    reasons: dict[str, str] = {}
    values = [one for one in tried if one.variation.on_other_values and one.outcome == "not run"]
    if values:
        reasons[f"{len(values)} of the other values that Python might read"] = values[0].says
    for one in tried:
        if one.variation.on_other_values:  # one that fails may be one that no input leads to
            continue
        for aspect in one.variation.shows - shown if one.outcome in ("failed", "not run") else ():
            reasons.setdefault(aspect, one.says)
    reasons.pop("rows", None)  # a bold guess, which says nothing where it is wrong
    for whole, part in _PARTS:
        if whole in reasons:
            reasons.pop(part, None)
    by_reason: dict[str, list[str]] = {}
    for aspect, reason in reasons.items():
        by_reason.setdefault(reason, []).append(ASPECTS.get(aspect, aspect))
    return tuple(f"no pass ran with {', '.join(sorted(aspects))}: {reason}" for reason, aspects in by_reason.items())


def _to_be_told_apart(variation: Variation, first: Captured, again: Captured) -> frozenset[str]:
    """What is to be varied by itself, after a pass that varied it together with something else said something new.

    A layer of training alone may follow one of short inputs alone; where all weights were read in both passes, no such
    layer is left. Where larger sizes in training mode are like no
    other pass, larger sizes in evaluation mode tell which of the two it comes from; if from both, training mode shows
    the rest.
    """
    if variation.training and "batch" in variation.shows:
        return frozenset({"sizes alone"})
    if "sizes alone" in variation.shows and not alike(first, again):
        return frozenset({"training alone"})
    return frozenset()


def _alternating(*kinds: Iterable[Variation]) -> Iterator[Variation]:
    """The first of each kind, the second of each, and so on."""
    turns = itertools.zip_longest(*kinds)
    return (variation for turn in turns for variation in turn if variation is not None)


def _unread(captured: Captured) -> set[str]:
    """The floating-point parameters and buffers that a pass did not read."""
    return {
        name
        for node in captured.graph.nodes
        if node.op == "placeholder" and node.meta["kind"] in ("parameter", "buffer") and not node.users
        if node.meta["val"].is_floating_point() or node.meta["val"].is_complex()
        for name in node.meta["names"]
    }


def _count(captured: Captured) -> int:
    return sum(node.op == "call_function" for node in captured.graph.nodes)


def _added(passes: Sequence[Captured], again: Captured, left_out: int) -> str:
    """What a pass has that no earlier one had, in words."""
    said = []
    unread = set.intersection(*map(_unread, passes)) - _unread(again)
    if read := [name for name in passes[0].unused if name in unread]:
        said.append(f"reads {', '.join(read[:3])}{f' and {len(read) - 3} more' if len(read) > 3 else ''}")
    kinds = Counter(str(node.target) for node in again.graph.nodes if node.op == "call_function")
    known = {str(node.target) for one in passes for node in one.graph.nodes}
    if new := [kind for kind in kinds if kind not in known]:
        said.append(f"runs {', '.join(new[:3])}{f' and {len(new) - 3} more' if len(new) > 3 else ''}")
    if left_out:
        said.append(f"returns {left_out} intermediate results, whose units move")
    return "; ".join(said) or "other operators or sizes"
