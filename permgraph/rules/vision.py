"""torchvision's own operators."""

from __future__ import annotations

from permgraph.rules.call import Call
from permgraph.rules.registry import rule

SPACE = "a spatial dimension"


@rule("torchvision.nms")
def nms(call: Call) -> None:
    """The numbers of the boxes (n, 4) that stay, best first."""
    call.pin_all([*call.tensors, *call.results], "boxes in the order of their scores")


@rule("torchvision.roi_align", "torchvision.roi_pool")
def regions(call: Call) -> None:
    """Windows of an image (n, c, height, width) at regions (r, 5), whose first column says in which image."""
    x, rois = call["input"], call["rois"]
    call.pin(x, 0, "looked up by a region's image")
    call.link((x, "_ c h! w!"), (rois, "r x!"), *((out, "r c p! q!") for out in call.results), why=SPACE)
