"""What came of a study: one tidy table, a row for each cell."""

from __future__ import annotations

import csv
import io
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permgraph.conventions.displayed import Displayed
from permgraph.errors import StudyError
from permgraph.io.files import write_atomically
from permgraph.spec.permutation import Permutation
from permgraph.spec.transformation import Transformation
from permgraph.studies.extras import imported
from permgraph.studies.plan import Cell, StudyPlan
from permgraph.studies.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TIMES = ("seconds",)


@dataclass(frozen=True, repr=False)
class StudyResult(Displayed):
    """The results of a plan, read from its store.

    Attributes:
        plan: the grid.
        store: where the results are kept.
    """

    plan: StudyPlan
    store: Store

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One mapping per cell, in the plan's order, all with the same keys.

        The networks ``a`` and ``b``, ``matcher``, ``seed``, ``status`` ("done", "failed" or "missing"), what the
        matcher reports, ``barrier_<metric>``, ``a_<metric>``, ``middle_<metric>`` and ``b_<metric>`` (at the ends and
        at the point nearest the middle of the line), ``error``, ``key`` and ``seconds``; None where it does not apply.
        """
        found = [self._row(cell) for cell in self.plan.cells]
        names = dict.fromkeys(name for row in found for name in row)
        tail = ("error", "key", *TIMES)
        order = [*(name for name in names if name not in tail), *tail]
        return [{name: row.get(name) for name in order} for row in found]

    @property
    def failed(self) -> dict[str, str]:
        """The error of each cell that failed, by what the cell is."""
        rows = zip(self.plan.cells, self.rows, strict=True)
        return {str(cell): row["error"] for cell, row in rows if row["status"] == "failed"}

    def permutation(self, a: str, b: str, matcher: str, seed: int = 0) -> Permutation:
        """The permutation of network `b` that a cell found; over general symmetries, of which it is a part.

        Raises:
            StudyError: the plan has no such cell, or it has given no permutation.
        """
        found = self.element(a, b, matcher, seed)
        return found.permutation if isinstance(found, Transformation) else found

    def element(self, a: str, b: str, matcher: str, seed: int = 0) -> Permutation | Transformation:
        """What a cell applied to network `b`: a permutation, or over general symmetries a transformation.

        Raises:
            StudyError: the plan has no such cell, or it has given none.
        """
        for cell in self.plan.cells:
            if (cell.a, cell.b, cell.matcher, cell.seed) == (a, b, matcher, seed):
                tensors = self.store.tensors(f"permutations/{cell.key}")
                arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
                if set(arrays) <= set(self.plan.spec.groups):  # of permutations, or of a matcher that knows them alone
                    return Permutation(self.plan.spec.permutations(), arrays)
                return Transformation.from_arrays(arrays, self.plan.spec)
        raise StudyError(f"the study has no cell {Cell(a, b, matcher, seed, '')}")

    def to_csv(self, path: str | os.PathLike[str], *, times: bool = True) -> None:
        """Write the table as CSV. Without the times it is the same bytes wherever and however often the study ran."""
        text = io.StringIO()
        names = [name for name in self.rows[0] if times or name not in TIMES]
        writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(path, text.getvalue().encode())

    def to_parquet(self, path: str | os.PathLike[str], *, times: bool = True) -> None:
        """Write the table as Parquet.

        Raises:
            MissingExtraError: pyarrow is not installed.
        """
        pyarrow, parquet = (imported(name, who="Parquet needs") for name in ("pyarrow", "pyarrow.parquet"))
        names = [name for name in self.rows[0] if times or name not in TIMES]
        table = pyarrow.table({name: [row[name] for row in self.rows] for name in names})
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(table, sink)
        write_atomically(path, sink.getvalue().to_pybytes())

    def save(self, path: str | os.PathLike[str], *, times: bool = True) -> None:
        """Write the table as CSV or Parquet, by the file's ending.

        Raises:
            StudyError: the ending is neither.
        """
        writers = {".csv": self.to_csv, ".parquet": self.to_parquet}
        ending = Path(path).suffix
        if ending not in writers:
            raise StudyError(f"{os.fspath(path)}: a table is written as .csv or .parquet, not {ending!r}")
        writers[ending](path, times=times)

    def plot(self, metric: str = "loss", *, ax: Axes | None = None) -> Axes:
        """Draw the barriers of each matcher: every cell a dot, and the median of each.

        Raises:
            MissingExtraError: matplotlib is not installed.
            StudyError: no barrier was measured in this metric.
        """
        from permgraph.studies.plots import plot_barriers

        by_matcher: dict[str, list[float]] = {}
        for row in self.rows:
            height = row.get(f"barrier_{metric}")
            if height is not None:
                by_matcher.setdefault(row["matcher"], []).append(height)
        if not by_matcher:
            raise StudyError(f"no cell measured a barrier in {metric!r}")
        return plot_barriers(by_matcher, metric, ax=ax)

    def __str__(self) -> str:
        by_status = Counter(row["status"] for row in self.rows)
        return f"{len(self.rows)} cells: " + ", ".join(f"{count} {status}" for status, count in by_status.items())

    def _row(self, cell: Cell) -> dict[str, Any]:
        row: dict[str, Any] = {"a": cell.a, "b": cell.b, "matcher": cell.matcher, "seed": cell.seed}
        record: Mapping[str, Any] = self.store.record(cell.key) or {"status": "missing"}
        row |= {"status": record["status"], "key": cell.key}
        row |= {name: record.get(name) for name in ("objective_before", "objective", "outcome", "sweeps", "moved")}
        for metric, height in record.get("barriers", {}).items():
            values = record["curves"][metric]
            row[f"barrier_{metric}"] = height if not math.isnan(height) else None
            row[f"a_{metric}"], row[f"b_{metric}"] = values[0], values[-1]
            row[f"middle_{metric}"] = values[len(values) // 2]
        return row | {"error": record.get("error"), "seconds": record.get("seconds")}
