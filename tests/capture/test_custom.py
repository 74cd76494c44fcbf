"""Code of the user's own: whatever Python a forward pass is written in, it is followed, or refused in words.

Each module hides seven channels behind some construction. The spec must find their group and `verify` must prove it, or
nothing is claimed.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import math
import pickle
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import permgraph as pg
from permgraph.capture import capture
from permgraph.errors import CaptureError

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
T = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Three features to seven to two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x).relu())


def sizes(model: nn.Module, args: Any = None, kwargs: Any = None) -> list[int]:
    """The sizes of the groups, once they are proved; no operator may lack a rule."""
    spec = pg.auto_spec(model, args, kwargs)
    assert spec.unknown_ops == ()
    if spec.moving:
        proof = pg.verify(model, spec, args, kwargs)
        assert proof.passed, proof
    return sorted(group.size for group in spec.moving.values())


# -- sequences ----------------------------------------------------------------------------------------------------


class Packed(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 5)
        self.rnn = kind(5, 7, batch_first=True, **options)
        self.head = nn.Linear(14 if options.get("bidirectional") else 7, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(out)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_packed_sequences(kind: type[nn.RNNBase]) -> None:
    assert sizes(Packed(kind), (torch.randn(3, 4, 3), torch.tensor([4, 1, 3]))) == [5, 7]


def test_packed_sequences_in_both_directions_and_layers() -> None:
    model = Packed(nn.GRU, num_layers=2, bidirectional=True)
    assert sizes(model, (torch.randn(3, 4, 3), torch.tensor([4, 1, 3]))) == [5, 7, 7, 7, 7]


def test_a_packed_sequence_as_the_input() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(3, 7, batch_first=True), nn.Linear(7, 2)

        def forward(self, packed: nn.utils.rnn.PackedSequence) -> Tensor:
            return self.head(self.rnn(packed)[1][0][-1])

    assert sizes(Last(), (nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)]),)) == [7]


# -- torch.func and other derivatives -----------------------------------------------------------------------------


class Applied(Net):
    """The network under a transform."""

    def __init__(self, transform: Callable[[Callable[[Tensor], Tensor], Tensor], Any], outputs: int = 1) -> None:
        super().__init__()
        self.b = nn.Linear(7, outputs)
        self.transform = transform

    def forward(self, x: Tensor) -> Any:
        return self.transform(lambda row: self.b(torch.tanh(self.a(row))), x)


def _with_autograd(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(net(x).sum(), x)[0]


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "vmap": lambda net, x: torch.func.vmap(net)(x),
    "grad": lambda net, x: torch.func.grad(lambda y: net(y).sum())(x),
    "grad of each row": lambda net, x: torch.func.vmap(torch.func.grad(lambda y: net(y).sum()))(x),
    "value and grad": lambda net, x: torch.func.grad_and_value(lambda y: net(y).sum())(x),
    "jacrev": lambda net, x: torch.func.vmap(torch.func.jacrev(net))(x),
    "jacfwd": lambda net, x: torch.func.jacfwd(net)(x[0]),
    "jvp": lambda net, x: torch.func.jvp(net, (x,), (torch.ones_like(x),)),
    "vjp": lambda net, x: torch.func.vjp(net, x)[1](torch.ones(2, 1, dtype=x.dtype)),
    "hessian": lambda net, x: torch.func.hessian(lambda y: net(y).sum())(x[0]),
    "autograd": _with_autograd,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    assert sizes(Applied(TRANSFORMS[name]), (X,)) == [7]


ACTIVATIONS = (F.gelu, F.silu, F.softplus, F.elu, F.leaky_relu, F.mish, torch.sigmoid, F.logsigmoid)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda f: f.__name__)
def test_forces_as_the_gradient_of_an_energy(activation: Callable[[Tensor], Tensor]) -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.query, self.out = (
                nn.Conv1d(3, 6, 3),
                nn.LayerNorm(6),
                nn.Linear(6, 5),
                nn.Linear(5, 1),
            )

        def energy(self, x: Tensor) -> Tensor:
            hidden = self.norm(activation(self.conv(x)).transpose(1, 2))
            scores = self.query(hidden[:, 1:])
            return self.out(scores.softmax(1) * scores).sum()

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.grad(self.energy)(x)

    assert sizes(Energy(), (torch.randn(2, 3, 6),)) == [5, 6]


def test_functional_call_with_weights_made_on_the_way() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = Net(), nn.Parameter(torch.ones(7))

        def forward(self, x: Tensor) -> Tensor:
            weights = dict(self.net.named_parameters())
            weights["a.weight"] = weights["a.weight"] * self.scale[:, None]
            return torch.func.functional_call(self.net, weights, (x,))

    spec = pg.auto_spec(Scaled(), (X,))
    assert {name for name, _ in spec.uses(next(iter(spec.moving)))} == {
        "scale",
        "net.a.weight",
        "net.a.bias",
        "net.b.weight",
    }
    assert sizes(Scaled(), (X,)) == [7]


def test_an_ensemble_by_vmap_moves_its_members_and_each_one_s_channels() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(4, 7, 3)), nn.Parameter(torch.randn(4, 2, 7))

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.vmap(lambda up, down: F.linear(F.linear(x, up).relu(), down))(self.up, self.down).mean(0)

    spec = pg.auto_spec(Ensemble(), (X,))
    members, channels = spec.moving
    assert spec.groups[channels].parents == (members,)
    assert sizes(Ensemble(), (X,)) == [4, 7]


# -- arguments and results ----------------------------------------------------------------------------------------


def test_variadic_arguments() -> None:
    class Variadic(Net):
        def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
            return self.b(self.a(args[0]).relu() * kwargs.get("scale", 1))

    assert sizes(Variadic()) == [7]
    assert sizes(Variadic(), (X,), {"scale": torch.tensor(2.0)}) == [7]


def test_arguments_by_keyword_only() -> None:
    class Keyword(Net):
        def forward(self, first: Tensor, *, second: Tensor, gain: float | None = None) -> Tensor:
            return self.b(self.a(first + second).relu())

    assert sizes(Keyword()) == [7]


def test_keywords_that_nobody_can_guess_are_asked_for() -> None:
    class Batch(Net):
        def forward(self, **batch: Tensor) -> Tensor:
            return super().forward(batch["x"])

    with pytest.raises(CaptureError, match=r"it takes forward\(\*\*batch"):
        pg.auto_spec(Batch())
    assert sizes(Batch(), None, {"x": X}) == [7]


@dataclasses.dataclass(frozen=True)
class Batch:
    x: Tensor
    size: int = 3


@dataclasses.dataclass
class Result:
    logits: Tensor
    more: object = None


Pair = collections.namedtuple("Pair", "first second")


def test_dataclasses_and_nested_results() -> None:
    class Nested(Net):
        def forward(self, batch: Batch) -> Result:
            hidden = self.a(batch.x).relu()
            return Result(self.b(hidden), {"rest": [Pair(hidden.sum(-1), (hidden.mean(), "text", None))]})

    assert sizes(Nested(), (Batch(X),)) == [7]


@pytest.mark.parametrize(
    "wrap", [lambda h: {"h": [h]}, lambda h: Pair(1, (h,)), lambda h: Result(h), lambda h: Batch(h)]
)
def test_a_hidden_layer_deep_in_the_result_stays_put(wrap: Callable[[Tensor], Any]) -> None:
    class Leaks(Net):
        def forward(self, x: Tensor) -> Any:
            hidden = self.a(x).relu()
            return self.b(hidden), wrap(hidden)

    assert sizes(Leaks(), (X,)) == []


def test_a_hidden_layer_written_into_an_argument_stays_put() -> None:
    class Writes(Net):
        def forward(self, x: Tensor, out: Tensor) -> Tensor:
            return self.b(out.copy_(self.a(x).relu()))

    assert sizes(Writes(), (X, torch.zeros(2, 7))) == []


def test_what_returns_no_tensor_is_refused() -> None:
    class Lazy(Net):
        def forward(self, x: Tensor) -> Iterator[Tensor]:
            yield super().forward(x)

    with pytest.raises(CaptureError, match="returns a generator, whose tensors can be read only once"):
        pg.auto_spec(Lazy(), (X,))


# -- operators of one's own ---------------------------------------------------------------------------------------


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * x * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return 2 * x * scale * gradient, (x * x * gradient).sum(0)


def test_autograd_functions() -> None:
    class Squares(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(7))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(Square.apply(self.a(x), self.scale))

    assert sizes(Squares(), (X,)) == [7]


def test_a_scripted_function_is_followed_and_a_scripted_module_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        double = torch.jit.trace(lambda x: x.relu() * 2, (torch.randn(2, 7),))
        traced = torch.jit.trace(Net(), (X,))

    class Calls(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(double(self.a(x)))

    assert sizes(Calls(), (X,)) == [7]
    with pytest.raises(CaptureError, match="TorchScript module.*pass the Python module"):
        pg.auto_spec(traced, (X,))


# -- control flow -------------------------------------------------------------------------------------------------


def test_cond_takes_one_branch_and_says_so() -> None:
    class Cond(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda y: self.b(self.a(y).relu()), lambda y: self.b(self.a(y).sin()), (x,))

    for x in (X.abs(), -X.abs()):
        spec = pg.auto_spec(Cond(), (x,))
        assert "for the branch that they took" in spec.notes[0]
        assert sizes(Cond(), (x,)) == [7]


def test_loops_as_operators() -> None:
    from torch._higher_order_ops.scan import scan
    from torch._higher_order_ops.while_loop import while_loop

    class Scan(Net):
        def __init__(self) -> None:
            super().__init__()
            self.back = nn.Linear(7, 7)

        def forward(self, x: Tensor) -> Tensor:
            start = torch.zeros(2, 7)
            last, _ = scan(lambda h, t: ((self.back(h) + self.a(t)).tanh(), h.sum()), start, x.transpose(0, 1))
            return self.b(last)

    class While(Net):
        def forward(self, x: Tensor) -> Tensor:
            def step(i: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
                return i + 1, (h @ self.b.weight.t() @ self.b.weight).tanh()

            return self.b(while_loop(lambda i, h: i < 3, step, (torch.tensor(0), self.a(x)))[1])

    assert sizes(Scan(), (T,)) == [7]
    assert sizes(While(), (X,)) == [7]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    class Flex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(3, 24), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
            mixed = flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + (i - j) * 0.1)
            return self.out(mixed.transpose(1, 2).flatten(2))

    # Older versions lay the result out with `as_strided`, which pins the heads and the values' channels.
    newer = hasattr(TorchDispatchMode, "supports_higher_order_operators")
    assert sizes(Flex(), (T,)) == ([2, 4, 4] if newer else [4])


# -- wrappers -----------------------------------------------------------------------------------------------------


def test_what_is_compiled_runs_as_python() -> None:
    class Inside(Net):
        def __init__(self) -> None:
            super().__init__()
            self.run = torch.compile(lambda x: self.b(self.a(x).relu()))  # closes over this very module

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x)

    in_place = Net()
    in_place.compile()
    for model in (torch.compile(Net()), in_place, Inside()):
        assert sizes(model, (X,)) == [7]


def test_a_function_that_closes_over_the_model() -> None:
    class Closure(Net):
        def __init__(self) -> None:
            super().__init__()
            self.run = lambda x: self.b(self.a(x).relu())

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x)

    proof = pg.verify(Closure(), None, (X,), controls="all")
    assert proof and {control.parameter for control in proof.controls} == {"a.weight", "a.bias", "b.weight"}


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore")
def test_models_spread_over_devices() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    cpu = torch.device("cpu")
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    sharded = fully_shard(Net(), mesh=mesh)
    before = {name: (type(p), p._version) for name, p in sharded.named_parameters()}
    for model in (
        nn.DataParallel(Net()),
        nn.parallel.DistributedDataParallel(Net()),
        FullyShardedDataParallel(Net(), device_id=cpu, use_orig_params=True),
        sharded,
    ):
        assert sizes(model, (X,)) == [7]
    assert {name: (type(p), p._version) for name, p in sharded.named_parameters()} == before
    with pytest.raises(CaptureError, match="before it was wrapped"):
        pg.auto_spec(FullyShardedDataParallel(Net(), device_id=cpu), (X,))


@pytest.mark.filterwarnings("ignore")
def test_quantised_models() -> None:
    quantization = torch.ao.quantization
    stubs = nn.Sequential(
        quantization.QuantStub(), nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2), quantization.DeQuantStub()
    )
    stubs.qconfig = quantization.get_default_qconfig("fbgemm")
    prepared = quantization.prepare(stubs.eval())
    prepared(X)
    assert sizes(prepared, (X,)) == [7]
    with pytest.raises(CaptureError, match="quantised tensor.*floating point that it was made from"):
        pg.auto_spec(quantization.convert(prepared), (X,))
    dynamic = pg.auto_spec(quantization.quantize_dynamic(Net().eval(), {nn.Linear}), (X,))
    assert not dynamic.moving and dynamic.unknown_ops[0].operator == "quantized.linear_dynamic.default"


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.filterwarnings("ignore")
def test_adapters_of_peft_have_ranks_that_move() -> None:
    from benchmarks.zoo import operators

    operators.provide()
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=6, vocab_size=31,
    )  # fmt: skip
    base = pg.auto_spec(LlamaForCausalLM(config))
    for options in ({}, {"use_dora": True}, {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}):
        model = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(r=5, **options))
        spec = pg.auto_spec(model)
        ranks = {name: group for name, group in spec.moving.items() if group.size == 5}
        adapters = [name for name in model.state_dict() if "lora_A" in name]
        assert len(ranks) == len(adapters) == 4
        for name in ranks:
            assert sorted(parameter.rpartition("lora_")[2][0] for parameter, _ in spec.uses(name)) == ["A", "B"]
        rest = sorted(group.size for name, group in spec.moving.items() if name not in ranks)
        assert rest == sorted(group.size for group in base.moving.values())
        assert pg.verify(model, spec)


# -- modules that change ------------------------------------------------------------------------------------------


class Doubles(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.a.weight.mul_(2)
        self.b.weight.data = self.b.weight.data * 2
        return super().forward(x)


class Replaces(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.a.weight = nn.Parameter(self.a.weight.detach() * 2)
        return super().forward(x)


class Counts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += x.shape[0]
        return super().forward(x) * self.calls + self.seen


@pytest.mark.parametrize("cls", [Doubles, Replaces, Counts])
def test_a_model_that_modifies_itself_is_found_as_it_was(cls: type[Net]) -> None:
    model = cls()
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    assert sizes(model, (X,)) == [7]
    after = model.state_dict(keep_vars=True)
    assert {name: id(t) for name, t in after.items()} == {name: number for name, (number, _) in before.items()}
    assert all(torch.equal(t, before[name][1]) for name, t in after.items())
    assert getattr(model, "calls", 0) == 0


def test_weights_that_forward_makes_up_keep_what_they_touch_in_place() -> None:
    class Grows(Net):
        def __init__(self) -> None:
            super().__init__()
            self.extra: nn.Module | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.extra is None:
                self.extra = nn.Linear(7, 7)
            return self.b(self.extra(self.a(x)).relu())

    model = Grows()
    assert sizes(model, (X,)) == []
    assert model.extra is None


# -- what cannot be run, or seen ----------------------------------------------------------------------------------


class Fails(Net):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


def test_a_forward_that_raises_is_shown_with_its_own_error() -> None:
    with pytest.raises(CaptureError, match="Fails does not run on the inputs given.*ValueError: no such luck") as given:
        pg.auto_spec(Fails(ValueError("no such luck")), (X,))
    assert isinstance(given.value.__cause__, ValueError)
    with pytest.raises(CaptureError, match=r"and \d+ more: ValueError: no such luck") as guessed:
        pg.auto_spec(Fails(ValueError("no such luck")))
    assert isinstance(guessed.value.__cause__, ValueError)
    assert len(str(guessed.value).splitlines()) == 3


def test_a_missing_package_is_named_at_once() -> None:
    class Needs(Net):
        calls: list[int] = []  # noqa: RUF012 (shared with the copy that runs)

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(1)
            import a_package_that_nobody_has  # noqa: F401

            return x

    with pytest.raises(CaptureError, match="cannot be run here: ModuleNotFoundError.*a_package_that_nobody_has"):
        pg.auto_spec(Needs())
    assert len(Needs.calls) == 1


def test_weights_on_a_hub_are_the_hub_s_error() -> None:
    error = OSError("We couldn't connect to 'https://hub.example' to load this file")
    with pytest.raises(CaptureError, match="OSError: We couldn't connect to 'https://hub.example'"):
        pg.auto_spec(Fails(error))


def test_operators_in_another_thread_are_not_lost_in_silence() -> None:
    class Threaded(Net):
        """The hidden layer is used a second time, by a weight that the recorder cannot see used."""

        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x).relu()
            results: list[Tensor] = []
            worker = threading.Thread(target=lambda: results.append(self.c(hidden).detach()))
            worker.start()
            worker.join()
            return self.b(hidden) + results[0]

    with pytest.raises(CaptureError, match="another thread"):
        pg.auto_spec(Threaded(), (X,))


def test_nested_tensors_are_refused() -> None:
    class Ragged(Net):
        def forward(self, x: Tensor) -> Tensor:
            rows = torch.nested.as_nested_tensor([x[0], x[1, :2]], layout=torch.jagged)
            return super().forward(rows).values()

    with pytest.raises(CaptureError, match="nested tensor.*mask"):
        pg.auto_spec(Ragged(), (T,))


def test_a_pass_without_end_stops() -> None:
    class Endless(Net):
        def forward(self, x: Tensor) -> Tensor:
            while True:
                x = x + 1

    with pytest.raises(CaptureError, match="more than max_nodes=50 operators"):
        pg.auto_spec(Endless(), (X,), max_nodes=50)
    started = time.monotonic()
    with pytest.raises(CaptureError, match="longer than max_seconds=0.2"):
        capture(Endless(), (X,), max_seconds=0.2)
    assert time.monotonic() - started < 30


KEPT: dict[str, float] = {}
READS_MEMORY = {
    "apply_": lambda h: h.apply_(lambda value: 2 * KEPT.setdefault("first", value)),
    "apply_ unbound": lambda h: torch.Tensor.apply_(h, lambda value: 2 * KEPT.setdefault("first", value)),
    "map_": lambda h: h.map_(h.clone(), lambda a, b: a + KEPT.setdefault("first", b)),
    "map2_": lambda h: h.map2_(h.clone(), h.clone(), lambda a, b, c: a + b + KEPT.setdefault("first", c)),
    "dlpack": lambda h: torch.from_dlpack(h) + 1,
    "pickle": lambda h: pickle.loads(pickle.dumps(h)),
}


@pytest.mark.parametrize("name", READS_MEMORY)
def test_what_reads_memory_is_run_on_real_tensors(name: str) -> None:
    """On fake ones it would end the process."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(READS_MEMORY[name](self.first(x).detach().clone()))

    model, inputs = Model(), (torch.randn(4, 3),)
    assert pg.capture(model, inputs).mode == "real"
    assert pg.verify(model, example_inputs=inputs)


