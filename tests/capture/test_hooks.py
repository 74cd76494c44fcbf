"""Hooks and closures that write to the model, or to something outside of it, while a copy of the model runs."""

from __future__ import annotations

import collections
import contextvars
import copy
import functools
import gc
import math
import queue
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import permgraph as pg
from permgraph.capture.following_copy import Memo, copy_following

EXPECTED = math.lgamma(6) + math.lgamma(8)
"""Each tie is found: 5! for the units of `first`, 7! for those of `second`, which its head reads as a feature."""


class Tapped(nn.Module):
    """`second` runs for its features alone, which something else has to bring to the head; `read` is how."""

    read: Callable[[Tapped], Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 5), nn.Linear(5, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.second(self.first(x).relu())
        return self.head(type(self).read(self).relu())


class TappedBesides(Tapped):
    """The same, and the features go on in the usual way as well: a stale one is no error, but a missing tie."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        usual = self.other(self.second(self.first(x).relu()).tanh())
        return usual + self.head(type(self).read(self).relu())


class Store:
    """An object that holds features, and perhaps the model."""

    latest: Tensor

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model, self.kept = model, []  # type: ignore[var-annotated]
        self.lock = threading.Lock()

    def hook(self, module: nn.Module, args: Any, out: Tensor) -> None:
        with self.lock:
            self.kept.append(out)

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.kept[:] = [out]


Tap = Callable[[Tapped], tuple[Callable[[Any], Tensor], Any]]
TAPS: dict[str, Tap] = {}
GLOBAL: dict[str, Tensor] = {}
LISTED: list[Tensor] = []
MODEL: list[Tapped] = []
variable: Any = None


def tap(function: Tap) -> Tap:
    """Enters a way to bring features along; it returns how the model reads them, and what holds them then."""
    TAPS[function.__name__] = function
    return function


@tap
def attribute_by_closure(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        model.feature = out

    model.second.register_forward_hook(hook)
    return lambda m: m.feature, vars(model)


@tap
def attribute_by_lambda(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    model.second.register_forward_hook(lambda module, args, out: setattr(model, "feature", out))
    return lambda m: m.feature, vars(model)


@tap
def list_beside_the_model(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    kept: list[Tensor] = []
    model.second.register_forward_hook(lambda module, args, out: kept.append(out))
    return lambda m: kept[-1], kept


@tap
def list_on_the_model_and_in_the_hook(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    kept: list[Tensor] = []
    model.kept = kept
    model.second.register_forward_hook(lambda module, args, out: kept.append(out))
    return lambda m: m.kept[-1], kept


@tap
def a_queue(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    kept: collections.deque[Tensor] = collections.deque(maxlen=3)
    model.kept = kept
    model.second.register_forward_hook(lambda module, args, out: kept.append(out))
    return lambda m: m.kept[-1], kept


@tap
def dictionary_by_module(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    kept: dict[nn.Module, Tensor] = {}
    model.second.register_forward_hook(lambda module, args, out: kept.__setitem__(module, out))
    return lambda m: kept[m.second], kept


@tap
def variable_of_a_function(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    kept: Any = None

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        nonlocal kept
        kept = out

    def read(m: Any) -> Tensor:
        assert kept is not None
        return kept

    model.second.register_forward_hook(hook)
    return read, read.__closure__


@tap
def nested_closures(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    def outer(name: str) -> Callable[..., None]:
        def write(value: Tensor) -> None:
            setattr(model, name, value)

        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            write(out)

        return hook

    model.second.register_forward_hook(outer("feature"))
    return lambda m: m.feature, vars(model)


@tap
def default_arguments(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    def hook(module: nn.Module, args: Any, out: Tensor, *, into: Any = model) -> None:
        into.feature = out

    def also(module: nn.Module, args: Any, out: Tensor, into: Any = model) -> None:
        assert into.feature is out

    model.second.register_forward_hook(hook)
    model.second.register_forward_hook(also)
    return lambda m: m.feature, vars(model)


@tap
def partial_functions(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    def hook(kept: dict[str, Tensor], name: str, module: nn.Module, args: Any, out: Tensor) -> None:
        kept[name] = out

    kept: dict[str, Tensor] = {}
    model.second.register_forward_hook(functools.partial(hook, kept, "feature"))
    return lambda m: kept["feature"], kept


@tap
def partial_of_a_global_function(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    model.second.register_forward_hook(functools.partial(write_to, GLOBAL))
    return lambda m: GLOBAL["feature"], GLOBAL


def write_to(kept: dict[str, Tensor], module: nn.Module, args: Any, out: Tensor) -> None:
    kept["feature"] = out


@tap
def a_global_dictionary(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    model.second.register_forward_hook(write_to_global)
    return lambda m: GLOBAL["feature"], GLOBAL


def write_to_global(module: nn.Module, args: Any, out: Tensor) -> None:
    GLOBAL["feature"] = out


@tap
def a_global_variable(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    model.second.register_forward_hook(set_variable)
    return lambda m: variable, globals()


def set_variable(module: nn.Module, args: Any, out: Tensor) -> None:
    global variable
    variable = out


@tap
def a_global_that_holds_the_model(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    MODEL[:] = [model]
    model.second.register_forward_hook(write_to_global_model)
    return lambda m: m.feature, vars(model)


def write_to_global_model(module: nn.Module, args: Any, out: Tensor) -> None:
    MODEL[0].feature = out


@tap
def an_object_of_the_model(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    model.store = Store(model)
    model.second.register_forward_hook(model.store.hook)
    return lambda m: m.store.kept[-1], model.store.kept


@tap
def an_object_outside(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    store = Store()
    model.second.register_forward_hook(store.hook)
    return lambda m: store.kept[-1], store.kept


@tap
def an_object_that_is_called(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    store = Store(model)
    model.second.register_forward_hook(store)
    return lambda m: store.kept[-1], store.kept


@tap
def an_attribute_of_a_class(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    class Kept:
        latest: Any = None

    model.second.register_forward_hook(lambda module, args, out: setattr(Kept, "latest", out))
    return lambda m: Kept.latest, vars(Kept)


@tap
def a_method_of_the_model(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    def keep(self: Tapped, module: nn.Module, args: Any, out: Tensor) -> None:
        self.feature = out

    model.second.register_forward_hook(types.MethodType(keep, model))
    return lambda m: m.feature, vars(model)


@tap
def a_weak_reference(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    reference = weakref.ref(model)

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        reference().feature = out  # type: ignore[union-attr]

    model.second.register_forward_hook(hook)
    return lambda m: m.feature, vars(model)


@tap
def a_weak_proxy(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    object.__setattr__(model.second, "parent", weakref.proxy(model))
    model.second.register_forward_hook(lambda module, args, out: setattr(module.parent, "feature", out))
    return lambda m: m.feature, vars(model)


@tap
def a_weak_dictionary(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    kept: weakref.WeakKeyDictionary[nn.Module, list[Tensor]] = weakref.WeakKeyDictionary({model.second: []})
    model.second.register_forward_hook(lambda module, args, out: kept[module].append(out))
    return lambda m: kept[m.second][-1], kept[model.second]


@tap
def a_context_variable(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        CONTEXT.set(out)

    model.second.register_forward_hook(hook)
    return lambda m: CONTEXT.get(), [CONTEXT.get(None)]


CONTEXT: contextvars.ContextVar[Any] = contextvars.ContextVar("feature")


@tap
def a_queue_with_locks(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    model.queue = queue.Queue()
    model.second.register_forward_hook(lambda module, args, out: model.queue.put(out))
    return lambda m: m.queue.get(), model.queue.queue


@tap
def a_global_object(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    SPACE.feature = None
    model.second.register_forward_hook(write_to_space)
    return lambda m: SPACE.feature, vars(SPACE)


SPACE = types.SimpleNamespace()


def write_to_space(module: nn.Module, args: Any, out: Tensor) -> None:
    SPACE.feature = out


@tap
def a_dictionary_by_identity(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    kept: dict[int, Tensor] = {}
    model.second.register_forward_hook(lambda module, args, out: kept.__setitem__(id(module), out))
    return lambda m: kept[id(m.second)], kept


@tap
def a_hook_before(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    model.second.register_forward_pre_hook(lambda module, args: setattr(model, "given", args[0]))
    return lambda m: m.second(m.given), vars(model)


@tap
def hooks_on_both_ends(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    kept: list[Any] = []
    model.register_forward_pre_hook(lambda module, args: kept.clear())
    model.second.register_forward_hook(lambda module, args, out: kept.append(out))
    model.register_forward_hook(lambda module, args, out: out + 0)
    return lambda m: kept[0], kept


@tap
def another_forward_for_a_layer(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    before = model.second.forward

    def forward(x: Tensor) -> Tensor:
        model.feature = before(x)
        return model.feature

    model.second.forward = forward  # type: ignore[method-assign]
    return lambda m: m.feature, vars(model)


@tap
def another_forward_as_a_method(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    kept: list[Tensor] = []

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        kept.append(nn.functional.linear(x, self.weight, self.bias))
        return kept[-1]

    model.second.forward = types.MethodType(forward, model.second)  # type: ignore[method-assign]
    return lambda m: kept[-1], kept


@tap
def another_forward_with_the_original_s_weights(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    layer = model.second

    @functools.wraps(layer.forward)
    def forward(x: Tensor) -> Tensor:
        model.feature = x @ layer.weight.t() + layer.bias
        return model.feature

    layer.forward = forward  # type: ignore[method-assign]
    return lambda m: m.feature, vars(model)


@tap
def a_function_as_an_attribute(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    model.again = lambda: model.second(model.given)
    model.second.register_forward_pre_hook(lambda module, args: setattr(model, "given", args[0]))
    return lambda m: m.again(), vars(model)


@tap
def a_cached_function(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    model.weight_of = functools.lru_cache(maxsize=None)(lambda name: model.get_submodule(name).weight)
    model.second.register_forward_pre_hook(lambda module, args: setattr(model, "given", args[0]))
    return lambda m: m.given @ m.weight_of("second").t(), vars(model)


@tap
def a_builtin_method(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    kept: list[Tensor] = []
    keep = kept.append
    model.second.register_forward_hook(lambda module, args, out: keep(out))
    return lambda m: kept[-1], kept


@tap
def beside_what_cannot_be_copied(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    lock, numbers = threading.Lock(), (n for n in range(3))

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        with lock:
            model.feature = out
        assert numbers is not None

    model.second.register_forward_hook(hook)
    return lambda m: m.feature, vars(model)


@tap
def a_hook_of_every_module(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        if module is model.second:
            model.feature = out

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    weakref.finalize(model, handle.remove)
    return lambda m: m.feature, vars(model)


@tap
def a_module_that_refuses_to_be_copied(model: Tapped) -> tuple[Callable[[Any], Tensor], Any]:
    class Stubborn(nn.Module):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("no")

    model.stubborn = Stubborn()
    kept: list[Tensor] = []
    model.kept = kept
    model.second.register_forward_hook(lambda module, args, out: kept.append(out))
    model.second.register_forward_hook(lambda module, args, out: setattr(model, "feature", out))
    return lambda m: m.kept[-1] + 0 * m.feature, kept


def tapped(name: str, base: type[Tapped] = Tapped) -> tuple[Tapped, Any]:
    """A model with one of these ways, on a class of its own, and what of the caller's the features end up in."""
    GLOBAL.clear()
    LISTED.clear()
    torch.manual_seed(0)
    kind: Any = type(base.__name__, (base,), {})
    model = kind()
    read, held = TAPS[name](model)
    kind.read = staticmethod(read)
    return model, held


def flat(held: Any) -> list[Any]:
    """What is held, to be compared one by one."""
    if isinstance(held, tuple):  # variables of a function
        return [cell.cell_contents for cell in held]
    return [x for pair in held.items() for x in pair] if hasattr(held, "items") else list(held)


def fakes() -> int:
    """The number of tensors without memory that anybody holds."""
    gc.collect()
    return sum(type(thing) is FakeTensor for thing in gc.get_objects())


def relative_error(model: nn.Module, spec: pg.PermutationSpec, x: Tensor) -> float:
    """By how much a random element of the group changes what the caller's own model computes."""
    model.double()
    x = x.double()
    with torch.no_grad():
        before, state = model(x), copy.deepcopy(model.state_dict())
        model.load_state_dict(spec.random(seed=1, every_group=True).apply(state))
        after = model(x)
    return float((before - after).abs().max() / before.abs().max())


@pytest.mark.parametrize("name", TAPS)
def test_features_are_the_copys_own(name: str) -> None:
    """Before any call and after some, with inputs given and found: the same groups, and nothing is left behind."""
    model, held = tapped(name)
    x, count = torch.randn(4, 3), fakes()
    for args in ((), ((x,),)):
        before = flat(held)
        spec = pg.auto_spec(model, *args)
        assert spec.log_order() == pytest.approx(EXPECTED)
        if not before or args:
            assert pg.verify(model, spec, *args).passed
        assert len(flat(held)) == len(before)
        assert all(a is b for a, b in zip(flat(held), before, strict=True))
        model(x)
    del spec
    assert fakes() <= count
    assert relative_error(model, pg.auto_spec(model, (x.double(),)), x) < 1e-12


@pytest.mark.parametrize("asks", [False, True], ids=["", "on real tensors"])
@pytest.mark.parametrize("name", TAPS)
def test_features_of_an_earlier_call_are_not_taken_for_these(name: str, asks: bool) -> None:
    model, held = tapped(name, TappedBesides)
    x = torch.randn(4, 3)
    if asks:
        model.first.register_forward_hook(lambda module, args, out: out * (1 if out.sum().item() < 1e9 else 2))
    model(x)
    before = flat(held)
    spec = pg.auto_spec(model, (x,))
    assert bool(spec.notes) >= asks
    assert spec.log_order() == pytest.approx(EXPECTED)
    assert all(a is b for a, b in zip(flat(held), before, strict=True))
    assert relative_error(model, spec, x) < 1e-12


def test_a_callback_among_the_arguments() -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor, callback: Callable[[Tensor], None]) -> Tensor:
            callback(self.first(x))
            return self.head(self.feature.relu())

    model, kept = Calls(), []

    def callback(h: Tensor) -> None:
        kept.append(h)
        model.feature = h

    spec = pg.auto_spec(model, (torch.randn(4, 3), callback))
    assert spec.log_order() == pytest.approx(math.lgamma(6))
    assert pg.verify(model, spec, (torch.randn(4, 3), callback)).passed
    assert not kept
    assert not hasattr(model, "feature")


def test_a_pass_that_fails_puts_back_what_is_outside() -> None:
    model, held = tapped("a_global_that_holds_the_model")
    with pytest.raises(pg.errors.CaptureError):
        pg.auto_spec(model, (torch.randn(4, 4),))
    assert MODEL[0] is model
    assert "feature" not in held


def test_functions_are_copied_with_what_they_hold_and_no_others() -> None:
    counted = [0]

    def count() -> int:
        counted[0] += 1
        return counted[0]

    def twice() -> int:
        return count() + count()

    (made, also, outside), memo = copy_following((twice, count, write_to), {})
    assert made() == 3
    assert also() == 3, "both hold the same copy"
    assert counted == [0]
    assert outside is write_to
    assert isinstance(memo, Memo)
    assert copy.deepcopy(twice) is twice, "Python's own copies are as they were"
    assert torch.nn.functional.max_pool2d is copy_following([torch.nn.functional.max_pool2d], {})[0][0]
