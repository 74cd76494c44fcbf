"""The tables of docs/matching-benchmarks.md from the records of `matching.py`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks._networks import NETWORKS
from benchmarks._peers import OURS, PEERS

Record = dict[str, Any]
PAGE = Path(__file__).resolve().parents[1] / "docs" / "matching-benchmarks.md"
PRESERVED = 1e-9
"""The largest change of an output in float64, relative to the largest output, that counts as rounding."""

RESOLVED = 1e-3
"""Seconds below which the clock tells no ratio."""


def line(record: Record) -> str:
    """One record in one line."""
    head = f"{record['network']:16} pair {record['pair']} {record['method']:32}"
    if "error" in record:
        return f"{head} {record['error']}"
    if record["kind"] == "memory":
        return f"{head} {record['megabytes']:8.0f} MB above two models of {record['model']:.0f} MB"
    return (
        f"{head} {record['cpu']:9.2f} s of processor time, {record['wall']:9.2f} s, {record['sweeps']:3} sweeps, "
        f"objective {record['objective']:.4f}, function changed by {record['changed']:.1e}"
    )


def report(records: list[Record]) -> None:
    """Write the tables between their marks in the page."""
    page = PAGE.read_text()
    for name, table in {
        "one-thread": peers(records, 1, "cpu"),
        "two-threads": peers(records, 2, "wall"),
        "memory": memory(records),
        "objectives": objectives(records),
    }.items():
        if not table:
            continue  # what has no records here keeps the figures of another machine
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = page.split(begin)
        after = rest.split(end)[1]
        page = f"{before}{begin}\n{table}\n{end}{after}"
    PAGE.write_text(page)


def rows(head: str, lines: Iterable[str]) -> str:
    found = list(lines)
    if not found:
        return ""
    return "\n".join([head, "|" + " --- |" * (head.count("|") - 1), *found])


def label(method: str) -> str:
    code, comma, rest = method.partition(", plain")
    return method if method.startswith(PEERS) else f"`{code}`{comma}{rest}"


def chosen(records: list[Record], network: str, threads: int) -> dict[str, dict[int, Record]]:
    """By method and pair."""
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        if record["kind"] == "run" and record["network"] == network and record["threads"] == threads:
            found.setdefault(record["method"], {})[record["pair"]] = record
    return found


TIMED = (
    *PEERS,
    'WeightMatching(init="identity")',
    "WeightMatching(), plain groups",
    "WeightMatching(restarts=1)",
    "WeightMatching()",
)


def peers(records: list[Record], threads: int, clock: str) -> str:
    """Time, sweeps and objective of each method, as medians over pairs."""
    lines = []
    for name, network in NETWORKS.items():
        runs = chosen(records, name, threads)
        title = network.label
        for method in TIMED:
            if method not in runs:
                continue
            good = {pair: record for pair, record in runs[method].items() if "error" not in record}
            if not good:
                error = next(iter(runs[method].values()))["error"]
                lines.append(f"| {title} | {label(method)} | | | | | | {error} |")
            else:
                # Only what was run on the same pair is compared.
                slower = [
                    (runs["plain"][pair][clock] / record[clock])
                    for pair, record in good.items()
                    if min(record[clock], runs.get("plain", {}).get(pair, {}).get(clock, 0)) > RESOLVED
                ]
                median = {field: statistics.median(r[field] for r in good.values()) for field in (clock, "sweeps")}
                objective = statistics.mean(r["objective"] for r in good.values())
                change = max(r["changed"] for r in good.values())
                kept = "yes" if change < PRESERVED else f"no, {change:.1g}"
                ratio = f"{statistics.median(slower):.2g}" if slower else ""
                sweeps = f"{median['sweeps']:g}" if median["sweeps"] else ""
                lines.append(
                    f"| {title} | {label(method)} | {median[clock]:.2f} | {ratio} | {sweeps} | {objective:,.2f} | "
                    f"{len(good)} | {kept} |"
                )
            title = ""
    head = "| pair | method | seconds | plain takes | sweeps | objective | pairs | function kept |"
    return rows(head, lines)


def memory(records: list[Record]) -> str:
    """Peak memory above the two models."""
    lines = []
    for name, network in NETWORKS.items():
        found = [r for r in records if r["kind"] == "memory" and r["network"] == name]
        for record in sorted(found, key=lambda r: r["method"]):
            if "error" in record:
                lines.append(f"| {network.label} | {label(record['method'])} | | | {record['error']} |")
            else:
                lines.append(
                    f"| {network.label} | {label(record['method'])} | {record['model']:,.0f} | {record['gram']:,.0f} | "
                    f"{record['megabytes']:,.0f} |"
                )
    return rows("| pair | method | one model, MB | largest Gram, MB | above the two models, MB |", lines)


def objectives(records: list[Record]) -> str:
    """Of every method the objective relative to the best peer on the same pair, in percent."""
    lines = []
    for name, network in NETWORKS.items():
        runs = chosen(records, name, 1)
        best: dict[int, float] = {}
        for method in PEERS:
            for pair, record in runs.get(method, {}).items():
                if "error" not in record:
                    best[pair] = max(best.get(pair, record["objective"]), record["objective"])
        title = network.label
        if len(best) < 2:
            continue
        for method in OURS:
            gains = [
                100 * (record["objective"] / best[pair] - 1)
                for pair, record in runs.get(method, {}).items()
                if pair in best and "error" not in record
            ]
            if gains:
                # What float32 rounds is no difference.
                wins = sum(gain > -1e-4 for gain in gains)
                lines.append(
                    f"| {title} | {label(method)} | {statistics.mean(gains):+.2f} | {min(gains):+.2f} | "
                    f"{max(gains):+.2f} | {wins} of {len(gains)} |"
                )
                title = ""
    return rows("| pairs | method | mean | worst | best | at least the best peer |", lines)
