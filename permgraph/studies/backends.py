"""The engines that a study can run on, by name: joblib's own, a Dask cluster, a Ray cluster."""

from __future__ import annotations

import contextlib
import importlib
import socket
from collections.abc import Iterator

from permgraph.errors import StudyError, in_one_line
from permgraph.studies.extras import imported

LOCAL = ("loky", "threading", "sequential")
NAMES = (*LOCAL, "dask", "ray")
PATIENCE = 15  # seconds that a scheduler may take to answer


@contextlib.contextmanager
def backend(name: str = "loky", jobs: int | None = None, address: str | None = None) -> Iterator[None]:
    """Make joblib run on an engine while the context lasts.

    Args:
        name: "loky" (processes), "sequential" and "threading" (one cell at a time, here), "dask" or "ray".
        jobs: how many workers; one per core by default. With an address, how many cells at a time.
        address: of a running Dask scheduler or Ray cluster; without one, workers are started here, and stopped again.

    Raises:
        MissingExtraError: the engine is not installed.
        StudyError: there is no such engine, or nothing answers at the address.
    """
    if name not in NAMES:
        raise StudyError(f"there is no backend {name!r}; choose {', '.join(NAMES)}")
    if address is not None and name in LOCAL:
        raise StudyError(f"the backend {name} runs here and takes no address")
    joblib = imported("joblib", who="this needs")
    count = -1 if jobs is None else jobs
    with contextlib.ExitStack() as stack:
        if name == "dask":
            stack.enter_context(_dask(jobs, address))
        elif name == "ray":
            stack.enter_context(_ray(jobs, address))
        stack.enter_context(joblib.parallel_config(backend=name, n_jobs=1 if name == "sequential" else count))
        yield


@contextlib.contextmanager
def _dask(jobs: int | None, address: str | None) -> Iterator[None]:
    distributed = imported("distributed", "dask", "this needs")
    with contextlib.ExitStack() as stack:
        if address is None:
            cluster = distributed.LocalCluster(n_workers=jobs, threads_per_worker=1, dashboard_address=None)
            address = stack.enter_context(cluster)
        try:
            client = distributed.Client(address, timeout=PATIENCE)
        except (OSError, ValueError) as error:
            raise StudyError(f"no Dask scheduler answers at {address}: {in_one_line(error)}") from error
        stack.enter_context(client)
        yield


@contextlib.contextmanager
def _ray(jobs: int | None, address: str | None) -> Iterator[None]:
    ray = imported("ray", "ray", "this needs")
    started = not ray.is_initialized()
    if started and address is not None:
        _require_answer(address)
    if started:
        try:
            ray.init(address=address, num_cpus=None if address else jobs, include_dashboard=False, log_to_driver=False)
        except (ConnectionError, OSError, ValueError, RuntimeError) as error:
            where = f"answers at {address}" if address else "could be started here"
            raise StudyError(f"no Ray cluster {where}: {in_one_line(error, 300)}") from error
    importlib.import_module("ray.util.joblib").register_ray()
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def _require_answer(address: str) -> None:
    """Knock at a Ray cluster's door: `ray.init` goes on knocking for minutes, and then ends the process."""
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if not port.isdecimal():  # "auto", which looks for a cluster here
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise StudyError(f"no Ray cluster answers at {address}: {in_one_line(error)}") from error
