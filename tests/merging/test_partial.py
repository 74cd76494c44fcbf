"""Merging in part: the wider network against what it must compute, whatever the architecture."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

import permgraph as pg
from permgraph.merging.places import Places, combined, indices_of, places_of
from permgraph.merging.roles import dimensions_read
from permgraph.spec.expressions import parse_axis


class Residual(nn.Module):
    """Convolutions with BatchNorm, a shortcut, a depthwise and a transposed convolution, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.inner, self.back = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.up = nn.ConvTranspose2d(6, 5, 2, 2)
        self.head = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.norm(self.first(x)))
        x = relu(x + self.back(relu(self.inner(x))))
        y = relu(self.depthwise(x))
        z = relu(self.up(x))
        return self.head(torch.cat([y.mean((2, 3)), z.mean((2, 3))], 1))


class Heads(nn.Module):
    """Attention whose code knows how many heads there are, and units that it does not know the number of."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3, 8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 10), nn.Linear(10, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.down(relu(self.up(x)))).mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


def _random(build: type[nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = build().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter[0].numel() or 1))
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + 0.5 if "var" in name else torch.randn_like(buffer))
    return model


INPUTS = {_mlp: (7, 3), Residual: (4, 2, 6, 6), Heads: (4, 5, 3)}


def _gap(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max() / y.abs().max())


@pytest.mark.parametrize("build", [_mlp, Residual])
def test_twice_the_width_is_the_mean_of_the_outputs(build: type[nn.Module]) -> None:
    a, b, x = _random(build, 0), _random(build, 1), torch.randn(INPUTS[build], dtype=torch.float64)
    merge = pg.partial_merge(a, b, width=2)
    assert merge.sizes == {name: (g.size, 2 * g.size) for name, g in pg.auto_spec(a).groups.items()}
    assert _gap(merge.model()(x), (a(x) + b(x)) / 2) < 1e-10
    weighted = pg.partial_merge(a, b, width=2, weights=(3, 1)).model()
    assert _gap(weighted(x), 0.75 * a(x) + 0.25 * b(x)) < 1e-10


@pytest.mark.parametrize("build", [_mlp, Residual])
def test_once_the_width_is_the_average(build: type[nn.Module]) -> None:
    a, b = _random(build, 0), _random(build, 1)
    merge = pg.partial_merge(a, b, width=1)
    plain = pg.average([a, pg.align(a, b).state_dict])
    assert merge.sizes == {} and plain.keys() == merge.state_dict.keys()
    assert all(torch.allclose(merge.state_dict[name].double(), tensor.double()) for name, tensor in plain.items())


@pytest.mark.parametrize("build", [_mlp, Residual, Heads])
@pytest.mark.parametrize("width", [1, 1.4, 2])
def test_of_one_network_renumbered_it_is_that_network(build: type[nn.Module], width: float) -> None:
    a, x = _random(build, 2), torch.randn(INPUTS[build], dtype=torch.float64)
    b = copy.deepcopy(a)
    b.load_state_dict(pg.auto_spec(a).random(3).apply(a.state_dict()))
    merge = pg.partial_merge(a, b, width=width)
    assert merge.alignment.permutation.inverse() == pg.auto_spec(a).random(3)
    assert _gap(merge.model()(x), a(x)) < 1e-10
    assert all(new == round(width * old) for old, new in merge.sizes.values())


def test_the_wider_network_has_the_symmetries_that_it_says() -> None:
    a, b = _random(Residual, 0), _random(Residual, 1)
    merge = pg.partial_merge(a, b, width=1.5)
    model, x = merge.model(), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    moved = copy.deepcopy(model)
    moved.load_state_dict(merge.spec.random(0, every_group=True).apply(model.state_dict()))
    assert _gap(moved(x), model(x)) < 1e-10
    found = pg.auto_spec(model)
    assert merge.spec.log_order() == pytest.approx(found.log_order())
    assert model.depthwise.groups == 9 and model.head.in_features == model.head.weight.shape[1]


def test_what_would_compute_something_else_beside_other_units_keeps_its_width() -> None:
    a, b = _random(Heads, 0), _random(Heads, 1)
    merge = pg.partial_merge(a, b, width=1.5)
    assert merge.sizes == {"up": (10, 15)}  # a norm runs over the stream, and the code knows the number of heads
    assert merge.notes[-1].startswith("embed, qkv#0 keep their width")
    assert merge.model()(torch.randn(INPUTS[Heads], dtype=torch.float64)).shape == (4, 2)


def test_the_pairs_that_are_most_alike_are_merged() -> None:
    a = _random(_mlp, 0)
    b = copy.deepcopy(a)
    changed = torch.tensor([1, 4, 6])
    with torch.no_grad():
        b[0].weight[changed] = torch.randn(3, 3, dtype=torch.float64)
        b[0].bias[changed] = torch.randn(3, dtype=torch.float64)
    b_moved = copy.deepcopy(b)
    spec = pg.auto_spec(a)
    b_moved.load_state_dict(spec.random(5).apply(b.state_dict()))
    loader = [torch.randn(200, 3, dtype=torch.float64)]
    for given in (None, loader):
        merge = pg.partial_merge(a, b_moved, width={"0.weight": 11 / 8}, loader=given)
        assert merge.sizes == {"0.weight": (8, 11)}
        assert (~merge.merged["0.weight"]).nonzero().flatten().tolist() == changed.tolist()


def test_widths_by_group() -> None:
    a, b = _random(_mlp, 0), _random(_mlp, 1)
    assert pg.partial_merge(a, b, width={"2*": 1.5, "*": 1.25}).sizes == {"0.weight": (8, 10), "2.weight": (6, 9)}
    assert pg.partial_merge(a, b, width={"2*": 1.5}).sizes == {"2.weight": (6, 9)}


@pytest.mark.parametrize(
    ("width", "said"),
    [(0.5, "from 1 to 2"), (2.1, "from 1 to 2"), (True, "from 1 to 2"), ({"nowhere": 1.5}, "no group is named like")],
)
def test_widths_that_are_none(width: float, said: str) -> None:
    a, b = _random(_mlp, 0), _random(_mlp, 1)
    with pytest.raises(pg.errors.MismatchError, match=said):
        pg.partial_merge(a, b, width=width)


def test_state_dicts_are_refused() -> None:
    a = _random(_mlp, 0)
    with pytest.raises(pg.errors.MismatchError, match="takes a module"):
        pg.partial_merge(a, a.state_dict())  # type: ignore[arg-type]


def test_models_are_not_changed() -> None:
    a, b = _random(Residual, 0).train(), _random(Residual, 1)
    a.norm.eval()  # a frozen norm in a network that trains
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (a, b)]
    merge = pg.partial_merge(a, b, width=1.5, loader=[torch.randn(8, 2, 6, 6, dtype=torch.float64)])
    for model in (merge.model(), merge.least_squares([torch.randn(8, 2, 6, 6, dtype=torch.float64)]), a):
        assert model.training and model.first.training and not model.norm.training
    assert not b.training
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_tied_tables_stay_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(7, 6), nn.Linear(6, 8), nn.Linear(8, 6)
            self.head = nn.Linear(6, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.down(torch.tanh(self.up(self.embed(tokens)))))

    torch.manual_seed(0)
    a, b = Tied().eval(), Tied().eval()
    merge = pg.partial_merge(a, b, width=1.5, example_inputs=(torch.randint(7, (2, 5)),))
    model = merge.model()
    assert model.head.weight is model.embed.weight
    assert merge.sizes == {"up": (8, 12)}  # what is both read and written cannot be kept apart


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_places_of_products_and_sums() -> None:
    spec = pg.PermutationSpec.parse("w 6 (h 2)\nv 5 [h + 2]\ngroups: h 3")
    places = {"h": Places.of_group(torch.tensor([True, False, True]))}
    product, total = (places_of(parse_axis(text), spec, places) for text in ("(h 2)", "[h + 2]"))
    assert product.a.tolist() == [0, 1, 2, 3, 4, 5, -1, -1] and product.b.tolist() == [0, 1, -1, -1, 4, 5, 2, 3]
    assert total.a.tolist() == [0, 1, 2, -1, 3, 4] and total.b.tolist() == [0, -1, 2, 1, 3, 4]
    assert indices_of(parse_axis("(h 2)"), spec, "h").tolist() == [0, 0, 1, 1, 2, 2]
    assert indices_of(parse_axis("[2 + h]"), spec, "h").tolist() == [-1, -1, 0, 1, 2]


def test_a_weight_by_hand() -> None:
    """One merged unit and one of each network alone, on both sides: A reads 1 and 2, B reads 10 and 20."""
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    own = Places.of_group(torch.tensor([True, False]))
    got = combined(a, b, [own, own], frozenset({1}), (0.5, 0.5))
    assert got.tolist() == [[5.5, 1.0, 10.0], [3.0, 4.0, 0.0], [30.0, 0.0, 40.0]]


def test_what_is_read() -> None:
    read = dimensions_read(pg.capture(Residual().eval(), (torch.randn(2, 2, 6, 6),)))
    assert read["first.weight"] == {1} and read["up.weight"] == {0} and read["head.weight"] == {1}
    assert read["head.bias"] == read["norm.weight"] == read["norm.running_mean"] == frozenset()


class Normed(nn.Module):
    """A norm over units, of which each stands beside a copy of itself where a network is doubled with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.up = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 10)
        self.last = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(relu(self.up(self.norm(self.first(x)))))


def test_a_norm_keeps_its_width_at_twice_the_width_too() -> None:
    a, b = _random(Normed, 0), _random(Normed, 1)
    assert pg.partial_merge(a, b, width=2).sizes == {"up": (10, 20)}


class Noting(nn.Module):
    """A layer of one's own that notes how many it puts out, as the one of GPT-2 does."""

    def __init__(self, reads: int, writes: int) -> None:
        super().__init__()
        self.writes = writes
        self.weight = nn.Parameter(torch.randn(reads, writes))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(0, -2) @ self.weight).view(*x.shape[:-1], self.writes)


def test_modules_that_note_their_sizes_note_the_new_ones() -> None:
    a, b = (_random(lambda: nn.Sequential(Noting(3, 8), nn.Tanh(), Noting(8, 2)), seed) for seed in (0, 1))
    model, x = pg.partial_merge(a, b, width=2).model(), torch.randn(4, 5, 3, dtype=torch.float64)
    assert (model[0].writes, model[2].writes) == (16, 2)
    assert _gap(model(x), (a(x) + b(x)) / 2) < 1e-10
