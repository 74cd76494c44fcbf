"""What a pass does not show: states that begin with zeros, ties that a mask makes, values that leave torch unseen."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.errors import CaptureError
from tests.groups.test_layouts import Net, lin, par

X = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))


def error_of(model: nn.Module, given: Tensor, *inputs: Tensor, vary: bool = True) -> tuple[float, pg.PermutationSpec]:
    """How far the outputs on other inputs move, the most over a few permutations of the spec found with `given`."""
    spec = pg.auto_spec(model, (given,), vary=vary)
    model, worst = copy.deepcopy(model).double().eval(), 0.0
    before = copy.deepcopy(model.state_dict())
    for seed in range(3):
        after = spec.random(seed, every_group=True).apply(before)
        for x in inputs:
            outputs = []
            for state in (before, after):
                model.load_state_dict(state)
                with torch.no_grad():
                    outputs.append(model(x.double()))
            worst = max(worst, float((outputs[0] - outputs[1]).abs().max()))
    return worst, spec


class Recurrent(nn.Module):
    """A recurrent layer that begins with zeros, its own or those that `forward` makes."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.embed, self.core, self.head = nn.Linear(3, 5), core, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.core, nn.RNNCellBase):
            return self.head(self.core(self.embed(x))[0])  # type: ignore[no-any-return]
        state: Any = None
        for step in self.embed(x):
            state = self.core(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_one_step_of_a_sequence_says_nothing_that_more_steps_refute(kind: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model = Recurrent(kind(5, 6))
    inputs = torch.randn(1, 2, 3), torch.randn(1, 2, 3), torch.randn(4, 2, 3)
    error, spec = error_of(model, *inputs, vary=False)
    assert error < 1e-9, spec
    assert list(spec.moving) == ["embed"]  # what comes before the state moves as ever
    error, spec = error_of(model, *inputs)
    assert error < 1e-9, spec
    assert list(spec.moving) == ["embed", "core"]  # a pass of more steps shows what the state's weight goes with


class Queries(nn.Module):
    """A decoder that begins with zeros and learnt positions, as in DETR: the first values are of zeros alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.value, self.query, self.mix = (nn.Linear(n, 8) for n in (3, 8, 8, 8))
        self.places = nn.Parameter(torch.randn(4, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        memory, target = self.embed(x), torch.zeros(x.shape[0], 4, 8, dtype=x.dtype)
        target = target + self.value(target)
        scores = self.query(target + self.places) @ self.query(memory).transpose(1, 2)
        found = target + self.places + scores.softmax(-1) @ memory
        return self.head(self.mix(found).relu())  # type: ignore[no-any-return]


def test_zeros_that_every_pass_begins_with_hold_nothing_else_back() -> None:
    torch.manual_seed(0)
    model = Queries()
    error, spec = error_of(model, torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.randn(3, 7, 3))
    assert error < 1e-9, spec
    assert list(spec.moving) == ["embed", "query", "mix"]
    assert str(spec.axes["value.weight"][1]) == "8"
    # A single step cannot be told from the first of several.
    assert list(pg.auto_spec(model, (torch.randn(2, 1, 3),), vary=False).moving) == []


class Keeps(nn.Module):
    """A recurrent cell whose state stays on the model from one call to the next."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.state, self.states = how, None, []
        self.cell, self.head = nn.RNNCell(5, 6), nn.Linear(6, 2)
        self.table = torch.randn(3, 6, dtype=torch.float64)
        self.register_buffer("kept", torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "attribute":
            before = self.table
        elif self.how in ("buffer", "buffer in place"):
            before = self.kept
        else:
            before = self.states[-1] if self.states else self.state
        after = self.cell(x, torch.zeros(len(x), 6, dtype=x.dtype) if before is None else before.to(x.dtype))
        if self.how == "attribute":
            self.table = after
        elif self.how == "buffer":
            self.kept = after
        elif self.how == "buffer in place":
            self.kept.copy_(after)
        elif self.how == "list":
            self.states.append(after)
        else:
            self.state = after.detach()
        return self.head(after)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("how", "moving"), [("attribute", 0), ("buffer", 1), ("buffer in place", 1), ("list", 1), ("nothing at first", 1)]
)
def test_a_state_kept_on_the_model_is_what_the_next_call_meets(how: str, moving: int) -> None:
    torch.manual_seed(0)
    model, x = Keeps(how), torch.randn(3, 5)
    spec = pg.auto_spec(model, (x,))
    assert len(spec.moving) == moving, spec
    before = model.double().state_dict()
    one, other = Keeps(how).double(), Keeps(how).double()
    other.table = one.table.clone()
    one.load_state_dict(before)
    other.load_state_dict(spec.random(0, every_group=True).apply(copy.deepcopy(before)))
    with torch.no_grad():
        for _ in range(3):
            assert torch.allclose(one(x.double()), other(x.double()), rtol=0, atol=1e-9)


class Places(nn.Module):
    """Adds as many rows of a table as the sequence is long, from the first or from the second on."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed, self.mix, self.head = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.table, self.decay = nn.Parameter(torch.randn(1, 16, 8)), nn.Parameter(torch.rand(4, 16))

    def forward(self, x: Tensor) -> Tensor:
        (batch, steps), y = x.shape[:2], self.embed(x)
        if self.how == "sliced":
            y = y + self.table[:, :steps]
        elif self.how == "from the second":
            y = y + self.table.squeeze(0).to(y.dtype)[1:][:steps]
        else:  # heads in front of the steps
            y = y.view(batch, steps, 4, 2).transpose(1, 2) * self.decay[:, :steps, None]
            y = y.transpose(1, 2).reshape(batch, steps, 8)
        return self.head(self.mix(y).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["sliced", "from the second", "heads"])
def test_rows_that_only_longer_sequences_read_go_with_those_that_were_read(how: str) -> None:
    torch.manual_seed(0)
    model = Places(how)
    error, spec = error_of(model, torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.randn(2, 14, 3))
    assert error < 1e-9, spec
    assert list(spec.moving) == (["embed#0", "mix", "embed#1"] if how == "heads" else ["embed", "mix"])
    if how != "heads":
        assert [str(axis) for axis in spec.axes["table"]] == ["1", "16", "embed"]


def test_rows_left_out_say_nothing_where_those_read_differ() -> None:
    """Three layers' gates in one table, of which two are read."""

    class Gates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 6))
            self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x).relu() * self.table[0]).relu() * self.table[1])  # type: ignore[no-any-return]

    error, spec = error_of(Gates(), X, X, -X)
    assert error < 1e-9, spec
    assert list(spec.moving) == ["first", "second"] or sorted(g.size for g in spec.moving.values()) == [6, 6]


