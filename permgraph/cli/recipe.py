"""mergekit's recipes: read, checked before anything is computed, and run on models that were aligned."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from permgraph.errors import CheckpointError, MismatchError, MissingExtraError, PermgraphError, in_one_line

METHOD = "permgraph_align"
"""The merge method that a recipe names for the mean of the aligned models."""

CARD = """---
library_name: transformers
tags: [mergekit, merge, permgraph]
---
# {name}

The models were brought into correspondence with `{base}` by permgraph, which leaves what each computes as it is, and
merged by mergekit {version}, with the method `{method}` of this recipe:

```yaml
{source}
```
"""

T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """A recipe of mergekit's.

    Attributes:
        path: of the YAML file.
        source: its text.
        method: the merge method that it names.
        config: mergekit's ``MergeConfiguration``; where the method is `METHOD`, mergekit's linear mean in its place.
        options: mergekit's ``MergeOptions``.
        base: the model that all others are aligned to, as mergekit names it: the base model, or the first one.
        others: the others, in their order.
    """

    path: Path
    source: str
    method: str
    config: Any
    options: Any
    base: Any
    others: tuple[Any, ...]

    @classmethod
    def read(cls, path: Path, options: Sequence[str], *, quiet: bool) -> Recipe:
        """Read a recipe, and let mergekit plan it, so that what it refuses is known before anything is computed.

        Args:
            path: of the YAML file.
            options: of mergekit's, as ``NAME=VALUE``.
            quiet: whether mergekit's progress bars are left out.

        Raises:
            MissingExtraError: mergekit is not installed.
            CheckpointError: the file cannot be read, or is no recipe.
            MismatchError: mergekit refuses the recipe or an option, or knows nothing of the architecture.
        """
        try:
            import yaml
            from mergekit.config import MergeConfiguration
            from mergekit.options import MergeOptions
        except ImportError as error:
            if (error.name or "").partition(".")[0] not in ("mergekit", "yaml"):
                raise MissingExtraError(f"mergekit cannot be imported: {in_one_line(error)}") from error
            raise MissingExtraError("recipes need mergekit: pip install 'permgraph[mergekit]'") from error
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file: give a recipe of mergekit's, in YAML")
        try:
            source = path.read_text(encoding="utf-8")
            written = yaml.safe_load(source)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is no YAML: {in_one_line(error, 200)}") from None
        if not isinstance(written, dict) or not isinstance(written.get("merge_method"), str):
            raise CheckpointError(f"{path} is no recipe of mergekit's: it has no merge_method")
        named: dict[str, Any] = {"quiet": quiet}
        for option in options:
            name, equals, value = option.partition("=")
            if not equals or name not in MergeOptions.model_fields:
                known = ", ".join(MergeOptions.model_fields)
                raise MismatchError(f"--option {option!r}: say NAME=VALUE with one of {known}")
            named[name] = yaml.safe_load(value)
        if named.get("trust_remote_code"):
            raise MismatchError("--option trust_remote_code: code that comes with a checkpoint is not run")
        config = _asked(path, lambda: MergeConfiguration.model_validate(written))
        asked = _asked(path, lambda: MergeOptions(**named))
        found = list(dict.fromkeys(_references(config)))
        if config.base_model is None and config.merge_method == METHOD:
            raise MismatchError(f"{path}: {METHOD} aligns the models to base_model: name one")
        if not found:
            raise MismatchError(f"{path} names no models")
        base = config.base_model or found[0]
        others = tuple(reference for reference in found if reference != base)
        if not others:
            raise MismatchError(f"{path} names one model: there is nothing to align")
        method = config.merge_method
        recipe = cls(path, source, method, _as_linear(config) if method == METHOD else config, asked, base, others)
        _asked(path, recipe._plan)
        return recipe

    def folder(self, reference: Any) -> Path:
        """Where a model lies: its folder, that of the hub's copy, or of the sum with its LoRA, which mergekit makes."""

        def place() -> str:
            options = self.options
            merged = reference.merged(cache_dir=options.lora_merge_cache, lora_merge_dtype=options.lora_merge_dtype)
            return str(merged.local_path(cache_dir=options.transformers_cache))

        return Path(_asked(self.path, place, f"model {reference}"))

    def run(self, folders: Mapping[Any, Path], out: Path, name: str) -> None:
        """Let mergekit merge the models that lie in these folders.

        Args:
            folders: for each model where it lies, and each but the base was aligned.
            out: an empty folder, to write to.
            name: of the result, in its model card.

        Raises:
            MismatchError: mergekit fails.
        """
        import mergekit
        from mergekit.common import ModelPath, ModelReference
        from mergekit.merge import run_merge

        swapped = {
            reference: ModelReference(
                model=ModelPath(path=str(path.resolve())), override_architecture=reference.override_architecture
            )
            for reference, path in folders.items()
        }
        # The card is our own: mergekit's names the folders that it reads, and asks the hub about them.
        options = self.options.model_copy(update={"write_model_card": False})
        if options.copy_tokenizer and not (self.folder(self.base) / "tokenizer_config.json").is_file():
            options = options.model_copy(update={"copy_tokenizer": False})
        config = replaced(self.config, swapped)
        with _own_loaders():
            _asked(self.path, lambda: run_merge(config, str(out), options, self.source))
        if self.options.write_model_card:
            version = getattr(mergekit, "__version__", "") or _version()
            card = CARD.format(
                name=name, base=self.base, method=self.method, version=version, source=self.source.rstrip()
            )
            (out / "README.md").write_text(card, encoding="utf-8")
            (out / "mergekit_config.yml").write_text(self.source, encoding="utf-8")

    def _plan(self) -> None:
        """Have mergekit plan what it would do with the models as they are; nothing is computed."""
        from mergekit.architecture import get_architecture_info
        from mergekit.io.tasks import LoaderCache
        from mergekit.plan import MergePlanner

        config = self.config.model_copy(deep=True)  # planning rewrites it
        LoaderCache().setup(options=self.options)
        with _own_loaders():
            architecture = get_architecture_info(config, self.options)
            planner = MergePlanner(config, architecture, options=self.options, out_model_config=self.base.config())
            planner.plan_to_disk(out_path=os.devnull)  # which is opened when a plan is carried out, as this one is not


