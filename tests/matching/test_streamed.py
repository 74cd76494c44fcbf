"""Weight matching that reads tensors when it needs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch

from permgraph.errors import MismatchError, NonFiniteError, PermgraphError
from permgraph.matching import WeightMatching, tuned
from permgraph.matching.streamed import StreamedWeightMatching
from permgraph.spec import PermutationSpec
from permgraph.spec.permutation import Permutation
from tests.matching.examples import SPECS, State, inner, planted, state

MOVING = [name for name in SPECS if name not in ("one index", "nothing")]


class Lazy(Mapping[str, torch.Tensor]):
    """Tensors that are copied on every access, as if from a disk; counts what is read."""

    def __init__(self, tensors: State) -> None:
        self.tensors, self.reads = tensors, 0

    def __getitem__(self, name: str) -> torch.Tensor:
        self.reads += 1
        return self.tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@pytest.mark.parametrize("init", ["barycentre", "identity"])
@pytest.mark.parametrize("name", MOVING)
def test_never_ends_below_where_it_began_and_reports_the_truth(name: str, init: str) -> None:
    spec = SPECS[name]
    a, b = state(spec, 1), state(spec, 2)
    found = StreamedWeightMatching(init=init).match(a, b, spec, seed=3)  # type: ignore[arg-type]
    assert found.outcome == "converged"
    assert found.objective_before == pytest.approx(inner(a, b), rel=1e-5)
    assert found.objective == pytest.approx(inner(a, found.permutation.apply(b)), rel=1e-4)
    assert found.objective >= found.objective_before
    if init == "identity":
        values = [found.objective_before, *(sweep.objective for sweep in found.history)]
        assert values == sorted(values)


@pytest.mark.parametrize("name", MOVING)
def test_recovers_what_weight_matching_recovers(name: str) -> None:
    spec = SPECS[name]
    a, b, _ = planted(spec, 5)
    in_memory = WeightMatching().match(a, b, spec)
    found = StreamedWeightMatching().match(Lazy(a), Lazy(b), spec)
    assert found.objective == pytest.approx(in_memory.objective, rel=1e-5)


@pytest.mark.parametrize("name", MOVING)
def test_cache_and_portions_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS[name]
    a = {n: t.double() for n, t in state(spec, 1).items()}
    b = {n: t.double() for n, t in state(spec, 2).items()}
    large, small = Lazy(a), Lazy(a)
    one = StreamedWeightMatching().match(large, b, spec, seed=1)
    monkeypatch.setattr(tuned, "STREAMED_PORTION", 17)
    monkeypatch.setattr(tuned, "STREAMED_DEPTH", 1)
    other = StreamedWeightMatching(cache=0).match(small, b, spec, seed=1)
    assert one.permutation == other.permutation
    assert large.reads < small.reads
    assert large.reads <= 2 * len(large)  # a run from the identity, if the first ends below it, reads once more


@pytest.mark.parametrize("name", MOVING)
def test_a_run_that_was_stopped_ends_where_an_unbroken_one_does(name: str) -> None:
    spec = SPECS[name]
    a, b = state(spec, 4), state(spec, 5)
    kept: list[tuple[int, Permutation]] = []
    whole = StreamedWeightMatching(keep=lambda *sweep: kept.append(sweep)).match(a, b, spec, seed=2)
    assert [number for number, _ in kept] == [sweep.number for sweep in whole.history]
    for number, reached in kept:
        went_on = StreamedWeightMatching(init=reached, done=number).match(a, b, spec, seed=2)
        assert went_on.permutation == whole.permutation
        assert all(sweep.number > number for sweep in went_on.history)


def test_half_and_quarter_precision_are_read_as_they_are() -> None:
    spec = SPECS["mlp"]
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e5m2):
        a = {n: t.to(dtype) for n, t in state(spec, 1).items()}
        wide = {n: t.float() for n, t in a.items()}
        b = {n: t.to(dtype) for n, t in spec.random(1, every_group=True).apply(wide).items()}
        found = StreamedWeightMatching().match(a, b, spec)
        back = found.permutation.apply({n: t.float() for n, t in b.items()})
        assert all(torch.equal(back[n], wide[n]) for n in wide)


def test_tied_names_are_found_under_any_of_them() -> None:
    spec = PermutationSpec(groups=SPECS["mlp"].groups, axes=SPECS["mlp"].axes, aliases={"tied": "l1.weight"})
    a = state(SPECS["mlp"], 1)
    b = SPECS["mlp"].random(1).apply(a)
    renamed = {("tied" if n == "l1.weight" else n): t for n, t in b.items()}
    found = StreamedWeightMatching().match(a, renamed, spec)
    assert torch.equal(found.permutation.apply(renamed)["tied"], a["l1.weight"])


def test_refusals() -> None:
    spec = SPECS["mlp"]
    a, b = state(spec, 1), state(spec, 2)
    bad = b["l2.weight"].clone()
    bad[3, 4] = float("inf")
    with pytest.raises(NonFiniteError, match="'l2.weight' of B holds NaN or infinity in 1 of its 192 elements"):
        StreamedWeightMatching().match(a, {**b, "l2.weight": bad}, spec)
    with pytest.raises(MismatchError, match="A has no 'l1.bias'"):
        StreamedWeightMatching().match({n: t for n, t in a.items() if n != "l1.bias"}, b, spec)
    with pytest.raises(MismatchError, match=r"has shape \(3,\)"):
        StreamedWeightMatching().match(a, {**b, "l1.bias": torch.ones(3)}, spec)
    with pytest.raises(MismatchError, match="int32"):
        StreamedWeightMatching().match(a, {**b, "l1.bias": b["l1.bias"].int()}, spec)
    with pytest.raises(MismatchError, match="another spec"):
        StreamedWeightMatching(init=SPECS["residual"].identity()).match(a, b, spec)
    with pytest.raises(PermgraphError, match="unknown init"):
        StreamedWeightMatching(init="random")  # type: ignore[arg-type]
    with pytest.raises(PermgraphError, match="negative"):
        StreamedWeightMatching(cache=-1)
