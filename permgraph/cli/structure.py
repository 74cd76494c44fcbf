"""The commands about a model's structure: ``spec``, ``explain``, ``diff``, ``verify``."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permgraph.cli.options import FORMS, Entry, Inputs, Leave, Model, Modules, Outputs, Shown, Symmetry, complete_model
from permgraph.cli.report import PAGE, PAGES, check_file
from permgraph.cli.screen import SAYS_NO, Screen, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from permgraph.io import Checkpoint
    from permgraph.spec.spec import PermutationSpec
    from permgraph.verification import Verification


def spec(
    model: Model,
    *,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the spec here as JSON.")] = None,
    page: Annotated[Path | None, typer.Option("--report", help=PAGE)] = None,
    inputs: Inputs = None,
    pins: Annotated[bool, typer.Option("--pins", help="List what stays put, and why.")] = False,
    symmetry: Symmetry = "permutation",
    modules: Modules = False,
    outputs: Outputs = None,
    shown: Shown,
) -> None:
    """Show every permutation symmetry of a model: its groups, and where they act on each parameter.

    With --symmetry general also the structure of each group, what keeps it from being larger, and the dimension of all.
    With --modules also modules that can change places as wholes, such as the experts of a mixture.

    [bold]Examples[/bold]

        permgraph spec torchvision:resnet18 -o resnet18.json

        permgraph spec ./my-llama --pins

        permgraph spec timm:convnext_atto --report convnext.html

        permgraph spec torchvision:vit_b_16 --symmetry general
    """
    from permgraph.cli.models import spec_of
    from permgraph.pictures import report

    with Screen(shown) as screen:
        check_file(output, "--output", ())
        check_file(page, "--report", PAGES)
        with screen.stage("finding symmetries"):
            found = spec_of(model, inputs, symmetry, outputs, modules)
        if output is not None:
            found.save(output)
            screen.note(f"saved to {output}")
        if page is not None:
            report(found, page, about={"model": model})
            screen.note(f"report written to {page}")
        text = str(found)
        if found.general is not None:
            text += "\n" + textwrap.indent(_structures(found), "# ")  # as a comment, so that the text is still a spec
        if pins:
            rows = [(f"{pin.parameter}[{pin.dim}]", str(pin.size), pin.reason) for pin in found.pins]
            text += "\n" + table(rows, ("stays put", "size", "why"))
        screen.result(summary(found, pins=pins), text)


def _structures(spec: PermutationSpec) -> str:
    """The structure of each group as text, and the dimension of all."""
    assert spec.general is not None
    columns = ("group", "structure", "times", "dimension", "what keeps it from being larger")
    rows = []
    for name, group in spec.acting.items():
        times = spec.multiplicity(name)
        dimension = f"{times * group.structure.dimension(group.size):,}"
        own = f"{group.structure}({group.size})"
        rows.append((name, own, str(times), dimension, spec.general.reasons.get(name, "")))
    return f"{table(rows, columns)}\ndimension of the continuous part: {spec.dimension():,}"


def summary(spec: PermutationSpec, *, pins: bool = False) -> dict[str, Any]:
    """A spec as plain data."""
    from permgraph.spec.json import to_json

    stored = to_json(spec)
    data: dict[str, Any] = {
        "model": spec.model_class,
        "fingerprint": spec.fingerprint,
        "log_order": spec.log_order(),
        "groups": stored["groups"],
        "axes": stored["parameters"],
        "aliases": stored["aliases"],
        "stacks": {name: list(spec.tensors_of(name)) for name in spec.stacks},
        "unknown_operators": list(map(dataclasses.asdict, spec.unknown_ops)),
        "unused": stored["unused"],
        "passes": list(map(dataclasses.asdict, spec.passes)),
        "unread": [
            {"parameter": entry.parameter, "dim": entry.dim, "size": entry.size, "groups": list(entry.groups)}
            for entry in spec.unread
        ],
        "notes": stored["notes"],
        "outputs": stored["outputs"],
        "by_products": stored["by_products"],
    }
    if spec.general is not None:
        data["dimension"] = spec.dimension()
        data["structures"] = {
            name: {
                "structure": str(group.structure),
                "size": group.size,
                "times": spec.multiplicity(name),
                "dimension": spec.multiplicity(name) * group.structure.dimension(group.size),
                "reason": spec.general.reasons.get(name),
            }
            for name, group in spec.acting.items()
        }
    if pins:
        data["pins"] = [
            {"parameter": pin.parameter, "dim": pin.dim, "size": pin.size, "reason": pin.reason} for pin in spec.pins
        ]
    return data


def explain(
    model: Model,
    param: Annotated[str, typer.Argument(metavar="PARAM", help="A parameter's name in the state dict.")],
    dim: Annotated[int, typer.Argument(metavar="DIM", help="Which of its dimensions, from 0.")],
    *,
    inputs: Inputs = None,
    modules: Modules = False,
    shown: Shown,
) -> None:
    """Tell why one axis of a parameter is tied to others, or why it stays put.

    [bold]Example[/bold]

        permgraph explain torchvision:resnet18 layer1.0.conv2.weight 0
    """
    from permgraph.cli.explained import in_lines
    from permgraph.cli.models import spec_of

    with Screen(shown) as screen:
        with screen.stage("finding symmetries"):
            found = spec_of(model, inputs, modules=modules)
        explanation = found.explain(param, dim)
        parts = [
            {
                "axis": part.axis,
                "size": part.size,
                "group": part.group,
                "moves": part.moves,
                "tied_to": [link.slot for link in part.links],
                "reason": part.pin.reason if part.pin else None,
            }
            for part in explanation.parts
        ]
        data = {"slot": explanation.slot, "size": explanation.size, "axis": explanation.axis, "parts": parts}
        data["modules"] = list(explanation.modules)
        screen.result({**data, "text": str(explanation)}, in_lines(explanation))


def diff(
    spec_a: Annotated[str, typer.Argument(metavar="SPEC_A", help="A saved spec, or a MODEL.")],
    spec_b: Annotated[str, typer.Argument(metavar="SPEC_B", help="Another.")],
    *,
    inputs: Inputs = None,
    modules: Modules = False,
    shown: Shown,
) -> None:
    """Tell how two specs differ. Exit code 0 if they do not, 1 if they do.

    [bold]Example[/bold]

        permgraph diff resnet18.json timm:resnet18
    """
    from permgraph.cli.models import spec_of

    with Screen(shown) as screen:
        with screen.stage("finding symmetries"):
            one, other = (
                spec_of(each, inputs, modules=modules and not Path(each).is_file()) for each in (spec_a, spec_b)
            )
        differences = one.diff(other)
        screen.result(
            {"same": not differences, "differences": list(differences)}, "\n".join(differences) or "no difference"
        )
        if differences:
            raise typer.Exit(SAYS_NO)


def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=FORMS, autocompletion=complete_model)],
    *,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", "-c", help="Also check that these weights fit, are finite, and compute the same."),
    ] = None,
    spec_file: Annotated[Path | None, typer.Option("--spec", help="Check this spec, not the one found now.")] = None,
    inputs: Inputs = None,
    symmetry: Symmetry = "permutation",
    modules: Modules = False,
    outputs: Outputs = None,
    leave: Leave = None,
    entry: Entry = None,
    seed: Annotated[int, typer.Option(help="Of the random weights and permutations.")] = 0,
    tolerance: Annotated[float, typer.Option(help="The largest relative error that counts as equal.")] = 1e-9,
    further: Annotated[
        float,
        typer.Option(help="Further inputs may take so many times the seconds of the first, and five; 0: none."),
    ] = 2.0,
    all_controls: Annotated[
        bool, typer.Option("--all-controls", help="A control on every axis, not one a group.")
    ] = False,
    shown: Shown,
) -> None:
    """Prove that the symmetries of a model preserve what it computes. Exit code 1 if they do not.

    Random weights, float64, every group moved; then, as a control, each group moved on all of its axes but one, which
    must change the output. The move is repeated on larger inputs, in training mode and in later calls.

    [bold]Example[/bold]

        permgraph verify timm:convnext_atto

        permgraph verify ./my-bert --checkpoint ./my-bert
    """
    from permgraph.cli.models import build, parse_inputs, spec_of, with_kind
    from permgraph.errors import SpecError
    from permgraph.io import open_checkpoint
    from permgraph.spec.spec import PermutationSpec
    from permgraph.verification import verify as verify_spec
    from permgraph.verification.general import GeneralVerification

    model = with_kind(model)
    with Screen(shown) as screen:
        module = build(model)
        args, kwargs = parse_inputs(inputs or [])
        with screen.stage("finding symmetries"):
            if spec_file and outputs:
                raise SpecError(f"{spec_file} says by itself which outputs count: infer the spec again for --outputs")
            if spec_file and modules:
                raise SpecError(f"{spec_file} says by itself which modules change places: leave out --modules")
            found = PermutationSpec.load(spec_file) if spec_file else spec_of(model, inputs, symmetry, outputs, modules)
        with screen.stage("verifying"):
            proof = verify_spec(
                module,
                found,
                args or None,
                kwargs or None,
                seed=seed,
                tolerance=tolerance,
                further=further,
                controls="all" if all_controls else "one",
            )
        data: dict[str, Any] = {
            "passed": proof.passed,
            "max_error": proof.max_error,
            "tolerance": proof.tolerance,
            "groups": len(proof.groups),
            "controls": len(proof.controls),
            "failed": list(proof.failed),
            "runs": [dataclasses.asdict(run) for run in proof.runs],
            "unread": list(proof.unread),
            "without_influence": list(proof.without_influence),
            "inert": [f"{p}[{d}]" for group in proof.groups.values() for p, d in group.inert],
        }
        if isinstance(proof, GeneralVerification):
            data |= {"maximal": proof.maximal, "beyond": dict(proof.beyond), "can_be_scaled": list(proof.inert)}
        text, passed = str(proof), proof.passed
        if checkpoint is not None:
            # The weights were trained in their own precision, but compute in float64 here.
            opened = open_checkpoint(checkpoint, entry)
            own = _own_weights(opened, model, found, (args, kwargs), seed, tolerance, leave or (), screen)
            passed = passed and own.passed
            data["checkpoint"] = {"path": str(checkpoint), "max_error": own.max_error}
            verdict = "computes the same" if own.passed else "does NOT compute the same"
            text += f"\n{checkpoint}: fits, is finite, and {verdict} when permuted: relative error {own.max_error:.1e}"
        screen.result({**data, "passed": passed}, text)
        if not passed:
            raise typer.Exit(SAYS_NO)


def _own_weights(
    checkpoint: Checkpoint,
    model: str,
    spec: PermutationSpec,
    given: tuple[Any, Any],
    seed: int,
    tolerance: float,
    leave: Sequence[str],
    screen: Screen,
) -> Verification:
    """The proof that the checkpoint's own weights compute the same when all groups are moved."""
    from permgraph.cli.checkpoints import fitted, require_finite, whole_state
    from permgraph.cli.extra_keys import require_matched
    from permgraph.cli.models import build
    from permgraph.verification import verify as verify_spec

    require_matched(leave, (checkpoint,))
    weights = fitted(checkpoint, spec, screen, leave, model)
    module = build(model, device=None)
    state = whole_state(weights, spec, module)
    for name, tensor in state.items():
        require_finite(name, tensor, checkpoint.path)
    module.load_state_dict(state)
    everything = spec.random(seed, every_group=True)
    args, kwargs = given
    return verify_spec(
        module, spec, args or None, kwargs or None, permutation=everything, tolerance=tolerance, controls="none"
    )
