"""What every test shares: one thread, deterministic hypothesis, a torchvision that imports on any build of torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile(
    "deterministic",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("deterministic")


def _torchvision_schemas() -> torch.library.Library | None:
    """Declare torchvision's compiled operators where its extension was built for another torch and cannot be loaded.

    Without their schemas `import torchvision` fails; none of the tested models calls them. Returns the library that
    keeps the declarations alive, or None where torchvision is absent or its own extension works.
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
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_KEEP_ALIVE = _torchvision_schemas()
