"""Checkpoints whose experts lie one by one on disk, and in one tensor in the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.zoo.names import ZOOS
from permgraph.cli.app import app
from permgraph.cli.checkpoints import conversions_of
from permgraph.cli.models import spec_of
from permgraph.io import Staging, open_checkpoint, write_checkpoint
from permgraph.io import converted as module
from permgraph.io.converted import ConvertedCheckpoint, converted

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.conversion_mapping")

SMALL = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 30}
CONFIGS = {
    "mixtral": {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4},
    "jamba": {
        **SMALL,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
}


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
    return result


def model_of(kind: str, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model saved by transformers in files too small for the experts of a layer, and the same renumbered."""
    folder = tmp_path_factory.mktemp(request.param)
    model = model_of(request.param)
    model.save_pretrained(folder / "a", max_shard_size="6kB")
    model.load_state_dict(spec_of(f"hf:{folder / 'a'}").random(1, every_group=True).apply(model.state_dict()))
    model.save_pretrained(folder / "b", max_shard_size="6kB")
    return folder / "a", folder / "b"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_models_tensors_are_read(pair: tuple[Path, Path]) -> None:
    on_disk = open_checkpoint(pair[0])
    checkpoint = converted(on_disk, conversions_of(f"hf:{pair[0]}"))
    assert isinstance(checkpoint, ConvertedCheckpoint)
    assert len(on_disk.files) > 3
    expected = load(pair[0]).state_dict()
    assert checkpoint.units.keys() <= expected.keys()
    assert sum(name.endswith(("gate_up_proj", "down_proj")) for name in checkpoint.units) >= 2
    for name in checkpoint.units:
        assert name not in on_disk
        assert torch.equal(checkpoint[name], expected[name])
        assert checkpoint.formats[name].shape == tuple(expected[name].shape)
    assert checkpoint.nbytes == on_disk.nbytes


@pytest.mark.parametrize("options", [(), ("--stream",)], ids=" ".join)
def test_a_renumbered_one_is_brought_back_byte_for_byte(
    pair: tuple[Path, Path], tmp_path: Path, options: tuple[str, ...]
) -> None:
    a, b = pair
    assert files(a) != files(b)
    run("align", a, b, "-o", tmp_path / "c", *options)
    assert files(tmp_path / "c") == files(a)


def test_a_merge_with_a_renumbered_one_computes_the_same(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    run("merge", a, b, "-o", tmp_path / "c")
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.allclose(load(tmp_path / "c")(ids).logits, load(a)(ids).logits, atol=1e-5)
    run("merge", a, b, "-o", tmp_path / "d", "--no-align")
    with torch.no_grad():
        assert not torch.allclose(load(tmp_path / "d")(ids).logits, load(a)(ids).logits, atol=1e-3)


def test_a_spec_in_a_file_is_of_the_models_names(pair: tuple[Path, Path], tmp_path: Path) -> None:
    spec_of(f"hf:{pair[0]}").save(tmp_path / "spec.json")
    run("align", *pair, "--spec", tmp_path / "spec.json", "-o", tmp_path / "c")
    assert files(tmp_path / "c") == files(pair[0])


def test_what_cannot_be_had_back_is_not_written(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = module._backward
    monkeypatch.setattr(module, "_backward", lambda *given: {k: t + 1 for k, t in backward(*given).items()})
    result = run("align", *pair, "-o", tmp_path / "c", code=2)
    assert "does not get them back" in " ".join(result.stderr.split())
    assert not (tmp_path / "c").exists()


def test_parts_of_other_shapes_stay_as_they_are(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    backward = module._backward
    monkeypatch.setattr(module, "_backward", lambda *given: {k: t[:1] for k, t in backward(*given).items()})
    on_disk = open_checkpoint(pair[0])
    assert converted(on_disk, conversions_of(f"hf:{pair[0]}")) is on_disk


def test_other_models_are_left_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    on_disk = open_checkpoint(pair[0])
    assert converted(on_disk, conversions_of("")) is on_disk
    assert converted(on_disk, conversions_of("timm:resnet18")) is on_disk
    assert converted(on_disk, conversions_of(f"hf:{tmp_path}")) is on_disk
    model_of("mixtral").save_pretrained(tmp_path / "today")
    state = {name: tensor.clone() for name, tensor in load(tmp_path / "today").state_dict().items()}
    torch.save(state, tmp_path / "state.pt")
    today = open_checkpoint(tmp_path / "state.pt")
    assert converted(today, conversions_of(f"hf:{tmp_path / 'today'}")) is today


def architectures() -> list[str]:
    """The names of all that transformers joins or splits tensors of."""
    conversions = pytest.importorskip("transformers.conversion_mapping")
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    table = conversions._build_checkpoint_conversion_mapping()
    kinds = {kind for kind, found in table.items() if any(hasattr(one, "operations") for one in found)}
    known = set(ZOOS["transformers"].names())
    made = auto.MODEL_MAPPING_NAMES.items()
    pairs = [(kind, name) for kind, names in made for name in ([names] if isinstance(names, str) else names)]
    return list(dict.fromkeys(name for kind, name in pairs if name in known and kinds & {kind, name}))


@pytest.mark.zoo
def test_every_architecture_is_read_as_transformers_does_and_written_back(tmp_path: Path) -> None:
    units = 0
    for name in architectures():
        model = next(iter(ZOOS["transformers"].build(name)))
        folder = tmp_path / name
        model.save_pretrained(folder / "a")
        expected = type(model).from_pretrained(folder / "a", local_files_only=True).state_dict()
        checkpoint = converted(open_checkpoint(folder / "a"), conversions_of(f"hf:{folder / 'a'}"))
        if not isinstance(checkpoint, ConvertedCheckpoint):  # its options leave those tensors out
            continue
        for target in checkpoint.units:
            known = target if target in expected else target.removeprefix("model.")
            assert torch.equal(checkpoint[target], expected[known]), f"{name}: {target}"
        with Staging(folder / "b", {}) as staging:
            write_checkpoint(checkpoint, staging, lambda key, tensor: tensor)
        assert files(folder / "b") == files(folder / "a"), name
        units += len(checkpoint.units)
    assert units > 300
