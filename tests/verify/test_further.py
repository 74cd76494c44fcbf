"""`verify` looks where an inference may not have looked, and on a model's own weights."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import permgraph as pg
from permgraph.errors import CaptureError, EvaluationError, MismatchError
from permgraph.spec import PermutationSpec

FURTHER = importlib.import_module("permgraph.verification.further")
STREAM = "a.weight  8x4  {a} .\na.bias  8  {a}\no.weight  2x8  . {a}\no.bias  2  .\n"


class Stream(nn.Module):
    """A stream of eight units between two layers; what stands between is each model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        return self.o(self.between(self.a(x)))

    def between(self, h: Tensor) -> Tensor:
        return h.relu()


def spec(more: str = "", moves: bool = True) -> PermutationSpec:
    """Of a stream, with further lines in which {a} stands for its axis; nothing moves but the stream."""
    text = (STREAM + more).format(a="a" if moves else ".")
    return PermutationSpec.parse(text + ("groups: a 8" if moves else ""))


class Positions(Stream):
    """A shift for each step of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.ParameterList(nn.Parameter(torch.randn(8)) for _ in range(7))

    def between(self, h: Tensor) -> Tensor:
        return torch.stack([t + p for t, p in zip(h.unbind(1), self.p)], 1)  # noqa: B905


class Auxiliary(Stream):
    """A second head in training."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        return (self.o(h), self.aux(h)) if self.training else self.o(h)


class EveryThird(Stream):
    """One more layer in every third call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.f = 0, nn.Linear(8, 8)

    def between(self, h: Tensor) -> Tensor:
        self.calls += 1
        return self.f(h).tanh() if self.calls % 3 == 0 else h


class Counting(EveryThird):
    """The same, counted in a tensor that is a plain attribute and written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = torch.zeros(())

    def between(self, h: Tensor) -> Tensor:
        self.counter.add_(1)
        return self.f(h).tanh() if self.counter == 3 else h


class Steps(Stream):
    """As many steps as are asked for, from a state of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x: Tensor, steps: int = 1) -> Tensor:
        h = self.a(x)
        for _ in range(1, steps):
            h = self.a(x) + self.f(h).tanh()
        return self.o(h)


class Padded(Stream):
    """A learnt token, up to an even number."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(8))

    def between(self, h: Tensor) -> Tensor:
        h = h if h.shape[1] % 2 == 0 else torch.cat([h, self.p.expand(len(h), 1, 8)], 1)
        return h.unflatten(1, (-1, 2)).mean(2)


