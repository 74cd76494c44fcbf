"""docs/coverage.md, from the records of the sweeps."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.zoo.names import ZOOS
from benchmarks.zoo.sweep import RESULTS, read

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
INTRODUCTION = """# Coverage

How far permgraph comes with whole libraries of models, given nothing but the model: no inputs, no hints. This page is
written by `python -m benchmarks.zoo report` from what `make zoo` measured; each model ran in a process of its own.

- *models*: measured so far; `make zoo` goes on where it stopped, and takes many hours. torchvision has 121 models,
  transformers 600 architectures; of timm, small models of 47 architecture modules were picked by hand at first.
- *captured*: example inputs were found and one forward pass was recorded, on fake tensors where that is enough, on
  real ones where the model asks for values.
- *inferred*: a spec came out. Models with no groups are listed below, and so are operators without a rule.
- *verified*: on random weights in float64 a random element of the whole group left the outputs as they were (relative
  error at most 1e-8), or there is nothing to move. *With controls*: for every group, moving it on all of its axes but
  one changed the outputs; sweeps with `--controls none` leave that out.
- *inert*: the outputs stayed, but for some group no control changed anything, so that the test could not have told.
- *wrong*: the outputs changed.

transformers models are built from their default configuration, shrunk by what the names of its numbers mean; timm's and
torchvision's at their real size. Models that cannot be built here are listed with the error, and count as not covered.
"""
DONE = ("inferred", "verified", "wrong", "inert", "not verified")


def write(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Write the page."""
    measured = {zoo: sorted(read(results / f"{zoo}.jsonl").values(), key=lambda r: r["name"]) for zoo in ZOOS}
    measured = {zoo: records for zoo, records in measured.items() if records}
    parts = [INTRODUCTION, _totals(measured)]
    parts += [_zoo(ZOOS[zoo].title, records) for zoo, records in measured.items()]
    parts += _sizes(list(read(results / "sizes.jsonl").values()))
    page.write_text("\n".join(parts))


def _sizes(records: list[dict[str, Any]]) -> list[str]:
    if not records:
        return []
    columns = ("parameters", "nodes", "groups", "capture_seconds", "infer_seconds", "seconds", "peak_mib")
    rows = [(r["name"], *(r.get(column, "") for column in columns)) for r in records]
    head = ("model", "parameters", "operators", "groups", "capture", "infer", "seconds", "MiB")
    text = "\n## Large and deep, from configurations alone on the meta device\n"
    return [text, _table(head, rows)]


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in lines) + "\n"


def _totals(measured: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for zoo, records in measured.items():
        status = Counter(record["status"] for record in records)
        built = len(records) - status["not built"]
        captured = built - status["not captured"]
        inferred = sum(status[s] for s in DONE)
        verified = status["verified"] + sum(1 for r in records if r["status"] == "inferred" and r.get("groups") == 0)
        rows.append(
            (
                ZOOS[zoo].title, len(records), built, captured, inferred,
                "" if ZOOS[zoo].meta else verified,
                "" if ZOOS[zoo].meta else sum(r["status"] == "verified" and r["controls"] > 0 for r in records),
                status["inert"], status["wrong"], status["not verified"],
                len({op for record in records for op in record.get("unknown", ())}),
            )
        )  # fmt: skip
    head = (
        "zoo", "models", "built", "captured", "inferred", "verified", "with controls", "inert", "wrong",
        "not verified", "operators without a rule",
    )  # fmt: skip
    return "## Totals\n\n" + _table(head, rows)


def _zoo(title: str, records: list[dict[str, Any]]) -> str:
    parts = [f"\n## {title}\n"]
    unknown: dict[str, list[str]] = defaultdict(list)
    causes: Counter[str] = Counter()
    for record in records:
        for operator in record.get("unknown", ()):
            unknown[operator].append(record["name"])
        for reason, count in record.get("pins", {}).items():
            causes[_cause(reason)] += count
    if unknown:
        parts.append("Operators without a rule:\n")
        rows = [(f"`{op}`", len(names), _some(names)) for op, names in sorted(unknown.items())]
        parts.append(_table(("operator", "models", "in"), rows))
    if causes:
        parts.append("What keeps axes of parameters in place:\n")
        parts.append(_table(("cause", "axes"), causes.most_common(20)))
    fallen = [r for r in records if r["status"] not in ("verified", "inferred")]
    if fallen:
        parts.append("Not verified:\n")
        rows = [(r["name"], r["status"], _clean(r.get("error", ""))) for r in fallen]
        parts.append(_table(("model", "status", "error"), rows))
    empty = [r for r in records if r["status"] in DONE and r.get("groups") == 0]
    if empty:
        parts.append("Without groups:\n")
        rows = [(r["name"], ", ".join(_cause(reason) for reason in list(r["pins"])[:3])) for r in empty]
        parts.append(_table(("model", "what keeps its axes in place"), rows))
    real = [r for r in records if r.get("mode") == "real"]
    if real:
        parts.append("On real tensors, because the model asks for values:\n")
        parts.append(_table(("model", "asked"), [(r["name"], _clean(r["fallback"])) for r in real]))
    parts.append("<details><summary>All models</summary>\n")
    parts.append(_table(
        ("model", "status", "operators", "groups", "log order", "error", "controls", "inputs from", "seconds", "MiB"),
        [_row(record) for record in records],
    ))  # fmt: skip
    parts.append("</details>\n")
    return "\n".join(parts)


def _row(record: dict[str, Any]) -> tuple[Any, ...]:
    error = record.get("max_error", "")
    return (
        record["name"], record["status"], record.get("nodes", ""), record.get("groups", ""),
        f"{record['log_order']:.1f}" if "log_order" in record else "",
        f"{error:.0e}" if isinstance(error, float) else error,
        record.get("controls", ""), record.get("finder", ""), f"{record['seconds']:.1f}", record.get("peak_mib", ""),
    )  # fmt: skip


def _cause(reason: str) -> str:
    """A reason without its numbers, so that the same cause is counted once."""
    return re.sub(r"\d+", "n", reason)


def _clean(error: str) -> str:
    """The first lines of an error, without places of this machine."""
    error = re.sub(r"(/[\w.-]+)+/", "…/", error)
    return " ".join(error.split())[:240]


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (" …" if len(names) > 6 else "")
