"""``permgraph barrier``: the loss on the line between two checkpoints, before and after alignment."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from permgraph.cli.checkpoints import fitted, require_finite, whole_state
from permgraph.cli.models import FORMS, build, load_object, spec_of
from permgraph.cli.report import barrier_page
from permgraph.cli.screen import AsJson, Debug, Quiet, Screen
from permgraph.connectivity import Barrier, evaluate_on, recalibrate_batchnorm
from permgraph.connectivity import barrier as measure
from permgraph.errors import CheckpointError, EvaluationError, MismatchError
from permgraph.files import write_atomically
from permgraph.io import open_checkpoint
from permgraph.matching import WeightMatching
from permgraph.spec import PermutationSpec

INPUTS = ("inputs", "input", "x", "images")
TARGETS = ("targets", "target", "y", "labels")


def barrier(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another of the same model.")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="A file of tensors (inputs and targets, or keyword arguments and labels), or "
            "package.module:loader or file.py:loader, a sequence of batches or a function that makes one.",
        ),
    ],
    model: Annotated[str | None, typer.Option("--model", "-m", help=FORMS)] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write a page (.html), figures (.json) or a picture (.png)."),
    ] = None,
    points: Annotated[int, typer.Option(help="How many points on the line, both ends among them.")] = 25,
    aligned: Annotated[bool, typer.Option("--align/--no-align", help="Also measure after aligning B to A.")] = True,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Measure BatchNorm's statistics anew at each point.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="For data from a file.")] = 256,
    class_dim: Annotated[int, typer.Option(help="Which dimension of the logits holds the classes: -1 for text.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the alignment.")] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure loss and accuracy on the line between two checkpoints, as they are and after aligning B to A.

    [bold]Example[/bold]

        permgraph barrier a.pt b.pt --model net.py:Net --data test.safetensors -o report.html
    """
    with Screen(as_json, quiet, debug) as screen:
        one, other = open_checkpoint(a), open_checkpoint(b)
        if output is not None and output.suffix not in (".html", ".json", ".png", ".svg"):
            raise CheckpointError(f"{output}: its ending must be .html, .json, .png or .svg")
        if model is None:
            if one.folder is None or not (one.folder / "config.json").is_file():
                raise MismatchError(f"{a} does not say what it holds the weights of: say --model {FORMS}")
            model = f"hf:{one.folder}"
        with screen.stage("finding symmetries"):
            spec = spec_of(model)
        module = build(model, device=None)
        loader = _loader(data, batch_size)
        states = []
        for checkpoint in (one, other):
            state = whole_state(fitted(checkpoint, spec, screen, model=model), spec, module)
            for name, tensor in state.items():
                require_finite(name, tensor, checkpoint.path)
            states.append(state)
        lines = {"as given": states[1]}
        if aligned:
            lines["aligned"] = _aligned(states[0], states[1], spec, seed, screen)
        evaluate = evaluate_on(loader, class_dim=class_dim)
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
        result = {"a": str(a), "b": str(b), "model": model, "lines": figures}
        if output is not None:
            _write(output, found, result)
            screen.note(f"written to {output}")
        screen.result(result, "\n".join(f"{title}: {line}" for title, line in found.items()))


def _aligned(
    a: Mapping[str, Any], b: Mapping[str, Any], spec: PermutationSpec, seed: int, screen: Screen
) -> dict[str, Any]:
    with screen.stage("matching") as update:
        result = WeightMatching().match(a, b, spec, seed, lambda sweep: update(sweep.number))
    return result.permutation.apply(b)


def _loader(data: str, batch_size: int) -> Iterable[Any]:
    """Batches from a file of tensors, or from code."""
    path = Path(data)
    if path.suffix in (".safetensors", ".pt", ".pth"):
        return _batches(path, batch_size)
    loader = load_object(data)
    if isinstance(loader, Callable) and not hasattr(loader, "__iter__"):  # type: ignore[arg-type]
        loader = loader()
    if not hasattr(loader, "__iter__"):
        raise EvaluationError(f"--data {data}: gives a {type(loader).__name__}, not batches")
    # A generator can be read once only, and every point needs all of it.
    return list(loader) if iter(loader) is loader else loader


def _batches(path: Path, batch_size: int) -> list[Any]:
    tensors = dict(open_checkpoint(path))
    if batch_size < 1:
        raise EvaluationError(f"--batch-size {batch_size}: give at least 1")
    sizes = {name: (tensor.shape[0] if tensor.ndim else 0) for name, tensor in tensors.items()}
    if len(set(sizes.values())) != 1 or not all(sizes.values()):
        raise EvaluationError(f"{path}: its tensors must have one length, not {sizes}")
    count = next(iter(sizes.values()))
    inputs = next((name for name in INPUTS if name in tensors), None)
    targets = next((name for name in TARGETS if name in tensors), None)
    if targets is None:
        raise EvaluationError(f"{path}: no targets; name them one of {', '.join(TARGETS)}; it has {', '.join(tensors)}")
    found: list[Any] = []
    for start in range(0, count, batch_size):
        cut = {name: tensor[start : start + batch_size] for name, tensor in tensors.items()}
        if inputs is not None:
            found.append((cut[inputs], cut[targets]))
        else:
            labels = cut.pop(targets)
            found.append({**cut, "labels": labels})
    return found


def _write(output: Path, found: Mapping[str, Barrier], result: Mapping[str, Any]) -> None:
    if output.suffix == ".html":
        write_atomically(output, barrier_page(found, result).encode())
    elif output.suffix == ".json":
        write_atomically(output, json.dumps(result, indent=2).encode())
    else:
        axes = None
        for title, line in found.items():
            axes = line.plot(ax=axes, label=title)
        assert axes is not None and axes.figure is not None
        axes.legend()
        axes.figure.savefig(output)  # type: ignore[union-attr]
