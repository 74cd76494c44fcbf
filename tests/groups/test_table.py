"""The group of well-known architectures against closed forms that are derived by hand, and the proof of each.

Every row gives a small model and the natural logarithm of the order that its group should have, with the reasoning in
a comment. ``s(n)`` is ``log n!``, the symmetric group of n; ``heads(H, D)`` is multi-head attention,
``H! (D!)^H (D!)^H``: the heads, and within each the channels of query-key and those of value-output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import permgraph as pg


def s(n: int) -> float:
    return math.lgamma(n + 1)


def heads(count: int, size: int) -> float:
    return s(count) + 2 * count * s(size)


def few_keys(keys: int, each: int, size: int, free: int = 0) -> float:
    """Grouped-query attention with rotary embedding: `free` query-key channels of each head do not turn."""
    return s(keys) + keys * s(each) + keys * s(size) + keys * s(free)


ROWS: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...] | None, float]]] = {}


def row(function: Callable[[], tuple[nn.Module, tuple[Any, ...] | None, float]]) -> Callable[..., Any]:
    ROWS[function.__name__] = function
    return function


def check(model: nn.Module, inputs: tuple[Any, ...] | None, expected: float) -> None:
    model = model.eval()
    spec = pg.auto_spec(model, inputs)
    assert not spec.unknown_ops
    assert spec.log_order() == pytest.approx(expected, abs=1e-6), f"\n{spec}"
    proof = pg.verify(model, spec, inputs)
    assert proof.passed, str(proof)


# -- multilayer perceptrons, convolutions ------------------------------------------------------------------------------


@row
def mlp() -> Any:
    model = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2))
    return model, None, s(7) + s(5)


@row
def depthwise_separable() -> Any:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1))
    return model, (torch.randn(2, 3, 6, 6),), s(8)  # one filter for each channel: one group


@row
def grouped_convolution() -> Any:
    # g = 3 groups of 2 in and 4 out: the groups move on both sides, the channels within each by themselves
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, groups=3), nn.Conv2d(12, 2, 1))
    return model, (torch.randn(2, 3, 6, 6),), s(3) + 3 * s(2) + 3 * s(4)


@row
def group_norm() -> Any:
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12), nn.Conv2d(12, 2, 1))
    return model, (torch.randn(2, 3, 6, 6),), s(3) + 3 * s(4)


@row
def resnext50() -> Any:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnext50_32x4d(num_classes=5)
    expected = s(64)  # the stem
    for stage, (blocks, width) in enumerate(((3, 4), (4, 8), (6, 16), (3, 32))):
        expected += s(256 << stage)  # the residual stream
        expected += blocks * (s(32) + 2 * 32 * s(width))  # 32 groups, filters in and out of each
    return model, (torch.randn(1, 3, 32, 32),), expected


@row
def regnet_y_400mf() -> Any:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.regnet_y_400mf(num_classes=5)
    expected, before = s(32), 32  # the stem
    for blocks, width in ((1, 48), (3, 104), (6, 208), (6, 440)):
        expected += s(width)
        for _ in range(blocks):
            groups = width // 8
            expected += s(groups) + 2 * groups * s(8) + s(before // 4)  # grouped filters; squeeze and excitation
            before = width
    return model, (torch.randn(1, 3, 64, 64),), expected


# -- recurrence --------------------------------------------------------------------------------------------------------


class First(nn.Module):
    """A recurrent module between two linear maps, of which only the sequence of states is used."""

    def __init__(self, core: nn.Module, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 5)
        self.core = core
        self.head = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.core(self.embed(x))[0])


class Unrolled(nn.Module):
    """A recurrent cell, called in a loop."""

    def __init__(self, cell: nn.Module, width: int) -> None:
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for step in x:
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


RECURRENT = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_layer(kind: str, layers: int, directions: int) -> None:
    core = RECURRENT[kind](5, 7, layers, batch_first=True, bidirectional=directions == 2)
    check(First(core, 7 * directions), (torch.randn(2, 3, 3),), s(5) + layers * directions * s(7))  # and the embedding


@pytest.mark.parametrize("bias", [True, False])
def test_projected_lstm(bias: bool) -> None:
    core = nn.LSTM(5, 7, 2, proj_size=4, bidirectional=True, bias=bias)
    check(First(core, 8), (torch.randn(3, 2, 3),), s(5) + 4 * (s(7) + s(4)))  # cells, and their projection


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cell(cell: type[nn.Module]) -> None:
    check(Unrolled(cell(3, 7), 7), (torch.randn(4, 2, 3),), s(7))  # type: ignore[call-arg]


def test_states_that_the_model_returns_stay_put() -> None:
    assert pg.auto_spec(nn.LSTM(3, 7), (torch.randn(4, 2, 3),)).log_order() == 0


# -- parametrised weights ----------------------------------------------------------------------------------------------


def _three_layers(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(wrap(nn.Linear(3, 7)), nn.ReLU(), wrap(nn.Linear(7, 5)), nn.ReLU(), nn.Linear(5, 2))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.weight_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.spectral_norm,
    ],
)
def test_parametrised_weight(wrap: Callable[[nn.Module], nn.Module]) -> None:
    check(_three_layers(wrap), None, s(7) + s(5))


class LowRank(nn.Module):
    """A linear map with a low-rank adapter beside it."""

    def __init__(self, ins: int, outs: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(ins, outs)
        self.a = nn.Linear(ins, rank, bias=False)
        self.b = nn.Linear(rank, outs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 0.5 * self.b(self.a(x))


@row
def low_rank_adapters() -> Any:
    return nn.Sequential(LowRank(3, 7, 4), nn.ReLU(), LowRank(7, 2, 3)), None, s(7) + s(4) + s(3)


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.weight.T) @ self.weight


@row
def tied_and_transposed() -> Any:
    return Tied(), (torch.randn(2, 3),), s(7)


# -- attention ---------------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@row
def multihead_attention() -> Any:
    return SelfAttention(), (torch.randn(2, 5, 24),), heads(4, 6)


@row
def multihead_attention_with_biased_keys() -> Any:
    return SelfAttention(add_bias_kv=True, add_zero_attn=True), (torch.randn(2, 5, 24),), heads(4, 6)


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 4, kdim=7, vdim=9, batch_first=True)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.attention(q, k, v, need_weights=False)[0]


@row
def multihead_attention_between_widths() -> Any:
    return CrossAttention(), (torch.randn(2, 5, 24), torch.randn(2, 3, 7), torch.randn(2, 3, 9)), heads(4, 6)


@row
def transformer_encoder_layer() -> Any:
    model = nn.TransformerEncoderLayer(24, 4, 11, batch_first=True)
    return model, (torch.randn(2, 5, 24),), heads(4, 6) + s(11)  # the stream is input and output


@row
def transformer() -> Any:
    model = nn.Transformer(24, 4, 2, 2, 11, batch_first=True)
    inputs = torch.randn(2, 5, 24), torch.randn(2, 3, 24)
    return model, inputs, 2 * (heads(4, 6) + s(11)) + 2 * (2 * heads(4, 6) + s(11))  # decoders attend twice


@row
def torchvision_vit() -> Any:
    model = pytest.importorskip("torchvision.models").VisionTransformer(32, 8, 2, 4, 24, 11, num_classes=5)
    return model, (torch.randn(2, 3, 32, 32),), s(24) + 2 * (heads(4, 6) + s(11))


def _swin(block: Any) -> Any:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    two = block == "v2"
    model = swin.SwinTransformer(
        [4, 4], 12, [2, 2], [2, 4], [4, 4], num_classes=5, **(dict(block=swin.SwinTransformerBlockV2) if two else {}),
        downsample_layer=swin.PatchMergingV2 if two else swin.PatchMerging,
    )  # fmt: skip
    # each stage a stream, and in each block heads (a relative bias for each) and a hidden layer of four times the width
    expected = s(12) + 2 * (heads(2, 6) + s(48)) + s(24) + 2 * (heads(4, 6) + s(96))
    # version 2 computes the bias by a small network in each block: its 512 hidden units, and the two coordinates of the
    # table (a buffer) that is its input
    return model, (torch.randn(1, 3, 64, 64),), expected + (4 * (s(512) + s(2)) if two else 0)


@row
def torchvision_swin() -> Any:
    return _swin("v1")


@row
def torchvision_swin_v2() -> Any:
    return _swin("v2")


# -- language models ---------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=11, vocab_size=37,
    max_position_embeddings=64,
)  # fmt: skip


def _from(config: str, model: str, **kwargs: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**kwargs))
    return made


@row
def gpt2() -> Any:
    model = _from(
        "GPT2Config", "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, vocab_size=37, n_positions=64, n_inner=11
    )
    return model, None, s(32) + 2 * (heads(4, 8) + s(11))


@row
def llama() -> Any:
    model = _from("LlamaConfig", "LlamaForCausalLM", **SMALL, num_key_value_heads=2)
    return model, None, s(32) + 2 * (few_keys(2, 2, 8) + s(11))  # each query-key channel has its own frequency


@row
def qwen3() -> Any:
    model = _from("Qwen3Config", "Qwen3ForCausalLM", **SMALL, num_key_value_heads=2, head_dim=6)
    return model, None, s(32) + 2 * (few_keys(2, 2, 6) + s(11))


@row
def gpt_neox() -> Any:
    model = _from("GPTNeoXConfig", "GPTNeoXForCausalLM", **SMALL)  # a quarter of the channels turn
    return model, None, s(32) + 2 * (few_keys(4, 1, 8, free=6) + s(11))


@row
def phi() -> Any:
    model = _from("PhiConfig", "PhiForCausalLM", **SMALL)  # half of the channels turn
    return model, None, s(32) + 2 * (few_keys(4, 1, 8, free=4) + s(11))


@row
def bloom() -> Any:
    model = _from("BloomConfig", "BloomForCausalLM", hidden_size=32, n_layer=2, n_head=4, vocab_size=37)
    return model, None, s(32) + 2 * (2 * 4 * s(8) + s(128))  # each head has a slope of its own


@row
def falcon_rotary() -> Any:
    config = dict(SMALL, ffn_hidden_size=11, num_kv_heads=2, new_decoder_architecture=True)
    model = _from("FalconConfig", "FalconForCausalLM", **config)
    return model, None, s(32) + 2 * (few_keys(2, 2, 8) + s(11))


@row
def falcon_one_key_head() -> Any:
    model = _from("FalconConfig", "FalconForCausalLM", **SMALL, ffn_hidden_size=11, multi_query=True)
    return model, None, s(32) + 2 * (few_keys(1, 4, 8) + s(11))


@row
def falcon_alibi() -> Any:
    config = dict(SMALL, ffn_hidden_size=11, multi_query=False, alibi=True)
    model = _from("FalconConfig", "FalconForCausalLM", **config)
    return model, None, s(32) + 2 * (2 * 4 * s(8) + s(11))


@row
def opt() -> Any:
    config = dict(SMALL, ffn_dim=11, word_embed_proj_dim=32)
    model = _from("OPTConfig", "OPTForCausalLM", **config)
    return model, None, s(32) + 2 * (heads(4, 8) + s(11))


@row
def bert() -> Any:
    model = _from("BertConfig", "BertForMaskedLM", **SMALL)
    # the head is tied to the embedding, so what its transform makes belongs to the residual stream
    return model, None, s(32) + 2 * (heads(4, 8) + s(11))


@row
def t5() -> Any:
    config = dict(d_model=32, d_kv=6, d_ff=11, num_layers=2, num_heads=4, vocab_size=37)
    model = _from("T5Config", "T5ForConditionalGeneration", **config)
    # One stream, for the embedding is shared; what the encoder leaves of it is a by-product. Layers share a table of
    # relative biases, and so one axis of heads in the encoder and one in the decoder's self-attention; cross-attention
    # has none.
    itself = s(4) + 2 * 2 * 4 * s(6)
    return model, None, s(32) + 2 * itself + 2 * heads(4, 6) + 4 * s(11)


@row
def bart() -> Any:
    model = _from(
        "BartConfig", "BartForConditionalGeneration", d_model=32, encoder_layers=2, decoder_layers=2, vocab_size=37,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=11, decoder_ffn_dim=13,
        max_position_embeddings=40,
    )  # fmt: skip
    # One stream, for both embeddings and the head are one table; decoders attend twice.
    return model, None, s(32) + 2 * (heads(4, 8) + s(11)) + 2 * (2 * heads(4, 8) + s(13))


@row
def whisper() -> Any:
    model = _from(
        "WhisperConfig", "WhisperForConditionalGeneration", d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=11, decoder_ffn_dim=11, vocab_size=37,
        max_source_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    # the first of two convolutions; the streams of encoder and decoder; decoders attend twice
    return model, None, 3 * s(32) + 2 * (heads(4, 8) + s(11)) + 2 * (2 * heads(4, 8) + s(11))


@row
def clip() -> Any:
    text = dict(SMALL, eos_token_id=2, bos_token_id=0, pad_token_id=1)
    vision = dict(
        hidden_size=24, intermediate_size=13, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    model = _from("CLIPConfig", "CLIPModel", text_config=text, vision_config=vision, projection_dim=16)
    # The projections, which people store, stay put; the towers' streams are by-products, from which they are computed.
    return model, None, s(32) + 2 * (heads(4, 8) + s(11)) + s(24) + 2 * (heads(4, 6) + s(13))


@row
def mixtral() -> Any:
    config = dict(SMALL, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2)
    model = _from("MixtralConfig", "MixtralForCausalLM", **config)
    return model, None, s(32) + 2 * (few_keys(2, 2, 8) + s(3) + 3 * s(11))  # experts, and the units within each


@row
def qwen3_moe() -> Any:
    config = dict(
        SMALL, num_key_value_heads=2, head_dim=6, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=7
    )
    model = _from("Qwen3MoeConfig", "Qwen3MoeForCausalLM", **config)
    return model, None, s(32) + 2 * (few_keys(2, 2, 6) + s(5) + 5 * s(7))


@row
def deepseek_v3() -> Any:
    config = dict(
        SMALL, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
        moe_intermediate_size=7, q_lora_rank=10, kv_lora_rank=9, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=5,
        first_k_dense_replace=1,
    )  # fmt: skip
    model = _from("DeepseekV3Config", "DeepseekV3ForCausalLM", **config)
    # latent queries and keys; heads with channels that do not turn, and those of the values
    attention = s(10) + s(9) + s(4) + 4 * s(6) + 4 * s(5)
    # one dense layer; then 2 groups of 4 experts with 7 units each, and a shared expert of 7
    return model, None, s(32) + 2 * attention + s(11) + s(2) + 2 * s(4) + 8 * s(7) + s(7)


@row
def gpt_oss() -> Any:
    config = dict(SMALL, num_key_value_heads=2, head_dim=6, num_local_experts=3, num_experts_per_tok=2)
    model = _from("GptOssConfig", "GptOssForCausalLM", **config)
    return model, None, s(32) + 2 * (few_keys(2, 2, 6) + s(3) + 3 * s(11))  # each query head has its own sink


@row
def mamba() -> Any:
    model = _from("MambaConfig", "MambaForCausalLM", hidden_size=32, num_hidden_layers=2, vocab_size=37, state_size=5)
    return model, None, s(32) + 2 * (s(64) + s(2) + s(5))  # channels, the low rank of the time step, states


@row
def mamba2() -> Any:
    model = _from(
        "Mamba2Config", "Mamba2ForCausalLM", hidden_size=32, num_hidden_layers=2, vocab_size=37, state_size=5,
        num_heads=8, head_dim=8, n_groups=2, chunk_size=4,
    )  # fmt: skip
    # 2 groups of 4 heads; the channels of each head; the states of each group
    return model, None, s(32) + 2 * (s(2) + 2 * s(4) + 8 * s(8) + 2 * s(5))


@row
def deberta() -> Any:
    model = _from(
        "DebertaV2Config", "DebertaV2ForMaskedLM", **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"]
    )
    # the table of relative positions has channels of its own, projected to the queries' and keys' in each layer
    return model, None, 2 * s(32) + 2 * (heads(4, 8) + s(11))


# -- image classifiers of full size, on the meta device ----------------------------------------------------------------


def _convolutions(model: nn.Module) -> float:
    return sum(s(m.out_channels) for m in model.modules() if isinstance(m, nn.Conv2d))


def _resnet(blocks: tuple[int, ...], expansion: int) -> float:
    widths = (64, 128, 256, 512)
    streams = sum(s(width * expansion) for width in widths) + (s(64) if expansion > 1 else 0)  # and the stem's
    inner = 2 if expansion > 1 else 1  # convolutions inside a block
    return streams + sum(n * inner * s(width) for n, width in zip(blocks, widths, strict=True))


def _inverted_residuals(stages: list[tuple[int, int, int]], stem: int, last: int, squeeze: bool = False) -> float:
    """Stages (expansion, width, blocks): each a stream; in each block the expanded width, and what squeezes it."""
    total, before = s(stem) + s(last), stem
    for expansion, width, blocks in stages:
        total += s(width)
        for _ in range(blocks):
            total += s(before * expansion) if expansion > 1 else 0  # without expansion it is the stream itself
            total += s(max(1, before // 4)) if squeeze else 0
            before = width
    return total


def _densenet(layers: tuple[int, ...]) -> float:
    total, width = s(64), 64
    for i, count in enumerate(layers):
        total += count * (s(128) + s(32))  # a bottleneck, and what each layer adds
        width = (width + 32 * count) // (2 if i < len(layers) - 1 else 1)
        total += s(width) if i < len(layers) - 1 else 0  # the transition
    return total


def _convnext(blocks: tuple[int, ...]) -> float:
    return sum(s(w) + n * s(4 * w) for n, w in zip(blocks, (96, 192, 384, 768), strict=True))


MOBILENET = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]
EFFICIENT = [(1, 16, 1), (6, 24, 2), (6, 40, 2), (6, 80, 3), (6, 112, 3), (6, 192, 4), (6, 320, 1)]
# half of 16, 24, 40, 80, 96, 192, 320 to the nearest multiple of 8; the stem as wide as the second
MNASNET = [(1, 8, 1), (3, 16, 3), (3, 24, 3), (6, 40, 3), (6, 48, 2), (6, 96, 4), (6, 160, 1)]

CLASSIFIERS: dict[str, Callable[[nn.Module], float]] = {
    "resnet18": lambda m: _resnet((2, 2, 2, 2), 1),
    "resnet50": lambda m: _resnet((3, 4, 6, 3), 4),
    "vgg16_bn": lambda m: _convolutions(m) + 2 * s(4096),
    "densenet121": lambda m: _densenet((6, 12, 24, 16)),
    "mobilenet_v2": lambda m: _inverted_residuals(MOBILENET, 32, 1280),
    "efficientnet_b0": lambda m: _inverted_residuals(EFFICIENT, 32, 1280, squeeze=True),
    "squeezenet1_0": lambda m: _convolutions(m) - s(1000),  # the last convolution makes the classes
    "googlenet": _convolutions,
    "inception_v3": _convolutions,
    "convnext_tiny": lambda m: _convnext((3, 3, 9, 3)),
    "mnasnet0_5": lambda m: _inverted_residuals(MNASNET, 16, 1280),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    more = dict(aux_logits=False, init_weights=False) if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(**more).eval()
    spec = pg.auto_spec(model)
    assert spec.log_order() == pytest.approx(CLASSIFIERS[name](model), rel=1e-12)
    assert name != "convnext_tiny" or len(spec.moving) == 22


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_group_is_the_closed_form_and_is_proven(name: str) -> None:
    check(*ROWS[name]())
