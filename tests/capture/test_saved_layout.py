"""State dicts in another layout than the module's own: what moves is what is saved, and it must load as it should."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import permgraph as pg

BOTH = math.lgamma(6) + math.lgamma(8)
SQUARE = 2 * math.lgamma(7)
HEADS = math.lgamma(6) + 3 * math.lgamma(8)


def edited(module: nn.Module, *, save: Callable[..., Any] | None, load: Callable[..., Any] | None) -> None:
    """Hooks that edit the state dict, given it and the prefix, on the way out and on the way in."""
    if save is not None:
        module._register_state_dict_hook(lambda m, state, prefix, metadata: save(state, prefix))
    if load is not None:
        module._register_load_state_dict_pre_hook(lambda state, prefix, *rest: load(state, prefix))


class Net(nn.Module):
    """5! for the units of `first`, 7! for those of `second`."""

    def __init__(self, hidden: int = 5, more: int = 7) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, hidden), nn.Linear(hidden, more), nn.Linear(more, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).tanh())


class Product(nn.Module):
    """A square weight used as a product, 6! on each side of it."""

    def __init__(self, rows: int = 6, columns: int = 6) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, rows), nn.Linear(columns, 2)
        self.w = nn.Parameter(torch.randn(rows, columns))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.first(x).relu() @ self.w).relu())


class Projections(nn.Module):
    """Three projections of the units of `first`; each has 7! for its units."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.first, self.fused = nn.Linear(3, 5), fused
        if fused:
            self.projection = nn.Linear(5, 21)
        else:
            self.q, self.k, self.v = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(5, 7)
        self.heads = nn.ModuleList(nn.Linear(7, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        parts = self.projection(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        return sum((head(part.relu()) for head, part in zip(self.heads, parts, strict=True)), torch.zeros(2))


class Own(nn.Linear):
    """A layer that saves its weight turned, by methods of its own."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "turned"] = destination.pop(prefix + "weight").t().contiguous()

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        state[prefix + "weight"] = state.pop(prefix + "turned").t()
        super()._load_from_state_dict(state, prefix, *rest)


class Extra(nn.Module):
    """Scales that are a plain attribute, saved all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 6), nn.Linear(6, 2)
        self.scales = torch.rand(6) + 1

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scales"] = self.scales

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.scales = state.pop(prefix + "scales")
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).relu() * self.scales.to(x))


def turn(contiguous: bool = True, rows: int = 6, columns: int = 6) -> nn.Module:
    model = Product(rows, columns)

    def save(state: Any, prefix: str) -> None:
        turned = state[prefix + "w"].t()
        state[prefix + "w"] = turned.contiguous() if contiguous else turned

    edited(model, save=save, load=lambda state, prefix: state.__setitem__(prefix + "w", state[prefix + "w"].t()))
    return model


def inside(model: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Identity(), model)


def renamed() -> nn.Module:
    model = Net()
    edited(
        model,
        save=lambda state, prefix: state.__setitem__(prefix + "kernel", state.pop(prefix + "second.weight")),
        load=lambda state, prefix: state.__setitem__(prefix + "second.weight", state.pop(prefix + "kernel")),
    )
    return model


def renamed_and_turned() -> nn.Module:
    model = Net(6, 6)
    edited(
        model,
        save=lambda state, prefix: state.__setitem__(prefix + "kernel", state.pop(prefix + "second.weight").t()),
        load=lambda state, prefix: state.__setitem__(prefix + "second.weight", state.pop(prefix + "kernel").t()),
    )
    return model


def saved_as_one() -> nn.Module:
    model = Projections(fused=False)

    def save(state: Any, prefix: str) -> None:
        for kind in ("weight", "bias"):
            state[f"{prefix}qkv.{kind}"] = torch.cat([state.pop(f"{prefix}{name}.{kind}") for name in "qkv"])

    def load(state: Any, prefix: str) -> None:
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", state.pop(f"{prefix}qkv.{kind}").chunk(3), strict=True):
                state[f"{prefix}{name}.{kind}"] = part

    edited(model, save=save, load=load)
    return model


def saved_in_parts() -> nn.Module:
    model = Projections(fused=True)

    def save(state: Any, prefix: str) -> None:
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", state.pop(f"{prefix}projection.{kind}").chunk(3), strict=True):
                state[f"{prefix}{name}.{kind}"] = part

    def load(state: Any, prefix: str) -> None:
        for kind in ("weight", "bias"):
            state[f"{prefix}projection.{kind}"] = torch.cat([state.pop(f"{prefix}{name}.{kind}") for name in "qkv"])

    edited(model, save=save, load=load)
    return model


def own_methods() -> nn.Module:
    model = Net(6, 6)
    model.second = Own(6, 6)
    return model


def cloned() -> nn.Module:
    model = Net()
    edited(model, save=lambda state, prefix: state.update({k: v.detach().clone() for k, v in state.items()}), load=None)
    return model


def in_half_precision() -> nn.Module:
    model = Net()
    edited(model, save=lambda state, prefix: state.update({k: v.bfloat16() for k, v in state.items()}), load=None)
    return model


def reversed_in_blocks() -> nn.Module:
    """The second half of the units is saved first: no axis of it is one of `head`, so each half moves by itself."""
    model = Net(5, 6)

    def swap(state: Any, prefix: str) -> None:
        for name in ("second.weight", "second.bias"):
            state[prefix + name] = torch.cat(state[prefix + name].chunk(2)[::-1])

    edited(model, save=swap, load=swap)
    return model


