"""A checkpoint read by a spec's names, and what may be asked of its tensors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from permgraph.cli.extra_keys import left_out
from permgraph.cli.models import build
from permgraph.cli.pipelines import Components
from permgraph.cli.rows import tied_names
from permgraph.cli.screen import Screen
from permgraph.cli.sentences import SentencePipeline
from permgraph.errors import MismatchError, NonFiniteError, PermgraphError
from permgraph.io import Checkpoint, Renamed, match_names, open_checkpoint
from permgraph.io.checkpoint import TORCH_SUFFIXES, which_was_read
from permgraph.io.converted import Conversions, ConvertedCheckpoint, converted, names_on_disk
from permgraph.io.original import is_original, of_diffusers
from permgraph.io.parts import PartFile, is_pipeline
from permgraph.io.torch_file import TorchFile
from permgraph.io.write import not_carried_over
from permgraph.matching.general.pieces import Piecewise
from permgraph.matching.rows import resized
from permgraph.spec.data import SpecData
from permgraph.spec.elements import AnyElement
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation

log = logging.getLogger(__name__)


def open_all(
    paths: Sequence[Path], entry: str | None, screen: Screen, components: Sequence[str] = ()
) -> tuple[Checkpoint, ...]:
    """Open checkpoints, and say which of a folder's weights were read, where it has several.

    An entry is looked up in the PyTorch files among them: a file of another kind has none, and is what it is. Of
    pipelines of diffusers, the components that all have are read, or those that are asked for.
    """
    if not components and all(map(is_pipeline, paths)):
        each = [open_checkpoint(path).components for path in paths]
        components = [name for name in each[0] if all(name in others for others in each)]
        rest = sorted({name for own in each for name in own} - set(components))
        if not components:
            raise MismatchError(f"{paths[0]} and {paths[1]} have no component of the same name with weights")
        if rest:
            screen.note(f"{', '.join(rest)}: not in all of them, and copied where the output's layout has it")
    wrapped = [path for path in paths if path.suffix in TORCH_SUFFIXES] or paths
    opened = tuple(open_checkpoint(path, entry if path in wrapped else None, components) for path in paths)
    for checkpoint in opened:
        screen.note(which_was_read(checkpoint))
    return opened


def note_what_is_left_behind(checkpoint: Checkpoint, screen: Screen) -> None:
    """Say what lies beside a checkpoint's weights, and holds tensors that no copy is given."""
    for each in checkpoint.files:
        file = each.file if isinstance(each, PartFile) else each
        if isinstance(file, TorchFile) and file.dropped:
            names = ", ".join(map(repr, file.dropped))
            screen.note(f"{file.path}: {names} not carried over: tensors in there would no longer fit")
    screen.note(not_carried_over(checkpoint))


def fitted(
    checkpoint: Checkpoint,
    spec: PermutationSpec,
    screen: Screen,
    leave: Sequence[str] = (),
    model: str = "",
    *,
    other_rows: bool = False,
) -> Renamed:
    """A checkpoint by the spec's names, once it is sure that every name and shape fits; no tensor is read.

    Args:
        checkpoint: whose keys may differ from the names by a prefix, or be of tensors that the model has joined.
        spec: what it must fit.
        screen: is told of the prefix.
        leave: patterns of keys that the spec does not know and that are left as they are; what it knows is not.
        model: what it holds the weights of, if that has names and tensors of its own for the keys.
        other_rows: whether it may have other numbers of rows on which nothing acts, of tokens or classes.

    Raises:
        MismatchError: it does not fit; the message names the file and the first key at fault.
    """
    try:
        if is_original(checkpoint) and model.startswith("hf:"):
            checkpoint, conversions = of_diffusers(checkpoint, build(model)), None
        else:
            conversions = conversions_of(model)
            checkpoint = converted(checkpoint, conversions)
        made = checkpoint.units if isinstance(checkpoint, ConvertedCheckpoint) else {}  # these have the model's names
        plain = [key for key in checkpoint if key not in made]
        today = {**names_on_disk(conversions, plain), **{key: key for key in made}}
        matched, note = match_names(list(today.values()), [*spec.tensors, *spec.aliases, *spec.unused])
        names = {key: matched[name] for key, name in today.items()}
        if note:
            screen.note(f"{checkpoint.path}: {note}")
        left = left_out(checkpoint, names, spec, leave, model, screen)
        known = {name: key for key, name in names.items() if key not in left}
        tied = tied_names(checkpoint, known, spec)
        if tied:
            _materialise(tied, known, spec, checkpoint, screen)
        known = {**tied, **known}  # the names that it has come last, and are those by which its keys are moved
        renamed = Renamed(checkpoint, known)
        values = renamed.without_values()
        (_with_shapes_of(values, spec) if other_rows else spec).check(values)
        for name, key in known.items():
            dtype = checkpoint.formats[key].dtype
            if spec.aliases.get(name, name) in spec.tensors and not (dtype.is_floating_point or dtype.is_complex):
                raise MismatchError(f"{key!r} is {dtype}, but the model's weights are floating point: dequantise first")
    except MismatchError as error:
        raise MismatchError(f"{checkpoint.path}: {error}") from None
    return renamed


