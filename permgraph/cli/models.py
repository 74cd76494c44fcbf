"""MODEL on the command line: five ways to name a model, and how each is built."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import importlib.util
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from permgraph.cli.folders import configuration_of, from_folder, is_folder, is_of_pipeline, model_of, package
from permgraph.cli.options import FORMS, Subject
from permgraph.cli.screen import Screen
from permgraph.errors import (
    CaptureError,
    CheckpointError,
    MismatchError,
    NoInputsError,
    PermgraphError,
    SpecError,
    in_one_line,
)
from permgraph.inference.auto_spec import auto_spec
from permgraph.io import Checkpoint
from permgraph.spec.spec import PermutationSpec

log = logging.getLogger(__name__)

SPEC_SUFFIXES = (".json", ".txt", ".spec")


def build(model: str, device: str | None = "meta") -> nn.Module:
    """Build the model that a text names, in evaluation mode.

    Args:
        model: one of the `FORMS`.
        device: "meta" allocates no weight; a model whose constructor needs values is built on the CPU all the same.
            None builds it on the CPU.

    Raises:
        CaptureError: the text names nothing, or what it names cannot be built.
        MissingExtraError: the package that knows the model is not installed.
    """
    model = with_kind(model)
    kind, _, rest = model.partition(":")
    if kind == "hf" and rest:
        make = from_folder(rest)
    else:
        rest, arguments, keywords = _call(rest, model)
        if kind == "timm" and rest:
            make = _from_timm(rest, arguments, keywords)
        elif kind == "torchvision" and rest:
            make = _from_torchvision(rest, arguments, keywords)
        else:
            make = _from_code(model, arguments, keywords)
    with torch.random.fork_rng(devices=[]):
        if device is not None:
            try:
                with torch.device(device):
                    return _checked(make(), model)
            except Exception as error:  # many constructors compute with values: these have none on "meta"
                log.info("%s cannot be built on %s (%s): on the CPU instead", model, device, in_one_line(error))
        try:
            return _checked(make(), model)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(f"{model} cannot be built: {type(error).__name__}: {error}") from error


def with_kind(model: str) -> str:
    """A model as it is named on the command line, with ``hf:`` before a bare folder."""
    return f"hf:{model}" if model and is_folder(model) else model


def spec_of(
    model: str,
    inputs: list[str] | None = None,
    symmetry: Literal["permutation", "general"] = "permutation",
    outputs: str | None = None,
    modules: bool = False,
) -> PermutationSpec:
    """The spec in a file (.json or text), or that of the model which a text names.

    Args:
        model: a file that `PermutationSpec.save` wrote, or one of the `FORMS`.
        inputs: example inputs as text, see `parse_inputs`.
        symmetry: that of `auto_spec`; a file holds what it holds.
        outputs: what of the model's result counts, as text: final, all, or names with commas between them. Of a
            pipeline's components all does by default: other components may read any of it.

        modules: that of `auto_spec`; a file holds what it holds.

    Raises:
        CaptureError: there is no such file or model, or it does not run; without inputs, because none were found.
        SpecError: the file holds no spec, or one with permutations alone where more is asked for.
    """
    if model.endswith(SPEC_SUFFIXES) and ".py:" not in model:
        if not Path(model).is_file():
            raise CaptureError(f"{model}: no such file")
        found = PermutationSpec.load(model)
        if found.symmetry != symmetry == "general":
            raise SpecError(
                f"{model} holds permutations alone: infer the spec again from the model, --symmetry general"
            )
        if modules and not found.stacks:
            raise SpecError(f"{model} holds no groups of modules: infer the spec again from the model, --modules")
        if outputs is not None:
            raise SpecError(f"{model} says by itself which outputs count: infer the spec again for --outputs {outputs}")
        return found
    args, kwargs = parse_inputs(inputs or [])
    model = with_kind(model)
    if outputs is None and is_of_pipeline(model):
        outputs = "all"
    try:
        counted = parse_outputs(outputs)
        return auto_spec(
            build(model), args or None, kwargs or None, outputs=counted, symmetry=symmetry, modules=modules
        )
    except NoInputsError as error:
        found_none = str(error).splitlines()[0].removesuffix(" Tried:")
        raise CaptureError(
            f"{found_none} Give the shape of one: --input 1,3,224,224, int:2,16 for whole numbers, or name=2,16; "
            "--debug lists what was tried"
        ) from error


def spec_of_subject(
    model: str,
    subject: Subject,
    symmetry: Literal["permutation", "general"],
    missing: str,
    screen: Screen,
    *,
    modules: bool | None = None,
) -> PermutationSpec:
    """The spec that a command is told of, or infers; `missing` is what to say where no model is known.

    Whether it has groups of modules, the options say unless `modules` does.
    """
    modules = subject.modules if modules is None else modules
    if subject.spec_file is not None:
        if not subject.spec_file.is_file():
            raise CheckpointError(f"{subject.spec_file}: no such file")
        if not subject.model:
            return spec_of(str(subject.spec_file), symmetry=symmetry, outputs=subject.outputs, modules=modules)
        raise MismatchError("--model and --spec both say what the checkpoints are weights of: give one")
    if not model:
        raise MismatchError(f"{missing}: say --model {FORMS}; or --spec FILE")
    with screen.stage("finding symmetries"):
        return spec_of(model, subject.inputs, symmetry, subject.outputs, modules)


def parse_outputs(text: str | None) -> str | list[str] | None:
    """What ``--outputs`` says: one word or name, or several names.

    Raises SpecError if a name is empty.
    """
    names = [name.strip() for name in text.split(",")] if text is not None else []
    if not all(names):
        raise SpecError(f"--outputs {text!r}: say final, all, or names of outputs, as in logits,text_embeds")
    return names[0] if len(names) == 1 else names or None


def require_one_structure(
    checkpoints: Sequence[Checkpoint],
    model: str,
    spec: PermutationSpec,
    inputs: list[str] | None,
    screen: Screen,
) -> None:
    """Make sure that every checkpoint with a configuration of its own is of one structure with the others.

    Args:
        checkpoints: as they were opened.
        model: what they are weights of, as it is named on the command line; if empty, only the spec is known, and the
            configurations are compared with each other.
        spec: the symmetries of that model.
        inputs: example inputs as text.
        screen: is told of configurations that cannot be read, and of models that compute something else.

    Raises:
        CheckpointError: a configuration is no JSON.
        MismatchError: a configuration is of a model with other symmetries.
    """
    from permgraph.matching.agreement import Structure, outputs_of

    args, kwargs = parse_inputs(inputs or [])
    first: Structure | None = None
    seen = {model: ""}
    asked: Any = {"symmetry": spec.symmetry, "outputs": outputs_of(spec), "modules": bool(spec.stacks)}
    for own in dict.fromkeys(filter(None, map(model_of, checkpoints))):
        content = configuration_of(own)
        if own in seen or content in seen.values():
            continue
        seen[own] = content
        try:
            module = build(own)
            if first is None and model:
                first = Structure(model, build(model), args or None, kwargs or None, spec, **asked)
        except PermgraphError as error:
            screen.note(f"{own.removeprefix('hf:')}: its own configuration was not compared: {in_one_line(error, 200)}")
            continue
        if first is None:
            first = Structure(own, module, args or None, kwargs or None, **asked)
            continue
        for note in first.compare(own, module, given=True):
            screen.note(note)


def parse_inputs(texts: list[str]) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Example inputs from texts such as ``1,3,224,224``, ``int:2,16`` and ``input_ids=int:2,16``.

    Raises CaptureError if a text is malformed.
    """
    args: list[torch.Tensor] = []
    kwargs: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for text in texts:
        parsed = re.fullmatch(r"(?:(\w+)=)?(?:(int|float|bool):)?(\d+(?:,\d+)*)", text.replace(" ", ""))
        if parsed is None:
            raise CaptureError(f"--input {text!r}: give a shape, as in 1,3,224,224, int:2,16 or input_ids=int:2,16")
        name, kind, sizes = parsed.groups()
        shape = tuple(map(int, sizes.split(",")))
        if kind == "int":
            tensor = torch.randint(0, 2, shape, generator=generator)
        elif kind == "bool":
            tensor = torch.ones(shape, dtype=torch.bool)
        else:
            tensor = torch.randn(shape, generator=generator)
        if name:
            kwargs[name] = tensor
        else:
            args.append(tensor)
    return tuple(args), kwargs


