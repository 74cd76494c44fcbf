"""Whether what models return beside their result pins anything: the same groups with the whole result as without."""

from __future__ import annotations

import dataclasses
import multiprocessing
import re
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

import permgraph as pg
from benchmarks.zoo.names import ZOOS
from benchmarks.zoo.sweep import warm_up
from permgraph.errors import PermgraphError

#: The fields that are what a head is for. A loss is computed from these, and everything else is on the way to them.
FINAL = re.compile(
    r"^(\w+_)?logits(_\w+)?$|^pred_boxes$|^pred_masks$|^predicted_depth$|^spectrogram$|^waveform$|^enc_outputs_class$"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Compared:
    """The logarithm of the order of a model's group, by what counts.

    Attributes:
        name: of the model.
        whole: as by default.
        final: with the fields alone that a head is for, which `fields` names.
        others: what counts by default besides.
    """

    name: str
    whole: float
    final: float
    fields: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether what else is returned pins nothing."""
        return abs(self.whole - self.final) <= 1e-6 * max(1.0, self.final)


def compare(zoo: str, name: str) -> Compared:
    """Infer both specs of a model, from the one pass that is found for it."""
    torch.manual_seed(0)
    model, whole = _inferred(zoo, name)
    returned = [*whole.outputs, *whole.by_products]
    fields = tuple(dict.fromkeys(field for field in returned if FINAL.match(field)))
    fields = fields or tuple(returned[:1])  # a backbone beside the heads
    final = pg.auto_spec(model, outputs=fields, vary=False)
    others = [field for field in dict.fromkeys(returned) if field not in (*fields, *whole.by_products)]
    return Compared(name, whole.log_order(), final.log_order(), fields, tuple(others))


def _inferred(zoo: str, name: str) -> tuple[nn.Module, pg.PermutationSpec]:
    """The model of a zoo, in the first way in which it can be captured, and its spec."""
    last: Exception = ValueError(f"there is no model {name}")
    for model in ZOOS[zoo].build(name):
        try:
            return model, pg.auto_spec(model.eval(), vary=False)
        except PermgraphError as error:
            last = error
    raise last


def sweep(names: Sequence[str] | None = None, *, zoo: str = "heads", seconds: float = 60, total: float = 900) -> None:
    """Compare model after model, a process each, until the time is up; print those that differ at once."""
    warm_up()
    started, counts = time.monotonic(), {"same": 0, "differs": 0, "failed": 0}
    for name in names or ZOOS[zoo].names():
        if time.monotonic() - started > total:
            break
        found = _in_process(zoo, name, seconds)
        kind = found if isinstance(found, str) else "same" if found.same else "differs"
        counts[kind if kind in counts else "failed"] += 1
        said = found if isinstance(found, str) else f"{found.whole:.2f} {found.final:.2f} {found.fields} {found.others}"
        print(f"{kind if kind in counts else 'failed':8} {name:60} {said}", flush=True)
    print(counts, flush=True)


def _in_process(zoo: str, name: str, seconds: float) -> Compared | str:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(sender, zoo, name), daemon=True)
    worker.start()
    sender.close()
    try:
        found: Mapping[str, Any] | str = receiver.recv() if receiver.poll(seconds) else f"stopped after {seconds:.0f} s"
    except EOFError:
        found = "the process ended"
    if worker.is_alive():
        worker.kill()
    worker.join()
    return found if isinstance(found, str) else Compared(**found)


def _work(sender: Connection, zoo: str, name: str) -> None:
    try:
        sender.send(dataclasses.asdict(compare(zoo, name)))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {str(error)[:200]}")
