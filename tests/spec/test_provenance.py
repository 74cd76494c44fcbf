from __future__ import annotations

import networkx as nx
import pytest

from permgraph.errors import SpecError
from permgraph.spec import Constraints, Group, PermutationSpec, Pin, SlotPin, Tie
from permgraph.spec.expressions import parse_axes

RESNET = "torchvision/models/resnet.py"

# input -> conv1 -> bn1 -> relu -> conv2 -> output; the graph that inference would have kept.
TIES = (
    Tie("conv1.weight[0]", "convolution[1]", "aten.convolution.default", "conv1", f"{RESNET}:92"),
    Tie("conv1.weight[1]", "x[1]", "aten.convolution.default", "conv1", f"{RESNET}:92"),
    Tie("convolution[1]", "bn1.weight[0]", "aten.native_batch_norm.default", "bn1", f"{RESNET}:93"),
    Tie("convolution[1]", "bn1.bias[0]", "aten.native_batch_norm.default", "bn1", f"{RESNET}:93"),
    Tie("convolution[1]", "batch_norm[1]", "aten.native_batch_norm.default", "bn1", f"{RESNET}:93"),
    Tie("batch_norm[1]", "relu[1]", "aten.relu.default", "relu", f"{RESNET}:94"),
    Tie("relu[1]", "conv2.weight[1]", "aten.convolution.default", "conv2", f"{RESNET}:96"),
    Tie("conv2.weight[0]", "convolution_1[1]", "aten.convolution.default", "conv2", f"{RESNET}:96"),
)
PINS = (
    SlotPin("x[1]", "model input"),
    SlotPin("convolution_1[1]", "model output"),
    SlotPin("conv1.weight[2]", "kernel", "aten.convolution.default", "conv1", f"{RESNET}:92"),
)
CONV = PermutationSpec(
    groups={"conv1": Group("conv1", 8)},
    axes={
        "conv1.weight": parse_axes("conv1 3 5"),
        "bn1.weight": parse_axes("conv1"),
        "bn1.bias": parse_axes("conv1"),
        "conv2.weight": parse_axes("4 conv1 5"),
    },
    aliases={"tied": "conv1.weight"},
    pins=(Pin("conv1.weight", 1, 3, "model input"), Pin("conv2.weight", 2, 5, "kernel", "aten.convolution.default")),
    constraints=Constraints(TIES, PINS),
)
BARE = PermutationSpec(CONV.groups, CONV.axes)


def test_the_nearest_first_with_the_way_there():
    explanation = CONV.explain("bn1.weight", 0)
    assert explanation.slot == "bn1.weight[0]"
    (part,) = explanation.parts
    assert (part.group, part.size, part.moves) == ("conv1", 8, True)
    assert [(link.slot, len(link.ties)) for link in part.links] == [
        ("conv1.weight[0]", 2),
        ("bn1.bias[0]", 2),
        ("conv2.weight[1]", 4),
    ]
    for link in part.links:
        steps = nx.MultiGraph((tie.a, tie.b) for tie in link.ties)
        assert nx.is_path(steps, nx.shortest_path(steps, "bn1.weight[0]", link.slot))


def test_it_reads_as_a_sentence():
    assert str(CONV.explain("tied", 0)).splitlines() == [
        "conv1.weight[0] (8) is group conv1:",
        f"  tied to bn1.weight[0] by convolution in conv1 ({RESNET}:92), native_batch_norm in bn1 ({RESNET}:93)",
        f"  tied to bn1.bias[0] by convolution in conv1 ({RESNET}:92), native_batch_norm in bn1 ({RESNET}:93)",
        f"  tied to conv2.weight[1] by convolution in conv1 ({RESNET}:92), native_batch_norm in bn1 ({RESNET}:93), "
        f"relu in relu ({RESNET}:94), convolution in conv2 ({RESNET}:96)",
    ]


def test_what_stays_put_says_where_and_why():
    assert str(CONV.explain("conv1.weight", 1)).splitlines() == [
        "conv1.weight[1] (3) stays put:",
        f"  model input, at x[1], reached by convolution in conv1 ({RESNET}:92)",
    ]
    assert str(CONV.explain("conv1.weight", -1)).splitlines() == [
        "conv1.weight[2] (5) stays put:",
        f"  kernel, at conv1.weight[2] by convolution in conv1 ({RESNET}:92)",
    ]
    (part,) = CONV.explain("conv2.weight", 0).parts
    assert part.pin == SlotPin("convolution_1[1]", "model output")
    assert part.pin_path == (TIES[-1],)
    # Known from the list of pins alone.
    (part,) = CONV.explain("conv2.weight", 2).parts
    assert (part.pin.reason, part.pin.slot) == ("kernel", "conv2.weight[2]")


NOT_KEPT = "of one group; by which operators was not kept"


def test_without_constraints_it_says_less():
    assert str(BARE.explain("bn1.bias", 0)).splitlines() == [
        "bn1.bias[0] (8) is group conv1:",
        f"  tied to conv1.weight[0]: {NOT_KEPT}",
        f"  tied to bn1.weight[0]: {NOT_KEPT}",
        f"  tied to conv2.weight[1]: {NOT_KEPT}",
    ]
    assert str(BARE.explain("conv2.weight", 0)) == "conv2.weight[0] (4) stays put:\n  the reason was not kept"


