"""``permgraph align``: a checkpoint, renumbered to correspond to another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from permgraph.cli.options import Data, Matching, RowsBy, Shown, Subject, Writing
from permgraph.cli.report import PAGE, PAGES, check_file
from permgraph.cli.screen import Screen

if TYPE_CHECKING:
    import torch


def align(
    a: Annotated[Path, typer.Argument(metavar="A", help="The checkpoint to align to.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The checkpoint to renumber.")],
    *,
    writing: Writing,
    permutation_file: Annotated[
        Path | None,
        typer.Option("--permutation", "-p", help="Save the permutation, or the transformation, here as safetensors."),
    ] = None,
    page: Annotated[Path | None, typer.Option("--report", help=PAGE)] = None,
    rows: RowsBy = "meaning",
    subject: Subject,
    matching: Matching,
    data: Data,
    shown: Shown,
) -> None:
    """Renumber B's hidden units so that they correspond to A's, and write the result: the same function as B.

    An interrupted run goes on where it stopped when the same command is given again. The inputs are only read.

    [bold]Examples[/bold]

        permgraph align ./model-a ./model-b -o ./model-b-aligned

        permgraph align a.safetensors b.safetensors --model timm:resnet18 -o b-aligned.safetensors

        permgraph align a.pt b.pt -m net.py:Net --matcher activation --data ./mnist --flatten -o c.pt

        torchrun --nproc-per-node 2 -m permgraph align ./model-a ./model-b -o ./out --stream
    """
    from permgraph.cli.changed import changes_of
    from permgraph.cli.checkpoints import in_parts, moved_by, require_finite, tensor_of
    from permgraph.cli.distributed import distributed_run
    from permgraph.cli.matching_run import MatchingRun
    from permgraph.cli.outcome import in_words, match_of
    from permgraph.io import Staging, write_checkpoint
    from permgraph.pictures import report as write_page

    with Screen(shown, resumes=True) as screen, distributed_run() as others:
        check_file(permutation_file, "--permutation", (".safetensors",))
        check_file(page, "--report", PAGES)
        run = MatchingRun.prepare(
            (a, b), subject, matching, data, screen, output=writing.output, like=1, others=others, rows=rows
        )
        if others is not None and not others.leads:
            run.follow(1)
            return
        other = run.checkpoints[1]
        names = {key: name for name, key in run.weights[1].keys_of.items()}
        changes = changes_of(run.rows, run.weights, 1, run.spec)
        with Staging(writing.output, run.job("align"), overwrite=writing.overwrite) as staging:
            if staging.complete:
                write_checkpoint(other, staging, lambda key, tensor: tensor)
                if page is not None:
                    screen.note("no report: an earlier run had finished, and kept no record of its matching")
                screen.result({"output": str(writing.output)}, f"an earlier run had finished {writing.output}")
                return
            if staging.resumed:
                screen.note("going on where an earlier run stopped")
            permutation, report = run.match(staging, 1)
            report = {**report, "check": run.prove(1, permutation)}
            own, weights = run.own(1, permutation), run.whole(1)
            if permutation_file is not None:
                own.save(permutation_file)

            element, first = in_parts(own), run.whole(0)

            def moved(key: str, tensor: torch.Tensor) -> torch.Tensor:
                require_finite(key, tensor, b)
                new = moved_by(element, names[key], tensor, weights) if key in names else tensor
                if changes.shapes and key in changes.shapes and run.rows is not None:
                    new = run.rows.completed(1, names[key], new, tensor_of(first, names[key], run.spec))
                return new

            with screen.stage("writing", other.nbytes) as update:
                write_checkpoint(other, staging, moved, progress=lambda done, whole: update(done), changes=changes)
        if page is not None:
            about = {"A": str(a), "B": str(b), "weights of": run.model or str(subject.spec_file)}
            with screen.stage("comparing layers"):
                fit = match_of(report, permutation)
                write_page(run.spec, page, alignment=fit, models=(run.weights[0], run.weights[1]), about=about)
            screen.note(f"report written to {page}")
        screen.result({"output": str(writing.output), **report}, f"{in_words(report)}\nwritten to {writing.output}")
