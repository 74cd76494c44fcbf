"""Rotary positions in every spelling: a complex factor for each pair of a head, and nothing where it is none."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.inference.general import turns
from tests.general.models import sequences

Turn = Callable[[Tensor, Tensor], Tensor]


def halves(x: Tensor, angles: Tensor) -> Tensor:
    both = torch.cat([angles, angles], -1)
    a, b = x.chunk(2, -1)
    return x * both.cos() + torch.cat([-b, a], -1) * both.sin()


def apart(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def repeated(x: Tensor, angles: Tensor) -> Tensor:
    cosine, sine = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return x * cosine + torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) * sine


def neighbours(x: Tensor, angles: Tensor) -> Tensor:
    cosine, sine = angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)
    return x * cosine + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sine


def interleaved(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1).flatten(-2)


def complex_numbers(x: Tensor, angles: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def partial(x: Tensor, angles: Tensor) -> Tensor:
    """The first half of the channels alone, by half as many frequencies."""
    n = x.shape[-1] // 2
    return torch.cat([halves(x[..., :n], angles[..., : n // 2]), x[..., n:]], -1)


def partial_neighbours(x: Tensor, angles: Tensor) -> Tensor:
    n = x.shape[-1] // 2
    return torch.cat([interleaved(x[..., :n], angles[..., : n // 2]), x[..., n:]], -1)


def put_apart(x: Tensor, angles: Tensor) -> Tensor:
    """Neighbours make a pair, and are halves from then on."""
    return halves(x.unflatten(-1, (-1, 2)).transpose(-1, -2).reshape(x.shape), angles)


def sorted_apart(x: Tensor, angles: Tensor) -> Tensor:
    return apart(torch.cat([x[..., ::2], x[..., 1::2]], -1), angles)


def put_together(x: Tensor, angles: Tensor) -> Tensor:
    """Halves make a pair, and are neighbours from then on."""
    a, b = x.chunk(2, -1)
    return torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1).flatten(-2)


def unequal(x: Tensor, angles: Tensor) -> Tensor:
    """No turn: the two of a pair have angles of their own."""
    both = torch.cat([angles, 2 * angles], -1)
    a, b = x.chunk(2, -1)
    return x * both.cos() + torch.cat([-b, a], -1) * both.sin()


def mirrored(x: Tensor, angles: Tensor) -> Tensor:
    """No turn: without the change of sign it is a reflection, which no complex factor commutes with."""
    both = torch.cat([angles, angles], -1)
    a, b = x.chunk(2, -1)
    return x * both.cos() + torch.cat([b, -a * 2], -1) * both.sin()


def squared(x: Tensor, angles: Tensor) -> Tensor:
    """No turn: it is not linear."""
    return halves(x, angles) + 0.1 * halves(x * x, angles)


class Rotary(nn.Module):
    """Heads of width 8 with rotary positions, each key and value head for some heads of queries."""

    def __init__(self, turn: Turn, heads: int = 2, shared: int = 1, norm: str = "", keys: Turn | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(11, n * 8) for n in (heads * shared, heads, heads))
        self.o = nn.Linear(heads * shared * 8, 11)
        self.turn, self.keys, self.shared = turn, keys or turn, shared
        self.norm = nn.RMSNorm(8) if norm else nn.Identity()
        self.key_norm = nn.RMSNorm(8) if norm == "two gains" else self.norm
        self.learned = nn.Parameter(torch.ones(4)) if norm == "learned" else None
        self.register_buffer("frequencies", 10.0 ** -torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        frequencies = self.frequencies
        if self.learned is not None:
            frequencies = frequencies * self.learned
        else:
            q, k = self.norm(q), self.key_norm(k)
        angles = torch.arange(t, device=x.device)[:, None] * frequencies
        q, k = self.turn(q, angles), self.keys(k, angles)
        k, v = (y.repeat_interleave(self.shared, 1) for y in (k, v))
        y = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class Parts(Rotary):
    """Logits of the two halves of all channels, after the turn, one of them weighted."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        angles = torch.arange(t, device=x.device)[:, None] * self.frequencies
        q, k = self.turn(q, angles), self.keys(k, angles)
        logits = q[..., :4] @ k[..., :4].mT + 2 * (q[..., 4:] @ k[..., 4:].mT)
        return self.o((logits.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))


