"""Blocks partition a parameter, and their axes are the groups'."""

from __future__ import annotations

import pytest
import torch

from permgraph.spec import PermutationSpec
from permgraph.spec.blocks import blocks_of
from tests.matching.examples import SPECS

MORE = PermutationSpec.parse("""
    interleaved  12x6   (s:[1 + 1 + 1] {a | a | b}@s) [c + b]
    later        4x3    {a | b | b}@t t:[1 + 1 + 1]
    nested       3x10   . ([c + 3] 2)
    square       8x8    (h d) (h d)
    offset       scalar
    groups: a 4 · b 4 · c 2 · h 2 · d 4 per h
""")


@pytest.mark.parametrize("name", SPECS)
def test_every_element_once(name):
    _require_partition(SPECS[name])


def test_every_element_once_in_odd_axes():
    _require_partition(MORE)


def _require_partition(spec):
    for parameter, shape in spec.shapes.items():
        tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
        seen = []
        for block in blocks_of(spec, parameter):
            view = block.view(tensor)
            assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            assert tuple(view.shape) == tuple(leaf.size for leaf in block.leaves)
            assert view.numel() == block.size
            seen += view.flatten().tolist()
        assert sorted(seen) == tensor.flatten().tolist()


def test_axes_are_the_groups():
    found = [[leaf.group for leaf in block.leaves] for block in blocks_of(MORE, "interleaved")]
    assert found == [[None, g, other] for g in "aab" for other in "cb"]
    found = [[leaf.group for leaf in block.leaves] for block in blocks_of(MORE, "later")]
    assert found == [["a", None], ["b", None], ["b", None]]
    (square,) = blocks_of(MORE, "square")
    assert [leaf.parents for leaf in square.leaves] == [(), (0,), (), (2,)]


def test_noncontiguous_tensors():
    (block,) = blocks_of(MORE, "square")
    tensor = torch.arange(64).reshape(8, 8)
    assert torch.equal(block.view(tensor.t()), tensor.t().reshape(2, 4, 2, 4))
