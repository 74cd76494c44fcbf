"""Which parameter each key belongs to: under prefixes, as masks of pruned weights, and as parts of adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from permgraph.errors import MismatchError
from permgraph.io import match_names
from permgraph.spec.data import SpecData
from permgraph.spec.expressions import Axis

Part = Literal["whole", "mask", "in", "out", "magnitude", "gate"]


class Entry(NamedTuple):
    """What a key holds of a parameter.

    Attributes:
        name: of the parameter.
        part: all of it; a mask of its shape; a factor with its inputs or with its outputs; a magnitude for each output;
            or a gate for each output or input.
        at: which dimension of a factor is the parameter's.
        embedding: whether the parameter is a table, whose rows are its inputs.
    """

    name: str
    part: Part = "whole"
    at: int = 0
    embedding: bool = False


#: How adapters call their tensors, in PEFT and elsewhere, as ``module.WORD[.adapter][.weight]``.
WORDS: dict[str, tuple[Part, int, bool]] = {
    "lora_A": ("in", 1, False),
    "lora_B": ("out", 0, False),
    "lora_down": ("in", 1, False),
    "lora_up": ("out", 0, False),
    "lora_embedding_A": ("in", 1, True),
    "lora_embedding_B": ("out", 0, True),
    "lora_magnitude_vector": ("magnitude", 0, False),
    "hada_w1_a": ("out", 0, False),
    "hada_w1_b": ("in", 1, False),
    "hada_w2_a": ("out", 0, False),
    "hada_w2_b": ("in", 1, False),
    "ia3_l": ("gate", 0, False),
}
_FACTOR = re.compile(rf"(?P<module>.+)\.(?P<word>{'|'.join(WORDS)})(?:\.(?!bias$)[^.]+)?(?:\.weight)?")
_BIAS = re.compile(r"(?P<module>.+)\.(?:lora_B|lora_up)(?:\.[^.]+)?\.bias")
_WRAPPED = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+|modules_to_save)(?=\.)")
ADAPTER = re.compile(rf"\.(?:{'|'.join(WORDS)})(?:\.|$)")


def entries(keys: Iterable[str], spec: SpecData) -> dict[str, Entry]:
    """What each key holds of which parameter; keys that belong to none are left out.

    Copies under prefixes of their own, such as averaged weights beside the weights, are each found where they have
    most of the model's names.

    Raises MismatchError if no key belongs to any parameter.
    """
    known = {*spec.tensors, *spec.aliases, *spec.unused}
    held = {key: _entry(key, known) for key in keys}
    waiting = list(dict.fromkeys(entry.name for entry in held.values()))
    found: dict[str, str] = {}
    while waiting:
        try:
            matched, _ = match_names(waiting, known)
        except MismatchError:
            if not found:
                raise
            break
        new = {name: to for name, to in matched.items() if to in known}
        if not new or (found and 2 * len(new) < min(len(known), len(waiting))):
            break
        found |= new
        waiting = [name for name in waiting if name not in new]
    return {key: entry._replace(name=found[entry.name]) for key, entry in held.items() if entry.name in found}


def _entry(key: str, known: set[str]) -> Entry:
    """What a key says by itself, whatever prefix stands before it."""
    bare = _WRAPPED.sub("", key)
    if match := _BIAS.fullmatch(bare):
        return Entry(f"{match['module']}.bias")
    if match := _FACTOR.fullmatch(bare):
        part, at, embedding = WORDS[match["word"]]
        return Entry(f"{match['module']}.weight", part, at, embedding)
    for ending, part in (("_orig", "whole"), ("_mask", "mask")):
        if bare.endswith(ending) and not any(name.endswith(ending) for name in known):
            return Entry(bare.removesuffix(ending), part)
    return Entry(bare)


def factored(
    held: Mapping[str, Entry], tensors: Mapping[str, Tensor], spec: SpecData, fan_in_fan_out: bool | None = None
) -> dict[str, tuple[int, int]]:
    """Which dimensions of each parameter with an adapter are its inputs and its outputs, as a pair.

    A weight is (outputs, inputs), or, in GPT-2's layers and in tables, the other way round. The factors' sizes tell,
    where these are equal the bias, and after that the other layers of the adapter.

    Args:
        held: what `entries` found.
        tensors: the adapter.
        spec: of the base.
        fan_in_fan_out: what to take where nothing else tells.
    """
    sizes: dict[str, dict[str, int]] = {}
    tables = set()
    for key, entry in held.items():
        if entry.part in ("in", "out") and tensors[key].ndim > entry.at:
            sizes.setdefault(entry.name, {})[entry.part] = tensors[key].shape[entry.at]
        if entry.embedding:
            tables.add(entry.name)
    found: dict[str, tuple[int, int] | None] = {}
    for name in {entry.name for entry in held.values() if entry.part not in ("whole", "mask")}:
        shape = spec.tensors[spec.aliases.get(name, name)]
        if len(shape) < 2:
            raise MismatchError(f"there is an adapter of {name!r}, of shape {shape}, which is no matrix")
        own = sizes.get(name, {})
        ways = [way for way in ((1, 0), (0, 1)) if all(shape[way[part == "out"]] == size for part, size in own.items())]
        found[name] = (
            (0, 1) if name in tables else ways[0] if len(ways) == 1 else _by_bias(name, spec) if ways else (1, 0)
        )
    told = {way for name, way in found.items() if way is not None and name not in tables}
    fallback = told.pop() if len(told) == 1 else (0, 1) if fan_in_fan_out else (1, 0)
    return {name: way or fallback for name, way in found.items()}


def _axes_of(name: str, spec: SpecData) -> tuple[Axis, ...] | None:
    """The axes of a tensor of the state dict; of one in a stack those of its own dimensions. None if there are none."""
    name = spec.aliases.get(name, name)
    stack, place = spec.in_stack.get(name, (name, ()))
    return spec.axes[stack][len(place) :] if stack in spec.axes else None


def _by_bias(name: str, spec: SpecData) -> tuple[int, int] | None:
    """The inputs and outputs of a square weight, by the axis that it shares with its bias."""
    bias = _axes_of(f"{name.removesuffix('weight')}bias", spec)
    axes = _axes_of(name, spec)
    assert axes is not None
    if bias is None or axes[0] == axes[1] or bias[0] not in axes[:2]:
        return None
    return (1, 0) if bias[0] == axes[0] else (0, 1)
