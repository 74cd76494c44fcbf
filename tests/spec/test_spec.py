from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import networkx as nx
import pytest
import torch

from permgraph.errors import MismatchError, PermgraphError, SpecError
from permgraph.spec import Constraints, Group, PermutationSpec, Pin, SlotPin, Tie, UnknownOp
from permgraph.spec.expressions import Fixed, Ref, parse_axes

h, d = Group("h", 2), Group("d", 3, ("h",))
GROUPS = {"h": h, "d": d}

MLP = PermutationSpec.parse(
    """
fc1.weight  4x3  one .
fc1.bias    4    one
fc2.weight  5x4  two one
fc2.bias    5    two
fc3.weight  2x5  . two
groups: one 4 · two 5
"""
)


def make(axes: str, **more) -> PermutationSpec:
    return PermutationSpec(GROUPS, {"w": parse_axes(axes)}, **more)


# --- construction -----------------------------------------------------------------------------------------------------


def test_axes_are_normalised_and_shapes_found():
    spec = make("((h 1) d) [2]")
    assert spec.axes["w"] == parse_axes("(h d) 2")
    assert spec.shapes == {"w": (6, 2)}


def test_nothing_can_be_changed():
    spec = make("(h d)")
    with pytest.raises(TypeError):
        spec.groups["x"] = h
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.groups = {}
    groups = dict(GROUPS)
    spec = PermutationSpec(groups, {"w": (Ref("h"),)})
    groups["h"] = Group("h", 99)
    assert spec.groups["h"].size == 2


def test_equality_hash_and_copies():
    assert PermutationSpec.parse(str(MLP)) == MLP
    assert hash(MLP) == hash(PermutationSpec.parse(str(MLP)))
    assert make("(h d)") != MLP
    assert copy.deepcopy(MLP) == MLP == pickle.loads(pickle.dumps(MLP))


def test_the_fingerprint_is_of_the_groups_and_axes():
    assert make("(h d)").fingerprint == make("(h d)", notes=("n",), aliases={"v": "w"}).fingerprint
    assert make("(h d)").fingerprint != make("(d h)").fingerprint
    bigger = {**GROUPS, "d": Group("d", 4, ("h",))}
    assert make("(h d)").fingerprint != PermutationSpec(bigger, {"w": parse_axes("(h d)")}).fingerprint
    backwards = PermutationSpec(MLP.groups, dict(reversed(MLP.axes.items())))
    assert backwards.fingerprint == MLP.fingerprint


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (
            lambda: make("(h d)", shapes={"w": (7,)}),
            r"'w', dimension 0: the axis \(h d\) has size 6, but the shape is \(7,\)",
        ),
        (lambda: make("h", shapes={"w": (2, 3)}), r"'w' has shape \(2, 3\), of 2 dimensions, but 1 axes: h"),
        (lambda: make("x"), "parameter 'w': axis x: there is no group named 'x'"),
        (lambda: make("d"), r"parameter 'w', dimension 0 \(d\): 'd' is fibred over 'h', which has no axis there"),
        (lambda: make("h h d"), "parameter 'w', dimension 2 .*'h', of which 2 axes could be meant"),
        (lambda: make("{h | d}@s"), "parameter 'w': the members of the family .* differ in size"),
        (lambda: make("h", shapes={"v": (1,)}), "there is a shape for 'v', but there are no axes for it"),
        (lambda: make("h", aliases={"v": "x"}), "'v' is an alias of 'x', for which there are no axes"),
        (lambda: make("h", aliases={"w": "w"}), "'w' is an alias of 'w', so it cannot have axes of its own"),
        (lambda: PermutationSpec(GROUPS, {"": (Ref("h"),)}), "a parameter has no name"),
        (lambda: PermutationSpec(GROUPS, {"w": [Ref("h")]}), "must be a tuple of expressions, not list"),
        (lambda: PermutationSpec({"d": Group("d", 3, ("d",))}, {}), "fibred over itself"),
        (
            lambda: PermutationSpec({"a": Group("a", 2, ("b",)), "b": Group("b", 2, ("a",))}, {}),
            "fibred over itself by way",
        ),
        (lambda: PermutationSpec({"d": d}, {}), "fibred over 'h', which is no group of this spec"),
    ],
)
def test_what_contradicts_itself(make_it, message):
    with pytest.raises(SpecError, match=message) as caught:
        make_it()
    assert isinstance(caught.value, PermgraphError)
    assert isinstance(caught.value, ValueError)


