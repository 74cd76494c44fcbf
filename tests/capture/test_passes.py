"""Several passes of one module, solved together: what each kind of pass shows that the first does not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.capture import ExampleInputs, capture
from permgraph.capture.further import FurtherPasses
from permgraph.capture.joined import alike, joined
from permgraph.capture.passes import Sizes, resized, variations
from permgraph.capture.record import Limits
from permgraph.inference.solution import Solution


def _error(model: nn.Module, spec: pg.PermutationSpec, *calls: tuple[Any, ...], train: bool = False) -> float:
    """The largest relative difference that a random element makes, over calls one after the other, in float64."""
    a = copy.deepcopy(model).double().train(train)
    with torch.no_grad():
        for tensor in a.parameters():
            tensor.add_(0.3 * torch.randn_like(tensor))
    b = copy.deepcopy(a)
    b.load_state_dict(spec.random(0, every_group=True).apply(a.state_dict()))
    worst = 0.0
    for args in calls:
        doubled = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        with torch.no_grad():
            ys, zs = a(*doubled), b(*doubled)
        for y, z in zip(_leaves(ys), _leaves(zs), strict=True):
            worst = max(worst, float((y - z).abs().max() / y.abs().max()))
    return worst


def _leaves(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [leaf for item in result for leaf in _leaves(item)]


class Positions(nn.Module):
    """A parameter of its own for each place, so that longer texts read more parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.places = nn.ParameterList([nn.Parameter(torch.randn(6)) for _ in range(9)])
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.out(torch.stack([h[:, t] + self.places[t] for t in range(x.shape[1])], 1).tanh())


class Auxiliary(nn.Module):
    """A second head that training alone runs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.aux, self.out = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        h = nn.functional.dropout(self.embed(x).relu(), 0.5, self.training)
        return (self.out(h), self.aux(h)) if self.training else self.out(h)


class Alternating(nn.Module):
    """Every second call runs another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.even, self.odd = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h: Tensor = self.embed(x).relu()
        return self.even(h) if self.calls % 2 else self.odd(h)


