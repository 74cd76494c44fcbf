"""Networks of different widths: partial matching over a common spec."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import permgraph
from permgraph.errors import MismatchError
from permgraph.matching.widths import common_spec, fill_up, match_widths
from permgraph.spec import PermutationSpec
from tests.matching.examples import state

ATTENTION = """
    q      {hd}x{c}  (h d1) c
    k      {hd}x{c}  (h d1) c
    v      {hd}x{c}  (h d2) c
    o      {c}x{hd}  c (h d2)
    embed  30x{c}    . c
    groups: c {c} · h {h} · d1 {d} per h · d2 {d} per h
"""


def attention(c: int, h: int, d: int) -> PermutationSpec:
    return PermutationSpec.parse(ATTENTION.format(c=c, h=h, d=d, hd=h * d))


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2 * width), nn.ReLU(),
        nn.Linear(2 * width, 3),
    ).eval()  # fmt: skip


def randomised(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator) + 0.1
    return model


@pytest.mark.parametrize("widths", [(7, 4), (4, 7), (6, 6)])
def test_what_is_filled_up_computes_the_same(widths):
    small, large = (randomised(mlp(width), seed) for seed, width in enumerate(widths))
    specs = [permgraph.auto_spec(model, (torch.zeros(2, 5),)) for model in (small, large)]
    found = match_widths(small.state_dict(), large.state_dict(), *specs)
    wide = mlp(max(widths))
    wide.load_state_dict(found.state_dict)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(9))
    assert torch.allclose(wide(x), large(x), atol=1e-5)
    for partners, group in ((found.partners[name], specs[0].groups[name]) for name in found.partners):
        matched = partners[partners >= 0]
        assert partners.shape == (group.size,)
        assert len(set(matched.tolist())) == len(matched)
        if widths[0] >= widths[1]:
            other = specs[1].groups[group.name].size
            assert sorted(matched.tolist()) == list(range(other))


@pytest.mark.parametrize("order", ["A is wider", "B is wider"])
def test_a_part_of_a_network_is_found_in_it(order):
    wide, narrow = attention(9, 4, 6), attention(9, 3, 4)
    whole = state(wide, 1)
    moved = wide.random(5).apply(whole)
    heads, channels = np.arange(3), np.arange(4)
    rows = (heads[:, None] * 6 + channels).reshape(-1)
    part = {"q": moved["q"][rows], "k": moved["k"][rows], "v": moved["v"][rows], "o": moved["o"][:, rows],
            "embed": moved["embed"]}  # fmt: skip
    narrow.check(part)
    if order == "A is wider":
        found = match_widths(whole, part, wide, narrow)
        reached = sum(float((whole[n] * found.state_dict[n]).sum()) for n in whole)
        assert (found.partners["h"] >= 0).sum() == 3
        for head, partner in enumerate(found.partners["h"]):
            assert ((found.partners["d1"][head] >= 0).sum() == 4) == (partner >= 0)
            assert partner >= 0 or (found.partners["d1"][head] == -1).all()
    else:
        found = match_widths(part, whole, narrow, wide)
        filled = fill_up(part, narrow, found.spec)
        reached = sum(float((filled[n] * found.state_dict[n]).sum()) for n in whole)
        assert (found.partners["h"] >= 0).all()
        assert (found.partners["d1"] >= 0).all()
    assert reached == pytest.approx(sum(float(t.square().sum()) for t in part.values()), rel=1e-5)


def test_equals_the_rectangular_assignment():
    text = "w 7x3 h . \n v 2x7 . h \n groups: h 7"
    wide, narrow = PermutationSpec.parse(text), PermutationSpec.parse(text.replace("7", "4"))
    a, b = state(wide, 1), state(narrow, 2)
    gram = a["w"] @ b["w"].T + a["v"].T @ b["v"]
    best = max(sum(float(gram[i, j]) for j, i in enumerate(p)) for p in itertools.permutations(range(7), 4))
    assert match_widths(a, b, wide, narrow).result.objective == pytest.approx(best, rel=1e-5)
    assert match_widths(b, a, narrow, wide).result.objective == pytest.approx(best, rel=1e-5)


def test_refuses_other_differences():
    one = PermutationSpec.parse("w 4x3 h . \n groups: h 4")
    for text, message in (
        ("w 4x3 g . \n groups: g 4", "different groups"),
        ("w 3x4 . h \n groups: h 4", "'w' has axes"),
        ("w 4x3 h . \n v 4 h \n groups: h 4", "A has no 'v'"),
        ("w 4x2 h . \n groups: h 4", "'w' has axes"),
    ):
        with pytest.raises(MismatchError, match=message):
            common_spec(one, PermutationSpec.parse(text))


def test_sums_families_and_aliases():
    text = "up 24x6 (s:[1 + 1] {{a | b}}@s 3) . \n cat 2x{cat} . [a + 5 + b] \n tied = up \n groups: a {n} · b {n}"
    wide = PermutationSpec.parse(text.format(n=4, cat=13))
    narrow = PermutationSpec.parse(text.format(n=2, cat=9).replace("24x6", "12x6"))
    b = state(narrow, 1)
    filled = fill_up({**b, "tied": b["up"]}, narrow, wide)
    assert filled["tied"] is filled["up"]
    assert torch.equal(filled["up"].view(2, 4, 3, 6)[:, :2], b["up"].view(2, 2, 3, 6))
    assert filled["up"].view(2, 4, 3, 6)[:, 2:].abs().sum() == 0
    assert torch.equal(filled["cat"][:, [0, 1, 4, 5, 6, 7, 8, 9, 10]], b["cat"])
