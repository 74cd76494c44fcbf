"""Elements of the group: its law on state dicts, inverses, files, types, and what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import permgraph as pg
from permgraph.errors import MismatchError, SpecError
from permgraph.spec import Action, Gain, General
from tests.general import models

MODULES = {
    "heads in one": (lambda: models.Attention(fused=True), lambda: models.sequences(11)),
    "grouped": (lambda: models.Attention(2, 3), lambda: models.sequences(11)),
    "rotations between gains": (lambda: models.Residual(lambda n: models.Rms(n, 1.0), "scaled"), models.tokens),
    "common signs": (lambda: models.Residual(nn.LayerNorm, "after"), models.tokens),
    "two factors": (lambda: models.Gated(F.relu), models.vectors),
    "batch norm": (lambda: models.convolutions(nn.BatchNorm2d(7), nn.ReLU()), models.images),
}


@pytest.fixture(params=MODULES.values(), ids=MODULES)
def case(request: pytest.FixtureRequest) -> tuple[pg.PermutationSpec, dict[str, Tensor]]:
    build, inputs = request.param
    torch.manual_seed(0)
    model = build().eval()
    state = {
        name: torch.rand_like(w, dtype=torch.float64) + 0.5 if w.ndim == 1 else torch.randn_like(w, dtype=torch.float64)
        for name, w in model.state_dict().items()
        if w.is_floating_point()
    }
    return pg.auto_spec(model, (inputs(),), symmetry="general"), state


def _apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_the_law_of_the_group(case: tuple[pg.PermutationSpec, dict[str, Tensor]]) -> None:
    spec, state = case
    g, h, k = (spec.random(seed, every_group=True) for seed in range(3))
    assert _apart((g @ h).apply(state), g.apply(h.apply(state))) < 1e-12
    assert _apart(((g @ h) @ k).apply(state), (g @ (h @ k)).apply(state)) < 1e-12
    assert _apart(g.inverse().apply(g.apply(state)), state) < 1e-12
    assert _apart((g @ g.inverse()).apply(state), state) < 1e-12
    assert _apart(spec.identity().apply(state), state) == 0 and spec.identity().is_identity
    assert not g.is_identity and _apart(g.apply(state), state) > 1e-3
    assert _apart((g @ h).apply(state), (h @ g).apply(state)) > 1e-3


def test_elements_are_kept_in_files(case: tuple[pg.PermutationSpec, dict[str, Tensor]], tmp_path: Path) -> None:
    spec, state = case
    g = spec.random(5)
    g.save(tmp_path / "g")
    spec.save(tmp_path / "spec.json")
    again = pg.PermutationSpec.load(tmp_path / "spec.json")
    assert again == spec and again.general == spec.general and again.fingerprint == spec.fingerprint
    assert _apart(pg.Transformation.load(tmp_path / "g", again).apply(state), g.apply(state)) == 0
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert _apart(pickle.loads(pickle.dumps(g)).apply(state), g.apply(state)) == 0
    other = pg.auto_spec(models.mlp(nn.Tanh()), (models.vectors(),), symmetry="general")
    with pytest.raises(MismatchError, match="another spec"):
        pg.Transformation.load(tmp_path / "g", other)
    with pytest.raises(MismatchError, match="different specs"):
        g @ other.random(0)


def test_text_shows_structures_and_is_read_without() -> None:
    spec = pg.auto_spec(models.Attention(), (models.sequences(11),), symmetry="general")
    assert "q#1 5 GL per q#0" in str(spec)
    read = pg.PermutationSpec.parse(str(spec))
    assert read.symmetry == "permutation" and read.axes == spec.axes
    assert read.groups == spec.permutations().groups


def test_the_input_is_not_changed_and_types_are_kept() -> None:
    model = models.mlp(nn.ReLU()).bfloat16()
    spec = pg.auto_spec(copy.deepcopy(model).float(), (models.vectors(),), symmetry="general")
    state, before = model.state_dict(), copy.deepcopy(model.state_dict())
    moved = spec.random(0).apply(state)
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert all(moved[name].dtype is torch.bfloat16 for name in state)


def test_tied_weights_stay_tied() -> None:
    model = models.Residual(lambda n: nn.LayerNorm(n, elementwise_affine=False), tied=True)
    spec = pg.auto_spec(model, (models.tokens(),), symmetry="general")
    moved = spec.random(0).apply(model.state_dict())
    assert moved["head.weight"] is moved["table.weight"]


def test_a_gain_with_a_zero_is_refused() -> None:
    model = models.Residual(models.Rms)
    spec = pg.auto_spec(model, (models.tokens(),), symmetry="general")
    with torch.no_grad():
        model.norm.weight[3] = 0
    with pytest.raises(MismatchError, match=r"norm\.weight has a zero.*spec\.permutations\(\)"):
        spec.random(0).apply(model.state_dict())


def test_what_knows_permutations_alone_says_so_or_takes_them() -> None:
    torch.manual_seed(0)
    a = models.mlp(nn.ReLU())
    spec = pg.auto_spec(a, (models.vectors(),), symmetry="general")
    b = copy.deepcopy(a)
    b.load_state_dict(spec.permutations().random(1, every_group=True).apply(a.state_dict()))
    fit = pg.align(a, b, spec=spec)
    assert _apart(fit.state_dict, a.state_dict()) == 0
    assert pg.merge([a, b], spec=spec).state_dict is not None
    with pytest.raises(SpecError, match=r"take spec\.permutations\(\)"):
        pg.Permutation(spec, {})
    with pytest.raises(SpecError, match="of the class Permutation"):
        pg.Transformation.identity(spec.permutations())


def test_values_outside_the_structure_are_refused() -> None:
    spec = pg.auto_spec(models.Residual(models.Rms), (models.tokens(),), symmetry="general")
    rest = spec.identity()
    skew = np.eye(7)
    skew[0, 1] = 1.0
    with pytest.raises(MismatchError, match="'table' has the structure O"):
        pg.Transformation(spec, rest.permutation, {"table": skew}, {}, {})
    with pytest.raises(MismatchError, match=r"shape \(6, 6\), but \(7, 7\) is due"):
        pg.Transformation(spec, rest.permutation, {"table": np.eye(6)}, {}, {})
    with pytest.raises(MismatchError, match="has no scales"):
        pg.Transformation(spec, rest.permutation, {}, {"table": np.ones((7, 1))}, {})


def test_actions_that_do_not_fit_are_refused() -> None:
    spec = pg.auto_spec(models.mlp(nn.Tanh()), (models.vectors(),), symmetry="general")
    assert spec.general is not None
    for action in (Action((1,)), Action((), (1, 1)), Action((), (2,)), Action((), (), ((Gain("0.bias"), 1),))):
        wrong = General({**spec.general.actions, "0.bias": (action,)})
        with pytest.raises(SpecError, match=r"'0\.bias', dimension 0"):
            pg.PermutationSpec(spec.groups, spec.axes, general=wrong)
    with pytest.raises(SpecError, match="nothing says how it acts"):
        pg.PermutationSpec(spec.groups, spec.axes)
    with pytest.raises(SpecError, match="'permutation' or 'general'"):
        pg.auto_spec(models.mlp(nn.Tanh()), (models.vectors(),), symmetry="all")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("build", "inputs", "group", "action"),
    [
        (lambda: models.mlp(nn.Tanh()), models.vectors, "0.weight", "P"),
        (lambda: models.mlp(nn.ReLU()), models.vectors, "0.weight", "GL"),
        (lambda: models.mlp(nn.GELU()), models.vectors, "0.weight", "P"),
        (lambda: models.mlp(nn.ReLU6()), models.vectors, "0.weight", "P"),
        (models.Gram, models.vectors, "a", "GL"),
        (lambda: models.Residual(lambda n: nn.LayerNorm(n, elementwise_affine=False)), models.tokens, "table", "O"),
        (lambda: models.Residual(lambda n: nn.LayerNorm(n, elementwise_affine=False)), models.tokens, "table", "GL"),
    ],
)
def test_a_claim_that_is_too_large_does_not_pass(build, inputs, group: str, action: str) -> None:  # type: ignore[no-untyped-def]
    """Each weight on the axis moves as it should; only the structure is a larger one of the lattice."""
    from dataclasses import replace

    from permgraph.structures import Structure

    torch.manual_seed(0)
    model = build()
    spec = pg.auto_spec(model, (inputs(),), symmetry="general")
    wrong = Structure.parse(action)

    def acting(parameter: str, dim: int) -> Action:
        reads = dim == len(spec.shapes[parameter]) - 1 and dim > 0 and not parameter.startswith("table")
        return Action((-1 if reads else 1,))

    actions = {
        name: tuple(
            acting(name, o.dim) if o.group == group else Action() for o in spec.occurrences(name)
        )
        for name in spec.axes
    }  # fmt: skip
    groups = {
        name: replace(g, structure=wrong if name == group else Structure()) for name, g in spec.groups.items()
    }  # fmt: skip
    claimed = replace(spec, groups=groups, general=General(actions))
    found = pg.verify(model, claimed, (inputs(),))
    assert not found.passed and found.max_error > 1e-6


def test_the_right_claim_made_by_hand_passes() -> None:
    """The same with the structure that is right, so that the test above fails for its reason."""
    from dataclasses import replace

    from permgraph.structures import Structure

    model = models.mlp(nn.ReLU())
    spec = pg.auto_spec(model, (models.vectors(),), symmetry="general")
    actions = {"0.weight": (Action((1,)),), "0.bias": (Action((1,)),), "2.weight": (Action((-1,)),)}
    groups = {name: replace(g, structure=Structure("", 1)) for name, g in spec.groups.items()}
    assert pg.verify(model, replace(spec, groups=groups, general=General(actions)), (models.vectors(),)).passed


def test_a_structure_that_is_too_small_is_noticed() -> None:
    from dataclasses import replace

    from permgraph.structures import Structure

    for build, expected in ((lambda: models.mlp(nn.ReLU()), "scales"), (lambda: models.mlp(nn.Tanh()), "signs")):
        model = build()
        spec = pg.auto_spec(model, (models.vectors(),), symmetry="general")
        groups = {name: replace(group, structure=Structure()) for name, group in spec.groups.items()}
        found = pg.verify(model, replace(spec, groups=groups, general=General({})), (models.vectors(),))
        assert found.passed and not found.maximal and expected in str(found)