# --- groups -----------------------------------------------------------------------------------------------------------


def test_moving_groups_really_move():
    groups = {g.name: g for g in [Group("a", 2), Group("one", 1), Group("f", 3, fixed=True), Group("unseen", 4)]}
    spec = PermutationSpec(groups, {"w": parse_axes("a one f")})
    assert list(spec.moving) == ["a"]
    assert list(spec.groups) == ["a", "one", "f", "unseen"]


def test_uses():
    assert MLP.uses("one") == (("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1))
    assert make("(h d) (h d)").uses("d") == (("w", 0), ("w", 1))
    with pytest.raises(SpecError, match="no group 'x' in this spec; it has one, two"):
        MLP.uses("x")


def test_occurrences_of_an_alias():
    spec = make("(h d)", aliases={"v": "w"})
    assert spec.occurrences("v") == spec.occurrences("w")
    assert [o.group for o in spec.occurrences("v")] == ["h", "d"]
    with pytest.raises(SpecError, match="no parameter 'fc2.wight' in this spec; near: fc2.weight"):
        MLP.occurrences("fc2.wight")


def test_log_order():
    assert MLP.log_order() == pytest.approx(math.log(math.factorial(4) * math.factorial(5)))
    assert make("(h d)").log_order() == pytest.approx(math.log(2 * 6**2))


def test_coupling():
    graph = MLP.coupling()
    assert set(graph.nodes) == {"one", "two"}
    assert graph.edges["one", "two"] == {"parameters": ("fc2.weight",), "meeting": ("fc2.weight",)}
    assert nx.number_of_selfloops(graph) == 0


def test_coupling_of_a_group_with_itself():
    groups = {"a": Group("a", 2), "b": Group("b", 2), "f": Group("f", 2, fixed=True)}
    graph = PermutationSpec(groups, {"square": parse_axes("a a f"), "cat": parse_axes("[b + b + a]")}).coupling()
    assert graph.edges["a", "a"] == {"parameters": ("square",), "meeting": ("square",)}
    assert graph.edges["b", "b"] == {"parameters": ("cat",), "meeting": ()}
    assert graph.edges["a", "b"] == {"parameters": ("cat",), "meeting": ()}
    assert "f" not in graph


# --- fit --------------------------------------------------------------------------------------------------------------


def state(spec: PermutationSpec) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in spec.shapes.items()}


def test_what_fits():
    MLP.check(state(MLP))
    MLP.check({**state(MLP), "steps": torch.tensor(1), "extra_state": {"any": "thing"}})
    PermutationSpec(MLP.groups, MLP.axes, unused=("aux",)).check({**state(MLP), "aux": torch.zeros(3)})


def test_what_does_not_fit():
    good = state(MLP)
    with pytest.raises(
        MismatchError, match=r"the state dict has no 'fc2.bias', of shape \(5,\); it has 4 keys, the spec 5"
    ):
        MLP.check({name: tensor for name, tensor in good.items() if name != "fc2.bias"})
    with pytest.raises(MismatchError, match=r"'fc2.weight' has shape \(5, 3\), but the spec says \(5, 4\)"):
        MLP.check({**good, "fc2.weight": torch.zeros(5, 3)})
    with pytest.raises(MismatchError, match=r"has 'more', of shape \(1,\), which the spec does not know"):
        MLP.check({**good, "more": torch.zeros(1)})
    with pytest.raises(MismatchError, match="'more', of shape"):
        MLP.check({**good, "more": torch.zeros(1, dtype=torch.complex64)})
    with pytest.raises(MismatchError, match="'fc1.bias' is a list"):
        MLP.check({**good, "fc1.bias": [0.0]})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "a.b."])
