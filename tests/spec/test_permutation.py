from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from permgraph.errors import MismatchError, SpecError
from permgraph.spec import PermutationSpec
from permgraph.spec.expressions import parse_axes
from permgraph.spec.permutation import Permutation

SPEC = PermutationSpec.parse(
    """
embed.weight     5x6     . c
attn.qkv.weight  24x6    (s:[1 + 1 + 1] h {qk | qk | 4}@s) c
attn.out.weight  6x8     c (h 4)
norm.running     6       c
scale            scalar
head.weight = embed.weight
groups: c 6 · h 2 · qk 4 per h · f 2 fixed · nowhere 3
"""
)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SPEC.shapes.items()}
    return {**made, "head.weight": made["embed.weight"], "norm.steps": torch.tensor(7)}


# --- the values -------------------------------------------------------------------------------------------------------


def test_every_moving_group_has_an_array():
    p = SPEC.identity()
    assert {name: array.shape for name, array in p.arrays.items()} == {"c": (6,), "h": (2,), "qk": (2, 4)}
    assert p.is_identity
    assert p.moved() == {"c": 0, "h": 0, "qk": 0}
    assert p == Permutation(SPEC, {"c": range(6)}) == Permutation.identity(SPEC)
    assert p != SPEC.random(0)
    assert p != "p"


def test_arrays_are_copied_and_cannot_be_written():
    given = np.array([1, 0, 2, 3, 4, 5])
    p = Permutation(SPEC, {"c": given})
    given[0] = 9
    assert p.arrays["c"].tolist() == [1, 0, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="read-only"):
        p.arrays["c"][0] = 0
    with pytest.raises(TypeError):
        p.arrays["c"] = given
    assert p.moved()["c"] == 2


def test_arrays_may_be_tensors():
    assert Permutation(SPEC, {"h": torch.tensor([1, 0])}).arrays["h"].dtype == np.int64


def test_the_same_seed_draws_the_same():
    assert SPEC.random(3) == SPEC.random(3) == Permutation.random(SPEC, 3)
    assert SPEC.random(3) != SPEC.random(4)
    assert SPEC.random(np.random.default_rng(3)) == SPEC.random(3)
    generator = torch.Generator().manual_seed(0)
    first = SPEC.random(generator)
    assert first != SPEC.random(generator)
    assert first == SPEC.random(torch.Generator().manual_seed(0))


def test_the_global_random_state_is_left_alone():
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    SPEC.random(0, every_group=True)
    assert torch.equal(before, torch.random.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


def test_every_group_can_be_made_to_move():
    assert any(not SPEC.random(seed).moved()["h"] for seed in range(20))
    assert all(all(SPEC.random(seed, every_group=True).moved().values()) for seed in range(20))


def test_restricted():
    p = SPEC.random(0, every_group=True)
    assert set(p.restricted_to(["h", "f"])._moved) == {"h"}
    assert p.restricted_to([]).is_identity
    assert p.restricted_to(SPEC.groups) == p
    with pytest.raises(SpecError, match="no group 'x'"):
        p.restricted_to(["x"])


def test_copies():
    p = SPEC.random(0)
    for again in (copy.deepcopy(p), copy.copy(p), pickle.loads(pickle.dumps(p))):
        assert again == p
        assert again.spec == SPEC
    with pytest.raises(TypeError, match="unhashable"):
        hash(p)


# --- bad arrays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"x": [0]}, SpecError, "no group 'x' in the spec; it has c, h, qk, f, nowhere"),
        ({"c": range(5)}, MismatchError, r"group 'c' has an array of shape \(5,\), but \(6,\) is due"),
        (
            {"qk": [[0, 1, 2, 3]]},
            MismatchError,
            r"group 'qk' has an array of shape \(1, 4\), but \(2, 4\) is due \(a permutation of 4 for each .* h\)",
        ),
        ({"qk": [[0, 1, 2, 3]] * 3}, MismatchError, r"shape \(3, 4\), but \(2, 4\) is due"),
        ({"qk": range(4)}, MismatchError, r"shape \(4,\), but \(2, 4\) is due"),
        ({"qk": [[0, 1, 2, 3], [0, 1, 2, 2]]}, MismatchError, r"group 'qk', row \(1,\): not a permutation of 0 to 3"),
        ({"h": [1, 2]}, MismatchError, "group 'h': not a permutation of 0 to 1"),
        ({"h": [-1, 0]}, MismatchError, "group 'h': not a permutation of 0 to 1"),
        ({"h": [0.0, 1.0]}, MismatchError, "group 'h': a permutation holds integers, not float64"),
        ({"f": [1, 0]}, SpecError, "group 'f' is fixed or stands in no parameter"),
        ({"nowhere": [1, 0, 2]}, SpecError, "group 'nowhere' is fixed or stands in no parameter"),
    ],
)
def test_bad_arrays(arrays, error, message):
    with pytest.raises(error, match=message):
        Permutation(SPEC, {name: np.array(array) for name, array in arrays.items()})


