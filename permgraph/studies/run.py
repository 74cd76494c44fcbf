"""Running a study: what is missing from the store, on whatever joblib is told to run on.

By default that is local processes. ``joblib.parallel_config("dask")`` or ``("ray")`` around the call runs the same
plan on a cluster. Nothing is scheduled here: only cells whose worker died are handed in again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from permgraph.conventions.outcomes import StepProgress
from permgraph.errors import StudyError, in_one_line
from permgraph.studies.cell import Task, run, versions
from permgraph.studies.extras import imported
from permgraph.studies.plan import Cell, StudyPlan
from permgraph.studies.store import SMALLEST, Store, UnwritableError
from permgraph.studies.table import StudyResult
from permgraph.weights.state_dict import as_state_dict

log = logging.getLogger(__name__)

POLL = 0.5  # seconds between two looks at the store


def study(
    plan: StudyPlan,
    store: str | os.PathLike[str],
    *,
    jobs: int | None = None,
    retry_failed: bool = True,
    progress: StepProgress | None = None,
) -> StudyResult:
    """Run every cell of a plan that the store has no result of, and return the whole table.

    A cell that fails is recorded with its error, and the others go on. A worker that dies costs the cells it was at:
    they are handed in again, the second time one by one, and one that kills its worker alone as well is recorded as
    failed. Interrupting keeps all that is finished; the same call goes on from there.

    Args:
        plan: the grid.
        store: a folder or fsspec URL that every worker reaches.
        jobs: how many workers; by default what `joblib.parallel_config` says, or one per core.
        retry_failed: run cells that failed before once more.
        progress: called with how many cells are done and how many there are.

    Raises:
        StudyError: before any work: the plan names a cell twice, the store cannot be written to or has no room for the
            results, a worker has another version of permgraph, torch, numpy, scipy or Python. During it: the store
            takes nothing more, or the backend broke while no cell was at work; what was done is kept.
        MissingExtraError: joblib or fsspec is not installed.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).eval()
        >>> plan = pg.StudyPlan(net, {"one": net, "two": net}, {"weights": pg.WeightMatching()})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pg.study(plan, folder, jobs=1).rows[0]["status"]
        'done'
    """
    joblib = imported("joblib")
    place = Store(os.fspath(store))
    cells = plan.cells
    place.require_access()
    todo = missing(plan, store, retry_failed=retry_failed)
    if todo:
        place.require_room(_needed(plan, place, todo))
        parallel = _parallel(joblib, jobs)
        _require_same_versions(joblib, parallel)
        for name in {name for cell in todo for name in (cell.a, cell.b)}:
            place.put_tensors(f"models/{plan.contents[name]}", as_state_dict(plan.networks[name]))
        for cell in todo:
            place.forget(cell.key)
        with watched(place, cells, progress):
            _run(joblib, parallel, plan, place, todo)
    elif progress is not None:
        progress(len(cells), len(cells))
    return StudyResult(plan, place)


def missing(plan: StudyPlan, store: str | os.PathLike[str], *, retry_failed: bool = True) -> list[Cell]:
    """The cells of a plan that a store has no result of, or one that failed if those are tried again."""
    place = Store(os.fspath(store))
    recorded = place.recorded(cell.key for cell in plan.cells)
    return [cell for cell in plan.cells if cell.key not in recorded or not _settled(place, cell, retry_failed)]


def _needed(plan: StudyPlan, store: Store, todo: Sequence[Cell]) -> int:
    """About how many bytes a study is going to write: networks, a record for each cell, and permutations."""
    names = {plan.contents[name]: name for cell in todo for name in (cell.a, cell.b)}
    networks = sum(
        sum(tensor.nbytes for tensor in as_state_dict(plan.networks[name]).values())
        for content, name in names.items()
        if not store.holds(f"models/{content}.safetensors")
    )
    indices = sum(
        math.prod(plan.spec.groups[part].size for part in (*group.parents, name))
        * (group.size if group.structure.linear else 1 + group.structure.scales + group.structure.signs)
        for name, group in plan.spec.acting.items()
    )
    aligned = sum(cell.matcher in plan.matchers for cell in todo)
    return networks + len(todo) * SMALLEST + aligned * max(SMALLEST, 8 * indices)


def _settled(store: Store, cell: Cell, retry_failed: bool) -> bool:
    record = store.record(cell.key)
    return record is not None and (record["status"] == "done" or not retry_failed)


def _run(joblib: Any, parallel: Any, plan: StudyPlan, store: Store, todo: Sequence[Cell]) -> None:
    """First all together; then, one by one, those whose worker died."""
    tasks = {cell.key: _task(plan, store, cell) for cell in todo}
    suspects: set[str] = set()
    while unrecorded := tasks.keys() - suspects - store.recorded(tasks):
        waiting = [key for key in tasks if key in unrecorded]
        try:
            parallel(joblib.delayed(run)(tasks[key]) for key in waiting)
            _require_records(store, waiting)
        except (UnwritableError, UnseenError):
            raise
        except Exception as error:
            fallen = store.begun(waiting) - suspects
            if not fallen:
                raise StudyError(f"the workers broke while no cell was at work: {_said(error)}") from error
            log.warning("a worker died (%s); %d cells are tried again at the end", _said(error), len(fallen))
            suspects |= fallen
    for key in tasks:
        if key in suspects - store.recorded(suspects):
            try:
                # A second, idle task keeps joblib from running a single one in this process.
                parallel([joblib.delayed(run)(tasks[key]), joblib.delayed(versions)()])
                _require_records(store, [key])
            except (UnwritableError, UnseenError):
                raise
            except Exception as error:
                record = {"status": "failed", "error": f"its worker died twice, alone the second time: {_said(error)}"}
                store.put_record(key, {**record, "seconds": None, "versions": versions()})


class UnseenError(StudyError):
    """Workers say that they have done their cells, and the store does not show them."""


def _require_records(store: Store, keys: Sequence[str]) -> None:
    """Raise UnseenError if cells that were run have left no record here."""
    unseen = len(keys) - len(store.recorded(keys))
    if unseen:
        raise UnseenError(
            f"{unseen} cells were run, and the store {store.url!r} shows no record of them: every worker must reach "
            "one and the same place under this name, which no memory:// and no folder of another machine is"
        )


def _task(plan: StudyPlan, store: Store, cell: Cell) -> Task:
    return Task(
        key=cell.key,
        a=plan.contents[cell.a],
        b=plan.contents[cell.b],
        matcher=plan.matchers.get(cell.matcher),
        seed=cell.seed,
        build=plan.build or functools.partial(copy.deepcopy, plan.model),
        spec=plan.spec,
        evaluate=plan.evaluate,
        prepare=plan.prepare,
        points=plan.points,
        higher_is_better=tuple(plan.higher_is_better),
        threads=plan.threads,
        store=store,
        versions=versions(),
    )


def _parallel(joblib: Any, jobs: int | None) -> Any:
    """A `joblib.Parallel` that hands in one cell at a time, so that a dead worker costs no more."""
    configured = joblib.parallel.get_active_backend()[1]
    wanted = jobs if jobs is not None else configured if configured is not None else -1
    return joblib.Parallel(n_jobs=wanted, batch_size=1)


def _require_same_versions(joblib: Any, parallel: Any) -> None:
    backend, workers = joblib.parallel.get_active_backend()[0], parallel._effective_n_jobs()
    if workers == 1 and not hasattr(backend, "client"):
        return  # this very process
    try:
        if hasattr(backend, "client"):  # Dask reaches every worker, also those that a task would not
            theirs = list(backend.client.run(versions).values())
        else:
            theirs = parallel(joblib.delayed(versions)() for _ in range(workers))
    except Exception as error:
        raise StudyError(f"the workers cannot be asked what they have installed: {_said(error)}") from error
    if not theirs:
        raise StudyError("the scheduler has no workers: start some first")
    mine = versions()
    for found in theirs:
        for name, version in mine.items():
            if found.get(name) != version:
                raise StudyError(f"a worker has {name} {found.get(name)}, and this process {version}: install the same")


@contextlib.contextmanager
def watched(store: Store, cells: Sequence[Cell], progress: StepProgress | None) -> Iterator[None]:
    """Look at the store now and then: the one place where every backend's workers tell how far they are."""
    if progress is None:
        yield
        return
    done: set[str] = set()
    stop = threading.Event()

    def look() -> None:
        before = len(done)
        done.update(store.recorded(cell.key for cell in cells))
        if len(done) != before:
            progress(len(done), len(cells))

    def watch() -> None:
        while not stop.wait(POLL):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        look()


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {in_one_line(error)}"[:300]