class RaisesOnEveryAttribute:
    """What a package puts in the place of an extension that is not installed."""

    def __getattr__(self, name: str) -> Any:
        raise ImportError(f"the extension is not installed ({name})")


EXTENSION = RaisesOnEveryAttribute()
TABLE = {"extension": RaisesOnEveryAttribute()}


@pytest.mark.parametrize("where", ["global", "attribute", "config", "default"])
def test_objects_that_raise_on_every_attribute(where: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
            if where == "attribute":
                self.extension = RaisesOnEveryAttribute()
            if where == "config":
                self.config = types.SimpleNamespace(use_cache=True, extension=RaisesOnEveryAttribute())

        def forward(self, x: torch.Tensor, fast: Any = EXTENSION if where == "default" else None) -> torch.Tensor:
            if x.is_cuda:
                return EXTENSION.run(x, TABLE, fast)
            return self.last(torch.relu(self.first(x)))

    assert pg.auto_spec(Model()).log_order() == pytest.approx(math.lgamma(17))


def test_inputs_that_do_not_fit_raise_a_public_error() -> None:
    with pytest.raises(pg.errors.CaptureError) as caught:
        pg.auto_spec(nn.Linear(3, 4), (torch.zeros(2, 5),))
    assert type(caught.value) is pg.errors.CaptureError
    assert "does not run on the inputs given" in str(caught.value)
