"""`verify` must fail on a wrong spec, pass on a right one whatever the weights were, and leave the model alone."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.errors import CaptureError, EvaluationError, MismatchError
from permgraph.spec import PermutationSpec

X = (torch.randn(3, 4),)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)
    ).eval()  # fmt: skip


def text(**lines: str) -> PermutationSpec:
    """The right spec of `network`, with these lines (by parameter, a dot written as two underscores) put otherwise."""
    right = {
        "0.weight": "6x4  a .", "0.bias": "6  a", "1.weight": "6  a", "1.bias": "6  a", "3.weight": "6x6  b a",
        "3.bias": "6  b", "5.weight": "2x6  . b", "5.bias": "2  .", "1.running_mean": "6  a", "1.running_var": "6  a",
    }  # fmt: skip
    right.update({name.strip("_").replace("__", "."): line for name, line in lines.items() if name != "groups"})
    groups = lines.get("groups", "a 6 · b 6")
    body = "\n".join(f"{name}  {line}" for name, line in right.items())
    return PermutationSpec.parse(f"{body}\ngroups: {groups}")


def test_the_right_spec_passes_and_controls_change_the_output() -> None:
    proof = pg.verify(network(), text(), X, controls="all")
    assert proof and proof.max_error < 1e-12 and not proof.failed
    changes = {(c.group, c.parameter): c.change for c in proof.controls}
    assert changes["a", "3.weight"] > 1e-3 and changes["b", "5.weight"] > 1e-3
    assert "passed" in str(proof)


WRONG = {
    "an axis is missing": text(_1__bias="6  ."),
    "a buffer is missing": text(_1__running_var="6  ."),
    "an axis is of another group": text(_3__bias="6  a"),
    "two groups have changed places": text(_3__weight="6x6  a b"),
    "the output moves": text(_5__weight="2x6  out b", _5__bias="2  out", groups="a 6 · b 6 · out 2"),
    "the input moves": text(_0__weight="6x4  a in", groups="a 6 · b 6 · in 4"),
    "a group is made up": text(_3__weight="6x6  b (c d)", groups="a 6 · b 6 · c 2 · d 3"),
    "one axis is called two": text(
        _5__weight="2x6  . (c d)", _3__weight="6x6  (c d) a", _3__bias="6  b", groups="a 6 · b 6 · c 2 · d 3 per c"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_spec_fails(name: str) -> None:
    proof = pg.verify(network(), WRONG[name], X)
    assert not proof.passed and proof.max_error > proof.tolerance
    assert proof.failed and "FAILED" in str(proof)


def test_groups_that_must_move_together_fail_apart() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.c(y + torch.relu(self.b(y)))

    model = Residual()
    right = pg.auto_spec(model, X)
    assert pg.verify(model, right, X)
    apart = PermutationSpec.parse("""
        a.weight  6x4  a .
        a.bias    6    a
        b.weight  6x6  b a
        b.bias    6    b
        c.weight  2x6  . b
        c.bias    2    .
        groups: a 6 · b 6
    """)
    assert set(pg.verify(model, apart, X).failed) == {"a", "b"}


def test_only_the_groups_at_fault_are_named() -> None:
    proof = pg.verify(network(), text(_1__bias="6  ."), X)
    assert proof.failed == ("a",) and proof.groups["b"].error < 1e-12


def test_zero_heads_and_fresh_statistics_hide_nothing() -> None:
    model = network()
    nn.init.zeros_(model[5].weight)
    nn.init.ones_(model[1].weight)
    assert pg.verify(model, text(), X)
    assert not pg.verify(model, text(_1__running_mean="6  ."), X)


def test_a_group_that_has_no_influence_is_named_with_its_axes() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(x) + 0 * self.b(torch.tanh(self.a(x)))

    proof = pg.verify(Dead(), None, X)
    (name,) = proof.without_influence
    assert proof and proof.max_error < 1e-12 and ("a.weight", 0) in proof.groups[name].inert
    assert "no control changed the output" in str(proof)


def test_a_key_bias_under_softmax_is_inert_and_does_not_fail_its_group() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(4, 5) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)

    proof = pg.verify(Attention(), None, (torch.randn(2, 3, 4),), controls="all")
    assert proof
    (group,) = (g for g in proof.groups.values() if ("k.bias", 0) in g.inert)
    assert ("k.weight", 0) not in group.inert and ("q.bias", 0) not in group.inert


def test_a_group_with_one_axis_has_a_control() -> None:
    class Tied(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.randn(6, 4)), scale

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * torch.relu(x @ self.weight.t()) @ self.weight

    assert pg.verify(Tied(1.0), None, X).without_influence == ()
    assert pg.verify(Tied(0.0), None, X).without_influence == ("weight",)


@pytest.mark.parametrize("train", [True, False])
def test_nothing_of_the_model_changes(train: bool) -> None:
    model = network().train(train)
    calls: list[object] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    identities = [id(p) for p in model.parameters()]
    x = X[0].clone()
    rng, dtype, threads = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
    assert pg.verify(model, text(), (x,))
    assert model.training is train and all(m.training is train for m in model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert identities == [id(p) for p in model.parameters()] and all(p.grad is None for p in model.parameters())
    assert torch.equal(x, X[0]) and torch.equal(rng, torch.get_rng_state())
    assert torch.get_default_dtype() is dtype and torch.get_num_threads() == threads and torch.is_grad_enabled()


def test_models_without_data_and_of_low_precision() -> None:
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    assert pg.verify(empty)
    assert empty[0].weight.is_meta
    half = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).to(torch.bfloat16)
    proof = pg.verify(half)
    assert proof and proof.max_error < 1e-12  # computed in double precision
    assert half[0].weight.dtype is torch.bfloat16


def test_weights_that_are_not_finite_do_not_matter() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    assert pg.verify(model, text(), X)


def test_the_seed_decides_all() -> None:
    a, b, c = (pg.verify(network(), text(), X, seed=seed, controls="all") for seed in (1, 1, 2))
    assert a.controls == b.controls and a.controls != c.controls


def test_without_controls_only_the_error_counts() -> None:
    proof = pg.verify(network(), text(), X, controls="none")
    assert proof and proof.controls == ()
    assert not pg.verify(network(), WRONG["the output moves"], X, controls="none")


def test_nothing_to_permute_is_said_plainly() -> None:
    proof = pg.verify(nn.Linear(3, 2))
    assert proof and "nothing to permute" in str(proof)


def test_tied_names_and_integer_outputs() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embed(ids))).argmax(-1)

    ids = torch.randint(0, 7, (64, 5), generator=torch.Generator().manual_seed(0))
    spec = pg.auto_spec(Tied(), (ids,))
    assert next(iter(spec.moving.values())).size == 6 and pg.verify(Tied(), spec, (ids,))


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "another architecture": (lambda: pg.verify(nn.Sequential(nn.Linear(4, 6)), text(), X), MismatchError, r"1\.bias"),
    "another width": (
        lambda: pg.verify(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), pg.auto_spec(
            nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), X), X),
        MismatchError, r"0\.weight",
    ),
    "an input of the wrong shape": (lambda: pg.verify(network(), text(), (torch.randn(3, 5),)), CaptureError, "5"),
    "a model that cannot run": (lambda: pg.verify(nn.ModuleList([nn.Linear(2, 2)]), None, X), CaptureError, "forward"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name: str) -> None:
    call, kind, words = BAD[name]
    with pytest.raises(kind, match=words):
        call()


class Detector(nn.Module):
    """Scores two boxes, and returns those above a threshold that none ever passes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scores = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(torch.relu(self.first(x)))
        return scores[scores.sigmoid() > 2]


