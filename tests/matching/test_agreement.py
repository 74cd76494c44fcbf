"""B is a model too: networks of equal shapes and other structure are refused, by `align` and by `merge`."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.capture.likeness import built_alike
from permgraph.errors import MismatchError
from permgraph.spec.compare import first_difference
from tests.matching.structures import MLP, OTHER_FUNCTION, OTHER_STRUCTURE, QKV, Net, Tied, X, attention, plain

agreement = importlib.import_module("permgraph.matching.agreement")


@pytest.fixture
def inferred(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules whose symmetries were inferred."""
    found: list[nn.Module] = []
    infer = agreement.auto_spec

    def noted(model: nn.Module, *given: Any, **more: Any) -> Any:
        found.append(model)
        return infer(model, *given, **more)

    monkeypatch.setattr(agreement, "auto_spec", noted)
    return found


@pytest.mark.parametrize("kind", OTHER_STRUCTURE)
def test_networks_of_another_structure_are_refused_and_the_difference_is_named(kind: str) -> None:
    (make_a, make_b, x), parameter = OTHER_STRUCTURE[kind]
    a, b = make_a(), make_b()
    shapes = [{name: tensor.shape for name, tensor in net.state_dict().items()} for net in (a, b)]
    assert shapes[0] == shapes[1]
    for one, other in ((a, b), (b, a)):
        with pytest.raises(MismatchError, match="(?s)same symmetries.*'.* in A") as refused:
            pg.align(one, other, example_inputs=(x,))
        assert " B" in str(refused.value)
    with pytest.raises(MismatchError, match=f"'{parameter}'"):
        pg.align(a, b, example_inputs=(x,))
    with pytest.raises(MismatchError, match="model 0 .* and model 2 .*same symmetries"):
        pg.merge([a, copy.deepcopy(a), b], example_inputs=(x,))
    with pytest.raises(MismatchError, match=f"'{parameter}'"):  # also where the spec of A is given
        pg.align(a, b, spec=pg.auto_spec(a, (x,)), example_inputs=(x,))


@pytest.mark.parametrize("tied", [True, False])
def test_a_tie_is_no_other_structure_unless_it_joins_groups(tied: bool) -> None:
    a, b = Tied(tied).eval(), Tied(not tied).eval()
    fit = pg.align(a, b, example_inputs=(X,))
    assert any("ties" in note and "'head.weight'" in note for note in fit.notes)
    with torch.no_grad():
        torch.testing.assert_close(fit.model()(X), b(X))
    with pytest.raises(MismatchError, match="same symmetries.*'(embed|head).weight'"):
        pg.align(Tied(tied, between=True), Tied(not tied, between=True), example_inputs=(X,))


def test_what_is_refused_would_have_been_ruined() -> None:
    """The control: the spec of A, applied to B all the same."""
    (make_a, make_b, x), _ = OTHER_STRUCTURE["2 heads, 8 heads"]
    a, b = make_a().eval(), make_b().eval()
    fit = pg.align(a.state_dict(), b.state_dict(), spec=pg.auto_spec(a, (x,)))
    with torch.no_grad():
        before = b(x)
        b.load_state_dict(fit.state_dict)
        assert (b(x) - before).abs().max() > 0.01


@pytest.mark.parametrize("kind", OTHER_FUNCTION)
def test_networks_of_one_structure_and_another_function_are_aligned_with_a_note(kind: str) -> None:
    (make_a, make_b, x), word = OTHER_FUNCTION[kind]
    a, b = make_a().eval(), make_b().eval()
    fit = pg.align(a, b, example_inputs=(x,))
    (note,) = (note for note in fit.notes if "different functions" in note)
    assert word in note
    with torch.no_grad():
        assert torch.allclose(fit.model()(x), b(x), atol=1e-5)
    assert any(word in note for note in pg.merge([a, b], example_inputs=(x,)).notes)


def test_networks_that_are_built_alike_cost_one_inference(inferred: list[nn.Module]) -> None:
    a, b = (nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 2)) for _ in range(2))
    fit = pg.align(a, b)
    assert inferred == [a]
    assert not fit.notes
    pg.align(a, b, spec=fit.permutation.spec)
    pg.merge([a.state_dict(), b, a], spec=fit.permutation.spec)
    assert inferred == [a, b]


def test_another_class_with_the_same_keys_is_inferred_and_may_agree(inferred: list[nn.Module]) -> None:
    class Other(nn.Sequential):
        pass

    a, b = (kind(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)) for kind in (nn.Sequential, Other))
    assert not pg.align(a, b).notes
    assert inferred == [a, b]