class Viewed(Parts):
    """The same, by a view of the channels in two halves."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        angles = torch.arange(t, device=x.device)[:, None] * self.frequencies
        q, k = (turn(y, angles).view(b, -1, t, 2, 4) for turn, y in ((self.turn, q), (self.keys, k)))
        logits = torch.einsum("bhqic,bhkic->bhiqk", q, k)
        return self.o(((logits[:, :, 0] + 2 * logits[:, :, 1]).softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))


#: The structures on queries and keys, each with its size; by hand.
TURNS: list[tuple[Turn, list[tuple[str, int]]]] = [
    (halves, [("T", 8)]),
    (apart, [("T", 8)]),
    (repeated, [("T", 8)]),
    (neighbours, [("T2", 8)]),
    (interleaved, [("T2", 8)]),
    (complex_numbers, [("T2", 8)]),
    (put_apart, [("T2", 8)]),
    (sorted_apart, [("T2", 8)]),
    (put_together, [("T", 8)]),
    (partial, [("T", 4), ("GL", 4)]),
    (partial_neighbours, [("T2", 4), ("GL", 4)]),
]
DIMENSIONS = {"T": lambda n: n, "T2": lambda n: n, "GL": lambda n: n * n}


def _spec(model: nn.Module) -> pg.PermutationSpec:
    return pg.auto_spec(model, (sequences(11),), symmetry="general")


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize(("turn", "structures"), TURNS, ids=[turn.__name__ for turn, _ in TURNS])
def test_a_complex_factor_for_each_pair_of_each_key_head(
    turn: Turn, structures: list[tuple[str, int]], shared: int
) -> None:
    torch.manual_seed(0)
    model = Rotary(turn, shared=shared).eval()
    spec = _spec(model)
    found = [(str(g.structure), g.size) for g in spec.acting.values() if str(g.structure) != "S"]
    assert sorted(found) == sorted([*structures, ("GL", 8)])
    assert spec.dimension() == 2 * (64 + sum(DIMENSIONS[name](n) for name, n in structures))
    proof = pg.verify(model, spec, (sequences(11),))
    assert proof.passed and proof.maximal, str(proof)


class Whole(Rotary):
    """Norms of all queries, and of all keys, with a gain for each channel of each head."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(turn)
        self.q, self.k = (nn.Sequential(nn.Linear(11, 16, bias=False), nn.RMSNorm(16)) for _ in range(2))


@pytest.mark.parametrize(
    ("model", "structure", "times"),
    [
        (Rotary(halves, norm="two gains"), "R", 1),
        (Rotary(interleaved, norm="two gains"), "R2", 1),
        (Whole(halves), "R", 2),  # of each head
        (Whole(interleaved), "R2", 2),
    ],
    ids=["halves", "neighbours", "whole halves", "whole neighbours"],
)
def test_gains_of_queries_and_keys_have_a_factor_for_each_pair(model: nn.Module, structure: str, times: int) -> None:
    """No complex factor passes a gain, but what the one gains the other may lose: half as many factors as channels."""
    model.eval()
    spec = _spec(model)
    assert [str(g.structure) for g in spec.acting.values() if g.structure.is_paired] == [structure]
    assert spec.dimension() == 2 * 64 + times * 4
    proof = pg.verify(model, spec, (sequences(11),))
    assert proof.passed and proof.maximal, str(proof)


