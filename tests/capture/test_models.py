"""Models of the libraries that people use, built small and without weights, captured without inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from permgraph.capture import Captured, capture


def targets(captured: Captured) -> set[str]:
    return {str(node.target) for node in captured.graph.nodes if node.op == "call_function"}


FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "bert": {},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_decoder_layers": 2},
    "vit": {"image_size": 32, "patch_size": 8},
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 2},
    "clip": {},
    "whisper": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "max_source_positions": 50,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "num_mel_bins": 16,
        "pad_token_id": 0,
    },
    "mamba": {"state_size": 4},
}
COMMON = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_layers": 2}


def tiny(kind: str, **more: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **{**COMMON, "vocab_size": 97, **FAMILY[kind], **more})
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModel.from_config(config)
    return model


@pytest.mark.parametrize("kind", sorted(FAMILY))
def test_hugging_face_models_need_no_inputs(kind: str):
    model = tiny(kind)
    before = {name: vars(module.config).copy() for name, module in model.named_modules() if hasattr(module, "config")}
    captured = capture(model)
    assert captured.mode == "fake"
    assert captured.inputs.finder == "huggingface"
    assert not any("scaled_dot_product" in name or "grouped_mm" in name for name in targets(captured))
    assert [name for name in captured.unused if "pooler" not in name] == []
    after = {name: vars(module.config).copy() for name, module in model.named_modules() if hasattr(module, "config")}
    assert before == after
    assert all(p.is_meta for p in model.parameters())


def test_attention_is_transparent_whatever_the_config_says():
    expected = targets(capture(tiny("llama", attn_implementation="eager")))
    assert targets(capture(tiny("llama", attn_implementation="sdpa"))) == expected
    assert any("softmax" in name for name in expected)


def test_tied_embeddings_have_both_names():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, n_head=4, n_layer=1, n_positions=64, vocab_size=97)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    model.tie_weights()
    captured = capture(model)
    names = [node.meta["names"] for node in captured.placeholders("parameter")]
    assert ("transformer.wte.weight", "lm_head.weight") in names


def test_source_lines_of_a_library_are_relative():
    captured = capture(tiny("bert"))
    sources = {node.meta["source"] for node in captured.graph.nodes if node.meta["source"]}
    assert any(source.startswith("transformers/models/bert/modeling_bert.py:") for source in sources)
    assert not any(source.startswith("/") for source in sources)
    modules = {node.meta["module"] for node in captured.graph.nodes}
    assert "encoder.layer.1.attention.self.query" in modules


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v3_small", "vit_b_16", "swin_t"])
def test_torchvision_models(name: str):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = models.get_model(name, weights=None)
    captured = capture(model)
    assert captured.mode == "fake"
    assert all(name.endswith("num_batches_tracked") for name in captured.unused)
    assert not any("fast" in target or "scaled_dot_product" in target for target in targets(captured))


@pytest.mark.parametrize("size", [None, 96])
def test_timm_models_take_the_size_that_they_were_built_for(size: int | None):
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=2, **({} if size is None else {"img_size": size}))
    captured = capture(model)
    assert captured.inputs.finder == "timm"
    assert tuple(captured.inputs.args[0].shape) == (2, 3, size or 224, size or 224)
    assert not any("scaled_dot_product" in target for target in targets(captured))
    assert captured.unused == ()
