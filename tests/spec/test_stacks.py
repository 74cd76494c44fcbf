"""Specs with stacks: the tensors of modules that change places, as one tensor with a dimension for the modules."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.errors import MismatchError, SpecError
from permgraph.spec import PermutationSpec
from permgraph.spec.compare import first_difference
from permgraph.spec.provenance import Refusal
from permgraph.spec.stacks import StackedOnAccess

TEXT = """
router.weight  3x5    experts .
e.*.up.weight  3x4x5  experts units .
e.*.down       3x5x4  experts . units
e.*.up.weight = e.0.up.weight, e.1.up.weight, e.2.up.weight
e.*.down = e.0.down, e.1.down, e.2.down
groups: experts 3 · units 4 per experts
"""

NESTED = """
o.*.i.*.w  2x3x4  outer inner units
o.*.i.*.v  2x3x4  outer inner units
o.*.b      2      outer
o.*.i.*.w = o.0.i.0.w, o.0.i.1.w, o.0.i.2.w, o.1.i.0.w, o.1.i.1.w, o.1.i.2.w
o.*.i.*.v = o.0.i.0.v, o.0.i.1.v, o.0.i.2.v, o.1.i.0.v, o.1.i.1.v, o.1.i.2.v
o.*.b = o.0.b, o.1.b
groups: outer 2 · inner 3 per outer · units 4 per outer inner
"""


def spec(text: str = TEXT) -> PermutationSpec:
    return PermutationSpec.parse(text)


def state(of: PermutationSpec) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in of.tensors.items()}


def equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- the data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [TEXT, NESTED])
def test_text_json_pickles_and_copies_hold_the_stacks(text: str, tmp_path: Path) -> None:
    found = spec(text)
    assert found.stacks
    found.save(tmp_path / "spec.json")
    for other in (
        PermutationSpec.parse(str(found)),
        PermutationSpec.load(tmp_path / "spec.json"),
        pickle.loads(pickle.dumps(found)),
        copy.deepcopy(found),
    ):
        assert other.fingerprint == found.fingerprint and dict(other.stacks) == dict(found.stacks)
        assert found.diff(other) == () and first_difference(found, other) is None


def test_names_and_shapes_of_a_state_dict() -> None:
    found = spec()
    assert dict(found.tensors) == {
        "router.weight": (3, 5),
        **{f"e.{i}.up.weight": (4, 5) for i in range(3)},
        **{f"e.{i}.down": (5, 4) for i in range(3)},
    }
    assert found.tensors_of("e.*.down") == ("e.0.down", "e.1.down", "e.2.down")
    assert found.tensors_of("router.weight") == ("router.weight",)
    assert {name: group.of for name, group in found.groups.items()} == {"experts": "modules", "units": "indices"}
    assert {group.of for group in found.over_stacks().groups.values()} == {"indices"}
    assert found.groups_of_modules == {"experts"} and spec(NESTED).groups_of_modules == {"outer", "inner"}
    assert "2 groups on 7 parameters" in repr(found)


@pytest.mark.parametrize("text", [TEXT, NESTED])
def test_what_acts_on_members_is_what_acts_on_stacks(text: str) -> None:
    found = spec(text)
    given, turn = state(found), found.random(2, every_group=True)
    over = pg.Permutation(found.over_stacks(), dict(turn.arrays))
    stacked = found.stacked(given)
    assert equal(found.unstacked(over.apply(stacked)), {n: turn.apply(given)[n] for n in found.unstacked(stacked)})
    for name in found.in_stack:
        source, within, kept = turn.member(name)
        assert not kept and torch.equal(within.apply_to(source, given[source]), turn.apply(given)[name])
    assert equal(turn.inverse().apply(turn.apply(given)), given)


def test_a_file_from_before_there_were_stacks_is_read(tmp_path: Path) -> None:
    plain = PermutationSpec.parse("w 3 h\ngroups: h 3")
    plain.save(tmp_path / "plain.json")
    content = json.loads((tmp_path / "plain.json").read_text())
    assert "stacks" not in content and "refusals" not in content
    assert PermutationSpec.load(tmp_path / "plain.json") == plain


def test_reasons_why_modules_stay_put_are_kept(tmp_path: Path) -> None:
    plain = PermutationSpec.parse("a.w 3 h\nb.w 3 h\ngroups: h 3")
    refused = PermutationSpec(plain.groups, plain.axes, refusals=(Refusal("they are added in turn", ("a.w", "b.w")),))
    refused.save(tmp_path / "refused.json")
    again = PermutationSpec.load(tmp_path / "refused.json")
    assert again.refusals == refused.refusals and again.fingerprint == plain.fingerprint
    assert "does not change places with that of b.w: they are added in turn" in str(again.explain("a.w", 0))
    assert "that of a.w" in str(again.explain("b.w", 0))
    assert "change" not in str(plain.explain("a.w", 0))
    content = json.loads((tmp_path / "refused.json").read_text())
    (tmp_path / "wrong.json").write_text(json.dumps({**content, "refusals": [["a reason"]]}))
    with pytest.raises(SpecError, match=r"refusals\[0\]: should be \[reason, parameter"):
        PermutationSpec.load(tmp_path / "wrong.json")


def test_renaming_and_resting_groups() -> None:
    found = spec()
    given = state(found)
    renamed = found.rename({"experts": "members", "units": "hidden"})
    assert renamed.groups["hidden"].parents == ("members",) and dict(renamed.stacks) == dict(found.stacks)
    assert first_difference(found, renamed) is None and found.diff(renamed)
    turn = found.random(1, every_group=True)
    same = pg.Permutation(renamed, {"members": turn.arrays["experts"], "hidden": turn.arrays["units"]})
    assert equal(same.apply(given), turn.apply(given))
    for names in (["experts"], ["units"], ["experts", "units"]):
        rest = found.without(names)
        assert set(rest.moving) == {"experts", "units"} - set(names)
        moved = rest.random(1, every_group=True).apply(given)
        assert torch.equal(moved["router.weight"], given["router.weight"]) == ("experts" in names)
    alone = PermutationSpec.parse("e.* 2x3 m .\ne.* = e.0, e.1\ngroups: m 2").without(["m"])
    assert not alone.moving and equal(alone.identity().apply(state(alone)), state(alone))


def test_coupling_and_slots() -> None:
    found = spec()
    assert set(found.coupling().edges) == {("experts", "units")}
    graph = found.to_networkx()
    assert graph.nodes["e.1.up.weight[0]"]["axis"] == "units" and graph.nodes["e.*.down[0]"]["axis"] == "experts"
    assert "e.*.up.weight[1]" not in graph and "e.1.up.weight[2]" not in graph


def test_differences() -> None:
    found = spec()
    without = PermutationSpec.parse(
        "router.weight 3x5 . .\n" + "\n".join(f"e.{i}.up.weight 4x5 u{i} .\ne.{i}.down 5x4 . u{i}" for i in range(3))
        + "\ngroups: u0 4 · u1 4 · u2 4"
    )  # fmt: skip
    said = first_difference(found, without, ("ours", "theirs"))
    assert said == "'e.0.up.weight' changes places with others of 'e.*.up.weight' in ours, and not in theirs"
    assert first_difference(without, found, ("ours", "theirs")) == said.replace("ours", "THEIRS").replace(
        "theirs", "ours"
    ).replace("THEIRS", "theirs")
    other = spec(TEXT.replace("e.0.down, e.1.down", "e.1.down, e.0.down"))
    assert "is at (0,) of the stack 'e.*.down' in A, but at (1,)" in str(first_difference(found, other))
    assert any(line.startswith("stack e.*.down") for line in found.diff(other))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stacks", "said"),
    [
        ({"no.such": ("a", "b")}, "a stack 'no.such', but there are no axes"),
        ({"e": ("a", "b")}, r"holds \(2,\) modules, but its shape is \(3, 4\)"),
        ({"e": ("a", "b", "w")}, "'w' is in the stack 'e', and a parameter of its own"),
        ({"e": ("a", "b", "b")}, "'b' is in the stack 'e', and in the stack 'e'"),
        ({"e": ("a", "b", "c"), "f": ("d", "c", "g")}, "'c' is in the stack 'f', and in the stack 'e'"),
        ({"e": (("a", "b"), ("c",))}, "unlike numbers of modules"),
        ({"w": ("a", "b", "c")}, "has no group along a dimension of modules"),
    ],
)
def test_stacks_that_make_no_sense_are_refused(stacks: Any, said: str) -> None:
    plain = PermutationSpec.parse("e 3x4 m h\nf 3x4 m h\nw 3 .\ngroups: m 3 · h 4 per m")
    with pytest.raises(SpecError, match=said):
        PermutationSpec(plain.groups, plain.axes, stacks=stacks)


def test_a_state_dict_that_does_not_fit_is_refused_by_name() -> None:
    found = spec()
    given, turn = state(found), found.random(0)
    for break_it, said in (
        (lambda s: s.pop("e.1.down"), "no 'e.1.down', which changes places with others of 'e.*.down'"),
        (lambda s: s.update({"e.1.down": torch.zeros(4, 4)}), "'e.1.down' has shape (4, 4), but the spec says (5, 4)"),
        (lambda s: s.update({"more": torch.zeros(2)}), "has 'more', of shape (2,), which the spec does not know"),
    ):
        wrong = dict(given)
        break_it(wrong)
        with pytest.raises(MismatchError) as caught:
            turn.apply(wrong)
        assert said in str(caught.value)
    with pytest.raises(MismatchError, match=r"prefix 'module\.'"):
        found.check({f"module.{name}": tensor for name, tensor in given.items()})
    with pytest.raises(MismatchError, match=r"'e\.2\.down' is torch\.float64.*others of 'e\.\*\.down'.*torch\.float32"):
        found.stacked({**given, "e.2.down": given["e.2.down"].double()})
    with pytest.raises(SpecError, match=r"'e\.2\.down' changes places with others: its axes are those of the stack"):
        found.canonical("e.2.down")


# --- tensors that are loaded on access --------------------------------------------------------------------------------


class OnAccess(StackedOnAccess):
    """A mapping without stacks of its own, which keeps the names that were asked for."""

    def __init__(self, given: dict[str, Tensor]) -> None:
        super().__init__({}, given, {})
        self.asked: list[str] = []

    def __getitem__(self, name: str) -> Any:
        self.asked.append(name)
        return self.state[name]


def test_of_tensors_loaded_on_access_stacks_are_made_on_access() -> None:
    found = spec()
    given = state(found)
    lazy = OnAccess(given)
    stacked = found.stacked(lazy)
    assert list(stacked) == list(found.stacked(given)) == ["router.weight", "e.*.up.weight", "e.*.down"]
    assert not lazy.asked and "e.*.down" in stacked and "e.0.down" not in stacked and len(stacked) == 3
    assert torch.equal(stacked["e.*.down"], torch.stack([given[f"e.{i}.down"] for i in range(3)]))
    assert lazy.asked == [f"e.{i}.down" for i in range(3)]
    with pytest.raises(KeyError):
        stacked["e.0.down"]


def test_streamed_matching_holds_one_stack_at_a_time() -> None:
    found = spec()
    a = state(found)
    turn = found.random(3, every_group=True)
    one, other = OnAccess(a), OnAccess(turn.apply(a))
    result = pg.StreamedWeightMatching(cache=0).match(one, other, found, 0)
    assert equal(result.permutation.apply(turn.apply(a)), a)
    of_stacks = [name.rsplit(".", 1)[-1] for name in one.asked if name in found.in_stack]
    assert all(of_stacks[i] == of_stacks[i + 1] == of_stacks[i + 2] for i in range(0, len(of_stacks), 3))
    less = OnAccess({name: tensor for name, tensor in a.items() if name != "e.1.down"})
    with pytest.raises(MismatchError, match=r"no 'e\.1\.down', which changes places"):
        pg.StreamedWeightMatching().match(less, other, found, 0)


# --- explanations -----------------------------------------------------------------------------------------------------


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(5, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        return sum((gates[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts)), torch.zeros_like(x))


@functools.cache
def inferred() -> PermutationSpec:
    return pg.auto_spec(Mixture(), (torch.randn(2, 5),), modules=True)


def test_a_member_is_explained_under_its_own_name() -> None:
    found = inferred().explain("experts.2.0.weight", 0)
    assert (found.slot, found.size, found.axis) == ("experts.2.0.weight[0]", 7, "experts.0.0")
    (part,) = found.parts
    assert {link.slot for link in part.links} == {"experts.2.0.bias[0]", "experts.2.2.weight[1]"}
    assert all(link.ties for link in part.links)
    assert all(tie.module is None or not tie.module.startswith(("experts.0", "experts.1"))
               for link in part.links for tie in link.ties)  # fmt: skip
    assert found.modules == (
        "its module changes places with those of experts.0.0.weight, experts.1.0.weight, as group experts.*",
    )
    still = inferred().explain("experts.2.0.weight", -1)
    assert still.slot == "experts.2.0.weight[1]" and "input of the model" in str(still)
    with pytest.raises(SpecError, match="there is no dimension 2"):
        inferred().explain("experts.2.0.weight", 2)


def test_a_stack_and_what_goes_with_the_modules_are_explained() -> None:
    found = inferred().explain("experts.*.0.weight", 0)
    assert "goes along with router.weight[0]" in str(found) and "not kept" not in str(found)
    assert "stands for experts.0.0.weight, experts.1.0.weight" in str(found)
    (part,) = inferred().explain("router.weight", 0).parts
    assert part.group == "experts.*" and "experts.*.2.bias[0]" in {link.slot for link in part.links}
    inner = inferred().explain("experts.*.0.weight", 1).parts[0]
    assert {link.slot for link in inner.links} == {"experts.0.0.bias[0]", "experts.0.2.weight[1]"}


class Interleaved(nn.Module):
    """Heads that can change places, but whose units lie in turn in what reads them, which a spec cannot say."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(5, 4) for _ in range(3))
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.stack([head(x).relu() for head in self.heads], -1).flatten(-2))


def test_why_modules_stay_put_is_explained(tmp_path: Path) -> None:
    found = pg.auto_spec(Interleaved(), (torch.randn(2, 5),), modules=True)
    assert not found.stacks
    assert {refusal.parameters for refusal in found.refusals} == {
        tuple(f"heads.{i}.{own}" for i in range(3)) for own in ("weight", "bias")
    }
    found.save(tmp_path / "spec.json")
    said = str(PermutationSpec.load(tmp_path / "spec.json").explain("heads.1.weight", 0))
    assert "its module does not change places with that of heads.0.weight: the spec cannot say so" in said


def test_arrays_are_read_at_the_new_module() -> None:
    found = spec()
    given = state(found)
    units = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]])
    moved = pg.Permutation(found, {"experts": np.array([2, 0, 1]), "units": units}).apply(given)
    assert torch.equal(moved["e.1.up.weight"], given["e.0.up.weight"][[3, 2, 1, 0]])
    assert torch.equal(moved["e.2.down"], given["e.1.down"][:, [1, 0, 3, 2]])
    assert torch.equal(moved["router.weight"], given["router.weight"][[2, 0, 1]])