def test_the_identity_on_a_fixed_group_is_let_pass():
    assert Permutation(SPEC, {"f": np.array([0, 1]), "nowhere": np.arange(3)}).is_identity


def test_permutations_of_different_specs():
    other = PermutationSpec.parse("w 6 c\ngroups: c 6")
    assert SPEC.identity() != other.identity()
    with pytest.raises(MismatchError, match="different specs: group h: 2, only in the first"):
        SPEC.identity() @ other.identity()
    with pytest.raises(TypeError):
        SPEC.identity() @ "q"


# --- apply ------------------------------------------------------------------------------------------------------------


def test_apply_returns_a_new_state_dict(state):
    before = {name: tensor.clone() for name, tensor in state.items()}
    p = SPEC.random(0, every_group=True)
    moved = p.apply(state)
    assert list(moved) == list(state)
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name])
        assert moved[name].shape == tensor.shape
        assert moved[name].data_ptr() != tensor.data_ptr()
    assert torch.equal(moved["norm.running"], state["norm.running"][torch.from_numpy(p.arrays["c"].copy())])
    assert moved["norm.steps"] == 7
    back = p.inverse().apply(moved)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_the_identity_copies_too(state):
    moved = SPEC.identity().apply(state)
    assert all(torch.equal(moved[name], state[name]) for name in state)
    moved["scale"] += 1
    moved["norm.steps"] += 1
    assert state["norm.steps"] == 7
    assert moved["scale"] != state["scale"]


def test_a_group_action_on_state_dicts(state):
    p, q = SPEC.random(0), SPEC.random(1)
    once, twice = (p @ q).apply(state), p.apply(q.apply(state))
    assert all(torch.equal(once[name], twice[name]) for name in state)


