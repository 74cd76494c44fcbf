"""What a step settles on, once its assignment has been solved."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from permgraph.assignment.solve import crowded
from permgraph.matching.ascent.step import choose, choose_each, cycles


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


def hubs(n: int, seed: int) -> np.ndarray:
    """Values in which all rows want much the same columns, as in trained networks."""
    random = np.random.default_rng(seed)
    table = random.standard_normal((n, n)) + 4 * random.standard_normal(n) * random.random((n, 1))
    return table.astype(np.float32)


def test_prices_of_last_time_change_nothing_but_the_time() -> None:
    table, prices = hubs(200, 0), dict[str, np.ndarray]()
    assert crowded(table, maximise=True)
    for turn in range(4):
        worth = {"hidden": torch.from_numpy(table)}
        (expected,) = choose_each(worth, "auto").values()
        (found,) = choose_each(worth, "auto", prices).values()
        assert found[0].tolist() == expected[0].tolist()
        assert found[1] == expected[1] > 0
        # Numbered as the columns are now, with the prices each row wants its own column, or nearly.
        table = table[:, found[0]]
        net = table + prices["hidden"]
        regret = (net.max(axis=1) - net.diagonal()).sum()
        assert regret < 0.1 * (table.max(axis=1) - table.diagonal()).sum()
        table = table + 0.1 * hubs(200, turn + 1)


def test_easy_assignments_get_no_prices() -> None:
    prices: dict[str, np.ndarray] = {}
    choose_each(
        {"hidden": torch.eye(200)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]}, "auto", prices
    )
    choose_each({"few": torch.from_numpy(hubs(20, 0))}, "auto", prices)
    assert not prices
