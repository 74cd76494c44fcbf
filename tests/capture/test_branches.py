"""Value-dependent models: a second pass on other inputs says whether the symmetries depend on the branch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.capture import ExampleInputs
from permgraph.errors import CaptureError
from permgraph.inference.branches import check_branches, other_values


class Halting(nn.Module):
    """The hidden units are inner ones only where their sum is positive; else they are the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x).relu())
        return self.third(hidden.relu()) if float(x.sum()) > 0 else hidden


class Experts(nn.Module):
    """A loop over those experts that were chosen, as in many mixtures."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.up = nn.ModuleList(nn.Linear(6, 5) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(5, 6) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows = torch.where(chosen == expert)[0]
            out = out.index_add(0, rows, self.down[expert](self.up[expert](x[rows]).relu()))
        return self.head(out)


def test_a_model_that_asks_for_no_value_needs_no_second_pass() -> None:
    check = check_branches(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)))
    assert check and check.reason is None and check.common is check.first
    assert "does not depend" in str(check)


def test_branches_that_differ_are_told_apart_and_the_common_spec_holds_for_both() -> None:
    model = Halting()
    plus, minus = torch.ones(2, 3), -torch.ones(2, 3)
    check = check_branches(model, (plus,), others=((minus,), {}))
    assert not check and check.reason is not None
    assert any("second.weight" in line for line in check.differences)
    assert "take .common" in str(check)
    assert math.isclose(check.first.log_order(), math.log(math.factorial(5) * math.factorial(4)))
    assert math.isclose(check.common.log_order(), math.log(math.factorial(5)))
    assert set(check.common.axes) == set(check.first.axes), "the names are the model's own"
    for x in (plus, minus):
        assert pg.verify(model, check.common, (x,)).passed
    assert not pg.verify(model, check.first, (minus,)).passed, "the spec of the one branch is wrong for the other"


def test_branches_that_agree_say_so() -> None:
    torch.manual_seed(0)
    model = Experts()
    x = torch.randn(64, 6)
    check = check_branches(model, (x,))
    assert check and check.reason is not None and not check.differences
    assert "same symmetries" in str(check)
    assert math.isclose(check.common.log_order(), check.first.log_order())
    assert pg.verify(model, check.common, (x,)).passed


def test_what_only_one_pass_reads_is_a_difference() -> None:
    torch.manual_seed(0)
    model = Experts()
    with torch.no_grad():
        model.router.weight.copy_(torch.eye(3, 6))
        model.router.bias.zero_()
    one = torch.eye(6)[:1].repeat(4, 1)
    check = check_branches(model, (one,), others=((torch.eye(6)[:3],), {}))
    assert not check
    assert any(".1." in line for line in check.differences)


def test_other_values_keep_shapes_sizes_and_masks() -> None:
    ids, sizes = torch.arange(20).reshape(2, 10), torch.tensor([[1, 4, 4], [1, 4, 4]])
    mask, image = torch.ones(2, 10, dtype=torch.bool), 5 + 3 * torch.randn(2, 3, 16, 16)
    given = ExampleInputs((image,), {"ids": ids, "sizes": sizes, "mask": mask}, "given")
    bold, careful = other_values(given)
    (other,), kwargs = bold
    assert not torch.equal(other, image) and abs(float(other.mean()) - 5) < 1
    assert not torch.equal(kwargs["ids"], ids) and torch.equal(kwargs["ids"].sort(-1).values, ids)
    assert torch.equal(kwargs["sizes"], sizes) and torch.equal(kwargs["mask"], mask)
    assert torch.equal(careful[1]["ids"], ids) and not torch.equal(careful[0][0], image)
    assert torch.equal(ids, torch.arange(20).reshape(2, 10)), "the caller's own are left alone"


def test_a_model_without_values_to_change_asks_for_others() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, count: Tensor) -> Tensor:
            return self.linear(torch.ones(int(count), 3))

    with pytest.raises(CaptureError, match="others="):
        check_branches(Counted(), (torch.tensor(4),))
    assert check_branches(Counted(), (torch.tensor(4),), others=((torch.tensor(5),), {}))


class Passing(torch.overrides.TorchFunctionMode):
    """Hands every function on, as modes that rewrite indexing do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


class Mapped(nn.Module):
    """Maps over its rows under a mode of its own, once it has asked for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        scale = 2.0 if float(x.sum()) > 0 else 3.0
        with Passing():
            hidden = torch.vmap(lambda row: row * scale, out_dims=1)(self.first(x).relu()).T
        return self.second(hidden)


def test_a_mode_of_the_models_own_hides_nothing_and_reports_nothing() -> None:
    captured = pg.capture(Mapped(), (torch.ones(2, 3),))
    assert captured.mode == "real"
    assert not any("values_leave_torch" in str(node.target) for node in captured.graph.nodes)
    assert [group.size for group in pg.auto_spec(Mapped(), (torch.ones(2, 3),)).moving.values()] == [5]
