"""docs/coverage.md, from the records of the sweeps."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.zoo import compare
from benchmarks.zoo.measure import code, general_code
from benchmarks.zoo.names import ZOOS
from benchmarks.zoo.sweep import RESULTS, read

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
INTRODUCTION = """# Coverage

How far permgraph comes with whole libraries of models, given nothing but the model: no inputs, no hints. This page is
written by `python -m benchmarks.zoo report` from what `make zoo` measured; each model ran in a process of its own.

- *models*: measured so far; `make zoo` goes on where it stopped, and takes many hours. torchvision has 121 models (80
  of them classifiers), timm 98 architecture modules and 1,371 entrypoints, transformers 600 architectures. Of timm's
  modules, those measured first were given a small model picked by hand, not the very smallest.
- *captured*: example inputs were found and one forward pass was recorded, on fake tensors where that is enough, on
  real ones where the model asks for values.
- *inferred*: a spec came out. Models with no groups are listed below, and so are operators without a rule.
- *verified*: on random weights in float64 a random element of the whole group left the outputs as they were (relative
  error at most 1e-9), or there is nothing to move. *With controls*: for every group, moving it on all of its axes but
  one changed the outputs. Sweeps with `--controls none` leave that out, and those with `--control-seconds` begin no
  control after that time: the models' tables say on how many groups controls were tried.
- Detectors on random weights return empty tensors; then what the modules inside return is compared as well, up to its
  order.
- *inert*: the outputs stayed, but for some group no control changed anything, so that the test could not have told.
- *wrong*: the outputs changed.
- *general*: the same once more with `symmetry="general"`: random elements of all structures at once, signs, scales,
  rotations and invertible matrices with the permutations, leave the outputs as they were (relative error at most 1e-9,
  in float64). The models' tables list the structures, each with the number of groups that have it, and how many real
  numbers an element has (*dimension*). How groups are written is said in [general symmetries](general.md).

Units that no output depends on are pinned: they count under *no output depends on it*. Models that have no row here,
all entrypoints of timm without data, controls, and other tools beside this one were measured [with one pass
each](coverage-one-pass.md).

transformers models are built from their default configuration, shrunk by what the names of its numbers mean; timm's and
torchvision's at their real size. The libraries after these come with `pip install permgraph[zoos]`: diffusers' models
are shrunk like that from the defaults of their constructors, the others are given small sizes in a table
(`benchmarks/zoo/libraries.py`). Each is there a second time, *larger*: wider, mostly deeper. Those without a row under
*general* were measured for permutations alone. Models that cannot be built here are listed with the error, and count as
not covered.
"""
COMPARISON = """
## Beside other tools

What three tools find in the same models, in one run of `python -m benchmarks.zoo compare`, and whether it holds: on
random weights in float64 the channels of a group are renumbered, and the outputs must stay (relative error at most
1e-9). Channels are those of groups that hold. Seconds are processor time for building the graph.

The tools are made for different things. torch-pruning finds channels that must be *removed* together, which need not be
interchangeable: a group that does not hold here may be quite right for pruning, and its heads, the classes, are left
out. rebasin aligns two networks. It has all groups judged at once, in one alignment of two random networks, with
BatchNorm's running statistics at zero and one, since it leaves them to be computed again. permgraph's groups include
channels that may be ordered differently in each head or group; all of them move at once.
"""
DONE = ("inferred", "verified", "wrong", "inert", "not verified")


def write(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Write the page."""
    measured = {zoo: sorted(read(results / f"{zoo}.jsonl").values(), key=lambda r: r["name"]) for zoo in ZOOS}
    measured = {zoo: records for zoo, records in measured.items() if records}
    parts = [INTRODUCTION, _totals(measured)]
    parts += [_zoo(ZOOS[zoo].title, records) for zoo, records in measured.items()]
    parts += _compared(compare.records(results / "compare.jsonl"))
    parts += _sizes(list(read(results / "sizes.jsonl").values()))
    page.write_text("\n".join(parts))


def _sizes(records: list[dict[str, Any]]) -> list[str]:
    if not records:
        return []
    columns = ("parameters", "nodes", "groups", "capture_seconds", "infer_seconds", "seconds", "peak_mib")
    rows = [
        (r["name"], *(r.get(c, "") for c in columns), f"{1000 * r['seconds'] / r['nodes']:.2f}" if "nodes" in r else "")
        for r in records
    ]
    head = ("model", "parameters", "operators", "groups", "capture", "infer", "seconds", "MiB", "ms an operator")
    text = "\n## Large and deep, from configurations alone on the meta device\n"
    return [text, _table(head, rows)]


def _compared(records: list[dict[str, Any]]) -> list[str]:
    """The other tools beside this one, a row a model."""
    if not records:
        return []
    by_model: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        by_model[record["name"]][record["tool"]] = record
    versions = {record["tool"]: record["version"] for record in records}
    rows = [(name, *(_found(by_tool.get(tool)) for tool in compare.TOOLS)) for name, by_tool in by_model.items()]
    head = ("model", *(f"{tool} {versions.get(tool, '')}".strip() for tool in compare.TOOLS))
    wholly = {tool: sum(_holds(by_tool.get(tool)) for by_tool in by_model.values()) for tool in compare.TOOLS}
    total = ("*every group holds*", *(f"{wholly[tool]} of {len(by_model)} models" for tool in compare.TOOLS))
    return [COMPARISON, _table(head, [*rows, total])]


