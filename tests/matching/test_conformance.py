"""What every matcher must do, whatever its method: one table of matchers, one of specs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from permgraph.errors import MismatchError, NonFiniteError
from permgraph.matching import FrankWolfe, Sinkhorn, StreamedWeightMatching, WeightMatching
from permgraph.matching.matcher import Matcher
from permgraph.spec.permutation import Permutation
from tests.matching.examples import SPECS, best_of_all, inner, planted, state

MATCHERS = {
    "weight matching": WeightMatching(),
    "weight matching, identity": WeightMatching(init="identity"),
    "weight matching, in order, no memory": WeightMatching(order="given", memory=0),
    "weight matching, cosine": WeightMatching(objective="cosine"),
    "streamed weight matching": StreamedWeightMatching(),
    "streamed weight matching, identity, no cache": StreamedWeightMatching(init="identity", cache=0),
    "Frank-Wolfe": FrankWolfe(),
    "Frank-Wolfe, identity": FrankWolfe(init="identity"),
    "Sinkhorn": Sinkhorn(steps=6, round_every=3),
}
"""Every matcher that needs nothing but the two state dicts."""

MONOTONE = [name for name in MATCHERS if "weight matching" in name]

TINY = {
    "one group": "w 4x3 h . | v 2x4 . h | groups: h 4",
    "two heads": "q 6x4 (h d) . | o 4x4 . (h e) | groups: h 2 · d 3 per h · e 2 per h",
    "two levels": "w 8x3 (x y z) . | v 4x2 (x y) . | groups: x 2 · y 2 per x · z 2 per x y",
    "over a fixed axis": "w 9x2 (s h) . | groups: s 3 fixed · h 3 per s",
    "two layers": "w 3x4 h . | v 3x3 k h | u 2x3 . k | groups: h 3 · k 3",
    "a square": "w 4x4 h h | v 4x2 h . | groups: h 4",
    "grouped": "c 6x2 (g o) i | b 6x2 (g o) . | a 4x2 (g i) . | groups: g 2 · o 3 per g · i 2 per g",
}
EXACT = ["one group", "two heads", "two levels", "over a fixed axis"]
"""Groups in which one step sees everything."""


def tiny(name):
    from permgraph.spec import PermutationSpec

    return PermutationSpec.parse("\n".join(line.strip() for line in TINY[name].split("|")))


def objective(matcher: Matcher, a, b, permutation):
    """The objective as the matcher defines it, computed from the definition."""
    moved = permutation.apply(b)
    kind = getattr(matcher, "objective", "inner")
    if kind == "l2":
        return -sum(float((a[n].double() - moved[n].double()).square().sum()) for n in a)
    if kind == "cosine":
        return sum(inner({n: a[n]}, moved) / float(a[n].double().norm() * moved[n].double().norm()) for n in a)
    return inner(a, moved)


@pytest.fixture(params=MATCHERS)
def matcher(request):
    return MATCHERS[request.param]


@pytest.mark.parametrize("spec", [s for s in SPECS if s not in ("one index", "nothing")])
def test_recovers_a_planted_permutation(matcher, spec):
    for seed in range(2):
        a, b, secret = planted(SPECS[spec], seed)
        found = matcher.match(a, b, SPECS[spec], seed)
        reached = inner(a, found.permutation.apply(b))
        assert reached >= inner(a, secret.apply(b)) * (1 - 1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_reports_what_it_found(matcher, spec):
    a, b = state(SPECS[spec], 1), state(SPECS[spec], 2)
    found = matcher.match(a, b, SPECS[spec], 5)
    identity = SPECS[spec].identity()
    counted = {n: t for n, t in a.items() if any(o.group in SPECS[spec].moving for o in SPECS[spec].occurrences(n))}
    assert found.objective == pytest.approx(objective(matcher, counted, b, found.permutation), rel=1e-5, abs=1e-5)
    assert found.objective_before == pytest.approx(objective(matcher, counted, b, identity), rel=1e-5, abs=1e-5)
    assert found.objective >= found.objective_before - 1e-6
    assert found.outcome == ("sweep limit" if isinstance(matcher, Sinkhorn) and SPECS[spec].moving else "converged")
    assert found.sweeps == len(found.history)
    assert found.seed == 5
    assert found.seconds > 0


@pytest.mark.parametrize("spec", SPECS)
def test_same_seed_same_answer(matcher, spec):
    a, b = state(SPECS[spec], 3), state(SPECS[spec], 4)
    torch.manual_seed(1)
    one = matcher.match(a, b, SPECS[spec], 7)
    torch.manual_seed(2)
    other = matcher.match(a, b, SPECS[spec], 7)
    assert one.permutation == other.permutation
    assert [s.objective for s in one.history] == [s.objective for s in other.history]


def test_leaves_its_inputs_and_the_random_state_alone(matcher):
    a, b, _ = planted(SPECS["attention"], 6)
    copies = [{name: tensor.clone() for name, tensor in x.items()} for x in (a, b)]
    random_state = torch.get_rng_state()
    matcher.match(a, b, SPECS["attention"], 0)
    assert torch.equal(torch.get_rng_state(), random_state)
    for x, copy in zip((a, b), copies, strict=True):
        assert all(torch.equal(x[name], copy[name]) for name in copy)


@pytest.mark.parametrize("name", MONOTONE)
@pytest.mark.parametrize("spec", SPECS)
def test_the_objective_never_falls(name, spec):
    for seed in range(2):
        a, b = state(SPECS[spec], 10 + seed), state(SPECS[spec], 20 + seed)
        history = MATCHERS[name].match(a, b, SPECS[spec], seed).history
        values = [sweep.objective for sweep in history]
        assert all(later >= earlier - 1e-4 for earlier, later in itertools.pairwise(values))


@pytest.mark.parametrize("name", EXACT)
def test_equals_brute_force_where_one_step_sees_everything(matcher, name):
    spec = tiny(name)
    for seed in range(2):
        a, b = state(spec, seed), state(spec, seed + 50)
        if getattr(matcher, "objective", "inner") == "cosine":
            a = {n: t / (t.norm() * b[n].norm()) for n, t in a.items()}
        found = matcher.match(a, b, spec, seed)
        assert inner(a, found.permutation.apply(b)) == pytest.approx(best_of_all(spec, a, b), rel=1e-5)


@pytest.mark.parametrize("name", EXACT)
def test_complex_weights_are_matched_by_the_real_part_of_their_inner_product(matcher, name):
    """Which is what the distance of two networks depends on."""
    spec = tiny(name)
    for seed in range(2):
        a, b = ({n: torch.complex(t, state(spec, at + 7)[n]) for n, t in state(spec, at).items()} for at in (seed, 50))
        if getattr(matcher, "objective", "inner") == "cosine":
            a = {n: t / (t.norm() * b[n].norm()) for n, t in a.items()}
        found = matcher.match(a, b, spec, seed)
        assert real_inner(a, found.permutation.apply(b)) == pytest.approx(best_of_all(spec, a, b, real_inner), rel=1e-5)


def real_inner(a, b):
    return sum(float((a[n] * b[n].conj()).real.double().sum()) for n in a)


def test_a_permutation_of_an_equal_spec_is_a_start(matcher):
    """What a spec says beside its groups and axes, such as why an axis is pinned, makes it no other spec."""
    from permgraph.spec import PermutationSpec, Pin

    spec = SPECS["mlp"]
    same = PermutationSpec(spec.groups, spec.axes, pins=(Pin("l1.weight", 1, 8, "input"),), notes=("a note",))
    assert same != spec and same.fingerprint == spec.fingerprint
    a, b, secret = planted(spec, 0)
    found = replace(matcher, init=Permutation(same, dict(secret.arrays))).match(a, b, spec, 0)
    assert found.permutation == secret


@pytest.mark.parametrize("name", TINY)
def test_restarts_reach_the_best_of_all(name):
    spec = tiny(name)
    for seed in range(2):
        a, b = state(spec, seed), state(spec, seed + 50)
        found = WeightMatching(restarts=25).match(a, b, spec, seed)
        assert found.objective == pytest.approx(best_of_all(spec, a, b), rel=1e-5)
        assert found.objective == max(found.runs)


@pytest.mark.parametrize("spec", [s for s in SPECS if s not in ("one index", "nothing")])
def test_the_numbering_of_either_input_does_not_matter(matcher, spec):
    """Near enough a planted pair, the aligned B must be the same network, unit by unit, whatever the numbering."""
    given = SPECS[spec]
    a, b, _ = planted(given, 11, noise=0.05)
    reference = matcher.match(a, b, given, 0).permutation.apply(b)
    renumbered_b = given.random(12).apply(b)
    found = matcher.match(a, renumbered_b, given, 0)
    for name, tensor in found.permutation.apply(renumbered_b).items():
        assert torch.equal(tensor, reference[name])
    turn = given.random(13)
    found = matcher.match(turn.apply(a), b, given, 0)
    for name, tensor in found.permutation.apply(b).items():
        assert torch.equal(tensor, turn.apply_to(name, reference[name]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("other", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(matcher, dtype, other):
    spec = SPECS["attention"]
    a, b, secret = planted(spec, 14)
    found = matcher.match({n: t.to(dtype) for n, t in a.items()}, {n: t.to(other) for n, t in b.items()}, spec, 0)
    assert found.permutation == secret


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["A", "B"])
def test_refuses_what_is_not_finite(matcher, bad, side):
    spec = SPECS["mlp"]
    a, b = state(spec, 1), state(spec, 2)
    (a if side == "A" else b)["l2.weight"][3, 4] = bad
    with pytest.raises(NonFiniteError, match=rf"'l2.weight' of {side} holds NaN or infinity in 1 of its 192 elements"):
        matcher.match(a, b, spec, 0)


def test_refuses_what_does_not_fit(matcher):
    spec = SPECS["mlp"]
    a, b = state(spec, 1), state(spec, 2)
    b["l2.weight"] = b["l2.weight"][:, :-1]
    with pytest.raises(MismatchError, match=r"'l2.weight' has shape \(12, 15\)"):
        matcher.match(a, b, spec, 0)
    del b["l2.weight"]
    with pytest.raises(MismatchError, match=r"l2.weight"):
        matcher.match(a, b, spec, 0)


def test_refuses_integers(matcher):
    spec = SPECS["mlp"]
    a, b = state(spec, 1), state(spec, 2)
    a["l2.weight"] = (a["l2.weight"] * 10).to(torch.int8)
    with pytest.raises(MismatchError, match=r"'l2.weight' of A is torch.int8"):
        matcher.match(a, b, spec, 0)


def test_dead_units_stay_where_they_are(matcher):
    spec = SPECS["mlp"]
    a, b = state(spec, 1), state(spec, 1)
    for x in (a, b):
        x["l1.weight"][[2, 5, 11]] = 0
        x["l1.bias"][[2, 5, 11]] = 0
        x["l2.weight"][:, [2, 5, 11]] = 0
    assert matcher.match(a, b, spec, 0).permutation.is_identity


def test_all_zero(matcher):
    spec = SPECS["attention"]
    zero = {n: torch.zeros(s) for n, s in spec.shapes.items()}
    found = matcher.match(zero, state(spec, 0), spec, 0)
    assert found.permutation.is_identity
    assert found.objective == found.objective_before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("spec", ["mlp", "attention", "concatenation"])
def test_gpu_and_cpu_agree(matcher, spec):
    a, b, _ = planted(SPECS[spec], 15)
    here = matcher.match(a, b, SPECS[spec], 0)
    there = matcher.match({n: t.cuda() for n, t in a.items()}, b, SPECS[spec], 0)
    assert there.objective == pytest.approx(here.objective, rel=1e-5)
