"""What of one call's result counts: as asked for by `outputs`, or else as its kind and the graph say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from permgraph.capture.by_products import intermediate
from permgraph.capture.counting import AllBut, Outputs, Returned
from permgraph.capture.outputs import named_tensors, tensor_leaves
from permgraph.errors import SpecError

_SHOWN = 24  #: names in a message


def check_outputs(outputs: Outputs) -> None:
    """Raise SpecError unless this is a word, names, a function or None."""
    if outputs is None or isinstance(outputs, (str, AllBut)) or callable(outputs):
        return
    if not isinstance(outputs, Sequence) or not outputs or not all(isinstance(name, str) for name in outputs):
        raise SpecError(
            f"outputs is {outputs!r}; it may be 'final', 'all', names of outputs, or a function that is given what "
            "forward returned"
        )


def said_of(
    calls: Sequence[Any], tensors: Sequence[Tensor], nodes: Sequence[fx.Node], outputs: Outputs, *, strict: bool
) -> list[Returned]:
    """What is said of each of these tensors, computed by these nodes, that some calls of a module returned.

    One that counts in any call does. If `strict`, names that are not there and functions that fail raise SpecError;
    else, as where training mode returns something else, all that such a call returns counts.
    """
    node_of = {id(tensor): node for tensor, node in zip(tensors, nodes, strict=True)}
    names: dict[int, dict[str, None]] = {}
    count: set[int] = set()
    for result in calls:
        named = named_tensors(result)
        for tensor, paths in named:
            names.setdefault(id(tensor), {}).update(dict.fromkeys(paths))
        count |= _counting(result, named, node_of, outputs, strict)
    return [Returned(tuple(names[id(tensor)]), id(tensor) in count) for tensor in tensors]


def _counting(
    result: Any,
    named: Sequence[tuple[Tensor, tuple[str, ...]]],
    node_of: Mapping[int, fx.Node],
    outputs: Outputs,
    strict: bool,
) -> set[int]:
    """The identities of the tensors of one call's result that count."""
    everything = {id(tensor) for tensor, _ in named}
    if outputs == "all" or (outputs is None and _field_names(result) is None):
        return everything
    if outputs is None or outputs == "final":
        parts = [
            field for field in _field_names(result) or () if _field_names(getattr(result, field, None)) is not None
        ]
        of_parts = {node_of[id(t)] for t, paths in named if all(path.split(".")[0] in parts for path in paths)}
        left_out = intermediate([node_of[id(tensor)] for tensor, _ in named], of_parts)
        first = _first_field(result) if outputs is None else set()
        return first | {at for at in everything if node_of[at] not in left_out}
    if isinstance(outputs, AllBut):
        return {id(tensor) for tensor, paths in named if not set(outputs.names).intersection(paths)}
    try:
        if callable(outputs):
            return _given_by(outputs, result, everything)
        return _called([outputs] if isinstance(outputs, str) else outputs, named)
    except SpecError:
        if strict:
            raise
        return everything


def _given_by(function: Any, result: Any, everything: set[int]) -> set[int]:
    try:
        part = {id(tensor) for tensor in tensor_leaves(function(result))}
    except Exception as error:
        raise SpecError(
            f"the function outputs= failed on what forward returned, a {type(result).__name__}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not part or not part <= everything:
        what = "a tensor that forward did not return" if part else "no tensor"
        raise SpecError(f"the function outputs= gave {what}: it is to give a part of its argument, such as out.logits")
    return part


def _called(names: Sequence[str], named: Sequence[tuple[Tensor, tuple[str, ...]]]) -> set[int]:
    """The tensors of these names, and those inside what has one of these names."""
    found: set[int] = set()
    for name in names:
        own = {id(t) for t, paths in named if any(path == name or path.startswith(f"{name}.") for path in paths)}
        if not own:
            known = list(dict.fromkeys(path for _, paths in named for path in paths[:1]))
            more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
            raise SpecError(
                f"outputs= names {name!r}, which the model does not return; it returns "
                f"{', '.join(known[:_SHOWN])}{more}"
            )
        found |= own
    return found


def _field_names(result: Any) -> list[str] | None:
    """The fields of a result whose class gives them names, a dataclass or a named tuple; None if it is another."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return [field.name for field in dataclasses.fields(result)]
    fields = getattr(type(result), "_fields", None)
    return list(fields) if isinstance(result, tuple) and isinstance(fields, tuple) else None


def _first_field(result: Any) -> set[int]:
    """The tensors in the first field that holds any but scalars: a loss may stand before it."""
    for name in _field_names(result) or ():
        found = {id(tensor) for tensor in tensor_leaves(getattr(result, name, None)) if tensor.ndim}
        if found:
            return found
    return set()