class Largest(Stream):
    """A row for the largest unit, which of two units at zero is the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 8)
        self.table = nn.Parameter(torch.randn(8, 8))

    def between(self, h: Tensor) -> Tensor:
        return self.table[h.relu().argmax(-1)]


ROWS, STEPS = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)), torch.randn(2, 4, 4)
LAYER = "f.weight  8x8  {x} {x}\nf.bias  8  {x}\n"
POSITIONS = "".join(f"p.{i}  8  {'{x}' if i > 3 else '{a}'}\n" for i in range(7))
#: By name: a model, what its spec says beside the stream ({x}: what is wrong when it stays put), the inputs on which
#: that makes no difference, and those on which it does.
UNSEEN: dict[str, tuple[type[Stream], str, Tensor, str]] = {
    "longer inputs": (Positions, POSITIONS, STEPS, "larger sizes"),
    "training mode": (Auxiliary, "aux.weight  2x8  . {x}\naux.bias  2  .\n", ROWS, "training mode"),
    "later calls": (EveryThird, LAYER, ROWS, "calls"),
    "a tensor that counts": (Counting, LAYER, ROWS, "calls"),
    "larger numbers": (Steps, LAYER, ROWS, "larger steps"),
    "odd sizes": (Padded, "p  8  {x}\n", STEPS, "larger by one"),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_spec_that_is_wrong_on_other_inputs_fails_and_they_are_named(name: str) -> None:
    kind, more, x, varied = UNSEEN[name]
    model = kind().eval()
    wrong, right = spec(more.replace("{x}", ".")), spec(more.replace("{x}", "{a}"))
    assert pg.verify(model, wrong, (x,), further=0)
    proof = pg.verify(model, wrong, (x,))
    assert not proof and proof.failed == ("a",)
    failed = [run for run in proof.runs if run.failed]
    assert failed and all(run.failed == ("a",) for run in failed)
    assert any(varied in run.name for run in failed)
    assert f"wrong on {failed[0].name}" in str(proof)
    passed = pg.verify(model, right, (x,))
    assert passed and any(varied in run.name and run.error is not None for run in passed.runs), str(passed)


RANKED = "a.weight  8x16  a .\na.bias  8  a\ntable  8x8  a b\no.weight  2x8  . b\no.bias  2  .\ngroups: a 8 · b 8"


def test_equal_units_that_are_found_in_few_rows_only() -> None:
    """Among eight units at random, all are at zero in one row of 256 or so."""
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    assert pg.verify(Largest(), PermutationSpec.parse(RANKED), (x,), further=0)
    proof = pg.verify(Largest(), PermutationSpec.parse(RANKED), (x,))
    assert not proof
    (run,) = (run for run in proof.runs if "ranked" in run.name)
    assert run.name == "units ranked in 10,000 rows" and run.failed == ("a",)


def test_ranking_of_what_never_ties_passes_on_many_rows() -> None:
    class Router(Largest):
        def between(self, h: Tensor) -> Tensor:
            return self.table[h.argmax(-1)]

    proof = pg.verify(Router(), PermutationSpec.parse(RANKED), (torch.randn(4, 16),))
    assert proof and "units ranked in 10,000 rows" in [run.name for run in proof.runs if run.error is not None]


def test_dropout_is_the_identity_and_nothing_of_the_model_changes() -> None:
    class Noisy(Stream):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)

        def between(self, h: Tensor) -> Tensor:
            return self.drop(self.norm(h))

    model = Noisy().train()
    before = copy.deepcopy(model.state_dict())
    proof = pg.verify(model, None, (ROWS,))
    assert proof and any("training" in run.name and run.error is not None for run in proof.runs)
    assert model.training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_inputs_on_which_the_model_does_not_run_are_said_and_harmless() -> None:
    class Picky(Stream):
        def between(self, h: Tensor) -> Tensor:
            if len(h) != 4:
                raise ValueError("four rows, please")
            return h.relu()

    proof = pg.verify(Picky(), spec(), (ROWS,))
    assert proof
    assert any(run.error is None and "four rows, please" in run.reason for run in proof.runs)
    assert "not compared with" in str(proof) and "four rows, please" in str(proof)


def test_what_is_drawn_at_random_is_not_compared() -> None:
    class Random(Stream):
        def between(self, h: Tensor) -> Tensor:
            return h * torch.rand_like(h) if self.training else h

    proof = pg.verify(Random(), spec(), (ROWS,))
    assert proof
    assert all("random" in run.reason for run in proof.runs if "training" in run.name)


def test_there_is_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [run.name for run in pg.verify(Stream(), spec(), (ROWS,), further=0).runs] == ["the inputs"]
    monkeypatch.setattr(FURTHER, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(importlib.import_module("permgraph.verification.model"), "LEAST_SECONDS", 0.0)
    proof = pg.verify(Stream(), spec(), (ROWS,), further=1e-9)
    assert proof and len(proof.runs) > 1
    assert all("no time" in run.reason for run in proof.runs[1:])


def test_what_was_never_read_is_named() -> None:
    unread = PermutationSpec.parse(str(spec("b.weight  3x3  . .\n")))
    unread = PermutationSpec(unread.groups, unread.axes, unused=("b.weight", "steps"))
    model = Stream()
    model.register_module("b", nn.Linear(3, 3, bias=False))
    proof = pg.verify(model, unread, (ROWS,))
    assert (
        proof
        and proof.unread == ("b.weight",)
        and "never read, so that nothing is known of them: b.weight" in str(proof)
    )


class Covariance(Stream):
    """An output in which the units of the last layer are interchangeable."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.o(self.a(x).relu())
        h = h - h.mean(0)
        return (h.T @ h).square().sum()


def test_outputs_that_are_symmetric_in_the_last_units_do_not_fail() -> None:
    both = PermutationSpec.parse(
        STREAM.replace("{a}", "a").replace(" . a", " b a").replace("2  .", "2  b") + "groups: a 8 · b 2"
    )
    proof = pg.verify(Covariance(), both, (ROWS,), controls="all")
    assert proof and not proof.without_influence
    assert any(control.scaled and control.passed for control in proof.groups["b"].controls)


def test_units_that_are_left_out_do_not_fail_and_are_named() -> None:
    class LeftOut(Stream):
        def between(self, h: Tensor) -> Tensor:
            return torch.cat([h[..., [0, 1, 2]], h[..., [0, 1, 2, 0, 1]]], -1)

    left_out = PermutationSpec.parse(
        "a.weight  8x4  [3 + b] .\na.bias  8  [3 + b]\no.weight  2x8  . .\no.bias  2  .\ngroups: b 5"
    )
    proof = pg.verify(LeftOut(), left_out, (ROWS,))
    assert proof and proof.without_influence == ("b",) and "no influence: b" in str(proof)


# -- a model's own weights ---------------------------------------------------------------------------------------------


