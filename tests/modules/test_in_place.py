"""`modules_in_place`: what is left of a spec with groups of modules is the spec without."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch

import permgraph as pg
from permgraph.spec.compare import first_difference
from tests.general.whole_networks import Mixture, inputs, network, spec_of
from tests.modules.test_closed_forms import CASES
from tests.modules.test_general import OFTEN, marked


@pytest.mark.parametrize("symmetry", ["permutation", "general"])
@pytest.mark.parametrize("name", [marked(name) for name in CASES])
def test_is_the_spec_without_groups_of_modules(name: str, symmetry: Literal["permutation", "general"]) -> None:
    make, inputs, _ = CASES[name]
    torch.manual_seed(0)
    model, x = make().eval(), inputs()
    whole = pg.auto_spec(model, x, symmetry=symmetry, modules=True)
    plain = pg.auto_spec(model, x, symmetry=symmetry, modules=False)
    found = whole.modules_in_place()
    assert first_difference(plain, found) is None
    assert found.groups == plain.groups and found.shapes == plain.shapes and not found.stacks
    assert {pin.parameter for pin in found.pins} <= {*plain.shapes}
    if name == OFTEN[0]:
        assert whole.stacks and whole.log_order() > found.log_order()


def test_keeps_null_directions_and_gains() -> None:
    plain = pg.auto_spec(Mixture(), (inputs("mixture"),), symmetry="general", modules=False)
    found = spec_of("mixture").modules_in_place()
    assert found.general is not None and plain.general is not None
    assert replace(found.general, reasons={}) == replace(plain.general, reasons={})  # those of the first expert
    assert found.fingerprint == plain.fingerprint
    element, state = found.random(0), network("mixture", 0).state_dict()
    moved, due = (e.apply(state) for e in (element, pg.Transformation.from_arrays(element.as_arrays(), plain)))
    assert all(torch.equal(moved[name], tensor) for name, tensor in due.items())
