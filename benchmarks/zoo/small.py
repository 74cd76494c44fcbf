"""A small model of any transformers architecture, from its configuration alone.

Nothing here knows an architecture. The default configuration is taken, and its numbers are shrunk by what their names
mean. A width and the heads that share it are divided by one factor, so that a head keeps its size, and with it whatever
is counted in a head's channels; every width of the same size anywhere in the configuration is divided alike, since one
part's output is another's input. Of the layers a few remain, one of each kind that the configuration tells apart. Of a
vocabulary a few hundred tokens remain, the special ones among them. Other shrinkings follow where a model refuses one.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypeGuard

import torch
from torch import nn

VOCABULARY = 320
#: So many of the tokens stand for pieces of pictures, where a model writes pictures as text.
PICTURES = 100
SPECIAL = re.compile(r"(_token_id|_token_index|_token)$|^(image|video|audio)_token")
DEPTH = re.compile(
    r"(num|n)_?(\w*_)?(hidden_)?(layers?|blocks?|stages_layers)$|^(n_layers?|depth|num_block|layers|encoder_layers|"
    r"decoder_layers|num_hidden_groups|num_decoder_blocks|l_layers|x_layers|r_layers)$"
)
DEPTHS = re.compile(r"^((\w+_)?depths|num_blocks|num_block_repeats|layers|num_conv_layers|num_hidden_layers)$")
#: How many times as many layers there are as the depths say.
DEEPER = re.compile(r"^depth_(coefficient|multiplier)$")
WIDTH = re.compile(
    r"(hidden|embed\w*|intermediate|ffn|feed_?forward|mlp|inner|head|proj\w*|projection|state|filter|model|lora|latents?|"
    r"expert|rank|bottleneck|codebook|conv|coordinate|shape)_(size|dims?|channels?|width|rank|ff)$"
    r"|^((\w+_)?d_\w+|n_embd|n_inner|dims?|\w*_dim|width|channels|\w*_channels|\w*_channel_list|\w*hidden_sizes?|num_filters|"
    r"\w*embed_dim|\w*_lora_rank|lm_head_dims|bottleneck_features)$"
)
KEPT = re.compile(
    r"^(image_|patch_(?!embeds_hidden)|window_|num_channels|in_cha|audio_channels|num_mel_bins|rope|rotary|kernel|conv_kernel_dim)"
)
#: The sizes of one head, and what is looked up in it: kept where there are fewer heads instead.
HEAD_SIZE = re.compile(r"head_(dim|size)|^d_(head|kv)$|_d_head$|^kv_channels$|kernel_dim$|_d_conv$|^d_conv$")
HEADS = re.compile(r"^(\w+_)?(num|n)_(\w+_)?heads?(_kv)?$|^(\w+_)?(attention_)?heads$|^nhead$|^kv_n_heads$|^n_head_kv$")
SHARED_HEADS = re.compile(r"(key_value|kv|value)_?(n_)?(head|group)|head_kv$")
#: What a model calls its main width, likeliest first.
MAIN_WIDTH = (
    "hidden_size", "d_model", "n_embd", "embed_dim", "hidden_dim", "dim", "width", "dim_model", "encoder_hidden_size",
    "decoder_hidden_size", "embed_dims", "hidden_sizes",
)  # fmt: skip
#: Lists of those layers that are of some kind; and of layers from which something is taken.
LISTED = re.compile(r"_layers$|_layer_ids$|_layer_idx$")
#: Lists that repeat the widths of a backbone.
FROM_BACKBONE = re.compile(r"^backbone_|_in_channels$")
INDICES = re.compile(r"_(indices|indexes)$")
#: Widths inside one block, which nothing else depends on.
INNER = re.compile(r"^(\w+_)?(intermediate_size|ffn_hidden_size|ffn_dim|mlp_dim|d_ff|encoder_ffn_dim|decoder_ffn_dim)$")
LENGTH = re.compile(r"^(max_position_embeddings|n_positions|max_seq_len|n_ctx|max_sequence_length|seq_length)$")
VOCAB = re.compile(r"^(\w+_)?vocab_size\w*$|^n_vocab$|_vocab$")
FRAMES = re.compile(r"^(num_frames|frames_per_clip)$")
EXPERTS = re.compile(r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts)$")
CHOSEN = re.compile(r"^(num_experts_per_tok(en)?|moe_top_?k|top_k|moe_k|experts_per_token|top_k_experts)$")
#: How many of the earlier positions attention picks: fewer than there are, or what picks them has no influence.
PICKED = re.compile(r"^index_topk$|^indexer_budget$|^sliding_window$")
#: Of how many places in an image something is asked: no more than a small image has.
QUERIES = re.compile(r"^num_(object_)?queries$")
CHOSEN_GROUPS = re.compile(r"^(n_group|topk_group|num_expert_group|moe_n_group)$")


@dataclass(frozen=True)
class Shrink:
    """How strongly: `depth` layers remain.

    With `heads`, widths are divided along with their heads, of which two to four remain, else all by `width`; other
    numbers are divided by `width` where they are multiples of it, at least `least` remaining.
    """

    width: int
    depth: int
    least: int = 4
    heads: bool = False
    vocabulary: bool = True
    experts: bool = True


SHRINKS = (
    Shrink(8, 2, 16, heads=True), Shrink(16, 2), Shrink(8, 2, 8), Shrink(8, 4, 16, heads=True), Shrink(16, 4),
    Shrink(4, 2, 16), Shrink(1, 2), Shrink(1, 2, experts=False), Shrink(1, 2, vocabulary=False, experts=False),
    Shrink(8, 1000, 8), Shrink(1, 1000, vocabulary=False, experts=False),
)  # fmt: skip
#: What two configurations may differ in, though their models have the same sizes.
TOLD_APART = re.compile(r'"(?:partial_rotary_factor|mrope_section|out_indices)": (?:\[[^]]*\]|[^,}]*)')
#: A model with more parameters than this is not built.
LARGEST = 200_000_000


def small_models(cls: type[nn.Module]) -> Iterator[nn.Module]:
    """Models of this class, from the most strongly shrunk configuration that it accepts to the mildest.

    Raises the error of the first attempt if it accepts none.
    """
    first: Exception | None = None
    seen: set[tuple[Any, ...]] = set()
    for config in configs(cls.config_class):  # type: ignore[attr-defined]
        try:
            with torch.device("meta"):
                sizes = tuple(p.numel() for p in _build(cls, copy.deepcopy(config)).parameters())
            alike = (*sizes, *TOLD_APART.findall(" ".join(config.to_json_string().split())))
            if sum(sizes) > LARGEST:
                raise ValueError(f"{sum(sizes) / 1e6:.0f} million parameters are more than this sweep builds")
            if alike in seen:
                continue
            model = _build(cls, config)
        except Exception as error:
            first = first or error
            continue
        seen.add(alike)
        yield model
    if not seen and first is not None:
        raise first


def _build(cls: Any, config: Any) -> nn.Module:
    built: nn.Module = cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)
    return built


def configs(config_class: Any) -> Iterator[Any]:
    """Small configurations, the smallest first."""
    default = filled(_default(config_class))
    declared = filled(declared_parts(default, config_class))
    for shrink in SHRINKS:
        others = (
            (half_turned(default), sectioned(default, config_class), looked_at_once(default)) if shrink.heads else ()
        )
        others = (*others, staged(default), *((declared, staged(declared)) if declared != default else ()))
        for start in (*backbones(default), *(other for other in others if other)):
            for pictures in (smaller_images(start), start):
                if pictures is not None:
                    with contextlib.suppress(Exception):
                        found = shrunk(agreed(pictures, 8 if shrink.heads else None), shrink)
                        yield config_class.from_dict(filled(found))
    yield config_class()


#: Edges of images, and of what is made of them, all of which are divided alike.
EDGES = re.compile(r"(image|img)_size$|^image_embedding_size$|^crop_size$|_feat(ure)?_sizes$|^num_patches$")
#: Images of so many pixels along an edge, or more, are divided, and so many remain.
LARGE_EDGE, EDGE_LEFT = 512, 224


def smaller_images(config: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration for images of a half, a third or less, where they are large.

    What is called a patch and is as large as another model's image is such an image, cut out of a larger one.
    """
    parts = list(_all(config))
    edges = [edge for part in parts for name, value in part.items() if _is_edge(name, value) for edge in _edges(value)]
    patches = {
        value for part in parts for name, value in part.items() if name == "patch_size" for value in _edges(value)
    }
    cut = {patch for patch in patches if patch in edges}
    least = min((edge for edge in edges if edge >= (1 if cut else LARGE_EDGE)), default=0)
    small = math.lcm(*(patch for patch in patches - cut if patch <= EDGE_LEFT // 4)) if not cut else 1
    for divisor in range(least // (EDGE_LEFT // 3 if cut else EDGE_LEFT), 1, -1):
        if all(edge % divisor == 0 and (edge < LARGE_EDGE or edge // divisor % small == 0) for edge in edges):
            return {name: _divided_edges(value, divisor, cut, name) for name, value in config.items()}
    return None


def _is_edge(name: str, value: Any) -> bool:
    return bool(EDGES.search(name)) and not name.startswith(("pretrain", "max_", "min_")) and bool(_edges(value))


def _edges(value: Any) -> list[int]:
    """The numbers of a size, which may be a pair of them, or pairs of several sizes."""
    if isinstance(value, (list, tuple)):
        return [edge for inner in value for edge in _edges(inner)]
    return [value] if _is_size(value) else []


def _divided_edges(value: Any, divisor: int, cut: set[int], name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _divided_edges(inner, divisor, cut, str(key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_divided_edges(inner, divisor, cut, name) for inner in value)
    divides = _is_edge(name, value) or (name == "patch_size" and value in cut)
    return value // divisor if divides else value


def backbones(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The configuration, and before it, where timm builds a part of it, those in which that part is smaller."""
    # One of timm's builders takes this, another that; those that take neither are tried, and fail, before what follows.
    given = ({"depth": 2}, {"channel_multiplier": 0.25}, {"layers": (1, 1, 1, 1, 1)})
    found = [smaller for one in given if (smaller := _built_with(config, one)) != config] + [config]
    if len(found) > 1:  # a configuration that names no builder has timm's residual network, where a transformer is due
        found.append(_built_with(config, {"depth": 2, "embed_dim": 192}, "vit_tiny_patch16_224"))
    return found


def _built_with(config: dict[str, Any], given: dict[str, Any], builder: str | None = None) -> dict[str, Any]:
    found = {name: _built_with(part, given, builder) if _is_nested(part) else part for name, part in config.items()}
    if "architecture" in config:
        found["model_args"] = {**(config.get("model_args") or {}), **given}
        found["architecture"] = builder or config["architecture"]
    return found


def half_turned(config: dict[str, Any]) -> dict[str, Any] | None:
    """Heads of 128 channels, of which a rotary embedding turns half, as in checkpoints whose defaults do not say so."""
    found = dict(config)
    if isinstance(rotary := config.get("rope_parameters"), dict) and "rope_theta" in rotary:
        found |= {"rope_parameters": {**rotary, "partial_rotary_factor": 0.5}, "head_dim": 128}
    for name, part in config.items():
        if _is_nested(part) and (inner := half_turned(part)) is not None:
            found[name] = inner
    return None if found == config else found


def sectioned(config: dict[str, Any], config_class: Any) -> dict[str, Any] | None:
    """A rotary embedding of several axes, where a class knows of their sections and its defaults do not say them."""
    found = dict(config)
    rotary, size = config.get("rope_parameters"), config.get("head_dim") or 0
    known = "mrope_section" in getattr(config_class, "ignore_keys_at_rope_validation", ())
    if known and _is_size(size) and isinstance(rotary, dict) and not rotary.get("mrope_section"):
        found["rope_parameters"] = {**rotary, "mrope_section": [size // 8] * 4}
    for name, inner in getattr(config_class, "sub_configs", {}).items():
        if _is_nested(part := config.get(name)) and (changed := sectioned(part, inner)) is not None:
            found[name] = changed
    return None if found == config else found


def looked_at_once(config: dict[str, Any]) -> dict[str, Any] | None:
    """One head where a model looks at its inputs, whose channels may be of any number."""
    found = {name: 1 if name == "num_cross_attention_heads" else value for name, value in config.items()}
    return None if found == config else found


def staged(config: dict[str, Any]) -> dict[str, Any] | None:
    """Features from each stage, and not only from the last; from four of the layers, where every layer is a stage."""
    found = dict(config)
    if isinstance(names := config.get("stage_names"), list) and (depth := len(names) - 1) == _layer_count(config) > 3:
        found |= {"out_indices": [depth * part // 4 - 1 for part in range(1, 5)], "out_features": None}
    for name, part in config.items():
        if _is_nested(part) and isinstance(names := part.get("stage_names"), list) and len(names) > 2:
            found[name] = {**part, "out_features": names[1:], "out_indices": list(range(1, len(names)))}
            given = part.get("stage_out_channels")
            lists = (key for key in config if key.endswith("_list_out_channels"))
            found.update({key: list(given) for key in lists if isinstance(given, list)})
    return None if found == config else found


def _default(config_class: Any) -> dict[str, Any]:
    """The default configuration, with those inside it that the class knows and leaves out."""
    config: dict[str, Any] = config_class().to_dict()
    for name, inner in getattr(config_class, "sub_configs", {}).items():
        if config.get(name) is None and hasattr(inner, "to_dict"):
            with contextlib.suppress(Exception):
                config[name] = _default(inner)
    return config


def declared_parts(config: dict[str, Any], config_class: Any) -> dict[str, Any]:
    """The configuration with the parts that its class declares as defaults, where it takes others by default."""
    from transformers import AutoConfig

    found = dict(config)
    for name, part in getattr(config_class, "sub_configs_defaults", {}).items():
        present, declared = config.get(name), getattr(part, "model_type", None)
        if _is_nested(present) and isinstance(declared, str) and present.get("model_type") != declared:
            with contextlib.suppress(Exception):
                found[name] = AutoConfig.for_model(declared, **(getattr(part, "init_kwargs", None) or {})).to_dict()
    return found


#: What a tower calls the width in which it hands on to the text; the last only where the whole has none of that name.
HANDED_ON = ("out_hidden_size", "text_hidden_size", "adapter_out_dim", "output_dim", "projection_dim")
#: Layers of a tower from which its features are taken, counted from either end.
TAKEN = re.compile(r"^(vision|audio)_feature_layers?$")
HOOKS = re.compile(r"_hook_ids$")


def agreed(config: dict[str, Any], side: int | None) -> dict[str, Any]:
    """A copy in which a tower fits the text that it stands beside, where the defaults of the two were chosen apart.

    The tower's output is as wide as the text; its images have `side` patches along an edge, so that they can be merged
    by two and by four, and as many features for each as that leaves.
    """
    found = dict(config)
    writes, reads = (config.get(name) for name in ("decoder_config", "speech_config"))
    # What the one writes the other reads.
    if _is_nested(writes) and _is_nested(reads) and _is_size(writes.get("vocab_size")):
        config = found = {**config, "speech_config": {**reads, "vocab_size": writes["vocab_size"]}}
    heard = _main_width(config["encoder_config"]) if _is_nested(config.get("encoder_config")) else None
    if heard is not None:  # and what reads an encoder is as wide as that
        for name, part in config.items():
            if _is_nested(part) and _is_size(part.get("encoder_hidden_size")):
                found[name] = {**part, "encoder_hidden_size": heard}
        config = found = dict(found)
    text = config.get("text_config")
    width = text.get("hidden_size") if isinstance(text, dict) else None
    if _is_size(width) and _is_size(config.get("hidden_size")):
        found["hidden_size"] = width
    for name, tower in config.items():
        if name == "text_config" or not _is_nested(tower):
            continue
        if "text_config" in tower:  # a model of its own
            found[name] = agreed(tower, side)
            continue
        handed_on = [key for key in HANDED_ON if _is_size(tower.get(key)) and not _is_size(config.get(key))]
        changed = {key: width for key in handed_on if _is_size(width)}
        projected = tower.get("projector_output_dim")  # what a projector makes is what the tower gives
        changed |= {key: projected for key in tower if key.endswith("_output_dim") and _is_size(projected)}
        if _is_size(width) and {"embed_dim", "hidden_size"} <= tower.keys():
            changed["hidden_size"] = width
        image, patch = tower.get("image_size"), tower.get("patch_size")
        if side is not None and _is_size(image) and _is_size(patch) and patch >= 8:
            changed["image_size"] = side * patch
            changed |= {"image_embedding_size": side} if "image_embedding_size" in tower else {}
            if _is_size(config.get("mm_tokens_per_image")):
                found["mm_tokens_per_image"] = (side // 2) ** 2
            if isinstance(parts := config.get("image_grid_pinpoints"), list):
                found["image_grid_pinpoints"] = [[edge * side * patch // image for edge in part] for part in parts]
        found[name] = {**tower, **changed}
    return found


def filled(config: dict[str, Any]) -> dict[str, Any]:
    """A copy with numbers where a configuration has none, which some leave to their checkpoints."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    size = width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None
    labels = max(2, len(config.get("id2label") or ()))
    layers = config.get("num_hidden_layers")
    depth = layers if _is_size(layers) else 0
    missing = {
        "prediction_length": 24, "rope_theta": 10000.0, "n_routed_experts": 8, "n_shared_experts": 1,
        "num_experts": 8, "top_k_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
        "num_key_value_heads": heads, "head_dim": size,
        "layer_types": _alternating("conv", "full_attention", depth),
        "mlp_layer_types": _alternating("dense", "sparse", depth),
        "vocab_size": VOCABULARY, "pad_token_id": 0,
        "image_token_id": VOCABULARY - 70, "image_token_index": VOCABULARY - 70,
        "video_token_id": VOCABULARY - 71, "video_token_index": VOCABULARY - 71, "audio_token_id": VOCABULARY - 72,
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": size, "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "downsample_rate": "1/2",
        "scale_factor_list": [1, 2, 4, 8], "kernel_list": [3, 2, 2],
        "upsample_out_channels": [64, 32], "conv_out_channels": [32],
        "intraclass_block_config": dict(_convolutions()),
        "class_thresholds": [0.5] * labels, "class_order": list(range(labels)),
        "deepstack_layer_map": [[-1, 0]],  # layers of a tower, and those of the text to which each is added
        "vocabulary_map": {name: token for token, name in enumerate(_picture_tokens())} | {"<image>": VOCABULARY - 70},
    }  # fmt: skip
    if "backbone_config" not in config:
        missing["backbone"] = "resnet18"
    if "sliding_attention" in (config.get("layer_types") or ()) or any("sliding_attention" in name for name in config):
        missing["sliding_window"] = 8
    found = {name: missing.get(name) if value is None else value for name, value in config.items()}
    if found.get("projector_scale_factors") == []:  # of no features there would be nothing to detect anything in
        found |= {"projector_scale_factors": [1.0], "num_feature_levels": 1}
    if isinstance(builder := config.get("archirecture"), str):  # so spelt among the defaults, and then not heard
        found["architecture"] = builder
    rotary, kinds = found.get("rope_parameters"), found.get("layer_types")
    if rotary == {} and isinstance(kinds, list):  # each kind of layer has its own
        found["rope_parameters"] = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in set(kinds)}
    if _is_size(heads) and _is_size(width) and "head_dim" not in config and width % heads:
        found["num_attention_heads"] = next(fewer for fewer in range(heads, 0, -1) if width % fewer == 0)
    parts = {name: filled(value) for name, value in found.items() if _is_nested(value) and name != "vocabulary_map"}
    for name, part in parts.items():  # what the one leaves to the other
        if name == "text_config":
            part.setdefault("dropout_rate", 0.0)
        if config.get("vocabulary_map", 0) is None:  # as many pictures' tokens as there are names for
            part |= {key: PICTURES for key in ("num_embeddings", "codebook_size") if key in part}
        if name.startswith("attn_") and isinstance(rotary, dict) and "rope_theta" in rotary:
            part.setdefault("rope_theta", rotary["rope_theta"])
            part["clip_qkv"] = part.get("clip_qkv") or 100.0
        if _is_size(heads) and "num_key_value_heads" in part:
            found.setdefault("num_key_value_heads", heads)
    return {**found, **parts}


def _convolutions() -> Iterator[tuple[str, list[Any]]]:
    """Kernel, stride and padding of convolutions along a line of text, across it, and both ways, of three lengths."""
    yield from (("reduce_channel", [1, 1, 0]), ("return_channel", [1, 1, 0]))
    for length, name in ((7, "longratio"), (5, "midratio"), (3, "shortratio")):
        half = length // 2
        yield f"symmetric_conv_long_{name}", [[length, length], [1, 1], [half, half]]
        yield f"vertical_long_to_small_conv_{name}", [[length, 1], [1, 1], [half, 0]]
        yield f"horizontal_small_to_long_conv_{name}", [[1, length], [1, 1], [0, half]]


def _picture_tokens() -> Iterator[str]:
    """Names of the tokens that stand for pieces of pictures, in the two spellings that are in use, and of their end."""
    yield "<|extra_200|>"
    for at in range(PICTURES):
        yield "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(at)) + "Z"
        yield f"<|visual token {at:06d}|>"


def _alternating(first: str, second: str, count: int) -> list[str] | None:
    return ([first, second] * count)[:count] or None


def _is_nested(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def shrunk(config: dict[str, Any], shrink: Shrink, widths: Mapping[int, int] | None = None) -> dict[str, Any]:
    """A copy of a configuration with smaller numbers, and with those inside it shrunk alike.

    `widths` says what becomes of some widths, wherever they stand; by default it is found from the configuration.
    """
    if widths is None:
        widths = narrowed(config) if shrink.heads else {}
    local = _factor(config, widths) if shrink.heads else Fraction(shrink.width)
    found = dict(config)
    kept = kept_layers(config, shrink.depth)
    layers = _layer_count(config)
    ready_made = any(_is_nested(part) and _is_ready_made(part) for part in config.values())
    by_stage = _by_stage(config)
    for name, value in config.items():
        if _is_by_layer(value, layers):
            found[name] = _by_layer(value, kept, config, shrink, widths)
        elif _is_nested(value):
            found[name] = dict(value) if _is_ready_made(value) else shrunk(value, shrink, widths)
        elif isinstance(value, list) and ((FROM_BACKBONE.search(name) and ready_made) or _members(value) in by_stage):
            found[name] = value
        elif name == "num_filters" and "depths" in config and shrink.heads:  # doubled from stage to stage
            found[name] = _divided(value, replace(shrink, least=4))
        elif TAKEN.search(name):
            found[name] = _taken(value, shrink.depth)
        elif HOOKS.search(name) and isinstance(value, list):
            found[name] = [min(layer, shrink.depth - 1) for layer in value]
        elif _names_layers(name, value, layers):
            found[name] = [at for at, i in enumerate(kept) if i in value]
        elif name in ("out_indices", "out_features") and len(config.get("stage_names") or ()) == layers + 1 > 2:
            stages = [i for i in config.get("out_indices") or () if 0 < i <= layers]  # as many, spread as they were
            kept_stages = [max(1, i * len(kept) // layers) for i in stages]
            if len(set(kept_stages)) < len(stages) <= len(kept):
                kept_stages = list(range(len(kept) - len(stages) + 1, len(kept) + 1))
            found[name] = kept_stages if name == "out_indices" and kept_stages else None
        elif INDICES.search(name) and _is_rising(value, layers):
            found[name] = [i * len(kept) // layers for i in value]  # as many, since what they give may be concatenated
        elif isinstance(value, (list, tuple)) and layers and len(value) == layers and not DEPTHS.search(name):
            found[name] = [value[i] for i in kept]
        elif _is_size(value) and name == "num_hidden_layers":
            found[name] = len(kept) if layers else value  # stages, which all stay
        elif _is_size(value) and DEPTH.search(name) and "num_hidden_layers" in config and layers and value < layers:
            found[name] = max(1, round(value * len(kept) / layers))  # so many of the layers are of some kind
        elif shrink.heads and HEADS.search(name) and _is_size(value):
            found[name] = _fewer_heads(name, value, config, local)
        elif shrink.heads and HEAD_SIZE.search(name):
            found[name] = value
        else:
            found[name] = _smaller(name, value, shrink, local, widths)
    ratio, width = found.get("pixel_shuffle_ratio"), found.get("hidden_size")
    if isinstance(ratio, float) and _is_size(width) and "intermediate_size" in found:
        found["intermediate_size"] = round(width / ratio**2)  # that many channels stand where one pixel is left
    if shrink.vocabulary:
        _shrink_vocabulary(found)
    return found


def _is_ready_made(part: Mapping[str, Any]) -> bool:
    """Whether a part keeps its widths: another library builds it, from its name for it, or a table of all blocks."""
    return bool({"architecture", "block_configs"} & part.keys()) or str(part.get("model_type")).startswith("timm")


def _by_stage(config: Mapping[str, Any]) -> set[tuple[str, ...]]:
    """The members of lists that say something for each stage of a part, and which are left as they are."""
    inner = [part for part in _all(config) if part is not config]
    named = {_members(value) for part in inner for name, value in part.items() if name.endswith("_per_stage")}
    # What a table of blocks says already is derived from it.
    return named | {_members(part.get("stage_out_channels")) for part in inner if _is_ready_made(part)}


def _members(value: Any) -> tuple[str, ...]:
    return tuple(sorted(map(str, value))) if isinstance(value, (list, tuple)) else ()


# -- layers -----------------------------------------------------------------------------------------------------------


def _layer_count(config: Mapping[str, Any]) -> int:
    """How many layers a configuration speaks of; none where stages have a depth each."""
    if any(DEPTHS.search(name) and isinstance(value, list) for name, value in config.items()):
        return 0
    named = [config.get("num_hidden_layers"), *(value for name, value in config.items() if DEPTH.search(name))]
    return next((int(value) for value in named if _is_size(value)), 0)


def kept_layers(config: Mapping[str, Any], count: int) -> list[int]:
    """The layers that stay: one of each kind that lists and tables by layer tell apart, and others up to `count`."""
    layers = _layer_count(config)
    told = [v for v in config.values() if _is_by_layer(v, layers) or _is_list_of_kinds(v, layers)]
    told = [[i in v for i in range(layers)] if _is_rising(v, layers) else v for v in told]
    told += [[i in v for i in range(layers)] for k, v in config.items() if _names_layers(k, v, layers)]
    kinds = [tuple(str(v.get(_key(v, i)) if isinstance(v, dict) else v[i]) for v in told) for i in range(layers)]
    order = list(dict.fromkeys(kinds))
    if len(order) > 2 * max(count, 3):  # no kinds, then, but a schedule
        return list(range(min(count, layers)))
    first = [kinds.index(kind) for kind in order]
    # Twice through all kinds rather than in the given order: what one layer shares with another is of its kind.
    again = [i for i in range(layers) if i not in first]
    second = [next((i for i in again if kinds[i] == kind), None) for kind in order]
    chosen = first + [i for i in second if i is not None] + again
    return list(dict.fromkeys(chosen))[: max(count, len(first))]


def _is_list_of_kinds(value: Any, layers: int) -> bool:
    return isinstance(value, (list, tuple)) and 0 < len(value) == layers and not isinstance(value[0], float)


def _is_rising(value: Any, layers: int) -> bool:
    """Whether a list could be of layers' numbers."""
    if not isinstance(value, (list, tuple)) or not value or not all(type(i) is int and 0 <= i < layers for i in value):
        return False
    return sorted(set(value)) == list(value)


def _taken(value: Any, layers: int) -> Any:
    """Layers counted from either end, as many, where few are left: what they give may be concatenated."""
    if isinstance(value, (list, tuple)):
        return [_taken(i, layers) for i in value]
    return max(-layers, min(value, layers)) if type(value) is int else value


def _names_layers(name: str, value: Any, layers: int) -> bool:
    return bool(LISTED.search(name)) and _is_rising(value, layers)


def _is_by_layer(value: Any, layers: int) -> bool:
    if not (isinstance(value, dict) and value and layers):
        return False
    return all(str(key).isdigit() and isinstance(inner, dict) for key, inner in value.items())


def _by_layer(
    table: Mapping[str, Any], kept: list[int], config: Mapping[str, Any], shrink: Shrink, widths: Mapping[int, int]
) -> dict[str, Any]:
    """What single layers have instead of what the configuration says, shrunk as it would be there."""
    plain = {name: value for name, value in config.items() if not isinstance(value, (dict, list))}
    found: dict[str, Any] = {}
    for at, layer in enumerate(kept):
        own = table.get(_key(table, layer))
        if own is not None:
            smaller = shrunk({**plain, **own}, shrink, widths)
            found[str(at).zfill(2)] = {name: smaller[name] for name in own}
    return found


def _key(table: Mapping[Any, Any], layer: int) -> Any:
    return next((key for key in table if int(key) == layer), None)


# -- widths -----------------------------------------------------------------------------------------------------------


def narrowed(config: Mapping[str, Any]) -> dict[int, int]:
    """What becomes of each width that heads share, wherever it stands: so much less that few heads remain."""
    heads: dict[int, int] = {}
    shared: dict[int, bool] = {}
    for inner in _all(config):
        width = _main_width(inner)
        if width is None:
            continue
        counts = [v for k, v in inner.items() if HEADS.search(k) and _is_size(v) and not SHARED_HEADS.search(k)]
        fewer = [v for k, v in inner.items() if SHARED_HEADS.search(k) and _is_size(v)]
        for count in counts:
            heads[width] = math.gcd(heads.get(width, 0), count)
            shared[width] = shared.get(width, False) or any(f < count for f in fewer)
    found: dict[int, int] = {}
    for width, count in heads.items():
        least = 4 if shared[width] else 2
        left = [d for d in range(2, count) if count % d == 0 and width * d % count == 0]
        best = next((d for d in left if d >= least), max(left, default=least if width % count == 0 else count))
        found[width] = width * min(best, count) // count
    return found


def _all(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for value in config.values():
        if _is_nested(value):
            yield from _all(value)


def _main_width(config: Mapping[str, Any]) -> int | None:
    names = ("embed_dim", *MAIN_WIDTH) if "embed_dim" in config else MAIN_WIDTH  # where it is not the width handed on
    return next((v for v in (config.get(name) for name in names) if _is_size(v)), None)


def _factor(config: Mapping[str, Any], widths: Mapping[int, int]) -> Fraction:
    """By how much this part of a configuration is narrower."""
    width = _main_width(config)
    if width is not None and width in widths:
        return Fraction(width, widths[width])
    return max((Fraction(old, new) for old, new in widths.items()), default=Fraction(8))


def _fewer_heads(name: str, count: int, config: Mapping[str, Any], factor: Fraction) -> int:
    queries = [v for k, v in config.items() if HEADS.search(k) and _is_size(v) and not SHARED_HEADS.search(k)]
    if not SHARED_HEADS.search(name) or not queries or count >= max(queries):
        count = min(count, max(queries)) if SHARED_HEADS.search(name) and queries else count  # never more than ask
        return _quotient(count, factor) or count
    left = _quotient(max(queries), factor) or max(queries)
    return 2 if count > 1 and left % 2 == 0 and left > 2 else 1


def _quotient(value: int, factor: Fraction) -> int | None:
    """`value / factor` where that is a whole number."""
    found = value / factor
    return int(found) if found.denominator == 1 else None


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _smaller(name: str, value: Any, shrink: Shrink, factor: Fraction, widths: Mapping[int, int]) -> Any:
    if isinstance(value, float):
        return min(value, 1.0) if DEEPER.search(name) and shrink.depth < 100 else value
    if isinstance(value, (list, tuple)):
        if DEPTHS.search(name):
            return type(value)(min(v, 1 if shrink.depth < 100 else v) if _is_size(v) else v for v in value)
        if all(map(_is_size, value)) and WIDTH.search(name) and not KEPT.search(name):
            if shrink.heads and set(value) <= widths.keys() and len(set(value)) == 1:
                return type(value)(widths[v] for v in value)
            if shrink.heads:
                seen = (
                    1 if len(value) > 1 and value[0] == 3 else 0
                )  # the channels of an image, and what is made of them
                common = math.gcd(*value[seen:], 8) if value else 1
                return type(value)([*value[:seen], *(v // common for v in value[seen:])])
            return type(value)(_divided(v, shrink) for v in value)
        if not shrink.heads and name.endswith("_section") and all(_is_size(v) and v % shrink.width == 0 for v in value):
            return type(value)(v // shrink.width for v in value)  # of a head's channels
        return value
    if not _is_size(value) or KEPT.search(name):
        return value
    if DEPTH.search(name):
        return min(value, shrink.depth)
    if LENGTH.search(name):
        return min(value, 512)
    if FRAMES.search(name) and shrink.heads:
        return min(value, 4)
    if EXPERTS.search(name) and shrink.experts:
        return min(value, 8)
    if CHOSEN.search(name) and shrink.experts:
        return min(value, 2)
    if PICKED.search(name) and shrink.heads:
        return min(value, 8)
    if QUERIES.search(name) and shrink.heads:
        return min(value, 30)
    if CHOSEN_GROUPS.search(name) and shrink.experts:
        return min(value, 2 if name.endswith("n_group") else 1)
    if value in widths and (WIDTH.search(name) or name.endswith(("_size", "_groups"))):
        return widths[value]
    if name.endswith("pos_feats") and 2 * value in widths:  # sines and cosines, which together are as wide
        return widths[2 * value] // 2
    if shrink.heads and INNER.search(name):
        return min(value, 128)
    if WIDTH.search(name):
        narrow = _quotient(value, factor) if shrink.heads else None
        return narrow if narrow is not None and narrow >= shrink.least else _divided(value, shrink)
    return value


def _divided(value: int, shrink: Shrink) -> int:
    return value // shrink.width if value % shrink.width == 0 and value // shrink.width >= shrink.least else value


# -- vocabularies -----------------------------------------------------------------------------------------------------


def _shrink_vocabulary(config: dict[str, Any]) -> None:
    """Few tokens; special ones that lay beyond them are numbered anew from the end, each differently."""
    sizes = {name: value for name, value in config.items() if VOCAB.search(name) and _is_size(value)}
    for name, value in sizes.items():
        config[name] = min(value, VOCABULARY)
    taken: dict[int, int] = {}
    for name, value in config.items():
        if SPECIAL.search(name) and isinstance(value, int) and not isinstance(value, bool) and value >= VOCABULARY:
            config[name] = taken.setdefault(value, VOCABULARY - 1 - _number(value))


def _number(token: int) -> int:
    """The same small number for the same token in every configuration of a model: their hashes seldom meet."""
    return token * 7 % 61
