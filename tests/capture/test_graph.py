"""What the captured graph says: structure, identity, names, places."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx, nn

from permgraph.capture import Captured, capture
from permgraph.errors import CaptureError


def targets(captured: Captured) -> list[str]:
    return [str(node.target) for node in captured.graph.nodes if node.op == "call_function"]


def output_nodes(captured: Captured) -> list[fx.Node]:
    (output,) = [node for node in captured.graph.nodes if node.op == "output"]
    return list(output.args[0])


def find(captured: Captured, target: str) -> fx.Node:
    (node,) = [node for node in captured.graph.nodes if str(node.target) == target]
    return node


def replay(captured: Captured, model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Runs the graph with the model's tensors: the strongest evidence that it says what the model did."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    given = iter(inputs)
    arguments = []
    for node in captured.placeholders():
        if node.meta["kind"] == "input":
            arguments.append(next(given))
        elif "real" in node.meta:
            arguments.append(node.meta["real"])
        else:
            arguments.append(state[node.meta["names"][0]].detach().clone())
    with torch.no_grad():
        return fx.Interpreter(fx.GraphModule({}, captured.graph)).run(*arguments)


def test_linear_is_one_matrix_product():
    captured = capture(nn.Linear(3, 5), (torch.zeros(2, 3),))
    assert targets(captured) == ["aten.t.default", "aten.addmm.default"]
    assert captured.model_class == "Linear"
    assert captured.mode == "fake"
    assert captured.fallback_reason is None
    assert captured.inputs.finder == "given"
    assert captured.unused == ()
    assert [(node.meta["kind"], node.meta["names"]) for node in captured.placeholders()] == [
        ("parameter", ("weight",)),
        ("parameter", ("bias",)),
        ("input", ("args[0]",)),
    ]
    (result,) = output_nodes(captured)
    assert tuple(result.meta["val"].shape) == (2, 5)
    assert "Linear" in repr(captured)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        view = y.narrow(1, 0, 2)
        same = y.add_(1)
        view.mul_(3)
        y.unsqueeze_(0)
        return same - view.sum()


def test_in_place_results_take_the_place_of_their_tensor():
    captured = capture(InPlace(), (torch.zeros(2, 3),))
    mul, add_, unsqueeze_ = (
        find(captured, f"aten.{name}") for name in ("mul.Tensor", "add_.Tensor", "unsqueeze_.default")
    )
    part = find(captured, "aten.slice.Tensor")
    assert part.args[0] is mul, "the view was taken before the addition"
    assert add_.args[0] is mul
    assert unsqueeze_.args[0] is add_
    assert find(captured, "aten.sub.Tensor").args[0] is unsqueeze_, "`same` and `y` are one object"
    assert find(captured, "aten.sum.default").args[0] is find(captured, "aten.mul_.Tensor")
    assert tuple(mul.meta["val"].shape) == (2, 3), "an in-place view must not rewrite the shape of what came before"
    assert tuple(add_.meta["val"].shape) == (2, 3)
    assert tuple(unsqueeze_.meta["val"].shape) == (1, 2, 3)


@pytest.mark.parametrize("mode", ["fake", "real"])
def test_the_graph_computes_what_the_model_computes(mode: str):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.rnn = nn.GRU(8, 5, batch_first=True, bidirectional=True)
            self.head = nn.Linear(10, 4)
            self.register_buffer("scale", torch.tensor(2.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu_(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
            if mode == "real":
                assert x.sum().item() != 1.5
            x = x + self.attention(x, x, x)[0] * self.scale
            first, second = self.rnn(x)[0].chunk(2, dim=-1)
            return self.head(torch.cat([second, first], -1)) + torch.tensor([1.0, 2.0, 3.0, 4.0])

    torch.manual_seed(0)
    model = Model().eval()
    x = torch.randn(2, 3, 4, 4)
    captured = capture(model, (x,))
    assert captured.mode == mode
    (out,) = replay(captured, model, x)
    assert torch.allclose(out, model(x), atol=1e-6)


def test_several_results_arrive_through_getitem():
    class Model(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            values, indices = x.topk(2)
            first, _ = x.chunk(2, -1)
            return values * indices, first

    captured = capture(Model(), torch.zeros(2, 6))
    top = find(captured, "aten.topk.default")
    assert [tuple(val.shape) for val in top.meta["val"]] == [(2, 2), (2, 2)]
    parts = [node for node in captured.graph.nodes if node.target is operator.getitem and node.args[0] is top]
    assert [node.args[1] for node in parts] == [0, 1]
    assert parts[1].meta["val"].dtype == torch.int64
    assert find(captured, "aten.mul.Tensor").args == tuple(parts)


def test_tied_parameters_are_one_placeholder_with_every_name():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.copy = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight
            self.copy.weight = nn.Parameter(self.embed.weight.data)  # another object, the same memory

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            return self.head(x) + self.copy(x)

    captured = capture(Model(), (torch.zeros(2, 5, dtype=torch.int64),))
    (tied,) = captured.placeholders("parameter")
    assert tied.meta["names"] == ("embed.weight", "head.weight", "copy.weight")
    assert len(tied.users) == 3


def test_views_of_one_memory_with_other_shapes_are_separate():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.randn(12)
            self.first = nn.Parameter(flat[:6].view(2, 3))
            self.second = nn.Parameter(flat[6:].view(2, 3))
            self.third = nn.Parameter(flat[:6].view(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.first.T @ self.second @ self.third

    captured = capture(Model(), (torch.zeros(5, 3),))
    assert [node.meta["names"] for node in captured.placeholders("parameter")] == [("first",), ("second",), ("third",)]


def test_kinds_of_state_and_what_is_unused():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Parameter(torch.ones(3))
            self.idle = nn.Parameter(torch.ones(4))
            self.register_buffer("kept", torch.ones(3))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
            self.register_buffer("angles", torch.arange(3.0), persistent=False)
            self.table = torch.full((3,), 2.0)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.used + self.kept - self.angles + self.table + torch.tensor([1.0, 2.0, 3.0])

    captured = capture(Model(), (torch.zeros(2, 3),))
    assert [(node.meta["kind"], node.meta["names"]) for node in captured.placeholders()] == [
        ("parameter", ("used",)),
        ("parameter", ("idle",)),
        ("buffer", ("kept",)),
        ("buffer", ("steps",)),
        ("constant", ("angles",)),
        ("input", ("args[0]",)),
        ("constant", ("table",)),
        ("constant", ()),
    ]
    assert captured.unused == ("idle", "steps")
    angles, table, lifted = captured.placeholders("constant")
    assert angles.meta["real"].tolist() == [0, 1, 2]
    assert table.meta["real"].tolist() == [2, 2, 2]
    assert lifted.meta["real"].tolist() == [1, 2, 3]


def test_nodes_know_their_module_and_their_line():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def half(self, x: Tensor) -> Tensor:
            return x / 2

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).relu()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            x = self.blocks[1].half(x)
            return x.exp()

    captured = capture(Model(), (torch.zeros(2, 3),))
    places = {
        str(node.target): (node.meta["module"], node.meta["source"])
        for node in captured.graph.nodes
        if node.op == "call_function"
    }
    assert places["aten.addmm.default"][0] == "blocks.0.linear"
    assert places["aten.relu.default"][0] == "blocks.0"
    assert places["aten.div.Tensor"][0] == "blocks.1", "a method counts as its module, called or not"
    assert places["aten.exp.default"][0] == ""

    def line(method: object) -> int:
        return method.__code__.co_firstlineno  # type: ignore[attr-defined]

    file, _, number = places["aten.exp.default"][1].rpartition(":")
    assert file.endswith("test_graph.py")
    assert not file.startswith("/")
    assert int(number) == line(Model.forward) + 3
    assert places["aten.addmm.default"][1].endswith(f"test_graph.py:{line(Block.forward) + 1}")


def test_a_model_of_torch_layers_alone_has_no_source():
    captured = capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), (torch.zeros(2, 3),))
    assert {node.meta["source"] for node in captured.graph.nodes} == {None}
    assert [node.meta["module"] for node in captured.graph.nodes if node.op == "call_function"] == ["0", "0", "1"]


@dataclass
class Answer:
    logits: Tensor
    extra: dict[str, list[Tensor]]
    nothing: None = None


def test_outputs_are_flattened():
    class Model(nn.Module):
        def forward(self, x: Tensor) -> object:
            return Answer(x + 1, {"a": [x * 2], "b": [x - 3]}), [x, (x / 4,)], "text"

    captured = capture(Model(), (torch.zeros(2),))
    assert [node.meta.get("names") or str(node.target) for node in output_nodes(captured)] == [
        "aten.add.Tensor",
        "aten.mul.Tensor",
        "aten.sub.Tensor",
        ("args[0]",),
        "aten.div.Tensor",
    ]


def test_no_tensor_in_the_output_is_an_error():
    class Model(nn.Module):
        def forward(self, x: Tensor) -> int:
            return 3

    with pytest.raises(CaptureError, match="returned no tensor"):
        capture(Model(), (torch.zeros(2),))


def test_keyword_and_nested_inputs():
    class Model(nn.Module):
        def forward(self, x: Tensor, *, batch: dict[str, list[Tensor]], flag: bool) -> Tensor:
            return x + batch["a"][0] if flag else x

    captured = capture(Model(), (torch.zeros(2),), {"batch": {"a": [torch.zeros(2)]}, "flag": True})
    assert [node.meta["names"] for node in captured.placeholders("input")] == [
        ("args[0]",),
        ("kwargs['batch']['a'][0]",),
    ]
    assert targets(captured) == ["aten.add.Tensor"]


def test_attention_and_recurrence_show_their_structure():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    found = set(targets(capture(encoder, (torch.zeros(2, 5, 8),))))
    assert "aten.bmm.default" in found
    assert any("softmax" in name for name in found)
    assert not any("transformer" in name or "scaled_dot_product" in name or "nested" in name for name in found)

    lstm = nn.LSTM(3, 5, num_layers=2, bidirectional=True, proj_size=4)
    captured = capture(lstm, (torch.zeros(7, 2, 3),))
    assert not any("lstm" in name or "rnn" in name for name in targets(captured))
    assert captured.unused == ()
    for layer in (nn.GRU(3, 5), nn.RNN(3, 5)):
        assert not any("gru" in name or "rnn" in name for name in targets(capture(layer, (torch.zeros(7, 2, 3),))))


def test_attention_kernels_are_decomposed():
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True)

    found = targets(capture(Model(), (torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 4))))
    assert found.count("aten.bmm.default") == 2


def test_dtypes_are_kept():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).to(torch.bfloat16)
    captured = capture(model, (torch.zeros(2, 3, dtype=torch.bfloat16),))
    assert {node.meta["val"].dtype for node in captured.placeholders()} == {torch.bfloat16}
    assert output_nodes(captured)[0].meta["val"].dtype == torch.bfloat16


def test_limits():
    class Loop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(100):
                x = x + 1
            return x

    with pytest.raises(CaptureError, match="max_nodes=50"):
        capture(Loop(), (torch.zeros(2),), max_nodes=50)
    with pytest.raises(CaptureError, match="max_seconds"):
        capture(Loop(), (torch.zeros(2),), max_seconds=-1.0)
    assert len(targets(capture(Loop(), (torch.zeros(2),), max_nodes=100))) == 100


@pytest.mark.parametrize("asks", [False, True])
def test_assigning_data_moves_a_parameter_to_another_node(asks: bool):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            if asks:
                x = x * bool(x.sum() == 0)
            x = x @ self.weight
            x = (x + 1).data @ self.weight.data
            self.weight.data = self.weight.data * 2
            return x @ self.weight

    captured = capture(Model(), (torch.zeros(2, 3),))
    assert captured.mode == ("real" if asks else "fake")
    assert captured.placeholders("constant") == []
    (weight,) = captured.placeholders("parameter")
    first, second, third = (node for node in captured.graph.nodes if str(node.target) == "aten.mm.default")
    assert first.args[1] is weight
    assert second.args[1].args == (weight,), "reading `.data` detaches"
    assert str(third.args[1].target) == "aten.mul.Tensor"
    assert third.args[1].args[0].args == (weight,)
