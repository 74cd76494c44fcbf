"""Keys of a checkpoint that its model does not know: which may stay as they are, and what is said of the others."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from permgraph.cli.models import build
from permgraph.cli.screen import Screen
from permgraph.errors import MismatchError, PermgraphError
from permgraph.io import Checkpoint
from permgraph.spec.spec import PermutationSpec

ROTARY = r"rotary_emb\.inv_freq"
"""The buffer that each layer had once, and that transformers leaves unread since the model has it."""

_SHOWN = 4


def left_out(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    spec: PermutationSpec,
    leave: Sequence[str],
    model: str,
    screen: Screen,
) -> frozenset[str]:
    """The keys that the spec does not know and that are left as they are; notes say which, and why.

    These are what ``--leave`` names, what the model's own library leaves unread, which are buffers that it computes by
    itself and those that its class names in ``_keys_to_ignore_on_load_unexpected``, and single numbers.

    Args:
        checkpoint: whose keys these are.
        names: each key to the model's name for it.
        spec: what is known.
        leave: patterns of keys.
        model: as it is named on the command line; empty if only the spec is known.
        screen: is told of what is left.

    Raises:
        MismatchError: other keys are not known; the message names them, and patterns that would leave them.
    """
    known = {*spec.tensors, *spec.aliases, *spec.unused}
    types = {key: form.dtype for key, form in checkpoint.formats.items()}
    floating = {key for key, dtype in types.items() if dtype.is_floating_point or dtype.is_complex}
    extra = [key for key, name in names.items() if name not in known]
    asked = [key for key in extra if any(fnmatch.fnmatchcase(text, p) for p in leave for text in (key, names[key]))]
    rest = [key for key in extra if key in floating and key not in set(asked)]
    _refuse_scales(checkpoint, names, extra, known)
    single = [key for key in rest if math.prod(checkpoint.formats[key].shape) == 1]  # nothing in there can move
    unread = [*single, *_unread(model, [key for key in rest if key not in single])] if rest else []
    refused = [key for key in rest if key not in set(unread)]
    if refused:
        patterns = " ".join(f"--leave '{pattern}'" for pattern in _patterns(refused)[:_SHOWN])
        raise MismatchError(
            f"{_counted(refused)} the model does not know: {_listed(refused)}. Should nothing in there go with the "
            f"model's units, leave them as they are: {patterns}"
        )
    if unread:
        screen.note(
            f"{checkpoint.path}: {_counted(unread)} the model leaves unread stay as they are: {_listed(unread)}"
        )
    if asked:
        screen.note(f"{checkpoint.path}: --leave: {_counted(asked, '')} left as they are: {_listed(asked)}")
        copies = [key for key in asked if key in floating and _original(key, checkpoint, spec)]
        if copies:
            screen.note(
                f"{checkpoint.path}: of these {len(copies)} have the names and shapes of the model's own weights after "
                f"a prefix, as averages of them do, and no longer go with them: {_listed(copies)}"
            )
    return frozenset((*asked, *unread))


def _refuse_scales(
    checkpoint: Checkpoint, names: Mapping[str, str], extra: Sequence[str], known: Iterable[str]
) -> None:
    """Raise MismatchError where weights in eight bits have factors beside them: their values are not the weights."""
    codes = {name: key for key, name in names.items() if checkpoint.formats[key].dtype.itemsize == 1}
    small = {name: key for name, key in codes.items() if name in set(known)}
    for key in extra if small else ():
        module = names[key].rpartition(".")[0]
        if "scale" in names[key].rpartition(".")[2].lower():
            weight = next((k for name, k in small.items() if name.rpartition(".")[0] == module), None)
            if weight is not None:
                raise MismatchError(
                    f"{weight!r} is {checkpoint.formats[weight].dtype}, and {key!r} scales it: values are compared and "
                    "averaged as they stand, so dequantise first"
                )


def require_matched(patterns: Sequence[str], checkpoints: Iterable[Checkpoint]) -> None:
    """Raise MismatchError if a pattern of ``--leave`` matches no key of any checkpoint."""
    keys = [key for checkpoint in checkpoints for key in checkpoint]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(key, pattern) for key in keys):
            raise MismatchError(f"--leave {pattern!r} matches no key of the checkpoints, which have {_listed(keys)}")


def _unread(model: str, keys: Sequence[str]) -> list[str]:
    """Which keys the library that loads the model leaves unread."""
    if not model or not keys:
        return []
    try:
        module = build(model)
    except PermgraphError:  # then nothing is known of it
        return []
    computed = dict(module.named_buffers()).keys() - module.state_dict().keys()
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    patterns = [*ignored, *([ROTARY] if any(name.endswith("rotary_emb.inv_freq") for name in computed) else ())]
    return [key for key in keys if key in computed or any(re.search(pattern, key) for pattern in patterns)]


def _original(key: str, checkpoint: Checkpoint, spec: PermutationSpec) -> str | None:
    """The parameter whose name a key has after a prefix, and whose shape it has, if it is one that moves."""
    name = key
    while "." in name:
        name = name.partition(".")[2]
        canonical = spec.aliases.get(name, name)
        if canonical in spec.tensors:
            return canonical if spec.tensors[canonical] == checkpoint.formats[key].shape else None
    return None


def _patterns(keys: Iterable[str]) -> list[str]:
    """Patterns that match these keys, one for all that differ in their numbers alone."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", key) for key in keys))


def _counted(keys: Sequence[str], which: str = " that") -> str:
    return f"{len(keys)} key{'s' if len(keys) != 1 else ''}{which}"


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(map(repr, keys[:_SHOWN])) + more
