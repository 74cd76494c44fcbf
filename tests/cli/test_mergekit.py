"""``permgraph mergekit``: recipes of mergekit's on aligned models, and what is refused before anything is written."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from permgraph.cli.app import app
from permgraph.cli.models import spec_of
from permgraph.io import Staging, open_checkpoint, write_checkpoint

transformers = pytest.importorskip("transformers")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to-hugging-face.md"
SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=40)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three Llamas, the first one renumbered, and two that do not go with them."""
    pytest.importorskip("mergekit.merge")
    folder = tmp_path_factory.mktemp("models")
    small = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    with torch.random.fork_rng():
        for seed, name in enumerate(("model-a", "model-b", "model-c")):
            torch.manual_seed(seed)
            transformers.LlamaForCausalLM(small).save_pretrained(folder / name)
        wide = transformers.LlamaConfig(**{**SIZES, "num_attention_heads": 2}, num_key_value_heads=1, head_dim=4)
        transformers.LlamaForCausalLM(wide).save_pretrained(folder / "other-heads")
        other = transformers.GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=40, n_positions=16)
        transformers.GPT2LMHeadModel(other).save_pretrained(folder / "gpt2")
    spec = spec_of(f"hf:{folder / 'model-a'}")
    permutation = spec.random(1, every_group=True)
    with Staging(folder / "renumbered", {}) as staging:
        write_checkpoint(
            open_checkpoint(folder / "model-a"),
            staging,
            lambda key, t: permutation.apply_to(key, t) if key in spec.axes else t,
        )
    spoilt = folder / "spoilt"
    transformers.LlamaForCausalLM.from_pretrained(folder / "model-b").save_pretrained(spoilt)
    state = load_file(spoilt / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    save_file(state, spoilt / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, beside which the models lie under their names."""
    monkeypatch.chdir(tmp_path)
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
    return result


def merged(recipe: str, name: str = "out", *more: str) -> dict[str, torch.Tensor]:
    Path("recipe.yaml").write_text(recipe)
    run("mergekit", "recipe.yaml", name, *more)
    return load_file(Path(name, "model.safetensors"))


def weights(name: str) -> dict[str, torch.Tensor]:
    return load_file(Path(name, "model.safetensors"))


def differ(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def recipe(method: str, *names: str, base: str = "model-a", more: str = "", each: str = "{weight: 1}") -> str:
    listed = "".join(f"  - model: {name}\n    parameters: {each}\n" for name in names)
    return f"merge_method: {method}\nbase_model: {base}\nmodels:\n{listed}{more}"


def test_a_renumbered_copy_merges_with_the_original_to_it(here: Path) -> None:
    text = recipe("permgraph_align", "model-a", "renumbered")
    assert differ(merged(text), weights("model-a")) == 0
    assert differ(merged(recipe("linear", "model-a", "renumbered"), "linear"), weights("model-a")) == 0
    card = Path("out", "README.md").read_text()
    assert text in card and "correspondence with `model-a`" in card
    assert Path("out", "mergekit_config.yml").read_text() == text
    model = transformers.AutoModelForCausalLM.from_pretrained("out")
    expected = transformers.AutoModelForCausalLM.from_pretrained("model-a")
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
    assert not [path.name for path in here.iterdir() if path.name.startswith(".")]


def test_models_are_weighted_as_in_a_merge(here: Path) -> None:
    text = (
        "merge_method: permgraph_align\nbase_model: model-a\nmodels:\n"
        "  - model: model-a\n    parameters: {weight: 3}\n  - model: model-b\n"
        "  - model: model-c\n    parameters: {weight: 2}\n"
    )
    found = merged(text)
    run("merge", "model-a", "model-b", "model-c", "--method", "reference", "--weights", "3,1,2", "-o", "merged")
    assert differ(found, weights("merged")) < 1e-7
    a, b, c = (weights(f"model-{which}") for which in "abc")
    naive = {name: (3 * a[name] + b[name] + 2 * c[name]) / 6 for name in a}
    assert differ(found, naive) > 1e-3


def test_a_base_that_is_not_listed_gives_the_numbering_only(here: Path) -> None:
    found = merged(recipe("permgraph_align", "model-b"))
    run("align", "model-a", "model-b", "-o", "aligned")
    assert differ(found, weights("aligned")) == 0
    assert differ(found, weights("model-b")) > 1e-3


@pytest.mark.parametrize(
    ("method", "each", "more"),
    [
        ("slerp", "{}", "parameters: {t: 0.3}\n"),
        ("ties", "{weight: 0.7, density: 0.5}", ""),
    ],
)
def test_other_methods_see_aligned_models(here: Path, method: str, each: str, more: str) -> None:
    """In one step as in two: the models aligned first, and mergekit's own command on the result."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    text = recipe(method, "model-b", each=each, more=more)
    found = merged(text)
    run("align", "model-a", "model-b", "-o", "aligned")
    yaml = pytest.importorskip("yaml")
    config = MergeConfiguration.model_validate(yaml.safe_load(text.replace("model-b", str(here / "aligned"))))
    run_merge(config, "two-steps", MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False))
    assert differ(found, weights("two-steps")) == 0
    assert differ(found, weights("model-a")) > 1e-3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: permgraph_align\nmodels: [{model: model-a}, {model: model-b}]\n", "name one"),
        ("models: [{model: model-a}]\n", "it has no merge_method"),
        ("merge_method: [\n", "is no YAML"),
        (recipe("permgraph_aline", "model-b"), "Unimplemented merge method permgraph_aline"),
        (recipe("permgraph_align", "model-a"), "names one model: there is nothing to align"),
        (recipe("permgraph_align", "other-heads"), "other-heads"),
        (recipe("permgraph_align", "gpt2"), "gpt2|GPT2|rchitecture"),
        (recipe("permgraph_align", "spoilt"), "'model.layers.1.mlp.up_proj.weight'.* NaN"),
        (recipe("ties", "model-b", each="{density: 0.5}"), "Missing required parameter weight"),
        (recipe("permgraph_align", "model-b", each="{weight: heavy}"), "mergekit says"),
        (recipe("permgraph_align", "model-b", each="{weight: 0}"), "holds NaN .* of the merge: look at the weights"),
    ],
)
def test_a_recipe_that_cannot_be_done_is_one_line_and_nothing_written(here: Path, text: str, said: str) -> None:
    Path("recipe.yaml").write_text(text)
    before = sorted(path.name for path in here.iterdir())
    result = run("mergekit", "recipe.yaml", "out", code=2)
    (line,) = [line for line in result.stderr.splitlines() if "computes the same after renumbering" not in line]
    assert line.startswith("error: ") and re.search(said, line), line
    assert sorted(path.name for path in here.iterdir()) == before


