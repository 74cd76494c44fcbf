"""Apply is a group action, and does what the convention says, on every expression there is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from permgraph.spec import PermutationSpec, action
from permgraph.spec.action import blocks, select
from permgraph.spec.expressions import parse_axes
from permgraph.spec.permutation import Permutation
from tests.spec.reference import brute_force
from tests.spec.strategies import GROUPS, KITS, tensors

seeds = st.integers(0, 2**32 - 1)


def numbered(spec: PermutationSpec) -> torch.Tensor:
    shape = spec.shapes["t"]
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


@pytest.mark.parametrize("kit", KITS, ids=" ".join)
def test_every_kit_makes_sense_alone_and_moves(kit):
    spec = PermutationSpec(GROUPS, {"t": parse_axes(" ".join(kit))})
    assert not torch.equal(spec.random(0, every_group=True).apply_to("t", numbered(spec)), numbered(spec))


@settings(deadline=None, max_examples=150)
@given(tensors(), seeds)
def test_it_does_what_the_convention_says(drawn, seed):
    spec, axes = drawn
    p, x = spec.random(seed), numbered(spec)
    assert torch.equal(p.apply_axes(axes, x), brute_force(p, axes, x))


@settings(deadline=None, max_examples=150)
@given(tensors(), seeds)
def test_it_is_a_group_action(drawn, seed):
    spec, axes = drawn
    p, q, x = spec.random(seed), spec.random(seed + 1), numbered(spec)
    assert torch.equal((p @ q).apply_axes(axes, x), p.apply_axes(axes, q.apply_axes(axes, x)))
    assert torch.equal(p.inverse().apply_axes(axes, p.apply_axes(axes, x)), x)
    assert torch.equal(spec.identity().apply_axes(axes, x), x)


@settings(deadline=None, max_examples=75)
@given(tensors(), seeds)
def test_local_indices_say_where_each_element_came_from(drawn, seed):
    spec, axes = drawn
    p, x = spec.random(seed), numbered(spec)
    indices = []
    for dim in range(x.ndim):
        index = p.local_index("t", dim)
        indices.append(index.reshape([-1 if at == dim else 1 for at in range(x.ndim)]) if index.ndim == 1 else index)
    assert torch.equal(x[tuple(indices)], p.apply_axes(axes, x))


@settings(deadline=None, max_examples=75)
@given(tensors(), seeds, st.data())
def test_group_by_group_is_all_at_once(drawn, seed, data):
    # An array is read at the new index of its parents, so parents have to move first; else any order will do.
    spec, axes = drawn
    p, x = spec.random(seed), numbered(spec)
    order = data.draw(st.permutations(list(spec.moving)))
    for name in sorted(order, key=lambda name: len(spec.groups[name].parents)):
        x = p.restricted_to([name]).apply_axes(axes, x)
    assert torch.equal(x, p.apply_axes(axes, numbered(spec)))


INTERLEAVED = [
    "{a | b2}@s s:[1 + 1]",
    "({a | b2}@s s:[1 + 1])",
    "(h d) (h d)",
    "([b + 2] h d)",
    "h 5 d",
    "d 5 h",
    "h d 5 e 2",
    "k 3 q 2 r",
    "r 2 q 3 k",
    "u 2 v 2 w",
    "f 4 z",
    "s:[1 + 1] 2 {h | a}@s 3 {d | c}@s",
    "3 d h 2",
    "h (d 2) b",
]


@pytest.mark.parametrize("text", INTERLEAVED)
@pytest.mark.parametrize("step", [1, 1 << 14], ids=["by slabs", "by transposition"])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_layout_by_every_way_of_moving(text, step, transposed, monkeypatch):
    monkeypatch.setattr(action, "_STEP", step)
    axes = parse_axes(text.replace("b2", "a"))
    spec = PermutationSpec(GROUPS, {"t": axes})
    x = numbered(spec)
    if transposed:
        order = list(reversed(range(x.ndim)))
        x = x.permute(order).contiguous().permute(order)
        assert x.ndim == 1 or not x.is_contiguous() or min(x.shape) == 1
    for seed in range(3):
        p = spec.random(seed, every_group=True)
        moved = p.apply_axes(spec.axes["t"], x)
        assert torch.equal(moved, brute_force(p, spec.axes["t"], x))
        assert not torch.equal(moved, x)


def test_only_dimensions_that_depend_on_each_other_are_moved_together():
    spec = PermutationSpec(GROUPS, {"t": parse_axes("h b d c . 2", (2, 3, 3, 3, 2, 2))})
    found = blocks(spec.layout(spec.axes["t"]), spec.groups, spec.random(0, every_group=True).arrays)
    assert [block.dims for block in found] == [(0, 2), (1,), (3,)]
    assert [[None if i is None else i.shape for i in block.indices] for block in found] == [
        [(2, 1), (2, 3)],
        [(3,)],
        [(3,)],
    ]
    still = blocks(spec.layout(spec.axes["t"]), spec.groups, spec.random(0, every_group=True).arrays, frozenset({2}))
    assert [block.dims for block in still] == [(0,), (1,), (3,)]


def test_a_group_at_rest_costs_nothing():
    spec = PermutationSpec(GROUPS, {"t": parse_axes("(h d) b")})
    p = spec.random(0, every_group=True).restricted_to(["b"])
    arrays = {name: array for name, array in p.arrays.items() if name == "b"}
    assert [block.dims for block in blocks(spec.layout(spec.axes["t"]), spec.groups, arrays)] == [(1,)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("threads", [1, 8])
def test_both_ways_of_selecting_agree(dtype, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = torch.arange(60).reshape(3, 4, 5).to(dtype)
    for dim in range(3):
        for source in (x, x.transpose(0, 2).contiguous().transpose(0, 2)):
            index = torch.randperm(x.shape[dim], generator=torch.Generator().manual_seed(dim))
            assert torch.equal(select(source, dim, index), x.index_select(dim, index))


def test_empty_tensors():
    spec = PermutationSpec(GROUPS, {"t": parse_axes("b . [a + 0 + 3] (0 a)", (3, 0, 5, 0))})
    x = torch.empty(3, 0, 5, 0)
    assert spec.random(0).apply({"t": x})["t"].shape == x.shape


def test_a_permutation_is_used_by_its_convention():
    spec = PermutationSpec(GROUPS, {"t": parse_axes("h d")})
    p = Permutation(spec, {"h": [1, 0], "d": [[0, 2, 1], [2, 0, 1]]})
    x = torch.tensor([[0, 1, 2], [10, 11, 12]])
    # new[i, j] = old[p_h[i], p_d[i, j]]
    assert p.apply({"t": x})["t"].tolist() == [[10, 12, 11], [2, 0, 1]]