class Steps(nn.Module):
    """A recurrence whose number of steps is an argument, one by default: its weight then meets only zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.again, self.out = nn.Linear(3, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)

    def forward(self, x: Tensor, steps: int = 1) -> Tensor:
        h = torch.zeros(x.shape[0], 6, dtype=x.dtype)
        for _ in range(steps):
            h = torch.tanh(self.embed(x) + self.again(h))
        return self.out(h)


S6 = math.lgamma(7)

KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], list[tuple[Any, ...]], bool]] = {
    "longer": (Positions, (torch.randn(2, 4, 3),), [(torch.randn(2, 5, 3),)], False),
    "training": (Auxiliary, (torch.randn(4, 3),), [(torch.randn(5, 3),)], True),
    "second call": (Alternating, (torch.randn(4, 3),), [(torch.randn(5, 3),)] * 4, False),
    "more steps": (Steps, (torch.randn(4, 3),), [(torch.randn(4, 3), 1), (torch.randn(4, 3), 5)], False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_further_pass_reads_is_tied_too(kind: str) -> None:
    make, seen, calls, train = KINDS[kind]
    torch.manual_seed(0)
    model = make()
    if train:
        model = _without_functional_dropout(model)
    spec = pg.auto_spec(model, seen)
    # One stream of six units: the embedding's rows, every place, every head's columns.
    assert spec.log_order() == pytest.approx(S6)
    # Four places become seven: 5 is the larger batch.
    assert spec.unused == (("places.7", "places.8") if kind == "longer" else ())
    assert _error(model, spec, *calls, train=train) < 1e-12


@pytest.mark.parametrize("kind", ["training", "second call"])
def test_one_pass_alone_gets_these_wrong(kind: str) -> None:
    """The control: what the further passes are for."""
    make, seen, calls, train = KINDS[kind]
    torch.manual_seed(0)
    model = _without_functional_dropout(make()) if train else make()
    assert _error(model, pg.auto_spec(model, seen, vary=False), *calls, train=train) > 1e-3


def _without_functional_dropout(model: nn.Module) -> nn.Module:
    """The module, called without drawing random numbers in training mode."""

    class Still(type(model)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            h = self.embed(x).relu()
            return (self.out(h), self.aux(h)) if self.training else self.out(h)

    model.__class__ = Still
    return model


def test_dropout_in_training_mode_costs_no_symmetry() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(6, 36), nn.Linear(12, 2)
            self.drop = nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
            y = self.drop(y.transpose(1, 2).reshape(*x.shape[:2], 12))
            return self.out(nn.functional.dropout(y, 0.2, self.training))

    model = Attention()
    one, many = (pg.auto_spec(model, (torch.randn(2, 5, 6),), vary=vary) for vary in (False, True))
    assert one.log_order() == pytest.approx(math.lgamma(4) + 6 * math.lgamma(5))  # 3! (4!)^3 (4!)^3
    assert many.diff(one) == ()
    tried = [(run.mode, run.outcome) for run in many.passes[1:] if run.outcome != "failed"]
    assert tried == [("training", "solved")]
    assert many.notes == ()


def _tried(model: nn.Module, *inputs: Tensor, max_passes: int = 6) -> dict[str, str]:
    further = FurtherPasses(model, capture(model, inputs), max_passes, Limits(1000, None, 0.0))
    return {one.variation.name: one.outcome for one in further.tried[1:]}


def test_passes_that_differ_in_sizes_alone_are_not_solved_again() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(2, 3, 9, 9))
    # The linear layer takes one size of images; in training mode BatchNorm has the statistics of the batch.
    assert _tried(model, torch.randn(2, 3, 9, 9)) == {
        "larger sizes in training mode": "failed",
        "a larger batch in training mode": "alike",
    }
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Dropout(), nn.ReLU())
    assert _tried(model, torch.randn(2, 3, 9, 9)) == {"larger sizes in training mode": "alike"}


def test_sizes_that_are_equal_by_chance_are_no_likeness() -> None:
    """A batch of six and six units: the second pass tells them apart, so it says something new."""

    class Gram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.embed(x)

    model = Gram()
    first, second = capture(model, (torch.randn(6, 3),)), capture(model, (torch.randn(7, 3),))
    assert not alike(first, second)
    assert alike(capture(model, (torch.randn(5, 3),)), second)


def test_a_size_that_stands_for_two_things_elsewhere_is_no_difference() -> None:
    """Two rows and four heads are eight, as half a head is: at no operator do the two meet."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Linear(3, 64), nn.Linear(64, 9)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x).view(*x.shape[:2], 4, 16).transpose(1, 2)
            h = torch.cat((h[..., 8:], h[..., :8]), -1)
            weights = torch.bmm(h.reshape(-1, x.shape[1], 16), h.reshape(-1, x.shape[1], 16).transpose(1, 2))
            return self.out((weights @ h.reshape(-1, x.shape[1], 16)).view(h.shape).transpose(1, 2).flatten(2))

    model = Heads()
    first, second = (capture(model, (torch.randn(batch, length, 3),)) for batch, length in ((2, 5), (7, 11)))
    assert alike(first, second)


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr"])
def test_sparse_inputs_have_other_sizes_too(layout: str) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layers(x.to_dense())
            return y

    x = torch.randn(4, 6)
    x = x.to_sparse() if layout == "sparse_coo" else x.to_sparse(layout=getattr(torch, layout), **_blocks(layout))
    spec = pg.auto_spec(Reads(), (x,))
    assert len(spec.moving) == 1
    assert any(run.outcome in ("solved", "alike") for run in spec.passes[1:]) or layout == "sparse_bsr", spec.passes


def _blocks(layout: str) -> dict[str, tuple[int, int]]:
    return {"blocksize": (2, 2)} if layout == "sparse_bsr" else {}


def test_an_input_without_values_stays_empty() -> None:
    """As the lags of a series that is not looked back upon; what cannot be resized is no reason to fail."""

    class Series(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x: Tensor, more: Tensor) -> Tensor:
            y: Tensor = self.layers(torch.cat([x, more], -1))
            return y

    spec = pg.auto_spec(Series(), (torch.randn(4, 6), torch.zeros(4, 0)))
    assert len(spec.moving) == 1 and any(run.outcome == "alike" for run in spec.passes), spec.passes


