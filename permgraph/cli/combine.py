"""The commands that make a checkpoint from others: ``align`` and ``merge``."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Annotated, Any

import torch
import typer

import permgraph
from permgraph.cli.checkpoints import fitted, identity_of, permuted, require_finite, tensor_of
from permgraph.cli.models import FORMS, spec_of
from permgraph.cli.screen import AsJson, Debug, Quiet, Screen
from permgraph.errors import CheckpointError, MismatchError
from permgraph.io import Checkpoint, Renamed, Staging, open_checkpoint, write_checkpoint
from permgraph.io.write import check_target
from permgraph.matching import Sweep, WeightMatching
from permgraph.matching.streamed import StreamedWeightMatching
from permgraph.permutation import Permutation
from permgraph.spec import PermutationSpec


class Init(str, enum.Enum):
    """Where a matcher begins."""

    identity = "identity"
    barycentre = "barycentre"


class Objective(str, enum.Enum):
    """What a matcher maximises."""

    inner = "inner"
    cosine = "cosine"
    l2 = "l2"


ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help=f"What these are weights of: {FORMS}. A Hugging Face folder says."),
]
SpecOption = Annotated[Path | None, typer.Option("--spec", help="A saved spec, in place of --model.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The checkpoint to write, of the layout of the input.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Leave = Annotated[
    list[str] | None,
    typer.Option("--leave", help="Pattern of keys that the model does not know: leave them as they are."),
]
InitOption = Annotated[Init | None, typer.Option(help="Where matching begins.")]
ObjectiveOption = Annotated[Objective | None, typer.Option(help="What matching maximises.")]
Restarts = Annotated[int | None, typer.Option(help="Matching runs, of which the best is kept.")]
Sweeps = Annotated[int | None, typer.Option(help="Stop matching after so many passes over the groups.")]
Stream = Annotated[
    bool | None,
    typer.Option("--stream/--no-stream", help="Read tensors as they are needed; by default where memory is short."),
]
Seed = Annotated[int, typer.Option(help="Of all random choices.")]


def align(
    a: Annotated[Path, typer.Argument(metavar="A", help="The checkpoint to align to.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The checkpoint to renumber.")],
    output: Output,
    model: ModelOption = None,
    spec_file: SpecOption = None,
    permutation_file: Annotated[
        Path | None, typer.Option("--permutation", "-p", help="Save the permutation here as safetensors.")
    ] = None,
    init: InitOption = None,
    objective: ObjectiveOption = None,
    restarts: Restarts = None,
    max_sweeps: Sweeps = None,
    stream: Stream = None,
    seed: Seed = 0,
    leave: Leave = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Renumber B's hidden units so that they correspond to A's, and write the result: the same function as B.

    An interrupted run goes on where it stopped when the same command is given again. The inputs are only read.

    [bold]Examples[/bold]

        permgraph align ./model-a ./model-b -o ./model-b-aligned

        permgraph align a.safetensors b.safetensors --model timm:resnet18 -o b-aligned.safetensors
    """
    with Screen(as_json, quiet, debug) as screen:
        reference, other = open_checkpoint(a), open_checkpoint(b)
        matcher = _matcher(init, objective, restarts, max_sweeps, stream, other)
        check_target(other, output)
        spec = _spec(model, spec_file, reference, screen)
        named = _model(model, reference)
        ours, theirs = (fitted(opened, spec, screen, leave or (), named) for opened in (reference, other))
        names = {key: name for name, key in theirs.keys_of.items()}
        job = _job("align", spec, [reference, other], matcher, seed, leave)
        with Staging(output, job, overwrite=overwrite) as staging:
            if staging.resumed:
                screen.note("going on where an earlier run stopped")
            permutation, report = _matched(staging, 0, ours, theirs, spec, matcher, seed, screen)
            if permutation_file is not None and permutation is not None:
                permutation.save(permutation_file)

            def moved(key: str, tensor: torch.Tensor) -> torch.Tensor:
                assert permutation is not None
                require_finite(key, tensor, b)
                return permuted(permutation, names[key], tensor) if key in names else tensor

            with screen.stage("writing", other.nbytes) as update:
                write_checkpoint(other, staging, moved, progress=lambda done, whole: update(done))
        screen.result({"output": str(output), **report}, f"{_said(report)}\nwritten to {output}")


