"""The three claims of linear connectivity up to permutation, and masks that move with the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from permgraph.connectivity import (
    Claim,
    permute_masks,
    simultaneous_connectivity,
    star_connectivity,
    strong_connectivity,
    weak_connectivity,
)
from permgraph.errors import EvaluationError, MismatchError, SpecError
from permgraph.merging import merge
from permgraph.spec import PermutationSpec
from tests.matching.examples import SPECS, state

SPEC = PermutationSpec.parse("0.weight 6x3 h .\n0.bias 6 h\n2.weight 2x6 . h\n2.bias 2 .\ngroups: h 6")


def network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).eval()


X = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))


def far_from(target: nn.Module):
    """A loss that is 0 for networks of the same function as ``target``."""
    return lambda net: float((net(X) - target(X)).detach().square().mean())


def test_weak() -> None:
    a = network(0)
    turn = SPEC.random(1, every_group=True)
    b = turn.apply(a.state_dict())
    held = weak_connectivity(a, b, turn.inverse(), far_from(a), 1e-9)
    assert held.holds and held.kind == "weak" and held.highest < 1e-9
    missed = weak_connectivity(a, b, SPEC.identity(), far_from(a), 1e-9)
    assert not missed.holds and missed.highest > 1e-3
    assert "weak: holds" in str(held) and "weak: not shown" in str(missed)


def test_simultaneous_needs_one_permutation_for_all() -> None:
    a = [network(0), network(1), network(2)]
    turn, other = SPEC.random(1, every_group=True), SPEC.random(2, every_group=True)
    same = [turn.apply(net.state_dict()) for net in a]
    mixed = [*same[:2], other.apply(a[2].state_dict())]

    def evaluate(net: nn.Module) -> float:
        return min(far_from(target)(net) for target in a)

    held = simultaneous_connectivity(a, same, turn.inverse(), evaluate, 1e-9, points=5)
    assert held.holds and set(held.heights) == {(0,), (1,), (2,)}
    missed = simultaneous_connectivity(a, mixed, turn.inverse(), evaluate, 1e-9, points=5)
    assert not missed.holds
    assert [height > 1e-3 for height in missed.heights.values()] == [False, False, True]


def test_strong_is_about_all_pairs() -> None:
    a = network(0)
    turns = [SPEC.identity(), SPEC.random(1, every_group=True), SPEC.random(2, every_group=True)]
    copies = [turn.apply(a.state_dict()) for turn in turns]
    back = [turn.inverse() for turn in turns]
    held = strong_connectivity(copies, back, far_from(a), 1e-9, points=3, model=a)
    assert held.holds and set(held.heights) == {(0, 1), (0, 2), (1, 2)}
    missed = strong_connectivity(copies, [*back[:2], back[1]], far_from(a), 1e-9, points=3, model=a)
    assert [missed.heights[pair] > 1e-3 for pair in ((0, 1), (0, 2), (1, 2))] == [False, True, True]
    merged = merge(copies, spec=SPEC)
    assert strong_connectivity(copies, merged.permutations, far_from(a), 1e-9, points=3, model=a).holds


def test_a_barrier_that_is_not_a_number_shows_nothing() -> None:
    a, b = network(0), network(1)
    found = weak_connectivity(a, b, SPEC.identity(), lambda net: math.nan, 1.0, points=3)
    assert math.isnan(found.highest) and not found.holds
    assert isinstance(found, Claim)


def test_masks_move_with_the_weights() -> None:
    spec = SPECS["attention"]
    weights = state(spec, 0)
    masks = {name: state(spec, 1)[name] > 0 for name in ("q", "o")}
    turn = spec.random(2, every_group=True)
    pruned = {name: tensor * masks[name] if name in masks else tensor for name, tensor in weights.items()}
    moved, moved_masks = turn.apply(pruned), permute_masks(turn, masks)
    dense = turn.apply(weights)
    for name, mask in moved_masks.items():
        assert mask.dtype == torch.bool and not torch.equal(mask, masks[name])
        assert torch.equal(moved[name], dense[name] * mask)
    with pytest.raises(SpecError, match="unknown"):
        permute_masks(turn, {"unknown": torch.ones(1)})
    with pytest.raises(MismatchError, match="'q' has shape"):
        permute_masks(turn, {"q": torch.ones(1)})


def test_nothing_is_changed() -> None:
    a, b = network(0), network(1)
    before = {name: tensor.clone() for name, tensor in b.state_dict().items()}
    simultaneous_connectivity([a], [b], SPEC.random(0), far_from(a), 0.1, points=3)
    assert all(torch.equal(before[name], tensor) for name, tensor in b.state_dict().items())


def test_a_specification_is_no_permutation() -> None:
    a, b = network(0), network(1)
    with pytest.raises(MismatchError, match=r"such as align\(a, b\).permutation, not a PermutationSpec"):
        weak_connectivity(a, b, SPEC, far_from(a), 0.1)  # type: ignore[arg-type]


def test_refusals() -> None:
    a, b, p = network(0), network(1), SPEC.identity()
    loss = far_from(a)
    with pytest.raises(MismatchError, match="the sequences have 2 and 1 networks"):
        simultaneous_connectivity([a, b], [a], p, loss, 0.1)
    with pytest.raises(MismatchError, match="the sequences have 0 and 0"):
        simultaneous_connectivity([], [], p, loss, 0.1)
    with pytest.raises(MismatchError, match="at least three networks, not 2"):
        strong_connectivity([a, b], [p, p], loss, 0.1)
    with pytest.raises(MismatchError, match="2 permutations for 3 networks"):
        strong_connectivity([a, b, a], [p, p], loss, 0.1)
    with pytest.raises(EvaluationError, match="all state dicts"):
        simultaneous_connectivity([a.state_dict()], [b.state_dict()], p, loss, 0.1)
    for bad in (-1.0, math.nan):
        with pytest.raises(EvaluationError, match="tolerance="):
            weak_connectivity(a, b, p, loss, bad)
    with pytest.raises(MismatchError, match="does not know|the state dict"):
        weak_connectivity(a, b, SPECS["mlp"].identity(), loss, 0.1)
    with pytest.raises(EvaluationError, match="evaluation mode"):
        weak_connectivity(network(0).train(), b, p, loss, 0.1)


def test_star_is_about_the_centre_and_each() -> None:
    a = network(0)
    turns = [SPEC.random(seed, every_group=True) for seed in (1, 2, 3)]
    copies = [turn.apply(a.state_dict()) for turn in turns]
    back = [turn.inverse() for turn in turns]
    held = star_connectivity(a, copies, back, far_from(a), 1e-9, points=3)
    assert held.holds and held.kind == "star" and set(held.heights) == {(0,), (1,), (2,)}
    missed = star_connectivity(a, copies, [*back[:2], back[0]], far_from(a), 1e-9, points=3)
    assert [height > 1e-3 for height in missed.heights.values()] == [False, False, True]
    brought = [p.apply(copy) for p, copy in zip(back, copies, strict=True)]
    assert star_connectivity(a.state_dict(), brought, None, far_from(a), 1e-9, points=3, model=a).holds
    with pytest.raises(MismatchError, match="at least one network beside"):
        star_connectivity(a, [], None, far_from(a), 0.1)
    with pytest.raises(MismatchError, match="1 permutations for 3 networks"):
        star_connectivity(a, copies, back[:1], far_from(a), 0.1)
    with pytest.raises(EvaluationError, match=r"networks\[1\] must be in evaluation mode"):
        star_connectivity(a, [a, network(1).train()], None, far_from(a), 0.1)
