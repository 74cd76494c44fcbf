"""What an argument of a module may be, as values to search over: kinds, sizes, and what its name hints at.

The sizes with which a guess begins are primes, and another one for each argument, so that a size in a complaint tells
whose it is.
"""

from __future__ import annotations

import collections.abc
import inspect
import itertools
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from permgraph.capture.inputs.layers import BATCH, filled, floats, integer, integers, named_sides

Kind = Literal[
    "real", "complex", "ids", "mask", "lengths", "edges", "members", "list", "record", "mapping", "number", "numbers"
]

#: Lengths and widths of the first, second, ... argument.
LENGTHS = (19, 23, 29, 31, 43, 47, 71, 73)
WIDTHS = (37, 41, 53, 59, 61, 67, 79, 83)
FRAMES, SIDE = 8, 32


@dataclass(frozen=True)
class Guess:
    """Values of one argument: of which kind, in which shape; integers below `bound`, lengths along `axis`."""

    kind: Kind
    shape: tuple[int, ...] = ()
    bound: float = 2
    axis: int = 1
    #: Of numbers in tuples and lists: `("list", ("tuple", "number", "number"))` and the like.
    form: Any = None

    def with_(self, **changes: Any) -> Guess:
        return replace(self, **changes)


Guesses = Mapping[str, Guess]
"""The arguments that are given, by name; what a record holds goes by `record.name`."""
Mend = tuple[float, dict[str, Guess]]
"""Other guesses, with what it costs to believe them."""
RECORDS = ("record", "mapping")


def changed(guesses: Guesses, name: str, guess: Guess) -> dict[str, Guess]:
    """The guesses with another for one argument; what it held before goes."""
    kept = {key: value for key, value in guesses.items() if not key.startswith(f"{name}.") or guess.kind in RECORDS}
    return {**kept, name: guess}


def values_of(model: nn.Module, guesses: Guesses) -> dict[str, Any]:
    """The arguments that guesses stand for."""
    made: dict[str, Any] = {}
    for name, guess in guesses.items():
        value = _value(model, guess, guesses)
        owner, _, own = name.rpartition(".")
        if not owner:
            made[name] = value
        elif isinstance(made[owner], dict):
            made[owner][own] = value
        else:
            setattr(made[owner], own, value)
    return made


def _value(model: nn.Module, guess: Guess, guesses: Guesses) -> Any:
    shape = guess.shape
    reals = [other.shape for other in guesses.values() if other.kind == "real" and len(other.shape) > 1]
    rows = reals[0][0] if reals else BATCH
    match guess.kind:
        case "ids":
            return integers(int(guess.bound), *shape)
        case "mask":
            return filled(1, *shape).bool()
        case "lengths":  # the first sample is as long as the tensor, others are shorter
            sequences = [other.shape for other in guesses.values() if other.kind in ("real", "ids") and other.shape]
            longest = next((size[guess.axis] for size in sequences if len(size) > 1), 1)
            return torch.tensor([max(longest - 2 * at, 1) for at in range(*shape)], device="cpu")
        case "edges":
            return integers(rows, *shape)
        case "members":
            return torch.arange(rows, device="cpu") * BATCH // rows
        case "list":
            return [floats(model, *shape[1:]) for _ in range(shape[0])]
        case "record":
            return SimpleNamespace()
        case "mapping":
            return {}
        case "number":
            return guess.bound
        case "complex":
            angles = floats(model, *shape).float()
            return torch.polar(torch.ones_like(angles), angles)
        case "numbers":
            return _nested(guess.form, guess.bound)
        case _:
            return floats(model, *shape)


def _nested(form: Any, number: float) -> Any:
    """Tuples and lists of one number, nested as a form says."""
    if form == "number":
        return int(number)
    container, *items = form
    made = [_nested(item, number) for item in items]
    return tuple(made) if container == "tuple" else made


def shape_of_rank(model: nn.Module, rank: int, length: int, width: int) -> Iterator[tuple[int, ...]]:
    """Shapes of so many dimensions as networks take: vectors, sequences, images, videos in both orders."""
    channels = channels_of(model)
    side = next((height for height, width_ in named_sides(model) if height == width_), SIDE)
    match rank:
        case 1:
            yield (BATCH,)
        case 2:
            yield (BATCH, width)
        case 3:
            yield (BATCH, length, width)
        case 4:
            yield (BATCH, channels, side, side)
        case 5:
            yield (BATCH, channels, FRAMES, side, side)
            yield (BATCH, FRAMES, channels, side, side)
            yield (BATCH, FRAMES, side, side, channels)
        case 6:
            yield (BATCH, 3, channels, FRAMES, side, side)