def test_prefixes_are_found_out(prefix):
    good = state(MLP)
    longer = {prefix + name: tensor for name, tensor in good.items()}
    with pytest.raises(MismatchError, match=f"its keys are the spec's with the prefix '{prefix}': strip that"):
        MLP.check(longer)
    wrapped = PermutationSpec(MLP.groups, {prefix + name: axes for name, axes in MLP.axes.items()})
    with pytest.raises(MismatchError, match=f"its keys are the spec's without the prefix '{prefix}': add that"):
        wrapped.check(good)
    del longer[f"{prefix}fc1.bias"]
    with pytest.raises(MismatchError) as caught:
        MLP.check(longer)
    assert "prefix" not in str(caught.value)


def test_differences():
    other = PermutationSpec.parse(
        """
fc1.weight  4x3  one .
fc1.bias    4    .
fc2.weight  6x4  two one
fc2.bias    6    two
extra       2    .
groups: one 4 · two 6
"""
    )
    assert MLP.diff(MLP) == ()
    assert MLP.diff(other) == (
        "group two: 5 in the first, 6 in the second",
        "axes of fc1.bias: one in the first, 4 in the second",
        "axes of fc3.weight: 2 two, only in the first",
        "axes of extra: 2, only in the second",
        "shape of fc2.weight: (5, 4) in the first, (6, 4) in the second",
        "shape of fc2.bias: (5,) in the first, (6,) in the second",
    )
    fibred = PermutationSpec({"h": h, "d": Group("d", 3, fixed=True)}, {})
    assert "group d: 3 over h in the first, 3 fixed in the second" in make("(h d)").diff(fibred)


def test_rename():
    spec = PermutationSpec(GROUPS, {"w": parse_axes("(h d)")}, notes=("kept",)).rename({"h": "head"})
    assert spec.groups == {"head": Group("head", 2), "d": Group("d", 3, ("head",))}
    assert str(spec.axes["w"][0]) == "(head d)"
    assert spec.notes == ("kept",)
    assert spec.rename({"head": "d", "d": "head"}).groups["head"] == Group("head", 3, ("d",))
    with pytest.raises(SpecError, match="no such group"):
        spec.rename({"x": "y"})
    with pytest.raises(SpecError, match="more than one group would be named 'd'"):
        spec.rename({"head": "d"})


# --- text -------------------------------------------------------------------------------------------------------------

FULL = PermutationSpec(
    groups={**GROUPS, "f": Group("f", 2, fixed=True), "z": Group("z", 3, ("f",))},
    axes={
        "qkv.weight": parse_axes("(s:[1 + 1 + 1] h {d | d | 3}@s) 4"),
        'odd name: "x" = (1)·': (Ref("h"),),
        "#first": (Ref("h"),),
        "experts": parse_axes("f z"),
        "scale": (),
    },
    aliases={"tied": "qkv.weight", "tied too": 'odd name: "x" = (1)·'},
    pins=(
        Pin("qkv.weight", 1, 4, "model input", "aten.mm.default", "fc", "model.py:3"),
        Pin("qkv.weight", 0, 3, "rotary · frequencies"),
    ),
    unknown_ops=(UnknownOp("aten.fft_fft.default", 3, "mixer", "model.py:9"),),
    unused=("aux.weight", "aux bias"),
    model_class="Toy",
    notes=("inferred on real tensors,\nfor the branch taken",),
    constraints=Constraints(
        (Tie("qkv.weight[0]", "mm[1]", "aten.mm.default", "fc", None), Tie("mm[1]", "out[0]")),
        (SlotPin("mm[0]", "model input"),),
    ),
)


def test_the_text_form():
    assert str(FULL).splitlines() == [
        "qkv.weight                18x4    (s:[1 + 1 + 1] h {d | d | 3}@s) .",
        r'"odd name: \"x\" = (1)·"  2       h',
        '"#first"                  2       h',
        "experts                   2x3     f z",
        "scale                     scalar",
        "tied = qkv.weight",
        r'"tied too" = "odd name: \"x\" = (1)·"',
        "groups: h 2 · d 3 per h · f 2 fixed · z 3 per f",
        "pinned: 1 axis: model input 1× · rotary frequencies 1×",
        "unknown operators: aten.fft_fft.default 3×",
        'unused: aux.weight · "aux bias"',
        "note: inferred on real tensors, for the branch taken",
    ]


