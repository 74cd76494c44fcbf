"""Models whose tied tensors are made tensors of their own, as where a head is no longer the embedding's table."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from permgraph.capture.state import tensor_key
from permgraph.errors import CaptureError

FLAG = "tie_word_embeddings"
"""What Hugging Face's configurations say of tied tables."""


def untied(model: nn.Module, *, share: bool = False) -> nn.Module:
    """A copy of a module in which parameters that several of its modules share are each their own, of the same values.

    A module that has several names stays one. Where a configuration says that word embeddings are tied, the copy's says
    that they are not.

    Args:
        model: the module, which is not changed.
        share: the copy holds the very tensors of the module, but for those that are untied: to look at, not to load or
            train. If nothing is tied, it is the module itself.

    Raises CaptureError if the module cannot be copied.

    Example:
        >>> net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        >>> net[1].weight = net[0].weight
        >>> apart = pg.untied(net)
        >>> apart[1].weight is apart[0].weight, bool((apart[1].weight == net[1].weight).all())
        (False, True)
    """
    apart = sources_of_ties(model)
    if share and not apart:
        return model
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())} if share else {}
    try:
        copied = copy.deepcopy(model, shared)
    except Exception as error:  # of a module's own making
        raise CaptureError(
            f"{type(model).__name__} cannot be copied, which untying its weights takes: {type(error).__name__}: {error}"
        ) from error
    for name in apart:
        path, _, attribute = name.rpartition(".")
        owner = copied.get_submodule(path)
        old = owner._parameters[attribute]
        assert old is not None
        owner._parameters[attribute] = nn.Parameter(old.detach().clone(), old.requires_grad)
    config = getattr(copied, "config", None)
    for part in (config, *getattr(config, "__dict__", {}).values()):
        if getattr(part, FLAG, False):
            setattr(part, FLAG, False)
    return copied


def sources_of_ties(model: nn.Module) -> dict[str, str]:
    """For each name under which a further module holds a parameter the first name of that parameter."""
    first: dict[Any, tuple[str, set[tuple[int, str]]]] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, attribute = name.rpartition(".")
        holder = id(model.get_submodule(path)), attribute
        source, holders = first.setdefault(tensor_key(parameter), (name, {holder}))
        if holder not in holders:
            holders.add(holder)
            found[name] = source
    return found


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a Hugging Face folder's ``config.json``, saying that no word embeddings are tied."""

    def changed(part: Any) -> Any:
        return untied_config(part) if isinstance(part, Mapping) and FLAG in part else part

    return {name: changed(part) for name, part in config.items()} | {FLAG: False}
