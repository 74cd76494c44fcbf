"""``--matcher``: one table of the library's matchers, and how the options make one of them."""

from __future__ import annotations

import ast
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from permgraph import matching
from permgraph.cli.data import loss_on
from permgraph.cli.options import MatcherName, Matching
from permgraph.conventions.renamed import former_names
from permgraph.errors import MismatchError
from permgraph.io import Checkpoint
from permgraph.matching import Matcher, StreamedWeightMatching, WeightMatching
from permgraph.matching.general.cost import in_memory_bytes

M = TypeVar("M")

OPTIONAL = ("max_batches", "memory")
"""Settings that may be None, for no limit."""

MATCHERS: dict[MatcherName, Callable[..., Matcher]] = {name: matching.MATCHERS[name.value] for name in MatcherName}


def matcher_of(
    asked: Matching,
    checkpoint: Checkpoint,
    loader: Iterable[Any] | None,
    class_dim: int = 1,
    *,
    general: bool = False,
) -> Matcher:
    """The matcher that the options ask for; weight matching is streamed where memory is short, unless they say.

    Args:
        asked: the options; what they leave out is as the library has it.
        checkpoint: one of those to match.
        loader: the batches of ``--data``, if that was given.
        class_dim: the dimension of the networks' logits that holds the classes.
        general: whether general symmetries are asked for, which take more memory.

    Raises:
        MismatchError: the options do not go together, or a setting is not one of the matcher's.
        PermgraphError: the matcher refuses a value.
    """
    name = asked.matcher
    settings = dict(map(_setting, asked.settings or ()))
    weight: dict[str, Any] = {
        "init": asked.init and asked.init.value,
        "objective": asked.objective and asked.objective.value,
        "restarts": asked.restarts,
        "max_sweeps": asked.max_sweeps,
    }
    weight = {key: value for key, value in weight.items() if value is not None}
    if name is MatcherName.weight:
        streamed = asked.stream
        if streamed is None:
            streamed = _memory_is_short(checkpoint, general) and not {"objective", "restarts"} & {*weight, *settings}
        if streamed:
            if {"objective", "restarts"} & weight.keys():
                raise MismatchError("--stream matches once, by inner products: leave out --objective and --restarts")
            return _changed(StreamedWeightMatching(), {**weight, **settings})
        return _changed(WeightMatching(), {**weight, **settings})
    if asked.stream:
        raise MismatchError(f"--stream reads tensors as weight matching needs them; {name.value} needs whole networks")
    make = MATCHERS[name]
    fields = {field.name: field for field in dataclasses.fields(make)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    if "loader" in fields:
        if loader is not None:
            given["loader"] = loader
            if "loss" in fields:
                given["loss"] = loss_on(class_dim)
            if name is MatcherName.sinkhorn:
                settings = {"objective": "midpoint", **settings}  # else the data would count for nothing
        elif fields["loader"].default is dataclasses.MISSING:
            raise MismatchError(f"--matcher {name.value} runs the networks: say --data")
    made = make(**given)
    if weight:
        inner = _ascent(made)
        if inner is None:
            wrong = " ".join(f"--{key.replace('_', '-')}" for key in weight)
            raise MismatchError(f"--matcher {name.value} has no weight matching in it: leave out {wrong}")
        made = dataclasses.replace(made, **{inner: _changed(getattr(made, inner), weight)})  # type: ignore[type-var]
    return _changed(made, settings)


def describe(value: Any) -> Any:
    """A matcher as plain data that is the same in every run, without loaders and modules."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            "kind": type(value).__name__,
            **{
                field.name: describe(getattr(value, field.name))
                for field in dataclasses.fields(value)
                if field.name not in ("loader", "models", "keep", "watch", "done")
            },
        }
    if isinstance(value, (tuple, list)):
        return list(map(describe, value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__qualname__", type(value).__name__)


def _ascent(matcher: Any) -> str | None:
    """The field that holds the weight matching inside another matcher."""
    return next(
        (f.name for f in dataclasses.fields(matcher) if isinstance(getattr(matcher, f.name), WeightMatching)), None
    )


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip().replace("-", "_").isidentifier():
        raise MismatchError(f"--set {text!r}: give a name and a value, as in epochs=10")
    try:
        found = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = value.strip()
    return name.strip().replace("-", "_"), found


def _changed(matcher: M, settings: Mapping[str, Any]) -> M:
    """The matcher with other values in fields that hold plain ones, its own or those of the weight matching in it."""

    former = former_names(type(matcher))
    settings = {former.get(name, name): value for name, value in settings.items()}
    inner = _ascent(matcher)
    own = _plain(matcher)
    nested = _plain(getattr(matcher, inner)) if inner else {}
    for name, value in list(settings.items()):
        if name not in own and name not in nested:
            known = ", ".join(sorted({*own, *nested})) or "none"
            raise MismatchError(f"{type(matcher).__name__} has no setting {name!r}; it has {known}")
        old = own.get(name, nested.get(name))
        value = settings[name] = _as_list(value) if isinstance(old, tuple) else value
        fits = isinstance(value, (int, float, NoneType)) if old is None else _alike(old, value)
        if not fits and not (value is None and name in OPTIONAL):
            raise MismatchError(f"--set {name}={value!r}: it should be like {'a number' if old is None else repr(old)}")
    mine = {name: value for name, value in settings.items() if name in own}
    if inner and len(mine) < len(settings):
        rest = {name: value for name, value in settings.items() if name not in own}
        mine[inner] = dataclasses.replace(getattr(matcher, inner), **rest)
    return dataclasses.replace(matcher, **mine)  # type: ignore[type-var]


def _as_list(value: Any) -> tuple[Any, ...]:
    """What was given for a list: ``a,b`` and ``a`` are one, as ``('a', 'b')`` is."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _plain(owner: Any) -> dict[str, Any]:
    """The fields of a matcher that a text can set, and what they hold."""
    kinds = get_type_hints(type(owner))
    found = {}
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        number = value is None and bool({int, float} & {*get_args(kinds[field.name])})
        if number or (isinstance(value, (bool, int, float, str, tuple)) and field.name != "done"):
            found[field.name] = value
    return found


def _alike(old: Any, new: Any) -> bool:
    if isinstance(old, tuple):
        return isinstance(new, tuple) and all(_alike(old[0], item) for item in new if old)
    if isinstance(old, bool) or isinstance(new, bool):
        return isinstance(old, bool) and isinstance(new, bool)
    if isinstance(old, (int, float)):
        return isinstance(new, int) or (isinstance(old, float) and isinstance(new, float))
    return isinstance(new, type(old))


def _memory_is_short(checkpoint: Checkpoint, general: bool) -> bool:
    elements = sum(math.prod(form.shape) for form in checkpoint.formats.values())
    if general:
        return in_memory_bytes(elements) + 2 * checkpoint.nbytes > 0.5 * machine_memory()
    # Two models in float32, the renumbered copy of one, and Gram matrices: up to four times the weights.
    return 16 * elements > 0.5 * machine_memory()


def machine_memory() -> float:
    """Bytes of physical memory; infinite where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # Windows
        return math.inf
