"""What a step settles on, once its assignment has been solved."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from permgraph.matching.step import choose, cycles


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40).flatmap(lambda n: st.permutations(range(n))))
def test_cycles_are_named_by_their_least_index(order: list[int]) -> None:
    permutation = np.array(order)
    expected = np.full(len(order), -1)
    for start in range(len(order)):  # ascending, so the first to reach a cycle is its least
        at = start
        while expected[at] < 0:
            expected[at] = start
            at = order[at]
    assert cycles(permutation).tolist() == expected.tolist()


def test_one_long_cycle_is_one() -> None:
    assert not cycles(np.roll(np.arange(1000), 1)).any()


def test_of_two_cycles_the_one_that_gains_nothing_is_undone() -> None:
    worth = torch.tensor([[0.0, 1.0, 0, 0], [1.0, 0.0, 0, 0], [0, 0, 2.0, 2.0], [0, 0, 2.0, 2.0]])

    def swap_all(_: np.ndarray) -> np.ndarray:
        return np.array([1, 0, 3, 2])

    columns, gain = choose(worth, swap_all, "hidden")
    assert columns.tolist() == [1, 0, 2, 3]
    assert gain == 2.0


def test_batches_are_settled_each_for_itself() -> None:
    tie, gains = torch.zeros(2, 2), torch.eye(2).flip(0)
    columns, gain = choose(torch.stack([tie, gains, tie]), "auto", "hidden")
    assert columns.tolist() == [[0, 1], [1, 0], [0, 1]]
    assert gain == 2.0
