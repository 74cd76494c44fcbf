"""torchvision's compiled operators, where its extension was built for another torch and cannot be loaded."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


@cache
def declare() -> torch.library.Library | None:
    """Make `import torchvision` work, without importing it; None where it is absent, or the real operators are there.

    What is declared lasts as long as the library that is returned, which is kept here.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or not found.submodule_search_locations:
        return None
    extension = next(Path(found.submodule_search_locations[0]).glob("_C*.so"), None)
    if extension is not None:
        try:
            torch.ops.load_library(extension)
            return None
        except OSError:
            pass
    library = torch.library.Library("torchvision", "FRAGMENT")
    if not hasattr(torch.ops.torchvision, "nms"):
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    if not hasattr(torch.ops.torchvision, "qnms"):
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


@cache
def provide() -> torch.library.Library | None:
    """Make `import torchvision` work, and `nms` with it; None as for `declare`.

    The stand-in is written in Python and does what the compiled operator does, so that detectors run.
    """
    library = declare()
    if library is None:
        return None
    library.impl("nms", _nms, "CPU")
    import torchvision.ops.boxes

    torchvision.ops.boxes._assert_has_ops = lambda: None
    return library


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy: the best box stays, those that overlap it too much go, and so on."""
    order = scores.argsort(descending=True, stable=True)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    kept: list[Tensor] = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        corner = torch.maximum(boxes[best, :2], boxes[order, :2])
        other = torch.minimum(boxes[best, 2:], boxes[order, 2:])
        shared = (other - corner).clamp(min=0).prod(1)
        order = order[shared / (areas[best] + areas[order] - shared) <= iou_threshold]
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.int64)