class Held(nn.Module):
    """Holds things of many kinds, of which `forward` could make use."""

    def __init__(self, value: Any = 3, mask: float = 1.0, hook: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.value = value
        self.parts = [self.a, {"b": self.b}]
        self.function = lambda x: x * self.value
        self.register_buffer("mask", torch.full((6,), mask), persistent=False)
        if hook:
            self.a.register_forward_hook(lambda module, given, result: result * 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)) * self.mask)


class Config:
    def __init__(self, heads: int, where: str = "here") -> None:
        self.heads, self._name_or_path, self.again = heads, where, self


SAME: dict[str, tuple[Any, Any]] = {
    "numbers": (3, 3), "texts": ("a", "a"), "not a number": (float("nan"), float("nan")),
    "lists": ([1, (2,)], [1, (2,)]),
    "mappings": ({"a": {1, 2}}, {"a": {1, 2}}), "functions": (torch.relu, torch.relu), "classes": (Config, Config),
    "configurations": (Config(2), Config(2, "there")), "tensors": (torch.ones(3), torch.ones(3)),
}  # fmt: skip
DIFFERENT: dict[str, tuple[Any, Any]] = {
    "numbers": (3, 4), "types": (1, 1.0), "truth": (True, 1), "lists": ([1, 2], [1, 2, 3]), "orders": ([1, 2], [2, 1]),
    "order of keys": ({"a": 1, "b": 2}, {"b": 2, "a": 1}), "functions": (torch.relu, torch.tanh),
    "configurations": (Config(2), Config(4)), "tensors": (torch.ones(3), torch.zeros(3)),
    "what cannot be compared": (object(), object()), "modules of elsewhere": ([nn.Linear(4, 6)], [nn.Linear(4, 6)]),
    "closures": ((lambda n: lambda x: x * n)(1), (lambda n: lambda x: x * n)(2)),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAME)
def test_modules_that_hold_the_same_are_alike(kind: str) -> None:
    one, other = SAME[kind]
    assert built_alike(Held(one), Held(other))


@pytest.mark.parametrize("kind", DIFFERENT)
def test_modules_that_hold_something_else_are_not(kind: str) -> None:
    one, other = DIFFERENT[kind]
    assert not built_alike(Held(one), Held(other))


def test_modules_with_hooks_or_other_constants_are_not_certain_to_be_alike() -> None:
    assert built_alike(Held(), Held())
    assert not built_alike(Held(), Held(mask=2.0))
    assert not built_alike(Held(), Held(hook=True))
    assert not built_alike(Held(hook=True), Held(hook=True))
    tied = Held()
    tied.b.bias = nn.Parameter(torch.zeros(2))
    tied.register_parameter("also", tied.b.bias)
    untied = Held()
    untied.register_parameter("also", nn.Parameter(torch.zeros(2)))
    assert not built_alike(tied, untied)


def test_a_spec_and_a_module_beside_a_state_dict_must_agree() -> None:
    a, b = (Net(QKV, attention(heads)) for heads in (2, 8))
    spec = pg.auto_spec(a, (X,))
    pg.align(a.state_dict(), a, spec=spec, example_inputs=(X,))
    with pytest.raises(MismatchError, match="pass the state dict in place of the module"):
        pg.align(a.state_dict(), b, spec=spec, example_inputs=(X,))


def test_with_a_spec_a_module_that_cannot_be_run_is_noted() -> None:
    class Picky(Net):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape != (3, 8):
                raise ValueError("three rows")
            return super().forward(x)

    a, b = Picky(MLP, plain(torch.relu)), Picky(MLP, plain(torch.tanh))
    x = (torch.randn(3, 8),)
    fit = pg.align(a, b, spec=pg.auto_spec(a, x))
    assert any("is not known, since it cannot be run here" in note for note in fit.notes)
    assert any("aten.tanh" in note for note in pg.align(a, b, example_inputs=x).notes)
    assert pg.verify(b, permutation=fit.permutation, example_inputs=x)


def test_branches_taken_by_values_are_told_from_structure() -> None:
    class Branching(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.a, self.b, self.o = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            nn.init.constant_(self.o.bias, value)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.o(y + self.b(y).relu() if self.o.bias[0].item() > 0 else self.b(y).relu())

    a, b = Branching(1.0), Branching(-1.0)
    assert pg.align(a, Branching(2.0)).notes == ()
    assert pg.verify(b, permutation=pg.align(a, b).permutation), "further passes have seen both branches"
    one, other = (pg.auto_spec(model, vary=False) for model in (a, b))
    assert first_difference(one, other) is not None


def test_names_of_groups_do_not_matter() -> None:
    spec = pg.auto_spec(Net(QKV, attention(4)), (X,))
    other = spec.rename({name: f"g{number}" for number, name in enumerate(spec.groups)})
    assert first_difference(spec, spec) is None
    assert first_difference(spec, other) is None
    assert first_difference(other, spec) is None