def detector(**lines: str) -> PermutationSpec:
    right = {"first.weight": "6x4  a .", "first.bias": "6  a", "scores.weight": "2x6  . a", "scores.bias": "2  ."}
    right.update({name.replace("__", "."): line for name, line in lines.items()})
    return PermutationSpec.parse("\n".join(f"{n}  {line}" for n, line in right.items()) + "\ngroups: a 6")


def test_empty_outputs_hide_nothing() -> None:
    proof = pg.verify(Detector(), detector(), X, controls="all")
    assert proof and len(proof.controls) == 3 and all(control.passed for control in proof.controls)
    assert "empty" in proof.note
    assert pg.verify(Detector(), detector(first__bias="6  ."), X).failed == ("a",)
    assert pg.verify(Detector(), detector(scores__weight="2x6  . ."), X).failed == ("a",)


class Shy(Detector):
    """Returns the scores only where they are small."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(torch.relu(self.first(x)))
        return scores[:, :] if scores.abs().max() < 0.5 else scores[:0]


def test_weights_on_which_outputs_say_something_are_preferred() -> None:
    proof = pg.verify(Shy(), detector(), X, controls="all")
    assert proof and len(proof.controls) == 3
    assert proof.note == ""
    assert pg.verify(Shy(), detector(first__bias="6  ."), X).failed == ("a",)


class Masking(Detector):
    """Fills the score of the second box with an infinity."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(torch.relu(self.first(x)))
        return torch.stack([scores[:, 0], torch.full_like(scores[:, 1], -torch.inf)], 1)


