"""The state of an optimizer, moved with the parameters that it is of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from permgraph.errors import MismatchError
from permgraph.spec.data import SpecData
from permgraph.transporting.mover import Kind, Mover
from permgraph.transporting.names import entries

Parameters: TypeAlias = nn.Module | Sequence[str]
"""A module whose ``parameters()`` the optimizer was given, or their names in its order."""

KINDS: dict[str, Kind] = {
    "exp_avg": "gradient", "momentum_buffer": "gradient", "grad_avg": "gradient", "prev": "gradient",
    "exp_avg_sq": "squares", "max_exp_avg_sq": "squares", "square_avg": "squares", "sum": "squares",
    "variance": "squares", "exp_inf": "magnitude",
}  # fmt: skip
"""What torch's optimizers keep for each element of a parameter."""

MEANS: dict[str, int] = {
    "row_var": -1, "exp_avg_sq_row": -1, "exp_avg_res_row": -1,
    "col_var": -2, "exp_avg_sq_col": -2, "exp_avg_res_col": -2,
}  # fmt: skip
"""What Adafactor (torch's, transformers') and CAME keep of squares, and the dimension over which it is a mean
(Shazeer and Stern, "Adafactor", 2018, section 3)."""

BY_SIZE = ("exp_avg_sq_r", "exp_avg_sq_c")
"""The same of big_vision's Adafactor, in timm: it is over one of the two longest dimensions, whose size is 1 then."""

NESTED = "__bnb_optimizer_quant_state__"
"""Under which key bitsandbytes lays all tensors of a parameter's state, in eight bits and in more."""

_BLOCKS = re.compile(
    r"(absmax|qmap|new_max|max)\d"
)  # bitsandbytes: factors of blocks of codes, and what the codes mean
_FACTORS = re.compile(r"(inv_)?pre_?cond(itioner)?s?(_\d+)?|Q|GG")  # Shampoo, SOAP, PSGD: matrices on each dimension


def is_optimizer_state(value: object) -> bool:
    """Whether this is what ``optimizer.state_dict()`` gives."""
    return isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()


def optimizer_state(
    mover: Mover, state: Mapping[str, Any], parameters: Parameters | None, order: Sequence[str] | None = None
) -> dict[str, Any]:
    """The state of an optimizer after the parameters have moved; hyperparameters and steps stay.

    Args:
        mover: what moves the parameters.
        state: what ``optimizer.state_dict()`` gave.
        parameters: the module whose parameters it has, or their names in its order. Not needed where the state names
            them, as that of an optimizer made of ``named_parameters()`` does.
        order: their names in its order, if it is known.

    Raises:
        MismatchError: it is not known which parameter is which; a tensor has neither one element nor the parameter's
            shape; or over general symmetries a tensor does not go along.
    """
    names = _names(state, mover.element.spec, parameters, order)
    moved = {}
    for index, kept in state["state"].items():
        if index not in names:
            raise MismatchError(f"the optimizer has a state for parameter {index!r}, which none of its groups has")
        _refuse_blocks(names[index], {**kept, **kept.get(NESTED, {})})
    at = {name: index for index, name in names.items()}
    for index, name in names.items():
        source, moves = mover.source(name)
        if source != name and source not in at:
            raise MismatchError(
                f"the optimizer has {name!r}, but not {source!r}, whose module takes its place: begin the optimizer "
                "anew, or give one that has the parameters of all modules that change places"
            )
        # Of a module that has had no gradient yet there is no state, and none where it goes.
        kept = state["state"].get(index if source == name else at[source])
        if kept is not None:
            moved[index] = {key: _moved(moves, source, key, value) for key, value in kept.items()}
    return {**state, "state": moved, "param_groups": [dict(group) for group in state["param_groups"]]}


def _refuse_blocks(name: str, kept: Mapping[str, Any]) -> None:
    """Raise MismatchError if states of a parameter are codes that share a factor with others in a block."""
    for key, value in kept.items():
        # Tensors of torchao's say what they are made of: codes, factors, what the codes mean.
        flatten = getattr(value, "__tensor_flatten__", None) if isinstance(value, Tensor) else None
        parts = () if flatten is None else flatten()[0]
        if len(parts) > 1 or _BLOCKS.fullmatch(str(key)):
            made = f" ({', '.join(parts)})" if parts else ""
            raise MismatchError(
                f"the optimizer's states of {name!r} are quantised in blocks, as {key!r}{made} shows: the elements of "
                "a block share a factor, and moving them apart would round them anew. Continue with a state in "
                "floating point, or begin the optimizer anew"
            )


