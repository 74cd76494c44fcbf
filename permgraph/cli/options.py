"""Options that several commands share, each written once, and `spread`, which gives a command a whole set of them."""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from permgraph.errors import in_one_line

FORMS = (
    "timm:NAME, torchvision:NAME, hf:FOLDER or the FOLDER, package.module:factory or file.py:Class; all but folders "
    "take literal arguments, as in timm:resnet18(num_classes=10)"
)
"""How a model is named."""

_matching = functools.partial(typer.Option, rich_help_panel="How to match")
_data = functools.partial(typer.Option, rich_help_panel="Data")

Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", "-i", help="Shape of an example input: 1,3,224,224 or input_ids=int:2,16."),
]


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command with each parameter that is a dataclass replaced by one option for each of the dataclass's fields."""
    hints = get_type_hints(command, include_extras=True)
    parameters: dict[str, inspect.Parameter] = {}
    sets: dict[str, Any] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if not dataclasses.is_dataclass(kind):
            parameters[name] = parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY)
            continue
        sets[name] = kind
        of_fields = get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            parameters[field.name] = inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=of_fields[field.name]
            )

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, kind in sets.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in dataclasses.fields(kind)})
        command(**given)

    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return run


def complete_model(incomplete: str) -> list[str]:
    """What a shell offers for MODEL: the kinds, and names, folders and files after them."""
    kind, colon, rest = incomplete.partition(":")
    if not colon:
        files = [f"{path}:" for path in sorted(Path().glob("*.py"))] + [str(p) for p in sorted(Path().glob("*.json"))]
        folders = [str(path.parent) for path in sorted(Path().glob("*/config.json"))]
        return [text for text in ("timm:", "torchvision:", "hf:", *files, *folders) if text.startswith(incomplete)]
    if kind == "hf":
        parent = Path(rest) if rest.endswith("/") or not rest else Path(rest).parent
        found = sorted(map(str, parent.iterdir())) if parent.is_dir() else []
        return [f"hf:{path}" for path in found if path.startswith(rest) and Path(path).is_dir()]
    try:
        if kind == "timm":
            return [f"timm:{name}" for name in importlib.import_module("timm").list_models(f"{rest}*")]
        if kind == "torchvision":
            names = importlib.import_module("torchvision").models.list_models(include=f"{rest}*")
            return [f"torchvision:{name}" for name in names]
    except ModuleNotFoundError:  # not installed: there is nothing to offer
        return []
    except Exception as error:  # whatever an installed package raises on import: say so, and leave the prompt usable
        print(f"\npermgraph: {kind} cannot be imported: {in_one_line(error)}", file=sys.stderr)
    return []


class Init(str, enum.Enum):
    """Where a matcher begins."""

    identity = "identity"
    barycentre = "barycentre"


class Objective(str, enum.Enum):
    """What weight matching maximises."""

    inner = "inner"
    cosine = "cosine"
    l2 = "l2"


class MatcherName(str, enum.Enum):
    """The matchers, by their names on the command line."""

    weight = "weight"
    activation = "activation"
    frank_wolfe = "frank-wolfe"
    straight_through = "straight-through"
    learned = "learned"
    sinkhorn = "sinkhorn"


class Method(str, enum.Enum):
    """How several checkpoints are brought together."""

    reference = "reference"
    merge_many = "merge-many"
    cycle_consistent = "cycle-consistent"
    joining = "joining"


class Split(str, enum.Enum):
    """Which part of a data set to read, where its folder holds both."""

    train = "train"
    test = "test"


Symmetry = Annotated[
    Literal["permutation", "general"],
    typer.Option("--symmetry", help="Permutations alone, or also scales, signs, rotations, any matrices."),
]

Modules = Annotated[
    bool,
    typer.Option("--modules", help="Also whole modules that can change places, such as experts."),
]

Outputs = Annotated[
    str | None,
    typer.Option(
        "--outputs",
        metavar="final|all|NAME[,NAME]",
        help="What the model returns that is to stay put: all but by-products, all, or these outputs alone.",
    ),
]

RowsBy = Annotated[
    Literal["meaning", "common", "union"],
    _matching(
        "--rows",
        help="Where checkpoints have other tokens or classes, which rows are the same: by the folders' tokenizers and "
        "labels, or the first of all. With union, by meaning, and the result has the rows of all.",
    ),
]
CommonRowsBy = Annotated[
    Literal["meaning", "common"],
    _matching(
        "--rows",
        help="Of three checkpoints with other tokens or classes, which rows are the same: by the folders' tokenizers "
        "and labels, or the first of all.",
    ),
]

