"""Studies: what is done, what is not done twice, and what an accident costs."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import joblib
import pytest
import torch
from torch import nn

import permgraph as pg
from permgraph.errors import MismatchError, MissingExtraError, StudyError
from permgraph.matching.ascent import step
from permgraph.studies import Named, backends
from permgraph.studies.cell import versions
from permgraph.studies.run import missing, watched
from permgraph.studies.store import Store
from tests.studies.nets import Deadly, Picky, batches, net, plan


def table(result: pg.StudyResult, folder: Path, name: str) -> bytes:
    result.save(folder / name, times=False)
    return (folder / name).read_bytes()


def test_every_cell_is_what_align_and_barrier_give(tmp_path: Path) -> None:
    grid = plan()
    result = pg.study(grid, tmp_path, jobs=1)
    assert [row["status"] for row in result.rows] == ["done"] * 9  # three pairs, unaligned and by two matchers
    row = next(row for row in result.rows if (row["a"], row["b"], row["matcher"]) == ("n0", "n2", "weights"))
    torch.set_num_threads(1)
    fit = pg.align(net(0), net(2), pg.WeightMatching(order="random"))
    line = pg.barrier(net(0), fit.state_dict, pg.evaluate_on(batches()), 3)
    assert row["objective"] == fit.objective
    assert row["barrier_loss"] == line.barrier
    assert (row["a_loss"], row["middle_loss"], row["b_loss"]) == line.losses
    assert result.permutation("n0", "n2", "weights") == fit.permutation
    naive = next(row for row in result.rows if row["matcher"] == "none")
    assert naive["barrier_loss"] == pg.barrier(net(0), net(1), pg.evaluate_on(batches()), 3).barrier
    assert naive["objective"] is None


def test_only_what_is_missing_is_done(tmp_path: Path) -> None:
    first = pg.study(plan(2), tmp_path, jobs=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cells/*.json")}
    larger = plan(3)
    assert len(missing(larger, tmp_path)) == 6
    again = pg.study(larger, tmp_path, jobs=1)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.rows[:3] == first.rows
    assert not missing(larger, tmp_path)
    assert not list(tmp_path.glob("begun/*"))


def test_an_interrupted_match_ends_the_study_and_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return assign(*arguments, **keywords)

    assign = step.assign
    monkeypatch.setattr(step, "assign", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pg.study(plan(2), tmp_path, jobs=1)
    assert len(calls) == 2
    monkeypatch.undo()
    left = missing(plan(2), tmp_path)
    assert "weights" in {cell.matcher for cell in left}
    again = pg.study(plan(2), tmp_path, jobs=1)
    assert {row["outcome"] for row in again.rows if row["matcher"] != "none"} == {"converged"}


@pytest.mark.parametrize(
    "changes",
    [
        {"points": 5},
        {"seeds": (1,)},
        {"evaluate": pg.evaluate_on(batches() * 2)},
        {"matchers": {"weights": pg.WeightMatching(order="given")}, "unaligned": False},
        {"prepare": lambda network, t: network},
        {"threads": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_a_result_depends_on_is_in_its_key(changes: dict[str, object]) -> None:
    known = {cell.key for cell in plan(2).cells}
    changed = {cell.key for cell in plan(2, **changes).cells if cell.matcher != "none" or "seeds" not in changes}
    assert not known & changed


def test_names_are_not_in_the_key() -> None:
    one = pg.StudyPlan(net(), {"a": net(0), "b": net(1)}, {"m": pg.WeightMatching()})
    other = pg.StudyPlan(net(), {"c": net(0), "d": net(1).state_dict()}, {"n": pg.WeightMatching()})
    assert [cell.key for cell in one.cells] == [cell.key for cell in other.cells]


def test_a_cell_that_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    bad = net(1)[0].bias[0].item()
    grid = plan(3, matchers={}, evaluate=Picky(bad))
    result = pg.study(grid, tmp_path, jobs=1)
    assert [row["status"] for row in result.rows] == ["failed", "done", "failed"]
    assert result.failed["n0 <- n1, none, seed 0"] == "ArithmeticError: this network is not to my taste"
    assert str(result) == "3 cells: 2 failed, 1 done"
    assert len(missing(grid, tmp_path)) == 2
    assert not missing(grid, tmp_path, retry_failed=False)


def test_worker_processes_give_the_same_table_and_a_death_costs_nothing_else(tmp_path: Path) -> None:
    bad = net(1)[0].bias[0].item()
    once = Deadly(bad, str(tmp_path / "died"))
    result = pg.study(plan(3, matchers={}, evaluate=once), tmp_path / "once", jobs=2)
    assert (tmp_path / "died").exists()
    assert [row["status"] for row in result.rows] == ["done"] * 3
    always = pg.study(
        plan(3, matchers={}, evaluate=Deadly(bad, str(tmp_path / "x"), True)), tmp_path / "always", jobs=2
    )
    assert [row["status"] for row in always.rows] == ["failed", "done", "failed"]
    assert "worker died twice" in always.failed["n1 <- n2, none, seed 0"]
    here, there = (pg.study(plan(), tmp_path / str(jobs), jobs=jobs) for jobs in (1, 2))
    assert table(here, tmp_path, "1.csv") == table(there, tmp_path, "2.csv")
    assert table(here, tmp_path, "1.parquet") == table(there, tmp_path, "2.parquet")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dask", "ray"])
def test_clusters_give_the_same_table(name: str, tmp_path: Path) -> None:
    pytest.importorskip({"dask": "distributed", "ray": "ray"}[name])
    here = pg.study(plan(), tmp_path / "here", jobs=1)
    with backends.backend(name, jobs=2):
        there = pg.study(plan(), tmp_path / "there")
    assert table(here, tmp_path, "here.csv") == table(there, tmp_path, "there.csv")


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    pg.study(plan(2), tmp_path, jobs=1, progress=lambda done, whole: seen.append((done, whole)))
    assert seen[-1] == (3, 3)
    assert seen == sorted(seen)


def test_tables_and_figures(tmp_path: Path) -> None:
    result = pg.study(plan(3), tmp_path, jobs=1)
    result.to_csv(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["matcher"] for row in rows[:3]] == ["none", "weights", "activations"]
    assert all(float(row["seconds"]) > 0 for row in rows)
    axes = result.plot()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["none\n(3)", "weights\n(3)", "activations\n(3)"]
    with pytest.raises(StudyError, match="'speed'"):
        result.plot("speed")
    with pytest.raises(StudyError, match=r"\.xlsx"):
        result.save(tmp_path / "t.xlsx")


def test_plans_that_cannot_be_run() -> None:
    with pytest.raises(StudyError, match="at least two networks, not 1"):
        plan(1)
    with pytest.raises(StudyError, match="may not be called 'none'"):
        plan(matchers={"none": pg.WeightMatching()})
    with pytest.raises(StudyError, match="nothing to do"):
        plan(matchers={}, evaluate=None)
    with pytest.raises(StudyError, match="names the network 'n7'"):
        _ = plan(pairs=[("n0", "n7")]).cells
    with pytest.raises(StudyError, match="stands twice in the plan"):
        _ = plan(pairs=[("n0", "n1"), ("n0", "n1")]).cells
    wide = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(MismatchError, match=r"network 'wide'.*0\.weight"):
        pg.StudyPlan(net(), {"a": net(), "wide": wide}, {"m": pg.WeightMatching()})
    with pytest.raises(StudyError, match=r"value.*generator, whose content cannot be read"):
        _ = plan(evaluate=(i for i in range(3))).cells
    _ = plan(evaluate=Named(lambda model: 0.0, "zero")).cells


def test_a_store_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot be written to"):
        pg.study(plan(), tmp_path / "file", jobs=1)
    assert len(missing(plan(), tmp_path / "file")) == 9
    with pytest.raises(StudyError, match="cannot be opened"):
        pg.study(plan(), "nonsense://there", jobs=1)


def test_a_store_without_room_for_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000))
    with pytest.raises(StudyError, match=r"has 0\.0 MB of room, and the study writes about 0\.1 MB"):
        pg.study(plan(), tmp_path, jobs=1)
    assert not list(tmp_path.glob("*/*"))
    one = plan(2, matchers={}, evaluate=Picky(0.0))  # two networks of a few numbers, and one cell
    assert pg.study(one, tmp_path, jobs=1).rows[0]["status"] == "done"


def test_a_store_that_is_full_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    put, limits = Store.put_record, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_after_five(store: Store, key: str, record: Mapping[str, Any]) -> None:
        if len(list(tmp_path.glob("cells/*.json"))) == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        put(store, key, record)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "put_record", full_after_five)
        try:
            with pytest.raises(StudyError, match=r"cannot be written to: .*; what was done is kept"):
                pg.study(plan(), tmp_path, jobs=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(list(tmp_path.glob("cells/*.json"))) == 5
    assert not list(tmp_path.glob("cells/*.tmp"))
    assert len(missing(plan(), tmp_path)) == 4
    assert str(pg.study(plan(), tmp_path, jobs=1)) == "9 cells: 9 done"


def test_what_is_damaged_in_the_store_is_done_again(tmp_path: Path) -> None:
    result = pg.study(plan(2), tmp_path, jobs=1)
    before = table(result, tmp_path, "before.csv")
    for number, path in enumerate(sorted(tmp_path.glob("cells/*.json"))):
        path.write_text(["", "{", json.dumps({"key": "another"})][number])
    assert len(missing(plan(2), tmp_path)) == 3
    assert table(pg.study(plan(2), tmp_path, jobs=1), tmp_path, "after.csv") == before


def test_workers_of_another_version_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Client:
        def run(self, function: object) -> dict[str, dict[str, str]]:
            return {"here": versions(), "there": {**versions(), "torch": "1.0"}}

    class Backend:
        client = Client()

    monkeypatch.setattr(joblib.parallel, "get_active_backend", lambda: (Backend(), 2))
    with pytest.raises(StudyError, match=r"a worker has torch 1\.0"):
        pg.study(plan(), tmp_path)
    assert not list(tmp_path.glob("cells/*"))


def test_engines_that_are_not_there() -> None:
    with pytest.raises(StudyError, match="no backend 'slurm'"), backends.backend("slurm"):
        pass
    with pytest.raises(StudyError, match="takes no address"), backends.backend("loky", address="tcp://x"):
        pass


def test_a_scheduler_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(backends, "PATIENCE", 0.5)
    with (
        pytest.raises(StudyError, match="no Dask scheduler answers"),
        backends.backend("dask", address="tcp://127.0.0.1:9"),
    ):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "ray://127.0.0.1:99999", "[::1]:9"])
def test_a_ray_cluster_that_does_not_answer(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = SimpleNamespace(is_initialized=lambda: False, init=lambda **how: pytest.fail("it would knock for minutes"))
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(StudyError, match="no Ray cluster answers at"), backends.backend("ray", address=address):
        pass


@pytest.mark.parametrize(("module", "extra"), [("distributed", "dask"), ("ray", "ray")])
def test_an_engine_that_is_not_installed(module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"pip install permgraph\[{extra}\]"), backends.backend(extra):
        pass


@pytest.mark.parametrize("module", ["joblib", "fsspec"])
def test_what_studies_need_is_not_installed(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = plan(2)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install permgraph\[study\]"):
        pg.study(grid, tmp_path, jobs=1)


def test_worker_processes_with_another_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = plan(2)
    monkeypatch.setattr(pg, "__version__", "9.9")  # here, and not in the workers
    with pytest.raises(StudyError, match=r"a worker has permgraph .*, and this process 9\.9: install the same"):
        pg.study(grid, tmp_path, jobs=2)
    assert not list(tmp_path.glob("cells/*"))
    assert not list(tmp_path.glob("models/*"))


def test_a_store_keeps_to_itself(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="not the key of a cell"):
        Store(str(tmp_path)).record("../../etc/passwd")


@dataclass
class AloneInTheProcess:
    """Counts how many evaluations run at once in this process, and asks for a thread count while it waits."""

    fingerprint = "alone"
    inside: int = 0
    most: int = 0

    def __call__(self, model: nn.Module) -> float:
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.02)
        self.inside -= 1
        return 1.0


def test_threads_of_one_process_do_one_cell_at_a_time(tmp_path: Path) -> None:
    """The seed and the number of threads are the process's: two cells at once would read each other's."""
    evaluate = AloneInTheProcess()
    grid = plan(4, evaluate=evaluate, matchers={})
    with joblib.parallel_config("threading", n_jobs=4):
        result = pg.study(grid, tmp_path)
    assert {row["status"] for row in result.rows} == {"done"}
    assert evaluate.most == 1


def test_workers_that_write_elsewhere_end_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr("permgraph.studies.run.run", lambda task: tried.append(task.key))
    grid = plan(2)
    with pytest.raises(StudyError, match="one and the same place"):
        pg.study(grid, tmp_path, jobs=1)
    assert sorted(tried) == sorted(cell.key for cell in grid.cells), "each once"


def test_progress_reads_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pg.study(plan(3), tmp_path, jobs=1)
    cells = plan(3).cells
    read: list[str] = []
    monkeypatch.setattr(Store, "record", lambda self, key: read.append(key))
    told: list[tuple[int, int]] = []
    with watched(Store(str(tmp_path)), cells, lambda done, whole: told.append((done, whole))):
        pass
    assert told == [(9, 9)]
    assert not read
