"""`UnionRows`: the rows of all networks in the result, in Python."""

from __future__ import annotations

import pytest
import torch

import permgraph as pg
from permgraph.matching.rows import rows_in_union

Networks = tuple[pg.PermutationSpec, dict[str, torch.Tensor], dict[str, torch.Tensor]]

SPEC = """
table.weight  3x5  . hidden
up.weight     5x5  hidden hidden
head.weight   3x5  . hidden
head.bias     3    .
groups: hidden 5
"""


def network(rows: int, seed: int) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    shapes = {"table.weight": (rows, 5), "up.weight": (5, 5), "head.weight": (rows, 5), "head.bias": (rows,)}
    return {name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()}


@pytest.fixture
def networks() -> Networks:
    """The spec, A with rows p q r, and B with rows r s t u whose shared parts are A's."""
    a, b = network(3, 0), network(4, 1)
    b["up.weight"] = a["up.weight"].clone()
    for name in ("table.weight", "head.weight", "head.bias"):
        b[name][0] = a[name][2]
    return pg.PermutationSpec.parse(SPEC), a, b


NAMES = (["p", "q", "r"], {"r": 0, "s": 1, "t": 2, "u": 3})


def moved(b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    order = torch.tensor([3, 0, 4, 1, 2])
    return {
        "table.weight": b["table.weight"][:, order], "up.weight": b["up.weight"][order][:, order],
        "head.weight": b["head.weight"][:, order], "head.bias": b["head.bias"],
    }  # fmt: skip


def test_rows_of_others_follow_after_the_last_that_has_a_name() -> None:
    assert rows_in_union([{"p": 0, "q": 2}, {"s": 1, "q": 0}, {"t": 0, "s": 4}]) == {"p": 0, "q": 2, "s": 3, "t": 4}


def test_a_merge_has_the_rows_of_all(networks: Networks) -> None:
    spec, a, b = networks
    merged = pg.merge([a, moved(b)], pg.ToReference(), spec=spec, rows=pg.UnionRows(NAMES), weights=(1, 3)).state_dict
    for name in ("table.weight", "head.weight", "head.bias"):
        torch.testing.assert_close(merged[name], torch.cat([a[name], b[name][1:]]))
    torch.testing.assert_close(merged["up.weight"], a["up.weight"])


def test_an_alignment_has_them_in_the_first_ones_numbering(
    networks: Networks,
) -> None:
    spec, a, b = networks
    fit = pg.align(a, moved(b), spec=spec, rows=pg.UnionRows(NAMES))
    for name in ("table.weight", "head.weight", "head.bias"):
        assert torch.equal(fit.state_dict[name], torch.cat([a[name], b[name][1:]]))
    assert torch.equal(fit.state_dict["up.weight"], b["up.weight"])
    own = fit.permutation.apply(moved(b))
    assert torch.equal(own["head.weight"], b["head.weight"])


def test_without_names_the_first_rows_are_the_same(
    networks: Networks,
) -> None:
    spec, a, b = networks
    b = {**b, **{name: torch.cat([a[name], b[name][3:]]) for name in a if name != "up.weight"}}
    merged = pg.merge([a, moved(b)], pg.ToReference(), spec=spec, rows=pg.UnionRows("common")).state_dict
    for name, tensor in b.items():
        torch.testing.assert_close(merged[name], tensor)


def test_two_names_of_one_tensor_stay_one() -> None:
    spec = pg.PermutationSpec.parse("table  3x2  . .\nhead = table\ngroups: unit 1")
    one, other = torch.arange(6.0).reshape(3, 2), torch.arange(6.0).reshape(3, 2)
    states = [{"table": t, "head": t} for t in (one, torch.cat([other, other[:1]]))]
    rows = pg.UnionRows([["p", "q", "r"], ["p", "q", "r", "s"]])
    merged = pg.merge(states, spec=spec, rows=rows).state_dict
    assert merged["table"] is merged["head"]
    assert merged["table"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
