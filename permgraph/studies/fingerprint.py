"""The content of a value as a short text: equal contents have equal fingerprints, in any process and on any machine.

Cells of a study are stored under the fingerprint of everything that they depend on. An object that cannot say what its
content is is refused rather than guessed at: a wrong fingerprint would show an old result as a new one.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import nn

from permgraph.errors import StudyError


def fingerprint(value: Any) -> str:
    """Return 32 hexadecimal digits that stand for the content of `value`.

    Numbers, texts, containers, tensors, arrays, modules (class, structure and weights), dataclasses, functions (their
    source and what they close over), loaders over such data, and objects made of these. An object may say itself what
    it is, by a method ``fingerprint()`` or an attribute ``fingerprint`` that is a text.

    Raises:
        StudyError: some part has no content that could be read; the message says which.
    """
    digest = hashlib.sha256()
    for piece in _pieces(value, "value", {}):
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()[:32]


def _pieces(value: Any, where: str, open_: dict[int, int]) -> Iterator[bytes]:
    """What is hashed: every piece is prefixed by its length, so that no two values run together alike."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        yield f"{type(value).__name__}:{value!r}".encode()
        return
    if id(value) in open_:  # a cycle: name it by how far up it closes
        yield f"cycle:{len(open_) - open_[id(value)]}".encode()
        return
    open_[id(value)] = len(open_)
    try:
        yield from _compound(value, where, open_)
    finally:
        del open_[id(value)]


def _compound(value: Any, where: str, open_: dict[int, int]) -> Iterator[bytes]:
    own = _own(value)
    if own is not None:
        yield f"own:{_path(type(value))}:{own}".encode()
    elif isinstance(value, torch.Tensor):
        yield from _tensor(value, where)
    elif isinstance(value, (np.ndarray, np.generic)):
        yield from _array(np.asarray(value), where)
    elif isinstance(value, (torch.dtype, torch.device, torch.Size, enum.Enum, range, slice, PurePath)):
        yield f"{type(value).__name__}:{value}".encode()
    elif isinstance(value, type):
        yield f"class:{_path(value)}".encode()
    elif isinstance(value, torch.Generator):
        yield f"generator:{value.initial_seed()}".encode()
    elif isinstance(value, nn.Module):
        yield f"module:{_path(type(value))}:{value!r}".encode()
        yield from _pieces(dict(value.state_dict()), f"{where}.state_dict()", open_)
        yield from _pieces({name: part.training for name, part in value.named_modules()}, where, open_)
    elif isinstance(value, Mapping):
        yield f"mapping:{len(value)}".encode()
        for key in sorted(value, key=lambda key: (type(key).__name__, repr(key))):
            yield from _pieces(key, f"a key of {where}", open_)
            yield from _pieces(value[key], f"{where}[{key!r}]", open_)
    elif isinstance(value, Set):
        yield f"set:{len(value)}".encode()
        yield from sorted(fingerprint(item).encode() for item in value)
    elif isinstance(value, functools.partial):
        yield b"partial"
        for part in (value.func, value.args, value.keywords):
            yield from _pieces(part, f"{where}, a partial", open_)
    elif isinstance(value, types.MethodType):
        yield f"method:{value.__func__.__qualname__}".encode()
        yield from _pieces(value.__self__, f"{where}.__self__", open_)
    elif isinstance(value, types.FunctionType):
        yield from _function(value, where, open_)
    elif isinstance(value, types.BuiltinFunctionType):
        yield f"builtin:{value.__module__}.{value.__qualname__}".encode()
    elif isinstance(value, Sequence):
        yield f"sequence:{len(value)}".encode()
        for index, item in enumerate(value):
            yield from _pieces(item, f"{where}[{index}]", open_)
    elif dataclasses.is_dataclass(value):
        yield f"dataclass:{_path(type(value))}".encode()
        for field in dataclasses.fields(value):
            if field.compare:
                yield from _pieces(getattr(value, field.name), f"{where}.{field.name}", open_)
    elif isinstance(value, types.ModuleType):
        yield f"import:{value.__name__}".encode()
    elif hasattr(value, "__dict__") and not isinstance(value, (Iterator, types.FrameType, types.CodeType)):
        yield f"object:{_path(type(value))}".encode()
        yield from _pieces(vars(value), where, open_)
    else:
        raise StudyError(
            f"{where} is a {_path(type(value))}, whose content cannot be read, so results that depend on it cannot be "
            "found again: give it an attribute `fingerprint`, a text that changes whenever the results do"
        )


def _own(value: Any) -> str | None:
    """What a value says of itself; a class's unbound method says nothing of an instance."""
    if isinstance(value, (type, types.ModuleType, types.FunctionType)):
        text = vars(value).get("fingerprint") if isinstance(value, types.FunctionType) else None
    else:
        text = getattr(value, "fingerprint", None)
        if callable(text):
            text = text()
    return text if isinstance(text, str) else None


def _tensor(value: torch.Tensor, where: str) -> Iterator[bytes]:
    if value.is_meta:
        raise StudyError(f"{where} is on the meta device: it has no values")
    yield f"tensor:{value.dtype}:{tuple(value.shape)}".encode()
    flat = value.detach().to("cpu").resolve_conj().resolve_neg().contiguous().reshape(-1)
    yield flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _array(value: np.ndarray[Any, Any], where: str) -> Iterator[bytes]:
    if value.dtype.hasobject:
        raise StudyError(f"{where} is an array of Python objects: convert it to numbers")
    yield f"array:{value.dtype.str}:{value.shape}".encode()
    yield np.ascontiguousarray(value).tobytes()


def _function(value: types.FunctionType, where: str, open_: dict[int, int]) -> Iterator[bytes]:
    try:
        source = inspect.getsource(value)
    except (OSError, TypeError):  # typed at a prompt
        source = json.dumps([value.__code__.co_code.hex(), [repr(constant) for constant in value.__code__.co_consts]])
    yield f"function:{value.__qualname__}:{source}".encode()
    yield from _pieces(value.__defaults__, f"the defaults of {where}", open_)
    yield from _pieces(value.__kwdefaults__, f"the defaults of {where}", open_)
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        yield name.encode()
        try:
            content = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        yield from _pieces(content, f"{name!r}, which {where} closes over,", open_)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
