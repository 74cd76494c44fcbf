"""`transport`: what goes with the weights of a network, after these have been permuted or transformed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from permgraph.conventions.choices import require_choice
from permgraph.errors import MismatchError
from permgraph.spec.data import SpecData
from permgraph.spec.elements import element_of
from permgraph.spec.expressions import Axis, Fixed, parse_axes, parse_axis
from permgraph.spec.general import General
from permgraph.transporting.mover import Kind, Mover
from permgraph.transporting.names import Entry, entries, factored
from permgraph.transporting.optimizers import Parameters, is_optimizer_state, optimizer_state, order_of
from permgraph.weights.identity import SameTensor
from permgraph.weights.state_dict import is_continuous, own_state

What = Literal["weights", "difference", "gradient", "squares", "mask"]
AxisOf: TypeAlias = str | tuple[str, int] | None
"""An axis: a group or an expression of groups, a parameter and its dimension, or None for one that stays."""
Axes: TypeAlias = str | Sequence[AxisOf] | None
"""One for each dimension of a tensor, in a list or as a spec writes them; None for a tensor that stays."""


def transport(
    fit: Any,
    x: Any,
    *,
    kind: What = "weights",
    axes: Mapping[str, Axes] | None = None,
    parameters: Parameters | None = None,
    base: Mapping[str, Any] | nn.Module | None = None,
    fan_in_fan_out: bool | None = None,
) -> Any:
    """Move what goes with a network's weights as these are moved; nothing that goes in is changed.

    It knows by themselves: state dicts, also of part of the parameters and of averaged weights under a prefix; the
    masks and weights of pruned modules; optimizers and their states; adapters of PEFT (LoRA, its DoRA magnitudes, LoHa,
    IA³); and what holds several of these under names, such as a training script's checkpoint. Integers, single numbers
    and what is no tensor stay.

    Args:
        fit: a permutation or a transformation, or a result with one, such as `align`'s.
        x: what to move.
        kind: what a state dict's tensors are: "weights", the "difference" of two networks (a task vector), a
            "gradient", "squares" of gradients (a diagonal Fisher matrix), or a "mask" of ones and zeros. Permutations
            move all of these alike.
        axes: for a dictionary of tensors that are no parameters, such as a sparse autoencoder's: for each its
            dimensions, each a group ("stream"), a parameter and its dimension with which it goes
            (("layers.0.up.weight", 1)), or None where nothing acts; or all in a text ("stream ."). None for a tensor
            that stays.
        parameters: for an optimizer's state, the module whose parameters it has, or their names in its order.
        base: the network before it was moved, a module or state dict. Needed of a part of a network where matrices act
            between gains: they are read there.
        fan_in_fan_out: of an adapter, whether its layers' weights are (inputs, outputs), where sizes and biases do not
            tell; PEFT's setting of that name.

    Raises:
        MismatchError: something has another shape than its parameter, belongs to no parameter, or does not go along:
            over rotations and other matrices squares, masks and some adapters do not. The message names it.
        SpecError: a group in `axes` is unknown.

    Example:
        >>> spec = pg.PermutationSpec.parse("0.weight 2x1 h . | 2.weight 1x2 . h | groups: h 2".replace(" | ", chr(10)))
        >>> turn = spec.random(0, every_group=True)  # changes the two places
        >>> transport(turn, {"ema.0.weight": torch.tensor([[1.0], [2.0]]), "ema.2.weight": torch.tensor([[3.0, 4.0]])})
        {'ema.0.weight': tensor([[2.],
                [1.]]), 'ema.2.weight': tensor([[4., 3.]])}
    """
    require_choice("kind", kind, *get_args(What))
    element = element_of(fit)
    mover = Mover(element, None if base is None else _by_name(own_state(base), element.spec))
    if axes is not None:
        return _dictionary(mover, x, axes)
    if isinstance(x, Optimizer):
        module = parameters if isinstance(parameters, nn.Module) else None
        order = list(parameters) if parameters is not None and module is None else order_of(x, module)  # type: ignore[arg-type]
        return optimizer_state(mover, x.state_dict(), None, order)
    if isinstance(x, nn.Module):
        x = own_state(x)
    return _moved(mover, x, kind, parameters, fan_in_fan_out, "")


def _moved(mover: Mover, x: Any, kind: Kind, parameters: Parameters | None, transposed: bool | None, where: str) -> Any:
    """A value at a place in what was given, after the weights have moved."""
    if is_optimizer_state(x):
        return optimizer_state(mover, x, parameters)
    if isinstance(x, Mapping):
        if any(_moves(value) or _fits(value, key, mover.element.spec) for key, value in x.items()):
            return _state(mover, x, kind, parameters, transposed, where)
        return {key: _moved(mover, value, kind, parameters, transposed, f"{where}{key}.") for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        tensors = [value for value in x if _moves(value)]
        if tensors and len(tensors) == len(x):
            return type(x)(_in_order(mover, x, kind, parameters, where))
        moved = [_moved(mover, each, kind, parameters, transposed, f"{where}{n}.") for n, each in enumerate(x)]
        return moved if isinstance(x, list) else tuple(moved)
    if _moves(x):
        raise MismatchError(
            f"{where.removesuffix('.') or 'x'!r} is a tensor of shape {tuple(x.shape)} by itself: nothing says which "
            "parameter's it is: give it under that name"
        )
    return x


def _moves(value: object) -> bool:
    """Whether this is a tensor with more than one real number, and no step or random state."""
    return isinstance(value, Tensor) and value.numel() > 1 and is_continuous(value)


def _fits(value: object, key: object, spec: SpecData) -> bool:
    """Whether this is a tensor of a parameter's name and shape, such as a mask of truth values."""
    known = spec.tensors.get(spec.aliases.get(str(key), str(key)))
    return isinstance(value, Tensor) and value.numel() > 1 and tuple(value.shape) == known