@pytest.mark.parametrize("spec", [MLP, FULL], ids=["mlp", "full"])
def test_the_text_reads_back(spec):
    again = PermutationSpec.parse(str(spec))
    for field in ("groups", "axes", "shapes", "aliases"):
        assert getattr(again, field) == getattr(spec, field)
    assert list(again.axes) == list(spec.axes)
    assert list(again.groups) == list(spec.groups)
    assert again.pins == again.unused == ()


def test_many_groups_are_wrapped_and_read_back():
    groups = {f"layer{i}.attention": Group(f"layer{i}.attention", 64) for i in range(60)}
    spec = PermutationSpec(groups, {f"w{i}": (Ref(name),) for i, name in enumerate(groups)})
    assert max(map(len, str(spec).splitlines())) <= 120
    assert PermutationSpec.parse(str(spec)) == spec


def test_an_empty_spec_is_a_plain_sentence():
    spec = PermutationSpec({}, {"fc.weight": (Fixed(2), Fixed(3)), "fc.bias": (Fixed(2),)}, model_class="Linear")
    assert str(spec).splitlines()[0] == "Nothing to permute: all 2 parameters and buffers of Linear stay put."
    again = PermutationSpec.parse(str(spec))
    assert (again.axes, again.groups, again.moving) == (spec.axes, {}, {})
    assert spec.log_order() == 0
    assert spec.random(0).is_identity
    assert not spec.coupling().nodes
    assert str(PermutationSpec({}, {})) == "Nothing to permute: all 0 parameters and buffers stay put."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w", "line 1: after the name 'w' its shape is due"),
        ("w a", "line 1: after the name 'w' its shape is due, .* found 'a'"),
        ("w 3 a b\ngroups: a 3", "line 1, parameter 'w': shape .* has 1 dimensions"),
        ("w 3x2 a\ngroups: a 3", r"line 1, parameter 'w': 'a' gives 1 axes for the 2 dimensions of shape \(3, 2\)"),
        ("\nw 3 (a\ngroups: a 3", "line 2, parameter 'w': .*ends there"),
        ("w 4 a\ngroups: a 3", "parameter 'w', dimension 0: the axis a has size 3"),
        ("w 3 a", "parameter 'w': axis a: there is no group named 'a'"),
        ("w 3 .\nw 3 .", "line 2: 'w' is there twice"),
        ("w 3 .\nv = w x", "line 2: 'x' after an alias"),
        ("v = w", "'v' is an alias of 'w', for which there are no axes"),
        ("w 3 .\nv =", "line 2: a parameter's name is due"),
        ('"w 3 .', "line 1: a parameter's name is due"),
        (r'"\q" 3 .', "line 1: cannot read the quoted name"),
        ("groups: a 3 · a 4", "line 1: the group 'a' is there twice"),
        ("groups: a", "line 1: cannot read the group 'a'"),
        ("groups: a 3 of b", "line 1: cannot read the group 'a 3 of b'"),
        ("groups: a 3 per", "line 1: cannot read the group 'a 3 per'"),
        ("groups: a 0", "line 1: group 'a' has size 0"),
        ("groups: a 3 per b", "group 'a' is fibred over 'b', which is no group"),
    ],
)
def test_malformed_text(text, message):
    with pytest.raises(SpecError, match=message):
        PermutationSpec.parse(text)


def test_comments_are_skipped():
    assert PermutationSpec.parse("# a comment\n\nw 3 a\n   v 3 a\npinned: 3\n    axes\nnote: x\ngroups: a 3\n") == (
        PermutationSpec({"a": Group("a", 3)}, {"w": (Ref("a"),), "v": (Ref("a"),)})
    )


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [MLP, FULL, PermutationSpec({}, {})], ids=["mlp", "full", "empty"])
def test_files(spec, tmp_path):
    path = tmp_path / "spec.json"
    spec.save(path)
    again = PermutationSpec.load(path)
    for field in dataclasses.fields(spec):
        assert getattr(again, field.name) == getattr(spec, field.name), field.name
    assert list(again.axes) == list(spec.axes)
    assert [file.name for file in tmp_path.iterdir()] == ["spec.json"]


