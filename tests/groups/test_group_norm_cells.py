"""GroupNorm over a concatenation whose seams are no borders of groups: what is between seams and borders is free."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.algebra import Axes
from permgraph.algebra.cells import Stretch, fits, stretches


class Joined(nn.Module):
    """Several convolutions, each with a GroupNorm of its own where `own` says so, and one over all of them."""

    def __init__(self, widths: Sequence[int], groups: int, own: Sequence[int] = ()) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, n, 3, padding=1) for n in widths)
        self.own = nn.ModuleList(nn.GroupNorm(g, n) if g else nn.Identity() for g, n in zip(own, widths, strict=False))
        self.norm, self.out = nn.GroupNorm(groups, sum(widths)), nn.Conv2d(sum(widths), 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [conv(x) for conv in self.convs]
        parts = [norm(part) for norm, part in zip(self.own, parts, strict=True)] if len(self.own) else parts
        y: Tensor = self.out(self.norm(torch.cat(parts, 1)).relu())
        return y


def log_order(widths: Sequence[int], groups: int) -> float:
    """By hand: pieces of groups each within itself, whole groups of one tensor in any order besides."""
    size = sum(widths) // groups
    total = 0.0
    for start, end in itertools.pairwise([0, *itertools.accumulate(widths)]):
        first, last = -(-start // size) * size, end // size * size
        if first > last:
            total += math.lgamma(end - start + 1)
            continue
        whole = (last - first) // size
        total += math.lgamma(first - start + 1) + math.lgamma(end - last + 1)
        total += math.lgamma(whole + 1) + whole * math.lgamma(size + 1)
    return total


def error(model: nn.Module, spec: pg.PermutationSpec) -> float:
    model = model.double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 7, generator=generator).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).double())
        before = model(x)
        model.load_state_dict(spec.random(seed=1).apply(model.state_dict()))
        return float((model(x) - before).abs().max() / before.abs().max())


@pytest.mark.parametrize(
    ("widths", "groups"),
    [((32, 16), 4), ((16, 32), 4), ((24, 24), 4), ((20, 10, 6), 3), ((5, 7), 2), ((3, 3, 18), 2), ((2, 3, 4), 1),
     ((6, 8, 10), 8), ((13, 23), 3)],
)  # fmt: skip
def test_pieces_between_seams_and_borders_are_free(widths: Sequence[int], groups: int) -> None:
    model = Joined(widths, groups)
    spec = pg.auto_spec(model, (torch.randn(2, 3, 8, 8),))
    assert spec.log_order() == pytest.approx(log_order(widths, groups))
    assert error(model, spec) < 1e-9


@pytest.mark.parametrize(
    ("widths", "groups", "own"),
    [((32, 16), 4, (4, 4)), ((64, 32), 8, (8, 0)), ((40, 20), 6, (8, 2)), ((12, 12, 12), 4, (3, 2, 6)),
     ((7, 5), 2, (7, 1)), ((48, 24), 6, (4, 2)), ((36, 24), 4, (6, 3))],
)  # fmt: skip
def test_groups_of_two_sizes_meet_in_what_both_leave_free(
    widths: Sequence[int], groups: int, own: Sequence[int]
) -> None:
    model = Joined(widths, groups, own)
    spec = pg.auto_spec(model, (torch.randn(2, 3, 8, 8),))
    assert spec.log_order() >= pieces(widths, groups, own) - 1e-9
    assert error(model, spec) < 1e-9


def pieces(widths: Sequence[int], groups: int, own: Sequence[int]) -> float:
    """By hand: each piece between two borders of either kind within itself, and nothing changes places."""
    size, start, total = sum(widths) // groups, 0, 0.0
    for width, count in zip(widths, own, strict=True):
        borders = {b for b in range(0, sum(widths) + 1, size) if start < b < start + width}
        borders |= {start + k * (width // max(count, 1)) for k in range(count)} | {start, start + width}
        total += sum(math.lgamma(b - a + 1) for a, b in itertools.pairwise(sorted(borders)))
        start += width
    return total


def test_stretches_of_an_axis() -> None:
    axes = Axes()
    axis = axes.sum([axes.atom(32), axes.atom(16)])
    assert not fits(axes, axis, 12)
    assert fits(axes, axis, 16)
    assert stretches(axes, axis, 12) == [
        Stretch(0, 24, 12),
        Stretch(24, 32, 8),
        Stretch(32, 36, 4),
        Stretch(36, 48, 12),
    ]
    within = axes.product([axes.atom(5), axes.atom(8)])
    assert not fits(axes, within, 20)
    assert fits(axes, axes.product([axes.atom(6), axes.atom(8)]), 24)
    assert fits(axes, axes.product([axes.atom(6), axes.atom(8)]), 4)
    # Cells of 24 are three groups of 8 each, two cells of 4 are one, and two of 12 are three of which they cut one.
    groups = axes.product([axes.atom(9), axes.atom(8)])
    assert stretches(axes, groups, 24) == [Stretch(0, 72, 24)]
    assert stretches(axes, groups, 4) == [Stretch(0, 72, 4)]
    assert stretches(axes, groups, 12) == [Stretch(0, 72, 24)]


def lf(n: int) -> float:
    return math.lgamma(n + 1)


@pytest.mark.parametrize(
    ("widths", "groups", "own", "expected"),
    [
        # [8][4|4][8][8] of groups of 8 under cells of 12, and [4][4 4 4], whose last three are one cell.
        ((32, 16), 4, (4, 4), 3 * lf(8) + 2 * lf(4) + 4 * lf(4) + lf(3)),
        # Cells of 20 are two groups of 10 each, in both tensors.
        ((40, 20), 3, (4, 2), lf(2) + 6 * lf(10) + 3 * lf(2)),
        # [8][4|4][8] twice, which change places, [8][4], [4]; of the other [8], in a cell with these 4, and two cells.
        ((64, 32), 8, (8, 0), 5 * lf(8) + 6 * lf(4) + lf(2) + lf(8) + 2 * lf(12) + lf(2)),
        # The same behind the other: two cells and [8], in one cell with half of the first group; [4][8], and from here
        # on cells and groups begin together.
        ((32, 64), 8, (0, 8), lf(2) + 2 * lf(12) + lf(8) + 2 * lf(4) + lf(8) + lf(2) + 4 * lf(8) + 4 * lf(4)),
        # Cells and groups never begin together: all pieces stay where they are.
        ((2, 48, 10), 5, (0, 6, 0), lf(2) + 2 * lf(8) + 4 * lf(6) + 4 * lf(2) + lf(10)),
        # Three cells in each of four groups; [4][3], and [1] in one cell with these, and [4].
        ((48, 7, 5), 15, (4, 0, 0), lf(4) + 4 * (lf(3) + 3 * lf(4)) + lf(4) + lf(3) + lf(4)),
        # Groups of 6 are three cells each, of which there are too many for rows of cells alone.
        ((24, 5, 3), 16, (4, 0, 0), lf(4) + 4 * (lf(3) + 3 * lf(2)) + lf(2) + 2 * lf(2) + lf(2)),
    ],
)
def test_only_the_groups_that_a_border_cuts_are_cut(
    widths: Sequence[int], groups: int, own: Sequence[int], expected: float
) -> None:
    model = Joined(widths, groups, own)
    spec = pg.auto_spec(model, (torch.randn(2, 3, 8, 8),))
    assert spec.log_order() == pytest.approx(expected)
    assert error(model, spec) < 1e-9
