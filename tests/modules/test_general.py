"""Modules that change places in specs of general symmetries: in as many orders as over permutations."""

from __future__ import annotations

from math import lgamma

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import permgraph as pg
from tests.general import whole_networks
from tests.modules.test_closed_forms import CASES

MIRRORED = ("selective kernels", "towers, dot")
"""Modules to which the same group does inverse things, which no stack can say."""
GAINS = ("parallel blocks of timm",)
"""Modules with gains of their own between which matrices act."""
VALUELESS = ("votes",)
"""Of whole numbers, which the proof of general symmetries cannot compare."""
OFTEN = (
    "soft, slices", "top k, where", "capacity", "shared experts", "heads", "multi-query", "mean",
    "branches of branches", *MIRRORED,
)  # fmt: skip


def marked(name: str) -> object:
    return name if name in OFTEN else pytest.param(name, marks=pytest.mark.zoo)


@pytest.mark.parametrize("name", [marked(name) for name in CASES if name not in VALUELESS])
def test_has_the_orders_of_permutations_and_the_dimension_of_what_acts(name: str) -> None:
    make, inputs, _ = CASES[name]
    torch.manual_seed(0)
    model, x = make().eval(), inputs()
    alone, whole = (pg.auto_spec(model, x, symmetry="general", modules=modules) for modules in (False, True))
    of_modules = pg.auto_spec(model, x, modules=True).log_order() - pg.auto_spec(model, x).log_order()
    if name in (*MIRRORED, *GAINS):
        assert not whole.stacks and any("stay put" in note for note in whole.notes)
    else:
        assert whole.log_order() - alone.log_order() == pytest.approx(of_modules)
    assert whole.dimension() == alone.dimension()
    assert set(whole.general.reasons) <= {*whole.groups}
    assert pg.verify(model, whole, x, further=0.0).passed


class Rotary(nn.Module):
    """Attention with rotary positions and a module for each head, behind a norm; the heads are summed."""

    def __init__(self, heads: int = 3, width: int = 8, each: int = 4) -> None:
        super().__init__()
        self.norm, self.table = nn.RMSNorm(width, eps=1e-5), nn.Embedding(11, width)
        self.heads = nn.ModuleList(
            nn.ModuleDict(
                {name: nn.Linear(width, each, bias=False) for name in "qkv"} | {"o": nn.Linear(each, width, bias=False)}
            )
            for _ in range(heads)
        )
        self.last, self.out = nn.RMSNorm(width, eps=1e-5), nn.Linear(width, 11, bias=False)

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.3]).to(x.dtype).repeat(2)
        return x * angles.cos() + torch.cat([-x[..., 2:], x[..., :2]], -1) * angles.sin()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y = self.norm(x)
        for head in self.heads:
            mixed = F.scaled_dot_product_attention(self.turned(head["q"](y)), self.turned(head["k"](y)), head["v"](y))
            x = x + head["o"](mixed)
        return self.out(self.last(x))


class Adapters(nn.Module):
    """Low-rank updates that are added up."""

    def __init__(self, count: int = 3, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(5, 6)
        self.updates = nn.ModuleList(
            nn.Sequential(nn.Linear(5, rank, bias=False), nn.Linear(rank, 6, bias=False)) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + sum(update(x) for update in self.updates)


def test_rotary_heads() -> None:
    """Three heads change places; in each a complex factor for two pairs and four by four matrices; O on the stream.

    Of the permutations there are those of the stream, of each head's values, and of the heads.
    """
    model, ids = Rotary(), (torch.randint(11, (2, 5)),)
    spec = pg.auto_spec(model, ids, symmetry="general", modules=True)
    assert spec.dimension() == 8 * 7 // 2 + 3 * (4 + 16)
    assert spec.log_order() == pytest.approx(lgamma(9) + 3 * lgamma(5) + lgamma(4))
    assert sorted(str(group.structure) for group in spec.acting.values()) == ["GL", "O", "S", "T"]
    assert pg.verify(model, spec, ids).passed


def test_heads_of_unlike_positions_stay() -> None:
    """Turned by other angles each: a graph from which turns are taken out would show them alike."""

    class Unlike(Rotary):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            y = self.norm(x)
            for number, head in enumerate(self.heads):
                angles = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.3 + number]).to(x.dtype).repeat(2)
                q, k = (
                    z * angles.cos() + torch.cat([-z[..., 2:], z[..., :2]], -1) * angles.sin()
                    for z in (head["q"](y), head["k"](y))
                )
                x = x + head["o"](F.scaled_dot_product_attention(q, k, head["v"](y)))
            return self.out(self.last(x))

    model, ids = Unlike(), (torch.randint(11, (2, 5)),)
    spec = pg.auto_spec(model, ids, symmetry="general", modules=True)
    assert not spec.stacks
    assert spec.dimension() == 8 * 7 // 2 + 3 * (4 + 16)


def test_low_rank_updates() -> None:
    model, x = Adapters(), (torch.randn(4, 5),)
    spec = pg.auto_spec(model, x, symmetry="general", modules=True)
    assert spec.dimension() == 3 * 2 * 2 and spec.log_order() == pytest.approx(3 * lgamma(3) + lgamma(4))
    assert pg.verify(model, spec, x).passed


def test_elements_act_compose_and_are_read_back(tmp_path: object) -> None:
    spec, state = whole_networks.spec_of("mixture"), whole_networks.network("mixture", 0).state_dict()
    g, h = (spec.random(seed, every_group=True) for seed in (0, 1))
    moved = g.apply(state)
    assert list(moved) == list(state) and whole_networks.away("mixture", state, moved) < 1e-12
    stacked = g.of(spec.over_stacks()).apply(spec.stacked(state))
    assert all(torch.equal(moved[key], tensor) for key, tensor in spec.unstacked(stacked).items())
    both, one_by_one = (g @ h).apply(state), g.apply(h.apply(state))
    back = g.inverse().apply(moved)
    for key, tensor in state.items():
        torch.testing.assert_close(both[key], one_by_one[key], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(back[key], tensor, rtol=1e-9, atol=1e-12)
    path = f"{tmp_path}/g.safetensors"
    g.save(path)
    again = pg.Transformation.load(path, spec)
    assert all(torch.equal(tensor, again.apply(state)[key]) for key, tensor in moved.items())


def test_a_member_tells_where_a_tensor_comes_from() -> None:
    spec, state = whole_networks.spec_of("mixture"), whole_networks.network("mixture", 0).state_dict()
    g = spec.random(3, every_group=True)
    moved = g.apply(state)
    for name in spec.in_stack:
        source, within, _ = g.member(name)
        assert torch.equal(within.apply_to(source, state[source], state), moved[name])


def test_texts_and_files_say_it_all(tmp_path: object) -> None:
    spec = whole_networks.spec_of("mixture")
    path = f"{tmp_path}/spec.json"
    spec.save(path)
    again = pg.PermutationSpec.load(path)
    assert again == spec and again.fingerprint == spec.fingerprint and again.general == spec.general
    np.testing.assert_equal(spec.permutations().stacks, spec.stacks)
    assert spec.permutations().general is None