def test_tied_names_stay_tied(state):
    moved = SPEC.random(0).apply(state)
    assert moved["head.weight"] is moved["embed.weight"]
    state["head.weight"] = state["embed.weight"].clone() + 1
    moved = SPEC.random(0).apply(state)
    assert torch.equal(moved["head.weight"], moved["embed.weight"] + 1)
    # Checkpoint formats drop all but one of the tied names; any of them will do.
    del state["embed.weight"]
    assert torch.equal(SPEC.random(0).apply(state)["head.weight"], moved["head.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool])
def test_dtypes(state, dtype):
    p = SPEC.random(0)
    name = "attn.qkv.weight"
    values = (state[name] * 20).to(dtype)
    assert torch.equal(p.apply_to(name, values), p.apply_to(name, values.to(torch.float64)).to(dtype))
    assert p.apply({**state, name: values})[name].dtype == dtype


def test_tensors_of_any_strides_and_gradients(state):
    p = SPEC.random(0)
    for name in ("attn.qkv.weight", "attn.out.weight"):
        straight = p.apply_to(name, state[name])
        assert torch.equal(p.apply_to(name, state[name].t().contiguous().t()), straight)
        spaced = torch.stack([state[name]] * 2, dim=-1)[..., 0]
        assert torch.equal(p.apply_to(name, spaced), straight)
        asked = p.apply_to(name, torch.nn.Parameter(state[name]))
        assert torch.equal(asked, straight)
        assert not asked.requires_grad
        assert type(asked) is torch.Tensor
    wide = state["norm.running"][:1].expand(6)
    assert torch.equal(p.apply_to("norm.running", wide), wide)


def test_alias_names_are_known(state):
    p = SPEC.random(0)
    assert torch.equal(
        p.apply_to("head.weight", state["head.weight"]), p.apply_to("embed.weight", state["embed.weight"])
    )
    assert torch.equal(p.local_index("head.weight", 1), torch.from_numpy(p.arrays["c"].copy()))


def test_excluded_axes_stay(state):
    p = SPEC.random(0, every_group=True).restricted_to(["c"])
    moved = p.apply(state, exclude={("attn.qkv.weight", 1), ("head.weight", 1)})
    assert torch.equal(moved["attn.qkv.weight"], state["attn.qkv.weight"])
    assert torch.equal(moved["embed.weight"], state["embed.weight"])
    assert torch.equal(moved["attn.out.weight"], p.apply(state)["attn.out.weight"])
    assert torch.equal(p.apply_to("attn.out.weight", state["attn.out.weight"], exclude=[0]), state["attn.out.weight"])
    whole = SPEC.random(0, every_group=True)
    kept = whole.apply_to("attn.qkv.weight", state["attn.qkv.weight"], exclude=[1])
    assert torch.equal(kept, whole.restricted_to(["h", "qk"]).apply_to("attn.qkv.weight", state["attn.qkv.weight"]))


@pytest.mark.parametrize("exclude", [{("nothing", 0)}, {("scale", 0)}, {("norm.running", 1)}, {("norm.running", -1)}])
def test_excluding_what_is_not_there(state, exclude):
    with pytest.raises(SpecError, match=r"no parameter 'nothing'|there is no dimension"):
        SPEC.identity().apply(state, exclude=exclude)


def test_activations(state):
    p = SPEC.random(0)
    x = torch.randn(2, 3, 6)
    moved = p.apply_axes(parse_axes("2 3 c"), x)
    assert torch.equal(moved, x[..., torch.from_numpy(p.arrays["c"].copy())])
    with pytest.raises(MismatchError, match=r"shape \(2, 3, 6\) for axes of sizes \(2, 6\)"):
        p.apply_axes(parse_axes("2 c"), x)
    with pytest.raises(SpecError, match="'qk' is fibred over 'h', which has no axis there"):
        p.apply_axes(parse_axes("2 qk"), torch.zeros(2, 4))


def test_what_is_not_a_tensor_is_passed_on(state):
    extra = {"anything": 1}
    assert SPEC.random(0).apply({**state, "norm._extra_state": extra})["norm._extra_state"] is extra


def test_unused_parameters_are_passed_on(state):
    spec = PermutationSpec(SPEC.groups, SPEC.axes, aliases=SPEC.aliases, unused=("aux.weight",))
    aux = torch.randn(3)
    moved = spec.random(0).apply({**state, "aux.weight": aux})["aux.weight"]
    assert torch.equal(moved, aux)
    assert moved.data_ptr() != aux.data_ptr()


# --- bad state dicts --------------------------------------------------------------------------------------------------


def test_tensors_without_values(state):
    p = SPEC.random(0)
    with pytest.raises(MismatchError, match="'attn.out.weight' is on the meta device: .* load the weights first"):
        p.apply({**state, "attn.out.weight": torch.empty(6, 8, device="meta")})
    with FakeTensorMode():
        fake = torch.empty(6, 8)
    with pytest.raises(MismatchError, match="'attn.out.weight' is fake"):
        p.apply({**state, "attn.out.weight": fake})
    with pytest.raises(MismatchError, match="is on the meta device"):
        p.apply_axes(parse_axes("c"), torch.empty(6, device="meta"))
    with pytest.raises(MismatchError, match="'attn.out.weight' is not initialised yet"):
        p.apply({**state, "attn.out.weight": torch.nn.UninitializedParameter()})


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_plain(state):
    p = SPEC.random(0)
    quantised = torch.quantize_per_tensor(state["attn.out.weight"], 0.1, 0, torch.qint8)
    with pytest.raises(MismatchError, match="'attn.out.weight' is quantised"):
        p.apply({**state, "attn.out.weight": quantised})
    with pytest.raises(MismatchError, match="make it dense first"):
        p.apply({**state, "attn.out.weight": state["attn.out.weight"].to_sparse()})


def test_apply_refuses_what_does_not_fit(state):
    p = SPEC.random(0)
    with pytest.raises(MismatchError, match=r"'norm.running' has shape \(7,\), but the spec says \(6,\)"):
        p.apply({**state, "norm.running": torch.zeros(7)})
    with pytest.raises(MismatchError, match="which the spec does not know"):
        p.apply({**state, "extra.weight": torch.zeros(1)})
    with pytest.raises(MismatchError, match="'norm.running' has shape"):
        p.apply_to("norm.running", torch.zeros(7))
    with pytest.raises(SpecError, match=r"no parameter 'norm.runing' in this spec; near: norm.running"):
        p.apply_to("norm.runing", torch.zeros(6))
    with pytest.raises(SpecError, match="there is no dimension 1"):
        p.local_index("norm.running", 1)


# --- files ------------------------------------------------------------------------------------------------------------


def test_files(tmp_path, monkeypatch):
    p, path = SPEC.random(0), tmp_path / "p.safetensors"
    p.save(path)
    assert Permutation.load(path, SPEC) == p
    SPEC.random(1).save(str(path))
    assert Permutation.load(str(path), SPEC) == SPEC.random(1)
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]

    def broken(*_):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="no space"):
        p.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]
    assert Permutation.load(path, SPEC) == SPEC.random(1)


def test_a_permutation_of_nothing_is_saved_too(tmp_path):
    empty = PermutationSpec.parse("w 3 .")
    empty.identity().save(tmp_path / "p")
    assert Permutation.load(tmp_path / "p", empty).is_identity


def test_bad_files(tmp_path):
    path = tmp_path / "p.safetensors"
    SPEC.random(0).save(path)
    with pytest.raises(MismatchError, match="belongs to another spec"):
        Permutation.load(path, PermutationSpec.parse("w 6 c\ngroups: c 6"))
    path.write_bytes(b"no such thing")
    with pytest.raises(SpecError, match="p.safetensors: not a permutation"):
        Permutation.load(path, SPEC)
    from safetensors.numpy import save_file

    save_file({"c": np.arange(6)}, path)
    with pytest.raises(SpecError, match="format None, version None"):
        Permutation.load(path, SPEC)
    with pytest.raises(FileNotFoundError):
        Permutation.load(tmp_path / "nowhere", SPEC)
