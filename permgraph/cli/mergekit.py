"""``permgraph mergekit``: a recipe of mergekit's, run on models that were brought into correspondence first."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permgraph.cli.options import Data, Matching, RowsBy, Shown, Subject
from permgraph.cli.screen import Screen

if TYPE_CHECKING:
    import torch

    from permgraph.cli.matching_run import MatchingRun
    from permgraph.io import Staging


def mergekit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A recipe of mergekit's, in YAML.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="NAME=VALUE", help="Of mergekit's, as in device=cuda; may be given again."),
    ] = None,
    rows: RowsBy = "meaning",
    subject: Subject,
    matching: Matching,
    data: Data,
    shown: Shown,
) -> None:
    """Align all models of a recipe to its base model, and let mergekit merge them.

    With `merge_method: permgraph_align` the result is their mean: each model has a `weight`, 1 if none is said, and the
    base model counts if it is among the models. Any other method of mergekit's is given the aligned models in the
    place of the models. Without a base model all are aligned to the first that is named.

    [bold]Example[/bold]

        permgraph mergekit recipe.yaml ./merged
    """
    from permgraph.cli.matching_run import MatchingRun
    from permgraph.cli.outcome import in_words
    from permgraph.cli.recipe import Recipe
    from permgraph.errors import CheckpointError, PermgraphError
    from permgraph.io import Staging

    with Screen(shown, resumes=True) as screen:
        if output.exists() and not overwrite:
            raise CheckpointError(f"{output} exists already: choose another name, or say --overwrite")
        quiet = shown.quiet or shown.as_json or not sys.stderr.isatty()
        with screen.stage("planning"):
            recipe = Recipe.read(config, options or (), quiet=quiet)
        references = (recipe.base, *recipe.others)
        paths = [recipe.folder(reference) for reference in references]
        for path in paths:
            if output.resolve() == path.resolve():
                raise CheckpointError(f"{output} is one of the models, which are only read: choose another place")
        run = MatchingRun.prepare(paths, subject, matching, data, screen, rows=rows)
        job = run.job(
            "mergekit", recipe=recipe.source, options=recipe.options.model_dump(mode="json", exclude={"quiet"})
        )
        reports: list[dict[str, Any]] = []
        with Staging(output, job, overwrite=overwrite) as staging:
            if staging.complete:
                staging.finish()
                screen.result({"output": str(output)}, f"an earlier run had finished {output}")
                return
            if staging.resumed:
                screen.note("going on where an earlier run stopped")
            try:
                folders = {recipe.base: paths[0]}
                for number, reference in enumerate(recipe.others, start=1):
                    folders[reference], report = _aligned(run, staging, number)
                    reports.append({"model": str(reference), **report})
                out = staging.path("config.json").parent
                shutil.rmtree(out, ignore_errors=True)  # what a merge that was interrupted has left
                out.mkdir()
                with screen.stage("merging"):
                    recipe.run(folders, out, output.name)
                    _check(out, config)
                staging.finish()
            except PermgraphError:  # bad input, with which no later run goes on
                shutil.rmtree(staging.folder, ignore_errors=True)
                raise
        lines = [f"{report['model']}: {in_words(report)}" for report in reports]
        lines.append(f"merged by {recipe.method}; written to {output}")
        found = {"output": str(output), "method": recipe.method, "base": str(recipe.base), "alignments": reports}
        screen.result(found, "\n".join(lines))


def _check(out: Path, config: Path) -> None:
    """Raise NonFiniteError where a merge holds NaN or infinity, as one whose weights sum to zero does."""
    from permgraph.cli.checkpoints import require_finite
    from permgraph.errors import NonFiniteError
    from permgraph.io import open_checkpoint

    for key, tensor in open_checkpoint(out).items():
        try:
            require_finite(key, tensor, config)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} of the merge: look at the weights in the recipe") from None


def _aligned(run: MatchingRun, staging: Staging, number: int) -> tuple[Path, dict[str, Any]]:
    """A folder beside the output with one model, renumbered to correspond to the first, and how it was found."""
    from permgraph.cli.checkpoints import in_parts, moved_by, require_finite
    from permgraph.io import Staging as Folder
    from permgraph.io import write_checkpoint

    element, report = run.match(staging, number)
    report = {**report, "check": run.prove(number, element)}
    parts, weights, checkpoint = in_parts(run.own(number, element)), run.whole(number), run.checkpoints[number]
    names = {key: name for name, key in weights.keys_of.items()}

    def moved(key: str, tensor: torch.Tensor) -> torch.Tensor:
        require_finite(key, tensor, checkpoint.path)
        return moved_by(parts, names[key], tensor, weights) if key in names else tensor

    target = staging.folder / f"model-{number}"
    if not target.exists():  # it appears whole or not at all
        with (
            Folder(target, run.job("mergekit, a model", number=number)) as folder,
            run.screen.stage(f"writing {checkpoint.path.name}", checkpoint.nbytes) as update,
        ):
            write_checkpoint(checkpoint, folder, moved, progress=lambda done, whole: update(done))
    return target, report
