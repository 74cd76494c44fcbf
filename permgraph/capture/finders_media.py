"""Finders for what comes beside text: images in the forms that towers take them, sound, series, boxes.

Each form is a few lines: a function that looks at the names which a model accepts, and yields the arguments that belong
together, with sizes that agree. A model of several media takes text with as many placeholders as it has features of the
image or the sound; how many that are, the model says itself: its own method for them is run once, on tensors without
data.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.capture.finders import (
    BATCH,
    BY_NAME,
    LENGTH,
    floats,
    integers,
    named_sides,
    required,
    setting,
    vocabulary,
    whole,
)
from permgraph.capture.inputs import Candidate, input_finder
from permgraph.errors import CaptureError

Arguments = dict[str, Tensor]
Form = Callable[[nn.Module, frozenset[str]], Iterator[Arguments]]
#: Rows and columns of patches where an image may have any size: enough to be merged by two, twice.
GRID = 4


def accepted(model: nn.Module, method: str = "forward") -> frozenset[str]:
    """The names of a method's arguments; those that it passes on under `*args` or `**kwargs` are not known."""
    try:
        return frozenset(inspect.signature(getattr(model, method)).parameters)
    except (AttributeError, TypeError, ValueError):
        return frozenset()


def ones(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """A mask that lets everything through."""
    return torch.ones(shape, dtype=dtype, device="cpu")


def _vision(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    inner = setting(config, "vision_config")
    return config if inner is None else inner


def _sizes(model: nn.Module) -> tuple[int, int, int]:
    """Channels of an image, the side of a patch, and a side of the image that the model is content with."""
    config = _vision(model)
    channels = whole(setting(config, "num_channels", "in_channels", "in_chans"), 3)
    patch = whole(setting(config, "patch_size"), 16)
    named = named_sides(model)
    return channels, patch, named[0][0] if named else GRID * patch


def _patch_widths(model: nn.Module) -> list[int]:
    """How many numbers a flattened patch has, by the config, and by the first layer that could take it."""
    config = _vision(model)
    channels, patch, _ = _sizes(model)
    frames = whole(setting(config, "temporal_patch_size"), 1)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d, nn.Linear))]
    found = [math.prod((m.in_channels, *m.kernel_size)) for m in layers if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    found += [m.in_features for m in layers[:1] if isinstance(m, nn.Linear)]
    square = channels * patch * patch
    likely = [square * frames, square]
    return list(dict.fromkeys([*(w for w in likely if w in found), *found[:1], *likely, *found[1:2]]))


def _positions(batch: int, side: int) -> Tensor:
    """The columns and rows of the patches of a square image."""
    places = torch.arange(side * side, device="cpu")
    return torch.stack([places % side, places // side], -1).expand(batch, -1, -1).contiguous()


# -- the forms in which towers take images ----------------------------------------------------------------------------


def _grid_of_patches(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """The patches of all images, or else of all videos, as rows, and each one's frames, rows and columns."""
    grid = next((name for name in ("image_grid_thw", "grid_thw", "video_grid_thw") if name in names), None)
    rows = next((name for name in ("pixel_values", "hidden_states", "pixel_values_videos") if name in names), None)
    if grid is None or rows is None:
        return
    merge = whole(setting(_vision(model), "spatial_merge_size", "merge_size", "merge_kernel_size"), 2)
    side = 2 * merge if merge > 2 else GRID
    channels, patch, _ = _sizes(model)
    sizes = torch.tensor([[1, side, side]] * BATCH, device="cpu")
    more = {"merge_sizes": torch.tensor([merge] * BATCH, device="cpu")} if "merge_sizes" in names else {}
    if "image_merge_sizes" in names:
        more["image_merge_sizes"] = torch.tensor([merge] * BATCH, device="cpu")
    for width in _patch_widths(model):
        yield {rows: floats(model, BATCH * side * side, width), grid: sizes, **more}
    yield {rows: floats(model, BATCH * side * side, channels, patch, patch), grid: sizes, **more}


def _packed_patches(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """Flattened patches for each image, a mask for the filling, and each image's rows and columns."""
    if not {"pixel_values", "spatial_shapes"} <= names:
        return
    for width in _patch_widths(model):
        yield {
            "pixel_values": floats(model, BATCH, GRID * GRID, width),
            "pixel_attention_mask": ones(BATCH, GRID * GRID),
            "spatial_shapes": torch.tensor([[GRID, GRID]] * BATCH, device="cpu"),
        }


def _placed_patches(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """Flattened patches for each image, and the place of each in it."""
    places = next((name for name in ("pixel_position_ids", "image_position_ids") if name in names), None)
    if places is None:
        return
    side = 2 * whole(setting(_vision(model), "pooling_kernel_size"), 2)
    for width in _patch_widths(model):
        yield {"pixel_values": floats(model, BATCH, side * side, width), places: _positions(BATCH, side)}


def _strip_of_patches(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """The patches of all images side by side in one strip, and each image's rows and columns."""
    if not {"pixel_values", "target_sizes"} <= names:
        return
    channels, patch, _ = _sizes(model)
    sizes = torch.tensor([[GRID, GRID]] * BATCH, dtype=torch.int32, device="cpu")
    yield {"pixel_values": floats(model, 1, channels, patch, BATCH * GRID * GRID * patch), "target_sizes": sizes}


def _tiles(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """One image of each text in tiles, and which shape the tiles make up."""
    if not {"pixel_values", "aspect_ratio_ids"} <= names:
        return
    channels, _, side = _sizes(model)
    tiles = whole(setting(_vision(model), "max_num_tiles"), 4)
    mask = ones(BATCH, 1, tiles)
    found = {
        "pixel_values": floats(model, BATCH, 1, tiles, channels, side, side),
        "aspect_ratio_ids": ones(BATCH, 1),
        "aspect_ratio_mask": mask,
    }
    if "cross_attention_mask" in names:
        found["cross_attention_mask"] = ones(BATCH, LENGTH, 1, tiles)
    yield found


def _many_images(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """A list of images, here one, for each text; and of images that are cut up, the parts and the size of the whole."""
    if "pixel_values" not in names or not names & {"pixel_attention_mask", "image_sizes", "pixel_mask"}:
        return
    channels, _, side = _sizes(model)
    if "image_sizes" in names:
        sizes = torch.tensor([[side, side]] * BATCH, device="cpu")
        yield {"pixel_values": floats(model, BATCH, channels, side, side), "image_sizes": sizes}
        for parts in (3, 5, 2):
            yield {"pixel_values": floats(model, BATCH, parts, channels, side, side), "image_sizes": sizes}
    if "pixel_attention_mask" in names and "spatial_shapes" not in names:
        yield {"pixel_values": floats(model, BATCH, 1, channels, side, side)}


def _plain_images(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """One image for each text."""
    if "pixel_values" in names:
        channels, _, side = _sizes(model)
        yield {"pixel_values": floats(model, BATCH, channels, side, side)}
        yield {"pixel_values": floats(model, BATCH, 1, channels, side, side)}


def _video(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """A few frames for each text."""
    if "pixel_values_videos" in names:
        config = getattr(model, "config", None)
        channels, _, side = _sizes(model)
        frames = whole(setting(config, "frames_per_clip", "num_frames"), 2)
        side = whole(setting(config, "crop_size"), side)
        yield {"pixel_values_videos": floats(model, BATCH, frames, channels, side, side)}
        yield {"pixel_values_videos": floats(model, BATCH, channels, frames, side, side)}


#: The likeliest first: a model that takes patches takes their grid.
IMAGES: tuple[Form, ...] = (
    _grid_of_patches, _packed_patches, _placed_patches, _strip_of_patches, _tiles, _many_images, _plain_images,
)  # fmt: skip


def _first_width(model: nn.Module) -> list[int]:
    """How many channels the first layer takes that works along one dimension."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            return [module.in_channels]
        if isinstance(module, nn.Linear):
            return [module.in_features]
    return []


def _sound(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """Spectrograms or waveforms, with the masks that go with them."""
    key = next((n for n in ("input_features", "audio_mel", "input_values", "audio_input_features") if n in names), None)
    if key is None:
        return
    config = getattr(model, "config", None)
    audio = setting(config, "audio_config", "encoder_config")
    audio = config if audio is None else audio
    made: list[Tensor] = []
    if key == "input_values":
        made = [floats(model, BATCH, 4001), floats(model, BATCH, 1, 4800)]
    else:
        width = setting(audio, "num_mel_bins", "input_feat_size", "feature_size", "input_dim", "n_mels", "mel_bins")
        positions = setting(audio, "max_source_positions")
        for mels in dict.fromkeys([whole(width, 128 if key == "audio_mel" else 80), *_first_width(model)]):
            if isinstance(positions, int):
                made.append(floats(model, BATCH, mels, 2 * positions))
            made += [floats(model, BATCH, 128, mels), floats(model, BATCH, mels, 128)]
            made += [floats(model, BATCH, 400, mels), floats(model, BATCH, mels, 400)]  # windows of 50, 100 or 200
    masks = ("input_features_mask", "feature_attention_mask", "audio_attention_mask", "audio_mel_mask")
    mask = next((name for name in masks if name in names), None)
    for values in made:
        yield {key: values}
        for frames in (values.shape[1], values.shape[-1]) if mask is not None else ():
            assert mask is not None
            given = ones(BATCH, frames, dtype=torch.bool)
            yield {key: values, mask: ~given if mask == "audio_mel_mask" else given}  # there it marks what is padding


# -- finders of whole sets of arguments -------------------------------------------------------------------------------


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


@input_finder("sound")
def from_sound(model: nn.Module) -> Iterator[Candidate]:
    """Spectrograms with their masks, where a model requires these or has sound for its main input."""
    names = accepted(model)
    needed = set(required(model))
    if needed & {"input_features", "audio_mel"} and needed & {"input_features_mask", "audio_mel_mask"}:
        for arguments in _sound(model, names):
            if needed <= arguments.keys():
                yield (), dict(arguments)


@input_finder("images")
def from_images(model: nn.Module) -> Iterator[Candidate]:
    """Images in the form that the names of forward's arguments ask for, where that is not one image for each sample."""
    names = accepted(model)
    text = "input_ids" in names
    for form in IMAGES[:-2]:
        for arguments in form(model, names):
            if text:
                for ids in itertools.islice(BY_NAME["input_ids"](model), 1):
                    yield (), {"input_ids": ids, **arguments}
            else:
                for candidate in _completed(model, arguments):
                    yield (), candidate
    if {"pixel_values_videos"} <= names and not text:
        for arguments in _video(model, names):
            yield (), dict(arguments)


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
    ("get_audio_features", ("audio_token_id", "audio_token_index"), (_sound,)),
    ("get_video_features", ("video_token_id", "video_token_index"), (_grid_of_patches, _video)),
)


@input_finder("text with media")
def from_text_with_media(model: nn.Module) -> Iterator[Candidate]:
    """Text with one image, or one sound, for each sample, in whose place as many placeholders stand as it has features.

    All media that the model takes stand in one text, if it runs so; each alone otherwise.
    """
    names = accepted(model)
    config = getattr(model, "config", None)
    if "input_ids" not in names:
        return
    found: list[tuple[Arguments, Tensor]] = []
    for method, tokens, forms in MEDIA:
        token = setting(config, *tokens)
        own = accepted(model, method)
        if not isinstance(token, int) or not own:
            continue
        opaque = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(getattr(model, method)).parameters.values())
        for form in forms:
            made = next(_that_run(model, method, form, names if opaque else own & names), None)
            if made is not None:
                found.append((made[0], torch.full((BATCH, made[1]), token, device="cpu")))
                break
    choices = [found] if len(found) < 2 else [found, *([one] for one in found)]
    for chosen in choices:
        if chosen:
            yield from _texts(model, names, chosen)


def _that_run(model: nn.Module, method: str, form: Form, names: frozenset[str]) -> Iterator[tuple[Arguments, int]]:
    for arguments in itertools.islice(form(model, names), 6):
        count = count_features(model, method, arguments)
        if count is not None:
            yield arguments, count


def _texts(model: nn.Module, names: frozenset[str], media: list[tuple[Arguments, Tensor]]) -> Iterator[Candidate]:
    config = getattr(model, "config", None)
    special = [whole(setting(config, *tokens), 1 << 60) for _, tokens, _ in MEDIA]
    start = setting(config, "vision_start_token_id")
    parts = [integers(min(vocabulary(model), *special), BATCH, LENGTH)]
    marks = [torch.zeros(BATCH, LENGTH, dtype=torch.int64, device="cpu")]
    arguments: Arguments = {}
    for at, (given, placeholders) in enumerate(media):
        if isinstance(start, int):
            parts.append(torch.full((BATCH, 1), start, device="cpu"))
            marks.append(torch.zeros(BATCH, 1, dtype=torch.int64, device="cpu"))
        parts += [placeholders, integers(min(vocabulary(model), *special), BATCH, 3)]
        marks += [torch.full_like(placeholders, at + 1), torch.zeros(BATCH, 3, dtype=torch.int64, device="cpu")]
        arguments.update(given)
    ids = torch.cat(parts, 1)
    always = {"input_ids": ids, **arguments}
    if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
        always["decoder_input_ids"] = next(BY_NAME["decoder_input_ids"](model))
    kinds: dict[str, Tensor] = {
        name: torch.cat(marks, 1) for name in ("mm_token_type_ids", "token_type_ids") if name in names
    }
    mask = {"attention_mask": ones(*ids.shape)} if "attention_mask" in names else {}
    yield (), {**always, **kinds, **mask}
    yield (), {**always, **mask}
    yield (), dict(always)


@input_finder("series")
def from_series(model: nn.Module) -> Iterator[Candidate]:
    """Past values of time series with their times, and future ones: as long as the longest lag that is looked at."""
    names = accepted(model)
    if not {"past_values", "past_time_features", "past_observed_mask"} <= names:
        return
    config = getattr(model, "config", None)
    lags = setting(config, "lags_sequence") or [0]
    past = whole(setting(config, "context_length"), LENGTH) + max(lags)
    ahead = whole(setting(config, "prediction_length"), 4)
    times = whole(setting(config, "num_time_features"), 0)
    series = whole(setting(config, "input_size"), 1)
    wide = (series,) if series > 1 else ()
    arguments = {
        "past_values": floats(model, BATCH, past, *wide),
        "past_time_features": floats(model, BATCH, past, times),
        "past_observed_mask": torch.ones(BATCH, past, *wide, device="cpu"),
        "future_values": floats(model, BATCH, ahead, *wide),
        "future_time_features": floats(model, BATCH, ahead, times),
    }
    counts = {
        "static_categorical_features": whole(setting(config, "num_static_categorical_features"), 0),
        "static_real_features": whole(setting(config, "num_static_real_features"), 0),
    }
    for name, count in counts.items():
        if count:
            arguments[name] = floats(model, BATCH, count) if "real" in name else integers(2, BATCH, count)
    yield (), {name: value for name, value in arguments.items() if name in names}


@input_finder("forecasts")
def from_forecasts(model: nn.Module) -> Iterator[Candidate]:
    """Single series with a mask for what is padding, and the class of their frequency."""
    names = accepted(model)
    if {"past_values", "past_values_padding"} <= names:
        length = whole(setting(getattr(model, "config", None), "context_length"), 64)
        arguments = {
            "past_values": floats(model, BATCH, length),
            "past_values_padding": torch.zeros(BATCH, length, dtype=torch.int64, device="cpu"),
        }
        if "freq" in names:
            arguments["freq"] = torch.zeros(BATCH, 1, dtype=torch.int64, device="cpu")
        yield (), {**arguments}


@input_finder("decisions")
def from_decisions(model: nn.Module) -> Iterator[Candidate]:
    """States, actions and rewards of an agent."""
    if {"states", "actions", "rewards", "returns_to_go", "timesteps"} <= accepted(model):
        config = getattr(model, "config", None)
        one = floats(model, BATCH, LENGTH, 1)
        arguments: dict[str, Any] = {
            "states": floats(model, BATCH, LENGTH, whole(setting(config, "state_dim"), 1)),
            "actions": floats(model, BATCH, LENGTH, whole(setting(config, "act_dim"), 1)),
            "rewards": one,
            "returns_to_go": one.clone(),
            "timesteps": torch.arange(LENGTH, device="cpu").expand(BATCH, -1).contiguous(),
            "attention_mask": ones(BATCH, LENGTH),
        }
        yield (), arguments


@input_finder("boxes")
def from_boxes(model: nn.Module) -> Iterator[Candidate]:
    """Text with a box on the page for each token, in whole thousandths or as fractions, and the page too if wanted."""
    names = accepted(model)
    if not {"input_ids", "bbox"} <= names:
        return
    ids = next(BY_NAME["input_ids"](model))
    corners = integers(400, BATCH, ids.shape[1], 2)
    boxes = torch.cat([corners, corners + 1 + integers(400, BATCH, ids.shape[1], 2)], -1)
    more: Arguments = {}
    if "decoder_input_ids" in names and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        more["decoder_input_ids"] = next(BY_NAME["decoder_input_ids"](model))
    fractions = boxes.to(floats(model, 1).dtype) / 1000
    for given in (boxes, fractions, fractions.repeat(1, 1, 2)):
        pages = list(_plain_images(model, names))[:1] if not given.is_floating_point() or more else []
        for page in (*pages, {}):
            yield (), {"input_ids": ids, "bbox": given, **page, **more}


@input_finder("regions")
def from_regions(model: nn.Module) -> Iterator[Candidate]:
    """Text beside the features of regions of an image, and where these lie."""
    if {"input_ids", "visual_feats", "visual_pos"} <= accepted(model):
        config = getattr(model, "config", None)
        arguments = {
            "input_ids": next(BY_NAME["input_ids"](model)),
            "visual_feats": floats(model, BATCH, 23, whole(setting(config, "visual_feat_dim"), 1)),
            "visual_pos": floats(model, BATCH, 23, whole(setting(config, "visual_pos_dim"), 4)),
        }
        yield (), {**arguments}


@input_finder("frames")
def from_frames(model: nn.Module) -> Iterator[Candidate]:
    """Sequences of vectors as wide as the model: into both of its stacks, or into the one that it has."""
    names = accepted(model)
    config = getattr(model, "config", None)
    width = setting(config, "hidden_size")
    if {"input_values", "decoder_input_values"} <= names and isinstance(width, int):
        frames = floats(model, BATCH, LENGTH, width)
        yield (), {"input_values": frames, "decoder_input_values": frames.clone()}
    width = setting(config, "d_model")
    if required(model) == ["inputs"] and isinstance(width, int):
        yield (), {"inputs": floats(model, BATCH, LENGTH, width)}


@input_finder("queries")
def from_queries(model: nn.Module) -> Iterator[Candidate]:
    """Learned queries that look at the features of an image."""
    if {"query_embeds", "encoder_hidden_states"} <= accepted(model):
        config = getattr(model, "config", None)
        width = whole(setting(config, "hidden_size"), 1)
        seen = whole(setting(config, "encoder_hidden_size"), width)
        yield (
            (),
            {
                "query_embeds": floats(model, BATCH, LENGTH, width),
                "encoder_hidden_states": floats(model, BATCH, 23, seen),
            },
        )


@input_finder("points")
def from_points(model: nn.Module) -> Iterator[Candidate]:
    """An image with points in it to be told from what is around them."""
    if {"pixel_values", "input_points", "input_labels"} <= accepted(model):
        for page in _plain_images(model, frozenset({"pixel_values"})):
            points = floats(model, BATCH, 1, 3, 2).abs()
            yield (), {**page, "input_points": points, "input_labels": ones(BATCH, 1, 3)}


@input_finder("prompted images")
def from_prompted_images(model: nn.Module) -> Iterator[Candidate]:
    """An image, another that shows by example what is asked for, and the answer to that."""
    if {"pixel_values", "prompt_pixel_values", "prompt_masks"} <= accepted(model):
        channels, _, _ = _sizes(model)
        for height, width in [(high // 2, wide) for high, wide in named_sides(model)] + named_sides(model):
            image = floats(model, BATCH, channels, height, width)  # a model of both, one above the other, halves it
            yield (), {"pixel_values": image, "prompt_pixel_values": image.clone(), "prompt_masks": image.clone()}