@pytest.mark.parametrize("turn", [turn for turn, _ in TURNS], ids=[turn.__name__ for turn, _ in TURNS])
def test_permutations_stay_as_they_are(turn: Turn) -> None:
    model = Rotary(turn, shared=2)
    general, plain = _spec(model).permutations(), pg.auto_spec(model, (sequences(11),))
    assert (general.groups, general.axes) == (plain.groups, plain.axes)
    assert general.fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    "model",
    [
        Rotary(unequal),
        Rotary(mirrored),
        Rotary(squared),
        Rotary(halves, norm="gain"),  # shared by all heads, and in the way of a factor for each
        Rotary(halves, norm="learned"),  # the angles are weights
        Rotary(halves, keys=interleaved),  # queries and keys have other pairs
        Rotary(halves, keys=put_apart),
        Rotary(interleaved, keys=put_apart),
        Parts(put_apart),
        Parts(halves),  # the two of a pair are told apart
        Viewed(halves),
    ],
    ids=[
        "unequal",
        "mirrored",
        "squared",
        "norm",
        "learned",
        "other pairs",
        "apart",
        "together",
        "apart in parts",
        "parts",
        "viewed",
    ],
)
def test_what_is_no_turn_stays_put(model: nn.Module) -> None:
    spec, plain = _spec(model), pg.auto_spec(model, (sequences(11),))
    assert {str(g.structure) for g in spec.acting.values()} <= {"S", "GL", "M", "B"}
    assert spec.permutations().fingerprint == plain.fingerprint
    assert pg.verify(model, spec, (sequences(11),), controls="none").passed


def test_the_next_larger_group_changes_the_output() -> None:
    """T is not claimed for want of more: of the larger group, and of pairs that are taken otherwise, nothing passes."""
    model, x = Rotary(halves).double().eval(), sequences(11).double()
    spec = _spec(model)
    (name,) = (name for name, group in spec.acting.items() if str(group.structure) == "T")
    reference = model(x)

    def change(matrix: Tensor) -> float:
        with torch.no_grad():
            moved = {n: p.clone() for n, p in model.named_parameters()}
            for n, g in (("q", matrix), ("k", torch.linalg.inv(matrix).T)):
                whole = torch.block_diag(g, torch.eye(8, dtype=torch.float64))
                moved[f"{n}.weight"], moved[f"{n}.bias"] = whole @ moved[f"{n}.weight"], whole @ moved[f"{n}.bias"]
            return float((torch.func.functional_call(model, moved, (x,)) - reference).abs().max())

    element = spec.random(0).matrices[name][0]
    assert change(torch.from_numpy(element)) < 1e-12
    assert change(torch.diag(torch.tensor([2.0] + [1.0] * 7, dtype=torch.float64))) > 1e-6
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    assert change(torch.from_numpy(element[order][:, order])) > 1e-6
    assert change(torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]) > 1e-6


