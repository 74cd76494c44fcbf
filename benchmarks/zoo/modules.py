"""Which models of a zoo have modules that change places as wholes, and whether the spec with them is verified."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

import torch

import permgraph as pg
from benchmarks.zoo.one_by_one import inferred, one_by_one


@dataclasses.dataclass(frozen=True)
class Gained:
    """What a model has with its modules.

    Attributes:
        groups: the groups of modules, each with its size.
        log_order: how much the logarithm of the order grew.
        verified: whether the spec with them holds; True where there are none.
        ratio: processor time of inference with modules over that without.
    """

    groups: tuple[tuple[str, int], ...]
    log_order: float
    verified: bool
    ratio: float


def look(zoo: str, name: str) -> Gained:
    """Infer a model's spec without and with modules, from one pass, and verify it where that makes a difference."""
    torch.manual_seed(0)
    model, plain = inferred(zoo, name, vary=False)
    seconds = []
    for modules in (False, True):
        started = time.process_time()
        spec = pg.auto_spec(model, vary=False, modules=modules)
        seconds.append(time.process_time() - started)
    groups = tuple((n, spec.groups[n].size) for n in spec.groups_of_modules)
    grew = spec.log_order() - plain.log_order()
    assert grew >= sum(math.lgamma(size + 1) for _, size in groups) * (1 - 1e-9) - 1e-6, (
        "a group is smaller than before"
    )
    verified = not groups or pg.verify(model, spec, controls="none", further=0).passed
    return Gained(groups, grew, verified, seconds[1] / max(seconds[0], 1e-9))


def sweep(names: Sequence[str] | None = None, *, zoo: str, seconds: float = 90, total: float = 900) -> None:
    """Look at model after model until the time is up; print those that gain."""
    counts = {"none": 0, "gains": 0, "wrong": 0, "failed": 0}
    ratios = []
    for name, found in one_by_one(look, zoo, names, seconds, total):
        kind = "failed"
        if not isinstance(found, str):
            kind = "none" if not found.groups else "gains" if found.verified else "wrong"
            ratios.append(found.ratio)
        counts[kind] += 1
        if kind != "none":
            said = (
                found if isinstance(found, str) else f"+{found.log_order:.2f} {found.groups[:6]} of {len(found.groups)}"
            )
            print(f"{kind:8} {name:50} {said}", flush=True)
    middle = sorted(ratios)[len(ratios) // 2] if ratios else math.nan
    print(counts, f"median time with modules over without: {middle:.2f}", flush=True)
