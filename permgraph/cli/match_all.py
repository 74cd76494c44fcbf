"""`match_all`: checkpoints matched to one another for a merge, by any of its methods; what is found is kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from permgraph.cli.checkpoints import require_finite, tensor_of
from permgraph.cli.kept import keep_json, load_element, save
from permgraph.cli.matching_run import MatchingRun
from permgraph.cli.mean import working_dtype
from permgraph.cli.options import Method
from permgraph.errors import MismatchError
from permgraph.io import Renamed, Staging
from permgraph.matching import WeightMatching
from permgraph.matching.matcher import runs_networks
from permgraph.matching.streamed import StreamedWeightMatching
from permgraph.merging import CycleConsistent, Joining, MergeMany, MergeMethod, Models
from permgraph.merging.compared import Compared
from permgraph.merging.streamed import StreamedRounds
from permgraph.spec.elements import AnyElement
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec


def match_all(
    run: MatchingRun, staging: Staging, method: Method, reference: int
) -> tuple[Sequence[AnyElement], dict[str, Any]]:
    """For each checkpoint the permutation that brings it to the numbering of the first, and how they were found."""
    if method is Method.reference:
        permutations = [run.spec.identity()] * len(run.weights)
        reports = []
        for number in range(len(run.weights)):
            if number != reference:
                permutations[number], report = run.match(staging, number, reference)
                reports.append({"checkpoint": str(run.checkpoints[number].path), **report})
        return _from_first(permutations), {"method": method.value, "alignments": reports}
    if run.spec.general is not None and isinstance(run.matcher, StreamedWeightMatching):
        raise MismatchError(
            "streamed, models are matched to each other over permutations alone: leave out --symmetry general, or say "
            "--method reference, or --no-stream if there is enough memory"
        )
    files = [f".permutation-{number}.safetensors" for number in range(len(run.weights))]
    if not all(name in staging.finished for name in (*files, ".report.json")):
        found, report = _jointly(run, staging, method)
        for name, permutation in zip(files, _from_first(found), strict=True):
            save(staging, name, permutation)
        keep_json(staging, ".report.json", {"method": method.value, **report})
    kept = [load_element(staging.path(name), run.spec) for name in files]
    return kept, json.loads(staging.path(".report.json").read_bytes())


def _from_first(permutations: Sequence[AnyElement]) -> list[AnyElement]:
    """Permutations to a common numbering, as those to the numbering of the first."""
    if permutations[0].is_identity:
        return list(permutations)
    back: Any = permutations[0].inverse()  # of the kind that all of them are
    return [type(back).identity(back.spec), *(back @ permutation for permutation in permutations[1:])]


def _jointly(run: MatchingRun, staging: Staging, method: Method) -> tuple[Sequence[AnyElement], dict[str, Any]]:
    """All checkpoints at once, by a method of the library's that knows no reference."""
    matcher, modules = run.matcher, None
    states: tuple[Mapping[str, torch.Tensor], ...] = run.weights
    with run.screen.stage("matching all to each other") as stage:
        finder: MergeMethod
        if isinstance(matcher, StreamedWeightMatching):
            if method is Method.joining:
                raise MismatchError("streamed, models join and then go on: say --method cycle-consistent")

            def remember(step: int, search: Callable[[], Permutation]) -> Permutation:
                name = f".step-{step}.safetensors"
                if name not in staging.finished:
                    save(staging, name, search())
                return Permutation.load(staging.path(name), run.spec.over_stacks())

            joining = method is Method.cycle_consistent
            watched = dataclasses.replace(matcher, watch=stage.step)
            finder = StreamedRounds(joining=joining, matcher=watched, remember=remember)
        elif method is Method.cycle_consistent:
            if not isinstance(matcher, WeightMatching):
                raise MismatchError("--method cycle-consistent matches by weights: take merge-many or reference")
            if matcher.restarts is None:
                finder = CycleConsistent(matcher=matcher)
            else:  # of the whole, not of each match in it
                finder = CycleConsistent(restarts=matcher.restarts, matcher=dataclasses.replace(matcher, restarts=1))
        elif method is Method.joining:
            finder = Joining(matcher)
        else:
            if isinstance(matcher, WeightMatching) and not run.from_barycentre:
                matcher = dataclasses.replace(matcher, init="identity")
            finder = MergeMany(matcher=matcher)
        if runs_networks(matcher):
            modules = tuple(run.module(number) for number in range(len(run.weights)))
            states = tuple(module.state_dict() for module in modules)
        elif not isinstance(finder, StreamedRounds):
            states = tuple(_in_working_precision(weights, run.spec) for weights in run.weights)
        models = Models(states, run.spec, modules).stacked()
        names = Compared.of(models.spec, models.states[0]).names
        for checkpoint, state in zip(run.checkpoints, models.states, strict=True):
            for name in names:
                require_finite(name, tensor_of(state, name, models.spec), checkpoint.path)
        found = finder.find(models, run.seed, lambda done: stage(done.number))
    if found.outcome == "interrupted":
        raise KeyboardInterrupt
    for note in found.notes:
        run.screen.note(note)
    found = found.over(run.spec)
    return found.elements, {
        "outcome": found.outcome,
        "objective": found.history[-1].objective,
        "rounds": len(found.history),
        "moved": [sum(p.moved().values()) for p in _from_first(found.elements)],
        "seed": run.seed,
    }


def _in_working_precision(weights: Renamed, spec: PermutationSpec) -> dict[str, torch.Tensor]:
    """What a spec acts on, in float32 or better."""
    found = {}
    for name in spec.tensors:
        tensor = tensor_of(weights, name, spec)
        found[name] = tensor.to(working_dtype(tensor.dtype))
    return found
