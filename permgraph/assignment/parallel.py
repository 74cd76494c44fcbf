"""Independent assignments side by side, on whatever joblib is told to run on.

By default these are threads, as many as torch computes with: the solvers of lapx and scipy release the interpreter's
lock while they work (measured: a second thread is never held up for more than its turn), so threads share the matrices
and win as much as processes would. ``joblib.parallel_config`` around a call says otherwise: another number of threads,
or another engine, to which matrices are then sent. Without joblib, and inside a worker of an outer `joblib.Parallel`,
tasks run one after another. The results are the same everywhere, to the last bit: every problem is solved by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

WORTHWHILE = 1 << 25
"""Matrix entries below which nothing is handed out: 0.3 s of solving, where joblib takes 10 to 15 ms at each round."""


def workers(effort: int) -> int:
    """How many tasks may run at a time, where all of them together have so many matrix entries to look at.

    Args:
        effort: the entries of all cost matrices.
    """
    if effort < WORTHWHILE:
        return 1
    try:
        import joblib
    except ImportError:
        return 1
    # Asked for with a preference for threads, the number is always 1 unless an engine was named.
    configured = joblib.parallel.get_active_backend()[1]
    backend = joblib.parallel.get_active_backend(prefer="threads")[0]
    if configured is None:  # nobody has said how many: who is a worker already shares the machine with others
        configured = 1 if backend.nesting_level else torch.get_num_threads()
    return max(1, int(backend.effective_n_jobs(configured)))


def side_by_side(work: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], effort: int) -> list[Result]:
    """What `work` makes of each task's arguments, in order; several at a time where that is worth handing out.

    Args:
        work: a function of a module, so that it can be sent to another process, that changes nothing.
        tasks: the arguments of each call.
        effort: see `workers`.

    Example:
        >>> side_by_side(divmod, [(7, 3), (9, 4)], effort=2)
        [(2, 1), (2, 1)]
    """
    count = min(workers(effort), len(tasks))
    if count <= 1:
        return [work(*task) for task in tasks]
    import joblib

    parallel = joblib.Parallel(n_jobs=count, prefer="threads", batch_size=1)
    return list(parallel(joblib.delayed(work)(*task) for task in tasks))