Leave = Annotated[
    list[str] | None,
    typer.Option("--leave", help="Pattern of keys that the model does not know: leave them as they are."),
]

Entry = Annotated[
    str | None,
    typer.Option(
        "--entry",
        metavar="NAME[.NAME]",
        help="Under which key of a PyTorch file the weights lie, as in params_ema; the usual ones are found.",
    ),
]

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help=f"{FORMS}. Or a saved spec.", autocompletion=complete_model)
]


@dataclass(frozen=True)
class Shown:
    """What a command shows, and how."""

    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, errors too.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress bars.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and the library's log.")] = (
        False
    )


@dataclass(frozen=True)
class Subject:
    """What the checkpoints are weights of."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help=f"What these are weights of: {FORMS}. A Hugging Face folder says.",
            autocompletion=complete_model,
        ),
    ] = None
    spec_file: Annotated[Path | None, typer.Option("--spec", help="A saved spec, in place of --model.")] = None
    inputs: Inputs = None
    symmetry: Annotated[
        Literal["permutation", "general"],
        typer.Option(
            help="With general, also rotations, scales, signs and invertible maps where the model allows them."
        ),
    ] = "permutation"
    modules: Modules = False
    outputs: Outputs = None
    leave: Leave = None
    entry: Entry = None
    components: Annotated[
        list[str] | None,
        typer.Option("--component", help="Of pipelines of diffusers: what to work on; by default all that they share."),
    ] = None


@dataclass(frozen=True)
class Writing:
    """Where a checkpoint goes."""

    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint to write, of the layout of the input.")]
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False


@dataclass(frozen=True)
class Matching:
    """How checkpoints are matched."""

    matcher: Annotated[MatcherName, _matching(help="By the weights alone, or by what the networks do on --data.")] = (
        MatcherName.weight
    )
    settings: Annotated[
        list[str] | None,
        _matching(
            "--set",
            metavar="NAME=VALUE",
            help="A setting of the matcher, as in epochs=10; a wrong name lists them all.",
        ),
    ] = None
    init: Annotated[Init | None, _matching(help="Where matching begins.")] = None
    objective: Annotated[Objective | None, _matching(help="What weight matching maximises.")] = None
    restarts: Annotated[int | None, _matching(help="Matching runs, of which the best is kept.")] = None
    max_sweeps: Annotated[int | None, _matching(help="Stop matching after so many passes over the groups.")] = None
    stream: Annotated[
        bool | None,
        _matching("--stream/--no-stream", help="Read tensors as they are needed; by default where memory is short."),
    ] = None
    seed: Annotated[int, _matching(help="Of all random choices.")] = 0
    check: Annotated[
        bool | None,
        _matching(
            "--check/--no-check",
            help="Prove on each network, in float64, that it computes the same after renumbering; by default where "
            "memory is enough.",
        ),
    ] = None


DATA_HELP = (
    "A folder of MNIST (idx), CIFAR (Python batches) or images in one folder per class; a file of tensors "
    "(.safetensors, .pt, .npz: inputs and targets, keyword arguments and labels, or input_ids alone); a text (.txt) "
    "for language models; or package.module:loader or file.py:loader, a sequence of batches or a function that makes "
    "one."
)


@dataclass(frozen=True)
class Data:
    """Which data the networks are run on, and how they are prepared."""

    data: Annotated[str | None, _data("--data", help=DATA_HELP)] = None
    batch_size: Annotated[int, _data(help="Samples in a batch.")] = 256
    limit: Annotated[int | None, _data(help="Take so many samples, evenly spread over the data.")] = None
    split: Annotated[Split | None, _data(help="Of a folder with both: train by default to match, test to measure.")] = (
        None
    )
    mean: Annotated[
        str | None, _data(help="Of each channel, as in training: 0.49,0.48,0.45. Images are scaled to 0..1 before.")
    ] = None
    std: Annotated[str | None, _data(help="Of each channel, as in training.")] = None
    image_size: Annotated[
        int | None, _data(help="Resize and crop images to a square of this side; 224 for image folders.")
    ] = None
    flatten: Annotated[bool, _data("--flatten", help="Give the network each image as one row.")] = False
    tokenizer: Annotated[Path | None, _data(help="A Hugging Face folder, for text; by default that of the model.")] = (
        None
    )
    length: Annotated[int, _data(help="Tokens in a sample of text.")] = 128
    class_dim: Annotated[
        int | None, _data(help="Which dimension of the logits holds the classes: 1 by default, -1 for texts.")
    ] = None
