"""Folders of sentence-transformers, diffusers, timm and open_clip: two scrambled copies are brought back, exactly."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from permgraph.cli.app import app
from permgraph.cli.checkpoints import moved_by
from permgraph.cli.models import build, spec_of
from permgraph.cli.sentences import NAMED_MODES, Pooling
from permgraph.errors import CaptureError, CheckpointError
from permgraph.io import Staging, open_checkpoint, write_checkpoint
from permgraph.spec.expressions import Fixed

transformers = pytest.importorskip("transformers")

BERT = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 23}
UNET = {
    "sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4, "attention_head_dim": 4,
}  # fmt: skip
CONDITIONED = {
    **UNET, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 12,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
VAE = {
    "block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 4,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "sample_size": 16,
}  # fmt: skip


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
    return result


def refused(*args: object) -> str:
    said = run(*args, code=2).stderr.strip()
    assert len(said.splitlines()) == 1, said
    return str(said)


def scrambled(source: Path, target: Path, model: str = "", components: tuple[str, ...] = ()) -> Path:
    """A copy of a folder or file that computes the same, with all of its units renumbered."""
    spec = spec_of(model or f"hf:{source}")
    assert spec.acting
    element, checkpoint = spec.random(1, every_group=True), open_checkpoint(source, components=components)
    with Staging(target, {}) as staging:
        write_checkpoint(checkpoint, staging, lambda key, tensor: moved_by(element, key, tensor, checkpoint))
    assert any(not torch.equal(tensor, checkpoint[key]) for key, tensor in open_checkpoint(target).items())
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def seeded(make: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args, **kwargs).eval()


def put(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


# --- sentence-transformers --------------------------------------------------------------------------------------------


def sentence_folder(folder: Path, *, own_folder: bool = False, **pooling: Any) -> Path:
    """A folder as sentence-transformers writes it: a BERT, pooling, a dense layer and a normalisation."""
    first = folder / "0_Transformer" if own_folder else folder
    seeded(transformers.BertModel, transformers.BertConfig(**BERT)).save_pretrained(first)
    package = "sentence_transformers.models"
    paths = {"Transformer": first.name if own_folder else "", "Pooling": "1_Pooling", "Dense": "2_Dense"}
    paths["Normalize"] = "3_Normalize"
    listed = [
        {"idx": at, "name": str(at), "path": path, "type": f"{package}.{kind}"}
        for at, (kind, path) in enumerate(paths.items())
    ]
    put(folder / "modules.json", listed)
    put(first / "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": False})
    put(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 16, **(pooling or {"pooling_mode": "mean"})})
    settings = {"in_features": 16, "out_features": 6, "bias": True}
    put(folder / "2_Dense" / "config.json", {**settings, "activation_function": "torch.nn.modules.activation.Tanh"})
    generator = torch.Generator().manual_seed(1)
    dense = {"linear.weight": torch.randn(6, 16, generator=generator), "linear.bias": torch.zeros(6)}
    save_file(dense, folder / "2_Dense" / "model.safetensors")
    return folder


@pytest.mark.parametrize("own_folder", [False, True], ids=["at the root", "in its own folder"])
def test_a_sentence_pipeline_is_one_model(tmp_path: Path, own_folder: bool) -> None:
    a = sentence_folder(tmp_path / "a", own_folder=own_folder)
    spec = spec_of(f"hf:{a}")
    stream = spec.axes["0.embeddings.word_embeddings.weight"][1]
    assert spec.axes["2.linear.weight"][1] == stream == spec.axes["0.pooler.dense.weight"][1]
    assert isinstance(spec.axes["2.linear.bias"][0], Fixed)
    b = scrambled(a, tmp_path / "b")
    said = run("align", a, b, "-o", tmp_path / "out").stderr
    assert "computes the same after renumbering" in said
    assert contents(tmp_path / "out") == contents(a)


def test_a_merge_of_sentence_pipelines_has_every_module(tmp_path: Path) -> None:
    a = sentence_folder(tmp_path / "a")
    b = scrambled(a, tmp_path / "b")
    run("merge", a, b, "-o", tmp_path / "out", "--no-check")
    for name in ("model.safetensors", "2_Dense/model.safetensors"):
        for key, tensor in load_file(a / name).items():
            torch.testing.assert_close(load_file(tmp_path / "out" / name)[key], tensor)
    assert run("verify", a, "--checkpoint", b).exit_code == 0


def test_modules_that_are_not_known_are_refused(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "a")
    listed = json.loads((folder / "modules.json").read_text())
    put(folder / "modules.json", [*listed, {"idx": 4, "name": "4", "path": "4", "type": "my.code.Adapter"}])
    assert "is a Adapter of my.code" in refused("spec", folder)
    put(folder / "modules.json", [*listed[:1], {**listed[1], "path": "../elsewhere"}])
    assert "may name only folders in its own" in refused("spec", folder)
    with pytest.raises(CheckpointError, match="may name only folders in its own"):
        open_checkpoint(folder)
    put(folder / "modules.json", {"modules": listed})
    assert "it must list modules" in refused("align", folder, folder, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    put(folder / "modules.json", listed)
    put(folder / "2_Dense" / "config.json", {"in_features": 16, "out_features": 6, "activation_function": "os.system"})
    assert "os.system, which is none of torch.nn" in refused("spec", folder)
    put(folder / "1_Pooling" / "config.json", {"pooling_mode": "middle"})
    assert "'middle', which is not known" in refused("spec", folder)


def test_ways_to_pool() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    first, second = x[0], x[1]
    expected: Mapping[str, list[torch.Tensor]] = {
        "cls": [first[0], second[1]],
        "lasttoken": [first[1], second[2]],
        "max": [first[1], second[2]],
        "mean": [(first[0] + first[1]) / 2, (second[1] + second[2]) / 2],
        "mean_sqrt_len_tokens": [(first[0] + first[1]) / 2**0.5, (second[1] + second[2]) / 2**0.5],
        "weightedmean": [(first[0] + 2 * first[1]) / 3, (second[1] + 2 * second[2]) / 3],
    }
    assert set(expected) == set(NAMED_MODES.values())
    for mode, rows in expected.items():
        torch.testing.assert_close(Pooling((mode,))(x, mask), torch.stack(rows))
    assert Pooling(("mean", "max"))(x, mask).shape == (2, 8)


def test_the_library_opens_what_is_written_and_computes_the_same(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    a = sentence_folder(tmp_path / "a", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(18))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(a)
    b = scrambled(a, tmp_path / "b")
    run("align", a, b, "-o", tmp_path / "out", "--no-check")
    texts = ["w1 w2 w3", "w4"]
    embedded = [library.SentenceTransformer(str(f), device="cpu").encode(texts) for f in (a, b, tmp_path / "out")]
    torch.testing.assert_close(torch.tensor(embedded[1]), torch.tensor(embedded[0]))
    assert (embedded[2] == embedded[0]).all()
    model = build(f"hf:{b}", device=None)
    model.load_state_dict(dict(open_checkpoint(b)))
    given = transformers.AutoTokenizer.from_pretrained(a)(texts, padding=True, return_tensors="pt")
    torch.testing.assert_close(model(given["input_ids"], given["attention_mask"]), torch.tensor(embedded[1]))


# --- timm and open_clip -----------------------------------------------------------------------------------------------


def timm_folder(folder: Path) -> Path:
    timm = pytest.importorskip("timm")
    model = seeded(timm.create_model, "resnet10t", num_classes=3)
    put(folder / "config.json", {"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": {"num_classes": 3}})
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def test_a_folder_of_timm_and_the_file_in_it_say_their_architecture(tmp_path: Path) -> None:
    a = timm_folder(tmp_path / "a")
    b = scrambled(a, tmp_path / "b")
    run("align", a, b, "-o", tmp_path / "out", "--no-check")
    assert contents(tmp_path / "out") == contents(a)
    file = tmp_path / "out.safetensors"
    run("align", a / "model.safetensors", b / "model.safetensors", "-o", file, "--no-check")
    assert file.read_bytes() == (a / "model.safetensors").read_bytes()
    put(a / "config.json", {"architecture": "resnet10x"})
    assert "its architecture is 'resnet10x', which timm" in refused("spec", a)


def test_a_training_checkpoint_of_timm_names_its_architecture(tmp_path: Path) -> None:
    state = load_file(timm_folder(tmp_path / "a") / "model.safetensors")
    spec = spec_of("timm:resnet10t(num_classes=3)")
    arguments = argparse.Namespace(model="resnet10t", num_classes=3)
    for name, tensors in (("a.pth.tar", state), ("b.pth.tar", spec.random(1).apply(state))):
        kept = {"epoch": 3, "arch": "resnet10t", "version": 2, "args": arguments}
        torch.save({**kept, "state_dict": dict(tensors)}, tmp_path / name)
    out = tmp_path / "out.tar"
    run("align", tmp_path / "a.pth.tar", tmp_path / "b.pth.tar", "-o", out, "--no-check")
    with torch.serialization.safe_globals([argparse.Namespace]):
        written = torch.load(out)["state_dict"]
    assert all(torch.equal(written[key], tensor) for key, tensor in state.items())
    torch.save({"arch": "resnet10t", "state_dict": state}, tmp_path / "c.pth.tar")  # as other scripts write it
    assert "say --model" in refused("align", tmp_path / "c.pth.tar", tmp_path / "b.pth.tar", "-o", tmp_path / "d.tar")


def test_a_folder_of_open_clip_is_aligned_in_both_towers(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
        "text_cfg": {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
    }
    a = tmp_path / "a"
    put(a / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": {}})
    state = seeded(open_clip.CLIP, **config).state_dict()
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, a / "open_clip_model.safetensors")
    spec = spec_of(f"hf:{a}")
    assert not spec.unused and "visual.transformer.resblocks.0.mlp.c_fc" in spec.groups
    assert "transformer.resblocks.0.mlp.c_fc" in spec.groups
    b = scrambled(a, tmp_path / "b")
    run("align", a, b, "-o", tmp_path / "out", "--no-check")
    assert contents(tmp_path / "out") == contents(a)
    put(a / "open_clip_config.json", {"model_cfg": {**config, "text_cfg": {"hf_model_name": "roberta-base"}}})
    assert "which is not in the folder" in refused("spec", a)


# --- diffusers --------------------------------------------------------------------------------------------------------


def pipeline(folder: Path) -> Path:
    """A pipeline with two networks and a scheduler, in the layout that diffusers writes."""
    diffusers = pytest.importorskip("diffusers")
    seeded(diffusers.UNet2DModel, **UNET).save_pretrained(folder / "unet")
    seeded(diffusers.AutoencoderKL, **VAE).save_pretrained(folder / "vae")
    diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
    listed = {"unet": ["diffusers", "UNet2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    listed |= {"scheduler": ["diffusers", "DDPMScheduler"], "safety_checker": [None, None]}
    put(folder / "model_index.json", {"_class_name": "Pipeline", **listed})
    return folder


@pytest.mark.parametrize("named", ["UNet2DModel", "UNet2DConditionModel", "AutoencoderKL"])
def test_a_model_of_diffusers_is_brought_back(tmp_path: Path, named: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    settings = {"UNet2DModel": UNET, "UNet2DConditionModel": CONDITIONED, "AutoencoderKL": VAE}[named]
    seeded(getattr(diffusers, named), **settings).save_pretrained(tmp_path / "a")
    b = scrambled(tmp_path / "a", tmp_path / "b")
    run("align", tmp_path / "a", b, "-o", tmp_path / "out", "--no-check")
    assert contents(tmp_path / "out") == contents(tmp_path / "a")


def test_the_latents_of_an_autoencoder_stay_in_place(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    settings = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "latent_channels": 4}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    seeded(diffusers.AutoencoderTiny, **settings, **blocks).save_pretrained(tmp_path / "a")
    spec = spec_of(f"hf:{tmp_path / 'a'}")
    ends = [name for name, shape in spec.shapes.items() if name.startswith("encoder") and shape == (4, 8, 3, 3)]
    begins = [name for name, shape in spec.shapes.items() if name.startswith("decoder") and shape == (8, 4, 3, 3)]
    assert len(ends) == len(begins) == 1
    assert spec.axes[ends[0]][0] == spec.axes[begins[0]][1] == Fixed(4)


def test_components_of_a_pipeline_are_aligned_together_or_by_name(tmp_path: Path) -> None:
    a = pipeline(tmp_path / "a")
    b = scrambled(a, tmp_path / "b")
    run("align", a, b, "-o", tmp_path / "out", "--no-check")
    assert contents(tmp_path / "out") == contents(a)
    run("align", a, b, "-o", tmp_path / "one", "--component", "unet", "--no-check")
    written, before, wanted = contents(tmp_path / "one"), contents(b), contents(a)
    weights = "diffusion_pytorch_model.safetensors"
    assert written == {**before, f"unet/{weights}": wanted[f"unet/{weights}"]} != wanted
    assert "no component scheduler: those with weights" in refused(
        "align", a, b, "-o", tmp_path / "no", "--component", "scheduler"
    )
    assert not (tmp_path / "no").exists()


def test_only_pipelines_have_components(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "a")
    assert "only these have components" in refused("align", folder, folder, "-o", tmp_path / "o", "--component", "unet")
    with pytest.raises(CaptureError, match="no component 'unet'"):
        build(f"hf:{folder}#unet")


def in_original_keys(name: str) -> str:
    """The key that latent diffusion's own code has for a parameter of a `UNet2DConditionModel` of two levels."""
    places = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op", "down_blocks.1.resnets.0": "input_blocks.3.0",
        "down_blocks.1.attentions.0": "input_blocks.3.1", "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.resnets.1": "output_blocks.1.0", "up_blocks.0.attentions.1": "output_blocks.1.1",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv", "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
    }  # fmt: skip
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
    inner |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    (start,) = (place for place in places if name.startswith(place + "."))
    rest = name.removeprefix(start)
    for new, old in inner.items() if "resnets" in start else ():
        rest = rest.replace(f".{new}.", f".{old}.")
    return f"model.diffusion_model.{places[start]}{rest}"


def test_a_single_file_in_original_keys_is_aligned_in_these(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = seeded(diffusers.UNet2DConditionModel, **CONDITIONED)
    model.save_config(tmp_path / "unet")
    state = model.state_dict()
    moved = spec_of(f"hf:{tmp_path / 'unet'}").random(1, every_group=True).apply(state)
    beside = {"first_stage_model.quant_conv.weight": torch.ones(2, 2)}
    for name, tensors in (("a", state), ("b", moved)):
        keys = {in_original_keys(key): tensor.contiguous() for key, tensor in tensors.items()}
        save_file({**keys, **beside}, tmp_path / f"{name}.safetensors")
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    out = tmp_path / "out.safetensors"
    run("align", *files, "-m", tmp_path / "unet", "-o", out, "--no-check")
    written, wanted = load_file(out), load_file(files[0])
    assert written.keys() == wanted.keys() and all(torch.equal(written[key], wanted[key]) for key in wanted)
    assert "say --model" in refused("align", *files, "-o", tmp_path / "no.safetensors")
    save_file({**wanted, "model_ema.decay": torch.ones(3)}, files[1])
    assert "averages of its weights" in refused(
        "align", *files, "-m", tmp_path / "unet", "-o", tmp_path / "no.safetensors"
    )
