"""Running a sweep: one process a model, limits on time and memory, one line of JSON for each."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import multiprocessing
import resource
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

import permgraph as pg
from benchmarks.zoo import operators
from benchmarks.zoo.measure import code, measure
from benchmarks.zoo.names import ZOOS

RESULTS = Path(__file__).parent / "results"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last record of each model; a line that was cut off is as if it were not there."""
    found: dict[str, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[record["name"]] = record
    return found


def _append(path: Path, text: str) -> None:
    """Add a line; one that was cut off before it stays a line of its own."""
    cut_off = path.exists() and path.read_bytes()[-1:] not in (b"\n", b"")
    with path.open("a") as file:
        file.write("\n" * cut_off + text + "\n")


def sweep(
    zoo: str,
    names: Sequence[str] | None = None,
    *,
    again: Sequence[str] = (),
    controls: str = "one",
    seconds: float = 600,
    gib: float = 8,
    control_seconds: float | None = None,
    general: bool = True,
    results: Path = RESULTS,
) -> dict[str, dict[str, Any]]:
    """Measure the models that have no record yet, or one whose status is in `again` (*stale*: made by other code)."""
    ZOOS[zoo].require()
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{zoo}.jsonl"
    known = read(path)
    warm_up()
    importlib.import_module(ZOOS[zoo].library)
    stale = {name for name, record in known.items() if record.get("code") != code()} if "stale" in again else set()
    todo = [n for n in (names or ZOOS[zoo].names()) if n not in known or known[n]["status"] in again or n in stale]
    for at, name in enumerate(todo):
        record = in_process(zoo, name, controls, seconds, gib, control_seconds, general)
        _append(path, json.dumps(record))
        known[name] = record
        print(f"{at + 1}/{len(todo)} {line(record)}", flush=True)
    return known


def warm_up() -> None:
    """Import in this process, once, what every forked one would import for itself."""
    torch.set_num_threads(1)
    operators.provide()
    for library in ("torchvision", "timm", "transformers.modeling_utils", "transformers.models.auto.modeling_auto"):
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    pg.verify(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)))


def line(record: dict[str, Any]) -> str:
    """One record in one line."""
    text = f"{record['status']:12} {record['name']:40} {record['seconds']:7.1f}s"
    if "groups" in record:
        text += f" {record['groups']:5} groups, log order {record['log_order']:.1f}, {record['nodes']} nodes"
    if "max_error" in record:
        text += f", error {record['max_error']:.1e}" if isinstance(record["max_error"], float) else ", error not finite"
    if record.get("unknown"):
        text += f", no rule for {', '.join(record['unknown'])}"
    if "general" in record:
        general = record["general"]
        text += f"; general: {general['status']}, {general.get('structures', {})}"
        text += f" {general['error'][:300]!r}" if "error" in general else ""
    return text + (f"  {record['error'][:300]!r}" if "error" in record else "")


def in_process(
    zoo: str,
    name: str,
    controls: str = "one",
    seconds: float = 600,
    gib: float = 8,
    control_seconds: float | None = None,
    general: bool = True,
) -> dict[str, Any]:
    """`measure` in a forked process, so that the libraries are imported once and a crash or a hang harms nobody."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    limits = {"capture_seconds": seconds / 3, "control_seconds": control_seconds, "general": general}
    worker = context.Process(target=_work, args=(sender, zoo, name, controls, gib, limits), daemon=True)
    started = time.monotonic()
    worker.start()
    sender.close()
    record: dict[str, Any] = {"zoo": zoo, "name": name, "status": "not captured", "code": code()}
    try:
        while "seconds" not in record:  # else it is whole
            if not receiver.poll(max(0.0, started + seconds - time.monotonic())):
                record["error"] = f"stopped after {seconds:.0f} s"
                break
            record = receiver.recv()
    except EOFError:
        worker.join()
        record["error"] = f"the process ended with code {worker.exitcode}"
    record.setdefault("seconds", round(time.monotonic() - started, 1))
    if worker.is_alive():
        worker.kill()
    worker.join()
    return record


def _work(
    sender: Connection, zoo: str, name: str, controls: str, gib: float, limits: Mapping[str, float | None]
) -> None:
    limit = int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        sender.send(measure(zoo, name, controls, tell=sender.send, **limits))
    except MemoryError:
        record = {"zoo": zoo, "name": name, "status": "not captured", "code": code()}
        sender.send({**record, "error": traceback.format_exc(limit=1), "seconds": 0})