def test_paths_do_not_run_through_other_groups():
    # a and b meet in a concatenation, and again in a sum of losses: from a to a the short way is through b.
    spec = PermutationSpec(
        {"a": Group("a", 2), "b": Group("b", 2)},
        {"p": parse_axes("a"), "q": parse_axes("b"), "r": parse_axes("a"), "cat": parse_axes("[a + b]")},
        constraints=Constraints(
            (
                Tie("p[0]", "q[0]", "short"),
                Tie("q[0]", "r[0]", "short"),
                Tie("p[0]", "u[0]", "long"),
                Tie("u[0]", "cat[0]", "long"),
                Tie("cat[0]", "r[0]", "long"),
            )
        ),
    )
    (part,) = spec.explain("p", 0).parts
    assert [(link.slot, {tie.operator for tie in link.ties}) for link in part.links] == [
        ("cat[0]", {"long"}),
        ("r[0]", {"long"}),
    ]


def test_what_stays_put_is_not_explained_by_what_moves():
    # The near pin lies behind an axis that moves whole, so it cannot be why the other one stays.
    spec = PermutationSpec(
        {"a": Group("a", 2), "f": Group("f", 2, fixed=True)},
        {"p": parse_axes("2"), "moves": parse_axes("a"), "named": parse_axes("f")},
        constraints=Constraints(
            (
                Tie("p[0]", "moves[0]"),
                Tie("moves[0]", "near"),
                Tie("p[0]", "named[0]"),
                Tie("named[0]", "u"),
                Tie("u", "far"),
            ),
            (SlotPin("near", "wrong"), SlotPin("far", "right")),
        ),
    )
    for name in ("p", "named"):
        (part,) = spec.explain(name, 0).parts
        assert part.pin == SlotPin("far", "right")


def test_each_factor_is_explained():
    spec = PermutationSpec(
        {"h": Group("h", 2), "d": Group("d", 3, ("h",)), "f": Group("f", 2, fixed=True)},
        {"qkv": parse_axes("([1 + 1] h d f 7)"), "bias": parse_axes("(h d)")},
        pins=(Pin("qkv", 0, 7, "rotary"),),
    )
    assert str(spec.explain("qkv", 0)).splitlines() == [
        "qkv[0] (168) is (2 h d f 7)",
        "  2 (2) stays put:",
        "    the reason was not kept",
        "  h (2) is group h:",
        f"    tied to bias[0]: {NOT_KEPT}",
        "  d (3) is group d:",
        f"    tied to bias[0]: {NOT_KEPT}",
        "  f (2) is f, which stays put and names an axis:",
        "    the reason was not kept",
        "  7 (7) stays put:",
        "    rotary, at qkv[0]",
    ]


def test_an_axis_alone():
    spec = PermutationSpec({"a": Group("a", 3)}, {"w": parse_axes("a 1")})
    assert str(spec.explain("w", 0)) == "w[0] (3) is group a:\n  tied to no other axis of a parameter"
    assert str(spec.explain("w", 1)) == "w[1] (1) stays put:\n  the reason was not kept"


def test_long_explanations_are_cut_when_printed():
    spec = PermutationSpec({"a": Group("a", 3)}, {f"w{i}": parse_axes("a") for i in range(30)})
    explanation = spec.explain("w0", 0)
    assert len(explanation.parts[0].links) == 29
    assert str(explanation).splitlines()[-1] == "  and to 17 more"


def test_what_cannot_be_explained():
    with pytest.raises(SpecError, match="no parameter 'conv1.wieght' in this spec; near: conv1.weight"):
        CONV.explain("conv1.wieght", 0)
    with pytest.raises(SpecError, match=r"'bn1.bias' has 1 dimensions, \(8,\): there is no dimension 1"):
        CONV.explain("bn1.bias", 1)


def test_the_graph():
    graph = CONV.to_networkx()
    assert graph.nodes["conv1.weight[0]"] == {"parameter": "conv1.weight", "dim": 0, "size": 8, "axis": "conv1"}
    assert graph.nodes["x[1]"] == {"pinned": ("model input",)}
    assert graph.number_of_edges() == len(TIES)
    (edge,) = graph.get_edge_data("relu[1]", "conv2.weight[1]").values()
    assert edge == {"operator": "aten.convolution.default", "module": "conv2", "source": f"{RESNET}:96"}
    tied = nx.node_connected_component(graph, "conv1.weight[0]")
    assert {f"{name}[{dim}]" for name, dim in CONV.uses("conv1")} == tied & {
        n for n, d in graph.nodes.items() if "size" in d
    }


def test_the_graph_without_constraints():
    graph = BARE.to_networkx()
    assert {d["group"] for _, _, d in graph.edges(data=True)} == {"conv1"}
    assert nx.node_connected_component(graph, "bn1.bias[0]") == {f"{n}[{d}]" for n, d in BARE.uses("conv1")}
    assert graph.degree("conv1.weight[1]") == 0
