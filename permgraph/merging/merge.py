"""`merge`: bring several networks into correspondence, and average them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from permgraph.conventions.waiting import waits
from permgraph.errors import MismatchError
from permgraph.matching import Matcher
from permgraph.matching.fixed_tensors import with_fixed_held
from permgraph.matching.rows import RowNames, Rows, UnionRows, kinds_of, labels_of, tables_of, takes_first_ones
from permgraph.merging.compared import Compared, require_all_finite, sum_over_pairs
from permgraph.merging.methods import CycleConsistent
from permgraph.merging.result import Merge, MergeMethod, Models, Progress
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.weights.combine import average, shares_of
from permgraph.weights.distributed import gathered_state, redistributed_state
from permgraph.weights.identity import SameTensor
from permgraph.weights.state_dict import Network, Weights, check_same_keys, is_continuous, own_state

log = logging.getLogger(__name__)


@waits("merging")
def merge(
    models: Sequence[Network],
    method: MergeMethod | None = None,
    *,
    spec: PermutationSpec | None = None,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    rows: RowNames | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Merge:
    """Renumber two or more networks so that they correspond to each other, and average them.

    No model is modified. Any architecture will do, as long as it is one: the symmetries of each module are found,
    unless it is certain to be built as the first is, and must agree.

    Args:
        models: modules, or state dicts when `spec` is given or another of them is a module. They may differ in device
            and dtype; the result has the first one's. Sharded tensors (DTensor) are gathered, and offloaded ones
            fetched; the result is sharded as the first is, and all processes must call this alike.
        method: how to choose the permutations: `CycleConsistent()` by default, or another of these methods.
        spec: the symmetries; inferred from the first module. Over general ones (`auto_spec(model,
            symmetry="general")`) all models are brought into the gauge of the first, or of the reference; a method, or
            a matcher in it, that knows permutations alone is given these, and a note says so.
        example_inputs, example_kwargs: arguments of forward to infer the symmetries on; found if neither is given.
        weights: how much each model counts in the mean, not in the choice of permutations; scaled to a sum of 1.
        rows: where models have other tokens or classes, which rows mean the same, as in `align`, a name list for each
            model. The result has the first model's rows: each is the mean of the models that have it, and those that
            only others have are left out; as a `UnionRows`, they follow, in the order of the models.
        seed: for all random choices.
        progress: called with a `Round` after each pass over the models.

    Raises:
        MismatchError: fewer than two models, or no list of them; something else than a method; models that differ in
            their parameters or symmetries, or do not fit the spec; state dicts without a spec; weights that do not
            fit. The message names the models by number, from 0.
            A gain of a norm that is zero, where matrices act on its axis.
        NonFiniteError: a weight of a model is NaN or infinite.

    Example:
        >>> spec = PermutationSpec.parse('''
        ... 0.weight  3x1  hidden .
        ... 2.weight  1x3  . hidden
        ... groups: hidden 3
        ... ''')
        >>> a = {"0.weight": torch.tensor([[1.0], [2], [3]]), "2.weight": torch.tensor([[1.0, 0, 0]])}
        >>> copies = [a, spec.random(1).apply(a), spec.random(2).apply(a)]
        >>> sorted(merge(copies, spec=spec).state_dict["0.weight"].flatten().tolist())
        [1.0, 2.0, 3.0]
    """
    started = time.perf_counter()
    if isinstance(models, (nn.Module, Mapping)) and not isinstance(models, nn.ModuleList):
        raise MismatchError("merge() takes its models in a list, as in merge([a, b, c])")
    method = CycleConsistent() if method is None else method
    # A text has a method `find` of its own.
    if isinstance(method, (type, str)) or not isinstance(method, MergeMethod):
        named = f"the class {method.__name__}" if isinstance(method, type) else f"a {type(method).__name__}"
        hint = f": say ToReference(matcher={type(method).__name__}())" if isinstance(method, Matcher) else ""
        raise MismatchError(f"merge() takes a method, such as CycleConsistent(), not {named}{hint}")
    networks = list(models)
    if len(networks) < 2:
        raise MismatchError(f"merge() was given {len(networks)} models: it needs at least two")
    shares = shares_of(weights, len(networks))
    given = [_state(network, number) for number, network in enumerate(networks)]
    states = [gathered_state(state) for state in given]
    modules = [network for network in networks if isinstance(network, nn.Module)]
    kinds = (*kinds_of(rows, len(networks)), *labels_of(networks))
    for number, state in enumerate(states[1:], start=1):
        check_same_keys(states[0], state, ("model 0", f"model {number}"), shapes=rows is None and not kinds)
    if spec is None and not modules:
        raise MismatchError("state dicts do not say what their model computes: give merge() a spec= with them")
    from permgraph.matching.agreement import agreed_spec

    names = [f"model {number}" for number in range(len(networks))]
    spec, notes = agreed_spec(networks, names, spec, example_inputs, example_kwargs)
    spec, held = with_fixed_held(spec, networks, states)
    notes = (*notes, *held)
    if spec.general is not None and not getattr(method, "general", False):
        inner = getattr(method, "matcher", None)
        who = type(method).__name__ if inner is None else f"{type(method).__name__} with {type(inner).__name__}"
        notes = (*notes, f"{who} knows permutations alone: what else the spec allows stays at rest")
        spec = spec.permutations()
    tables = tables_of(modules[0]) if modules and rows is not None else ()
    union, first = isinstance(rows, UnionRows), takes_first_ones(rows)
    matched = Rows.of(spec, states, kinds, first_ones=first, tables=tables, names=names, union=union)
    for number, state in enumerate(states):
        try:
            (spec if matched is None else matched.specs[number]).check(state)
        except MismatchError as error:
            raise MismatchError(f"model {number} does not fit the spec: {error}") from None
    compared = Compared.of(spec.over_stacks(), spec.stacked(states[0]))  # the models as the method sees them
    require_all_finite([spec.stacked(state) for state in states], compared.names)
    whole = tuple(_working(state, states[0]) for state in states)
    working: tuple[Mapping[str, Any], ...] = whole
    ran = tuple(modules) if len(modules) == len(networks) else None
    if matched is not None:
        working, ran = tuple(matched.common(number, state) for number, state in enumerate(whole)), None
        spec = matched.spec
        whose = "all models" if union else "model 0"
        notes = (
            *matched.notes,
            f"the result has the rows of {whose}, each the mean of the models that have it",
            *notes,
        )
    models_given = Models(working, spec, ran).stacked()
    working = models_given.states
    result = method.find(models_given, seed, progress)
    found: Sequence[Permutation | Transformation] = result.elements
    renumbered = [p.apply(state) for p, state in zip(found, working, strict=True)]
    result = result.over(spec)
    elements: Sequence[Permutation | Transformation] = result.elements

    def moved(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """All models with all of their rows, in the layout of the first."""
        if matched is None:
            return [p.apply(state) for p, state in zip(elements, given, strict=True)]
        own = [matched.own(n, p).apply(s) for n, (p, s) in enumerate(zip(elements, given, strict=True))]
        return matched.in_first(own, shares)

    if spec.general is None:
        before, objective = compared.pairs(working), compared.pairs(renumbered)
        del renumbered  # permutations move tensors of any type as they are
        mean = average(moved(states), shares)
    else:
        written = models_given.written()
        own = written[result.reference]
        before = sum_over_pairs(own.tensors, [each.tensors for each in written])
        objective = sum_over_pairs(own.tensors, [own.image(state) for state in renumbered])
        together = average(renumbered if matched is None else moved(whole), shares)
        if spec.stacks:
            apart = spec.unstacked(together)
            together = {name: apart[name] for name in states[0]}
        mean = _in_types_of(together, states[0])
    merged = Merge(
        state_dict=Weights(redistributed_state(mean, given[0])),
        permutations=result.permutations,
        objective=objective,
        objective_before=before,
        outcome=result.outcome,
        history=result.history,
        runs=result.runs or (objective,),
        weights=shares,
        seed=seed,
        seconds=time.perf_counter() - started,
        notes=(*result.notes, *notes),
        transformations=result.transformations,
        _module=modules[0] if modules and (matched is None or not union) else None,
    )
    log.info("%s", merged)
    return merged


def _state(network: object, number: int) -> Mapping[str, Any]:
    if isinstance(network, (nn.Module, Mapping)):
        return own_state(network)
    raise MismatchError(f"merge() takes modules or state dicts, but model {number} is a {type(network).__name__}")


def _working(state: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict to compute with: on the first one's devices, in float32 or better; ties are kept."""
    result: dict[str, Any] = {}
    same = SameTensor()
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            tied = same.first_name(name, value)
            if tied != name:
                result[name] = result[tied]
                continue
            value = value.detach().to(first[name].device)
            if is_continuous(value):
                value = value.to(torch.promote_types(value.dtype, torch.float32))
        result[name] = value
    return result


def _in_types_of(state: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict in the types of another; tied names still share their tensor."""
    cast: dict[int, torch.Tensor] = {}
    return {
        name: cast.setdefault(id(value), value.to(first[name].dtype)) if isinstance(value, torch.Tensor) else value
        for name, value in state.items()
    }
