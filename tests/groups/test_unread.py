"""What no pass reads: named with the groups it may belong to, or pinned; and the rest of tables read in part."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.spec import Unread
from tests.groups.renumbered import error, factorials


class MaskToken(nn.Module):
    """A token that stands for what is missing, which no example needs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.out = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 2)
        self.token = nn.Parameter(torch.randn(1, 6))

    def forward(self, x: Tensor, missing: bool = False) -> Tensor:
        h = self.embed(x)
        if missing:
            h = torch.cat([h, self.token], 0)
        return self.out(self.inner(h.tanh()).relu())


def test_a_parameter_that_no_pass_reads_is_named_with_the_groups_as_long_as_it():
    model = MaskToken().eval()
    spec = pg.auto_spec(model, (torch.randn(4, 3),), vary=False)
    assert spec.unread == (Unread("token", 1, 6, ("embed",)),)
    assert any("token" in note and "embed" in note and 'unread="pin"' in note for note in spec.notes)
    assert "token" in str(spec).partition("note:")[2]
    assert abs(spec.log_order() - factorials(6, 5)) < 1e-9
    assert error(model, spec, torch.randn(4, 3)) < 1e-9
    assert error(model, spec, torch.randn(4, 3), True) > 1e-3, "this is what the note warns of"


def test_such_groups_are_pinned_on_request():
    model = MaskToken().eval()
    spec = pg.auto_spec(model, (torch.randn(4, 3),), unread="pin", vary=False)
    assert spec.unread == ()
    assert abs(spec.log_order() - factorials(5)) < 1e-9
    assert error(model, spec, torch.randn(4, 3), True) < 1e-9
    reasons = {pin.reason for pin in spec.pins if pin.parameter == "embed.weight" and pin.dim == 0}
    assert reasons == {"as long as dimension 1 of token, which no pass reads"}
    assert "token" in str(spec.explain("embed.weight", 0))
    with pytest.raises(ValueError, match="'tie' is none of 'note', 'pin'"):
        pg.auto_spec(model, (torch.randn(4, 3),), unread="tie", vary=False)


def test_the_records_are_saved_renamed_and_shown(tmp_path):
    spec = pg.auto_spec(MaskToken().eval(), (torch.randn(4, 3),), vary=False)
    spec.save(tmp_path / "spec.json")
    assert pg.PermutationSpec.load(tmp_path / "spec.json").unread == spec.unread
    assert spec.rename({"embed": "stream"}).unread == (Unread("token", 1, 6, ("stream",)),)
    older = json.loads((tmp_path / "spec.json").read_text())
    del older["unread"]
    (tmp_path / "older.json").write_text(json.dumps(older))
    assert pg.PermutationSpec.load(tmp_path / "older.json").unread == ()
    older["unread"] = [["token", 1, 6]]
    (tmp_path / "older.json").write_text(json.dumps(older))
    with pytest.raises(pg.errors.SpecError, match=r"unread\[0\]: should be"):
        pg.PermutationSpec.load(tmp_path / "older.json")


