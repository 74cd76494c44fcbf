"""``permgraph merge``: checkpoints of one model, brought into correspondence and averaged."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permgraph.cli.options import Data, Matching, Method, RowsBy, Shown, Subject, Writing
from permgraph.cli.screen import Screen
from permgraph.errors import EvaluationError, MismatchError

if TYPE_CHECKING:
    from permgraph.spec.elements import AnyElement


def merge(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="A B ...", help="Two checkpoints or more.")],
    *,
    writing: Writing,
    weights: Annotated[
        str | None, typer.Option(help="How much each counts, as in 2,1,1; scaled to a sum of 1.")
    ] = None,
    ratios: Annotated[
        list[str] | None,
        typer.Option(
            metavar="0,0.5,1|PATTERN=0.5",
            help="Of two, how far to go from the first (0) to the second (1): numbers that are spread over the layers; "
            "or by patterns of names, the first that fits counting.",
        ),
    ] = None,
    aligned: Annotated[bool, typer.Option("--align/--no-align", help="Align before averaging.")] = True,
    method: Annotated[
        Method | None,
        typer.Option(
            help="Each to one of them; each in turn to the mean of the others; to a numbering of their own making, "
            "which is the default for three or more; or each to the mean of those before it, as for --matcher learned."
        ),
    ] = None,
    reference: Annotated[int, typer.Option(help="With --method reference: the number of that checkpoint, from 0.")] = 0,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Measure the merged BatchNorm's statistics anew, on --data.")
    ] = False,
    rows: RowsBy = "meaning",
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

        permgraph merge ./model-a ./model-b -o ./merged --ratios 0,0.3,0.5

        permgraph merge a.pt b.pt -m torchvision:resnet18 --data ./images --recalibrate -o merged.pt
    """
    from permgraph.cli.changed import changes_of, untied_for
    from permgraph.cli.match_all import match_all
    from permgraph.cli.matching_run import MatchingRun
    from permgraph.cli.mean import RenumberedMean, ratios_for, ratios_from, require_same_names, shares_from
    from permgraph.cli.outcome import in_words
    from permgraph.conventions.displayed import plural
    from permgraph.io import Staging, write_checkpoint

    with Screen(shown, resumes=True) as screen:
        shares = shares_from(weights, len(checkpoints))
        if ratios and (weights or len(checkpoints) != 2):
            raise MismatchError("--ratios go from one checkpoint to a second: give two, and leave out --weights")
        by_layer = ratios_from(ratios) if ratios else None
        method = method or (Method.reference if len(checkpoints) == 2 else Method.cycle_consistent)
        if not 0 <= reference < len(checkpoints):
            raise MismatchError(f"--reference {reference}: the checkpoints are 0 to {len(checkpoints) - 1}")
        if recalibrate and data.data is None:
            raise EvaluationError("--recalibrate runs the merged network: say --data")
        run = MatchingRun.prepare(checkpoints, subject, matching, data, screen, output=writing.output, rows=rows)
        if recalibrate and not run.model:
            raise MismatchError("--recalibrate runs the merged network: say --model, not --spec")
        require_same_names(run.weights, run.spec)
        first, changes = run.checkpoints[0], changes_of(run.rows, run.weights, 0, run.spec)
        untied, apart = untied_for(run.weights, run.spec)
        if (changes.shapes or apart) and recalibrate:
            raise MismatchError("--recalibrate runs the first one's network, which the result is not: leave it out")
        if apart and changes:
            raise MismatchError("--rows union of checkpoints of which only the first is tied: name another one first")
        if apart:
            screen.note(f"{first.path} is tied where others are not: the result has {', '.join(apart.added)} besides")
            changes = apart
        matched_by = {"method": method.value, "reference": reference} if aligned else None
        job = run.job("merge", shares=shares, ratios=by_layer, how=matched_by, recalibrate=recalibrate)
        if by_layer is not None:
            ratios_for(run, by_layer)  # before anything is computed
        with Staging(writing.output, job, overwrite=writing.overwrite) as staging:
            if staging.complete:
                write_checkpoint(first, staging, lambda key, tensor: tensor)
                screen.result({"output": str(writing.output)}, f"an earlier run had finished {writing.output}")
                return
            if staging.resumed:
                screen.note("going on where an earlier run stopped")
            permutations: Sequence[AnyElement | None] = [None] * len(checkpoints)
            report: dict[str, Any] = {}
            if aligned:
                permutations, report = match_all(run, staging, method, reference)
                checks = [run.prove(number, permutation) for number, permutation in enumerate(permutations)]
                report = {**report, "checks": [check for check in checks if check]}
            whole = dataclasses.replace(run, weights=(untied, *run.weights[1:]))
            mean = RenumberedMean(whole, permutations, shares, by_layer)
            if recalibrate:
                with screen.stage("measuring statistics"):
                    mean.measure()
            with screen.stage("writing", first.nbytes) as update:
                write_checkpoint(first, staging, mean.of, progress=lambda done, whole: update(done), changes=changes)
        for note in mean.notes():
            screen.note(note)
        lines = [f"{r['checkpoint']}: {in_words(r)}" for r in report.get("alignments", ())]
        if "rounds" in report:
            lines.append(
                f"{report['method']}: {report['outcome']} after {plural(report['rounds'], 'round')}: "
                f"inner products over all pairs sum to {report['objective']:.6g}"
            )
        text = "\n".join([*lines, f"written to {writing.output}"])
        screen.result({"output": str(writing.output), "weights": list(shares), "ratios": by_layer, **report}, text)
