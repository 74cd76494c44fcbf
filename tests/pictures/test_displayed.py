"""What results show of themselves at a prompt and in a notebook: few lines, and no tensor written out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import permgraph as pg
from permgraph.conventions.displayed import Displayed, in_few_words

SPEC = pg.PermutationSpec.parse("0.weight  40x30  hidden .\n2.weight  20x40  . hidden\ngroups: hidden 40\n")
A = {"0.weight": torch.randn(40, 30), "2.weight": torch.randn(20, 40)}
B = SPEC.random(1, every_group=True).apply(A)
NET = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
NETS = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval() for _ in range(3)]
LOADER = [(torch.randn(9, 4), torch.arange(9) % 3)]

RESULTS = {
    "alignment": lambda: pg.align(A, B, spec=SPEC),
    "match": lambda: pg.align(A, B, spec=SPEC).result,
    "merge": lambda: pg.merge([A, B, A], spec=SPEC),
    "partial match": lambda: pg.match_widths(A, B, SPEC, SPEC),
    "spectra": lambda: pg.compare_spectra(A, B),
    "statistics": lambda: pg.channel_statistics(NET, LOADER),
    "barrier": lambda: pg.barrier(NET, NET, pg.evaluate_on(LOADER), points=25),
    "layers": lambda: pg.layerwise_barriers(NET, NET, pg.evaluate_on(LOADER), points=3),
    "curve": lambda: pg.fit_curve(NET, NET, LOADER, epochs=1),
    "features": lambda: pg.feature_connectivity(NET, NET, LOADER),
    "surface": lambda: pg.loss_surface(*NETS, pg.evaluate_on(LOADER), points=3),
    "estimate": lambda: pg.estimate(SPEC),
}


@pytest.mark.parametrize("make", RESULTS.values(), ids=RESULTS)
def test_results_show_themselves_in_a_few_lines(make: Any) -> None:
    result = make()
    lines = repr(result).splitlines()
    assert 2 <= len(lines) <= 40 and max(map(len, lines)) <= 120
    assert lines[0] == type(result).__name__ and "tensor(" not in repr(result)
    html = result._repr_html_()
    assert html.startswith("<div>") and html.count("<table>") == html.count("</table>") and len(html) < 20_000


@dataclass(frozen=True, repr=False)
class Found(Displayed):
    weights: dict[str, torch.Tensor]
    name: str = "<b>"
    notes: tuple[str, ...] = ("mind the gap",)
    nothing: None = None
    _own: int = field(default=3)


def test_fields_in_a_few_words() -> None:
    found = Found({f"w{n}": torch.ones(2, n) for n in range(5)})
    assert repr(found) == (
        "Found\n"
        "  weights  5 in all: w0: tensor (2, 0) float32, w1: tensor (2, 1) float32, w2: tensor (2, 2) float32, ...\n"
        "  name     <b>\n"
        "  notes    mind the gap"
    )
    html = found._repr_html_()
    assert "&lt;b&gt;" in html and html.count("mind the gap") == 1 and "_own" not in html
    assert in_few_words(np.zeros((2, 3))) == "array (2, 3) float64"
    assert in_few_words(1 / 3) == "0.333333"
    assert len(in_few_words("x" * 1000)) == 90


@pytest.mark.parametrize(("sweeps", "said"), [(0, "0 sweeps"), (1, "1 sweep "), (2, "2 sweeps")])
def test_one_sweep_is_no_sweeps(sweeps: int, said: str) -> None:
    result = pg.MatchResult(SPEC.identity(), 0.0, 0.0, "converged", (None,) * sweeps)  # type: ignore[arg-type]
    assert said in str(result)
