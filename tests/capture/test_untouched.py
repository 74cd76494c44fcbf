"""A capture leaves the caller's model, its tensors and the process as they were."""

from __future__ import annotations

import copy
import dataclasses
import random
import threading
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from permgraph.capture import capture
from permgraph.errors import CaptureError


class Restless(nn.Module):
    """Changes everything that a forward pass can change."""

    def __init__(self, *, fails: bool = False, asks: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(4))
        self.calls: list[Tensor] = []
        self.cache: Tensor | None = None
        self.table = torch.ones(4)
        self.fails, self.asks = fails, asks

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.linear(x)))
        self.count += 1
        self.calls.append(x)
        self.cache = x
        self.table.mul_(2)
        self.linear.weight.data.add_(1)
        x = x + torch.rand(4) + random.random() + float(numpy.random.rand())  # noqa: NPY002
        if self.asks and x.sum().item() > -1e9:
            x = x + 1
        if self.fails:
            raise RuntimeError("no more")
        return x


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: (id(t), t.clone(), t._version) for name, t in model.state_dict(keep_vars=True).items()},
        "modes": [module.training for module in model.modules()],
        "gradients": [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [(list(m._forward_hooks.items()), list(m._forward_pre_hooks.items())) for m in model.modules()],
    }


def process() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": numpy.random.get_state()[1].tolist(),  # noqa: NPY002
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "cudnn": torch.backends.cudnn.enabled,
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "grad": torch.is_grad_enabled(),
        "device": torch.get_default_device(),
        "stack": torch._C._len_torch_dispatch_stack(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("asks", [False, True])
def test_nothing_of_the_callers_changes(fails: bool, asks: bool):
    torch.manual_seed(3)
    model = Restless(fails=fails, asks=asks).train()
    model.norm.eval()
    model.linear.bias.requires_grad_(False)
    model.linear.weight.grad = torch.ones(4, 3)
    model.norm.register_forward_hook(lambda module, args, out: out * 1)
    x = torch.randn(2, 3, requires_grad=True)
    before, around = snapshot(model), process()

    if fails:
        with pytest.raises(CaptureError, match="no more"):
            capture(model, (x,))
    else:
        captured = capture(model, (x,))
        assert captured.mode == ("real" if asks else "fake")
        assert "native_dropout" not in {str(node.target) for node in captured.graph.nodes}, "dropout is off"

    assert same(before, snapshot(model))
    assert same(around, process())
    assert model.calls == []
    assert model.cache is None
    assert torch.equal(model.table, torch.ones(4))
    assert x.grad is None


def test_modes_are_kept_while_the_copy_evaluates():
    modes: list[bool] = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            modes.append(self.training)
            return x + 1

    model = Watch().train()
    capture(model, (torch.zeros(2),))
    assert modes == [False]
    assert model.training


def test_the_copy_follows_lists_bound_methods_and_shared_modules():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.plain = [nn.Linear(3, 3)]  # not registered, hence not in the state dict
            self.method = self.inner.forward
            self.again = self.inner

        def forward(self, x: Tensor) -> Tensor:
            return self.method(self.again(x)) + self.plain[0](x)

    captured = capture(Model(), (torch.zeros(2, 3),))
    (weight,) = [node for node in captured.placeholders("parameter") if "inner.weight" in node.meta["names"]]
    assert weight.meta["names"] == ("inner.weight", "again.weight")
    assert len(weight.users) == 2
    assert [node.meta["names"] for node in captured.placeholders("constant")] == [(), ()]


def test_a_model_that_cannot_be_copied_is_run_through_copied_modules():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()
            self.layers = nn.ModuleList([nn.Linear(3, 3), nn.BatchNorm1d(3)])

        def forward(self, x: Tensor) -> Tensor:
            with self.lock:
                self.seen = x
                for layer in self.layers:
                    x = layer(x)
                return x

    model = Model().train()
    with pytest.raises(TypeError):
        copy.deepcopy(model)
    before = snapshot(model)
    captured = capture(model, (torch.zeros(2, 3),))
    assert captured.unused == ("layers.1.num_batches_tracked",)
    assert not hasattr(model, "seen")
    assert same(before, snapshot(model))


def test_a_closure_over_the_original_still_names_its_parameters():
    model = nn.Linear(3, 5)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return x @ model.weight.t() + self.inner(x)

    captured = capture(Outer(), (torch.zeros(2, 3),))
    assert [node.meta["names"] for node in captured.placeholders("parameter")] == [("inner.weight",), ("inner.bias",)]
    assert len(captured.placeholders("parameter")[0].users) == 2
    assert captured.placeholders("constant") == []


def test_weight_and_spectral_norm():
    for wrap in (
        nn.utils.weight_norm,
        parametrizations.weight_norm,
        nn.utils.spectral_norm,
        parametrizations.spectral_norm,
    ):
        model = nn.Sequential(wrap(nn.Linear(3, 5)), nn.ReLU()).train()
        before = snapshot(model)
        captured = capture(model, (torch.zeros(2, 3),))
        assert same(before, snapshot(model)), wrap
        names = [
            name for node in captured.placeholders() for name in node.meta["names"] if node.meta["kind"] != "input"
        ]
        assert set(model.state_dict()) <= set(names)
        assert captured.mode == "fake"


def test_called_under_inference_mode_autocast_and_another_default_device():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    expected = [str(node.target) for node in capture(model, (torch.zeros(2, 3, 4, 4),)).graph.nodes]
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        captured = capture(model, (torch.zeros(2, 3, 4, 4),))
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert [str(node.target) for node in captured.graph.nodes] == expected


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_plain_attributes_that_share_a_parameters_memory(device: str):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(3, 5, bias=False)
            self.same = self.encoder.weight.data
            self.turned = self.encoder.weight.data.t()

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.turned) @ self.same

    with torch.device(device):
        model = Model()
    captured = capture(model, (torch.zeros(2, 3),))
    (weight,) = captured.placeholders("parameter")
    users = [str(node.target) for node in weight.users]
    assert users == ["permgraph.values_leave_torch.default", "aten.mm.default"]


def test_a_closure_over_the_original_does_not_write_to_it():
    model = nn.Linear(3, 5)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            if x.sum().item() == 0:
                model.weight.mul_(0)
            return self.inner(x)

    before = model.weight.detach().clone()
    captured = capture(Outer(), (torch.zeros(2, 3),))
    assert captured.mode == "real"
    assert torch.equal(model.weight, before)


def test_objects_that_a_model_holds_are_not_asked_for_anything() -> None:
    @dataclasses.dataclass
    class Layered:
        size: int = 3

        def __getattribute__(self, name: str) -> Any:
            if name == "size":
                raise ValueError("differs from layer to layer")
            return super().__getattribute__(name)

    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    model.layered = Layered()
    model.things = [Layered(), {"a": Layered()}]
    assert len(capture(model, (torch.zeros(2, 3),)).graph.nodes) == 7
