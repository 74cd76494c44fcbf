"""The dimension of the whole group of real architectures, against closed forms that were worked out by hand.

Each row has a formula over the sizes, and why it is so; the same formula holds for a small instance and, on the meta
device, for the published sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import permgraph as pg

Sizes = dict[str, Any]
Row = tuple[Callable[..., nn.Module], Callable[..., int], Sizes, Sizes]


def orthogonal(n: int) -> int:
    return n * (n - 1) // 2


def _hf(kind: str, head: str, **config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, kind + head)(getattr(transformers, kind + "Config")(**config))  # type: ignore[no-any-return]


ROWS: dict[str, Row] = {}


def row(small: Sizes, full: Sizes, dimension: Callable[..., int]) -> Callable[..., Any]:
    def keep(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        ROWS[build.__name__] = build, dimension, small, full
        return build

    return keep


# Any matrix for query and key, and for value and output, of each head. The table is tied to the head, behind the last
# gain, so the stream has signs alone; but the gains of the 2 norms of each layer are read by linear layers: one each.
@row(
    dict(d=24, layers=2, heads=4, vocabulary=31),
    dict(d=768, layers=12, heads=12, vocabulary=50257),
    lambda d, layers, heads, **_: layers * heads * 2 * (d // heads) ** 2 + 2 * layers * d,
)
def gpt2(d: int, layers: int, heads: int, vocabulary: int) -> nn.Module:
    ids = dict(bos_token_id=0, eos_token_id=0)
    return _hf("GPT2", "LMHeadModel", n_embd=d, n_layer=layers, n_head=heads, vocab_size=vocabulary, **ids)


def _llama(d: int, layers: int, heads: int, keys: int, each: int, inner: int, vocabulary: int, **more: Any) -> Sizes:
    return dict(
        hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=keys, head_dim=each,
        intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=False, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, **more,
    )  # fmt: skip


SMALL = dict(d=24, layers=2, heads=4, keys=2, each=8, inner=20, vocabulary=31)


# Rotations of the stream; of each key-value head any matrix on values, and a complex factor for each pair of its keys;
# a factor for each unit of the gated layer.
@row(
    SMALL,
    dict(d=4096, layers=32, heads=32, keys=8, each=128, inner=14336, vocabulary=128256),
    lambda d, layers, keys, each, inner, **_: orthogonal(d) + layers * (keys * (each**2 + each) + inner),
)
def llama3(**sizes: int) -> nn.Module:
    return _hf("Llama", "ForCausalLM", **_llama(**sizes))


# The same with more layers.
@row(
    SMALL | dict(layers=3),
    dict(d=8192, layers=80, heads=64, keys=8, each=128, inner=28672, vocabulary=128256),
    lambda d, layers, keys, each, inner, **_: orthogonal(d) + layers * (keys * (each**2 + each) + inner),
)
def llama3_70b(**sizes: int) -> nn.Module:
    return llama3(**sizes)


# The same, but behind norms whose gains all heads share: of each pair of channels the gains on queries can be scaled
# against those on keys.
@row(
    SMALL,
    dict(d=4096, layers=36, heads=32, keys=8, each=128, inner=12288, vocabulary=151936),
    lambda d, layers, keys, each, inner, **_: orthogonal(d) + layers * (keys * each**2 + each // 2 + inner),
)
def qwen3(**sizes: int) -> nn.Module:
    return _hf("Qwen3", "ForCausalLM", **_llama(**sizes))


# Norms on the branches, and gains of the form 1 + w, which no factor can be moved into: the stream has signs alone.
@row(
    SMALL,
    dict(d=2560, layers=34, heads=8, keys=4, each=256, inner=10240, vocabulary=262208),
    lambda layers, keys, each, inner, **_: layers * (keys * each**2 + inner),
)
def gemma3(**sizes: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**_llama(**sizes)))  # type: ignore[no-any-return]


# Norms on the branches alone: the last one of all is read by the head, which takes up its gain; the others' are added.
# Queries and keys have a gain for each channel of each head, so that each key head has factors for pairs of its own.
@row(
    SMALL | dict(each=6),
    dict(d=4096, layers=32, heads=32, keys=32, each=128, inner=11008, vocabulary=100352),
    lambda d, layers, keys, each, inner, **_: d + layers * (keys * (each**2 + each // 2) + inner),
)
def olmo2(**sizes: int) -> nn.Module:
    return _hf("Olmo2", "ForCausalLM", **_llama(**sizes))


# Post-norm: the stream has a common sign between each two norms, and the gain of the last norm is read by the pooler.
@row(
    dict(d=24, layers=2, heads=4, inner=20, vocabulary=31),
    dict(d=768, layers=12, heads=12, inner=3072, vocabulary=30522),
    lambda d, layers, heads, **_: layers * heads * 2 * (d // heads) ** 2 + d,
)
def bert(d: int, layers: int, heads: int, inner: int, vocabulary: int) -> nn.Module:
    return _hf(
        "Bert", "ForSequenceClassification", hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, vocab_size=vocabulary,
    )  # fmt: skip


# One stream, since encoder and decoder share a table; it is the head's too, behind the last gain: signs, and a factor
# for each other gain, of 2 norms in a layer of the encoder, 3 in one of the decoder and one between them. Attention of
# three kinds, and ReLU.
@row(
    dict(d=24, layers=2, heads=4, each=6, inner=20, vocabulary=31),
    dict(d=768, layers=12, heads=12, each=64, inner=3072, vocabulary=32128),
    lambda d, layers, heads, each, inner, **_: (
        3 * layers * heads * 2 * each**2 + 2 * layers * inner + (5 * layers + 1) * d
    ),
)
def t5(d: int, layers: int, heads: int, each: int, inner: int, vocabulary: int) -> nn.Module:
    return _hf(
        "T5", "ForConditionalGeneration", d_model=d, num_layers=layers, num_heads=heads, d_kv=each, d_ff=inner,
        vocab_size=vocabulary,
    )  # fmt: skip


# LayerNorm before each branch, and an untied head: rotations that leave the vector of ones in its place.
@row(
    dict(d=24, layers=2, heads=4, inner=20, image=32),
    dict(d=768, layers=12, heads=12, inner=3072, image=224),
    lambda d, layers, heads, **_: (d - 1) * (d - 2) // 2 + layers * heads * 2 * (d // heads) ** 2,
)
def vit(d: int, layers: int, heads: int, inner: int, image: int) -> nn.Module:
    return _hf(
        "ViT", "ForImageClassification", hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, image_size=image,
    )  # fmt: skip


# Of each block the gain of its norm and the scale of its layer; the norm before each change of size, and the last one.
@row(
    dict(depths=[1, 2], dims=[6, 10]),
    dict(depths=[3, 3, 9, 3], dims=[96, 192, 384, 768]),
    lambda depths, dims: 2 * sum(n * d for n, d in zip(depths, dims, strict=True)) + sum(dims),
)
def convnext(depths: list[int], dims: list[int]) -> nn.Module:
    stages = len(depths)
    return _hf("ConvNext", "ForImageClassification", depths=depths, hidden_sizes=dims, num_stages=stages)


# Positive factors through ReLU: of the stem, of the two inner layers of each block, and of each stage's stream.
@row(
    dict(blocks=[1, 1, 1, 1]),
    dict(blocks=[3, 4, 6, 3]),
    lambda blocks: 64 + sum(2 * n * w for n, w in zip(blocks, (64, 128, 256, 512), strict=True)) + 256 * 15,
)
def resnet50(blocks: list[int]) -> nn.Module:
    resnet = pytest.importorskip("torchvision").models.resnet
    return resnet.ResNet(resnet.Bottleneck, blocks)  # type: ignore[no-any-return]


# ReLU6 lets no scale pass; the bottlenecks between have a factor for each channel, in the gain of BatchNorm.
@row(
    dict(setting=[[1, 16, 1, 1], [6, 24, 2, 2]]),
    dict(setting=None),
    lambda setting: 16 + 24 + (0 if setting else 32 + 64 + 96 + 160 + 320),
)
def mobilenet_v2(setting: list[list[int]] | None) -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.MobileNetV2(inverted_residual_setting=setting)  # type: ignore[no-any-return]


# As Llama, with the gated units of each expert.
@row(
    SMALL | dict(experts=3),
    dict(d=4096, layers=32, heads=32, keys=8, each=128, inner=14336, vocabulary=32000, experts=8),
    lambda d, layers, keys, each, inner, experts, **_: (
        orthogonal(d) + layers * (keys * (each**2 + each) + experts * inner)
    ),
)
def mixtral(experts: int, **sizes: int) -> nn.Module:
    return _hf("Mixtral", "ForCausalLM", **_llama(**sizes, num_local_experts=experts))


# Between the two factors of each adapter any matrix.
@row(dict(n=10, rank=3), dict(n=4096, rank=16), lambda rank, **_: 2 * rank**2)
def lora(n: int, rank: int) -> nn.Module:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole, self.dropout = nn.Linear(n, n), nn.Dropout(0.1)
            self.a, self.b = nn.Linear(n, rank, bias=False), nn.Linear(rank, n, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.whole(x) + 2.0 * self.b(self.a(self.dropout(x)))

    return nn.Sequential(Adapted(), nn.GELU(), Adapted())


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0])  # type: ignore[no-any-return]


# The state is a gated sum of what tanh makes, and is read through tanh: a sign for each unit, unseen by the gates.
@row(dict(n=7), dict(n=1024), lambda n: 0)
def lstm(n: int) -> nn.Module:
    return Recurrent(nn.LSTM(3, n, batch_first=True), n)


# The same, whose output is projected: nothing but linear layers read it.
@row(dict(n=7, projected=3), dict(n=1024, projected=256), lambda projected, **_: projected**2)
def projected_lstm(n: int, projected: int) -> nn.Module:
    return Recurrent(nn.LSTM(3, n, batch_first=True, proj_size=projected), projected)


# As ViT, but of the decoder alone, whose table is tied to the head behind the last gain: signs, and a factor for each
# gain of the three norms of its layers. The encoder's stream begins with a GELU: no signs, but as many factors.
@row(
    dict(d=24, encoders=1, decoders=2, heads=4, inner=20, vocabulary=31),
    dict(d=768, encoders=12, decoders=12, heads=12, inner=3072, vocabulary=51865),
    lambda d, encoders, decoders, heads, **_: (
        (encoders + 2 * decoders) * heads * 2 * (d // heads) ** 2 + (3 * decoders + 2 * encoders + 1) * d
    ),
)
def whisper(d: int, encoders: int, decoders: int, heads: int, inner: int, vocabulary: int) -> nn.Module:
    ids = dict(pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0)
    return _hf(
        "Whisper", "ForConditionalGeneration", d_model=d, encoder_layers=encoders, decoder_layers=decoders,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=inner, decoder_ffn_dim=inner,
        vocab_size=vocabulary, **ids,
    )  # fmt: skip


# Queries, keys and values come from latents behind a norm: rotations of each latent. Pairs of the one rotary key, any
# matrix on the other channels of keys, and on values, of each head; the gated units of all experts.
@row(
    dict(d=24, layers=2, dense=1, heads=4, q=10, kv=9, rope=4, nope=6, value=5, inner=20, expert=7, experts=4, shared=1,
         vocabulary=31, groups=2, chosen=1),
    dict(d=7168, layers=61, dense=3, heads=128, q=1536, kv=512, rope=64, nope=128, value=128, inner=18432, expert=2048,
         experts=256, shared=1, vocabulary=129280, groups=8, chosen=4),
    lambda d, layers, dense, heads, q, kv, rope, nope, value, inner, expert, experts, shared, **_: (
        orthogonal(d)
        + layers * (orthogonal(q) + orthogonal(kv) + rope + heads * (nope**2 + value**2))
        + dense * inner + (layers - dense) * (experts + shared) * expert
    ),
)  # fmt: skip
def deepseek_v3(
    d: int, layers: int, dense: int, heads: int, q: int, kv: int, rope: int, nope: int, value: int, inner: int,
    expert: int, experts: int, shared: int, vocabulary: int, groups: int, chosen: int,
) -> nn.Module:  # fmt: skip
    return _hf(
        "DeepseekV3", "ForCausalLM", hidden_size=d, num_hidden_layers=layers, first_k_dense_replace=dense,
        num_attention_heads=heads, num_key_value_heads=heads, q_lora_rank=q, kv_lora_rank=kv, qk_rope_head_dim=rope,
        qk_nope_head_dim=nope, v_head_dim=value, intermediate_size=inner, moe_intermediate_size=expert,
        n_routed_experts=experts, n_shared_experts=shared, n_group=groups, topk_group=chosen, num_experts_per_tok=2,
        vocab_size=vocabulary, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


# The table is tied: signs, and the gain of each layer's norm. Of each layer a factor for each channel between its first
# layer and its depthwise convolution, one for each state between what writes it and what reads it, and any matrix
# between the two layers that make the time steps.
@row(
    dict(d=12, layers=2, inner=24, state=5, rank=3, vocabulary=31),
    dict(d=768, layers=24, inner=1536, state=16, rank=48, vocabulary=50280),
    lambda d, layers, inner, state, rank, **_: layers * (d + inner + state + rank**2),
)
def mamba(d: int, layers: int, inner: int, state: int, rank: int, vocabulary: int) -> nn.Module:
    return _hf(
        "Mamba", "ForCausalLM", hidden_size=d, num_hidden_layers=layers, expand=2, intermediate_size=inner,
        state_size=state, time_step_rank=rank, vocab_size=vocabulary,
    )  # fmt: skip


# The candidate is made by tanh, also of the state: a sign for each unit.
@row(dict(n=7), dict(n=1024), lambda n: 0)
def gru(n: int) -> nn.Module:
    return Recurrent(nn.GRU(3, n, batch_first=True), n)


# The norm before each change of size is over four neighbours that are joined, with a gain for each channel of each:
# that gain is in the way of rotations, and each of its four parts has factors, as has that of each other norm. The last
# stage has none, and is rotated.
@row(
    dict(d=12, depths=[1, 2, 1], heads=[2, 3, 4], image=64),
    dict(d=96, depths=[2, 2, 6, 2], heads=[3, 6, 12, 24], image=224),
    lambda d, depths, heads, **_: (
        sum((2 * n + 4) * d * 2**s for s, n in enumerate(depths[:-1]))
        + (d * 2 ** (len(depths) - 1) - 1) * (d * 2 ** (len(depths) - 1) - 2) // 2
        + sum(n * h * 2 * (d * 2**s // h) ** 2 for s, (n, h) in enumerate(zip(depths, heads, strict=True)))
    ),
)
def swin(d: int, depths: list[int], heads: list[int], image: int) -> nn.Module:
    models = pytest.importorskip("torchvision").models
    return models.SwinTransformer([4, 4], d, depths, heads, [4, 4] if image < 100 else [7, 7])  # type: ignore[no-any-return]


# Llama with two adapters in each layer.
@row(
    SMALL | dict(rank=3),
    dict(d=4096, layers=32, heads=32, keys=8, each=128, inner=14336, vocabulary=128256, rank=16),
    lambda d, layers, keys, each, inner, rank, **_: (
        orthogonal(d) + layers * (keys * (each**2 + each) + inner + 2 * rank**2)
    ),
)
def adapted_llama(rank: int, **sizes: int) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(llama3(**sizes), peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))  # type: ignore[no-any-return]


#: How many groups have which structure beyond permutations, for the rows that say so; by hand.
STRUCTURES: dict[str, Callable[..., dict[str, int]]] = {
    "gpt2": lambda layers, **_: {"GL": 2 * layers, f"M^{2 * layers}×S±": 1},
    "llama3": lambda layers, **_: {"O": 1, "T": layers, "GL": layers, "M": layers},
    "llama3_70b": lambda layers, **_: {"O": 1, "T": layers, "GL": layers, "M": layers},
    # A key head and its queries may change their signs together, which no complex factor of theirs does behind a norm.
    "qwen3": lambda layers, **_: {"O": 1, "R": layers, "B": layers, "GL": layers, "M": layers},
    "gemma3": lambda layers, **_: {"B": 1 + layers, "GL": layers, "M": layers},
    # So may the gains of a head and what they multiply: of queries, also of each head that shares keys, and of keys.
    # Of the latter two signs one is that of the factors of pairs.
    "olmo2": lambda layers, heads, keys, **_: (
        {f"M×B^{2 * layers + 1}": 1, "R": layers, "GL": layers, "M": layers}
        | ({"B": 2 * layers} if heads > keys else {"B^2": layers})
    ),
    "bert": lambda layers, **_: {f"M×S±^{2 * layers + 1}": 1, "GL": 2 * layers, "B": 1},
    "t5": lambda layers, **_: {"GL": 6 * layers, "P": 2 * layers, f"M^{5 * layers + 1}×B": 1},
    "whisper": lambda encoders, decoders, **_: (
        {"GL": 2 * encoders + 4 * decoders, f"M^{3 * decoders}×S±": 1, f"M^{2 * encoders + 1}": 1}
    ),
    "vit": lambda layers, **_: {"O1": 1, "GL": 2 * layers},
    "mixtral": lambda layers, **_: {"O": 1, "T": layers, "GL": layers, "M": layers},
    "deepseek_v3": lambda layers, dense, **_: (
        {"O": 1 + 2 * layers, "T2": layers, "GL": 2 * layers, "M": dense + 2 * (layers - dense)}
    ),
    "mamba": lambda layers, **_: {f"M^{layers}×B": 1, "M": 2 * layers, "GL": layers},
    "lora": lambda **_: {"GL": 2},
    "adapted_llama": lambda layers, **_: {"O": 1, "T": layers, "GL": 3 * layers, "M": layers},
    "lstm": lambda **_: {"B": 1},
    "projected_lstm": lambda **_: {"B": 1, "GL": 1},
    "gru": lambda **_: {"B": 1},
}


def _check(name: str, model: nn.Module, sizes: Sizes) -> None:
    spec = pg.auto_spec(model, symmetry="general")
    assert spec.dimension() == ROWS[name][1](**sizes), f"\n{spec}"
    if name in STRUCTURES:
        found = Counter(str(group.structure) for group in spec.groups.values() if not group.structure.is_plain)
        assert found == STRUCTURES[name](**sizes), f"\n{spec}"


@pytest.mark.parametrize("name", ROWS)
def test_small(name: str) -> None:
    build, _, small, _ = ROWS[name]
    torch.manual_seed(0)
    _check(name, build(**small).eval(), small)


@pytest.mark.zoo
@pytest.mark.parametrize("name", ROWS)
def test_full_size(name: str) -> None:
    build, _, _, full = ROWS[name]
    with torch.device("meta"):
        model = build(**full).eval()
    _check(name, model, full)


def test_gpt2_small_has_the_published_number() -> None:
    """Of the attention of GPT-2 small alone, 12 · 12 · 2 · 64²."""
    _, dimension, _, full = ROWS["gpt2"]
    assert dimension(**full) - 2 * 12 * 768 == 1_179_648
