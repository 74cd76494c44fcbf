"""What merges and measures networks takes modules that change places, or says why not."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn

import permgraph as pg
from permgraph.errors import MismatchError
from permgraph.merging import Models
from permgraph.merging.flower import _Alignment
from permgraph.merging.streamed import StreamedRounds
from tests.cli.networks import Mixture


@functools.cache
def networks() -> tuple[nn.Module, nn.Module, nn.Module]:
    """A network, and itself with experts and hidden units scrambled, twice."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = Mixture().eval()
    others = [copy.deepcopy(first) for _ in range(2)]
    for seed, other in enumerate(others):
        other.load_state_dict(spec().random(seed + 1, every_group=True).apply(first.state_dict()))
    return first, others[0], others[1]


@functools.cache
def spec() -> pg.PermutationSpec:
    return pg.auto_spec(Mixture(), (torch.zeros(2, 5),), modules=True)


def as_computed(state: Any) -> torch.Tensor:
    network = Mixture().eval()
    network.load_state_dict(state)
    return network(torch.randn(9, 5, generator=torch.Generator().manual_seed(0))).detach()


@pytest.mark.parametrize("method", [None, pg.MergeMany(), pg.CycleConsistent(), pg.FrankWolfeMany(), pg.Joining()])
def test_scrambled_copies_merge_to_the_network(method: Any) -> None:
    merged = pg.merge(networks(), *([] if method is None else [method]), spec=spec())
    torch.testing.assert_close(as_computed(merged.state_dict), as_computed(networks()[0].state_dict()))
    assert all(p.spec is spec() for p in merged.permutations)
    plain = pg.merge(networks(), *([] if method is None else [method]))
    assert not torch.allclose(as_computed(plain.state_dict), as_computed(networks()[0].state_dict()), atol=1e-3)


def test_streamed_rounds_are_over_stacks() -> None:
    states = tuple(network.state_dict() for network in networks())
    found = StreamedRounds().find(Models(states, spec()).stacked()).over(spec())
    copies = [p.apply(state) for p, state in zip(found.permutations, states, strict=True)]
    assert all(torch.equal(copies[0][name], other[name]) for other in copies[1:] for name in copies[0])


def test_a_spec_given_with_the_modules_must_be_that_of_each() -> None:
    class Other(Mixture):
        """Of the same parameters, but its first expert counts twice."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gates = self.router(x).softmax(-1)
            return super().forward(x) + gates[..., :1] * self.experts[0](x)

    with pytest.raises(MismatchError, match=r"changes places with others of 'experts\.\*.*in A, and not in B"):
        pg.align(networks()[0], Other().eval(), spec=spec())


def test_other_widths_are_matched_with_experts_in_their_places() -> None:
    a, b, _ = networks()
    plain = pg.auto_spec(a, (torch.zeros(2, 5),), modules=False)
    found, due = (pg.match_widths(a, b, spec, spec) for spec in (spec(), plain))
    assert found.result.objective == pytest.approx(due.result.objective) and not found.spec.stacks


def test_partial_merges_begin_with_experts_in_the_places_of_their_partners() -> None:
    a, b, _ = networks()
    merged = pg.partial_merge(a, b, spec=spec(), width=2)
    torch.testing.assert_close(merged.alignment.state_dict, a.state_dict())
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged.model()(x), a(x))


def test_where_rows_differ_experts_stay_in_their_places() -> None:
    class Classes(nn.Module):
        """A mixture, and as many classes as is said."""

        def __init__(self, classes: int) -> None:
            super().__init__()
            self.mixture, self.head = Mixture(), nn.Linear(5, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.mixture(x).tanh())

    three, two = Classes(3), Classes(2)
    of_three = pg.auto_spec(three, (torch.zeros(2, 5),), modules=True)
    fit = pg.align(three, two.state_dict(), spec=of_three, rows="common")
    assert any("stay where they are" in note for note in fit.notes) and of_three.stacks
    again = Classes(2)
    again.load_state_dict(fit.state_dict)
    x = torch.randn(9, 5)
    torch.testing.assert_close(again(x), two(x))


def test_masks_move_with_their_modules() -> None:
    turn = spec().random(3, every_group=True)
    state = networks()[0].state_dict()
    masks = {name: torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)) > 0.5 for name, tensor in
             state.items()}  # fmt: skip
    moved, due = pg.permute_masks(turn, masks), turn.apply(masks)
    assert all(torch.equal(moved[name], due[name]) for name in masks)
    with pytest.raises(MismatchError, match="give masks of all modules that change places"):
        pg.permute_masks(turn, {name: mask for name, mask in masks.items() if "experts.0." not in name})


def test_claims_about_several_networks_hold_for_scrambled_copies() -> None:
    merged = pg.merge(networks(), spec=spec())
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(2))

    def size(network: nn.Module) -> float:
        return float(network(x).square().mean())

    assert pg.strong_connectivity(networks(), merged.permutations, size, 1e-6).highest < 1e-6


@pytest.mark.parametrize("rounds_apart", [0, 1])
def test_flower_aligns_experts(rounds_apart: int) -> None:
    alignment = _Alignment(networks()[0], spec(), rounds_apart, None, None, 0)
    own = networks()[0].state_dict()
    alignment.begin(own)
    brought = alignment.brought(1, {str(n): network.state_dict() for n, network in enumerate(networks())})
    assert all(torch.equal(state[name], tensor) for state in brought.values() for name, tensor in own.items())


def test_a_study_aligns_experts(tmp_path: Any) -> None:
    pytest.importorskip("fsspec")
    a, b, _ = networks()
    plan = pg.StudyPlan(copy.deepcopy(a), {"a": a, "b": b}, matchers={"weights": pg.WeightMatching()}, spec=spec())
    found = pg.study(plan, tmp_path, jobs=1)
    aligned = found.permutation("a", "b", "weights").apply(b.state_dict())
    assert all(torch.equal(aligned[name], tensor) for name, tensor in a.state_dict().items())
