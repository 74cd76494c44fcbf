"""Parts that no pass reached, such as experts without tokens: they take the constraints of their siblings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import permgraph as pg
from tests.groups.renumbered import error, factorials


class Experts(nn.Module):
    """Each token goes to one expert of five; how they are held is for the subclasses to say."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gate, self.out = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(6, 2)
        self.hold([nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6)) for _ in range(5)])

    def hold(self, experts: list[nn.Module]) -> None:
        self.experts = nn.ModuleList(experts)

    def expert(self, k: int) -> nn.Module:
        return self.experts[k]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        weights, chosen = self.gate(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for k in range(5):
            where = (chosen == k).nonzero().squeeze(-1)
            if where.numel():
                y[where] = self.expert(k)(x[where]) * weights[where, None]
        return self.out(x + y)


class InADictionary(Experts):
    names = ("de", "en", "fr", "it", "ja")

    def hold(self, experts: list[nn.Module]) -> None:
        self.languages = nn.ModuleDict(dict(zip(self.names, experts, strict=True)))

    def expert(self, k: int) -> nn.Module:
        return self.languages[self.names[k]]


class ByNumber(Experts):
    def hold(self, experts: list[nn.Module]) -> None:
        for k, expert in enumerate(experts):
            setattr(self, f"expert{k}", expert)

    def expert(self, k: int) -> nn.Module:
        return getattr(self, f"expert{k}")


class Functional(Experts):
    """The experts' weights are used by the module around them."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        best = int(self.gate(x).mean(0).argmax())
        first, _, second = self.expert(best)
        return self.out(x + (x @ first.weight.t() + first.bias).relu() @ second.weight.t() + second.bias)


def test_experts_without_tokens_have_units_of_their_own_and_share_the_stream():
    for make in (Experts, InADictionary, ByNumber, Functional):
        torch.manual_seed(0)
        model = make().eval()
        spec = pg.auto_spec(model, (torch.randn(4, 3),), vary=False)
        assert any("weight" in name for name in spec.unused), "an example for which all experts run shows nothing"
        assert abs(spec.log_order() - factorials(6, *[4] * 5)) < 1e-9
        for seed in range(3):
            assert error(model, spec, 5 * torch.randn(30, 3, generator=torch.Generator().manual_seed(seed))) < 1e-9
        assert any("no pass reached" in note for note in spec.notes)
        assert not spec.unread


class Layers(nn.Module):
    """As many layers run as there are steps in the input; plainly one after the other, or each added to the stream."""

    def __init__(self, count: int, added: bool) -> None:
        super().__init__()
        self.embed, self.out, self.added = nn.Linear(3, 6), nn.Linear(6, 2), added
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.mean(1))
        for _, layer in zip(range(x.shape[1]), self.layers, strict=False):
            h = layer(h).tanh() + h if self.added else layer(h).tanh()
        return self.out(h)


def test_where_siblings_disagree_their_axes_become_one():
    for steps, added in ((1, False), (2, False), (3, False), (3, True)):
        torch.manual_seed(0)
        model = Layers(5, added).eval()
        spec = pg.auto_spec(model, (torch.randn(4, steps, 3),))
        assert abs(spec.log_order() - factorials(6)) < 1e-9, (steps, added)
        assert max(error(model, spec, torch.randn(4, n, 3)) for n in (1, 2, 3, 5)) < 1e-9
    whole = pg.auto_spec(Layers(3, False).eval(), (torch.randn(4, 3, 3),))
    assert abs(whole.log_order() - 4 * factorials(6)) < 1e-9, "layers that all run keep their own"


class Positions(nn.Module):
    """A vector and a batch norm for each position, each a parameter or module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, 8), nn.Linear(8, 2)
        self.places = nn.ParameterList([nn.Parameter(torch.randn(8)) for _ in range(9)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(8) for _ in range(9)])

    def forward(self, x: Tensor) -> Tensor:
        steps = zip(x.unbind(1), self.places, self.norms, strict=False)
        return self.out(torch.stack([norm(self.embed(t) + place).tanh() for t, place, norm in steps], 1))


def test_what_later_steps_read_goes_with_what_earlier_ones_read():
    model = Positions().eval()
    spec = pg.auto_spec(model, (torch.randn(2, 4, 3),))
    assert {str(spec.axes[f"places.{k}"][0]) for k in range(9)} == {"embed"}
    assert {str(spec.axes[f"norms.{k}.running_var"][0]) for k in range(9)} == {"embed"}
    assert error(model, spec, torch.randn(2, 9, 3)) < 1e-9


class Nested(nn.Module):
    """Two layers of experts; of the second one's, none of the kind that the first one's second is ran."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, 6), nn.Linear(6, 2)
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"a": nn.Linear(6, 6), "extra": nn.Linear(6, 6, bias=False)}) for _ in range(2)]
        )

    def forward(self, x: Tensor, every: bool = False) -> Tensor:
        h = self.embed(x)
        for number, layer in enumerate(self.layers):
            h = h + layer["a"](h).relu()
            if number == 0 or every:
                h = h + layer["extra"](h)
        return self.out(h)


def test_the_same_place_in_an_outer_container_is_a_sibling_too():
    model = Nested().eval()
    spec = pg.auto_spec(model, (torch.randn(4, 3),))
    assert list(map(str, spec.axes["layers.1.extra.weight"])) == ["embed", "embed"]
    assert error(model, spec, torch.randn(4, 3), True) < 1e-9


def test_what_ran_is_as_it_was():
    torch.manual_seed(0)
    model = Experts().eval()
    captured = pg.capture(model, (torch.randn(4, 3),))
    before = [(node.name, len(node.users)) for node in captured.graph.nodes]
    pg.auto_spec(model, (torch.randn(4, 3),))
    from permgraph.inference.auto_spec import spec_of

    assert spec_of(captured).fingerprint == spec_of(captured).fingerprint
    assert before == [(node.name, len(node.users)) for node in captured.graph.nodes]


class InTraining(nn.Module):
    """In evaluation mode the first of the layers runs; in training mode also others, each beside it or in its place."""

    both = False

    def __init__(self, instead: bool) -> None:
        super().__init__()
        self.embed, self.out, self.instead = nn.Linear(3, 6), nn.Linear(6, 2), instead
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).tanh()
        if self.both:
            return self.out(self.layers[2](self.layers[1](self.layers[0](h).tanh()).tanh()).tanh())
        ran = self.layers[1:] if self.instead and self.training else self.layers[: 3 if self.training else 1]
        return torch.cat([self.out(layer(h).tanh()) for layer in ran])


def test_a_pass_that_ran_both_shows_how_parts_stand_to_each_other():
    """Where one did, a layer's input and output stay two groups; where none did, they may follow on each other."""
    for instead in (False, True):
        torch.manual_seed(0)
        model = InTraining(instead).eval()
        spec = pg.auto_spec(model, (torch.randn(4, 3),))
        assert abs(spec.log_order() - (1 if instead else 2) * factorials(6)) < 1e-9
        for model.training in (False, True):
            assert error(model, spec, torch.randn(4, 3)) < 1e-9
    model.both = True
    assert error(model, spec, torch.randn(4, 3)) < 1e-9
