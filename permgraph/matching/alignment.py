"""`align`: bring one network to another, with any matcher."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from permgraph.conventions.waiting import waits
from permgraph.errors import MismatchError
from permgraph.matching.fixed_tensors import with_fixed_held
from permgraph.matching.matcher import Matcher, MatchResult, Progress, SupportsMatch, runs_networks
from permgraph.matching.rows import RowNames, Rows, UnionRows, kinds_of, labels_of, tables_of, takes_first_ones
from permgraph.matching.weight_matching import WeightMatching
from permgraph.spec.elements import AnyElement
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.weights.distributed import gathered_state, redistributed_state
from permgraph.weights.identity import load_tied
from permgraph.weights.state_dict import Network, Weights, own_state, prefix_hint

log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Alignment(MatchResult):
    """B, renumbered so that it corresponds to A; and what the matcher reported, see `MatchResult`.

    Attributes:
        permutation: the element of the spec's group that was applied to B.
        state_dict: B's state dict after it, in B's dtypes and on A's devices; tied names share their tensor.
    """

    state_dict: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    _module: nn.Module | None = field(default=None, repr=False)

    @property
    def result(self) -> MatchResult:
        """What the matcher reported, by itself."""
        return MatchResult(**{f.name: getattr(self, f.name) for f in fields(MatchResult)})

    def model(self) -> nn.Module:
        """A copy of B's module with the aligned weights; in B's mode, on A's devices.

        Raises:
            MismatchError: `align` was given state dicts, so that there is no module to copy, or the module's weights
                lie elsewhere; or weights that are tied in it hold different values, after an alignment of untied ones.
        """
        if self._module is None:
            raise MismatchError(
                "align() was given state dicts, so it has no module to return: load .state_dict into one of your own"
            )
        if any(tensor.is_meta for tensor in (*self._module.parameters(), *self._module.buffers())):
            raise MismatchError("B's module is offloaded or without values: load .state_dict into a module of your own")
        model = copy.deepcopy(self._module)
        # Assigning tensor by tensor keeps ties, also those that the module makes between parameters.
        devices = {tensor.device for tensor in self.state_dict.values()}
        if len(devices) == 1:
            model.to(next(iter(devices)))
        load_tied(model, self.state_dict)
        return model

    def transport(self, x: Any, **options: Any) -> Any:
        """What goes with B's weights, moved as these are: states of optimizers, averages, masks, adapters, differences.

        Where `align` was given B's module, an optimizer's parameters are taken to be the module's.

        Args:
            x: what to move.
            options: those of `permgraph.transport`.

        Raises:
            MismatchError: something does not fit B, or does not go along; the message names it.

        Example:
            >>> a, b = (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)) for _ in "ab")
            >>> adam = torch.optim.Adam(b.parameters())
            >>> b(torch.ones(2)).backward(), adam.step()
            (None, None)
            >>> fit = align(a, b)
            >>> model = fit.model()
            >>> again = torch.optim.Adam(model.parameters())
            >>> again.load_state_dict(fit.transport(adam.state_dict()))  # and training goes on as it would have
        """
        if self._module is not None:
            options.setdefault("parameters", self._module)
        if self.transformation is not None and self.transformation.spec.general_gains and options.get("base") is None:
            options["base"] = self.transformation.inverse().apply(self.state_dict)
        return super().transport(x, **options)


@waits("aligning")
def align(
    model_a: Network,
    model_b: Network,
    matcher: SupportsMatch | None = None,
    *,
    spec: PermutationSpec | None = None,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    rows: RowNames | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Alignment:
    """Renumber B's hidden units, channels, heads and experts so that B corresponds to A.

    The function that B computes is unchanged. Neither model is modified. Where both are modules, the symmetries of
    each are found, unless B is certain to be built as A is, and must agree: tensors of the same shapes may be those of
    2 heads or of 8. Units that a fixed tensor tells apart, a buffer or a frozen parameter of which both have the same,
    stay put. `verify(model_b, permutation=...)` proves on B itself that the result computes what B did.

    Args:
        model_a, model_b: modules, or state dicts when `spec` is given. The two may differ in device and dtype. Tensors
            in parts on several processes (DTensor, as FSDP-2 makes them) are put together on each, and B's are returned
            in the parts that they had; all processes must call this alike.
        matcher: how to choose the permutation; `WeightMatching()` by default.
        spec: the symmetries; inferred from `model_a` if it is a module. Of general ones, the permutations are used.
        example_inputs, example_kwargs: arguments of forward to infer the symmetries on; found if neither is given.
        rows: where B has other tokens or classes than A, which rows mean the same: their names in A and in B, such as
            ``(tokenizer_a.get_vocab(), tokenizer_b.get_vocab())``, or a list of such pairs; or "common", for the first
            rows of both. Those in common count in matching, and B keeps all of its own. Classes of modules of
            transformers are matched by their labels without being told. As a `UnionRows`, the state dict has the rows
            of both: A's in their order, with A's values where B has none, and after them those that only B has.
        seed: for all random choices.
        progress: called with a `Sweep` after each sweep of the matcher.

    Raises:
        MismatchError: the models differ in their parameters or in their symmetries, or do not fit the spec, or state
            dicts came without one.

    Example:
        >>> spec = PermutationSpec.parse('''
        ... 0.weight  3x2  hidden .
        ... 2.weight  1x3  . hidden
        ... groups: hidden 3
        ... ''')
        >>> a = {"0.weight": torch.tensor([[1.0, 0], [0, 1], [1, 1]]), "2.weight": torch.tensor([[1.0, 2, 3]])}
        >>> b = {"0.weight": torch.tensor([[0.0, 1], [1, 1], [1, 0]]), "2.weight": torch.tensor([[2.0, 3, 1]])}
        >>> align(a, b, spec=spec).state_dict["0.weight"].tolist()
        [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    """
    given = _state(model_b)
    a, b = gathered_state(_state(model_a)), gathered_state(given)
    kinds = (*kinds_of(rows, 2), *labels_of((model_a, model_b)))
    _require_alike(a, b, shapes=rows is None and not kinds)
    if spec is None and not isinstance(model_a, nn.Module):
        raise MismatchError("state dicts do not say what their model computes: give align() a spec= with them")
    from permgraph.matching.agreement import agreed_spec

    spec, notes = agreed_spec((model_a, model_b), ("A", "B"), spec, example_inputs, example_kwargs)
    spec.check(a)
    spec, held = with_fixed_held(spec, (model_a, model_b), (a, b))
    notes = (*notes, *held)
    tables = tables_of(model_a) if isinstance(model_a, nn.Module) and rows is not None else ()
    union = isinstance(rows, UnionRows)
    matched = Rows.of(spec, (a, b), kinds, first_ones=takes_first_ones(rows), tables=tables, union=union)
    (spec if matched is None else matched.specs[1]).check(b)
    if matcher is None:
        matcher = WeightMatching()
    if isinstance(matcher, type) or not isinstance(matcher, Matcher):
        named = f"the class {matcher.__name__}" if isinstance(matcher, type) else f"a {type(matcher).__name__}"
        raise MismatchError(f"align() takes a matcher, such as WeightMatching(), not {named}")
    if runs_networks(matcher):
        if not (isinstance(model_a, nn.Module) and isinstance(model_b, nn.Module)):
            raise MismatchError(f"{type(matcher).__name__} runs the networks: give align() modules, not state dicts")
        if matched is not None:
            raise MismatchError(
                f"{type(matcher).__name__} runs the networks, whose rows differ ({matched.notes[0]}): match by weights"
            )
        matcher = matcher.with_models(model_a, model_b)
    if spec.general is not None and not getattr(matcher, "general", False):
        notes = (*notes, f"{type(matcher).__name__} knows permutations alone: what else the spec allows stays at rest")
        spec = spec.permutations()
    if matched is None:
        result = matcher.match(a, b, spec, seed, progress)
    else:
        shared = matched.spec if spec.general is not None else matched.spec.permutations()
        result = matcher.match(matched.common(0, a), matched.common(1, b), shared, seed, progress)
        result = _on_own_rows(result, matched.own(1, result.element))
        notes = (*matched.notes, *notes)
    aligned = result.element.apply(b)
    if matched is not None and union:
        aligned = matched.completed_state(1, aligned, a)
    moved: dict[int, torch.Tensor] = {}
    for name, tensor in aligned.items():
        if isinstance(tensor, torch.Tensor):
            aligned[name] = moved.setdefault(id(tensor), tensor.to(a[name].device))
    for note in result.notes:
        log.info(note)
    reported = {f.name: getattr(result, f.name) for f in fields(MatchResult)}
    return Alignment(
        **{**reported, "notes": (*result.notes, *notes)},
        state_dict=Weights(redistributed_state(aligned, given)),
        _module=model_b if isinstance(model_b, nn.Module) and (matched is None or not union) else None,
    )


def _state(model: Network) -> Mapping[str, torch.Tensor]:
    if isinstance(model, (nn.Module, Mapping)):
        return own_state(model)
    raise MismatchError(f"align() takes modules or state dicts, not a {type(model).__name__}")


def _on_own_rows(result: MatchResult, element: AnyElement) -> MatchResult:
    """A result with its element as one of B's own spec."""
    if isinstance(element, Transformation):
        return replace(result, permutation=element.permutation, transformation=element)
    return replace(result, permutation=element)


def _require_alike(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], *, shapes: bool) -> None:
    for name, tensor in a.items():
        if name not in b:
            raise MismatchError(
                f"B has no {name!r}, which A has with shape {_shape(tensor)}{prefix_hint(name, b, '; B')}"
            )
        if shapes and _shape(tensor) != _shape(b[name]):
            raise MismatchError(
                f"{name!r} has shape {_shape(tensor)} in A but {_shape(b[name])} in B; if these are rows of other "
                "tokens or classes, rows= says which mean the same"
            )
    for name, tensor in b.items():
        if name not in a:
            raise MismatchError(
                f"A has no {name!r}, which B has with shape {_shape(tensor)}{prefix_hint(name, a, '; A')}"
            )


def _shape(value: object) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))
