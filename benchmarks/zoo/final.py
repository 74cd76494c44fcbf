"""Whether what models return beside their result pins anything: the same groups with the whole result as without."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import torch

import permgraph as pg
from benchmarks.zoo.one_by_one import inferred, one_by_one

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
    model, whole = inferred(zoo, name, vary=False)
    returned = [*whole.outputs, *whole.by_products]
    fields = tuple(dict.fromkeys(field for field in returned if FINAL.match(field)))
    fields = fields or tuple(returned[:1])  # a backbone beside the heads
    final = pg.auto_spec(model, outputs=fields, vary=False)
    others = [field for field in dict.fromkeys(returned) if field not in (*fields, *whole.by_products)]
    return Compared(name, whole.log_order(), final.log_order(), fields, tuple(others))


def sweep(names: Sequence[str] | None = None, *, zoo: str = "heads", seconds: float = 60, total: float = 900) -> None:
    """Compare model after model until the time is up; print those that differ at once."""
    counts = {"same": 0, "differs": 0, "failed": 0}
    for name, found in one_by_one(compare, zoo, names, seconds, total):
        kind = "failed" if isinstance(found, str) else "same" if found.same else "differs"
        counts[kind] += 1
        said = found if isinstance(found, str) else f"{found.whole:.2f} {found.final:.2f} {found.fields} {found.others}"
        print(f"{kind:8} {name:60} {said}", flush=True)
    print(counts, flush=True)