def test_elements_form_a_group_and_are_kept(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = Rotary(partial_neighbours, shared=2)
    spec, state = _spec(model), model.state_dict()
    g, h = spec.random(0), spec.random(1)
    for one, other in (
        ((g @ h).apply(state), g.apply(h.apply(state))),
        ((g @ g.inverse()).apply(state), state),
    ):
        assert all(torch.allclose(one[n], other[n], atol=1e-5) for n in state)
    g.save(tmp_path / "g.safetensors")
    read = pg.Transformation.load(tmp_path / "g.safetensors", spec)
    assert all((read.matrices[n] == m).all() for n, m in g.matrices.items())
    spec.save(tmp_path / "spec.json")
    assert pg.PermutationSpec.load(tmp_path / "spec.json").fingerprint == spec.fingerprint
    assert pg.PermutationSpec.parse(str(spec)).log_order() == spec.log_order()  # read as text, pairs stay put


@pytest.mark.parametrize("kind", [Parts, Viewed])
def test_neighbours_that_are_cut_between_pairs_keep_their_factors(kind: type[Rotary]) -> None:
    model = kind(interleaved).eval()
    spec = _spec(model)
    found = [(str(g.structure), g.size) for g in spec.acting.values() if g.structure.is_paired]
    assert found == [("T2", 4), ("T2", 4)]
    assert pg.verify(model, spec, (sequences(11),)).passed


def test_several_layers_have_factors_of_their_own() -> None:
    model = nn.Sequential(Rotary(halves), nn.Tanh(), Rotary(complex_numbers))
    spec = _spec(model)
    found = {name: str(group.structure) for name, group in spec.acting.items() if group.structure.is_paired}
    assert found == {"0.q#pairs": "T", "2.q#pairs": "T2"}
    moved = [spec.random(0, every_group=True).restricted_to([name]) for name in found]
    for one, other in pairwise([*moved, moved[0]]):
        assert {n for n, m in one.matrices.items() if (m != other.matrices[n]).any()} == set(found)


def by_table(x: Tensor, both: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * both.cos() + torch.cat([-b, a], -1) * both.sin()


class WithTable(Rotary):
    table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.turn(q, self.table), self.turn(k, self.table)
        y = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class Stack(nn.Module):
    """Layers with one table of angles, which is no longer one of pairs where it is written to after a layer."""

    def __init__(self, layers: int, changed_after: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(WithTable(by_table) for _ in range(layers))
        self.changed_after = changed_after

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None] * self.layers[0].frequencies
        both = torch.cat([angles, angles], -1)
        for at, layer in enumerate(self.layers):
            layer.table = both
            x = layer(x).tanh()
            if at == self.changed_after:
                both[:, :4].mul_(2)
        return x


@pytest.mark.parametrize("changed_after", [9, 1])
def test_layers_that_turn_alike_are_judged_once(changed_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = []
    judge = turns._judge
    monkeypatch.setattr(turns, "_judge", lambda *given: judged.append(judge(*given)) or judged[-1])
    model = Stack(4, changed_after)
    spec = pg.auto_spec(model, (sequences(11),), symmetry="general", vary=False)
    paired = [name for name, group in spec.acting.items() if group.structure.is_paired]
    # What a table holds that is written to depends on when it is read, so nothing is said of it.
    assert paired == [f"layers.{at}.q#pairs" for at in range(4 if changed_after == 9 else 0)]
    if changed_after == 9:
        assert sum(one is not None for one in judged) <= 2  # queries and keys, or both at once
    assert pg.verify(model, spec, (sequences(11),)).passed


def _unequal_where(unequal: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Rotation whose second product is larger at some positions."""

    def turn(x: Tensor, p: Tensor) -> Tensor:
        angles = p[..., None] * 10.0 ** (-torch.arange(0, 8, 2) / 8)
        more = torch.where(unequal(p), 1.3, 1.0)[..., None]
        one, other = x.chunk(2, -1)
        return torch.cat(
            [one * angles.cos() - other * angles.sin(), more * other * angles.cos() + one * angles.sin()], -1
        )

    return turn


class Positions(nn.Module):
    """Scores of queries and keys at given positions."""

    def __init__(self, turn: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.turn = nn.Linear(4, 8, bias=False), nn.Linear(4, 8, bias=False), turn

    def forward(self, x: Tensor, p: Tensor) -> Tensor:
        return (self.turn(self.q(x), p) @ self.turn(self.k(x), p).mT).softmax(-1)


def _looked_up(rows: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Rotation by a table of so many positions."""

    def turn(x: Tensor, p: Tensor) -> Tensor:
        table = torch.arange(rows)[:, None] * 10.0 ** (-torch.arange(0, 8, 2) / 8)
        return halves(x, table[p])

    return turn


@pytest.mark.parametrize(
    ("turn", "pairs"),
    [
        (_unequal_where(lambda p: p < 0), True),
        (_unequal_where(lambda p: p >= 18), False),
        (_unequal_where(lambda p: p >= 1000), False),
        (_unequal_where(lambda p: p > 50_000), False),
        (_unequal_where(lambda p: p == 3), False),
        (_looked_up(16), True),
        (_looked_up(40), True),
        (_looked_up(70_000), True),
        (lambda x, p: halves(x, (p[..., None] * torch.ones(4)).double().exp2().to(x)), True),  # beyond all numbers
    ],
    ids=["never", "from 18", "from 1000", "from 50,000", "at 3", "16 rows", "40 rows", "70,000 rows", "overflow"],
)
def test_a_turn_is_one_at_large_positions_too(turn: Callable[[Tensor, Tensor], Tensor], pairs: bool) -> None:
    p = torch.arange(5).repeat(2, 1)
    spec = pg.auto_spec(Positions(turn), (torch.randn(2, 5, 4), p), symmetry="general", vary=False)
    assert any(g.structure.is_paired for g in spec.groups.values()) == pairs
