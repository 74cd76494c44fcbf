"""``permgraph transport``: what goes with a checkpoint, moved as it was; or a fine-tuning, brought to another base."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permgraph.cli.options import CommonRowsBy, Data, Matching, Shown, Subject, Writing
from permgraph.cli.screen import Screen
from permgraph.errors import CheckpointError, MismatchError, SpecError

if TYPE_CHECKING:
    import torch

    from permgraph.io import Checkpoint
    from permgraph.spec.elements import AnyElement
    from permgraph.spec.spec import PermutationSpec

ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


class What(str, enum.Enum):
    """What the tensors of a state dict are."""

    weights = "weights"
    difference = "difference"
    gradient = "gradient"
    squares = "squares"
    mask = "mask"


def transport(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="FIT FILE | BASE_A TUNED_A BASE_B", help="A saved permutation and a file; or three."),
    ],
    *,
    writing: Writing,
    kind: Annotated[What, typer.Option(help="Of FILE: what the tensors of its state dicts are.")] = What.weights,
    parameters: Annotated[
        Path | None,
        typer.Option(help="Of an optimizer in FILE: its parameters' names in its order, one a line."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="Of part of a network in FILE: the checkpoint before it was moved, where gains are read."),
    ] = None,
    strength: Annotated[float, typer.Option(help="Of three: how much of the fine-tuning is added.")] = 1.0,
    rows: CommonRowsBy = "meaning",
    subject: Subject,
    matching: Matching,
    data: Data,
    shown: Shown,
) -> None:
    """Move what goes with a checkpoint that was renumbered; or bring a fine-tuning of one base to another.

    With FIT, which `align --permutation` saved: FILE is a checkpoint, averaged weights, an optimizer's state, a
    training checkpoint with all of these, masks, or a folder with an adapter of PEFT. With three checkpoints: A is
    aligned to B, and what TUNED_A has beyond BASE_A is moved along and added to BASE_B.

    [bold]Examples[/bold]

        permgraph transport b-to-a.safetensors optimizer.pt -m net.py:Net -o optimizer-moved.pt

        permgraph transport b-to-a.safetensors ./adapter -m hf:./model-b -o ./adapter-moved

        permgraph transport ./base-a ./tuned-a ./base-b -o ./tuned-b --strength 0.8
    """
    with Screen(shown, resumes=True) as screen:
        if len(paths) == 2:
            _with_fit(paths[0], paths[1], writing, kind.value, parameters, base, subject, screen)
        elif len(paths) == 3:
            if kind is not What.weights or parameters is not None or base is not None:
                raise MismatchError("--kind, --parameters and --base go with FIT FILE, not with three checkpoints")
            if not math.isfinite(strength):
                raise MismatchError(f"--strength {strength}: give a finite number")
            from permgraph.cli.task_vector import task_vector

            task_vector(paths, writing, strength, subject, matching, data, screen, rows)
        else:
            raise MismatchError(
                f"{len(paths)} paths: give two, FIT FILE, or three, BASE_A TUNED_A BASE_B; see permgraph transport -h"
            )


# --- with a saved permutation -----------------------------------------------------------------------------------------


def _with_fit(
    fit: Path, file: Path, writing: Writing, kind: str, parameters: Path | None, base: Path | None, subject: Subject,
    screen: Screen,
) -> None:  # fmt: skip
    import permgraph
    from permgraph.cli.checkpoints import identity_of_files
    from permgraph.cli.models import spec_of_subject
    from permgraph.io import Staging, open_checkpoint, write_checkpoint
    from permgraph.io.checkpoint import TORCH_SUFFIXES

    if not file.exists():
        raise CheckpointError(f"{file}: no such file or folder")
    symmetry, modules = _symmetry_of(fit)
    adapter, components = file.is_dir() and (file / ADAPTER_CONFIG).is_file(), tuple(subject.components or ())
    model = subject.model or ("" if subject.spec_file else _model_of(file, components))
    missing = f"{file} does not say what model it goes with"
    spec = spec_of_subject(model, subject, symmetry, missing, screen, modules=modules or subject.modules)
    element = _load(fit, spec)
    if file.resolve() == writing.output.resolve():
        raise CheckpointError(f"{writing.output} is the input, which is only read: choose another place")
    options = {"kind": kind, "parameters": _parameters(parameters, model), "base": _weights(base, spec, screen)}
    job = {
        "command": "transport",
        "permgraph": permgraph.__version__,
        "inputs": identity_of_files(fit, file, base, parameters),
    }
    job |= {"spec": spec.fingerprint, "kind": kind}
    with Staging(writing.output, job, overwrite=writing.overwrite) as staging:
        if file.is_file() and file.suffix in TORCH_SUFFIXES:
            _torch_file(file, element, options, staging)
        else:
            opened = open_checkpoint(_adapter_in(file) if adapter else file, components=components)
            if adapter:
                config = json.loads((file / ADAPTER_CONFIG).read_text())
                options["fan_in_fan_out"] = config.get("fan_in_fan_out")
                opened = _in_folder(opened, file)
                named = config.get("base_model_name_or_path")
                screen.note(f"{ADAPTER_CONFIG} names {named!r} as its base, as before: load it on the moved base")
            moved = _whole(opened, element, spec, subject, model, screen) if kind == "weights" and not adapter else None
            if moved is None:
                tensors = _transported(element, dict(opened), options, file)
                moved = tensors.__getitem__
            transform = moved
            with screen.stage("writing", opened.nbytes) as update:
                write_checkpoint(
                    opened, staging, lambda key, _: transform(key), progress=lambda done, whole: update(done)
                )
            for name in ("optimizer.pt", "optimizer.bin") if file.is_dir() else ():
                if (file / name).is_file():
                    screen.note(f"{file / name} is left out: move it by itself")
    screen.result({"output": str(writing.output)}, f"written to {writing.output}")


def _torch_file(file: Path, element: AnyElement, options: Mapping[str, Any], staging: Any) -> None:
    """Move everything in a PyTorch file, of whatever layout."""
    import torch

    from permgraph.io.torch_file import load_safely

    if not staging.complete:
        if staging.target.suffix != file.suffix:
            raise CheckpointError(f"{staging.target}: {file.name} is moved as it is: give it the ending {file.suffix}")
        moved = _transported(element, load_safely(file), options, file)
        staging.make(staging.target.name, lambda out: torch.save(moved, out))
    staging.finish(staging.target.name)


def _transported(element: AnyElement, x: Any, options: Mapping[str, Any], file: Path) -> Any:
    """What `permgraph.transport` makes of it; errors name the file, and options as they are called here."""
    from permgraph.transporting import transport as move

    try:
        return move(element, x, **options)
    except (MismatchError, SpecError) as error:
        said = str(error)
        for argument, option in (("parameters=", "--parameters"), ("base=", "--base"), ("axes=", "axes= in Python")):
            said = said.replace(argument, option)
        raise MismatchError(f"{file}: {said}") from None


def _whole(
    opened: Checkpoint, element: AnyElement, spec: PermutationSpec, subject: Subject, model: str, screen: Screen
) -> Callable[[str], torch.Tensor] | None:
    """What becomes of each tensor of a checkpoint that has all of the model's; None of one that has not."""
    from permgraph.cli.checkpoints import fitted, in_parts, moved_by, require_finite

    try:
        weights = fitted(opened, spec, screen, tuple(subject.leave or ()), model)
    except MismatchError:
        if opened.folder is not None or opened.index is not None:
            raise
        return None
    if weights.checkpoint is not opened:
        raise MismatchError(
            f"{opened.path}: its tensors are parts of the model's, which are not put together here: renumber the "
            "checkpoint with permgraph align"
        )
    names, parts = {key: name for name, key in weights.keys_of.items()}, in_parts(element)

    def moved(key: str) -> torch.Tensor:
        require_finite(key, opened[key], opened.path)
        return moved_by(parts, names[key], opened[key], weights) if key in names else opened[key]

    return moved


