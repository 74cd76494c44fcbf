"""``permgraph merge``: checkpoints of one model, brought into correspondence and averaged."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from permgraph.cli.checkpoints import permuted, require_finite, tensor_of, whole_state
from permgraph.cli.models import build
from permgraph.cli.options import Data, Matching, Shown, Subject, Writing
from permgraph.cli.screen import Screen
from permgraph.cli.work import Work, keep_json, said, save
from permgraph.connectivity import recalibrate_batchnorm
from permgraph.errors import EvaluationError, MismatchError
from permgraph.io import Renamed, Staging, write_checkpoint
from permgraph.matching import WeightMatching
from permgraph.matching.matcher import runs_networks
from permgraph.matching.streamed import StreamedWeightMatching
from permgraph.merging import CycleConsistent, MergeMany, MergeMethod, Models
from permgraph.merging.compared import Compared
from permgraph.merging.streamed import StreamedRounds
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec


class Method(str, enum.Enum):
    """How several checkpoints are brought together."""

    reference = "reference"
    merge_many = "merge-many"
    cycle_consistent = "cycle-consistent"


def merge(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="A B ...", help="Two checkpoints or more.")],
    *,
    writing: Writing,
    weights: Annotated[str | None, typer.Option(help="How much each counts, as in 0.5,0.3,0.2.")] = None,
    aligned: Annotated[bool, typer.Option("--align/--no-align", help="Align before averaging.")] = True,
    method: Annotated[
        Method | None,
        typer.Option(
            help="Each to one of them; each in turn to the mean of the others; or to a numbering of their own making, "
            "which is the default for three or more."
        ),
    ] = None,
    reference: Annotated[int, typer.Option(help="With --method reference: the number of that checkpoint, from 0.")] = 0,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Measure the merged BatchNorm's statistics anew, on --data.")
    ] = False,
    subject: Subject,
    matching: Matching,
    data: Data,
    shown: Shown,
) -> None:
    """Bring checkpoints into correspondence, average them, and write the result in the first one's layout and dtypes.

    The result is numbered as the first is. Sums are taken in float32 (float64 for float64). A network with BatchNorm
    should have its statistics measured anew: say --recalibrate and --data.

    [bold]Examples[/bold]

        permgraph merge ./model-a ./model-b ./model-c -o ./merged --weights 0.5,0.25,0.25

        permgraph merge a.pt b.pt -m torchvision:resnet18 --data ./images --recalibrate -o merged.pt
    """
    with Screen(shown, resumes=True) as screen:
        shares = _shares(weights, len(checkpoints))
        method = method or (Method.reference if len(checkpoints) == 2 else Method.cycle_consistent)
        if not 0 <= reference < len(checkpoints):
            raise MismatchError(f"--reference {reference}: the checkpoints are 0 to {len(checkpoints) - 1}")
        if recalibrate and data.data is None:
            raise EvaluationError("--recalibrate runs the merged network: say --data")
        work = Work.prepare(checkpoints, subject, matching, data, screen, output=writing.output)
        if recalibrate and not work.model:
            raise MismatchError("--recalibrate runs the merged network: say --model, not --spec")
        _require_alike(work.weights, work.spec)
        first = work.checkpoints[0]
        how = {"method": method.value, "reference": reference} if aligned else None
        job = work.job("merge", shares=shares, how=how, recalibrate=recalibrate)
        with Staging(writing.output, job, overwrite=writing.overwrite) as staging:
            if staging.complete:
                write_checkpoint(first, staging, lambda key, tensor: tensor)
                screen.result({"output": str(writing.output)}, f"an earlier run had finished {writing.output}")
                return
            if staging.resumed:
                screen.note("going on where an earlier run stopped")
            permutations: Sequence[Permutation | None] = [None] * len(checkpoints)
            report: dict[str, Any] = {}
            if aligned:
                permutations, report = _matched(work, staging, method, reference)
            mean = _Mean(work, permutations, shares)
            if recalibrate:
                with screen.stage("measuring statistics"):
                    mean.measure()
            with screen.stage("writing", first.nbytes) as update:
                write_checkpoint(first, staging, mean.of, progress=lambda done, whole: update(done))
        for note in mean.notes():
            screen.note(note)
        lines = [f"{r['checkpoint']}: {said(r)}" for r in report.get("alignments", ())]
        if "rounds" in report:
            lines.append(
                f"{report['method']}: {report['outcome']} after {report['rounds']} rounds: inner products over all "
                f"pairs sum to {report['objective']:.6g}"
            )
        text = "\n".join([*lines, f"written to {writing.output}"])
        screen.result({"output": str(writing.output), "weights": shares, **report}, text)


def _matched(
    work: Work, staging: Staging, method: Method, reference: int
) -> tuple[Sequence[Permutation], dict[str, Any]]:
    """For each checkpoint the permutation that brings it to the numbering of the first, and how they were found."""
    if method is Method.reference:
        permutations = [work.spec.identity()] * len(work.weights)
        reports = []
        for number in range(len(work.weights)):
            if number != reference:
                permutations[number], report = work.match(staging, number, reference)
                reports.append({"checkpoint": str(work.checkpoints[number].path), **report})
        return _from_first(permutations), {"method": method.value, "alignments": reports}
    files = [f".permutation-{number}.safetensors" for number in range(len(work.weights))]
    if not all(name in staging.finished for name in (*files, ".report.json")):
        found, report = _together(work, staging, method)
        for name, permutation in zip(files, _from_first(found), strict=True):
            save(staging, name, permutation)
        keep_json(staging, ".report.json", {"method": method.value, **report})
    kept = [Permutation.load(staging.path(name), work.spec) for name in files]
    return kept, json.loads(staging.path(".report.json").read_bytes())


def _from_first(permutations: Sequence[Permutation]) -> list[Permutation]:
    """Permutations to a common numbering, as those to the numbering of the first."""
    if permutations[0].is_identity:
        return list(permutations)
    back = permutations[0].inverse()
    return [Permutation.identity(back.spec), *(back @ permutation for permutation in permutations[1:])]


def _together(work: Work, staging: Staging, method: Method) -> tuple[Sequence[Permutation], dict[str, Any]]:
    """All checkpoints at once, by a method of the library's that knows no reference."""
    matcher, modules = work.matcher, None
    states: tuple[Mapping[str, torch.Tensor], ...] = work.weights
    with work.screen.stage("matching all to each other") as stage:
        finder: MergeMethod
        if isinstance(matcher, StreamedWeightMatching):

            def remember(step: int, search: Callable[[], Permutation]) -> Permutation:
                name = f".step-{step}.safetensors"
                if name not in staging.finished:
                    save(staging, name, search())
                return Permutation.load(staging.path(name), work.spec)

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
        else:
            if isinstance(matcher, WeightMatching) and not work.from_barycentre:
                matcher = dataclasses.replace(matcher, init="identity")
            finder = MergeMany(matcher=matcher)
        if runs_networks(matcher):
            modules = tuple(work.module(number) for number in range(len(work.weights)))
            states = tuple(module.state_dict() for module in modules)
        elif not isinstance(finder, StreamedRounds):
            states = tuple(_in_working_precision(weights, work.spec) for weights in work.weights)
        names = Compared.of(work.spec, states[0]).names
        for checkpoint, state in zip(work.checkpoints, states, strict=True):
            for name in names:
                require_finite(name, tensor_of(state, name, work.spec), checkpoint.path)
        found = finder.find(Models(states, work.spec, modules), work.seed, lambda done: stage(done.number))
    if found.outcome == "interrupted":
        raise KeyboardInterrupt
    for note in found.notes:
        work.screen.note(note)
    return found.permutations, {
        "outcome": found.outcome,
        "objective": found.history[-1].objective,
        "rounds": len(found.history),
        "moved": [sum(p.moved().values()) for p in _from_first(found.permutations)],
        "seed": work.seed,
    }