def channels_of(model: nn.Module) -> int:
    """How many channels the first convolution takes, or the module says that it takes; three where none does."""
    convolutions = (m.in_channels for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
    named = (integer(vars(model).get(name)) for name in ("channels", "in_channels", "in_chans", "num_channels"))
    return next((size for size in (*convolutions, *named) if size), 3)


# -- what names and annotations hint at -------------------------------------------------------------------------------

_TIMES = "t time times timestep timesteps step steps sigma sigmas noise level"
_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # Words in an argument's name, and what they hint at, the likeliest first.
    ("edge+index edges edgelist", ("edges",)),
    ("adj adjacency", ("square", "edges")),
    ("edge+attr edge+attrs edge+weight edge+weights edge+features edge+feats", ("links",)),
    ("batch+index batch+idx batch+vec", ("members",)),
    ("length lengths lens len seqlens seqlen", ("lengths", "lengths last")),
    ("mask masks", ("mask", "ids")),
    ("kwargs", ("mapping",)),
    (_TIMES, ("labels", "numbers")),
    ("label labels class classes category", ("labels", "ids", "vectors")),
    ("ids tokens token text texts words idx indices index src tgt captions", ("ids", "labels")),
    ("video videos clip clips frames vid", ("video",)),
    ("sample image images img pixel pixels latent latents picture", ("image", "sequence")),
    ("pooled projections embedding", ("vectors", "sequence")),
    ("states embeds context features memory encoder", ("sequence", "vectors")),
    ("bag bags instances", ("sequence", "list", "vectors")),
    ("data graph batch sample inputs", ("sequence", "record", "mapping", "members")),
)
_USUAL = (
    "sequence", "vectors", "ids", "image", "labels", "video", "mask", "list", "record", "mapping", "number",
)  # fmt: skip