def _masked(m: Any, x: Tensor) -> Tensor:
    kept = m.a(x) * (x.sum(-1, keepdim=True) > 0).to(x.dtype)
    return m.o(m.t[m.r(kept).argmax(-1)].tanh() + kept)


def _filled(m: Any, x: Tensor) -> Tensor:
    kept = m.a(x).masked_fill(x.sum(-1, keepdim=True) > 0, 0.0)
    return m.o(m.t[m.r(kept).argmax(-1)].tanh() + kept)


def _narrow(m: Any, x: Tensor) -> Tensor:
    return m.o(m.t[m.up(m.one(x).relu()).argmax(-1)])


def _rounded(m: Any, x: Tensor) -> Tensor:
    scores = m.r(m.a(x))
    return m.o(m.t[(scores + (scores.round() - scores).detach()).argmax(-1)])


def _divided(m: Any, x: Tensor) -> Tensor:
    return m.o(m.t[torch.div(m.r(m.a(x)), 0.5, rounding_mode="floor").argmax(-1)])


def _plain(m: Any, x: Tensor) -> Tensor:
    return m.o(m.t[m.r(m.a(x)).argmax(-1)])


@pytest.mark.parametrize(
    ("forward", "chosen"),
    [(_masked, "4"), (_filled, "4"), (_narrow, "4"), (_rounded, "4"), (_divided, "4"), (_plain, "r")],
)
def test_what_may_be_equal_is_not_told_apart(forward: Any, chosen: str) -> None:
    torch.manual_seed(0)
    model = Net(
        forward, a=lin(5, 6), r=nn.Linear(6, 4, bias=False), o=lin(6, 2), t=par(4, 6), one=lin(5, 1),
        up=nn.Linear(1, 4, bias=False),
    )  # fmt: skip
    error, spec = error_of(model, X, X, -X, X.abs(), -X.abs())
    assert error < 1e-9, spec
    assert str(spec.axes["t"][0]) == chosen


def _in_any_order(m: Any, x: Tensor) -> Tensor:
    return m.o(m.t[m.r(m.a(x)).topk(3, sorted=False).indices].sum(-2))


def _by_rank(m: Any, x: Tensor) -> Tensor:
    found = m.r(m.a(x)).topk(3, sorted=False)
    return m.o((m.t[found.indices] * found.values.softmax(-1)[..., None] * m.s).sum(-2))


def _first_of_them(m: Any, x: Tensor) -> Tensor:
    return m.o(m.t[m.r(m.a(x)).topk(3, sorted=False).indices[..., 0]])


