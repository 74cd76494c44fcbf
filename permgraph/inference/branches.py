"""Models whose forward pass depends on values: whether their symmetries depend on the branch that was taken.

Where a model asks for a tensor's value (the number of boxes left, the tokens of an expert, a halting condition), its
spec is inferred from one pass on real tensors, and holds for what that pass did. `check_branches` makes a second pass
on other inputs of the same shapes, and compares. It also gives a spec that holds for both: that of one model which runs
both passes on the same weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.capture import Captured, ExampleInputs, capture
from permgraph.capture.counting import returned_by
from permgraph.capture.module_copy import copy_with
from permgraph.errors import CaptureError
from permgraph.inference.auto_spec import spec_of
from permgraph.inference.limits import SHORTEST_TEXT
from permgraph.spec.expressions import is_name
from permgraph.spec.spec import PermutationSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BranchCheck:
    """What two passes on different inputs have in common.

    `first` and `second` are the specs of the two passes, and `common` holds for both. `differences` says where the
    first two differ, a sentence each; `reason` is what the model asked of its tensors, or None if it asked nothing, so
    that the branch cannot depend on values and one pass is enough.
    """

    agree: bool
    differences: tuple[str, ...]
    reason: str | None
    first: PermutationSpec = field(repr=False)
    second: PermutationSpec = field(repr=False)
    common: PermutationSpec = field(repr=False)
    inputs: tuple[ExampleInputs, ...] = field(repr=False, default=())

    def __bool__(self) -> bool:
        return self.agree

    def __str__(self) -> str:
        if self.reason is None:
            return "the model asks for no tensor's value: its spec does not depend on the inputs"
        asked = f"the model asks for values ({self.reason})"
        if self.agree:
            return f"{asked}; two passes on different inputs have the same symmetries"
        shown = "".join(f"\n  {line}" for line in self.differences[:8])
        more = f"\n  and {len(self.differences) - 8} more" if len(self.differences) > 8 else ""
        return (
            f"{asked}; on other inputs its symmetries differ, in {len(self.differences)} places:{shown}{more}\n"
            "take .common, which holds for both, or pass the inputs for which the spec is wanted"
        )


def check_branches(
    model: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    others: tuple[Sequence[Any], Mapping[str, Any]] | None = None,
    seed: int = 1,
    max_seconds: float | None = None,
) -> BranchCheck:
    """Infer a model's spec twice, on different inputs, and compare.

    Args:
        model: the module; it is not changed. One on the meta device has made-up weights on the passes on real tensors.
        example_inputs: positional arguments of forward; found if neither these nor keyword arguments are given.
        example_kwargs: keyword arguments of forward.
        others: positional and keyword arguments of the second pass. By default those of the first with other values:
            real numbers are drawn anew, with their mean and spread, and the tokens of a text are shuffled.
        seed: for these.
        max_seconds: after which a capture gives up.

    Raises:
        CaptureError: the model does not run on the inputs, or not on the others.

    >>> class Halting(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)
    ...     def forward(self, x):
    ...         h = self.first(x)
    ...         return self.second(h.relu()) if x.sum() > 0 else h
    >>> bool(check_branches(Halting(), (torch.ones(1, 3),), others=((-torch.ones(1, 3),), {})))
    False
    """
    captured = capture(model, example_inputs, example_kwargs, max_seconds=max_seconds)
    first = spec_of(captured)
    if captured.mode == "fake" and others is None:
        return BranchCheck(True, (), None, first, first, first, (captured.inputs,))
    given = captured.inputs
    candidates = [(tuple(others[0]), dict(others[1]))] if others is not None else list(other_values(given, seed))
    refused: CaptureError | None = None
    for args, kwargs in candidates:
        try:
            again = capture(model, args, kwargs, max_seconds=max_seconds)
            both = _both(model, (captured, again), max_seconds)
            break
        except CaptureError as error:
            refused = refused or error
    else:
        raise refused or CaptureError(
            f"{type(model).__name__} takes no tensor whose values could be others: pass others=(args, kwargs)"
        )
    second = spec_of(again)
    differences = _numbered(first).diff(_numbered(second))
    reason = captured.fallback_reason or again.fallback_reason
    log.info("%s: %d differences between two passes", captured.model_class, len(differences))
    return BranchCheck(not differences, differences, reason, first, second, spec_of(both), (given, again.inputs))


def other_values(inputs: ExampleInputs, seed: int = 1) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of the same shapes and kinds with other values: the boldest first, then with all integers kept."""
    for shuffle in (True, False):
        generator = torch.Generator().manual_seed(seed)
        changed = False

        def other(tensor: Tensor, generator: torch.Generator = generator, shuffle: bool = shuffle) -> Tensor:
            nonlocal changed
            if tensor.is_floating_point() and tensor.numel() and not bool((tensor == tensor.reshape(-1)[0]).all()):
                values = tensor.detach().to("cpu", torch.float64)
                drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
                made = (values.mean() + drawn * values.std()).to(tensor.dtype)
            elif shuffle and tensor.dtype == torch.int64 and tensor.ndim > 1 and tensor.shape[-1] >= SHORTEST_TEXT:
                order = torch.randperm(tensor.shape[-1], generator=generator, device="cpu")
                made = tensor.detach().cpu()[..., order]
            else:
                return tensor.detach().clone()
            changed = True
            return made.to(tensor.device)

        args, kwargs = copy_with((inputs.args, inputs.kwargs), other, {})
        if changed:
            yield args, kwargs


class _Both(nn.Module):
    """One model run twice, on the same weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, first: Any, second: Any) -> Any:
        return [self.model(*args, **kwargs) for args, kwargs in (first, second)]


def _both(model: nn.Module, passes: tuple[Captured, Captured], max_seconds: float | None) -> Captured:
    """The two passes as one graph, whose weights have the names that the model gives them."""
    runs = tuple((one.inputs.args, one.inputs.kwargs) for one in passes)
    captured = capture(_Both(model), runs, max_seconds=max_seconds)
    end = next(node for node in captured.graph.nodes if node.op == "output")
    said = [one for each in passes for node in each.graph.nodes if node.op == "output" for one in returned_by(node)]
    if len(said) == len(returned_by(end)):  # what counts in each of them counts here, not the whole list
        end.meta["returned"] = said
    for node in captured.graph.nodes:
        if node.meta.get("kind") in ("parameter", "buffer", "constant"):
            node.meta["names"] = tuple(name.removeprefix("model.") for name in node.meta["names"])
        node.meta["module"] = _without_prefix(node.meta.get("module"))
    unused = tuple(name.removeprefix("model.") for name in captured.unused)
    return replace(captured, model_class=type(model).__name__, unused=unused)


def _without_prefix(path: str | None) -> str | None:
    return None if path is None else "" if path == "model" else path.removeprefix("model.")


def _numbered(spec: PermutationSpec) -> PermutationSpec:
    """The spec with its groups named by where they first stand, whatever order they were found in."""
    names: dict[str, str] = {}
    for parameter in sorted(spec.axes):
        for occurrence in spec.occurrences(parameter):
            if occurrence.group not in names:
                name = f"{parameter}#{len(names)}"
                names[occurrence.group] = name if is_name(name) else f"group#{len(names)}"
    unseen = (name for name in spec.groups if name not in names)
    return spec.rename({**names, **{name: f"unseen#{at}" for at, name in enumerate(unseen)}})