def _holds(record: dict[str, Any] | None) -> bool:
    return record is not None and record.get("groups", 0) > 0 and record["hold"] == record["groups"]


def _found(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    if "error" in record:
        return _clean(record["error"])[:90]
    return f"{record['channels']:,} channels; {record['hold']} of {record['groups']} groups; {record['seconds']:.2f} s"


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
                "" if ZOOS[zoo].meta else sum(map(_with_controls, records)),
                status["inert"], status["wrong"], status["not verified"],
                len({op for record in records for op in record.get("unknown", ())}),
            )
        )  # fmt: skip
    head = (
        "zoo", "models", "built", "captured", "inferred", "verified", "with controls", "inert", "wrong",
        "not verified", "operators without a rule",
    )  # fmt: skip
    every = [record for records in measured.values() for record in records]
    now = sum(record.get("code") == code() for record in every)
    note = (
        f"Of these {len(every):,} records {now:,} were measured with what infers and verifies as it is now;\n"
        f"`sweep --again stale` measures the others anew.\n"
    )
    return "\n".join(["## Totals\n", _table(head, rows), note, _checked_on(measured), _general(measured)])


#: What runs of `verify` show, by words in their names; all others are on other arguments.
ASPECTS = {
    "the inputs": ("the inputs",),
    "other sizes": ("larger", "longer rows"),
    "training mode": ("training",),
    "later calls": ("calls",),
    "many rows, where units are ranked": ("ranked",),
}


def _checked_on(measured: dict[str, list[dict[str, Any]]]) -> str:
    """A table of how many models `verify` ran on what, where they take it."""
    rows = []
    for zoo, records in measured.items():
        ran = [_aspects(record) for record in records if record.get("runs")]
        if ran:
            counts = Counter(aspect for aspects in ran for aspect in aspects)
            rows.append((ZOOS[zoo].title, *(counts[aspect] for aspect in (*ASPECTS, "other arguments"))))
    if not rows:
        return ""
    said = "On what `verify` looked, where the model takes it: the number of models.\n"
    return said + "\n" + _table(("zoo", *ASPECTS, "other arguments"), rows)


def _aspects(record: dict[str, Any]) -> set[str]:
    """What the runs of one record show, without those that the model refused."""
    found = set()
    for name, error in record["runs"]:
        shows = {aspect for aspect, words in ASPECTS.items() if any(word in name for word in words)}
        found |= (shows or {"other arguments"}) if error is not None else set()
    return found


def _general(measured: dict[str, list[dict[str, Any]]]) -> str:
    """A table of what became of specs with general symmetries."""
    rows = []
    for zoo, records in measured.items():
        found = [record["general"] for record in records if "general" in record]
        if found:
            status = Counter(one["status"] for one in found)
            counts = [status[one] for one in ("verified", "inferred", "wrong", "not verified", "not inferred")]
            now = sum(one["code"] == general_code() for one in found)
            rows.append((ZOOS[zoo].title, len(found), *counts, now))
    if not rows:
        return ""
    head = (
        "zoo", "models", "verified", "nothing to verify", "wrong", "not verified", "not inferred",
        "of this code",
    )  # fmt: skip
    return 'With `symmetry="general"`:\n\n' + _table(head, rows)


def _with_controls(record: dict[str, Any]) -> bool:
    return record["status"] == "verified" and record["controls"] > 0 and not record.get("untried")


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
    unproven = [r for r in records if r.get("general", {}).get("status") in ("wrong", "not verified", "not inferred")]
    if unproven:
        parts.append("Not verified with general symmetries:\n")
        rows = [(r["name"], r["general"]["status"], _clean(_why(r))) for r in unproven]
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
        (
            "model", "status", "operators", "groups", "log order", "error", "controls", "inputs from", "seconds", "MiB",
            "general", "error", "structures", "dimension",
        ),
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
        _controls(record), record.get("finder", ""), f"{record['seconds']:.1f}", record.get("peak_mib", ""),
        *_structures(record.get("general", {})),
    )  # fmt: skip


def _structures(general: dict[str, Any]) -> tuple[Any, ...]:
    error = general.get("max_error", "")
    found = sorted(general.get("structures", {}).items(), key=lambda item: (len(item[0]), item[0]))
    listed = ", ".join(f"{count} {name}" for name, count in found)
    dimension = general.get("dimension", "")
    return general.get("status", ""), f"{error:.0e}" if isinstance(error, float) else error, listed, dimension


def _controls(record: dict[str, Any]) -> str:
    if not record.get("untried"):
        return str(record.get("controls", ""))
    return f"{record['controls']}, on {record['groups'] - record['untried']} of {record['groups']} groups"


def _why(record: dict[str, Any]) -> str:
    """What went wrong with a record's general symmetries; where nothing did, what ended the record."""
    return str(record["general"].get("error") or record.get("error", ""))


def _cause(reason: str) -> str:
    """A reason without its numbers, so that the same cause is counted once."""
    return re.sub(r"\d+", "n", reason)


def _clean(error: str) -> str:
    """The first lines of an error, without places of this machine."""
    error = re.sub(r"(/[\w.-]+)+/", "…/", error)
    return " ".join(error.split())[:240]


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (" …" if len(names) > 6 else "")
