"""The forms in which models take images and sound.

Each is a few lines: a function that looks at the names which a model accepts, and yields the arguments that belong
together, with sizes that agree.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.capture.inputs.layers import (
    BATCH,
    LENGTH,
    configured,
    filled,
    floats,
    integers,
    likeliest,
    named_sides,
    setting,
    whole,
)
from permgraph.capture.inputs.registry import Candidate, input_finder

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


def keyword_finder(name: str, *needed: str) -> Callable[[Form], Form]:
    """Registers a form as a finder, for modules whose forward accepts all of these names."""

    def register(form: Form) -> Form:
        @input_finder(name)
        def candidates(model: nn.Module) -> Iterator[Candidate]:
            names = accepted(model)
            if names.issuperset(needed):
                for arguments in form(model, names):
                    yield (), dict(arguments)

        return form

    return register


def decoder_ids(model: nn.Module, names: frozenset[str]) -> Arguments:
    """The text that a decoder begins with, for a model that has one and accepts it."""
    has_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    wanted = {"decoder_input_ids"} & names if has_decoder else ()
    return {name: likeliest(model, name) for name in wanted}


def _vision(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    inner = setting(config, "vision_config")
    return config if inner is None else inner


def image_of(model: nn.Module) -> tuple[int, int, int]:
    """Channels of an image, the side of a patch, and a side of the image that the model is content with."""
    config = _vision(model)
    channels = whole(setting(config, "num_channels", "in_channels", "in_chans"), 3)
    patch = whole(setting(config, "patch_size"), 16)
    named = named_sides(model)
    return channels, patch, named[0][0] if named else GRID * patch


def _first(wanted: str, names: frozenset[str]) -> str | None:
    """The first of these names, with blanks between them, that is accepted."""
    return next((name for name in wanted.split() if name in names), None)


def _part(model: nn.Module, *words: str) -> nn.Module:
    """The first part of a model whose name has one of these words, as a tower for images has; else the whole."""
    return next((m for path, m in model.named_modules() if any(word in path for word in words)), model)


def _patch_widths(model: nn.Module) -> list[int]:
    """How many numbers a flattened patch has, by the config, and by the first layer that could take it."""
    config = _vision(model)
    channels, patch, _ = image_of(model)
    frames = whole(setting(config, "temporal_patch_size"), 1)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d, nn.Linear))]
    found = [math.prod((m.in_channels, *m.kernel_size)) for m in layers if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    found += [m.in_features for m in layers[:1] if isinstance(m, nn.Linear)]
    norms = (m.normalized_shape[-1] for m in _part(model, "vis", "image").modules() if isinstance(m, nn.LayerNorm))
    first = next(norms, 0)
    squares = [first] if first % channels == 0 and math.isqrt(first // channels) ** 2 * channels == first else []
    square = channels * patch * patch
    likely = [square * frames, square]
    known = [width for width in likely if width in found]
    return list(dict.fromkeys([*known, *found[:1], *likely, *found[1:2], *filter(None, squares)]))


def _positions(batch: int, side: int) -> Tensor:
    """The columns and rows of the patches of a square image."""
    places = torch.arange(side * side, device="cpu")
    return torch.stack([places % side, places // side], -1).expand(batch, -1, -1).contiguous()


# -- the forms in which towers take images ----------------------------------------------------------------------------


def _grid_of_patches(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """The patches of all images, or else of all videos, as rows, and each one's frames, rows and columns."""
    grid = _first("image_grid_thw grid_thw video_grid_thw", names)
    rows = _first("pixel_values hidden_states pixel_values_videos", names)
    if grid is None or rows is None:
        return
    merge = whole(setting(_vision(model), "spatial_merge_size", "merge_size", "merge_kernel_size"), 2)
    side = 2 * merge if merge > 2 else GRID
    channels, patch, _ = image_of(model)
    sizes = torch.tensor([[1, side, side]] * BATCH, device="cpu")
    more: Arguments = {name: filled(merge, BATCH) for name in ("merge_sizes", "image_merge_sizes") if name in names}
    for width in _patch_widths(model):
        yield {rows: floats(model, BATCH * side * side, width), grid: sizes, **more}
    yield {rows: floats(model, BATCH * side * side, channels, patch, patch), grid: sizes, **more}
    edge = patch * merge  # of what one token sees, channels last
    yield {rows: floats(model, BATCH * side * side, edge, edge, channels), grid: sizes, **more}


