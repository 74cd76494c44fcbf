"""How far a model's outputs move in its own precision, beside what rounding alone does to them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from permgraph.spec.elements import AnyElement
from permgraph.verification.compared import Axes, ComparedOutputs
from permgraph.verification.report import OwnPrecision
from permgraph.verification.trial import distance, is_floating


def in_own_precision(
    model: nn.Module,
    element: AnyElement,
    example_inputs: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None = None,
) -> OwnPrecision:
    """Run a model before and after an element of its group in its own precision, and once in float64.

    Args:
        model: with its weights; it is not changed.
        element: of the group of its spec.
        example_inputs, example_kwargs: what it runs on.
    """
    model = copy.deepcopy(model).eval()
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    given = (tuple(example_inputs), dict(example_kwargs or {}))
    dtype = next((p.dtype for p in model.parameters() if is_floating(p)), torch.get_default_dtype())
    compared = ComparedOutputs(element.spec)
    before = _outputs(model, given, dtype, compared)[0]
    model.load_state_dict(element.apply(state))
    after = compared.moved_back(*_outputs(model, given, dtype, compared), element)
    model.load_state_dict(state)
    exact = _outputs(model.double(), given, torch.float64, compared)[0]
    return OwnPrecision(distance(exact, after), distance(exact, before), str(dtype).removeprefix("torch."))


def _outputs(
    model: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]], dtype: torch.dtype, compared: ComparedOutputs
) -> tuple[list[Tensor], list[Axes | None]]:
    args, kwargs = tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, given)
    with torch.no_grad():
        found = compared.among([model(*args, **kwargs)])
    tensors = [tensor.detach().double().clone() if is_floating(tensor) else tensor.clone() for tensor, _ in found]
    return tensors, [axes for _, axes in found]
