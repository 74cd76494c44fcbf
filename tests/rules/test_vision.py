"""torchvision's operators, by their schemas where the compiled ones are not there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.rules import rule
from permgraph.rules.vision import regions
from permgraph.verification.rule import check_rule


@pytest.mark.parametrize("left", [True, False])
def test_solving_with_a_triangle_keeps_its_rows(left: bool) -> None:
    a = torch.randn(2, 5, 5, dtype=torch.float64).tril() + 4 * torch.eye(5, dtype=torch.float64)
    b = torch.randn(2, 5, 3, dtype=torch.float64) if left else torch.randn(2, 3, 5, dtype=torch.float64)
    right = "(a . b)" if left else "(a b .)"
    report = check_rule(torch.ops.aten.linalg_solve_triangular.default, a, b, upper=False, left=left)
    assert report.verdict != "incorrect"
    assert report.matches(f"(a . .), {right} -> {right} where b per a"), report


def _regions(x: Tensor, rois: Tensor, *sizes: object) -> Tensor:
    """Means over whole pixels: enough of the operator for its rule."""
    pooled = []
    for image, left, top, right, bottom in rois.long().tolist():
        rows, columns = (sorted((min(max(a, 0), 6), min(max(b, 0), 6))) for a, b in ((top, bottom), (left, right)))
        window = x[image % 2, :, rows[0] : rows[1] + 1, columns[0] : columns[1] + 1]
        pooled.append(nn.functional.adaptive_avg_pool2d(window, 2))
    return torch.stack(pooled)


def test_regions_keep_space_and_images_in_place() -> None:
    library = torch.library.Library("permgraph_test", "DEF")
    library.define("roi_align(Tensor input, Tensor rois) -> Tensor")
    library.impl("roi_align", _regions, "CPU")
    rule("permgraph_test.roi_align")(regions)
    image = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    rois = torch.tensor([[0, 0, 0, 3, 3], [1, 1, 2, 5, 6], [1, 0, 1, 4, 4], [0, 2, 2, 6, 6], [1, 3, 0, 5, 5]]).double()
    report = check_rule(torch.ops.permgraph_test.roi_align.default, image, rois)
    assert report.verdict != "incorrect"
    assert report.matches("(. a . .), (b .) -> (b a . .)"), report


class Detector(nn.Module):
    """Two channels of features make boxes and scores; the best of them are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.boxes, self.scores = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.features(x).relu()
        corner = self.boxes(hidden)
        boxes = torch.cat([corner[:, :2], corner[:, :2] + corner[:, 2:].exp()], 1)
        kept = torch.ops.torchvision.nms(boxes, self.scores(hidden)[:, 0], 0.5)
        return boxes[kept]


def test_a_detector_moves_its_features_and_nothing_else() -> None:
    from benchmarks.zoo.operators import provide

    pytest.importorskip("torchvision")
    provide()
    model = Detector()
    spec = pg.auto_spec(model, (torch.randn(9, 3),))
    assert [group.size for group in spec.moving.values()] == [6]
    assert not spec.unknown_ops
    assert pg.verify(model, spec, (torch.randn(9, 3),))
