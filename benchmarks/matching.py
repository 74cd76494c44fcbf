"""Weight matching against a plain reading of the Git Re-Basin paper and the package rebasin.

    python benchmarks/matching.py                                    # a few small pairs
    python benchmarks/matching.py run --networks vgg16_bn --pairs 1 --methods plain "WeightMatching()"
    python benchmarks/matching.py memory --networks vgg16_bn
    python benchmarks/matching.py run --threads 2 --networks mlp512 mlp4096 resnet18 resnet50  # on a quiet machine
    python benchmarks/matching.py report                             # the tables in docs/matching-benchmarks.md

Every run is one line in a file of records, and what is in there is not measured again. The methods take turns on one
pair of networks after another, all in one process for a pair; a method that uses more than `--limit` seconds of
processor time or `--gigabytes` of memory is stopped, which is recorded. A record has processor time and the clock's;
objective; sweeps; and by how much the function of the network changes when weights are permuted as the method says.
Peak memory is measured in a process of its own for each method, above the two models.

The package rebasin is left out where it is not installed (pip install --no-deps rebasin torchview graphviz).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import permgraph
from benchmarks import _matching_tables
from benchmarks._networks import NETWORKS, function_error
from benchmarks._peers import OURS, PEERS, plain_groups, prepare

RECORDS = Path(__file__).parent / "records" / "matching.jsonl"
SMALL = ("mlp512", "resnet20x1", "resnet20x4")
Record = dict[str, Any]


def read(records: Path) -> list[Record]:
    if not records.exists():
        return []
    return [json.loads(line) for line in records.read_text().splitlines() if line.strip()]


def write(records: Path, record: Record) -> None:
    records.parent.mkdir(parents=True, exist_ok=True)
    with records.open("a") as file:
        file.write(json.dumps(record) + "\n")


def key(record: Record) -> tuple[Any, ...]:
    return tuple(record[field] for field in ("kind", "network", "pair", "method", "threads"))


def resident(field: str) -> float:
    """A line of this process's status in MB (Linux only)."""
    found = re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def bound(seconds: float, gigabytes: float) -> None:
    """Let the kernel end this process when it has used so much more processor time; refuse it more memory."""
    spent = resource.getrusage(resource.RUSAGE_SELF)
    most = math.ceil(spent.ru_utime + spent.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    most = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def work(wanted: list[Record], records: Path, seconds: float, gigabytes: float) -> None:
    """Make the runs that are wanted, all on one pair, and write what came out."""
    first = wanted[0]
    network = NETWORKS[first["network"]]
    torch.set_num_threads(first["threads"])
    started = time.process_time()
    spec = permgraph.auto_spec(network.build(), example_inputs=(network.example(),))
    inferred = time.process_time() - started
    a, b = network.state(2 * first["pair"]), network.state(2 * first["pair"] + 1)
    # What is made once in a process, such as a pool of threads, is nobody's cost.
    warm, small = NETWORKS["resnet20x1"], permgraph.auto_spec(NETWORKS["resnet20x1"].build())
    for method in ("plain", "WeightMatching()"):
        prepare(method, warm, warm.state(0), warm.state(1), small, 0)()
    sizes = [spec.groups[name].size for name in plain_groups(spec)]
    for record in wanted:
        bound(seconds, gigabytes)
        record["inferred"] = inferred
        try:
            run = prepare(record["method"], network, a, b, spec, record["pair"])
            if record["kind"] == "memory":
                # The peak so far was the imports'.
                Path("/proc/self/clear_refs").write_text("5")
                before = resident("VmRSS")
            wall, cpu = time.perf_counter(), time.process_time()
            found = run()
            record["wall"], record["cpu"] = time.perf_counter() - wall, time.process_time() - cpu
            if record["kind"] == "memory":
                record["megabytes"] = resident("VmHWM") - before
                record["model"] = sum(tensor.nbytes for tensor in a.values()) / 2**20
                record["gram"] = 4 * max(sizes) ** 2 / 2**20
            else:
                record["objective"], record["sweeps"] = found.objective, found.sweeps
                record["changed"] = function_error(network, found.permute, statistics=found.statistics)
        except Exception as error:  # whatever a peer raises is what it does on this pair
            record["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        write(records, record)
        print(_matching_tables.line(record), flush=True)


def run(wanted: list[Record], records: Path, seconds: float, gigabytes: float) -> None:
    """Have the runs made that have no record yet, in a process for each pair."""
    by_pair: dict[tuple[Any, ...], list[Record]] = {}
    for record in wanted:
        by_pair.setdefault(key(record)[:3] if record["kind"] == "run" else key(record), []).append(record)
    for group in by_pair.values():
        while True:
            done = {key(record) for record in read(records)}
            missing = [record for record in group if key(record) not in done]
            if not missing:
                break
            order = {"work": missing, "records": str(records), "seconds": seconds, "gigabytes": gigabytes}
            ended = subprocess.run([sys.executable, __file__, "work", "--order", json.dumps(order)]).returncode
            done = {key(record) for record in read(records)}
            if ended and key(missing[0]) not in done and ended not in (-signal.SIGXCPU, -signal.SIGKILL):
                raise SystemExit(f"the process for {key(missing[0])} ended with {ended} and no record")
            if ended in (-signal.SIGXCPU, -signal.SIGKILL):
                record = next(record for record in missing if key(record) not in done)
                stopped = f"{seconds:g} s of processor time were not enough" if ended == -signal.SIGXCPU else "killed"
                write(records, {**record, "error": stopped})
                print(_matching_tables.line({**record, "error": stopped}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "memory", "report", "work"], default="run")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(SMALL), metavar="NETWORK",
                        help=", ".join(NETWORKS))  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=[*PEERS, *OURS], metavar="METHOD",
                        help=", ".join([*PEERS, *OURS]))  # fmt: skip
    parser.add_argument("--pairs", type=int, default=3, help="how many pairs of each network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=900.0, help="seconds of processor time for one run")
    parser.add_argument("--gigabytes", type=float, default=9.0, help="of memory for one process")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--order", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.what == "work":
        order = json.loads(chosen.order)
        work(order["work"], Path(order["records"]), order["seconds"], order["gigabytes"])
        return
    if chosen.what == "report":
        _matching_tables.report(read(chosen.records))
        return
    methods = chosen.methods or ["plain", "rebasin", 'WeightMatching(init="identity")', "WeightMatching()"]
    if importlib.util.find_spec("rebasin") is None:
        methods = [method for method in methods if method != "rebasin"]
    kind, pairs = ("run", chosen.pairs) if chosen.what == "run" else ("memory", 1)
    if kind == "memory":
        # The peak of the first sweep is that of all.
        methods = ["plain, one sweep" if method == "plain" else method for method in methods]
    wanted = [
        {"kind": kind, "network": network, "pair": number, "method": method, "threads": chosen.threads}
        for network in chosen.networks
        for number in range(pairs)
        for method in methods
    ]
    run(wanted, chosen.records, chosen.limit, chosen.gigabytes)


if __name__ == "__main__":
    main()
