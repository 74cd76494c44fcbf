"""``permgraph plan``: what aligning two checkpoints of a model will cost, before there are any."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permgraph.cli.options import Inputs, Model, Modules, Shown, Symmetry
from permgraph.cli.screen import Screen, table

if TYPE_CHECKING:
    from permgraph.matching.cost import Estimate


def plan(
    model: Model,
    *,
    inputs: Inputs = None,
    symmetry: Symmetry = "permutation",
    modules: Modules = False,
    dtype_bytes: Annotated[int, typer.Option(help="Bytes of one weight in the checkpoint: 2 for bf16.")] = 4,
    passes: Annotated[int, typer.Option(help="Passes over all groups to count with.")] = 6,
    workers: Annotated[list[int] | None, typer.Option(help="Numbers of workers to show.")] = None,
    calibration: Annotated[float, typer.Option(help="Seconds to measure this machine for.")] = 2.0,
    shown: Shown,
) -> None:
    """Say what aligning two checkpoints of a model will cost; no weights are needed.

    With --symmetry general, that of matching over all that the model allows, which one process does.

    [bold]Examples[/bold]

        permgraph plan hf:./Llama-3-70B --dtype-bytes 2 --workers 1 --workers 8

        permgraph plan hf:./Llama-3-8B --dtype-bytes 2 --symmetry general
    """
    from permgraph.cli.models import spec_of
    from permgraph.errors import PermgraphError
    from permgraph.matching.cost import calibrate, estimate
    from permgraph.matching.general.cost import GeneralEstimate

    with Screen(shown) as screen:
        with screen.stage("finding symmetries"):
            cost = estimate(spec_of(model, inputs, symmetry, modules=modules))
        with screen.stage("measuring this machine"):
            rates = calibrate(calibration)
        general = isinstance(cost, GeneralEstimate)
        if general and workers not in (None, [1]):
            raise PermgraphError("general symmetries are matched by one process: leave out --workers")
        shards = workers or ([1] if general else [1, 2, 8, 64])
        run = functools.partial(cost.seconds, rates, passes=passes, width=dtype_bytes)
        seconds = {
            "in memory": {n: run(workers=n) for n in shards},
            "streamed": {n: run(workers=n, streamed=True) for n in shards},
        }
        data = {
            "flops_per_pass": cost.flops,
            "assignments_per_pass": cost.problems,
            "elements": cost.elements,
            "memory": {"in memory": cost.memory(dtype_bytes), "streamed": cost.memory(dtype_bytes, streamed=True)},
            "read_per_pass": cost.read(dtype_bytes),
            "rounds": [len(together) for together in cost.rounds],
            "seconds": seconds,
            "passes": passes,
            **(
                {"polar_factors_per_pass": cost.factors, "starts": cost.starts}
                if isinstance(cost, GeneralEstimate)
                else {}
            ),
            "rates": dataclasses.asdict(rates),
        }
        screen.result(data, _plan_text(cost, data, seconds, passes))


def _plan_text(cost: Estimate, data: dict[str, Any], seconds: dict[str, dict[int, float]], passes: int) -> str:
    from permgraph.matching.general.cost import GeneralEstimate

    rows = [
        ("weights", f"{cost.elements:,}"),
        ("steps", f"{len(cost.moves)}, in {len(cost.rounds)} rounds of steps that may run side by side"),
        ("Gram matrices, a pass", f"{cost.flops / 1e9:,.3g} GFLOP"),
        ("assignments, a pass", _counted(cost.problems)),
        *([("polar factors, a pass", _counted(cost.factors))] if isinstance(cost, GeneralEstimate) else []),
        ("largest Gram matrices", _size(cost.gram)),
        ("memory, all in memory", _size(data["memory"]["in memory"])),
        ("memory, streamed", f"{_size(data['memory']['streamed'])}, and the cache"),
        ("read, streamed, a pass", _size(data["read_per_pass"])),
    ]
    times = [
        (str(n), *(_duration(seconds[mode][n]) for mode in ("in memory", "streamed"))) for n in seconds["in memory"]
    ]
    starts = ""
    if isinstance(cost, GeneralEstimate):
        several = f"in memory that is one ascent of {cost.starts}, streamed the only one"
        starts = f"; {several if cost.starts > 1 else 'one ascent is made'}"
    return (
        f"{table(rows)}\n\n{passes} passes on machines like this one, every pass computed in full{starts}:\n"
        + table(times, ("workers", "in memory", "streamed"))
    )


def _counted(sizes: Mapping[int, int]) -> str:
    named = [f"{count} of {size}" for size, count in list(sizes.items())[:8]]
    return ", ".join(named) + (", ..." if len(sizes) > 8 else "")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.4g} TiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.3g} h"
