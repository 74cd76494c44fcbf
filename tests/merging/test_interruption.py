"""Ctrl-C while several models are merged: the best so far, its true objective, and an outcome that says so."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from permgraph.matching.ascent import step
from permgraph.merging import (
    CycleConsistent,
    FrankWolfeMany,
    Joining,
    MergeMany,
    MergeMethod,
    Models,
    ToReference,
    merge,
)
from permgraph.merging.ascent import Ascent
from permgraph.merging.result import Found
from permgraph.merging.streamed import StreamedRounds
from permgraph.spec.permutation import Permutation
from tests.matching.examples import SPECS, inner, state

METHODS: dict[str, MergeMethod] = {
    "merge many": MergeMany(),
    "to reference": ToReference(index=1),
    "cycle consistent": CycleConsistent(restarts=2),
    "Frank-Wolfe": FrankWolfeMany(max_steps=3),
    "joining": Joining(),
    "streamed": StreamedRounds(),
}
SPEC = SPECS["mlp"]
MODELS = [state(SPEC, seed) for seed in range(4)]


class CtrlC:
    """Does what it stands for, but for one call, the nth, in whose place somebody presses Ctrl-C."""

    def __init__(self, instead_of: Any, at: int) -> None:
        self.instead_of, self.at, self.calls = instead_of, at, 0

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.instead_of(*arguments, **keywords)


def pairs(permutations: tuple[Permutation, ...]) -> float:
    moved = [p.apply(model) for p, model in zip(permutations, MODELS, strict=True)]
    names = [name for name in SPEC.axes if any(one.group in SPEC.moving for one in SPEC.occurrences(name))]
    return sum(inner({n: a[n] for n in names}, {n: b[n] for n in names}) for a, b in itertools.combinations(moved, 2))


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("kind", METHODS)
def test_wherever_it_comes(kind: str, moving: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    method, models = METHODS[kind], Models(tuple(MODELS), SPEC)
    owner, name = (Permutation, "apply_to" if kind == "streamed" else "apply") if moving else (step, "assign")
    original = getattr(owner, name)

    def run(at: int) -> tuple[Found | None, int]:
        counter = CtrlC(original, at)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *arguments, **keywords: counter(*arguments, **keywords))
            try:
                return method.find(models, seed=1), counter.calls
            except KeyboardInterrupt:
                return None, counter.calls

    whole, total = run(0)
    assert whole is not None and whole.outcome == "converged"
    given = pairs((SPEC.identity(),) * len(MODELS))
    # The last of a run's calls only measure what it reached.
    for at in sorted({1, 2, 1 + total // 5, 1 + total // 3, 1 + total // 2, 1 + 2 * total // 3}):
        found, _ = run(at)
        if found is None:
            assert moving and kind in ("streamed", "Frank-Wolfe"), at  # before anything was matched
            continue
        reached = pairs(found.permutations)
        assert found.outcome == "interrupted", at
        if kind not in ("to reference", "joining"):  # where no model is matched to all others
            assert reached >= given - 1e-6
        if found.history and kind not in ("Frank-Wolfe", "streamed"):
            assert found.history[-1].objective == pytest.approx(reached)
        if found.runs:
            assert max(found.runs) == pytest.approx(reached)


def test_models_that_have_joined_others_do_not_make_it_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of one network correspond from the start; joining from another place undoes that for a while."""
    models = Models((MODELS[0],) * 4, SPEC)
    method = CycleConsistent()
    original = Ascent.put
    for at in (1, 2, 3):
        counter = CtrlC(original, at)
        monkeypatch.setattr(Ascent, "put", lambda *arguments, counter=counter: counter(*arguments))
        found = method.find(models, seed=3)
        assert found.outcome == "interrupted"
        moved = [p.apply(MODELS[0]) for p in found.permutations]
        assert inner(moved[0], moved[1]) == pytest.approx(inner(MODELS[0], MODELS[0]))


def test_between_two_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first run had reached is not lost where the second has only begun to let the models join."""
    one = merge(MODELS, CycleConsistent(), spec=SPEC)
    original, runs = CycleConsistent._join, []

    def interrupted(self: CycleConsistent, run: Ascent) -> None:
        runs.append(run)
        if len(runs) == 2:
            raise KeyboardInterrupt
        original(self, run)

    monkeypatch.setattr(CycleConsistent, "_join", interrupted)
    found = merge(MODELS, CycleConsistent(restarts=3), spec=SPEC)
    assert (len(runs), found.outcome) == (2, "interrupted")
    assert found.objective == pytest.approx(one.objective) == pytest.approx(pairs(found.permutations))
