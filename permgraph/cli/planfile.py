"""A study's plan as a YAML file.

::

    model: net.py:Net                  # as MODEL elsewhere
    input: ["2,16000"]                 # shapes of example inputs, where none are found
    modules: true                      # also match whole modules that can change places
    networks: runs/*.safetensors       # or name: checkpoint, for each
    pairs: all                         # or ordered, first, or a list of [a, b]
    matchers:
      weights: {matcher: weight, order: random}
      activations: {matcher: activation, data: train.safetensors}
    seeds: [0, 1]
    data: {data: test.safetensors}     # what barriers are measured on; the options of --data
    recalibrate: {data: train.safetensors}
    points: 11
    threads: 1

Paths are relative to the file.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from permgraph.cli.checkpoints import fitted, require_finite, whole_state
from permgraph.cli.data import class_dim_of, load_data
from permgraph.cli.matchers import matcher_of
from permgraph.cli.models import build, require_one_structure, spec_of
from permgraph.cli.options import Data, MatcherName, Matching, Split
from permgraph.cli.screen import Screen
from permgraph.connectivity import evaluate_on, recalibrate_batchnorm
from permgraph.errors import MissingExtraError, StudyError, in_one_line
from permgraph.io import Checkpoint, open_checkpoint
from permgraph.matching import Matcher
from permgraph.studies import StudyPlan
from permgraph.studies.fingerprint import fingerprint

KEYS = (
    "model", "input", "modules", "networks", "pairs", "matchers", "seeds", "data", "recalibrate", "points", "threads",
    "unaligned",
)  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """Batches that each worker opens for itself, by the content that they had when the study was planned.

    Attributes:
        asked: the options that say which.
        folder: a Hugging Face folder with a tokenizer for text.
        split: of a data set that has both.
        fingerprint: of the content.
    """

    asked: Data
    folder: Path | None
    split: Split
    fingerprint: str

    def __iter__(self) -> Iterator[Any]:
        return iter(_batches(self))


@dataclass(frozen=True)
class Recalibrated:
    """Measures BatchNorm's statistics anew."""

    loader: Opened

    def __call__(self, network: nn.Module, t: float) -> nn.Module:
        """A copy of the network with statistics of the data."""
        return recalibrate_batchnorm(network, self.loader)


def read_plan(path: Path, screen: Screen) -> StudyPlan:
    """Read a plan, its networks and the content of its data.

    Raises:
        StudyError: the file is not a plan, or something in it does not fit; the message names the entry.
        PermgraphError: a model, checkpoint or data set that it names cannot be read.
    """
    content = _yaml(path)
    root = path.resolve().parent
    if not isinstance(content, dict):
        raise StudyError(f"{path}: a plan is a mapping with the keys {', '.join(KEYS)}")
    for key in content:
        if key not in KEYS:
            raise StudyError(f"{path}: unknown key {key!r}; a plan has {', '.join(KEYS)}")
    for key in ("model", "networks"):
        if key not in content:
            raise StudyError(f"{path}: it has no {key!r}")
    model = _anchored(str(content["model"]), root)
    with screen.stage("finding symmetries"):
        modules = content.get("modules", False)
        if not isinstance(modules, bool):
            raise StudyError(f"{path}: modules: {modules!r} is neither true nor false")
        spec = spec_of(model, _inputs(content.get("input"), path), modules=modules)
    module = build(model, device=None).eval()
    checkpoints = {name: open_checkpoint(file) for name, file in _networks(content["networks"], root, path).items()}
    inputs = _inputs(content.get("input"), path)
    require_one_structure(list(checkpoints.values()), model, spec, inputs, screen)
    networks = {name: _state(checkpoint, spec, module, model, screen) for name, checkpoint in checkpoints.items()}
    folder = next((checkpoint.folder for checkpoint in checkpoints.values() if checkpoint.folder), None)
    measured = _opened(content.get("data"), root, folder, Split.test, f"{path}: data")
    again = _opened(content.get("recalibrate"), root, folder, Split.train, f"{path}: recalibrate")
    plain = {key: content[key] for key in ("points", "threads", "unaligned") if key in content}
    for key, value in plain.items():
        if not isinstance(value, int):
            raise StudyError(f"{path}: {key}: {value!r} is not a number")
    first = next(iter(checkpoints.values()))
    return StudyPlan(
        model=module,
        networks=networks,
        matchers={
            str(name): _matcher(entry, root, folder, first, f"{path}: matchers: {name}")
            for name, entry in _mapping(content.get("matchers", {}), f"{path}: matchers").items()
        },
        evaluate=None if measured is None else evaluate_on(measured, class_dim=measured.asked.class_dim),
        seeds=_seeds(content.get("seeds", [0]), path),
        pairs=_pairs(content.get("pairs", "all"), path),
        prepare=None if again is None else Recalibrated(again),
        spec=spec,
        build=functools.partial(build, model, None),
        **plain,
    )


