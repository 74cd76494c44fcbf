"""What a state dict is to this package, which of its entries are statistics, and what is refused of one."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from permgraph.errors import MismatchError, NonFiniteError, PermgraphError
from permgraph.weights.distributed import gathered_state, module_state

StateDict: TypeAlias = Mapping[str, torch.Tensor]
"""Names to tensors; it may load a tensor each time that it is asked for one."""

Network: TypeAlias = nn.Module | Mapping[str, Any]
"""A module, or its state dict."""

STATISTICS = ("*running_mean", "*running_var", "*num_batches_tracked")
"""Patterns of names that normalisation layers keep: permuted with the rest, but no evidence of which units match."""


class Weights(dict[str, Any]):
    """A state dict that is an attribute, and says so to whoever calls it as a module's method.

    It is copied and pickled as the plain dictionary that it is otherwise, so that ``torch.save`` writes nothing of this
    class, and ``torch.load`` with ``weights_only=True`` reads it.
    """

    def __call__(self) -> NoReturn:
        """Raise PermgraphError with what to write instead."""
        raise PermgraphError("state_dict is an attribute here, not a method: leave the brackets out")

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.items())


def as_state_dict(network: Network) -> Mapping[str, Any]:
    """A module's state dict, or a state dict as it is; sharded tensors gathered, and offloaded ones fetched."""
    return gathered_state(own_state(network))


def own_state(network: Network) -> Mapping[str, Any]:
    """A module's state dict, or a state dict as it is; offloaded tensors fetched, and sharded ones in their parts.

    Raises MismatchError if it is neither.
    """
    if isinstance(network, nn.Module):
        return module_state(network)
    if isinstance(network, Mapping):
        return network
    hint = ""
    if isinstance(getattr(network, "state_dict", None), Mapping):
        hint = ": pass its .state_dict"
    elif isinstance(network, (str, os.PathLike)):
        hint = f": load {os.fspath(network)!r} first"
    raise MismatchError(f"a module or a state dict is needed, not a {type(network).__name__}{hint}")


def is_continuous(tensor: Tensor) -> bool:
    """Whether a tensor holds real or complex numbers, not integers or booleans."""
    return tensor.is_floating_point() or tensor.is_complex()


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor with one more dimension at the end, of its real and imaginary parts; any other as it is.

    The inner product of two such tensors is Re<a, conj(b)> of the complex ones.
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def check_same_keys(
    a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str] = ("a", "b"), *, shapes: bool = True
) -> None:
    """Refuse two state dicts of different keys, kinds or, if asked, shapes, naming the first difference."""
    name_a, name_b = names
    for key, x in a.items():
        if key not in b:
            raise MismatchError(f"{key!r} is in {name_a} but not in {name_b}{prefix_hint(key, b)}")
        y = b[key]
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            continue
        if shapes and x.shape != y.shape:
            raise MismatchError(f"{key!r} has shape {tuple(x.shape)} in {name_a} but {tuple(y.shape)} in {name_b}")
        if is_continuous(x) != is_continuous(y):
            raise MismatchError(
                f"{key!r} is {x.dtype} in {name_a} but {y.dtype} in {name_b}: one is an integer and one is not"
            )
        for side, tensor in ((name_a, x), (name_b, y)):
            if tensor.is_meta:
                raise MismatchError(f"{key!r} in {side} is on the meta device, without values: load the weights first")
            if tensor.is_quantized:
                raise MismatchError(f"{key!r} in {side} is quantised: dequantise the network first")
    for key in b:
        if key not in a:
            raise MismatchError(f"{key!r} is in {name_b} but not in {name_a}{prefix_hint(key, a)}")


def prefix_hint(name: str, state: Mapping[str, Any], who: str = ", which") -> str:
    """The end of a message that ``name`` is not in a state dict, where it is there with a prefix or without one."""
    for key in state:
        if key.endswith("." + name):
            return f"{who} has {key!r}: strip the prefix {key[: -len(name)]!r}"
        if name.endswith("." + key):
            return f"{who} has {key!r}: strip the prefix {name[: -len(key)]!r}"
    return ""


def require_finite(part: Tensor, name: str, whose: str, advice: str, whole: Tensor | None = None) -> None:
    """Raise NonFiniteError where a tensor holds NaN or infinity.

    Args:
        part: what to look at.
        name, whose: what it is called, and in which network.
        advice: the end of the message: what to do about it.
        whole: the tensor of which ``part`` is one, to count in.
    """
    # A finite sum needs one pass and no second tensor; only a sum that is not finite is worth looking into.
    if not bool(torch.isfinite(part.sum())) and not bool(torch.isfinite(part).all()):
        whole = part if whole is None else whole
        bad = int((~torch.isfinite(whole)).sum())
        raise NonFiniteError(
            f"{name!r} of {whose} holds NaN or infinity in {bad} of its {whole.numel()} elements{advice}"
        )
