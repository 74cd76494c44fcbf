"""Tied weights that could be untied: the larger group, its elements, and the folder that is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import permgraph as pg
from permgraph.errors import MismatchError, SpecError
from permgraph.weights.identity import load_tied
from tests.general import models
from tests.general.models import tokens

D = 7


def _tied(norm: type[nn.Module] = models.Rms) -> nn.Module:
    torch.manual_seed(0)
    model = models.Residual(norm, tied=True).eval()
    with torch.no_grad():  # gains that differ: the head and the table are moved otherwise
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
    return model


@pytest.mark.parametrize(
    ("norm", "tied", "untied", "dimension"),
    [
        (models.Rms, "M^2×B", "O", D * (D - 1) // 2),
        (nn.LayerNorm, "M^2×S±", "O1", (D - 1) * (D - 2) // 2),
    ],
)
def test_the_group_is_that_of_the_model_with_a_head_of_its_own(
    norm: type[nn.Module], tied: str, untied: str, dimension: int
) -> None:
    model, x = _tied(norm), (tokens(),)
    small = pg.auto_spec(model, x, symmetry="general")
    large = pg.auto_spec(model, x, symmetry="general", untie=True)
    assert str(small.groups["table"].structure) == tied and str(large.groups["table"].structure) == untied
    assert large.dimension() == dimension
    own = pg.auto_spec(models.Residual(norm).eval(), x, symmetry="general")
    assert large.fingerprint == own.fingerprint
    proof = pg.verify(model, large, x)
    assert proof.passed and proof.maximal, str(proof)


def test_the_model_itself_stays_tied() -> None:
    model = _tied()
    pg.auto_spec(model, (tokens(),), symmetry="general", untie=True)
    assert model.head.weight is model.table.weight


def test_the_spec_says_so(tmp_path: Path) -> None:
    spec = pg.auto_spec(_tied(), (tokens(),), symmetry="general", untie=True)
    assert spec.general is not None
    assert spec.general.untied == {"head.weight": "table.weight"}
    assert "untied, head.weight is no longer table.weight" in str(spec)
    spec.save(tmp_path / "spec.json")
    read = pg.PermutationSpec.load(tmp_path / "spec.json")
    assert read.general is not None and read.general.untied == spec.general.untied
    plain = pg.auto_spec(models.Residual(models.Rms).eval(), (tokens(),), symmetry="general", untie=True)
    assert "there is nothing to untie" in plain.notes


@pytest.mark.parametrize("whole", [True, False], ids=["both names", "one name"])
def test_elements_give_both_tensors(whole: bool) -> None:
    model, x = _tied().double(), tokens()
    spec = pg.auto_spec(model, (x,), symmetry="general", untie=True)
    state = {n: t for n, t in model.state_dict().items() if whole or n != "head.weight"}
    moved = spec.random(seed=0).apply(state)
    assert not torch.allclose(moved["head.weight"], moved["table.weight"])
    apart = pg.untied(model)
    apart.load_state_dict(moved)
    assert torch.allclose(apart(x), model(x), atol=1e-9)
    assert not torch.allclose(apart.table.weight, model.table.weight)


def test_a_tied_model_does_not_take_both() -> None:
    model = _tied()
    moved = pg.auto_spec(model, (tokens(),), symmetry="general", untie=True).random(seed=0).apply(model.state_dict())
    with pytest.raises(MismatchError, match=r"'table.weight' and 'head.weight' are one tensor in Residual.*untied"):
        load_tied(model, moved)


def test_modules_of_several_names_stay_one() -> None:
    shared = nn.Linear(5, 5)
    model = nn.Sequential(nn.Linear(3, 5), shared, nn.ReLU(), shared, nn.Linear(5, 2))
    apart = pg.untied(model)
    assert isinstance(apart, nn.Sequential) and apart[1] is apart[3] and apart[1] is not shared


def test_it_goes_with_general_symmetries_alone() -> None:
    with pytest.raises(SpecError, match="symmetry='general'"):
        pg.auto_spec(_tied(), (tokens(),), untie=True)


def test_the_folder_says_so(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    spec = pg.auto_spec(model, symmetry="general", untie=True)
    assert "O" in {str(group.structure) for group in spec.groups.values()}
    moved = spec.random(seed=0).apply(model.state_dict())
    apart = pg.untied(model)
    apart.load_state_dict(moved)
    apart.save_pretrained(tmp_path / "by transformers")
    model.save_pretrained(tmp_path / "by hand")
    from safetensors.torch import save_file

    save_file(moved, tmp_path / "by hand" / "model.safetensors", {"format": "pt"})
    own = tmp_path / "by hand" / "config.json"
    own.write_text(json.dumps(pg.untied_config(json.loads(own.read_text()))))
    ids = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))
    for folder in ("by transformers", "by hand"):
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert read.config.tie_word_embeddings is False
        assert read.lm_head.weight is not read.model.embed_tokens.weight
        assert torch.allclose(read(ids).logits, model(ids).logits, atol=1e-4)
    assert model.config.tie_word_embeddings is True


def test_nested_configurations() -> None:
    given = {"text_config": {"tie_word_embeddings": True, "rope": {"theta": 1}}, "vision_config": {"depth": 2}}
    assert pg.untied_config(given) == {
        "text_config": {"tie_word_embeddings": False, "rope": {"theta": 1}},
        "vision_config": {"depth": 2},
        "tie_word_embeddings": False,
    }