def _holds_numbers(value: Any) -> bool:
    """Whether a state has tensors of more than one element somewhere in it."""
    if isinstance(value, Mapping):
        return any(map(_holds_numbers, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_numbers, value))
    return isinstance(value, Tensor) and value.numel() > 1


def _moved(mover: Mover, name: str, key: str, value: Any) -> Any:
    if key == NESTED:
        return {inner: _moved(mover, name, inner, tensor) for inner, tensor in value.items()}
    if _FACTORS.fullmatch(str(key)) or (not isinstance(value, Tensor) and _holds_numbers(value)):
        raise MismatchError(
            f"the optimizer's {key!r} of {name!r} is no tensor with an element for each of the parameter's, and what "
            "its dimensions are is not known: begin the optimizer anew"
        )
    if not isinstance(value, Tensor):
        return value
    shape = mover.element.spec.tensors[name]
    over = _mean_over(key, value, shape)
    if over is not None:
        return mover.mean_squares(name, value, over, f"the optimizer's {key!r} of {name!r}")
    if tuple(value.shape) != shape:
        if value.numel() == 1:  # a step
            return value.clone()
        raise MismatchError(
            f"the optimizer's {key!r} of {name!r} has shape {tuple(value.shape)}, but the parameter {shape}: only what "
            "has an element for each of the parameter's is moved, and Adafactor's means. If it is another parameter's, "
            "give the names in the optimizer's order as parameters="
        )
    kind = KINDS.get(key)
    if kind is None and mover.has_structure(name):
        raise MismatchError(
            f"what the optimizer keeps as {key!r} is not known to be like gradients or like their squares, and more "
            f"than a permutation acts on {name!r}: align over permutations alone, with spec.permutations()"
        )
    return mover.parameter(name, value, kind or "gradient")


def _mean_over(key: str, value: Tensor, shape: tuple[int, ...]) -> int | None:
    """The dimension of a parameter over which a state of its optimizer is a mean of squares; None if it is none."""
    if key in MEANS and len(shape) > 1:
        return len(shape) + MEANS[key]
    if key not in BY_SIZE or value.ndim != len(shape):
        return None
    shorter = [dim for dim, size in enumerate(shape) if value.shape[dim] != size]
    return shorter[0] if len(shorter) == 1 else None


def _names(
    state: Mapping[str, Any], spec: SpecData, parameters: Parameters | None, order: Sequence[str] | None
) -> dict[Any, str]:
    """For each of the optimizer's indices the spec's name of the parameter."""
    groups = state["param_groups"]
    indices = [index for group in groups for index in group["params"]]
    if order is None:
        order = _order(groups, indices, parameters)
    if len(order) != len(indices):
        raise MismatchError(
            f"the optimizer has {len(indices)} parameters, but {len(order)} names were given or are the module's: give "
            "the names of those that it has, in its order, as parameters="
        )
    found = entries(order, spec)
    for name in order:
        if name not in found or found[name].name in spec.unused:
            raise MismatchError(f"the optimizer has a parameter {name!r}, which the spec does not know")
    canonical = (spec.aliases.get(found[name].name, found[name].name) for name in order)
    return dict(zip(indices, canonical, strict=True))


def _order(groups: Sequence[Any], indices: Sequence[Any], parameters: Parameters | None) -> list[str]:
    if indices and all(isinstance(index, str) for index in indices):  # as torch.distributed.checkpoint gives them
        return list(indices)
    named = [name for group in groups for name in group.get("param_names", ())]
    if len(named) == len(indices):
        return named
    if parameters is None:
        raise MismatchError(
            "an optimizer's state does not say which parameter is which: give parameters=, the module that it trains "
            "or their names in its order"
        )
    if not isinstance(parameters, nn.Module):
        return list(parameters)
    if len(groups) > 1:
        raise MismatchError(
            f"the optimizer has {len(groups)} groups of parameters, which need not be in the module's order: give the "
            "names in the optimizer's order as parameters=, or the optimizer itself in place of its state"
        )
    return [name for name, _ in parameters.named_parameters()]


def order_of(optimizer: Optimizer, module: nn.Module | None) -> list[str]:
    """The names of an optimizer's parameters in its order, which the module has as the very same tensors.

    Raises MismatchError if the module has not got one, or there is none.
    """
    if module is None:
        raise MismatchError("give parameters=, the module that the optimizer trains")
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    order = []
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise MismatchError(
                    f"group {number} of the optimizer has a parameter of shape {tuple(parameter.shape)} that is none "
                    f"of the {type(module).__name__}'s: give the module that it trains as parameters="
                )
            order.append(names[id(parameter)])
    return order
