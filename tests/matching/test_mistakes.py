"""What is said on usual mistakes: a path for a spec, a name for a method, a call of what is no method."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import permgraph as pg
from permgraph.errors import MismatchError, PermgraphError

SPEC = pg.PermutationSpec.parse("0.weight  3x2  hidden .\n2.weight  1x3  . hidden\ngroups: hidden 3\n")
A = {"0.weight": torch.arange(6.0).view(3, 2), "2.weight": torch.tensor([[1.0, 2, 3]])}
B = SPEC.random(1, every_group=True).apply(A)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: pg.align(A, B, spec="net.json"), r"read it first, as PermutationSpec.load\('net.json'\)"),
        (lambda: pg.merge([A, B], spec=3), "must be a PermutationSpec, .* not a int"),
        (lambda: pg.merge([A, B], "slerp", spec=SPEC), "takes a method, such as CycleConsistent.*, not a str"),
        (
            lambda: pg.align(A, {f"_orig_mod.{name}": t for name, t in B.items()}, spec=SPEC),
            "B has no '0.weight', .*; B has '_orig_mod.0.weight': strip the prefix '_orig_mod.'",
        ),
        (
            lambda: pg.align(A, B, pg.WeightMatching(ignore=("0.wieght",)), spec=SPEC),
            "no parameter fits the pattern '0.wieght'; there is '0.weight'",
        ),
        (lambda: pg.align(A, B, pg.WeightMatching(ignore="0.*"), spec=SPEC), "is a text: give a tuple"),
        (lambda: pg.interpolate(A, pg.align(A, B, spec=SPEC), 0.5), "not a Alignment: pass its .state_dict"),
        (lambda: pg.average(["a.pt", "b.pt"]), "not a str: load 'a.pt' first"),
    ],
    ids=[
        "a path",
        "no spec",
        "a name for a method",
        "compiled",
        "a pattern that fits nothing",
        "a text for a list",
        "a result",
        "a path for a model",
    ],
)
def test_a_mistake_is_named_with_the_next_step(call: Any, said: str) -> None:
    with pytest.raises(MismatchError, match=said):
        call()


@pytest.mark.parametrize("result", [pg.align(A, B, spec=SPEC), pg.merge([A, B], spec=SPEC)], ids=["align", "merge"])
def test_a_state_dict_that_is_called_says_that_it_is_none_to_call(result: Any) -> None:
    with pytest.raises(PermgraphError, match="leave the brackets out"):
        result.state_dict()
    file = io.BytesIO()
    torch.save(result.state_dict, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert type(read) is type(copy.deepcopy(result.state_dict)) is OrderedDict
    assert all(torch.equal(read[name], tensor) for name, tensor in result.state_dict.items())


def test_a_loader_is_no_evaluation() -> None:
    net = nn.Linear(2, 2).eval()
    with pytest.raises(PermgraphError, match=r"as evaluate_on\(loader\) makes one, not a list"):
        pg.barrier(net, net, [(torch.zeros(1, 2), torch.zeros(1))])


def test_networks_of_other_widths_may_be_modules() -> None:
    wide, narrow = (nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 1)) for width in (5, 3))
    specs = pg.auto_spec(wide), pg.auto_spec(narrow)
    found = pg.match_widths(wide, narrow, *specs)
    assert torch.equal(
        found.state_dict["0.weight"],
        pg.match_widths(wide.state_dict(), narrow.state_dict(), *specs).state_dict["0.weight"],
    )