def _materialise(
    tied: Mapping[str, str], known: Mapping[str, str], spec: PermutationSpec, checkpoint: Checkpoint, screen: Screen
) -> None:
    """Say which names a tied checkpoint's tensors are read under besides; refuse where it would not stay tied."""
    names = {key: name for name, key in known.items()}
    for name, key in tied.items():
        if spec.general is not None:
            raise MismatchError(
                f"its configuration ties {name!r} to {names[key]!r}, which the other's does not: over general "
                "symmetries they would not stay one: save it untied, or leave out --symmetry general"
            )
        held = spec.aliases.get(names[key], names[key])
        if name in spec.in_stack or held in spec.in_stack or spec.axes[name] != spec.axes[held]:
            raise MismatchError(
                f"its configuration ties {name!r} to {names[key]!r}, which the other's does not, and whose units are "
                "others there: save it untied"
            )
        screen.note(
            f"{checkpoint.path}: {name!r} is tied to {names[key]!r} by its configuration, and untied in the other: "
            "read as the same tensor"
        )


def _with_shapes_of(values: Mapping[str, torch.Tensor], spec: PermutationSpec) -> PermutationSpec:
    return resized(spec, {spec.aliases.get(name, name): tuple(tensor.shape) for name, tensor in values.items()})


def conversions_of(model: str) -> Conversions | None:
    """What transformers does to checkpoints of a model as it is named on the command line; None if it is not one."""
    if not model.startswith("hf:"):
        return None
    try:
        module = build(model)
        return (Conversions.of_parts if isinstance(module, (SentencePipeline, Components)) else Conversions.of)(module)
    except PermgraphError as error:  # whatever is missing, the spec that a checkpoint must fit is known already
        log.info("%s: no conversions: %s", model, error)
        return None


def require_alike(a: Renamed, b: Renamed) -> None:
    """Raise MismatchError for a real tensor beside a complex one: no renumbering brings them together."""
    for name, key in a.keys_of.items():
        other = b.keys_of.get(name)
        if other is None:
            continue
        one, two = a.checkpoint.formats[key].dtype, b.checkpoint.formats[other].dtype
        if one.is_complex != two.is_complex:
            raise MismatchError(f"{key!r} is {one} in {a.checkpoint.path} but {two} in {b.checkpoint.path}")


def require_finite(name: str, tensor: torch.Tensor, path: Path) -> None:
    """Raise NonFiniteError if a tensor holds NaN or infinity."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    # Any NaN or infinity shows in the sum; a finite tensor can overflow it, so look again before refusing.
    if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(f"{path}: {name!r} holds NaN or infinity in {bad} of its {tensor.numel()} elements")


def in_parts(element: AnyElement) -> Permutation | Piecewise:
    """An element as `moved_by` takes it, which moves many tensors: a transformation acts on large ones in parts."""
    return Piecewise(element) if isinstance(element, Transformation) else element


def moved_by(
    element: Permutation | Piecewise, name: str, tensor: torch.Tensor, weights: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """A tensor of a checkpoint after a permutation or a transformation; one that the spec does not know as it is.

    Where a matrix acts between gains, these are read in the checkpoint's other weights.
    """
    spec = element.spec
    name = spec.aliases.get(name, name)
    if name in spec.in_stack:
        source, within, _ = (element.element if isinstance(element, Piecewise) else element).member(name)
        return moved_by(in_parts(within), source, tensor_of(weights, source, spec), weights)
    if name not in spec.axes:
        return tensor
    if isinstance(element, Piecewise):
        gains = {gain: tensor_of(weights, gain, element.spec) for gain in element.gains_of(name)}
        return element.apply_to(name, tensor, gains)
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():  # eight-bit floats cannot be indexed everywhere
        return element.apply_to(name, tensor.view(torch.uint8)).view(tensor.dtype)
    return element.apply_to(name, tensor)


def tensor_of(weights: Mapping[str, torch.Tensor], name: str, spec: SpecData) -> torch.Tensor:
    """The tensor of a name, which the checkpoint may hold under any of the names tied to it."""
    if name in weights:
        return weights[name]
    canonical = spec.aliases.get(name, name)
    same = (canonical, *(alias for alias, other in spec.aliases.items() if other == canonical))
    return weights[next(other for other in same if other in weights)]


def whole_state(weights: Renamed, spec: PermutationSpec, module: nn.Module) -> dict[str, Any]:
    """A state dict that the module takes: the checkpoint's tensors, and the module's own where it has none."""
    state: dict[str, Any] = {}
    for name, own in module.state_dict().items():
        known = spec.aliases.get(name, name) in spec.tensors or name in weights
        state[name] = tensor_of(weights, name, spec) if known else own
    return state


def identity_of(checkpoint: Checkpoint) -> list[list[Any]]:
    """What tells whether a checkpoint is still the same, without reading it: files, sizes, times, the entry read."""
    return [[*_identity(file.path), *getattr(file, "wrapper", ())] for file in checkpoint.files]


def identity_of_files(*paths: Path | None) -> list[list[Any]]:
    """The same of files of any kind, and of all that lie in folders."""
    found = []
    for path in filter(None, paths):
        found += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [_identity(path) for path in found]


def _identity(path: Path) -> list[Any]:
    path = path.resolve()
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]
