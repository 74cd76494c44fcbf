"""A small model of any class, from the arguments of its constructor: defaults, shrunk by what their names mean.

Heads keep their size and become fewer, and with them every width that they share; other widths are halved until they
are small, all numbers of a list alike, so that what was equal stays equal. `size` counts from 1: larger ones are wider
and deeper.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

HEADS = re.compile(r"^(num|n)_(\w+_)?heads?$|^heads$|^(num|n)_query_heads$|^num_kv_heads$|^(num|n)_head$")
SHARED_HEADS = re.compile(r"(key_value|kv)_?(heads?|groups)")
DEPTH = re.compile(
    r"(^|_)(layers?|depths?|blocks?|n_layer|repeats?|resblocks?)$|^layers_per_block$|^(num|n)_(\w+_)?(layers|blocks)(_\w+)?$"
)
KEPT = re.compile(
    r"sample|image|img|patch|max|vocab|theta|length|len$|position|num_train|rope|kernel|theta|freq|rate|classes|head_dim|window"
)
WIDTH = re.compile(
    r"dim|channels?|features?|width|hidden|rank|embed|ffn?$|size$|inner|filters?|planes?|feats?|model|_ff|mlp|chs?$|nf$|nc$"
)
EXPERTS = re.compile(r"experts$")
#: What constructors want and leave to the caller, for networks of images.
WANTED: dict[str, Any] = {
    "spatial_dims": 2,
    "in_channels": 3,
    "in_chans": 3,
    "out_channels": 3,
    "out_chans": 3,
    "num_classes": 5,
    "image_size": 32,
    "img_size": 32,
    "patch_size": 8,
    "channels": (16, 32),
    "strides": (2, 2),
    "depth": 2,
    "heads": 2,
    "dim": 32,
    "mlp_dim": 64,
    "dim_head": 16,
    "num_in_ch": 3,
    "num_out_ch": 3,
    "input_image_size": 32,
    "input_resolution": (32, 32),
}


def arguments(cls: type, size: int = 1, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arguments for a small model of this class; those that are given stand as they are."""
    given = dict(given or {})
    parameters = {
        name: p
        for name, p in inspect.signature(cls.__init__).parameters.items()  # type: ignore[misc]
        if name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    missing = [name for name in parameters if name not in defaults and name not in given]
    found = {name: WANTED[name] for name in missing if name in WANTED}
    return {**found, **shrunk({k: v for k, v in defaults.items() if k not in given}, size), **given}


def small(cls: type[nn.Module], size: int = 1, given: Mapping[str, Any] | None = None) -> nn.Module:
    """A small model of this class; raises `ValueError` for one that is not small."""
    built = arguments(cls, size, given)
    count = 0
    with torch.device("meta"), contextlib.suppress(RuntimeError):  # some compute with values while they are built
        count = sum(p.numel() for p in cls(**built).parameters())
    if count > 150_000_000:
        raise ValueError(f"{cls.__name__} has {count / 1e6:.0f} million parameters, more than this sweep builds")
    return cls(**built)


def shrunk(config: Mapping[str, Any], size: int = 1) -> dict[str, Any]:
    """The configuration with fewer heads and layers, and narrower."""
    counts = [v for k, v in config.items() if HEADS.search(k) and not SHARED_HEADS.search(k) and _whole(v) and v > 1]
    queries = max(counts, default=0)
    left = 2 * size
    return {name: _smaller(name, value, size, queries, left) for name, value in config.items()}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _smaller(name: str, value: Any, size: int, queries: int, left: int) -> Any:
    if isinstance(value, (list, tuple)) and value and all(map(_whole, value)):
        if DEPTH.search(name):
            return type(value)(min(v, size) for v in value)
        if WIDTH.search(name) and not KEPT.search(name) and min(value) >= 64:
            times = 1
            while min(value) // (2 * times) >= 32 * size and all(v % (2 * times) == 0 for v in value):
                times *= 2
            return type(value)(v // times for v in value)
        return value
    if not _whole(value):
        return value
    if SHARED_HEADS.search(name):
        return max(1, left // 2) if 1 < value < queries else min(value, left)
    if HEADS.search(name):
        return min(value, left)
    if DEPTH.search(name):
        return min(value, 1 + size)
    if EXPERTS.search(name):
        return min(value, 4)
    if value < 128 or not WIDTH.search(name) or KEPT.search(name):
        return value
    if queries > left and value % queries == 0 and value // queries * left >= 32:
        return value // queries * left
    while value % 2 == 0 and value // 2 >= 64 * size:
        value //= 2
    return value
