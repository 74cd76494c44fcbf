"""The file from which an interrupted run of a matcher that trains goes on, and what it must have in common."""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader

from permgraph.errors import CheckpointError
from permgraph.io.files import write_atomically
from permgraph.networks.batches import Loader
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.weights.state_dict import StateDict

VERSION = 3


def write_run(path: str | os.PathLike[str], identity: Mapping[str, str], state: Mapping[str, Any], kind: str) -> None:
    """Write the state of a run of this kind, such as "straight-through", as a whole or not at all."""
    file = io.BytesIO()
    torch.save({"format": _format(kind), "version": VERSION, "identity": dict(identity), **state}, file)
    write_atomically(path, file.getvalue())


def read_run(path: str | os.PathLike[str], identity: Mapping[str, str], kind: str) -> dict[str, Any] | None:
    """The state of the run in a file; None if there is no file.

    Raises:
        CheckpointError: it is damaged, of another version, or of a run with another identity; the message says in what.
    """
    if not Path(path).exists():
        return None
    where = os.fspath(path)
    try:
        saved: dict[str, Any] = torch.load(where, map_location="cpu", weights_only=True)
        found, version = saved["format"], saved["version"]
    except Exception as error:
        raise CheckpointError(f"{where}: not the checkpoint of a {kind} run: {error}") from error
    if (found, version) != (_format(kind), VERSION):
        raise CheckpointError(f"{where}: holds {found!r}, version {version}; this permgraph reads version {VERSION}")
    different = [name for name, value in identity.items() if saved["identity"].get(name) != value]
    if different:
        raise CheckpointError(
            f"{where}: belongs to another run, with other {', '.join(different)}: give another path, or delete it"
        )
    return saved


def _format(kind: str) -> str:
    return f"permgraph {kind} run"


def identity_of(
    spec: PermutationSpec,
    weights: tuple[StateDict, StateDict],
    seed: int,
    settings: Any,
    compared: Sequence[str],
    optimizer: torch.optim.Optimizer | None,
) -> dict[str, str]:
    """What must be the same for a run to go on: each thing's name, and its value or a digest of it.

    Args:
        spec: that of the models.
        weights: A's and B's tensors.
        seed: of the run.
        settings: the matcher, with a loader, a loss, a matcher inside and where it begins.
        compared: those of its other settings that must be the same.
        optimizer: before its rates fall, say; None if there is nothing to train.
    """
    groups = [] if optimizer is None else optimizer.param_groups
    rates = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    return {
        "spec": spec.fingerprint,
        "weights of A": digest(weights[0]),
        "weights of B": digest(weights[1]),
        "seed": str(seed),
        **{name: str(getattr(settings, name)) for name in compared},
        "optimizer": "none" if optimizer is None else type(optimizer).__name__,
        "optimizer's settings": described(rates),
        **{name: described(getattr(settings, name)) for name in ("loader", "loss", "matcher", "init")},
    }


RandomState: TypeAlias = dict[str, torch.Tensor | None]


def random_state(device: torch.device, loader: Loader) -> RandomState:
    """The states of torch's generators and of the loader's own."""
    generator = getattr(loader, "generator", None)
    return {
        "random": torch.get_rng_state(),
        "random on the GPU": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "random of the loader": None if generator is None else generator.get_state(),
    }


def restore_random_state(state: Mapping[str, Any], device: torch.device, loader: Loader) -> None:
    """Put back what `random_state` gave, or what a file holds of it."""
    torch.set_rng_state(state["random"])
    if state["random on the GPU"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["random on the GPU"], device)
    generator = getattr(loader, "generator", None)
    if generator is not None and state["random of the loader"] is not None:
        generator.set_state(state["random of the loader"])


def digest(tensors: StateDict) -> str:
    """A digest of the names and values of tensors."""
    made = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        made.update(name.encode())
        made.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def described(value: Any) -> str:
    """A setting as text that is the same in every process: no addresses, and functions by their code.

    A loader is described by its kind and sizes, since its batches may be drawn at random.
    """
    if isinstance(value, Permutation):
        return digest({name: torch.from_numpy(np.array(array)) for name, array in value.arrays.items()})
    if isinstance(value, Transformation):
        parts = ((kind, getattr(value, kind)) for kind in ("matrices", "scales", "signs", "gains"))
        arrays = {f"{kind}/{name}": torch.tensor(array) for kind, held in parts for name, array in held.items()}
        return f"{described(value.permutation)} {digest(arrays)}"
    if isinstance(value, torch.Tensor):
        return digest({"": value})
    if isinstance(value, DataLoader):
        size = len(value.dataset) if hasattr(value.dataset, "__len__") else None
        kinds = (type(part).__name__ for part in (value, value.dataset, value.sampler))
        return f"{' of '.join(kinds)}: {size} samples by {value.batch_size}, {value.drop_last}"
    if is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}({[(f.name, described(getattr(value, f.name))) for f in fields(value)]})"
    if isinstance(value, functools.partial):
        return f"{described(value.func)}({described(value.args)}, {described(value.keywords)})"
    if isinstance(value, Mapping):
        return str({str(key): described(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return f"{len(value)}: {list(map(described, value))}"
    if isinstance(value, torch.nn.Module):
        return f"{value!r} {digest(value.state_dict())}"
    if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype)):
        return repr(value)
    name = str(getattr(value, "__qualname__", type(value).__qualname__))
    if isinstance(value, FunctionType) and "<" in name:  # a lambda, or local: many may have this name
        inside = inspect.getclosurevars(value).nonlocals
        plain = {key: item.__qualname__ if isinstance(item, FunctionType) else item for key, item in inside.items()}
        return f"{name} {_code(value.__code__)} {described(value.__defaults__)} {described(plain)}"
    return f"{getattr(value, '__module__', '')}.{name}"


def _code(code: CodeType) -> str:
    constants = [
        _code(part) if isinstance(part, CodeType) else sorted(map(repr, part)) if isinstance(part, frozenset) else part
        for part in code.co_consts
    ]
    return hashlib.sha256(f"{code.co_code.hex()} {code.co_names} {constants}".encode()).hexdigest()