def _checked(made: Any, model: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise CaptureError(f"{model} gives a {type(made).__name__}, not a torch.nn.Module")
    return made.eval()


def _call(text: str, model: str) -> tuple[str, list[Any], dict[str, Any]]:
    """``name(1, a=2)`` as the name and its literal arguments."""
    name, bracket, _ = text.partition("(")
    if not bracket:
        return text, [], {}
    try:
        call = ast.parse(f"f({text[len(name) + 1 :]}", mode="eval").body
        assert isinstance(call, ast.Call)
        arguments = [ast.literal_eval(value) for value in call.args]
        keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        assert None not in keywords
    except (SyntaxError, ValueError, AssertionError):
        raise CaptureError(f"{model}: what stands in brackets must be literal arguments, as in (8, depth=2)") from None
    return name, arguments, {str(key): value for key, value in keywords.items()}


def _near(name: str, known: Sequence[str]) -> list[str]:
    """Up to four of the known names: those that begin with the name, or contain it, or are spelt like it."""
    begin = [other for other in known if other.startswith(name)]
    return (begin or [other for other in known if name in other] or difflib.get_close_matches(name, known, 4))[:4]


def _from_timm(name: str, arguments: list[Any], keywords: dict[str, Any]) -> Callable[[], Any]:
    timm = package("timm", "zoo")
    known = name.split(".")[0]
    if not timm.is_model(known):
        near = _near(known, timm.list_models())
        raise CaptureError(f"timm has no model {known!r}" + (f"; it has {', '.join(near)}" if near else ""))
    return lambda: timm.create_model(name, *arguments, pretrained=False, **keywords)


def _from_torchvision(name: str, arguments: list[Any], keywords: dict[str, Any]) -> Callable[[], Any]:
    models = package("torchvision", "zoo").models
    if name.lower() not in models.list_models():
        near = _near(name.lower(), models.list_models())
        raise CaptureError(f"torchvision has no model {name!r}" + (f"; it has {', '.join(near)}" if near else ""))
    options = {"weights": None, **keywords}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:  # else it is downloaded
        options.setdefault("weights_backbone", None)
    return lambda: models.get_model(name, *arguments, **options)


def _from_code(model: str, arguments: list[Any], keywords: dict[str, Any]) -> Callable[[], Any]:
    text = model.partition("(")[0] if arguments or keywords or "(" in model else model
    found = load_object(text)
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise CaptureError(f"{text} is a {type(found).__name__}: name a module, a class or a function that makes one")
    return lambda: found(*arguments, **keywords)


def load_object(text: str, wanted: str = f"model: say {FORMS}") -> Any:
    """What ``package.module:name`` or ``file.py:name`` names.

    Raises CaptureError if there is no such file, module or name, or its code fails; ``wanted`` says what to name.
    """
    if Path(text).is_file() and not text.endswith(".py"):
        raise CaptureError(f"{text} is a file, which names no {wanted}")
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise CaptureError(f"{text!r} names no {wanted}")
    try:
        with _current_folder_on_path():
            module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise CaptureError(f"{place} has no {name!r}")
        found = getattr(found, part)
    return found


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise CaptureError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickles look themselves up there
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _current_folder_on_path() -> Iterator[None]:
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")
