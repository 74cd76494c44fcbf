"""``permgraph study``: a grid of pairs of checkpoints, matchers and seeds."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permgraph.cli.options import Shown
from permgraph.cli.report import FIGURES, check_file
from permgraph.cli.screen import SAYS_NO, Screen, table

if TYPE_CHECKING:
    from permgraph.studies import StudyResult


class Backend(str, enum.Enum):
    """The engines, by their names."""

    loky = "loky"
    threading = "threading"
    sequential = "sequential"
    dask = "dask"
    ray = "ray"


def study(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A YAML file; see the documentation of studies.")],
    *,
    store: Annotated[str, typer.Option(help="A folder or URL for the results, which all workers reach.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the table, as .csv or .parquet.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the barriers into this file.")] = None,
    backend: Annotated[Backend, typer.Option(help="What to run on.")] = Backend.loky,
    address: Annotated[str | None, typer.Option(help="Of a Dask scheduler or Ray cluster that runs already.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", help="Workers; one per core by default.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is missing, and stop.")] = False,
    shown: Shown,
) -> None:
    """Align every pair of networks by every matcher, and measure the barriers; do only what the store has not got.

    The exit code is 1 if a cell failed.

    [bold]Example[/bold]

        permgraph study plan.yaml --store results -o table.csv --figure barriers.png

        permgraph study plan.yaml --store s3://bucket/study --backend dask --address tcp://head:8786
    """
    from permgraph.cli.planfile import read_plan
    from permgraph.studies import backends
    from permgraph.studies import study as run_study
    from permgraph.studies.run import missing

    with Screen(shown, resumes=True) as screen:
        check_file(output, "--output", (".csv", ".parquet"))
        check_file(figure, "--figure", FIGURES)
        grid = read_plan(plan, screen)
        todo = missing(grid, store)
        screen.note(f"{len(grid.cells)} cells, {len(todo)} of them to be done")
        if dry_run:
            cells = [str(cell) for cell in todo]
            screen.result({"cells": len(grid.cells), "missing": cells}, "\n".join(cells) or "nothing is missing")
            return
        with backends.backend(backend.value, jobs, address), screen.stage("cells", len(grid.cells)) as update:
            result = run_study(grid, store, progress=lambda done, whole: update(done))
        if output is not None:
            result.save(output)
            screen.note(f"table written to {output}")
        if figure is not None:
            result.plot().figure.savefig(figure)  # type: ignore[union-attr]
            screen.note(f"figure written to {figure}")
        for cell, error in result.failed.items():
            screen.note(f"failed: {cell}: {error}")
        screen.result({"summary": str(result), "rows": result.rows}, _summary(result))
        if result.failed:
            raise typer.Exit(SAYS_NO)


def _summary(result: StudyResult) -> str:
    """The means over the cells of each matcher."""
    metrics = sorted({name for row in result.rows for name in row if name.startswith("barrier_")})
    by_matcher: dict[str, list[dict[str, Any]]] = {}
    for row in result.rows:
        if row["status"] == "done":
            by_matcher.setdefault(row["matcher"], []).append(row)

    def mean(rows: list[dict[str, Any]], name: str) -> str:
        values = [row[name] for row in rows if row.get(name) is not None]
        return f"{sum(values) / len(values):.4g}" if values else ""

    head = ("matcher", "cells", "objective", *(metric.replace("_", " ") for metric in metrics))
    body = [
        (name, str(len(rows)), mean(rows, "objective"), *(mean(rows, metric) for metric in metrics))
        for name, rows in by_matcher.items()
    ]
    return f"{result}\n\n{table(body, head)}" if body else str(result)