def _yaml(path: Path) -> Any:
    try:
        yaml = importlib.import_module("yaml")
    except ImportError as error:
        raise MissingExtraError("plans need PyYAML: pip install permgraph[study]") from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        """Plain data only, and no key twice: YAML would silently take the last."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            if key in found:
                raise StudyError(f"{path}, line {key_node.start_mark.line + 1}: {key!r} stands twice")
            found[key] = loader.construct_object(value_node, deep=True)
        return found

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(path.read_text(), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: not YAML: {in_one_line(error)}") from error
    except TypeError as error:  # a key that is a list or a mapping
        raise StudyError(f"{path}: {error}") from error


def _inputs(entry: Any, path: Path) -> list[str] | None:
    texts = [entry] if isinstance(entry, str) else entry
    if texts is not None and not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise StudyError(f"{path}: input: give a text, or a list of texts, as in '1,3,224,224'")
    return texts


def _networks(entry: Any, root: Path, path: Path) -> dict[str, Path]:
    if isinstance(entry, str):
        files = sorted(Path(file) for file in glob.glob(str(root / entry)))
        found = {file.stem: file for file in files}
        if len(found) != len(files):
            raise StudyError(f"{path}: networks: two files of {entry!r} have one name: give names yourself")
        if not files:
            raise StudyError(f"{path}: networks: {entry!r} matches no file")
        return found
    return {str(name): root / str(file) for name, file in _mapping(entry, f"{path}: networks").items()}


def _state(checkpoint: Checkpoint, spec: Any, module: nn.Module, model: str, screen: Screen) -> dict[str, Any]:
    state = whole_state(fitted(checkpoint, spec, screen, model=model), spec, module)
    for name, tensor in state.items():
        require_finite(name, tensor, checkpoint.path)
    return state


def _matcher(entry: Any, root: Path, folder: Path | None, checkpoint: Checkpoint, where: str) -> Matcher:
    asked = dict(_mapping(entry, where))
    try:
        name = MatcherName(asked.pop("matcher", "weight"))
    except ValueError as error:
        raise StudyError(f"{where}: {error}; choose {', '.join(MatcherName)}") from error
    of_data = {key.replace("_", "-"): asked.pop(key) for key in list(asked) if key.replace("-", "_") in _data_fields()}
    loader = _opened(of_data or None, root, folder, Split.train, where)
    settings = [f"{key}={value!r}" for key, value in asked.items()]
    options = Matching(matcher=name, settings=settings, stream=False)
    return matcher_of(options, checkpoint, loader, 1 if loader is None else _class_dim(loader))


def _data_fields() -> set[str]:
    return {field.name for field in dataclasses.fields(Data)}


def _opened(entry: Any, root: Path, folder: Path | None, split: Split, where: str) -> Opened | None:
    if entry is None:
        return None
    options = {"data": entry} if isinstance(entry, str) else dict(_mapping(entry, where))
    given = {str(key).replace("-", "_"): value for key, value in options.items()}
    if unknown := sorted(given.keys() - _data_fields()):
        raise StudyError(f"{where}: unknown option {unknown[0]!r}; data have {', '.join(sorted(_data_fields()))}")
    if "data" not in given:
        raise StudyError(f"{where}: it does not say which data")
    given["data"] = _anchored(str(given["data"]), root)
    if "split" in given:
        split = Split(given.pop("split"))
    if "tokenizer" in given:
        given["tokenizer"] = root / str(given["tokenizer"])
    asked = Data(**given)  # type: ignore[arg-type]  # as the user wrote them; `load_data` refuses what is wrong
    return Opened(asked, folder, split, fingerprint(list(load_data(asked, folder, split=split))))


@functools.lru_cache(maxsize=4)
def _batches(opened: Opened) -> Iterable[Any]:
    """The batches, once it is sure that they are still those of the plan."""
    batches = load_data(opened.asked, opened.folder, split=opened.split)
    if fingerprint(list(batches)) != opened.fingerprint:
        raise StudyError(f"{opened.asked.data} has other content here than where the study was planned")
    return batches


def _class_dim(opened: Opened) -> int:
    """The dimension of the logits that holds the classes; read afresh, so that workers still compare the data."""
    return class_dim_of(opened.asked, load_data(opened.asked, opened.folder, split=opened.split))


def _anchored(text: str, root: Path) -> str:
    """The text with the file that it begins with, if it does, made independent of where the worker runs."""
    kind, colon, rest = text.partition(":")
    if kind == "hf" and colon:
        return f"hf:{root / rest}"
    if kind.endswith(".py") or (not colon and (root / text).exists()):
        return f"{root / kind}{colon}{rest}"
    return text


def _pairs(entry: Any, path: Path) -> Any:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, Sequence) or not all(isinstance(pair, list) and len(pair) == 2 for pair in entry):
        raise StudyError(f"{path}: pairs: give all, ordered, first, or a list of [a, b]")
    return [(str(a), str(b)) for a, b in entry]


def _seeds(entry: Any, path: Path) -> list[int]:
    if not isinstance(entry, list) or not all(isinstance(seed, int) for seed in entry):
        raise StudyError(f"{path}: seeds: give a list of whole numbers")
    return entry


def _mapping(entry: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping):
        raise StudyError(f"{where}: give a mapping, not {entry!r}")
    if len({str(key) for key in entry}) < len(entry):
        raise StudyError(f"{where}: two names are the same once they are texts, such as 1 and '1': give other names")
    return entry