def merge(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="A B ...", help="Two checkpoints or more.")],
    output: Output,
    model: ModelOption = None,
    spec_file: SpecOption = None,
    weights: Annotated[str | None, typer.Option(help="How much each counts, as in 0.5,0.3,0.2.")] = None,
    aligned: Annotated[bool, typer.Option("--align/--no-align", help="Align to the first before averaging.")] = True,
    init: InitOption = None,
    objective: ObjectiveOption = None,
    restarts: Restarts = None,
    max_sweeps: Sweeps = None,
    stream: Stream = None,
    seed: Seed = 0,
    leave: Leave = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Align checkpoints to the first, average them, and write the result in the first one's layout and dtypes.

    Sums are taken in float32 (float64 for float64). A network with BatchNorm should have its statistics measured anew
    afterwards: see permgraph.recalibrate_batchnorm.

    [bold]Example[/bold]

        permgraph merge ./model-a ./model-b ./model-c -o ./merged --weights 0.5,0.25,0.25
    """
    with Screen(as_json, quiet, debug) as screen:
        shares = _shares(weights, len(checkpoints))
        opened = [open_checkpoint(path) for path in checkpoints]
        first = opened[0]
        matcher = _matcher(init, objective, restarts, max_sweeps, stream, first)
        check_target(first, output)
        spec = _spec(model, spec_file, first, screen)
        named = [fitted(checkpoint, spec, screen, leave or (), _model(model, first)) for checkpoint in opened]
        _require_alike(named, spec)
        names = {key: name for name, key in named[0].keys_of.items()}
        job = {**_job("merge", spec, opened, matcher, seed, leave), "shares": shares, "aligned": aligned}
        with Staging(output, job, overwrite=overwrite) as staging:
            if staging.resumed:
                screen.note("going on where an earlier run stopped")
            permutations: list[Permutation | None] = [None] * len(named)
            reports: list[dict[str, Any]] = []
            for number in range(1, len(named) if aligned else 1):
                found, report = _matched(staging, number, named[0], named[number], spec, matcher, seed, screen)
                permutations[number] = found
                reports.append({"checkpoint": str(checkpoints[number]), **report})
            differing: list[str] = []

            def average(key: str, tensor: torch.Tensor) -> torch.Tensor:
                require_finite(key, tensor, checkpoints[0])
                if key not in names:
                    return tensor
                if not (tensor.is_floating_point() or tensor.is_complex()):
                    if any(names[key] in w and not torch.equal(tensor, w[names[key]]) for w in named[1:]):
                        differing.append(key)
                    return tensor
                work = torch.promote_types(tensor.dtype, torch.float32) if tensor.dtype.itemsize > 1 else torch.float32
                total = tensor.to(work) * shares[0]
                for share, path, weights_of, permutation in zip(
                    shares[1:], checkpoints[1:], named[1:], permutations[1:], strict=True
                ):
                    other = tensor_of(weights_of, names[key], spec)
                    require_finite(key, other, path)
                    if permutation is not None:
                        other = permuted(permutation, names[key], other)
                    total.add_(other.to(work), alpha=share)
                return total.to(tensor.dtype)

            with screen.stage("writing", first.nbytes) as update:
                write_checkpoint(first, staging, average, progress=lambda done, whole: update(done))
        if differing:
            screen.note(
                f"{len(differing)} integer tensors differ: those of {checkpoints[0]} were taken: {differing[0]}"
            )
        if any(name.endswith("running_var") for name in spec.axes):
            screen.note("the model has BatchNorm: measure its statistics anew on data before use")
        text = "\n".join([*(f"{report['checkpoint']}: {_said(report)}" for report in reports), f"written to {output}"])
        screen.result({"output": str(output), "weights": shares, "alignments": reports}, text)


def _matcher(
    init: Init | None,
    objective: Objective | None,
    restarts: int | None,
    max_sweeps: int | None,
    stream: bool | None,
    checkpoint: Checkpoint,
) -> WeightMatching | StreamedWeightMatching:
    """Weight matching as the library does it, but for what was asked otherwise, in memory if there is enough."""
    if stream is None:
        # Two models in float32, the renumbered copy of one, and Gram matrices: up to four times the weights.
        need = 16 * sum(math.prod(form.shape) for form in checkpoint.formats.values())
        stream = need > 0.5 * _machine_memory() and objective is None and restarts is None
    if stream:
        if objective is not None or restarts is not None:
            raise MismatchError("--stream matches once, by inner products: leave out --objective and --restarts")
        how: dict[str, Any] = {"init": init and init.value, "max_sweeps": max_sweeps}
        return StreamedWeightMatching(**{name: value for name, value in how.items() if value is not None})
    asked: dict[str, Any] = {
        "init": init and init.value,
        "objective": objective and objective.value,
        "restarts": restarts,
        "max_sweeps": max_sweeps,
    }
    return WeightMatching(**{name: value for name, value in asked.items() if value is not None})


def _machine_memory() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # Windows
        return math.inf


def _spec(model: str | None, spec_file: Path | None, reference: Checkpoint, screen: Screen) -> PermutationSpec:
    if spec_file is not None and model is not None:
        raise MismatchError("--model and --spec both say what the checkpoints are weights of: give one")
    if spec_file is not None:
        if not spec_file.is_file():
            raise CheckpointError(f"{spec_file}: no such file")
        return PermutationSpec.load(spec_file)
    model = _model(model, reference)
    if not model:
        raise MismatchError(
            f"{reference.path} does not say what it holds the weights of: say --model {FORMS}; or --spec FILE"
        )
    with screen.stage("finding symmetries"):
        return spec_of(model)


def _model(model: str | None, reference: Checkpoint) -> str:
    """The model that was named, or the one that a Hugging Face folder describes; empty if there is neither."""
    if model is None and reference.folder is not None and (reference.folder / "config.json").is_file():
        return f"hf:{reference.folder}"
    return model or ""


def _job(
    command: str,
    spec: PermutationSpec,
    inputs: Sequence[Checkpoint],
    matcher: WeightMatching | StreamedWeightMatching,
    seed: int,
    leave: Sequence[str] | None,
) -> dict[str, Any]:
    """What the bytes of the output depend on."""
    return {
        "command": command,
        "permgraph": permgraph.__version__,
        "torch": torch.__version__,
        "spec": spec.fingerprint,
        "inputs": [identity_of(checkpoint) for checkpoint in inputs],
        "matcher": {field.name: repr(getattr(matcher, field.name)) for field in dataclasses.fields(matcher)},
        "seed": seed,
        "leave": list(leave or ()),
    }


def _matched(
    staging: Staging,
    number: int,
    a: Renamed,
    b: Renamed,
    spec: PermutationSpec,
    matcher: WeightMatching | StreamedWeightMatching,
    seed: int,
    screen: Screen,
) -> tuple[Permutation | None, dict[str, Any]]:
    """Match B to A, unless an earlier run has, and keep the outcome with the staging."""
    if staging.complete:
        return None, {}
    kept, told = f".permutation-{number}.safetensors", f".report-{number}.json"
    if kept not in staging.finished or told not in staging.finished:
        if not spec.moving:
            screen.note("nothing to permute: the spec has no groups")
        with screen.stage(f"matching {b.checkpoint.path.name}") as update:

            def progress(sweep: Sweep) -> None:
                update(sweep.number)
                if screen.debug:
                    screen.note(f"sweep {sweep.number}: objective {sweep.objective:.8g}")

            if isinstance(matcher, StreamedWeightMatching):
                matcher = _going_on(matcher, staging, number, spec)
            result = matcher.match(a, b, spec, seed, progress)
        report = {
            "outcome": result.outcome,
            "objective_before": result.objective_before,
            "objective": result.objective,
            "sweeps": result.history[-1].number if result.history else 0,
            "seed": seed,
            "groups": len(spec.moving),
            "moved": sum(result.permutation.moved().values()),
            "of": sum(array.size for array in result.permutation.arrays.values()),
        }
        if result.outcome == "interrupted":
            raise KeyboardInterrupt
        for note in result.notes:
            screen.note(note)
        _save(staging, kept, result.permutation)
        staging.make(told, lambda file: _write(file, json.dumps(report).encode()))
    report = json.loads(staging.path(told).read_bytes())
    return Permutation.load(staging.path(kept), spec), report


def _going_on(
    matcher: StreamedWeightMatching, staging: Staging, number: int, spec: PermutationSpec
) -> StreamedWeightMatching:
    """The matcher, beginning after the last sweep that an earlier run has kept, and keeping its own."""
    prefix = f".matching-{number}-sweep-"

    def keep(sweep: int, permutation: Permutation) -> None:
        _save(staging, f"{prefix}{sweep}.safetensors", permutation)

    done = max((int(n.removeprefix(prefix).split(".")[0]) for n in staging.finished if n.startswith(prefix)), default=0)
    if not done:
        return dataclasses.replace(matcher, keep=keep)
    reached = Permutation.load(staging.path(f"{prefix}{done}.safetensors"), spec)
    return dataclasses.replace(matcher, init=reached, done=done, keep=keep)


def _save(staging: Staging, name: str, permutation: Permutation) -> None:
    permutation.save(staging.path(name))
    content = staging.path(name).read_bytes()
    staging.make(name, lambda file: _write(file, content))


def _write(file: IO[bytes], content: bytes) -> None:
    file.write(content)


def _said(report: Mapping[str, Any]) -> str:
    if not report:
        return "an earlier run had finished"
    return (
        f"{report['outcome']} after {report['sweeps']} sweeps: objective {report['objective_before']:.6g} -> "
        f"{report['objective']:.6g}; {report['moved']} of {report['of']} indices moved in {report['groups']} groups"
    )


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