def _packed_patches(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """Flattened patches for each image, a mask for the filling, and each image's rows and columns."""
    if not {"pixel_values", "spatial_shapes"} <= names:
        return
    for width in _patch_widths(model):
        yield {
            "pixel_values": floats(model, BATCH, GRID * GRID, width),
            "pixel_attention_mask": filled(1, BATCH, GRID * GRID),
            "spatial_shapes": torch.tensor([[GRID, GRID]] * BATCH, device="cpu"),
        }


def _placed_patches(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """Flattened patches for each image, and the place of each in it."""
    places = _first("pixel_position_ids image_position_ids", names)
    if places is None:
        return
    side = 2 * whole(setting(_vision(model), "pooling_kernel_size"), 2)
    for width in _patch_widths(model):
        yield {"pixel_values": floats(model, BATCH, side * side, width), places: _positions(BATCH, side)}


def _strip_of_patches(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """The patches of all images side by side in one strip, and each image's rows and columns."""
    if not {"pixel_values", "target_sizes"} <= names:
        return
    channels, patch, _ = image_of(model)
    sizes = torch.tensor([[GRID, GRID]] * BATCH, dtype=torch.int32, device="cpu")
    yield {"pixel_values": floats(model, 1, channels, patch, BATCH * GRID * GRID * patch), "target_sizes": sizes}


def _tiles(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """One image of each text in tiles, and which shape the tiles make up."""
    if not {"pixel_values", "aspect_ratio_ids"} <= names:
        return
    channels, _, side = image_of(model)
    tiles = whole(setting(_vision(model), "max_num_tiles"), 4)
    pixels = floats(model, BATCH, 1, tiles, channels, side, side)
    seen = {"cross_attention_mask": filled(1, BATCH, LENGTH, 1, tiles)} if "cross_attention_mask" in names else {}
    masks = {"aspect_ratio_ids": filled(1, BATCH, 1), "aspect_ratio_mask": filled(1, BATCH, 1, tiles)}
    yield {"pixel_values": pixels, **masks, **seen}


def _part_counts(model: nn.Module) -> list[int]:
    """Into how many parts an image may be cut by the grids that a config lists, with the whole as one more."""
    grids = configured(model, "image_grid_pinpoints")
    side = whole(setting(_vision(model), "image_size"), 0)
    if not isinstance(grids, (list, tuple)) or side < 1:
        return []
    counts = (1 + math.prod(edge // side for edge in grid) for grid in grids if isinstance(grid, (list, tuple)))
    return sorted(set(counts))[:6]


#: Arguments that say more of a list of images.
_MARKS = {"pixel_attention_mask", "image_sizes", "pixel_mask", "image_attention_mask"}


def _many_images(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """A list of images, here one, for each text; and of images that are cut up, the parts and the size of the whole."""
    if "pixel_values" not in names or not names & _MARKS:
        return
    channels, _, side = image_of(model)
    if "image_sizes" in names:
        sizes = torch.tensor([[side, side]] * BATCH, device="cpu")
        yield {"pixel_values": floats(model, BATCH, channels, side, side), "image_sizes": sizes}
        for parts in dict.fromkeys((3, 5, 2, *_part_counts(model))):
            yield {"pixel_values": floats(model, BATCH, parts, channels, side, side), "image_sizes": sizes}
    one = {"pixel_values": floats(model, BATCH, 1, channels, side, side)}
    if "image_attention_mask" in names and "image_encoder_embeddings" in names:  # which words see which image
        yield {**one, "image_attention_mask": filled(1, BATCH, LENGTH, 1)}
    if "pixel_attention_mask" in names and "spatial_shapes" not in names:
        yield one


def plain_images(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """One image for each text, in each of the resolutions for which there is an argument."""
    if "pixel_values" not in names:
        return
    channels, patch, side = image_of(model)
    finer: Arguments = {}
    for name in sorted(n for n in names if n.endswith("res_pixel_values")):
        own = getattr(model, "config", None)
        finest = whole(setting(getattr(own, f"{name.partition('_pixel')[0]}_vision_config", None), "image_size"), side)
        finer[name] = floats(model, BATCH, channels, finest, finest)
    for edge in dict.fromkeys([side, *(patch * math.isqrt(count) for count in _patch_counts(model))]):
        yield {"pixel_values": floats(model, BATCH, channels, edge, edge), **finer}
    yield {"pixel_values": floats(model, BATCH, 1, channels, side, side), **finer}


def _patch_counts(model: nn.Module) -> list[int]:
    """The numbers of patches for which a config has a table of something."""
    tables = (v for v in vars(getattr(model, "config", object)).values() if isinstance(v, dict))
    return sorted(int(key) for table in tables for key in table if str(key).isdigit() and int(key) > 9)


def _patches_in_time(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """For each token a patch of its own, with the frames that it spans, channels last."""
    frames = setting(_vision(model), "temporal_patch_size")
    if "pixel_values" in names and isinstance(frames, int):
        channels, patch, _ = image_of(model)
        yield {"pixel_values": floats(model, BATCH * GRID * GRID, frames, patch, patch, channels)}


def _video(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """A few frames for each text."""
    if "pixel_values_videos" in names:
        channels, _, side = image_of(model)
        frames = whole(configured(model, "frames_per_clip", "num_frames"), 2)
        side = whole(configured(model, "crop_size"), side)
        yield {"pixel_values_videos": floats(model, BATCH, frames, channels, side, side)}
        yield {"pixel_values_videos": floats(model, BATCH, channels, frames, side, side)}


def _frames(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """A few frames for each text, where they go by the name of an image."""
    if "pixel_values" in names and "pixel_values_videos" not in names:
        channels, _, side = image_of(model)
        yield {"pixel_values": floats(model, BATCH, 4, channels, side, side)}


#: The likeliest first: a model that takes patches takes their grid.
IMAGES: tuple[Form, ...] = (
    _grid_of_patches, _packed_patches, _placed_patches, _strip_of_patches, _tiles, _many_images, plain_images,
    _patches_in_time,
)  # fmt: skip


def spectrogram_widths(model: nn.Module, config: Any) -> list[int]:
    """How many numbers a frame of sound may have: by the config, and by the first layers of the audio tower."""
    names = ("num_mel_bins", "input_feat_size", "feature_size", "input_dim", "n_mels", "mel_bins", "input_size")
    named = setting(config, *names)
    found = [named] if isinstance(named, int) else [80]
    for part in (_part(model, "audio", "speech", "sound"), model):
        layers = [m for m in part.modules() if isinstance(m, (nn.Conv1d, nn.Linear))]
        found += [m.in_channels if isinstance(m, nn.Conv1d) else m.in_features for m in layers[:1]]
    return list(dict.fromkeys(found))


def _sound(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """Spectrograms or waveforms, without and with the masks that go with them."""
    key = _first("input_features audio_mel input_values audio_input_features", names)
    if key is None:
        return
    config = getattr(model, "config", None)
    audio = setting(config, "audio_config", "encoder_config")
    audio = config if audio is None else audio
    made: list[Tensor] = []
    if key == "input_values":
        made = [floats(model, BATCH, 4001), floats(model, BATCH, 9600), floats(model, BATCH, 1, 9600)]
    else:
        positions = setting(audio, "max_source_positions")
        for mels in [*([128] if key == "audio_mel" else ()), *spectrogram_widths(model, audio)]:
            if isinstance(positions, int):
                made.append(floats(model, BATCH, mels, 2 * positions))
            made += [floats(model, BATCH, 128, mels), floats(model, BATCH, mels, 128)]
            made += [floats(model, BATCH, 400, mels), floats(model, BATCH, mels, 400)]  # windows of 50, 100 or 200
    mask = _first("input_features_mask feature_attention_mask audio_attention_mask audio_mel_mask", names)
    if mask is None and "input_ids" not in names:
        mask = _first("attention_mask", names)
    yield from ({key: values} for values in made)
    if mask is None:
        return
    for values in made:
        for frames in dict.fromkeys((values.shape[1], values.shape[-1])):
            given = filled(1, BATCH, frames).bool()
            yield {key: values, mask: ~given if mask == "audio_mel_mask" else given}  # there it marks what is padding


def _coded_sound(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """Sound as a level for each of its bands, frame by frame."""
    if "audio_input_ids" in names:
        audio = configured(model, "audio_config")
        bands = whole(setting(audio, "n_mel_bins", "num_mel_bins"), 80)
        levels = whole(setting(audio, "mel_vocab_size", "vocab_size", "num_bins"), 2)
        found = {"audio_input_ids": integers(levels, BATCH, LENGTH, bands)}
        yield {**found, "audio_input_ids_mask": filled(1, BATCH, LENGTH)} if "audio_input_ids_mask" in names else found


SOUNDS: tuple[Form, ...] = (_sound, _coded_sound)
VIDEOS: tuple[Form, ...] = (_grid_of_patches, _video, _frames)