class Returns(nn.Module):
    """With a flag, another result; which of them says how."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.up, self.down, self.other = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 7)

    def forward(self, x: Tensor, more: bool = False) -> Any:
        h = torch.relu(self.up(x))
        if not more:
            return self.down(h)
        u = self.other(h)
        return {
            "the last of what is computed on the way": lambda: (self.down(h), h[:, -1:]),
            "a cache with room for more": lambda: (self.down(h), torch.cat([torch.zeros_like(h[:, :2]), h], 1).clone()),
            "another head": lambda: (self.down(h), u),
            "the last of another head": lambda: (self.down(h), u[:, -1:]),
            "two parts of one result": lambda: (u[..., :2], u[..., 2:]),
            "what is computed from it": lambda: (self.down(h), 2 * h[:, -1:]),
        }[self.what]()


@pytest.mark.parametrize(
    ("what", "moving"),
    [
        ("the last of what is computed on the way", ["up"]),
        ("a cache with room for more", ["up"]),
        ("another head", ["up"]),
        ("the last of another head", ["up"]),
        ("two parts of one result", ["up"]),
        ("what is computed from it", []),
    ],
)
def test_what_a_flag_returns_besides(what: str, moving: list[str]) -> None:
    """Values on the way to the result are by-products wherever they are put; what only a flag computes is a result."""
    spec = pg.auto_spec(Returns(what), (torch.randn(4, 6, 5),))
    assert list(spec.moving) == moving
    (flag,) = (run for run in spec.passes if "more" in run.name)
    assert ("intermediate" in flag.says) == (
        what in ("the last of what is computed on the way", "a cache with room for more")
    )


def test_statistics_of_the_batch_matter_to_scales_alone() -> None:
    """In training mode BatchNorm divides by what its input is scaled by, so that no factor passes it."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 16, 16)  # as many places as channels, which are still told apart
    first = capture(model, (x,))
    further = FurtherPasses(model, first, 4, Limits(10**6, None, 0.0))
    assert len(further.passes) == 1 and len(further.in_training) == 1
    assert alike(first, further.in_training[0], in_any_mode=True) and not alike(first, further.in_training[0])
    both = pg.auto_spec(model, (x,), symmetry="general")
    evaluation = pg.auto_spec(model, (x,), symmetry="general", vary=False)
    assert both.dimension() < evaluation.dimension()
    assert evaluation.unused == ("1.num_batches_tracked", "3.num_batches_tracked")
    assert both.unused == pg.auto_spec(model, (x,)).unused == (), "training counts batches"


def test_a_view_that_cuts_a_weight_otherwise_at_another_size_is_a_difference() -> None:
    """24 units as two rows of 12 for a batch of two, and as three rows of 8 for one of three."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.randn(24))
            self.out = nn.Linear(1, 5)

        def forward(self, x: Tensor) -> Tensor:
            shift = self.shift.view(len(x), -1).mean(1, keepdim=True)
            return self.out(torch.tanh(x + shift))

    model = Rows()
    two, three = (capture(model, (torch.randn(n, 1),)) for n in (2, 3))
    assert not alike(two, three)


def test_a_batch_of_heads_is_like_another() -> None:
    """Two texts of four heads are eight rows, five texts twenty: the heads stay what they are."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Linear(3, 48), nn.Linear(12, 9)

        def forward(self, x: Tensor) -> Tensor:  # (length, batch, 3)
            h = self.embed(x).view(len(x), -1, 12)
            return self.out(torch.bmm(h.transpose(0, 1), h.permute(1, 2, 0)) @ h.transpose(0, 1))

    model = Heads()
    first, second = (capture(model, (torch.randn(length, batch, 3),)) for length, batch in ((7, 2), (11, 5)))
    assert alike(first, second)


def test_a_view_that_cuts_otherwise_at_another_size_is_a_difference() -> None:
    """Four places of 16 channels as 16 channels of 2 by 2 places keep blocks of 4; nine of 16 as 16 of 3 by 3 none."""

    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            y: Tensor = self.out(h.flatten(2).transpose(1, 2).reshape(h.shape))
            return y

    torch.manual_seed(0)
    model = Mixes()
    first, second = (capture(model, (torch.randn(n, 3, side, side),)) for n, side in ((2, 2), (5, 3)))
    assert not alike(first, second)
    spec = pg.auto_spec(model, (torch.randn(2, 3, 2, 2),))
    assert _error(model, spec, (torch.randn(2, 3, 3, 3),), (torch.randn(2, 3, 5, 5),)) < 1e-12
    assert _error(model, pg.auto_spec(model, (torch.randn(2, 3, 2, 2),), vary=False), (torch.randn(2, 3, 3, 3),)) > 1e-3