@contextmanager
def _own_loaders() -> Iterator[None]:
    """Let mergekit open files anew, and forget them afterwards: it keeps them by their paths, for the whole process."""
    from mergekit.io.tasks import LoaderCache

    kept = LoaderCache().loaders
    others = dict(kept)
    kept.clear()
    try:
        yield
    finally:
        kept.clear()
        kept.update(others)


def _asked(path: Path, do: Callable[[], T], what: str = "") -> T:
    """What mergekit returns; what it refuses, in whatever way, is the recipe's error."""
    try:
        return do()
    except (PermgraphError, MemoryError):
        raise
    except Exception as error:
        logging.getLogger(__name__).debug("mergekit", exc_info=error)
        said = f"{what}: " if what else ""
        raise MismatchError(f"{path}: {said}mergekit says: {in_one_line(error, 400)}") from error


def _as_linear(config: Any) -> Any:
    """The mean of the models as mergekit's linear method, where each counts 1 unless the recipe says otherwise.

    A base model that is not among the models gives the numbering, and does not count in the mean.
    """
    from mergekit.config import InputModelDefinition

    def with_base(models: Any) -> Any:
        if not models or any(each.model == config.base_model for each in models):
            return models
        return [*models, InputModelDefinition(model=config.base_model, parameters={"weight": 0.0})]

    modules = config.modules and {
        name: module.model_copy(update={"models": with_base(module.models)}) for name, module in config.modules.items()
    }
    return config.model_copy(
        update={
            "merge_method": "linear",
            "models": with_base(config.models),
            "modules": modules,
            "parameters": {"weight": 1.0, **(config.parameters or {})},
        }
    )


def _references(value: Any) -> Iterator[Any]:
    """Every model that a configuration names, in the order of its text's fields."""
    from mergekit.common import ModelReference
    from pydantic import BaseModel

    if isinstance(value, ModelReference):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _references(getattr(value, name))
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _references(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _references(each)


def replaced(value: Any, swapped: Mapping[Any, Any]) -> Any:
    """A configuration with other models in the place of some."""
    from mergekit.common import ModelReference
    from pydantic import BaseModel

    if isinstance(value, ModelReference):
        return swapped.get(value, value)
    if isinstance(value, BaseModel):
        fields = {name: replaced(getattr(value, name), swapped) for name in type(value).model_fields}
        return value.model_copy(update=fields)
    if isinstance(value, Mapping):
        return {key: replaced(each, swapped) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(replaced(each, swapped) for each in value)
    return value


def _version() -> str:
    from importlib.metadata import version

    return version("mergekit")
