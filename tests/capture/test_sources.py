"""What can be captured: meta models, traced graphs, wrappers; and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from permgraph.capture import Captured, capture
from permgraph.errors import CaptureError


def names(captured: Captured, kind: str = "parameter") -> list[tuple[str, ...]]:
    return [node.meta["names"] for node in captured.placeholders(kind)]


def targets(captured: Captured) -> list[str]:
    return [str(node.target) for node in captured.graph.nodes if node.op == "call_function"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.second = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.second(x)


def test_a_meta_model_gives_the_same_graph():
    with torch.device("meta"):
        model = Net()
    x = torch.zeros(2, 3)
    assert str(capture(model, (x,)).graph) == str(capture(Net(), (x,)).graph)
    assert str(capture(model, (x.to("meta"),)).graph) == str(capture(Net(), (x,)).graph)


def test_a_meta_model_allocates_no_weights():
    with torch.device("meta"):
        model = nn.Linear(2**17, 2**17)  # 64 GiB
    captured = capture(model, (torch.zeros(2, 2**17, device="meta"),))
    assert targets(captured) == ["aten.t.default", "aten.addmm.default"]


def test_stale_device_attributes_do_no_harm():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.device = self.linear.weight.device

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + torch.ones(4, device=self.device)

    with torch.device("meta"):
        model = Model()
    assert capture(model, (torch.zeros(2, 3),)).mode == "fake"


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) if x.sum() > 0 else self.right(x)


def test_a_branch_on_data_is_taken_on_real_tensors():
    left = capture(Branch(), (torch.ones(2, 3),))
    assert left.mode == "real"
    assert left.fallback_reason is not None
    assert "_local_scalar_dense" in left.fallback_reason
    assert left.unused == ("right.weight", "right.bias")
    assert capture(Branch(), (-torch.ones(2, 3),)).unused == ("left.weight", "left.bias")
    assert {node.meta["val"].device.type for node in left.placeholders()} == {"meta"}, "no memory is kept"


def test_the_fallback_makes_up_meta_weights():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            out = self.net(x)
            assert torch.isfinite(out).all().item()
            return out

    with torch.device("meta"):
        model = Model()
    captured = capture(model, (torch.ones(2, 3),))
    assert captured.mode == "real"
    assert all(p.is_meta for p in model.parameters())


def test_shapes_that_depend_on_data():
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > 0] * 2

    captured = capture(Model(), (torch.tensor([1.0, -1.0, 2.0]),))
    assert captured.mode == "real"
    assert tuple(list(captured.graph.nodes)[-1].args[0][0].meta["val"].shape) == (2,)


def test_constants_are_read_without_a_fallback():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("widths", torch.tensor([2, 3]), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            sizes = torch.as_tensor([[2, 3], [4, 5]]).prod(1)
            sizes[0] += 1
            pair = torch.empty(2)
            pair[0], pair[1] = 4, 5
            assert (pair + pair).tolist() == [8, 10]
            first, second = x.split([*self.widths.tolist()], dim=1)
            for i in torch.arange(4).view(2, 2).flip(0).flatten():
                first = first * float(i)
            hit = torch.tensor([0.0, 1.0, 1.0]).nonzero()
            return first.sum() + second.sum() * int(sizes[0]) + len(hit)

    captured = capture(Model(), (torch.zeros(2, 5),))
    assert captured.mode == "fake"
    mul = [node for node in captured.graph.nodes if str(node.target) == "aten.mul.Tensor"]
    assert [node.args[1] for node in mul] == [2.0, 3.0, 0.0, 1.0, 7]


def test_a_constant_overwritten_with_unknown_values_is_unknown():
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            table = torch.zeros(2, 3)
            row = table[1]
            row.copy_(x)
            return x * float(table[1, 0])

    captured = capture(Model(), (torch.tensor([5.0, 6.0, 7.0]),))
    assert captured.mode == "real"
    assert [node.args[1] for node in captured.graph.nodes if str(node.target) == "aten.mul.Tensor"] == [5.0]


def test_graph_modules():
    traced = torch.fx.symbolic_trace(Net())
    captured = capture(traced, (torch.zeros(2, 3),))
    assert names(captured) == names(capture(Net(), (torch.zeros(2, 3),)))
    assert targets(captured) == targets(capture(Net(), (torch.zeros(2, 3),)))


def test_exported_programs_bring_their_inputs_and_names():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.head = nn.Linear(4, 5, bias=False)
            self.back = nn.Linear(5, 4, bias=False)
            self.back.weight = nn.Parameter(torch.randn(4, 5))
            self.copy = self.head

        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return self.copy(self.back(self.head(self.net(x)))) * scale

    model = Tied().eval()
    program = torch.export.export(model, (torch.zeros(2, 3),), {"scale": torch.ones(5)})
    captured = capture(program)
    assert captured.inputs.finder == "exported program"
    found = {name for group in names(captured) + names(captured, "buffer") for name in group}
    assert found <= set(model.state_dict())
    assert {"net.first.weight", "net.norm.running_mean", "back.weight"} <= found
    assert captured.mode == "fake"

    places = {node.meta["module"] for node in captured.graph.nodes if str(node.target) == "aten.addmm.default"}
    assert places == {"net.first", "net.second"}
    sources = {node.meta["source"] for node in captured.graph.nodes if str(node.target) == "aten.relu.default"}
    line = Net.forward.__code__.co_firstlineno + 1
    assert [source.rpartition("/")[2] for source in sources] == [f"test_sources.py:{line}"]


def test_exported_graph_modules_bring_their_inputs():
    program = torch.export.export(Net().eval(), (torch.zeros(2, 3),))
    captured = capture(program.module())
    assert captured.inputs.finder == "placeholders"
    assert [tuple(t.shape) for t in captured.inputs.args] == [(2, 3)]


def test_wrappers_keep_the_outer_names():
    model = Net()
    assert names(capture(nn.DataParallel(model), (torch.zeros(2, 3),)))[0] == ("module.first.weight",)
    compiled = torch.compile(model)
    captured = capture(compiled, (torch.zeros(2, 3),))
    assert names(captured)[0] == ("_orig_mod.first.weight",)
    assert targets(captured) == targets(capture(model, (torch.zeros(2, 3),)))


def test_a_compiled_submodule_runs_uncompiled():
    model = nn.Sequential(torch.compile(nn.Linear(3, 4)), nn.ReLU())
    captured = capture(model, (torch.zeros(2, 3),))
    assert targets(captured) == ["aten.t.default", "aten.addmm.default", "aten.relu.default"]
    assert names(captured) == [("0._orig_mod.weight",), ("0._orig_mod.bias",)]


def test_what_cannot_be_captured_is_refused_with_a_reason():
    scripted = torch.jit.trace(nn.Linear(3, 4), torch.zeros(2, 3))
    with pytest.raises(CaptureError, match="TorchScript"):
        capture(scripted, (torch.zeros(2, 3),))
    with pytest.raises(CaptureError, match="0 is a TorchScript"):
        capture(nn.Sequential(scripted), (torch.zeros(2, 3),))
    with pytest.raises(CaptureError, match="weight is not initialised"):
        capture(nn.LazyLinear(3), (torch.zeros(2, 3),))
    with pytest.raises(CaptureError, match="expected an nn.Module"):
        capture("resnet18")  # type: ignore[arg-type]


def test_the_error_on_given_inputs_is_chained():
    with pytest.raises(CaptureError, match=r"Linear does not run on the inputs given, \(float32\[2, 7\]\)") as caught:
        capture(nn.Linear(3, 4), (torch.zeros(2, 7),))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_values_that_leave_torch_are_marked():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.from_numpy(self.first(x).detach().numpy() * 2))

    captured = capture(Model(), (torch.zeros(2, 3),))
    assert captured.mode == "real"
    (leaves,) = [node for node in captured.graph.nodes if "values_leave_torch" in str(node.target)]
    assert tuple(leaves.args[0].meta["val"].shape) == (2, 5)
    assert {node.meta["source"].rpartition("/")[2] for node in captured.graph.nodes if node.op == "call_function"} == {
        f"test_sources.py:{Model.forward.__code__.co_firstlineno + 1}"
    }


def test_sparse_constants():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 5)
            self.adjacency = torch.eye(2).to_sparse()

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.adjacency, self.linear(x))

    captured = capture(Model(), (torch.zeros(2, 3),))
    assert captured.mode == "fake"
    assert tuple(list(captured.graph.nodes)[-1].args[0][0].meta["val"].shape) == (2, 5)