def _state(
    mover: Mover,
    state: Mapping[str, Any],
    kind: Kind,
    parameters: Parameters | None,
    transposed: bool | None,
    where: str,
) -> dict[str, Any]:
    """The tensors of a mapping from names, each after what acts on its parameter."""
    spec = mover.element.spec
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    try:
        held = entries(tensors, spec)
        ways = factored(held, tensors, spec, transposed)
    except MismatchError as error:
        raise MismatchError(f"{where.removesuffix('.')}: {error}" if where else str(error)) from None
    if spec.general is not None and kind == "weights":
        state, held = _untied(spec.general, state, held)
    copies: dict[str, dict[str, Any]] = {}  # the weights, and averages of them, by what stands before their names
    for key, entry in held.items():
        if entry.part == "whole" and entry.name in _known(spec):
            copies.setdefault(key.removesuffix(entry.name), {})[_canonical(entry.name, spec)] = state[key]
    places = {
        (_around(key, entry), entry._replace(name=_canonical(entry.name, spec))): key for key, entry in held.items()
    }
    out: dict[str, Any] = {}
    done: dict[tuple[str, Entry], Tensor] = {}
    memory = SameTensor()
    for key, value in state.items():
        if key in held:
            entry = held[key]
            if entry.name not in _known(spec):  # a parameter that nothing reads
                out[key] = value.clone()
                continue
            name = _canonical(entry.name, spec)
            source, moves = mover.source(name)
            if source == name:
                start, begin = key, entry
            else:
                begin = entry._replace(name=source)
                start = places.get((_around(key, entry), begin), "")
                if start not in state:
                    raise MismatchError(
                        f"{where + key!r}: the module of {source!r} takes its place, but there is no such tensor of "
                        "that: give those of all modules that change places, or of none"
                    )
                value = state[start]
            same = memory.first_name(start, value), entry._replace(name=name)
            if same not in done:
                own = copies.get(start.removesuffix(begin.name), {})
                done[same] = _part_moved(moves, begin, start, value, kind, own, ways.get(begin.name))
            out[key] = done[same]
        elif _moves(value):
            raise MismatchError(
                f"{where + str(key)!r}, of shape {tuple(value.shape)}, belongs to no parameter of the spec, which has "
                f"{len(spec.tensors)}: leave it out, or say what its dimensions are with axes="
            )
        else:
            out[key] = _moved(mover, value, kind, parameters, transposed, f"{where}{key}.")
    return out


def _untied(
    general: General, state: Mapping[str, Any], held: Mapping[str, Entry]
) -> tuple[Mapping[str, Any], dict[str, Entry]]:
    """A state dict with what a tied network leaves out, where the spec is that of the network untied."""
    more, found = dict(state), dict(held)
    for name, source in general.untied.items():
        for key, entry in held.items():
            new = key.removesuffix(source) + name
            if entry == Entry(source) and new not in held:
                more[new], found[new] = state[key], Entry(name)
    return more, found


def _known(spec: SpecData) -> Mapping[str, Any]:
    """Every name of a parameter or buffer that has axes."""
    return {**spec.tensors, **spec.aliases}


def _canonical(name: str, spec: SpecData) -> str:
    """The canonical name of a tensor of a state dict, which may be in a stack."""
    return spec.aliases.get(name, name)


