"""One cell of a study: a pure task, which any process can do that reaches the store."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import scipy
import torch
from torch import nn

from permgraph.connectivity.barriers import Evaluate, Prepare, barrier
from permgraph.errors import in_one_line
from permgraph.matching import Matcher, align
from permgraph.matching.threads import as_set
from permgraph.networks.batches import undisturbed
from permgraph.spec.spec import PermutationSpec
from permgraph.studies.store import Store, UnwritableError


@dataclass(frozen=True)
class Task:
    """All that a worker needs to know for one cell; the networks it fetches from the store.

    Attributes:
        key: of the cell.
        a, b: the fingerprints of the networks.
        matcher: None leaves b as it is.
        build: makes the module that the networks are weights of.
        versions: what the results were to be made with; a worker with others refuses.
    """

    key: str
    a: str
    b: str
    matcher: Matcher | None
    seed: int
    build: Callable[[], nn.Module]
    spec: PermutationSpec
    evaluate: Evaluate | None
    prepare: Prepare | None
    points: int
    higher_is_better: Collection[str]
    threads: int
    store: Store
    versions: Mapping[str, str]


_process = threading.Lock()


def versions() -> dict[str, str]:
    """What results may depend on, of this process."""
    from permgraph import __version__

    return {
        "permgraph": __version__,
        "torch": torch.__version__.partition("+")[0],
        "python": ".".join(platform.python_version_tuple()[:2]),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }


def run(task: Task) -> dict[str, Any]:
    """Do one cell, keep its record in the store, and return it. What goes wrong inside is part of the record.

    The seed and the number of threads are the process's, so that of several threads in one only one is at work.
    """
    with _process:
        return _run(task)


def _run(task: Task) -> dict[str, Any]:
    task.store.begin(task.key)
    started = time.perf_counter()
    mine = versions()
    differing = {name: (mine.get(name), wanted) for name, wanted in task.versions.items() if mine.get(name) != wanted}
    record: dict[str, Any]
    threads = torch.get_num_threads()
    torch.set_num_threads(task.threads)
    try:
        if differing:
            raise RuntimeError(f"this worker has other versions, as (here, where the study began): {differing}")
        with as_set():
            record = {"status": "done", **_result(task)}
    except UnwritableError:  # whoever comes next would fail as well
        raise
    except Exception as error:
        record = {"status": "failed", "error": f"{type(error).__name__}: {in_one_line(error)}"}
    finally:
        torch.set_num_threads(threads)
    record |= {"seconds": round(time.perf_counter() - started, 3), "versions": mine}
    task.store.put_record(task.key, record)
    return record


def _result(task: Task) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        a, b = (_network(task, content) for content in (task.a, task.b))
        result: dict[str, Any] = {}
        end: Mapping[str, torch.Tensor] = b.state_dict()
        if task.matcher is not None:
            found = align(a, b, task.matcher, spec=task.spec, seed=task.seed)
            if found.outcome == "interrupted":  # what was reached until then is no result to keep
                raise KeyboardInterrupt
            end = found.state_dict
            result = {
                "objective_before": found.objective_before,
                "objective": found.objective,
                "outcome": found.outcome,
                "sweeps": found.sweeps,
                "moved": sum(found.permutation.moved().values()),
            }
            moved = found.permutation.arrays if found.transformation is None else found.transformation.as_arrays()
            arrays = {name: torch.from_numpy(np.array(array)) for name, array in moved.items()}
            task.store.put_tensors(f"permutations/{task.key}", arrays)
        if task.evaluate is not None:
            with undisturbed():
                line = barrier(
                    a,
                    end,
                    task.evaluate,
                    task.points,
                    prepare=task.prepare,
                    higher_is_better=task.higher_is_better,
                )
            result["barriers"] = line.barriers
            result["curves"] = {metric: list(values) for metric, values in line.curves.items()}
        return result


def _network(task: Task, content: str) -> nn.Module:
    network = task.build()
    network.load_state_dict(_weights(task.store, content))
    return network


@lru_cache(maxsize=8)
def _weights(store: Store, content: str) -> dict[str, torch.Tensor]:
    return store.tensors(f"models/{content}")
