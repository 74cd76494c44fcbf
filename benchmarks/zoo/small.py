"""A small model of any transformers architecture, from its configuration alone.

Nothing here knows an architecture. The default configuration is taken, and its numbers are shrunk by what their names
mean: widths by one common factor, so that what divided still divides; depths to a few layers; vocabularies to a few
hundred tokens, the special ones among them. Milder shrinkings are tried where a model refuses the stronger ones.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

VOCABULARY = 320
SPECIAL = re.compile(r"(_token_id|_token_index|_token)$|^(image|video|audio)_token")
DEPTH = re.compile(
    r"(num|n)_?(\w*_)?(hidden_)?(layers?|blocks?|stages_layers)$|^(n_layers?|depth|num_block|layers|encoder_layers|"
    r"decoder_layers|num_hidden_groups|num_decoder_blocks|l_layers|x_layers|r_layers)$"
)
DEPTHS = re.compile(r"^(depths|num_blocks|layers|layer_depths|num_conv_layers|stage_depths|num_hidden_layers)$")
WIDTH = re.compile(
    r"(hidden|embed\w*|intermediate|ffn|feed_?forward|mlp|inner|head|proj\w*|projection|state|filter|model|lora|latents?|"
    r"expert|rank|bottleneck|codebook|conv)_(size|dims?|channels?|width|rank|ff)$"
    r"|^((\w+_)?d_\w+|n_embd|n_inner|dims?|\w*_dim|width|channels|\w*_channels|\w*_channel_list|\w*hidden_sizes?|num_filters|"
    r"\w*embed_dim|\w*_lora_rank|lm_head_dims)$"
)
KEPT = re.compile(
    r"^(image_|patch_|window_|num_channels|in_cha|audio_channels|num_mel_bins|rope|rotary|kernel|conv_kernel_dim)"
)
LENGTH = re.compile(r"^(max_position_embeddings|n_positions|max_seq_len|n_ctx|max_sequence_length|seq_length)$")
VOCAB = re.compile(r"^(\w+_)?vocab_size\w*$|^n_vocab$|_vocab$")
EXPERTS = re.compile(r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts)$")
CHOSEN = re.compile(r"^(num_experts_per_tok(en)?|moe_top_?k|top_k|moe_k|experts_per_token)$")


@dataclass(frozen=True)
class Shrink:
    """How strongly: widths are divided by `width` where they are multiples of it, at least `least` remaining."""

    width: int
    depth: int
    least: int = 4
    vocabulary: bool = True
    experts: bool = True


SHRINKS = (
    Shrink(16, 2), Shrink(8, 2, 8), Shrink(16, 4), Shrink(4, 2, 16), Shrink(1, 2), Shrink(1, 2, experts=False),
    Shrink(1, 2, vocabulary=False, experts=False), Shrink(8, 1000, 8), Shrink(1, 1000, vocabulary=False, experts=False),
)  # fmt: skip
#: A model with more parameters than this is not built.
LARGEST = 200_000_000


def small_models(cls: type[nn.Module]) -> Iterator[nn.Module]:
    """Models of this class, from the most strongly shrunk configuration that it accepts to the mildest.

    Raises the error of the first attempt if it accepts none.
    """
    first: Exception | None = None
    seen: set[tuple[int, ...]] = set()
    for config in configs(cls.config_class):
        try:
            with torch.device("meta"):
                sizes = tuple(p.numel() for p in _build(cls, copy.deepcopy(config)).parameters())
            if sum(sizes) > LARGEST:
                raise ValueError(f"{sum(sizes) / 1e6:.0f} million parameters are more than this sweep builds")
            if sizes in seen:
                continue
            model = _build(cls, config)
        except Exception as error:
            first = first or error
            continue
        seen.add(sizes)
        yield model
    if not seen and first is not None:
        raise first


def _build(cls: Any, config: Any) -> nn.Module:
    built: nn.Module = cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)
    return built


def configs(config_class: Any) -> Iterator[Any]:
    """Small configurations, the smallest first."""
    for shrink in SHRINKS:
        with contextlib.suppress(Exception):
            yield config_class.from_dict(filled(shrunk(config_class().to_dict(), shrink)))
    yield config_class()


def filled(config: dict[str, Any]) -> dict[str, Any]:
    """A copy with numbers where a configuration has none, which some leave to their checkpoints."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    missing = {
        "prediction_length": 4, "rope_theta": 10000.0, "n_routed_experts": 8, "n_shared_experts": 1,
        "num_key_value_heads": heads, "head_dim": width // heads if _is_size(width) and _is_size(heads) else None,
    }  # fmt: skip
    found = {name: missing.get(name) if value is None else value for name, value in config.items()}
    nested = {name: filled(value) for name, value in found.items() if _is_nested(value)}
    return {**found, **nested}


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def shrunk(config: dict[str, Any], shrink: Shrink) -> dict[str, Any]:
    """A copy of a configuration with smaller numbers, and with those inside it shrunk alike."""
    found = dict(config)
    depth = next((v for k, v in config.items() if DEPTH.search(k) and _is_size(v)), None)
    if any(DEPTHS.search(k) and isinstance(v, list) for k, v in config.items()):
        depth = None  # stages, each with a depth of its own: all of them stay
    for name, value in config.items():
        if isinstance(value, dict):
            found[name] = shrunk(value, shrink) if _is_nested(value) else value
        elif name.endswith("layer_types") and isinstance(value, list) and value:
            found[name] = varied(value, min(shrink.depth, len(value)))
        elif isinstance(value, list) and depth and len(value) == depth and not DEPTHS.search(name):
            found[name] = value[: min(shrink.depth, depth)]
        else:
            found[name] = _smaller(name, value, shrink)
    kinds = next((v for k, v in found.items() if k.endswith("layer_types") and isinstance(v, list)), None)
    if kinds:
        for name in config:
            if name == "num_hidden_layers":
                found[name] = len(kinds)
    if shrink.vocabulary:
        _shrink_vocabulary(found)
    return found


def varied(kinds: list[Any], count: int) -> list[Any]:
    """As many entries as asked for, but with every kind that the list has."""
    distinct = list(dict.fromkeys(map(str, kinds)))
    first = [next(k for k in kinds if str(k) == kind) for kind in distinct]
    return first + kinds[len(first) : max(count, len(first))] if len(first) < count else first


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _smaller(name: str, value: Any, shrink: Shrink) -> Any:
    if isinstance(value, (list, tuple)):
        if DEPTHS.search(name):
            return type(value)(min(v, 1 if shrink.depth < 100 else v) if _is_size(v) else v for v in value)
        if all(map(_is_size, value)) and WIDTH.search(name) and not KEPT.search(name):
            return type(value)(_divided(v, shrink) for v in value)
        if name.endswith("_section") and all(_is_size(v) and v % shrink.width == 0 for v in value):
            return type(value)(v // shrink.width for v in value)  # of a head's channels
        return value
    if not _is_size(value) or KEPT.search(name):
        return value
    if DEPTH.search(name):
        return min(value, shrink.depth)
    if LENGTH.search(name):
        return min(value, 512)
    if EXPERTS.search(name) and shrink.experts:
        return min(value, 8)
    if CHOSEN.search(name) and shrink.experts:
        return min(value, 2)
    if WIDTH.search(name):
        return _divided(value, shrink)
    return value


def _divided(value: int, shrink: Shrink) -> int:
    return value // shrink.width if value % shrink.width == 0 and value // shrink.width >= shrink.least else value


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