def test_joined_passes_share_what_they_both_compute_from_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    passes = [capture(model, (torch.randn(n, 3),)) for n in (4, 5)]
    both = joined(passes)
    assert len(both.placeholders("parameter")) == 4
    assert len(both.placeholders("input")) == 2
    calls = [[n for n in p.graph.nodes if n.op == "call_function"] for p in (*passes, both)]
    # Two products and a ReLU in each; the two weights are transposed once.
    assert (len(calls[0]), len(calls[1]), len(calls[2])) == (5, 5, 8)
    assert [len(p.graph.nodes) for p in passes] == [len(calls[0]) + 6] * 2, "the passes themselves are left alone"


class _Planned(nn.Module):
    """What a class lists, an instance holds in a list of its own, as transformers' plans for several devices are."""

    plan: ClassVar[dict[str, Any]] = {"out": (["h"], ["y"])}

    def __init__(self) -> None:
        super().__init__()
        self.own = dict(type(self).plan)
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_a_copy_in_the_place_of_an_original_is_no_state_that_a_pass_keeps() -> None:
    assert not capture(_Planned(), (torch.randn(2, 3),)).keeps_state
    assert "two calls" not in _tried(_Planned(), torch.randn(2, 3))


class _Last(nn.Module):
    """Normalises in place, and returns the last few; or writes once more into what was made at the start."""

    def __init__(self, *, writes_later: bool = False) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.writes_later = writes_later

    def forward(self, x: Tensor, last: int = 0) -> Tensor:
        gates = self.mix(self.embed(x)).softmax(-1)
        gates /= gates.sum(-1, keepdim=True)
        hidden = (self.embed(x) * gates)[:, slice(-last, None)]
        if self.writes_later:
            gates *= 2
        return self.out(hidden + gates[:, slice(-last, None)])


@pytest.mark.parametrize("writes_later", [False, True])
def test_joined_passes_share_what_they_do_at_the_start_writing_included(writes_later: bool) -> None:
    model = _Last(writes_later=writes_later)
    passes = [capture(model, (torch.randn(2, 5, 3),), {"last": n}) for n in (0, 2)]
    names = [str(node.target) for node in joined(passes).graph.nodes if node.op == "call_function"]
    # Two slices of the end, and one layer for each of them; all that comes before is the same, unless it is written to.
    assert names.count("aten.div_.Tensor") == (2 if writes_later else 1)
    assert names.count("aten.addmm.default") + names.count("aten.linear.default") == (8 if writes_later else 5)
    spec = pg.auto_spec(model, (torch.randn(2, 5, 3),))
    assert [spec.groups[name].size for name in spec.moving] == [6]
    assert _error(model, spec, (torch.randn(2, 7, 3), 3)) < 1e-12


def _row_factor(x: Tensor) -> Tensor:  # torchvision's
    noise = torch.empty([x.shape[0]] + [1] * (x.ndim - 1), dtype=x.dtype).bernoulli_(0.8)
    return x * noise.div_(0.8)


def _new_factor(x: Tensor) -> Tensor:  # timm's
    return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.8).div_(0.8)


def _floor_factor(x: Tensor) -> Tensor:  # as transformers has it
    draw = 0.8 + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype)
    draw.floor_()
    return x.div(0.8) * draw


def _batch_factor(x: Tensor) -> Tensor:
    return x * torch.rand(())


def _channel_factor(x: Tensor) -> Tensor:
    return x * torch.empty((1, x.shape[1])).bernoulli_(0.8)


def _weight_factor(x: Tensor) -> Tensor:
    return x + torch.randn(x.shape)


@pytest.mark.parametrize(
    ("factor", "as_none"),
    [(_row_factor, True), (_new_factor, True), (_floor_factor, True), (_batch_factor, True), (_channel_factor, False),
     (_weight_factor, False)],
)  # fmt: skip
def test_a_factor_drawn_for_each_sample_is_as_good_as_none(factor: Callable[[Tensor], Tensor], as_none: bool) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            h = h + (factor(self.mix(h)) if self.training else self.mix(h))
            return self.out(h)

    outcome = _tried(Residual(), torch.randn(2, 3))["a larger batch in training mode"]
    assert outcome == ("alike" if as_none else "solved")


def test_a_factor_for_samples_as_many_as_units_is_looked_at() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Parameter(torch.randn(6, 3)), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            table = _row_factor(self.table) if self.training else self.table
            return self.out(x @ table)

    model = Rows()
    passes = [capture(model, (torch.randn(2, 6),))]
    further = FurtherPasses(model, passes[0], 6, Limits(1000, None, 0.0))
    assert "solved" in [one.outcome for one in further.tried[1:]]


