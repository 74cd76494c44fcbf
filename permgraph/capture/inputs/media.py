"""Finders for images and sound, alone and beside a text.

A model of several media takes text with as many placeholders as it has features of the image or the sound; how many
that are, the model says itself: its own method for them is run once, on tensors without data.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.capture.inputs.forms import (
    IMAGES,
    SOUNDS,
    VIDEOS,
    Arguments,
    Form,
    accepted,
    decoder_ids,
    keyword_finder,
)
from permgraph.capture.inputs.layers import (
    BATCH,
    BY_NAME,
    LENGTH,
    configured,
    filled,
    floats,
    integers,
    likeliest,
    required,
    setting,
    vocabulary,
    whole,
)
from permgraph.capture.inputs.registry import Candidate, input_finder
from permgraph.errors import CaptureError


def _completed(model: nn.Module, arguments: Arguments) -> Iterator[dict[str, Tensor]]:
    """The arguments with those added, by name, that forward also requires."""
    missing = [name for name in required(model) if name not in arguments]
    parameters = inspect.signature(model.forward).parameters
    missing = [name for name in missing if parameters[name].default is inspect.Parameter.empty]
    if "decoder_input_ids" in parameters and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        missing.append("decoder_input_ids")
    if all(name in BY_NAME for name in missing):
        for values in itertools.islice(itertools.product(*(BY_NAME[name](model) for name in missing)), 4):
            yield {**arguments, **dict(zip(missing, values, strict=True))}


_SPECTROGRAMS = {"input_features", "audio_mel", "input_features_mask", "audio_mel_mask", "attention_mask"}


@keyword_finder("sound")
def _sound(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """Spectrograms, with their masks where it takes these, for a model that requires them."""
    needed = set(required(model))
    if needed & {"input_features", "audio_mel"} and needed <= _SPECTROGRAMS:
        yield from (arguments for arguments in SOUNDS[0](model, names) if needed <= arguments.keys())


#: What modules call a waveform; what they take under these names may be a spectrogram as well, or have channels.
_WAVES = {"wav", "wave", "waveform", "audio", "audios", "speech", "signal", "raw_audio", "samples", "wavs", "waveforms"}


@input_finder("waveforms")
def from_waveforms(model: nn.Module) -> Iterator[Candidate]:
    """A sound as its samples, for a module that names its one argument so."""
    names = required(model)
    if len(names) == 1 and names[0] in _WAVES:
        for length in (9600, 16000):
            yield (floats(model, BATCH, length),), {}
            yield (floats(model, BATCH, 1, length),), {}


@keyword_finder("sound with video", "input_values", "pixel_values_videos")
def _sound_with_video(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """A video and its sound, and where a text is taken too, that."""
    text: Arguments = {}
    if "input_ids" in names:
        text["input_ids"] = likeliest(model, "input_ids")
        text |= {"attention_mask": filled(1, *text["input_ids"].shape)} if "attention_mask" in names else {}
    for video in VIDEOS[1](model, names):
        for wave in (floats(model, BATCH, 1, 9600), floats(model, BATCH, 9600)):
            yield {**text, "input_values": wave, **video}


@keyword_finder("images")
def _images(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """Images in the form that the names of forward's arguments ask for, where that is not one image for each sample."""
    for form in IMAGES[:6]:  # one image for each sample is the business of other finders
        for arguments in form(model, names):
            if "input_ids" in names:
                yield {"input_ids": likeliest(model, "input_ids"), **arguments}
            else:
                yield from _completed(model, arguments)
    if "pixel_values_videos" in names and "input_ids" not in names:
        yield from VIDEOS[1](model, names)


