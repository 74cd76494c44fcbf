"""The straight line between two networks, in the space of their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.errors import MismatchError

StateDict = Mapping[str, Any]


def interpolate(a: StateDict | nn.Module, b: StateDict | nn.Module, t: float) -> dict[str, Tensor]:
    """Return the state dict at ``t`` on the line from ``a`` (``t = 0``) to ``b`` (``t = 1``).

    Floating-point and complex tensors are interpolated linearly, in float32 or better, and keep the dtype and device
    that they have in ``a``; the ends are met exactly. Integer and boolean tensors, such as
    ``num_batches_tracked``, are taken from ``a``. Names that share one tensor in ``a`` share one in the result. ``t``
    outside 0 to 1 extrapolates. Neither input is changed.

    Raises:
        MismatchError: a key is missing from one side, two shapes differ, a tensor is on the meta device or quantised,
            or names that are tied in ``a`` hold different values in ``b``. The message names the first such tensor.
        ValueError: ``t`` is not finite.

    Example:
        >>> a, b = {"weight": torch.zeros(3)}, {"weight": torch.ones(3)}
        >>> interpolate(a, b, 0.25)["weight"]
        tensor([0.2500, 0.2500, 0.2500])
    """
    if not math.isfinite(t):
        raise ValueError(f"t must be finite, not {t}")
    first, second = as_state_dict(a), as_state_dict(b)
    check_same_keys(first, second)
    result: dict[str, Tensor] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, x in first.items():
        y = second[name]
        if not isinstance(x, Tensor):  # a module's extra state
            result[name] = x
            continue
        key = _identity(x)
        earlier = seen.setdefault(key, name)
        if earlier != name:
            other = second[earlier]
            if _identity(other) != _identity(y) and not torch.equal(other, y):
                raise MismatchError(
                    f"{earlier!r} and {name!r} are one tied tensor in a, but hold different values in b: "
                    "the interpolated network could not have a's structure. Untie them in a, or tie them in b."
                )
            result[name] = result[earlier]
        else:
            result[name] = _lerp(x, y, t)
    return result


def blend(states: Sequence[StateDict], shares: Sequence[float]) -> dict[str, Any]:
    """Return a linear combination of state dicts, with the dtypes, devices, ties and integers of the first.

    The shares add up to 1. A state with the whole share is met exactly; one with none may hold anything.
    """
    whole = next((state for state, share in zip(states, shares, strict=True) if share == 1), None)
    if whole is not None:
        return interpolate(states[0], whole, 1.0 if whole is not states[0] else 0.0)
    result: dict[str, Any] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, x in states[0].items():
        if not isinstance(x, Tensor):
            result[name] = x
            continue
        earlier = seen.setdefault(_identity(x), name)
        if earlier != name:
            result[name] = result[earlier]
        elif not _is_continuous(x):
            result[name] = x.detach().clone()
        else:
            total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            for share, state in zip(shares, states, strict=True):
                if share:
                    total.add_(state[name].detach().to(total), alpha=share)
            result[name] = total.to(x.dtype)
    return result


def as_state_dict(network: StateDict | nn.Module) -> StateDict:
    """Return a module's state dict, and a state dict as it is."""
    return network.state_dict() if isinstance(network, nn.Module) else network


def check_same_keys(a: StateDict, b: StateDict, names: tuple[str, str] = ("a", "b")) -> None:
    """Refuse two state dicts of different keys, shapes or kinds, naming the first difference."""
    one, other = names
    for name, x in a.items():
        if name not in b:
            raise MismatchError(f"{name!r} is in {one} but not in {other}{_prefix_hint(name, b)}")
        y = b[name]
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            continue
        if x.shape != y.shape:
            raise MismatchError(f"{name!r} has shape {tuple(x.shape)} in {one} but {tuple(y.shape)} in {other}")
        if _is_continuous(x) != _is_continuous(y):
            raise MismatchError(
                f"{name!r} is {x.dtype} in {one} but {y.dtype} in {other}: one is an integer and one is not"
            )
        for side, tensor in ((one, x), (other, y)):
            if tensor.is_meta:
                raise MismatchError(f"{name!r} in {side} is on the meta device, without values: load the weights first")
            if tensor.is_quantized:
                raise MismatchError(f"{name!r} in {side} is quantised: dequantise the network first")
    for name in b:
        if name not in a:
            raise MismatchError(f"{name!r} is in {other} but not in {one}{_prefix_hint(name, a)}")


def _prefix_hint(name: str, other: StateDict) -> str:
    for key in other:
        if key.endswith("." + name):
            return f", which has {key!r}: strip the prefix {key[: -len(name)]!r}"
        if name.endswith("." + key):
            return f", which has {key!r}: strip the prefix {name[: -len(key)]!r}"
    return ""


def _is_continuous(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _identity(x: Tensor) -> tuple[object, ...]:
    """Equal for two tensors that are one and the same memory. An empty tensor has none, and is only itself."""
    if x.numel() == 0:
        return (id(x),)
    return (x.device, x.dtype, x.data_ptr(), tuple(x.shape), x.stride())


def _lerp(x: Tensor, y: Tensor, t: float) -> Tensor:
    x, y = x.detach(), y.detach()
    if not _is_continuous(x) or t == 0:
        return x.clone()
    if t == 1:
        return y.to(device=x.device, dtype=x.dtype, copy=True)
    work = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return torch.lerp(x.to(work), y.to(device=x.device, dtype=work), t).to(x.dtype)