def test_joined_passes_keep_apart_what_each_of_two_modules_makes_anew() -> None:
    """The same order of the places, repeated along the units of one module, and then along those of another."""

    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x).tanh()
            state = h.new_zeros(len(h), 1, 6)
            order = torch.arange(h.shape[1] - 1, -1, -1)[None, :, None].expand_as(h)
            y: Tensor = self.out(h.gather(1, order) + state)
            return y

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Reversed(), Reversed()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.one(x) + self.other(x)
            return y.exp() if self.training else y

    torch.manual_seed(0)
    model = Both().eval()
    spec = pg.auto_spec(model, (torch.randn(2, 5, 3),))
    assert [one.outcome for one in spec.passes].count("solved") > 1
    assert spec.log_order() == pytest.approx(2 * math.lgamma(7))
    assert _error(model, spec, (torch.randn(4, 8, 3),)) < 1e-12


def test_sizes_grow_and_numbers_that_count_go_on() -> None:
    def larger(tensor: Tensor, *sizes: Mapping[int, int]) -> Tensor:
        return resized(tensor, Sizes(*sizes, lambda tensor: range(2 if tensor.ndim == 4 else 1, tensor.ndim)))

    places = torch.arange(4).expand(2, 4)
    assert larger(places, {}, {4: 6}).tolist() == [list(range(6))] * 2
    assert larger(torch.tensor([[5, 5, 7, 9]]), {}, {4: 6}).tolist() == [[5, 5, 7, 9, 5, 5]]
    assert larger(torch.randn(2, 3, 32, 32), {2: 3}, {32: 64}).shape == (3, 3, 64, 64)
    # The channels are no places, so that they keep their size though it is that of the batch.
    assert larger(torch.randn(3, 3, 8, 8), {3: 5}, {}).shape == (5, 3, 8, 8)


def test_inputs_are_not_changed() -> None:
    given = torch.randn(2, 4, 3)
    before = given.clone()
    varied = list(variations(nn.Linear(3, 2), ExampleInputs((given,), {}, "given")))
    # Two rows become five, since three are the features and four the places; the places seven, or else the features, or
    # both, of which the features are then eleven.
    shapes = [tuple(one.inputs.args[0].shape) for one in varied]
    assert shapes == [(5, 7, 11), (5, 7, 3), (5, 4, 7), (5, 4, 3)] * 2 + [(2, 4, 3)] * 3
    assert torch.equal(given, before)


def test_a_pass_that_fails_is_said_and_harmless() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            if self.training or len(x) != 4:
                raise ValueError("four rows, and no training")
            y: Tensor = self.out(self.embed(x).relu())
            return y

    spec = pg.auto_spec(Fixed(), (torch.randn(4, 3),), max_passes=6)
    assert spec.log_order() == pytest.approx(S6)
    reason = "ValueError: four rows, and no training"
    assert spec.notes == (f"no pass ran with a larger batch, training mode: {reason}",)
    assert [(run.outcome, run.says) for run in spec.passes[1:]] == [("failed", reason)] * 3


def test_what_there_is_no_room_for_is_said(tmp_path: Path) -> None:
    spec = pg.auto_spec(Alternating(), (torch.randn(4, 3),), max_passes=2)
    assert spec.notes[-1] == "no pass ran with a second call, larger sizes in evaluation mode: max_passes=2"
    spec.save(tmp_path / "spec.json")
    assert pg.PermutationSpec.load(tmp_path / "spec.json").passes == spec.passes
    with pytest.raises(ValueError, match="max_passes=0 is no whole number from 1 on"):
        pg.auto_spec(Alternating(), (torch.randn(4, 3),), max_passes=0)


def test_as_given_is_said_to_be_so() -> None:
    spec = pg.auto_spec(Alternating(), (torch.randn(4, 3),), vary=False)
    assert spec.notes[-1] == "inferred from one pass, in evaluation mode, on (float32[4, 3])"
    assert [run.name for run in spec.passes] == ["the first pass"]


