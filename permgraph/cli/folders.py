"""Models that folders describe: of transformers, sentence-transformers, diffusers, timm and open_clip."""

from __future__ import annotations

import argparse
import importlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from permgraph.cli.sentences import sentence_pipeline
from permgraph.errors import CaptureError, CheckpointError, MissingExtraError, in_one_line
from permgraph.io import Checkpoint, open_checkpoint
from permgraph.io.parts import MODULES, PIPELINE, is_pipeline, sentence_modules

CONFIGURATION = "config.json"
OPEN_CLIP = "open_clip_config.json"
SAYS = (CONFIGURATION, MODULES, PIPELINE, OPEN_CLIP)
"""The files that say what model a folder holds the weights of."""

Factory = Callable[[], Any]


def package(name: str, extra: str) -> Any:
    """A package that the library does without.

    Raises:
        CaptureError: it cannot be imported.
        MissingExtraError: it is not installed; the message says which extra has it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise CaptureError(f"{name} cannot be imported: {error}") from error
        raise MissingExtraError(f"{name} is not installed: pip install 'permgraph[{extra}]'") from None
    except Exception as error:
        raise CaptureError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


def is_folder(text: str) -> bool:
    """Whether a text names a folder, or components of one, as in ``./pipeline#unet``."""
    return _split(text)[0].is_dir()


def own_model(folder: Path | None, components: Sequence[str] = ()) -> str:
    """The model that a folder's own configuration describes, as it is named on the command line; empty if none does."""
    if folder is None or not any((folder / name).is_file() for name in SAYS):
        return ""
    return f"hf:{folder}" + (f"#{','.join(components)}" if components else "")


def model_of(checkpoint: Checkpoint) -> str:
    """The model that a checkpoint's own folder describes, as `own_model` says."""
    return own_model(checkpoint.home, checkpoint.components)


def named_inside(checkpoint: Checkpoint) -> str:
    """The model that a training checkpoint of timm's names, as it is named on the command line; empty of any other."""
    kept = getattr(checkpoint.files[0], "kept", {})
    arguments, named = kept.get("args"), kept.get("arch")
    if not isinstance(arguments, argparse.Namespace) or "version" not in kept or not isinstance(named, str):
        return ""
    if getattr(arguments, "model", None) != named or not re.fullmatch(r"[\w.]+", named):
        return ""
    classes = getattr(arguments, "num_classes", None)
    return f"timm:{named}" + (f"(num_classes={classes})" if isinstance(classes, int) else "")


def configuration_of(model: str) -> str:
    """What the files say by which a model that `own_model` names is described.

    Raises CheckpointError if one is no JSON.
    """
    folder, components = _split(model.removeprefix("hf:"))
    inside = [folder, *(module.folder for module in sentence_modules(folder)), *(folder / name for name in components)]
    files = [part / name for part in dict.fromkeys(inside) for name in SAYS]
    files = [path for path in files if path.is_file() and not (components and path.name == PIPELINE)]
    return "\n".join(f"{path.relative_to(folder)}: {_text_of(path)}" for path in files)


def _text_of(path: Path) -> str:
    """The text of a configuration, if it is JSON; what only some version of a library can read passes."""
    try:
        text = path.read_bytes().decode()
        json.loads(text)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not valid JSON, so nothing says what the weights beside it are of: {in_one_line(error, 90)}: "
            "mend it, or name the file of weights in place of the folder"
        ) from None
    return text


def is_of_pipeline(model: str) -> bool:
    """Whether a model is a pipeline of diffusers or part of one, whose other parts read what it returns besides."""
    if not model.startswith("hf:"):
        return False
    folder, components = _split(model.removeprefix("hf:"))
    return bool(components) or is_pipeline(folder) or is_pipeline(folder.resolve().parent)


def from_folder(text: str) -> Factory:
    """What makes the model that a folder describes, or its components that stand after a ``#``.

    Raises:
        CaptureError: the folder does not say what it holds, or that is not known here.
        MissingExtraError: the package that knows the model is not installed.
    """
    folder, components = _split(text)
    if components or is_pipeline(folder):
        return _of_components(folder, components)
    if (folder / MODULES).is_file():
        try:
            return sentence_pipeline(folder, lambda own: _from_transformers(own, headless=True))
        except CheckpointError as error:
            raise CaptureError(f"hf:{folder}: {error}") from None
    if not (folder / CONFIGURATION).is_file() and (folder / OPEN_CLIP).is_file():
        from permgraph.cli.clips import open_clip_model

        return open_clip_model(folder / OPEN_CLIP)
    if not (folder / CONFIGURATION).is_file():
        raise CaptureError(f"hf:{folder}: there is no config.json: name a folder that save_pretrained wrote")
    config = _configuration(folder)
    if isinstance(config.get("_class_name"), str) and "model_type" not in config:
        return _from_diffusers(folder, config)
    if isinstance(config.get("architecture"), str) and "model_type" not in config:
        return _from_timm(folder, config)
    return _from_transformers(folder)


