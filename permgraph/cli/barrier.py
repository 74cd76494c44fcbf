"""``permgraph barrier``: the loss on the line between two checkpoints, before and after alignment."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permgraph.cli.options import FORMS, Data, Matching, Shown, Split, Subject
from permgraph.cli.report import FIGURES, PAGES, check_file
from permgraph.cli.screen import Screen
from permgraph.errors import EvaluationError, MismatchError

if TYPE_CHECKING:
    from permgraph.connectivity import Barrier
    from permgraph.matching import MatchResult


def barrier(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another of the same model.")],
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write a page (.html), figures (.json) or a picture (.png, .svg, .pdf)."),
    ] = None,
    points: Annotated[int, typer.Option(help="How many points on the line, both ends among them.")] = 25,
    aligned: Annotated[bool, typer.Option("--align/--no-align", help="Also measure after aligning B to A.")] = True,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Measure BatchNorm's statistics anew at each point.")
    ] = False,
    subject: Subject,
    matching: Matching,
    data: Data,
    shown: Shown,
) -> None:
    """Measure loss and accuracy on the line between two checkpoints, as they are and after aligning B to A.

    [bold]Example[/bold]

        permgraph barrier a.pt b.pt --model net.py:Net --data test.safetensors -o report.html

        permgraph barrier a.pt b.pt -m torchvision:resnet18 --data ./images --recalibrate
    """
    from permgraph.cli.checkpoints import require_finite
    from permgraph.cli.data import class_dim_of
    from permgraph.cli.matching_run import MatchingRun
    from permgraph.connectivity import barrier as measure
    from permgraph.connectivity import evaluate_on, recalibrate_batchnorm
    from permgraph.pictures import report

    with Screen(shown) as screen:
        check_file(output, "--output", (*PAGES, ".json", *FIGURES))
        if data.data is None:
            raise EvaluationError("the networks are measured on data: say --data")
        run = MatchingRun.prepare((a, b), subject, matching, data, screen, split=Split.test)
        if not run.model:
            raise MismatchError(f"the networks are run: say --model {FORMS}, not --spec")
        modules = [run.module(number) for number in (0, 1)]
        states = [module.state_dict() for module in modules]
        for checkpoint, state in zip(run.checkpoints, states, strict=True):
            for name, tensor in state.items():
                require_finite(name, tensor, checkpoint.path)
        lines = {"as given": states[1]}
        check: dict[str, Any] = {}
        fit: MatchResult | None = None
        if aligned:
            fit = run.find(1)
            check = run.prove(1, fit.permutation)
            lines["aligned"] = fit.permutation.apply(states[1])
        loader, module = run.loader, modules[0]
        assert loader is not None
        evaluate = evaluate_on(loader, class_dim=class_dim_of(data, loader))
        found: dict[str, Barrier] = {}
        for title, end in lines.items():
            with screen.stage(f"measuring, {title}", points) as update:
                found[title] = measure(
                    states[0],
                    end,
                    evaluate,
                    points,
                    model=module,
                    prepare=(lambda net, t: recalibrate_batchnorm(net, loader)) if recalibrate else None,
                    progress=lambda done, whole: update(done),
                )
        figures = {
            title: {
                "barriers": line.barriers,
                "instability": line.instability,
                "alphas": line.alphas,
                "curves": dict(line.curves),
            }
            for title, line in found.items()
        }
        result = {"a": str(a), "b": str(b), "model": run.model, "check": check, "lines": figures}
        if output is not None and output.suffix in PAGES:
            about = {"A": str(a), "B": str(b), "weights of": run.model}
            models = (states[0], states[1])
            report(run.spec, output, alignment=fit, models=models, barrier=found, about=about)
        elif output is not None:
            _write(output, found, result)
        if output is not None:
            screen.note(f"written to {output}")
        for note in dict.fromkeys(note for line in found.values() for note in line.notes):
            screen.note(note)
        texts = [f"{title}: {dataclasses.replace(line, notes=())}" for title, line in found.items()]
        screen.result(result, "\n".join(texts))


def _write(output: Path, found: Mapping[str, Barrier], result: Mapping[str, Any]) -> None:
    if output.suffix == ".json":
        from permgraph.io.files import write_atomically

        write_atomically(output, json.dumps(result, indent=2).encode())
    else:
        axes = None
        for title, line in found.items():
            axes = line.plot(ax=axes, label=title)
        assert axes is not None and axes.figure is not None
        axes.figure.savefig(output)  # type: ignore[union-attr]
