"""How many steps of training straight-through matching takes from one projection to the next."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.flop_counter import FlopCounterMode

from permgraph.matching import tuned
from permgraph.spec.spec import PermutationSpec


class Work:
    """The operations that were counted."""

    def __init__(self) -> None:
        self.operations = 0


@contextmanager
def counted() -> Iterator[Work]:
    """Count the floating-point operations of matrix products and convolutions, gradients included."""
    work = Work()
    with FlopCounterMode(display=False) as counter:
        yield work
    work.operations = counter.get_total_flops()


def steps_between(spec: PermutationSpec, operations: int, weights: int) -> int:
    """Steps from one projection to the next, so that projections take about a quarter of what training takes.

    Both are counted, not timed, so that a run does the same again.

    Args:
        spec: what is projected over.
        operations: floating-point operations of a step, forwards and backwards.
        weights: how many weights its optimizer changes.

    Returns:
        `tuned.LEAST_INTERVAL` or more.
    """
    from permgraph.matching.cost import estimate  # which needs the matchers

    projection = estimate(spec)
    solving: float = sum(count * tuned.SOLVING_OPERATIONS * size**2.5 for size, count in projection.problems.items())
    training = operations + tuned.UPDATING_OPERATIONS * weights
    return max(tuned.LEAST_INTERVAL, math.ceil((projection.flops + solving) / (tuned.PROJECTION_SHARE * training)))