def beginnings(model: nn.Module, name: str, place: int, annotation: Any = None) -> list[Guess]:
    """What an argument may be, the likeliest first: by its annotation, then by its name, then whatever is usual."""
    number = _number(annotation)
    if number is not None:
        return [number]
    holders = [Guess("mapping") for option in _options(annotation) if dict in (option, typing.get_origin(option))]
    numbers = [Guess("numbers", form=form) for form in _forms_of_numbers(annotation)]
    lists = [Guess("list", shape) for shape in _lists(model)] if _is_list(annotation) else []
    words = re.split(r"[_\d.]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    joined = set(words) | {"+".join(pair) for pair in itertools.pairwise(words)}
    named = [kind for listed, kinds in _KINDS if joined & set(listed.split()) for kind in kinds]
    made = [
        guess for kind in dict.fromkeys((*named, *_pictures(model), *_USUAL)) for guess in _begun(model, kind, place)
    ]
    return list(dict.fromkeys((*holders, *numbers, *lists, *made)))


def _is_list(annotation: Any) -> bool:
    """Whether an argument says of itself that it is a list of tensors."""
    origins = (list, collections.abc.Sequence, tuple)
    for option in _options(annotation):
        if option is list or (typing.get_origin(option) in origins and typing.get_args(option)[:1] == (Tensor,)):
            return True
    return False


def _options(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _forms_of_numbers(annotation: Any) -> Iterator[Any]:
    """How an argument that says of itself that it holds whole numbers holds them: a list has one for each sample."""
    for option in _options(annotation):
        container, held = typing.get_origin(option), [item for item in typing.get_args(option) if item is not ...]
        if container not in (list, tuple) or not held:
            continue
        inner = ["number" if item is int else next(_forms_of_numbers(item), None) for item in held]
        if None in inner:
            continue
        if container is tuple and ... not in typing.get_args(option):
            yield ("tuple", *inner)
        else:
            yield from ((container.__name__, *inner * count) for count in (BATCH, 1))


def _lists(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of lists of samples: of pictures, if that is what the first layer takes, of clips, of rows of vectors."""
    image = next(shape_of_rank(model, 4, LENGTHS[0], WIDTHS[0]))
    clip = next(shape_of_rank(model, 5, LENGTHS[0], WIDTHS[0]))
    row = (BATCH, LENGTHS[0], WIDTHS[0])
    yield from {(): (row, image, clip), ("image",): (image, row, clip), ("video",): (clip, image, row)}[
        _pictures(model)
    ]


def _pictures(model: nn.Module) -> tuple[str, ...]:
    """Images or videos, for a model whose first layer is a convolution over such."""
    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding, nn.RNNBase)
    first = next((m for m in model.modules() if isinstance(m, layers)), None)
    return ("image",) if isinstance(first, nn.Conv2d) else ("video",) if isinstance(first, nn.Conv3d) else ()


def _number(annotation: Any) -> Guess | None:
    """The guess for an argument that says of itself that it is a number; a tensor as well is taken for a tensor."""
    options = _options(annotation)
    if Tensor in options:
        return None
    return next((Guess("number", bound=kind(2)) for kind in (int, float, bool) if kind in options), None)


def _begun(model: nn.Module, kind: str, place: int) -> Iterator[Guess]:
    length, width = LENGTHS[place % len(LENGTHS)], WIDTHS[place % len(WIDTHS)]
    ranks = {"numbers": 1, "vectors": 2, "sequence": 3, "image": 4, "video": 5}
    vocabulary = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 2)
    match kind:
        case "ids":
            yield Guess("ids", (BATCH, length), vocabulary)
        case "labels":
            yield Guess("ids", (BATCH,))
        case "mask":
            yield Guess("mask", (BATCH, length))
            yield Guess("mask", (BATCH, 1, SIDE, SIDE))
        case "lengths":
            yield Guess("lengths", (BATCH,))
        case "lengths last":
            yield Guess("lengths", (BATCH,), axis=-1)
        case "edges":
            yield Guess("edges", (2, LENGTHS[1]))
        case "square":
            yield Guess("real", (BATCH, LENGTHS[0], LENGTHS[0]))
            yield Guess("real", (LENGTHS[0], LENGTHS[0]))
        case "links":
            yield Guess("real", (LENGTHS[1], width))
            yield Guess("real", (LENGTHS[1],))
        case "members":
            yield Guess("members")
        case "list":
            yield Guess("list", (BATCH, length, width))
        case "record" | "mapping":
            yield Guess(typing.cast(Kind, kind))
        case "number":
            yield Guess("number")
        case _:
            for shape in shape_of_rank(model, ranks[kind], length, width):
                yield Guess("real", shape)


def paired(guesses: Guesses) -> dict[str, Guess]:
    """The guesses with each mask as long as the sequence that it is called after, or that stands before it."""
    names = list(guesses)
    lengths = {
        name: guess.shape[1]
        for name, guess in guesses.items()
        if (guess.kind == "real" and len(guess.shape) == 3) or (guess.kind == "ids" and len(guess.shape) == 2)
    }

    def alike(mask: str, name: str) -> tuple[int, bool, int]:
        shared = len(set(mask.split("_")) & set(name.split("_")))
        return shared, names.index(name) < names.index(mask), -abs(names.index(name) - names.index(mask))

    made = dict(guesses)
    for mask, guess in guesses.items():
        others = [name for name in lengths if name != mask]
        if guess.kind == "mask" and len(guess.shape) == 2 and others:
            best = max(others, key=lambda name: alike(mask, name))
            made[mask] = guess.with_(shape=(guess.shape[0], lengths[best]))
    return made


def parameters_of(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The arguments of `forward` that can be given by name or by place; none where Python knows no signature."""
    try:
        found = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}
    return {name: p for name, p in found.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def handed_on(model: nn.Module) -> list[str]:
    """What parts of a model do without and take, where the model hands on whatever it is given besides its own."""
    try:
        own = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    if not any(p.kind is p.VAR_KEYWORD for p in own):
        return []
    parts = (parameters_of(part) for part in model.modules() if type(part).__module__.partition(".")[0] != "torch")
    return list(dict.fromkeys(name for taken in parts for name, p in taken.items() if p.default is None))


def annotations_of(model: nn.Module) -> dict[str, Any]:
    """The annotations of `forward`, where they can be read."""
    try:
        return typing.get_type_hints(model.forward)
    except Exception:  # names that are known where they are written, and nowhere else
        return {}