def old_names_load_too() -> nn.Module:
    model = Net()

    def load(state: Any, prefix: str) -> None:
        if prefix + "old" in state:
            state[prefix + "second.weight"] = state.pop(prefix + "old")

    edited(model, save=None, load=load)
    return model


def tied() -> nn.Module:
    model = Net(6, 6)
    model.second.weight = nn.Parameter(torch.randn(6, 6))
    model.third = nn.Linear(6, 6)
    model.third.weight = model.second.weight
    model.head = nn.Sequential(model.third, nn.Linear(6, 2))
    del model.third

    def both(state: Any, prefix: str) -> None:
        for name in ("second.weight", "head.0.weight"):
            state[prefix + name] = state[prefix + name].t()

    edited(model, save=both, load=both)
    return model


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).transpose(-1, -2)


def parametrized() -> nn.Module:
    model = Product()
    parametrize.register_parametrization(model, "w", Symmetric())
    return model


def normalised(by: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = Net()
    by(model.second)
    return model


LAYOUTS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "turned": (turn, SQUARE),
    "turned, a view": (lambda: turn(contiguous=False), SQUARE),
    "turned, not square": (lambda: turn(rows=5, columns=7), BOTH),
    "turned, inside": (lambda: inside(turn()), SQUARE),
    "turned, in a wrapper": (lambda: nn.DataParallel(turn()), SQUARE),
    "renamed": (renamed, BOTH),
    "renamed and turned": (renamed_and_turned, SQUARE),
    "fused on saving": (saved_as_one, HEADS),
    "split on saving": (saved_in_parts, HEADS),
    "by own methods": (own_methods, SQUARE),
    "a plain attribute": (Extra, math.lgamma(7)),
    "cloned": (cloned, BOTH),
    "in half precision": (in_half_precision, BOTH),
    "old names": (old_names_load_too, BOTH),
    "halves swapped": (reversed_in_blocks, math.lgamma(6) + 2 * math.lgamma(4)),
    "tied": (tied, math.lgamma(7)),
    "parametrized": (parametrized, 0.0),
    "weight norm": (lambda: normalised(parametrizations.weight_norm), BOTH),
    "weight norm, old": (lambda: normalised(nn.utils.weight_norm), BOTH),
}


def error(model: nn.Module, spec: pg.PermutationSpec, x: Tensor) -> float:
    """The relative change of the outputs when a random element of the group goes through saving and loading."""
    model, x = model.double().eval(), x.double()
    with torch.no_grad():
        model.load_state_dict(model.state_dict())
        before = model(x)
        saved = model.state_dict()
        moved = spec.random(seed=2, every_group=True).apply({k: v.clone() for k, v in saved.items()})
        assert not spec.moving or any(not torch.equal(saved[name], moved[name]) for name in saved)
        model.load_state_dict(moved)
        return float((model(x) - before).abs().max() / before.abs().max())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_saved_is_what_moves(name: str) -> None:
    make, expected = LAYOUTS[name]
    torch.manual_seed(0)
    model = make()
    x = torch.randn(4, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    spec = pg.auto_spec(model, (x,))
    assert spec.log_order() == pytest.approx(expected)
    assert not any("load" in note for note in spec.notes)
    spec.check(model.state_dict())
    assert pg.verify(model, spec, (x,)).passed
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert error(model, spec, x) < 1e-9


def not_turned_back() -> nn.Module:
    model = Product()
    edited(model, save=lambda state, prefix: state.__setitem__(prefix + "w", state[prefix + "w"].t()), load=None)
    return model


def turned_on_loading_only() -> nn.Module:
    model = Product()
    edited(model, save=None, load=lambda state, prefix: state.__setitem__(prefix + "w", state[prefix + "w"].t()))
    return model


def lost_on_saving() -> nn.Module:
    model = Product()
    edited(model, save=lambda state, prefix: state.__setitem__(prefix + "w", state[prefix + "w"].sum(0)), load=None)
    return model


class Pair(Product):
    """Two weights of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn_like(self.w))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * self.v.sum()


def exchanged_on_loading() -> nn.Module:
    def load(state: dict[str, Tensor], prefix: str) -> None:
        state[prefix + "w"], state[prefix + "v"] = state[prefix + "v"], state[prefix + "w"]

    model = Pair()
    edited(model, save=None, load=load)
    return model


@pytest.mark.parametrize("make", [exchanged_on_loading, not_turned_back, turned_on_loading_only, lost_on_saving])
def test_what_does_not_come_back_stays_put_and_is_named(make: Callable[[], nn.Module]) -> None:
    """What is loaded is another model then; nothing that touches the weight may be moved, and a note says why."""
    model = make()
    spec = pg.auto_spec(model, (torch.randn(4, 3),))
    assert spec.log_order() == 0
    assert any("w" in note and "load" in note for note in spec.notes)
    spec.check(model.state_dict())


def test_models_without_memory_have_a_layout_too() -> None:
    with torch.device("meta"):
        model = turn()
    spec = pg.auto_spec(model, (torch.randn(4, 3),))
    assert spec.log_order() == pytest.approx(SQUARE)
    assert spec.axes == pg.auto_spec(turn(), (torch.randn(4, 3),)).axes


def test_on_real_tensors() -> None:
    model = turn()
    model.first.register_forward_hook(lambda module, args, out: out if out.sum().item() < 1e9 else -out)
    x = torch.randn(4, 3)
    spec = pg.auto_spec(model, (x,))
    assert spec.log_order() == pytest.approx(SQUARE)
    assert error(model, spec, x) < 1e-9