@keyword_finder("sound over text", "input_ids", "input_features")
def _sound_over_text(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """A text, and a sound whose features are added to it: as many as it has tokens."""
    if not accepted(model, "get_audio_features"):
        return
    if configured(model, "audio_token_id", "audio_token_index") is not None:
        return  # the features have places of their own
    made = next(_that_run(model, "get_audio_features", SOUNDS[0], names), None)
    if made is not None:
        yield {"input_ids": integers(vocabulary(model), BATCH, made[1]), **made[0]}


class _Features(nn.Module):
    """Runs the method of a model that makes features of one medium."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model = model
        self._method = method

    def forward(self, **arguments: Any) -> Any:
        found = getattr(self.model, self._method)(**arguments)
        pooled = getattr(found, "pooler_output", None)
        return pooled if pooled is not None else getattr(found, "last_hidden_state", found)


def count_features(model: nn.Module, method: str, arguments: Arguments) -> int | None:
    """How many features for each sample a model's method makes of these arguments; None if it does not run on them."""
    from permgraph.capture.run import capture  # which asks the finders, and they ask it

    try:
        captured = capture(_Features(model, method), (), arguments, max_seconds=20)
    except CaptureError:
        return None
    outputs = next(node for node in captured.graph.nodes if node.op == "output").args[0]
    values = [node.meta["val"] for node in outputs if isinstance(node, torch.fx.Node)]
    rows = sum(value.numel() // value.shape[-1] for value in values if isinstance(value, Tensor) and value.ndim > 1)
    return rows // BATCH if rows and rows % BATCH == 0 else None


#: For each medium: the method that makes its features, the config's names for its placeholder, and its forms.
MEDIA: tuple[tuple[str, tuple[str, ...], tuple[Form, ...]], ...] = (
    ("get_image_features", ("image_token_id", "image_token_index"), IMAGES),
    ("get_audio_features", ("audio_token_id", "audio_token_index"), SOUNDS),
    ("get_video_features", ("video_token_id", "video_token_index"), VIDEOS),
)


@keyword_finder("text with media", "input_ids")
def _text_with_media(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """Text with one image, or one sound, for each sample, in whose place as many placeholders stand as it has features.

    All media that the model takes stand in one text, if it runs so; each alone otherwise.
    """
    found: list[tuple[Arguments, Tensor]] = []
    short: list[tuple[Arguments, Tensor]] = []
    for method, tokens, forms in MEDIA:
        token = configured(model, *tokens)
        if not isinstance(token, int):
            continue
        owner = _owner(model, method)
        own = accepted(owner, method)
        if not own:  # it does not say how many, and puts in as many as there are where it finds one
            given = [arguments for form in forms for arguments in form(model, names)]
            short += [(arguments, filled(token, BATCH, 1)) for arguments in given]
            continue
        opaque = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(getattr(owner, method)).parameters.values())
        for form in forms:
            made = next(_that_run(owner, method, form, names if opaque else own & names), None)
            if made is not None:
                found.append((made[0], filled(token, BATCH, made[1])))
                break
    choices = [found] if len(found) < 2 else [found, *([one] for one in found)]
    choices += [[one] for one in short[:12]]
    for chosen in choices:
        if chosen:
            yield from _texts(model, names, chosen)


def _owner(model: nn.Module, method: str) -> nn.Module:
    """The model, or the part below its heads that has the method."""
    near = [model, *model.children()]
    near += [inner for part in near[1:] for inner in part.children()]
    return next((part for part in near if accepted(part, method)), model)


def _that_run(model: nn.Module, method: str, form: Form, names: frozenset[str]) -> Iterator[tuple[Arguments, int]]:
    parameters = inspect.signature(getattr(model, method)).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = {p.name for p in parameters if p.default is p.empty and p.kind in positional}
    beside = {name: likeliest(model, name) for name in sorted(needed) if name.endswith("input_ids") and name in BY_NAME}
    whole_ones = ({**beside, **arguments} for arguments in form(model, names) if needed <= {*arguments, *beside})
    for arguments in itertools.islice(whole_ones, 16):
        count = count_features(model, method, arguments)
        if count is not None:
            yield {name: value for name, value in arguments.items() if name != "input_ids"}, count


def _texts(model: nn.Module, names: frozenset[str], media: list[tuple[Arguments, Tensor]]) -> Iterator[Arguments]:
    config = getattr(model, "config", None)
    special = [whole(setting(config, *tokens), 1 << 60) for _, tokens, _ in MEDIA]
    start = setting(config, "vision_start_token_id")
    parts = [integers(min(vocabulary(model), *special), BATCH, LENGTH)]
    marks = [filled(0, BATCH, LENGTH)]
    arguments: Arguments = {}
    for at, (given, placeholders) in enumerate(media):
        if isinstance(start, int):
            parts.append(filled(start, BATCH, 1))
            marks.append(filled(0, BATCH, 1))
        parts += [placeholders, integers(min(vocabulary(model), *special), BATCH, 3)]
        marks += [torch.full_like(placeholders, at + 1), filled(0, BATCH, 3)]
        arguments.update(given)
    ids = torch.cat(parts, 1)
    always = {"input_ids": ids, **arguments}
    for name in required(model):  # a second text, for a part that reads the image with it
        if name.endswith("input_ids") and name in BY_NAME and name not in always:
            always[name] = likeliest(model, name)
    always |= decoder_ids(model, names)
    kinds: Arguments = {name: torch.cat(marks, 1) for name in ("mm_token_type_ids", "token_type_ids") if name in names}
    mask = {"attention_mask": filled(1, *ids.shape)} if "attention_mask" in names else {}
    yield {**always, **kinds, **mask}
    yield {**always, **mask}
    yield always