def _split(text: str) -> tuple[Path, tuple[str, ...]]:
    """A folder and the components that are named after it; a folder with such a name is what it is."""
    folder, sharp, names = text.rpartition("#")
    if not sharp or Path(text).is_dir():
        return Path(text), ()
    return Path(folder), tuple(name.strip() for name in names.split(","))


def _configuration(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIGURATION).read_text(encoding="utf-8"))
    except ValueError:
        return {}  # transformers says what is wrong with it
    return config if isinstance(config, dict) else {}


def _of_components(folder: Path, components: Sequence[str]) -> Factory:
    """What makes the components of a pipeline of diffusers: a single one as it is, several side by side."""
    from permgraph.cli.pipelines import Components

    try:
        names = components or open_checkpoint(folder).components
    except CheckpointError as error:
        raise CaptureError(f"hf:{folder}: {error}") from None
    for name in names:
        if Path(name).name != name or not (folder / name).is_dir():
            raise CaptureError(f"hf:{folder}: it has no component {name!r}")
    makers = {name: from_folder(str(folder / name)) for name in names}
    if len(names) == 1:
        return makers[names[0]]
    return lambda: Components({name: make() for name, make in makers.items()})


def _from_transformers(folder: Path, *, headless: bool = False) -> Factory:
    transformers = package("transformers", "zoo")
    transformers.utils.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        named = (getattr(config, "architectures", None) or [None])[0]
        known = getattr(transformers, named, None) if named else None
    except Exception as error:
        raise CaptureError(f"hf:{folder}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    if headless:
        return _headless(folder, transformers, config)
    if named and known is None:
        raise CaptureError(
            f"hf:{folder}: transformers {transformers.__version__} has no {named}, and code that comes with a "
            f"checkpoint is not run: build it in a file of yours and say file.py:factory"
        )
    if known is not None:
        return lambda: known(config)
    return lambda: transformers.AutoModel.from_config(config)


def _headless(folder: Path, transformers: Any, config: Any) -> Factory:
    """What makes the model without a head, and of one with a decoder the encoder, as sentence-transformers does."""
    if getattr(config, "auto_map", None):
        raise CaptureError(f"hf:{folder}: code that comes with a checkpoint is not run: say file.py:factory")
    if not getattr(config, "is_encoder_decoder", False):
        return lambda: transformers.AutoModel.from_config(config)
    named = type(config).__name__.removesuffix("Config") + "EncoderModel"
    known = getattr(transformers, named, None)
    if known is None:
        raise CaptureError(f"hf:{folder}: transformers has no {named}: build it in a file of yours: file.py:factory")
    return lambda: known(config)


def _from_diffusers(folder: Path, config: dict[str, Any]) -> Factory:
    named = config["_class_name"]
    try:
        made = getattr(package("diffusers", "diffusers"), named, None)
    except MissingExtraError as error:
        raise MissingExtraError(
            f"hf:{folder}: it is the {named} of diffusers; {error}; or build it in a file of yours and say "
            "file.py:factory"
        ) from None
    if not hasattr(made, "from_config"):
        raise CaptureError(
            f"hf:{folder}: it is the {named} of diffusers, which is not installed, or has no such class: build it in a "
            "file of yours and say file.py:factory"
        )
    from permgraph.cli.pipelines import as_pipelines_use_it

    return lambda: as_pipelines_use_it(made.from_config(config))  # type: ignore[union-attr]


def _from_timm(folder: Path, config: dict[str, Any]) -> Factory:
    """What makes the model of a folder that timm wrote, whose configuration names an architecture."""
    timm = package("timm", "zoo")
    named = config["architecture"]
    if not timm.is_model(named):
        raise CaptureError(f"hf:{folder}: its architecture is {named!r}, which timm {timm.__version__} does not have")
    own = {key: config[key] for key in ("num_classes", "global_pool") if config.get(key) is not None}
    options = {**own, **(config.get("model_args") or {})}
    return lambda: timm.create_model(named, pretrained=False, **options)