def test_the_file_has_a_line_for_each_thing(tmp_path):
    FULL.save(tmp_path / "spec.json")
    lines = (tmp_path / "spec.json").read_text(encoding="utf-8").splitlines()
    assert '  "experts": {"shape": [2, 3], "axes": ["f", "z"]},' in lines
    assert '  "d": {"size": 3, "parents": ["h"], "fixed": false},' in lines
    assert '   ["qkv.weight[0]", "mm[1]", "aten.mm.default", "fc", null],' in lines


def test_a_text_file_loads_too(tmp_path):
    (tmp_path / "spec.txt").write_text(str(MLP), encoding="utf-8")
    assert PermutationSpec.load(str(tmp_path / "spec.txt")) == MLP


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "spec.json"
    MLP.save(path)

    def broken(*_):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="no space"):
        FULL.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["spec.json"]
    assert PermutationSpec.load(path) == MLP


def changed(spec: PermutationSpec, *keys, to):
    import json

    from permgraph.spec.json import to_json

    content = json.loads(json.dumps(to_json(spec)))
    inside = content
    for key in keys[:-1]:
        inside = inside[key]
    if to is None:
        del inside[keys[-1]]
    else:
        inside[keys[-1]] = to
    return json.dumps(content)


@pytest.mark.parametrize(
    ("keys", "to", "message"),
    [
        (["format"], "other", "not a spec: the field 'format' should be 'permgraph.spec'"),
        (["version"], 2, "version 2 of the format; this permgraph reads version 1: infer the spec again"),
        (["version"], None, "version None"),
        (["groups"], None, "groups: missing"),
        (["groups"], [], r"groups: should be of type dict, found \[\]"),
        (["groups", "h"], None, "group 'd' is fibred over 'h', which is no group"),
        (["groups", "h", "size"], "2", "groups.h: size: should be of type int, found '2'"),
        (["groups", "h", "size"], True, "groups.h: size: should be of type int, found True"),
        (["groups", "h", "size"], -2, "groups.h: group 'h' has size -2"),
        (["groups", "d", "parents"], [1], "groups.d: parents: should be a list of texts"),
        (["groups", "d", "parents"], ["d"], "group 'd' is fibred over itself"),
        (["groups", "d", "fixed"], None, "groups.d: fixed: missing"),
        (["parameters", "experts", "axes"], ["f", "y"], "parameter 'experts': axis y: there is no group named 'y'"),
        (["parameters", "experts", "axes"], ["f", "(z"], r"parameters.experts.axes: .*\(z' ends there"),
        (["parameters", "experts", "axes"], ["f", 3], "parameters.experts: 'shape' should be a list of integers"),
        (["parameters", "experts", "shape"], [2, 4], "parameter 'experts', dimension 1: the axis z has size 3"),
        (["parameters", "experts"], 3, "parameters.experts.axes: missing"),
        (["aliases"], {"tied": 3}, "aliases: should be names to names"),
        (["pins"], [["w", 0, 3]], r"pins\[0\]: should be \[parameter, dim, size, reason, operator, module, source\]"),
        (["unused"], [3], "unused: should be a list of texts"),
        (["constraints"], {"ties": []}, "constraints.pins: missing"),
        (["constraints", "ties"], [["a", "b", 3, None, None]], r"constraints.ties\[0\]: should be"),
    ],
)
def test_bad_files_name_the_place(keys, to, message, tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(changed(FULL, *keys, to=to), encoding="utf-8")
    with pytest.raises(SpecError, match=f"spec.json: {message}"):
        PermutationSpec.load(path)


@pytest.mark.parametrize("content", [b"{", b"{}", b"\xff\xfe{", b'{"format": 3}', b"what is this"])
def test_files_that_are_no_specs(content, tmp_path):
    path = tmp_path / "spec.json"
    path.write_bytes(content)
    with pytest.raises(SpecError, match="spec.json: "):
        PermutationSpec.load(path)