def test_infinities_of_masks_are_no_obstacle() -> None:
    assert pg.verify(Masking(), detector(), X, controls="all")
    assert pg.verify(Masking(), detector(first__bias="6  ."), X).failed == ("a",)


def test_time_for_controls_may_run_out() -> None:
    proof = pg.verify(network(), text(), X, max_seconds=0.0)
    assert proof and proof.controls == () and proof.untried == ("a", "b")
    assert "no time for controls on 2 groups: a, b" in str(proof)
    assert not pg.verify(network(), WRONG["an axis is missing"], X, max_seconds=0.0)
    assert pg.verify(network(), text(), X, max_seconds=600.0).untried == ()


def test_a_model_that_writes_to_its_weights_is_run_on_the_same_ones_each_time() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = network(), nn.Parameter(torch.ones(1))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.calls += 1
                self.scale.mul_(2)
            return self.net(x) * self.calls + self.scale

    model = Counts()
    proof = pg.verify(model, None, X, controls="all")
    assert proof and proof.max_error < 1e-12
    assert model.calls == 0 and model.scale == 1


def test_what_does_not_fit_to_be_kept_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = pg.verify(network(), text(), X, controls="all")
    monkeypatch.setattr(sys.modules["permgraph.verification.trial"], "KEEP_BYTES", 0)
    assert pg.verify(network(), text(), X, controls="all") == kept


def test_an_unknown_way_of_controls_is_refused() -> None:
    with pytest.raises(EvaluationError, match="controls"):
        pg.verify(network(), text(), X, controls="some")  # type: ignore[arg-type]


def test_a_spec_is_not_changed_by_its_proof() -> None:
    spec = text()
    before = str(replace(spec))
    pg.verify(network(), spec, X)
    assert str(spec) == before


def test_a_parameter_without_elements_moves_nothing() -> None:
    class NoTokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Parameter(torch.zeros(0, 6))
            self.net = network()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x), torch.cat([self.tokens, self.tokens]).sum()

    model = NoTokens().eval()
    spec = pg.auto_spec(model, X)
    assert "tokens" not in spec.moving
    assert spec.log_order() == pg.auto_spec(network(), X).log_order()
    assert pg.verify(model, spec, X)


def test_networks_trained_for_quantised_inference_keep_their_symmetries():
    """Fake quantisation knows no float64, and observes while the network runs."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return self.second(self.first(x).relu())

    quantisation = torch.ao.quantization
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Net().train()
        model.qconfig = quantisation.get_default_qat_qconfig("qnnpack")
        quantisation.prepare_qat(model, inplace=True)
        model(torch.randn(4, 3, 8, 8))
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    spec = pg.auto_spec(model.eval(), example_inputs=(x,))
    assert [group.size for group in spec.moving.values()] == [8]
    assert not spec.unknown_ops
    found = pg.verify(model, spec, example_inputs=(x,))
    assert found.passed
    assert len(found.controls) == 1
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_where_groups_stand_is_found_by_one_look_at_each_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [layer for _ in range(30) for layer in (nn.Linear(5, 5), nn.ReLU())]
    spec = pg.auto_spec(nn.Sequential(*layers, nn.Linear(5, 2)))
    spec = pg.PermutationSpec.parse(str(spec))
    groups = list(spec.moving)
    looked: list[object] = []
    layout = pg.PermutationSpec.layout
    monkeypatch.setattr(pg.PermutationSpec, "layout", lambda self, axes: looked.append(axes) or layout(self, axes))
    assert len([spec.uses(group) for group in groups]) == 30
    assert len(looked) == len(spec.axes)