def _in_working_precision(weights: Renamed, spec: PermutationSpec) -> dict[str, torch.Tensor]:
    """What a spec acts on, in float32 or better."""
    found = {}
    for name in spec.axes:
        tensor = tensor_of(weights, name, spec)
        found[name] = tensor.to(_working(tensor.dtype))
    return found


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.itemsize > 1 else torch.float32


class _Mean:
    """The weighted mean of the renumbered checkpoints, a tensor at a time."""

    def __init__(self, work: Work, permutations: Sequence[Permutation | None], shares: Sequence[float]) -> None:
        self.work, self.shares = work, shares
        self.members = tuple(zip(shares, work.checkpoints, work.weights, permutations, strict=True))
        self.names = {key: name for name, key in work.weights[0].keys_of.items()}
        self.differing: set[str] = set()
        self.measured: dict[str, torch.Tensor] | None = None

    def of(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """What stands in the place of a tensor of the first checkpoint."""
        first = self.work.checkpoints[0].path
        require_finite(key, tensor, first)
        if key not in self.names:
            return tensor
        name = self.names[key]
        if self.measured is not None and name in self.measured:
            return self.measured[name].to(tensor.dtype)
        others = self.members[1:]
        if not (tensor.is_floating_point() or tensor.is_complex()):
            if any(name in weights and not torch.equal(tensor, weights[name]) for _, _, weights, _ in others):
                self.differing.add(key)
            return tensor
        total = tensor.to(_working(tensor.dtype)) * self.shares[0]
        for share, checkpoint, weights, permutation in others:
            other = tensor_of(weights, name, self.work.spec)
            require_finite(key, other, checkpoint.path)
            if permutation is not None:
                other = permuted(permutation, name, other)
            total.add_(other.to(total.dtype), alpha=share)
        return total.to(tensor.dtype)

    def measure(self) -> None:
        """Measure the statistics of the merged network's BatchNorm, in the place of the mean of the networks' own."""
        work = self.work
        assert work.loader is not None
        module = build(work.model, device=None)
        state = whole_state(work.weights[0], work.spec, module)
        keys = work.weights[0].keys_of
        merged = {name: self.of(keys[name], tensor) if name in keys else tensor for name, tensor in state.items()}
        module.load_state_dict(merged)
        given = module.state_dict()
        fresh = recalibrate_batchnorm(module, work.loader).state_dict()
        self.measured = {name: tensor for name, tensor in fresh.items() if not torch.equal(tensor, given[name])}

    def notes(self) -> list[str]:
        """What whoever uses the result should know."""
        found = []
        if self.differing:
            found.append(
                f"{len(self.differing)} integer tensors differ: those of {self.work.checkpoints[0].path} were taken: "
                f"{min(self.differing)}"
            )
        if self.measured is None and any(name.endswith("running_var") for name in self.work.spec.axes):
            found.append("the model has BatchNorm: measure its statistics anew on data, as --recalibrate does")
        return found


def _shares(text: str | None, count: int) -> list[float]:
    if count < 2:
        raise MismatchError("a merge takes two checkpoints or more")
    if text is None:
        return [1 / count] * count
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise MismatchError(f"--weights {text!r}: give numbers, as in 0.5,0.5") from None
    total = sum(shares)
    if len(shares) != count or not 0 < total < float("inf"):
        raise MismatchError(f"--weights {text!r}: give {count} numbers with a positive sum, one for each checkpoint")
    if abs(total - 1) > 1e-6:
        raise MismatchError(f"--weights {text!r}: they sum to {total:g}, not to 1")
    return shares


def _require_alike(named: Sequence[Renamed], spec: PermutationSpec) -> None:
    def floating(weights: Renamed) -> set[str]:
        return {spec.aliases.get(name, name) for name in weights if name in spec.unused} | set(spec.axes)

    first = named[0]
    names = floating(first)
    for other in named[1:]:
        for name in sorted(names ^ floating(other)):
            has, lacks = (first, other) if name in names else (other, first)
            raise MismatchError(f"{has.checkpoint.path} has {name!r}, and {lacks.checkpoint.path} has not")
