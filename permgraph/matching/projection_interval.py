"""How many steps of training straight-through matching takes from one projection to the next."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.flop_counter import FlopCounterMode

from permgraph.spec.spec import PermutationSpec

LEAST = 16
SHARE = 0.25  # of training, that projections may take
SOLVING = 120.0  # operations of matrix products in the time of one assignment of n rows, over n^2.5
UPDATING = 240.0  # the same for one weight's gradient to be copied and its optimizer's step, which wait for memory


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
        `LEAST` or more.
    """
    from permgraph.matching.cost import estimate  # which needs the matchers

    projection = estimate(spec)
    solving: float = sum(count * SOLVING * size**2.5 for size, count in projection.problems.items())
    training = operations + UPDATING * weights
    return max(LEAST, math.ceil((projection.flops + solving) / (SHARE * training)))