class Heads(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.qkv, self.o, self.heads = nn.Linear(8, 48), nn.Linear(16, 3), heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


TEXT = (torch.randn(2, 5, 8),)


def test_a_permutation_is_proved_on_the_weights_that_it_moves() -> None:
    a, b, other = Heads(2), Heads(2), Heads(8)
    fit = pg.align(a, b, example_inputs=TEXT)
    proof = pg.verify(b, None, TEXT, permutation=fit.permutation)
    assert proof and proof.max_error < 1e-12 and len(proof.runs) > 1 and not proof.without_influence
    wrong = pg.verify(other, None, TEXT, permutation=fit.permutation)
    assert not wrong and wrong.failed
    before = copy.deepcopy(other.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_own_weights_are_what_is_computed_with() -> None:
    model = Stream()
    with torch.no_grad():
        model.o.weight.zero_()
    move = spec().random(0, every_group=True)
    assert pg.verify(model, None, (ROWS,), permutation=move).without_influence == ("a",)
    assert pg.verify(model, spec(), (ROWS,)).without_influence == ()
    with torch.no_grad():
        model.a.weight.fill_(math.nan)
    with pytest.raises(CaptureError, match="its own weights"):
        pg.verify(model, None, (ROWS,), permutation=move)


def test_own_weights_that_amplify_rounding_prove_nothing() -> None:
    class Chaotic(Stream):
        def between(self, h: Tensor) -> Tensor:
            y = h.exp().sum(-1, keepdim=True).sin().square()
            for _ in range(300):
                y = 3.99 * y * (1 - y)
            return h * y

    torch.manual_seed(0)
    model = Chaotic()
    with pytest.raises(EvaluationError, match="amplifies rounding"):
        pg.verify(model, None, (ROWS,), permutation=spec().random(0, every_group=True))


def test_what_cannot_be_proved_on_own_weights_is_refused() -> None:
    move = spec().random(0, every_group=True)
    assert "moves nothing" in str(pg.verify(Stream(), None, (ROWS,), permutation=spec().identity()))
    with torch.device("meta"):
        empty = Stream()
    with pytest.raises(MismatchError, match=r"'a.weight' has no values"):
        pg.verify(empty, None, (ROWS,), permutation=move)
    with pytest.raises(MismatchError, match="another spec"):
        pg.verify(Stream(), spec().rename({"a": "b"}), (ROWS,), permutation=move)


def test_tensors_without_values_that_a_model_holds_are_no_riddle() -> None:
    class Keeps(Stream):
        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[str, Tensor] = {}

        def between(self, h: Tensor) -> Tensor:
            return h.relu() + self.kept["h"]

    model = Keeps()
    with FakeTensorMode():
        model.kept["h"] = torch.ones(8)
    assert pg.verify(model, spec(), (ROWS,))
    outside = {"h": model.kept["h"]}
    model.between = lambda h: outside["h"]  # type: ignore[method-assign]
    assert pg.verify(model, spec(), (ROWS,), controls="none")


@pytest.mark.parametrize("turned", [True, False])
def test_a_weight_that_is_saved_in_another_layout_is_found_out(turned: bool) -> None:
    class Turns(Stream):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))
            if turned:
                self._register_state_dict_hook(lambda m, state, prefix, _: state.update(w=state["w"].t().contiguous()))
                self._register_load_state_dict_pre_hook(lambda state, *_: state.update(w=state["w"].t()))
            else:
                self._register_state_dict_hook(lambda m, state, prefix, _: state.update(w=state["w"].clone()))

        def between(self, h: Tensor) -> Tensor:
            return h @ self.w

    text = "a.weight  8x4  a .\na.bias  8  a\nw  8x8  a b\no.weight  2x8  . b\no.bias  2  .\ngroups: a 8 · b 8"
    assert pg.verify(Turns(), PermutationSpec.parse(text), (ROWS,), further=0).passed is not turned
    assert pg.verify(Turns(), None, (ROWS,)).passed


class _Towers(nn.Module):
    """An image, a text, or both."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        self.table = nn.Embedding(9, 5)
        self.text = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))

    def forward(self, image=None, text=None):
        out = 0
        if image is not None:
            out = out + self.image(image)
        if text is not None:
            out = out + self.text(self.table(text)).sum(1)
        return out


def test_compares_where_a_tensor_that_was_left_out_is_given():
    model, given = _Towers(), (torch.randn(2, 4),)
    spec = pg.auto_spec(model, given)
    report = pg.verify(model, spec, example_inputs=given, controls="none")
    assert report.passed and "text given" in [run.name for run in report.runs]
    text = str(spec).replace("text.2.weight   3x7  . text.0", "text.2.weight   3x7  . .")
    assert text != str(spec)
    wrong = dataclasses.replace(pg.PermutationSpec.parse(text), passes=spec.passes)
    assert not pg.verify(model, wrong, example_inputs=given, controls="none").passed