def _around(key: str, entry: Entry) -> str:
    """What is left of a key without the name of its parameter, or of the module whose adapter it is part of."""
    before, _, after = key.rpartition(entry.name if entry.name in key else entry.name.rpartition(".")[0])
    return f"{before}*{after}"


def _part_moved(
    mover: Mover,
    entry: Entry,
    key: str,
    tensor: Tensor,
    kind: Kind,
    own: Mapping[str, Any],
    ways: tuple[int, int] | None,
) -> Tensor:
    """What one key holds, after what acts on its parameter."""
    name = entry.name
    if entry.part in ("whole", "mask"):
        is_mask = entry.part == "mask" or tensor.dtype is torch.bool
        return mover.parameter(name, tensor, "mask" if is_mask else kind, own)
    assert ways is not None
    what = repr(key)
    if entry.part in ("in", "out"):
        if ".hada_" in key:
            mover.refuse_structure(name, what)
        return mover.along(name, ways[entry.part == "out"], tensor, entry.at, what)
    mover.refuse_structure(name, what)
    long = [dim for dim, size in enumerate(tensor.shape) if size > 1]
    if len(long) > 1:
        raise MismatchError(f"{what} has shape {tuple(tensor.shape)}, but one vector is due")
    at = long[0] if long else 0
    # A gate of shape (1, n) is on the inputs, one of shape (n, 1) on the outputs.
    gates_inputs = entry.part == "gate" and at == tensor.ndim - 1 and tensor.ndim > 1
    return mover.along(name, ways[0 if gates_inputs else 1], tensor, at, what)


def _in_order(mover: Mover, x: Sequence[Tensor], kind: Kind, parameters: Parameters | None, where: str) -> list[Tensor]:
    """A list of tensors, one for each parameter in the order that was told."""
    if parameters is None:
        raise MismatchError(
            f"{where.removesuffix('.') or 'x'!r} is a list of tensors without names: give parameters=, the module or "
            "the names in their order"
        )
    names = [n for n, _ in parameters.named_parameters()] if isinstance(parameters, nn.Module) else list(parameters)
    if len(names) != len(x):
        raise MismatchError(f"{where.removesuffix('.') or 'x'!r} has {len(x)} tensors for {len(names)} parameters")
    return list(_state(mover, dict(zip(names, x, strict=True)), kind, None, None, where).values())


def _by_name(state: Mapping[str, Any], spec: SpecData) -> dict[str, Any]:
    """A network's weights by the spec's names."""
    held = entries(state, spec)
    known = _known(spec)
    return {_canonical(entry.name, spec): state[key] for key, entry in held.items() if entry.name in known}


def _dictionary(mover: Mover, x: Any, axes: Mapping[str, Axes]) -> dict[str, Any]:
    """Tensors that are no parameters, along the axes that were told."""
    if not isinstance(x, Mapping):
        raise MismatchError(f"with axes=, a dictionary of tensors is moved, not a {type(x).__name__}")
    for name in axes:
        if name not in x:
            raise MismatchError(f"axes names {name!r}, which is not there: there are {', '.join(map(str, x))}")
    return {name: _along_all(mover, name, value, axes) if _moves(value) else value for name, value in x.items()}


def _along_all(mover: Mover, name: str, tensor: Tensor, axes: Mapping[str, Axes]) -> Tensor:
    if name not in axes:
        raise MismatchError(f"axes does not say what the dimensions of {name!r} are: give None for what stays")
    given = axes[name]
    if given is None:
        return tensor.clone()
    if isinstance(given, str):
        return mover.axes(parse_axes(given, tuple(tensor.shape)), tensor, repr(name))
    if len(given) != tensor.ndim:
        raise MismatchError(f"{name!r} has {tensor.ndim} dimensions: axes must say one thing for each, not {given!r}")
    texts: list[Axis] = [
        parse_axis(each, size) if isinstance(each, str) else Fixed(size)
        for each, size in zip(given, tensor.shape, strict=True)
    ]
    moved = mover.axes(texts, tensor, repr(name))
    for at, each in enumerate(given):
        if isinstance(each, tuple):
            parameter, dim = each
            spec = mover.element.spec
            known = spec.aliases.get(parameter, parameter)
            shape = spec.tensors[known] if known in spec.in_stack else spec.shapes[spec.canonical(parameter)]
            if not 0 <= dim < len(shape):
                raise MismatchError(f"{name!r}: {parameter!r} has shape {shape}: there is no dimension {dim}")
            moved = mover.along(parameter, dim, moved, at, repr(name))
    return moved