class Flagged(nn.Module):
    """A flag, an argument with three values, an optional tensor, and a count; each reads a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, 6), nn.Linear(6, 2)
        self.deep, self.wide, self.cross = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(4, 6)
        self.steps = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

    def forward(
        self,
        x: Tensor,
        deep: bool = False,
        kind: Literal["plain", "wide"] = "plain",
        context: Tensor | None = None,
        steps: int = 1,
    ) -> Tensor:
        h = self.embed(x).relu()
        for step in range(steps):
            h = h + self.steps[step](h)
        if deep:
            h = h + self.deep(h)
        if kind == "wide":
            h = h + self.wide(h)
        if context is not None:
            h = h + self.cross(context)
        y: Tensor = self.out(h)
        return y


def test_arguments_are_varied() -> None:
    """Given or found: every value of a flag, tensors for what is left out, and a larger count."""
    torch.manual_seed(0)
    model, x = Flagged(), torch.randn(5, 3)
    one, spec = (pg.auto_spec(model, (x,), vary=vary) for vary in (False, True))
    context = torch.randn(5, 4)
    calls = [(x, True), (x, False, "wide"), (x, False, "plain", context), (x, True, "wide", context, 2)]
    for call in calls:
        assert _error(model, one, call) > 1e-3, "the control"
        assert _error(model, spec, call) < 1e-12
    assert spec.log_order() == pytest.approx(S6)  # one stream
    assert [run.name for run in spec.passes[1:]] == [
        "a larger batch in training mode", "larger steps", "deep=True", "kind='wide'", "context given",
    ]  # fmt: skip
    assert spec.unused == ("steps.2.weight", "steps.2.bias")


def test_a_tensor_that_may_be_left_out_is_left_out() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.null, self.out = nn.Linear(3, 6), nn.Parameter(torch.randn(6)), nn.Linear(6, 2)

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            y: Tensor = self.out((self.null.expand(len(x), 6) if context is None else self.embed(context)).relu())
            return y

    torch.manual_seed(0)
    model, x = Optional(), torch.randn(5, 3)
    spec = pg.auto_spec(model, (x, torch.randn(5, 3)))
    assert spec.log_order() == pytest.approx(S6)
    assert _error(model, spec, (x,), (x, torch.randn(5, 3))) < 1e-12


class Features(nn.Module):
    """A flag that makes it return what it computes on the way, alone, or beside a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out, self.aux = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor, features: bool = False, both: bool = False) -> Any:
        h = self.embed(x).relu()
        if features:
            return h
        return (self.out(h), h, self.aux(h)) if both else self.out(h)


def test_what_a_flag_returns_on_the_way_pins_nothing() -> None:
    """The features of ``features=True`` are not the result; the head that ``both=True`` adds is one."""
    spec = pg.auto_spec(Features(), (torch.randn(5, 3),))
    assert spec.log_order() == pytest.approx(S6)
    assert spec.unused == ()
    assert [str(axis) for axis in spec.axes["aux.weight"]] == ["2", "embed"]
    says = {run.name: run.says for run in spec.passes}
    assert says["features=True"] == "returns 1 intermediate results, whose units move"
    assert says["both=True"] == "reads aux.weight, aux.bias; returns 1 intermediate results, whose units move"


def test_features_returned_beside_the_result_without_any_flag_are_pinned() -> None:
    class Pair(Features):
        def forward(self, x: Tensor, features: bool = True, both: bool = False) -> Any:
            h = self.embed(x).relu()
            return (self.out(h), h) if features else self.out(h)

    assert pg.auto_spec(Pair(), (torch.randn(5, 3),)).log_order() == 0


def test_time_that_is_up_while_solving_pins_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """After ten operators no other is looked at; what they touch stays put, and that is said."""
    layers = [layer for _ in range(9) for layer in (nn.Linear(6, 6), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(6, 2))
    asked = iter(range(1000))
    monkeypatch.setattr(Solution, "out_of_time", lambda solution: next(asked) >= 10)
    spec = pg.auto_spec(model, (torch.randn(5, 6),), vary=False)
    # Of 29 operators, three a layer (a transpose, a product and a ReLU), 19 are left: the fourth layer's product is the
    # first left out, so that the units between the first three layers move, and no others.
    assert spec.log_order() == pytest.approx(2 * S6)
    assert spec.notes[0] == "max_seconds was up while solving: what 19 operators touch stays put"
    assert {pin.reason for pin in spec.pins} >= {"max_seconds was up before its operator was looked at"}
    assert _error(model, spec, (torch.randn(5, 6),)) < 1e-12


def test_no_pass_is_begun_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "over", lambda limits: True)
    monkeypatch.setattr(Limits, "check", lambda limits, count: None)
    monkeypatch.setattr(Solution, "out_of_time", lambda solution: False)
    spec = pg.auto_spec(Steps(), (torch.randn(4, 3),), max_seconds=5.0)
    assert spec.notes[-1] == "no pass ran with a larger batch, steps, training mode: max_seconds=5.0"