class Towers(nn.Module):
    """A tower for each of two optional inputs, of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (nn.Sequential(nn.Linear(3, n), nn.ReLU(), nn.Linear(n, 2)) for n in (7, 5))

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> list[Tensor]:
        given = ((self.image, image), (self.text, text))
        return [tower(x) for tower, x in given if x is not None]


def test_a_tower_that_does_not_run_is_named_too():
    spec = pg.auto_spec(Towers().eval(), (torch.randn(4, 3),), vary=False)
    assert spec.unread == ()
    assert [note for note in spec.notes if "text.0.weight" in note]
    both = pg.auto_spec(Towers().eval(), (torch.randn(4, 3), torch.randn(4, 3)), vary=False)
    assert not [note for note in both.notes if "no pass" in note]


class FlatTable(nn.Module):
    """A table of rows kept flat, of which an input reads as many as it is long, from an offset."""

    def __init__(self, length: int, offset: int = 0) -> None:
        super().__init__()
        self.embed, self.out, self.offset = nn.Linear(3, 8), nn.Linear(8, 2), offset
        self.table = nn.Parameter(torch.randn(length))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        return self.out((self.embed(x) + self.table[self.offset : self.offset + n * 8].view(n, 8)).tanh())


def test_the_rest_of_a_flat_table_goes_on_as_its_rows_do():
    for length, offset in ((128, 0), (136, 16)):
        model = FlatTable(length, offset).eval()
        spec = pg.auto_spec(model, (torch.randn(2, 4, 3),), vary=False)
        assert abs(spec.log_order() - factorials(8)) < 1e-9
        assert error(model, spec, torch.randn(2, 9, 3)) < 1e-9
        assert not spec.unread and any("table[" in note for note in spec.notes)


def test_a_flat_table_without_room_for_whole_rows_is_named():
    for length, offset in ((130, 0), (129, 1)):
        model = FlatTable(length, offset).eval()
        spec = pg.auto_spec(model, (torch.randn(2, 4, 3),), vary=False)
        assert [(entry.parameter, entry.groups) for entry in spec.unread] == [("table", ("embed",))]
        pinned = pg.auto_spec(model, (torch.randn(2, 4, 3),), unread="pin", vary=False)
        assert pinned.log_order() == 0 and error(model, pinned, torch.randn(2, 9, 3)) < 1e-9


class Stack(nn.Module):
    """As many matrices of a stack are applied as there are rows in the input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, 6), nn.Linear(6, 2)
        self.steps = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for t in range(len(x)):
            h = torch.tanh(h @ self.steps[t])
        return self.out(h)


def test_a_stack_of_matrices_read_in_part_has_a_spec():
    model = Stack().eval()
    half = pg.auto_spec(model, (torch.randn(2, 3),), vary=False)
    assert {entry.parameter for entry in half.unread} == {"steps"}, "wrong on longer inputs, and said to be so"
    most = pg.auto_spec(model, (torch.randn(3, 3),), vary=False)
    assert {entry.parameter for entry in most.unread} == {"steps"}
    pinned = pg.auto_spec(model, (torch.randn(3, 3),), unread="pin", vary=False)
    assert error(model, pinned, torch.randn(4, 3)) < 1e-9


class StackedExperts(nn.Module):
    """Experts in one tensor, of which Python takes those that some token chose, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 8)
        self.up, self.down = nn.Parameter(torch.randn(8, 5, 4)), nn.Parameter(torch.randn(8, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for expert in torch.unique(chosen):
            number = int(expert)
            rows = torch.where(chosen == number)[0]
            out = out.index_add(0, rows, torch.relu(x[rows] @ self.up[number].T) @ self.down[number].T)
        return out


@pytest.mark.parametrize("max_passes", [1, 4, 10])
def test_slices_that_only_a_value_could_have_chosen_are_not_free(max_passes: int):
    """That a value says which slice is taken pins the slices' order; it reads none of them."""
    torch.manual_seed(0)
    model = StackedExperts().eval()
    with torch.no_grad():
        model.router.weight.mul_(0.1)
        model.router.bias.copy_(torch.tensor([0.0, 9, 0, 9.01, 0, 0, 0, 0]))
    spec = pg.auto_spec(model, (torch.randn(7, 4),), max_passes=max_passes)
    assert 0 < spec.log_order() <= factorials(*[5] * 8) + 1e-9
    assert error(model, spec, torch.randn(2000, 4)) < 1e-9  # of random weights, by which tokens choose most of them


class Rare(nn.Module):
    """A layer without biases through which go the rows above a bound alone, of which there are none at first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.up, self.down = nn.Linear(6, 5, bias=False), nn.Linear(5, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        rows = torch.where(x.sum(-1) > 50)[0]
        return self.last(h.index_add(0, rows, self.down(torch.relu(self.up(h[rows])))))


def test_units_that_met_no_rows_have_one_order():
    """Tensors of no rows are all that tells that hidden units are no other ones for each unit of the stream."""
    torch.manual_seed(0)
    model = Rare().eval()
    spec = pg.auto_spec(model, (torch.randn(3, 4),))
    assert spec.log_order() == pytest.approx(factorials(6, 5))
    assert error(model, spec, torch.randn(3, 4) + 40) < 1e-9
