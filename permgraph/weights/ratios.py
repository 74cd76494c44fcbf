"""Ratios of a merge by parameter: one for all, by patterns of names, or a schedule over the layers."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from permgraph.errors import EvaluationError, MismatchError

Ratios: TypeAlias = float | Sequence[float] | Mapping[str, float]
"""How far each parameter goes from A (0) to B (1): a number; a mapping from patterns of names (as in `fnmatch`), the
first that fits counting; or a schedule, numbers that are spread evenly over the layers, with lines between them."""


def ratios_of(names: Iterable[str], given: Ratios) -> dict[str, float]:
    """The ratio of each parameter, by its name.

    The layers of a schedule are what the names have up to their first whole number, such as ``model.layers.3`` and
    ``layer1.0``, in the order of what stands before it and then by the number; where no name has one, the modules in
    their order. The first number of the schedule is the first layer's, and that of the names before it; the last one
    that of the last, and of the names behind it.

    Raises:
        EvaluationError: a ratio is not a finite number, or there is none.
        MismatchError: a pattern fits no name, or a name no pattern.

    Example:
        >>> ratios_of(["embed.weight", "layers.0.w", "layers.1.w", "layers.2.w", "head.w"], (0, 1))
        {'embed.weight': 0.0, 'layers.0.w': 0.0, 'layers.1.w': 0.5, 'layers.2.w': 1.0, 'head.w': 1.0}
        >>> ratios_of(["embed.weight", "head.w"], {"head.*": 0.25, "*": 0.5})
        {'embed.weight': 0.5, 'head.w': 0.25}
    """
    names = list(names)
    if isinstance(given, Mapping):
        return _by_patterns(names, {pattern: _number(ratio) for pattern, ratio in given.items()})
    if isinstance(given, str) or not isinstance(given, Sequence):
        return dict.fromkeys(names, _number(given))
    schedule = [_number(ratio) for ratio in given]
    if not schedule:
        raise EvaluationError("the schedule of ratios is empty: give one number, or more")
    depths = _depths(names)
    deepest = max(depths.values(), default=0)
    return {name: _on(schedule, depth / deepest if deepest else 0.0) for name, depth in depths.items()}


def _number(ratio: object) -> float:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not math.isfinite(ratio):
        raise EvaluationError(
            f"t must be finite, not {ratio}: the ratio of each parameter is a number, 0 for A, 1 for B"
        )
    return float(ratio)


def _by_patterns(names: Sequence[str], given: Mapping[str, float]) -> dict[str, float]:
    for pattern in given:
        if not fnmatch.filter(names, pattern):
            raise MismatchError(f"no parameter fits the pattern {pattern!r}: there are {', '.join(names[:4])}, ...")
    found = {}
    for name in names:
        fitting = next((ratio for pattern, ratio in given.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if fitting is None:
            raise MismatchError(f"no pattern of the ratios fits {name!r}: end them with '*' for all others")
        found[name] = fitting
    return found


def _depths(names: Sequence[str]) -> dict[str, int]:
    """The number of each name's layer, from 0; names outside of layers have that of the layer before them."""
    layers = {name: layer_of(name) for name in names}
    if not any(layers.values()):
        layers = {name: name.rpartition(".")[0] for name in names}
        order = {layer: depth for depth, layer in enumerate(dict.fromkeys(layers.values()))}
    else:
        lists = {before: at for at, before in enumerate(dict.fromkeys(map(_list, filter(None, layers.values()))))}
        known = dict.fromkeys(filter(None, layers.values()))
        # A file may have the names in the order of the alphabet, the tenth layer before the second.
        known_in_order = sorted(known, key=lambda layer: (lists[_list(layer)], int(layer.rpartition(".")[2])))
        order = {layer: depth for depth, layer in enumerate(known_in_order)}
    depth, found = 0, {}
    for name, layer in layers.items():
        depth = order.get(layer, depth)
        found[name] = depth
    return found


def _list(layer: str) -> str:
    return layer.rpartition(".")[0]


def layer_of(name: str) -> str:
    """What a name has up to its first whole number; empty where it has none."""
    parts = name.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdecimal()), None)
    return "" if at is None else ".".join(parts[: at + 1])


def _on(schedule: Sequence[float], place: float) -> float:
    """The value of a schedule at a place from 0 to 1, on the line between its neighbours."""
    at = place * (len(schedule) - 1)
    below = min(int(at), max(0, len(schedule) - 2))
    above = min(below + 1, len(schedule) - 1)
    return schedule[below] + (at - below) * (schedule[above] - schedule[below])
