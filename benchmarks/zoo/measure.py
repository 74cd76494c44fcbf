"""What is recorded about one model."""

from __future__ import annotations

import ast
import hashlib
import math
import resource
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import permgraph as pg
from benchmarks.zoo.names import ZOOS
from permgraph.capture import Captured, capture
from permgraph.capture.further import FurtherPasses
from permgraph.capture.record import Limits
from permgraph.errors import CaptureError
from permgraph.inference.auto_spec import MAX_NODES, MAX_PASSES, spec_of_passes

Tell = Callable[[dict[str, Any]], object]

#: How far a model came. Only what was inferred can be verified; a model that cannot be built is nobody's failure.
STATUSES = ("not built", "not captured", "not inferred", "not verified", "wrong", "inert", "inferred", "verified")


#: What uses finished specs or lists names, and can change no record.
LATER = (
    "__init__.py", "assignment", "cli", "connectivity", "io", "matching", "merging", "networks", "pictures", "studies",
    "transporting", "weights/ratios.py",
)  # fmt: skip


#: What only specs with general symmetries use.
GENERAL = (
    "structures", "inference/general", "spec/general.py", "spec/transformation.py", "verification/general.py",
    "verification/own_precision.py", "verification/structure_of_rule.py",
)  # fmt: skip


@cache
def code() -> str:
    """A fingerprint of the code that infers and verifies permutations, by which older records are known."""
    return _fingerprint(lambda path: not path.startswith((*LATER, *GENERAL)))


@cache
def general_code() -> str:
    """The same of what infers and verifies more than permutations."""
    return _fingerprint(lambda path: path.startswith(GENERAL))


def _fingerprint(counts: Callable[[str], bool]) -> str:
    package = Path(pg.__file__).parent
    paths = [path.relative_to(package).as_posix() for path in sorted(package.rglob("*.py"))]
    parsed = {path: ast.parse((package / path).read_text()) for path in paths if counts(path)}
    text = "\0".join(f"{path}\0{ast.dump(tree)}" for path, tree in parsed.items())
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def measure(
    zoo: str,
    name: str,
    controls: str = "one",
    seed: int = 0,
    capture_seconds: float = 100,
    control_seconds: float | None = None,
    tell: Tell = lambda record: None,
    general: bool = True,
) -> dict[str, Any]:
    """Build a model, infer its spec and, unless it lies on the meta device, verify it. Never raises.

    Without `general`, permutations alone.

    `tell` is given the record whenever it has come one step further, for the case that it comes no further.
    """
    record: dict[str, Any] = {"zoo": zoo, "name": name, "status": "not built", "code": code()}
    started = time.monotonic()
    try:
        _measure(record, controls, seed, capture_seconds, control_seconds, tell, general)
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"[:1500]
    record["seconds"] = round(time.monotonic() - started, 2)
    record["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return record


def _measure(
    record: dict[str, Any],
    controls: str,
    seed: int,
    capture_seconds: float,
    control_seconds: float | None,
    tell: Tell,
    general: bool,
) -> None:
    zoo = ZOOS[record["zoo"]]
    torch.manual_seed(seed)
    first: CaptureError | None = None
    with torch.device("meta" if zoo.meta else "cpu"):
        for model in zoo.build(record["name"]):
            record["status"] = "not captured"
            tell(record)
            started = time.monotonic()
            try:
                with torch.device("cpu"):
                    captured = capture(model, max_seconds=capture_seconds / (1 if first is None else 5))
                break
            except CaptureError as error:
                first = first or error
        else:
            assert first is not None
            raise first
    model = model.eval()
    record["capture_seconds"] = round(time.monotonic() - started, 2)
    record["parameters"] = sum(p.numel() for p in model.parameters())
    record["finder"] = captured.inputs.finder
    record["inputs"] = captured.inputs.describe()[:300]
    record["mode"] = captured.mode
    record["fallback"] = captured.fallback_reason
    record["nodes"] = len(captured.graph.nodes)

    record["status"] = "not inferred"
    tell(record)
    started = time.monotonic()
    limits = Limits(MAX_NODES, None, started)
    passes = FurtherPasses(model, captured, MAX_PASSES, limits)
    spec = spec_of_passes(passes)
    record["passes"] = [[run.name, run.outcome, run.says] for run in spec.passes[1:]]
    record["infer_seconds"] = round(time.monotonic() - started, 2)
    record["groups"] = len(spec.moving)
    record["log_order"] = round(spec.log_order(), 3)
    record["unknown"] = {op.operator: op.count for op in spec.unknown_ops}
    pins: Counter[str] = Counter(pin.reason for pin in spec.pins)
    record["pins"] = dict(pins.most_common(12))
    record["free_share"] = _free_share(spec)

    record["status"] = "inferred"
    if zoo.meta:
        return
    if not spec.moving:
        if general:
            _measure_general(record, model, passes, captured, tell)
        return
    record["status"] = "not verified"
    tell(record)
    started = time.monotonic()
    how = {"controls": controls, "max_seconds": control_seconds}
    found = pg.verify(model, spec, captured.inputs.args, captured.inputs.kwargs, **how)
    record["verify_seconds"] = round(time.monotonic() - started, 2)
    record["max_error"] = found.max_error if math.isfinite(found.max_error) else str(found.max_error)
    record["controls"] = len(found.controls)
    record["untried"] = len(found.untried)
    record["tolerance"] = found.tolerance
    record["failed"] = list(found.failed)[:20]
    record["status"] = "wrong" if not found.passed else "inert" if found.without_influence else "verified"
    record["runs"] = [[run.name, run.error if run.error is None else float(run.error)] for run in found.runs]
    if record["status"] != "verified":
        record["error"] = str(found)[:1500]
    if general:
        _measure_general(record, model, passes, captured, tell)


def _measure_general(
    record: dict[str, Any], model: nn.Module, passes: FurtherPasses, captured: Captured, tell: Tell
) -> None:
    """Infer the structures from the same passes, and verify random elements of them."""
    general: dict[str, Any] = {"status": "not inferred", "code": general_code()}
    record["general"] = general
    tell(record)
    started = time.monotonic()
    try:
        spec = spec_of_passes(passes, symmetry="general")
        general["infer_seconds"] = round(time.monotonic() - started, 2)
        general["structures"] = dict(Counter(str(group.structure) for group in spec.acting.values()))
        general["dimension"] = spec.dimension()
        general["null_directions"] = len(spec.null_directions)
        general["status"] = "not verified"
        if not spec.acting and not spec.null_directions:
            general["status"] = "inferred"
            return
        tell(record)
        found = pg.verify(model, spec, captured.inputs.args, captured.inputs.kwargs, controls="none")
        general["max_error"] = found.max_error if math.isfinite(found.max_error) else str(found.max_error)
        general["status"] = "verified" if found.passed else "wrong"
        if not found.passed:
            general["error"] = str(found)[:1500]
    except Exception as error:
        general["error"] = f"{type(error).__name__}: {error}"[:1500]
    finally:
        general["seconds"] = round(time.monotonic() - started, 2)


def _free_share(spec: Any) -> float:
    """Of all dimensions of parameters with more than one index, the share on which a group acts."""
    total = sum(1 for shape in spec.shapes.values() for size in shape if size > 1)
    moved = {use for group in spec.moving for use in spec.uses(group)}
    return round(len(moved) / max(total, 1), 4)