@pytest.mark.parametrize(("forward", "chosen"), [(_in_any_order, "r"), (_by_rank, "4"), (_first_of_them, "4")])
def test_the_largest_come_in_an_order_that_depends_on_their_places(forward: Any, chosen: str) -> None:
    torch.manual_seed(0)
    model = Net(forward, a=lin(5, 6), r=nn.Linear(6, 4), o=lin(6, 2), t=par(4, 6), s=par(3, 1))
    error, spec = error_of(model, X, X, -X, 2 * X)
    assert error < 1e-9, spec
    assert str(spec.axes["t"][0]) == chosen


class Leaves(nn.Module):
    """Takes values where no operator shows it, after it has asked for one, so that its pass is on real tensors."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)
        self.register_buffer("signs", torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0, 0.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.how == "zeros with a sign":
            return self.b(torch.copysign(y, self.signs))  # type: ignore[no-any-return]
        if float(x.sum()) > 1e9:
            return x
        numbers = torch.arange(6.0, dtype=y.dtype)
        if self.how == "elsewhere":
            made: list[Tensor] = []
            thread = threading.Thread(target=lambda: made.append(self.b(y)))
            thread.start()
            thread.join()
            return made[0] + self.b(y)  # type: ignore[no-any-return]
        if self.how == "mapped":
            y = y.clone().map_(numbers.expand_as(y).contiguous(), lambda a, b: a * b)
        elif self.how == "copied":
            y = y * copy.deepcopy(self.a.bias.detach()).cumsum(0)
        elif self.how == "saved":
            torch.save(y, file := io.BytesIO())
            file.seek(0)
            y = torch.load(file) * numbers
        elif self.how == "stored":
            read = torch.tensor(list(y.contiguous().untyped_storage()), dtype=torch.uint8).view(y.dtype)
            y = read.view(y.shape) * numbers
        return self.b(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["zeros with a sign", "mapped", "copied", "saved", "stored", "asked"])
def test_what_leaves_torch_stays_put(how: str) -> None:
    torch.manual_seed(0)
    error, spec = error_of(Leaves(how), X, X, -X)
    assert error < 1e-9, spec
    assert bool(spec.moving) == (how == "asked")


def test_what_another_thread_computes_is_refused() -> None:
    with pytest.raises(CaptureError, match="another thread"):
        pg.auto_spec(Leaves("elsewhere"), (X,))


def test_a_tensor_that_is_given_the_memory_of_another() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        turned = torch.empty(6, 6, dtype=x.dtype)
        turned.data = m.w.data.t()
        return m.o(m.a(x) @ turned)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    error, spec = error_of(Net(forward, a=lin(5, 6), o=lin(6, 2), w=par(6, 6)), X, X)
    assert error < 1e-9, spec
    assert [str(axis) for axis in spec.axes["w"]] == ["w", "a"]


class Slotted:
    """A result without a dictionary of its attributes."""

    __slots__ = ("hidden", "logits")

    def __init__(self, hidden: Tensor, logits: Tensor) -> None:
        self.hidden, self.logits = hidden, logits


def test_results_in_slots_are_results() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        hidden = m.a(x)
        return m.b(hidden), Slotted(hidden, m.b(hidden))

    assert not pg.auto_spec(Net(forward, a=lin(5, 6), b=lin(6, 2)), (X,)).moving


class OneStep(nn.Module):
    """A recurrent layer by hand, whose first state goes through something before it meets its weight."""

    def __init__(self, through: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.again, self.head = nn.Linear(3, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)
        self.through = through

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[1], 6)
        for step in x:
            state = torch.tanh(self.embed(step) + self.again(self.through(state)))
        return self.head(state)  # type: ignore[no-any-return]


ZERO_AT_ZERO: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda h: h.relu(),
    "tanh": lambda h: h.tanh(),
    "negated": lambda h: -h,
    "turned": lambda h: torch.cat(h.chunk(2, -1)[::-1], -1),
    "stacked": lambda h: torch.stack([h, h]).mean(0),
    "resampled": lambda h: nn.functional.interpolate(h[:, None], scale_factor=1.0)[:, 0],
    "pooled": lambda h: nn.functional.max_pool1d(h, 1),
}


@pytest.mark.parametrize("through", ZERO_AT_ZERO.values(), ids=ZERO_AT_ZERO)
def test_zeros_are_followed_to_the_weight_that_meets_only_them(through: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    error, spec = error_of(OneStep(through), torch.randn(1, 2, 3), torch.randn(1, 2, 3), torch.randn(4, 2, 3))
    assert error < 1e-9, spec