def test_places_and_options_that_will_not_do(here: Path) -> None:
    Path("recipe.yaml").write_text(recipe("permgraph_align", "model-a", "renumbered"))
    assert "no such file" in run("mergekit", "none.yaml", "out", code=2).stderr
    assert "exists already" in run("mergekit", "recipe.yaml", "model-b", code=2).stderr
    assert "is one of the models" in run("mergekit", "recipe.yaml", "model-a", "--overwrite", code=2).stderr
    assert "say NAME=VALUE with one of" in run("mergekit", "recipe.yaml", "out", "--option", "cudda=1", code=2).stderr
    refused = run("mergekit", "recipe.yaml", "out", "--option", "trust_remote_code=true", code=2)
    assert "is not run" in refused.stderr
    run("mergekit", "recipe.yaml", "out", "-q")
    told = run("mergekit", "recipe.yaml", "out", "--json", "--overwrite", "--option", "write_model_card=false").stdout
    found = json.loads(told)  # and nothing else on it
    assert (found["method"], found["base"]) == ("permgraph_align", "model-a")
    assert [each["model"] for each in found["alignments"]] == ["renumbered"]
    assert not Path("out", "README.md").exists()


def test_recipes_of_the_documentation_run(here: Path) -> None:
    found = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(found) >= 2
    for number, text in enumerate(found):
        if "model-b-aligned" in text:
            run("align", "model-a", "model-b", "-o", "model-b-aligned")
        assert differ(merged(text, f"out-{number}"), weights("model-a")) > 0


def test_without_mergekit_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "mergekit"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mergekit", None)
    (tmp_path / "recipe.yaml").write_text("merge_method: linear\n")
    result = run("mergekit", tmp_path / "recipe.yaml", tmp_path / "out", code=2)
    assert "recipes need mergekit: pip install 'permgraph[mergekit]'" in result.stderr