def _symmetry_of(fit: Path) -> tuple[Any, bool]:
    """Whether a file holds a permutation or a transformation, and whether one of whole modules, from its header."""
    from permgraph.io import SafetensorsFile
    from permgraph.spec import permutation, transformation

    if not fit.is_file():
        raise CheckpointError(f"{fit}: no such file: `permgraph align --permutation FILE` saves what it found")
    kinds = {permutation.FORMAT: "permutation", transformation.FORMAT: "general"}
    metadata = SafetensorsFile.open(fit).metadata if fit.suffix == ".safetensors" else {}
    found = metadata.get("format")
    if found not in kinds:
        raise CheckpointError(
            f"{fit}: neither a permutation nor a transformation, such as `permgraph align --permutation FILE` saves; "
            "for a fine-tuning say three checkpoints, BASE_A TUNED_A BASE_B"
        )
    return kinds[found], metadata.get("modules") == "yes"


def _load(fit: Path, spec: PermutationSpec) -> AnyElement:
    from permgraph.cli.kept import load_element

    try:
        return load_element(fit, spec)
    except MismatchError as error:
        raise MismatchError(f"{error}: say the --model, the --spec or the --outputs that it was found for") from None


def _model_of(file: Path, components: tuple[str, ...] = ()) -> str:
    """The model that a folder says that it is of, or its base if it is of an adapter; empty if it does not."""
    from permgraph.cli.folders import own_model

    if not file.is_dir():
        return own_model(file.parent) if file.name.endswith((".safetensors", ".bin", ".index.json")) else ""
    if (own := own_model(file, components)) or not (file / ADAPTER_CONFIG).is_file():
        return own
    named = json.loads((file / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path") or ""
    return own_model(Path(named)) or own_model(file / named)


def _parameters(file: Path | None, model: str) -> Any:
    """The order of an optimizer's parameters: as told, or that of the model."""
    from permgraph.cli.models import build

    if file is not None:
        names = [line.strip() for line in file.read_text().splitlines()]
        return [name for name in names if name]
    return build(model) if model else None


def _weights(base: Path | None, spec: PermutationSpec, screen: Screen) -> Any:
    from permgraph.cli.checkpoints import fitted
    from permgraph.io import open_checkpoint

    return None if base is None else fitted(open_checkpoint(base), spec, screen)


def _adapter_in(folder: Path) -> Path:
    for name in ADAPTERS:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: it has {ADAPTER_CONFIG}, but none of {', '.join(ADAPTERS)}")


def _in_folder(opened: Checkpoint, folder: Path) -> Checkpoint:
    """A checkpoint of one file, to be written with what else lies in its folder."""
    return dataclasses.replace(opened, path=folder, folder=folder)
