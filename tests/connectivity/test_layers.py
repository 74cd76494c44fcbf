"""Layerwise barriers: the definition, on a network whose loss is known exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from permgraph.connectivity import layerwise_barriers
from permgraph.errors import EvaluationError


class Two(nn.Module):
    """Two numbers in two layers."""

    def __init__(self, x: float, y: float) -> None:
        super().__init__()
        self.one, self.other = nn.Module(), nn.Module()
        self.one.x = nn.Parameter(torch.tensor(x, dtype=torch.float64))
        self.other.y = nn.Parameter(torch.tensor(y, dtype=torch.float64))
        self.eval()


def product(net: nn.Module) -> float:
    return float(net.one.x * net.other.y)  # type: ignore[union-attr,operator]


def test_the_definition() -> None:
    # L = x y from (1, 1) to (-1, -1): both ends have loss 1, so the line between them is 1 throughout.
    found = layerwise_barriers(Two(1, 1), Two(-1, -1), product, points=5)
    assert found.whole.losses == pytest.approx((1, 0.25, 0, 0.25, 1))
    assert found.whole.barrier == 0
    assert found.paths["one"].losses == pytest.approx((1, 0.5, 0, -0.5, -1))
    assert found.barriers == pytest.approx({"one": 0, "other": 0})
    assert found.hybrid("one") == pytest.approx(-1)
    # With the loss turned over, the far end, the hybrid, is the worst: 1 above the line at -1.
    found = layerwise_barriers(Two(1, 1), Two(-1, -1), lambda net: -product(net), points=5)
    assert found.barriers == pytest.approx({"one": 2, "other": 2})
    assert found.paths["one"].barrier == 0  # over the line between a and the hybrid there is none
    text = str(found)
    assert all(name in text for name in ("one", "other", "(all)"))


def test_the_line_is_between_the_networks_and_ends_at_b() -> None:
    # L = y² + x from (0, 0) to (4, 2): 0 to 8 along the line. y alone: 4t² - 8t, at most 0.
    found = layerwise_barriers(Two(0, 0), Two(4, 2), lambda n: float(n.other.y**2 + n.one.x), points=[0, 0.25, 1])
    assert found.barriers == pytest.approx({"one": 0, "other": 0})
    # From b to a, x stays at 4 while y goes to 0: 4 + 4(1 - t)² over 8(1 - t) is most at the end.
    found = layerwise_barriers(Two(4, 2), Two(0, 0), lambda n: float(n.other.y**2 + n.one.x), points=[0, 0.25, 1])
    assert found.barriers == pytest.approx({"one": 4, "other": 4})


def test_accuracy_counts_when_it_falls() -> None:
    found = layerwise_barriers(Two(1, 1), Two(-1, -1), lambda n: {"accuracy": product(n)}, points=3)
    assert found.height("one", "accuracy") == pytest.approx(2)
    assert found.barriers == pytest.approx({"one": 2, "other": 2})


def test_groups_of_layers() -> None:
    a, b = Two(1, 1), Two(-1, -1)
    found = layerwise_barriers(a, b, product, points=5, layers={"both": "*", "first": ["one.*", "none.*"]})
    assert found.paths["both"].losses == found.whole.losses
    assert found.paths["first"].losses == pytest.approx((1, 0.5, 0, -0.5, -1))
    with pytest.raises(EvaluationError, match="layer 'third': no name in the state dict matches 'z.*'"):
        layerwise_barriers(a, b, product, layers={"third": "z.*"})
    with pytest.raises(EvaluationError, match="no layer 'third' was measured, only 'both', 'first'"):
        found.height("third")
    with pytest.raises(EvaluationError, match="no metric 'accuracy'"):
        found.height("both", "accuracy")


class Tied(nn.Module):
    """An embedding and a head that share their weight."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
        self.embed.weight.data.fill_(value)
        self.head.bias.data.fill_(value)
        self.head.weight = self.embed.weight
        self.eval()


def test_tied_tensors_move_together() -> None:
    def check(net: nn.Module) -> float:
        assert net.head.weight is net.embed.weight  # type: ignore[union-attr]
        return float(net.embed.weight.sum())  # type: ignore[union-attr,operator]

    found = layerwise_barriers(Tied(0.0), Tied(1.0), check, points=3)
    assert found.paths["embed"].losses == pytest.approx((0, 2, 4))
    assert found.paths["head"].losses == pytest.approx((0, 0, 0))
    found = layerwise_barriers(Tied(0.0), Tied(1.0), check, points=3, layers={"head": "head.weight"})
    assert found.paths["head"].losses == pytest.approx((0, 2, 4))


def test_what_the_model_itself_holds_is_named_after_itself() -> None:
    class Root(Two):
        def __init__(self, z: float) -> None:
            super().__init__(1, 1)
            self.z = nn.Parameter(torch.tensor(z, dtype=torch.float64))

    found = layerwise_barriers(Root(0), Root(2), lambda net: float(net.z), points=3)  # type: ignore[arg-type]
    assert {name: path.losses[-1] for name, path in found.paths.items()} == {"z": 2, "one": 0, "other": 0}


def test_a_loss_that_is_not_a_number_is_not_lost() -> None:
    def loss(net: nn.Module) -> float:
        return math.nan if float(net.one.x) == 0 else 1.0  # type: ignore[union-attr,arg-type]

    found = layerwise_barriers(Two(1, 1), Two(-1, -1), loss, points=3)
    assert math.isnan(found.barriers["one"]) and found.barriers["other"] == 0


def test_progress_and_inputs() -> None:
    a, b = Two(1, 1), Two(-1, -1)
    seen: list[tuple[int, int]] = []
    layerwise_barriers(a, b.state_dict(), product, points=4, progress=lambda *at: seen.append(at))
    assert seen == [(n, 12) for n in range(1, 13)]
    assert (a.one.x.item(), a.other.y.item()) == (1, 1)
    with pytest.raises(EvaluationError, match="both state dicts"):
        layerwise_barriers(a.state_dict(), b.state_dict(), product)
    with pytest.raises(EvaluationError, match="b must be in evaluation mode"):
        layerwise_barriers(a, b.train(), product)
