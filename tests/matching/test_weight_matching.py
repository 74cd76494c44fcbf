"""What weight matching promises beyond what every matcher does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from permgraph.errors import MismatchError, PermgraphError
from permgraph.matching import WeightMatching
from permgraph.matching.ascent.gram_cache import GramCache
from permgraph.matching.ascent.step import Scene, outer_values
from permgraph.matching.problem.moves import Plan
from permgraph.matching.problem.objective import pair
from permgraph.matching.problem.renumber import act
from permgraph.spec import PermutationSpec
from permgraph.spec.permutation import Permutation, compose
from tests.matching.examples import SPECS, inner, planted, state


def test_history_accounts_for_every_gain():
    a, b, _ = planted(SPECS["attention"], 1)
    found = WeightMatching(init="identity", order="given").match(a, b, SPECS["attention"], 0)
    value = found.objective_before
    for number, sweep in enumerate(found.history, start=1):
        value += sum(sweep.gains.values())
        assert sweep.number == number
        assert sweep.objective == pytest.approx(value, rel=1e-5)
    assert found.history[-1].moved == {}
    assert set(found.history[0].moved) <= set(SPECS["attention"].moving)
    assert found.history[0].moved


def test_progress_is_told_of_each_sweep():
    seen = []
    a, b, _ = planted(SPECS["mlp"], 1)
    found = WeightMatching(restarts=1).match(a, b, SPECS["mlp"], 0, seen.append)
    assert tuple(seen) == found.history


def test_sweep_limit_and_resumption():
    spec = SPECS["mlp"]
    a, b = state(spec, 1), state(spec, 2)
    first = WeightMatching(init="identity", max_sweeps=1).match(a, b, spec, 0)
    assert first.outcome == "sweep limit"
    assert first.sweeps == 1
    rest = WeightMatching(init=first.permutation).match(a, b, spec, 0)
    assert rest.outcome == "converged"
    assert rest.objective >= first.objective
    again = WeightMatching(init=rest.permutation).match(a, b, spec, 0)
    assert again.permutation == rest.permutation
    nothing = WeightMatching(max_sweeps=0).match(a, b, spec, 0)
    assert nothing.permutation.is_identity
    assert nothing.objective == nothing.objective_before


def test_an_interruption_keeps_the_best_so_far():
    spec = SPECS["mlp"]
    a, b = state(spec, 1), state(spec, 2)

    def interrupt(sweep):
        if sweep.number == 2:
            raise KeyboardInterrupt

    found = WeightMatching(restarts=3).match(a, b, spec, 0, interrupt)
    assert found.outcome == "interrupted"
    assert found.sweeps == 2
    assert found.objective == pytest.approx(inner(a, found.permutation.apply(b)), rel=1e-5)
    assert found.objective > found.objective_before


def test_an_interruption_in_the_middle_of_a_step(monkeypatch):
    """Whatever a step was doing, the permutation reported is one that was reached."""
    from permgraph.matching.ascent import in_memory

    spec = SPECS["attention"]
    a, b = state(spec, 1), state(spec, 2)
    calls = 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return act(*arguments)

    monkeypatch.setattr(in_memory, "act", interrupted)
    found = WeightMatching().match(a, b, spec, 0)
    assert found.outcome == "interrupted"
    assert found.objective == pytest.approx(inner(a, found.permutation.apply(b)), rel=1e-5)


def test_restarts_keep_the_best():
    spec = SPECS["mlp"]
    a, b = state(spec, 1), state(spec, 2)
    found = WeightMatching(restarts=8).match(a, b, spec, 0)
    assert len(found.runs) == 8
    assert len(set(found.runs)) > 1
    assert found.objective == max(found.runs)
    assert found.objective >= WeightMatching(restarts=1).match(a, b, spec, 0).objective


def test_objectives_on_one_pair():
    """l2 has the same best permutation as inner; cosine does not mind how large a tensor is."""
    spec = SPECS["mlp"]
    a, b = state(spec, 1), state(spec, 2)
    assert (
        WeightMatching(objective="l2").match(a, b, spec, 0).permutation
        == WeightMatching(objective="inner").match(a, b, spec, 0).permutation
    )
    found = WeightMatching(objective="l2").match(a, b, spec, 0)
    moved = found.permutation.apply(b)
    assert found.objective == pytest.approx(-sum(float((a[n] - moved[n]).square().sum()) for n in a), rel=1e-4)
    large = {**a, "l2.weight": a["l2.weight"] * 1000}
    cosine = WeightMatching(objective="cosine")
    assert cosine.match(a, b, spec, 0).permutation == cosine.match(large, b, spec, 0).permutation
    assert cosine.match(a, b, spec, 0).objective <= len(spec.axes)


@pytest.mark.parametrize("kind", ["number", "tensor", "function"])
def test_weights(kind):
    """A tensor of no weight is no evidence: matching is as without it."""
    spec = SPECS["mlp"]
    a, b = state(spec, 1), state(spec, 2)
    weights = {
        "number": {"l1.weight": 0.0},
        "tensor": {"l1.weight": torch.zeros(16, 8)},
        "function": lambda name, tensor: 0.0 if name == "l1.weight" else 1.0,
    }[kind]
    weighted = WeightMatching(init="identity", weights=weights).match(a, b, spec, 0)
    ignored = WeightMatching(init="identity", ignore=["l1.w*"]).match(a, b, spec, 0)
    assert weighted.permutation == ignored.permutation
    assert weighted.permutation != WeightMatching(init="identity").match(a, b, spec, 0).permutation


def test_weights_that_do_not_fit():
    spec = SPECS["mlp"]
    a, b = state(spec, 1), state(spec, 2)
    with pytest.raises(PermgraphError, match=r"the weight of 'l1.weight' has shape \(3,\)"):
        WeightMatching(weights={"l1.weight": torch.zeros(3)}).match(a, b, spec, 0)
    with pytest.raises(PermgraphError, match="takes no weights"):
        WeightMatching(weights={"l1.weight": 2.0}, objective="l2").match(a, b, spec, 0)


def test_statistics_are_no_evidence_but_move():
    spec = PermutationSpec.parse("""
        conv.weight      6x3  c .
        bn.running_mean  6    c
        fc.weight        2x6  . c
        groups: c 6
    """)
    a, b, secret = planted(spec, 1)
    b["bn.running_mean"] = torch.arange(6.0) * 1e6
    found = WeightMatching().match(a, b, spec, 0)
    assert found.permutation == secret
    assert torch.equal(found.permutation.apply(b)["bn.running_mean"], b["bn.running_mean"][secret.arrays["c"].copy()])


def test_an_ignored_tensor_may_hold_anything():
    spec = SPECS["mlp"]
    a, b = state(spec, 1), state(spec, 2)
    a["l1.bias"][0] = float("nan")
    b["l1.bias"] = b["l1.bias"].to(torch.int32)
    found = WeightMatching(ignore=["l1.bias"]).match(a, b, spec, 0)
    without = [{name: tensor for name, tensor in x.items() if name != "l1.bias"} for x in (a, b)]
    assert found.objective == pytest.approx(inner(without[0], found.permutation.apply(b)), rel=1e-5)
    assert found.objective > found.objective_before and found.objective == found.objective  # nor is it NaN


def test_tied_names_count_once():
    spec = PermutationSpec.parse("""
        embed  7x5  . c
        lift   5x3  c .
        head = embed
        groups: c 5
    """)
    a, b = state(spec, 1), state(spec, 2)
    tied = [{**x, "head": x["embed"]} for x in (a, b)]
    only_alias = [{"head": x["embed"], "lift": x["lift"]} for x in (a, b)]
    reference = WeightMatching().match(a, b, spec, 0)
    for pair_of in (tied, only_alias):
        found = WeightMatching().match(*pair_of, spec, 0)
        assert found.permutation == reference.permutation
        assert found.objective == pytest.approx(reference.objective)


@pytest.mark.parametrize("spec", ["attention", "experts", "three levels", "two parents"])
def test_little_memory_changes_nothing(spec, monkeypatch):
    """Nested Gram matrices in portions, down to one pair of indices at a time."""
    given = SPECS[spec]
    a, b = state(given, 1), state(given, 2)
    plan, compared = Plan(given, a), pair(a, b, given)
    for move in plan.moves:
        if move.root.inner:
            whole = outer_values(Scene(given, compared.a, compared.b), move.root)
            for memory in (1, 5000, 20000):
                parts = outer_values(Scene(given, compared.a, compared.b, memory=memory), move.root)
                assert torch.allclose(parts, whole, atol=1e-4)


@pytest.mark.parametrize("spec", [s for s in SPECS if s not in ("one index", "nothing")])
def test_kept_gram_matrices_are_those_computed_anew(spec):
    given = SPECS[spec]
    a, b = state(given, 1, torch.float64), state(given, 2, torch.float64)
    plan, rng = Plan(given, a), np.random.default_rng(0)
    plain = [move for move in plan.moves if len(move.groups) == 1 and not move.quadratic]
    kept = GramCache(1 << 30)
    survived = 0
    for _ in range(20):
        for move in plain:
            if kept.get(move, a, b) is None:
                gram = outer_values(Scene(given, a, b), move.root)
                kept.keep(move, gram, np.broadcast_to(np.arange(gram.shape[-1]), gram.shape[:-1]))
        moving = plan.moves[rng.integers(len(plan.moves))]
        step = {name: given.random(rng, every_group=True).arrays[name].copy() for name in moving.groups}
        for array in step.values():  # a transposition of two indices, so that little changes
            rest = np.broadcast_to(np.arange(array.shape[-1]), array.shape).copy()
            rest[..., [0, 1]] = rest[..., [1, 0]]
            array[...] = rest
        new = {name: act(given, step, name, b[name]) for name in moving.parameters}
        for block, places in kept.updates_for(plain, moving.parameters, 0.2).items():
            x, before, after = (block.view(tensors[block.parameter]) for tensors in (a, b, new))
            for move, place in places:
                kept.update(move, place, x, after - before)
        b.update(new)
        for move in plain:
            gram = kept.get(move, a, b)
            fresh = outer_values(Scene(given, a, b), move.root)
            if gram is not None:
                survived += 1
                assert torch.allclose(gram, fresh, atol=1e-9)
    always_moved = set.intersection(*(set(move.groups) for move in plan.moves))
    assert survived or all(move.name in always_moved for move in plain)


@pytest.mark.parametrize("spec", SPECS)
def test_steps_compose_as_permutations_do(spec):
    given = SPECS[spec]
    for seed in range(3):
        p, q = given.random(seed), given.random(seed + 10)
        some = dict(list(p.arrays.items())[::2])
        whole = Permutation(given, some) @ q
        partly = {**q.arrays, **compose(given, some, dict(q.arrays))}
        assert Permutation(given, partly) == whole


def test_bad_settings():
    with pytest.raises(PermgraphError, match="max_sweeps=-1"):
        WeightMatching(max_sweeps=-1)
    with pytest.raises(PermgraphError, match="restarts=0"):
        WeightMatching(restarts=0)
    with pytest.raises(PermgraphError, match="unknown init 'zero'"):
        WeightMatching(init="zero")
    with pytest.raises(PermgraphError, match="unknown order 'alphabetical'"):
        WeightMatching(order="alphabetical")
    spec = SPECS["mlp"]
    with pytest.raises(PermgraphError, match="unknown objective 'l1'"):
        WeightMatching(objective="l1").match(state(spec, 1), state(spec, 2), spec)
    with pytest.raises(MismatchError, match="another spec"):
        WeightMatching(init=SPECS["attention"].identity()).match(state(spec, 1), state(spec, 2), spec)


def test_nothing_to_permute():
    spec = SPECS["nothing"]
    found = WeightMatching().match(state(spec, 1), state(spec, 2), spec)
    assert found.permutation.is_identity
    assert found.outcome == "converged"
    assert "nothing to permute" in found.notes[0]


def test_meta_tensors_are_refused():
    spec = SPECS["mlp"]
    a = {n: torch.empty(s, device="meta") for n, s in spec.shapes.items()}
    with pytest.raises(MismatchError, match="meta device"):
        WeightMatching().match(a, state(spec, 1), spec)


@pytest.mark.parametrize("init", ["identity", "barycentre"])
@pytest.mark.parametrize("spec", SPECS)
def test_what_is_kept_changes_no_step(spec, init):
    """Also not what the first sweep keeps of Gram matrices that it only half knows."""
    given = SPECS[spec]
    a, b = state(given, 1, torch.float64), state(given, 2, torch.float64)
    for order in ("informed", "random"):
        kept = WeightMatching(init=init, order=order).match(a, b, given, 3)
        anew = WeightMatching(init=init, order=order, memory=0).match(a, b, given, 3)
        assert kept.permutation == anew.permutation
        assert kept.objective == pytest.approx(anew.objective, rel=1e-12)
        assert kept.history[-1].objective == pytest.approx(kept.objective, rel=1e-9, abs=1e-9) if kept.history else True
