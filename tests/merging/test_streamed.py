"""Rounds over models larger than memory: the hill is that of `CycleConsistent` and `MergeMany`, climbed from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch

import permgraph as pg
from permgraph.merging import Models
from permgraph.merging.streamed import StreamedRounds

SPEC = pg.PermutationSpec.parse(
    """
    0.weight  6x4  a .
    0.bias    6    a
    2.weight  5x6  b a
    4.weight  3x5  . b
    groups: a 6 · b 5
    """
)


def state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SPEC.shapes.items()}


class Disk(Mapping[str, torch.Tensor]):
    """A model that gives a new tensor at each access, as a checkpoint does, and counts what is alive."""

    def __init__(self, state: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
        self.state, self.dtype, self.reads = state, dtype, 0

    def __getitem__(self, name: str) -> torch.Tensor:
        self.reads += 1
        return self.state[name].to(self.dtype, copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def objective(states: list[Mapping[str, torch.Tensor]]) -> float:
    return sum(
        float((states[i][name].double() * states[j][name].double()).sum())
        for i in range(len(states))
        for j in range(i)
        for name in SPEC.axes
    )


@pytest.mark.parametrize("joining", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_it_ends_where_no_model_gains_and_says_how_high(joining: bool, dtype: torch.dtype) -> None:
    models = [Disk(state(seed), dtype) for seed in range(4)]
    found = StreamedRounds(joining=joining).find(Models(tuple(models), SPEC), seed=1)
    assert found.outcome == "converged"
    given = [{name: model[name].float() for name in model} for model in models]
    moved = [p.apply(one) for p, one in zip(found.permutations, given, strict=True)]
    assert found.runs == (pytest.approx(objective(moved)),)
    assert objective(moved) > objective(given)
    heights = [record.objective for record in found.history]
    assert heights == sorted(heights)
    # The library's own ascent, begun here, finds nothing more to gain.
    again = pg.merge(moved, pg.CycleConsistent(init="identity"), spec=SPEC)
    assert again.objective == pytest.approx(objective(moved), rel=1e-5)


def test_renumbered_copies_are_one_again() -> None:
    a = state(0)
    copies = [Disk(SPEC.random(seed, every_group=True).apply(a)) for seed in range(3)]
    found = StreamedRounds().find(Models(tuple(copies), SPEC))
    first, *rest = (p.apply(copy.state) for p, copy in zip(found.permutations, copies, strict=True))
    assert all(torch.equal(first[name], other[name]) for other in rest for name in SPEC.axes)


def test_a_run_that_is_stopped_goes_on_to_the_same_end() -> None:
    models = Models(tuple(Disk(state(seed)) for seed in range(3)), SPEC)
    whole = StreamedRounds().find(models, seed=2)
    for stop in range(6):
        kept: dict[int, pg.Permutation] = {}

        def remember(
            step: int, search: Callable[[], pg.Permutation], kept: dict[int, pg.Permutation] = kept, stop: int = stop
        ) -> pg.Permutation:
            if step not in kept:
                if step == stop:
                    raise KeyboardInterrupt
                kept[step] = search()
            return kept[step]

        assert StreamedRounds(remember=remember).find(models, seed=2).outcome == "interrupted"
        assert len(kept) == stop

        def go_on(
            step: int, search: Callable[[], pg.Permutation], kept: dict[int, pg.Permutation] = kept
        ) -> pg.Permutation:
            return kept[step] if step in kept else search()

        assert StreamedRounds(remember=go_on).find(models, seed=2).permutations == whole.permutations


def test_what_it_refuses() -> None:
    with pytest.raises(pg.errors.PermgraphError, match="max_rounds=0"):
        StreamedRounds(max_rounds=0)
    bad = {**state(1), "0.bias": torch.full((6,), float("nan"))}
    with pytest.raises(pg.errors.NonFiniteError, match="0.bias"):
        StreamedRounds().find(Models((state(0), bad), SPEC))
