"""Places where a claimed symmetry would be easy to get wrong: whatever is claimed there must hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import permgraph as pg
from tests.groups.test_layouts import Net, lin, par

X = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
CORNERS: dict[str, Callable[[], nn.Module]] = {}


def corner(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A function of an input and of the layers and weights below, 6 of most things."""

    def make() -> nn.Module:
        return Net(
            forward, a=lin(5, 6), b=lin(5, 6), c=lin(6, 6), o=lin(6, 2), w=par(6, 6), v=par(6), t=par(4, 6, 6),
            p=lin(36, 2), r=lin(5, 4), u=par(4, 6, 5), z=par(4, 3, 2), table=nn.Embedding(6, 6),
            wide=par(36, 6),
        )  # fmt: skip

    CORNERS[forward.__name__.strip("_")] = make
    return forward


@corner
def outer_product_of_a_vector_with_itself(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.p((y[..., :, None] * y[..., None, :]).flatten(2))


@corner
def outer_product_with_a_square_weight(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.o((y[..., :, None] * m.w).sum(-2))


@corner
def rows_of_a_square_weight_as_vectors(m: Any, x: Tensor) -> Tensor:
    return m.o(m.a(x) * m.w[0] + m.w[:, 1])


@corner
def a_weight_and_its_transpose_added(m: Any, x: Tensor) -> Tensor:
    return m.o(m.a(x) @ (m.w + m.w.t() * 2))


@corner
def rows_compared_with_columns(m: Any, x: Tensor) -> Tensor:
    return m.o(m.a(x) @ (m.w * (m.w.sum(0) > m.w.sum(1)).to(x.dtype)))


@corner
def heads_of_a_gram_matrix(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).unflatten(-1, (3, 2))
    return m.o(torch.einsum("bsgd,bshd->bsgh", y, m.b(x).unflatten(-1, (3, 2))).flatten(2)[..., :6])


@corner
def heads_shifted_against_each_other(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).unflatten(-1, (3, 2))
    return m.o((y * y.roll(1, -2)).flatten(2))


@corner
def channels_of_one_head_in_the_next(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).unflatten(-1, (3, 2))
    return m.o(torch.cat([y[..., :1, :], y[..., 1:, :] * y[..., :-1, :]], -2).flatten(2))


@corner
def in_place_into_a_slice(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[..., 1:4] += m.b(x)[..., :3]
    y[..., 2].mul_(2)
    return m.o(torch.tanh(y))


@corner
def in_place_through_a_view_of_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y.view(3, 6, 2, 3).transpose(-1, -2)[..., 1].copy_(m.b(x)[..., :3])
    return m.o(y)


@corner
def in_place_into_zeros(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros(3, 6, 6, dtype=x.dtype)
    row = y[:, 0]
    y[:, 1:] = m.a(x)[:, 1:]
    row += m.v
    return m.o(y * m.b(x))


@corner
def zeros_filled_at_one_index(m: Any, x: Tensor) -> Tensor:
    gate = torch.zeros(6, dtype=x.dtype)
    gate[2] = 1
    return m.o(m.a(x) * gate + gate.flip(0) * m.b(x))


@corner
def zeros_written_by_index_put(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros(6, 6, dtype=x.dtype)
    y.index_put_((torch.arange(6), torch.arange(6)), m.v)
    return m.o(m.a(x) @ y @ m.w)


@corner
def ones_accumulated(m: Any, x: Tensor) -> Tensor:
    return m.o(m.a(x) * torch.ones(6, dtype=x.dtype).cumsum(0))


@corner
def ones_padded(m: Any, x: Tensor) -> Tensor:
    return m.o(m.a(x) * F.pad(torch.ones(4, dtype=x.dtype), (1, 1)))


@corner
def ones_convolved(m: Any, x: Tensor) -> Tensor:
    kernel = torch.ones(1, 1, 3, dtype=x.dtype)
    return m.o(m.a(x) * F.conv1d(torch.ones(1, 1, 6, dtype=x.dtype), kernel, padding=1)[0, 0])


@corner
def the_largest_of_equals(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    first = torch.zeros_like(y).argmax(-1)
    return m.o(y * F.one_hot(first, 6) + m.table(first))


@corner
def the_largest_of_what_was_expanded(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).mean(-1, keepdim=True).expand(-1, -1, 6)
    return m.o(m.b(x) * y.sort(-1).indices)


@corner
def what_was_expanded_and_written(m: Any, x: Tensor) -> Tensor:
    y = m.v[:, None].expand(6, 6).clone()
    y[0] = m.w[1]
    return m.o(m.a(x) @ y)


@corner
def ones_that_one_branch_reads_and_another_writes(m: Any, x: Tensor) -> Tensor:
    y = torch.ones(6, dtype=x.dtype)
    z = m.a(x) * y
    y[1:3] = 0
    return m.o(z + m.b(x) * y)


@corner
def an_index_in_two_tables(m: Any, x: Tensor) -> Tensor:
    chosen = m.r(x).argmax(-1)
    return m.o(torch.einsum("bsoi,bsi->bso", m.t[chosen], m.a(x)) + m.u[chosen].sum(-1))


@corner
def an_expert_of_the_token_before(m: Any, x: Tensor) -> Tensor:
    chosen = m.r(x).argmax(-1)
    hidden = torch.einsum("bsd,bshd->bsh", x, m.u[chosen])
    return m.o(hidden * hidden.roll(1, 1))


@corner
def an_expert_of_the_next_token(m: Any, x: Tensor) -> Tensor:
    chosen = m.r(x).argmax(-1)
    hidden = torch.einsum("bsd,bshd->bsh", x, m.u[chosen])
    return m.o(hidden[:, 1:] * hidden[:, :-1])


@corner
def experts_of_two_routers_meet(m: Any, x: Tensor) -> Tensor:
    one, two = m.r(x).argmax(-1), m.r(x).argmin(-1)
    return m.o(torch.einsum("bsd,bshd->bsh", x, m.u[one]) * torch.einsum("bsd,bshd->bsh", x, m.u[two]))


@corner
def the_first_and_the_second_choice_meet(m: Any, x: Tensor) -> Tensor:
    chosen = m.r(x).topk(2, -1).indices
    hidden = torch.einsum("bsd,bskhd->bskh", x, m.u[chosen])
    return m.o(hidden[:, :, 0] * hidden[:, :, 1])


@corner
def choices_that_change_places(m: Any, x: Tensor) -> Tensor:
    chosen = m.r(x).topk(2, -1).indices
    hidden = torch.einsum("bsd,bskhd->bskh", x, m.u[chosen])
    return m.o((hidden * hidden.flip(2)).sum(2))


@corner
def tokens_sorted_by_expert(m: Any, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    chosen = m.r(flat).argmax(-1)
    order = chosen.argsort(stable=True)
    hidden = torch.einsum("td,thd->th", flat[order], m.u[chosen[order]])
    return m.o(hidden * torch.linspace(0, 1, 18, dtype=x.dtype)[:, None])


@corner
def an_index_compared_with_numbers(m: Any, x: Tensor) -> Tensor:
    chosen = m.r(x).argmax(-1)
    return m.o(m.a(x) * (chosen[..., None] == torch.arange(6)) + (chosen > 1)[..., None] * m.b(x))


@corner
def an_index_plus_one(m: Any, x: Tensor) -> Tensor:
    return m.o(m.t[(m.r(x).argmax(-1) + 1) % 4].sum(-1))


@corner
def an_index_of_an_index(m: Any, x: Tensor) -> Tensor:
    order = m.r(x).mean((0, 1)).argsort()
    return m.o(torch.einsum("bsn,noi,bsi->bso", m.r(x), m.t[order], m.a(x)))


@corner
def ranks_of_channels(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.o(y * y.argsort(-1).argsort(-1))


@corner
def channels_below_the_diagonal(m: Any, x: Tensor) -> Tensor:
    mask = torch.arange(6)[:, None] >= torch.arange(6)[None]
    return m.o(m.a(x) @ (m.w * mask))


@corner
def channels_that_are_not_themselves(m: Any, x: Tensor) -> Tensor:
    mask = torch.arange(6)[:, None] != torch.arange(6)[None]
    return m.o(m.a(x) @ (m.w * mask))


@corner
def a_causal_mask_over_channels(m: Any, x: Tensor) -> Tensor:
    scores = (m.a(x).transpose(1, 2) @ m.b(x)).masked_fill(torch.ones(6, 6).triu(1).bool(), -1e9)
    return m.o(m.a(x) @ scores.softmax(-1))


@corner
def dependence_through_a_sum(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).unflatten(-1, (3, 2))
    return m.o((y * y.sum(-2, keepdim=True)).flatten(2))


@corner
def dependence_through_an_expansion(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).unflatten(-1, (3, 2))
    shared = m.b(x).unflatten(-1, (3, 2)).mean(-2, keepdim=True).expand(-1, -1, 3, -1)
    return m.o(torch.tanh(y + shared).flatten(2))


@corner
def three_factors_of_which_two_meet(m: Any, x: Tensor) -> Tensor:
    y = torch.einsum("bsr,rij->bsij", m.r(x), m.z)
    return m.o(torch.tanh(y).flatten(2)) + m.o(torch.tanh(y.transpose(-1, -2)).flatten(2))


@corner
def a_product_read_in_two_ways(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    one = y.unflatten(-1, (2, 3)).softmax(-1).flatten(2)
    two = y.unflatten(-1, (3, 2)).softmax(-1).flatten(2)
    return m.o(one * two)


@corner
def slices_across_the_factors(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).unflatten(-1, (3, 2)).softmax(-1).flatten(2)
    return m.o(torch.cat([y[..., 1:5], y[..., :1], y[..., 5:]], -1))


@corner
def joined_and_cut_elsewhere(m: Any, x: Tensor) -> Tensor:
    y = torch.cat([m.a(x), m.b(x)], -1)
    return m.o(y[..., 2:8] + y[..., 4:10])


@corner
def joined_with_itself(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = torch.cat([y, y], -1)
    return m.o(z[..., 3:9] * y)


@corner
def stacked_and_swapped(m: Any, x: Tensor) -> Tensor:
    y = torch.stack([m.a(x), m.b(x)], -2)
    return m.o((y * y.flip(-2)).sum(-2))


@corner
def stacked_and_transposed(m: Any, x: Tensor) -> Tensor:
    y = torch.stack([m.a(x), m.b(x)], -1)
    return m.o(torch.tanh(y.flatten(2)[..., :6]) * torch.tanh(y.flatten(2)[..., 6:]))


@corner
def shared_modules_on_different_streams(m: Any, x: Tensor) -> Tensor:
    return m.o(m.c(torch.tanh(m.c(m.a(x)))) + m.c(m.b(x)))


@corner
def an_embedding_used_transposed(m: Any, x: Tensor) -> Tensor:
    scores = m.a(x) @ m.table.weight
    return m.o(m.table(scores.argmax(-1)) @ m.table.weight.t())


@corner
def weights_over_a_square_axis(m: Any, x: Tensor) -> Tensor:
    return m.o(torch.einsum("bsi,ij,bsj->bsj", m.a(x), m.w.softmax(0), m.b(x)) @ m.w.softmax(1).t())


@corner
def windows_of_channels(m: Any, x: Tensor) -> Tensor:
    return m.o(F.pad(m.a(x).unfold(-1, 3, 1).mean(-1), (1, 1)))


@corner
def a_vector_that_weighs_positions(m: Any, x: Tensor) -> Tensor:
    return m.o(m.a(x) * m.v[:, None] + m.b(x) * m.v)


@corner
def a_determinant_and_an_inverse(m: Any, x: Tensor) -> Tensor:
    eye = torch.eye(6, dtype=x.dtype)
    return m.o(m.a(x) @ torch.linalg.inv(m.w @ m.w.t() + eye))


@corner
def distances_between_rows(m: Any, x: Tensor) -> Tensor:
    return m.o(m.a(x) @ torch.cdist(m.w, m.w))


@corner
def the_largest_of_what_may_all_be_zero(m: Any, x: Tensor) -> Tensor:
    return m.o(F.one_hot(torch.relu(m.a(x) - 1).argmax(-1), 6) * m.b(x))


@corner
def the_first_that_is_positive(m: Any, x: Tensor) -> Tensor:
    return m.o(m.table((m.a(x) > 0).long().argmax(-1)))


@corner
def the_two_largest_signs(m: Any, x: Tensor) -> Tensor:
    return m.o(m.b(x).scatter(-1, m.a(x).sign().topk(2, -1).indices, 1.0))


@corner
def the_largest_of_what_was_clamped_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y.clamp_(max=0.1)
    return m.o(m.table(y.max(-1).indices))


@corner
def the_largest_of_what_a_threshold_left(m: Any, x: Tensor) -> Tensor:
    y = m.a(x) - 1
    return m.o(m.table(torch.where(y > 0, y, 0.0).argmax(-1)))


@corner
def the_expert_with_most_tokens(m: Any, x: Tensor) -> Tensor:
    tokens = torch.bincount(m.a(x)[..., :3, :].argmax(-1).flatten(), minlength=6)
    return m.o(m.a(x) + m.table(tokens.argsort(stable=True))[:1])


@corner
def the_largest_of_a_padded_row(m: Any, x: Tensor) -> Tensor:
    return m.o(m.wide[F.pad(m.a(x) - 3, (0, 30)).argmax(-1)])


@corner
def the_largest_of_copies(m: Any, x: Tensor) -> Tensor:
    copies = m.a(x)[..., None].expand(-1, -1, -1, 6).flatten(2)
    return m.o(m.wide[copies.argmax(-1)] + m.wide[m.b(x).repeat_interleave(6, -1).argmax(-1)])


@corner
def the_smallest_product_of_two_units(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.o(m.wide[(y[..., :, None] * y[..., None, :]).flatten(2).argmin(-1)])


@corner
def the_largest_of_rows_that_are_zero(m: Any, x: Tensor) -> Tensor:
    longer = F.pad(m.a(x), (0, 0, 0, 1))
    return m.o(m.table((longer @ m.w).argmax(-1)))


@corner
def the_largest_of_rows_that_are_alike(m: Any, x: Tensor) -> Tensor:
    rows = m.b(x).mean(1, keepdim=True).expand(-1, 6, -1) @ m.w
    return m.o(m.table(torch.tanh(rows.transpose(1, 2).flatten(1)).unflatten(1, (6, 6)).argmax(-1)) + m.a(x))


@corner
def numbers_written_where_they_were_asked_for(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        values, places = torch.empty(3, 6, 2, dtype=x.dtype), torch.empty(3, 6, 2, dtype=torch.long)
        rows, numbers = values.view(3, 12), places.view(3, 12)
        torch.topk(m.a(x), 2, -1, out=(values, places))
    return m.o(m.table(numbers)[:, ::2] + rows[:, ::2, None])


@corner
def a_dropout_that_does_not_say_when(m: Any, x: Tensor) -> Tensor:
    return m.o(torch.native_dropout(m.a(x), 0.5, None)[0])


@corner
def an_index_joined_with_numbers(m: Any, x: Tensor) -> Tensor:
    return m.o(torch.cat([m.a(x).argmax(-1, keepdim=True), x], -1) * m.v)


@corner
def a_triangle_of_indices(m: Any, x: Tensor) -> Tensor:
    return m.o(m.a(x).argmax(-1).triu()[..., None] * m.v)


@corner
def a_diagonal_of_indices(m: Any, x: Tensor) -> Tensor:
    chosen = m.a(x)[:, :3].argmax(-1)
    return m.o((chosen.diagonal() + torch.diag_embed(chosen).sum((0, 1)))[:, None] * m.v)


@corner
def a_product_of_indices(m: Any, x: Tensor) -> Tensor:
    chosen = m.a(x).argmax(-1)
    return m.o(torch.einsum("bs,bt->st", chosen, chosen)[..., None] * m.v)


@corner
def indices_written_into_a_view(m: Any, x: Tensor) -> Tensor:
    kept = torch.zeros(3, 6, dtype=torch.long)
    kept[:, 1:] = m.a(x)[:, 1:].argmax(-1)
    return m.o(kept[..., None] * m.v)


@corner
def indices_written_into_a_view_and_looked_up(m: Any, x: Tensor) -> Tensor:
    kept = torch.zeros(3, 6, dtype=torch.long)
    kept[:, 1:].copy_(m.a(x)[:, 1:].argmax(-1))
    return m.o(m.table(kept))


@corner
def numbers_filled_in(m: Any, x: Tensor) -> Tensor:
    one, two = torch.arange(6), torch.arange(6)
    one[2:4].fill_(1)
    two[1:3].zero_()
    return m.o(m.a(x) @ m.w[one] + m.b(x) @ m.w[two])


@corner
def a_mask_that_was_expanded_and_written(m: Any, x: Tensor) -> Tensor:
    mask = (m.a(x)[..., :1] > 0).expand(-1, -1, 6).clone()
    mask[..., 0] = True
    return m.o(m.b(x).masked_scatter(mask, m.table.weight.repeat(9, 1).view(3, 18, 6)))


@corner
def more_written_than_there_are_places(m: Any, x: Tensor) -> Tensor:
    chosen = m.r(x).argmax(-1, keepdim=True)
    return m.o(torch.zeros(3, 6, 4, dtype=x.dtype).scatter_add(-1, chosen, m.a(x)[..., :4]) @ m.t[:, 0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CORNERS)
def test_what_is_claimed_holds(name: str) -> None:
    model = CORNERS[name]()
    proof = pg.verify(model, None, (X,), controls="none")
    assert proof.passed, f"{proof}\n{pg.auto_spec(model, (X,))}"


class Chooses(nn.Module):
    """Returns, or keeps, which of some units is the largest: their numbering is then part of what it computes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 8)
        self.table = nn.Embedding(8, 3)
        self.register_buffer("last", torch.zeros(5, dtype=torch.int64))

    def forward(self, x: Tensor) -> object:
        scores = self.outer(self.inner(x))
        if self.how == "topk":
            return scores.topk(2).indices
        if self.how == "max":
            return {"nested": [scores.max(-1).indices]}
        chosen = scores.argmax(-1)
        if self.how == "stacked":
            return torch.stack([chosen, chosen]), self.table(chosen)
        if self.how == "kept":
            self.last.copy_(chosen)
            return self.table(chosen)
        return chosen


@pytest.mark.parametrize("how", ["argmax", "max", "topk", "stacked", "kept"])
def test_units_whose_number_is_returned_stay_put(how: str) -> None:
    x = torch.randn(5, 4)
    spec = pg.auto_spec(Chooses(how).eval(), x)
    assert [str(axis) for axis in spec.axes["outer.weight"]] == ["8", "inner"]
    assert pg.verify(Chooses(how).eval(), spec, (x,))


class SharedMemory(nn.Module):
    """Layers whose weights lie in one memory, the one as the other's transpose, overlapping, or side by side."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)
        self.c, self.d = nn.Linear(6, 6), nn.Linear(6, 6)
        flat = torch.randn(72)
        if how == "transposed":
            self.d.weight.data = self.c.weight.data.t()
        elif how == "decoder":
            self.b.weight = nn.Parameter(self.a.weight.data.t())
        elif how == "overlapping":
            self.c.weight.data, self.d.weight.data = flat[:36].view(6, 6), flat[20:56].view(6, 6)
        elif how == "side by side":
            self.c.weight.data, self.d.weight.data = flat[:36].view(6, 6), flat[36:].view(6, 6)
        elif how == "interleaved":
            self.c.weight.data, self.d.weight.data = flat.view(6, 12)[:, ::2], flat.view(6, 12)[:, 1::2]
        elif how == "attribute":
            self.c.weight.data, self.d.weight.data = flat[:36].view(6, 6), flat[36:].view(6, 6)
            self.row = flat[:4]

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.d(torch.tanh(self.c(torch.tanh(self.a(x))))))
        return self.b(y) * self.row if hasattr(self, "row") else self.b(y)


@pytest.mark.parametrize(
    ("how", "groups"),
    [
        ("transposed", [["d", "."], ["c", "d"], ["d", "c"], [".", "d"]]),
        ("decoder", [["a", "."], ["c", "a"], ["a", "c"], [".", "a"]]),
        ("overlapping", [["6", "."], ["6", "6"], ["6", "6"], [".", "6"]]),
        ("side by side", [["a", "."], ["c", "a"], ["d", "c"], [".", "d"]]),
        ("interleaved", [["a", "."], ["c", "a"], ["d", "c"], [".", "d"]]),
        ("attribute", [["6", "."], ["6", "6"], ["d", "6"], [".", "d"]]),
    ],
)
def test_parameters_in_one_memory(how: str, groups: list[list[str]]) -> None:
    torch.manual_seed(0)
    model, x = SharedMemory(how), torch.randn(3, 4)
    spec = pg.auto_spec(model, (x,))
    found = [[str(axis) for axis in spec.axes[f"{name}.weight"]] for name in "acdb"]
    assert [[("." if axis == "4" else axis) for axis in row] for row in found] == groups
    before = model(x)
    model.load_state_dict(spec.random(0, every_group=True).apply(model.state_dict()))
    assert torch.allclose(model(x), before, atol=1e-5)
