"""Finders for what is neither text nor plain images nor sound: series, boxes, points, regions, features."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import nn

from permgraph.capture.inputs.forms import (
    Arguments,
    decoder_ids,
    image_of,
    keyword_finder,
    plain_images,
    spectrogram_widths,
)
from permgraph.capture.inputs.layers import (
    BATCH,
    LENGTH,
    configured,
    filled,
    floats,
    integers,
    likeliest,
    named_sides,
    required,
    vocabulary,
    whole,
)


@keyword_finder("series", "past_values", "past_time_features", "past_observed_mask")
def _series(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """Past values of time series with their times, and future ones: as long as the longest lag that is looked at."""
    lags = configured(model, "lags_sequence") or [0]
    past = whole(configured(model, "context_length"), LENGTH) + max(lags)
    ahead = whole(configured(model, "prediction_length"), 4)
    times = whole(configured(model, "num_time_features"), 0)
    series = whole(configured(model, "input_size"), 1)
    wide = (series,) if series > 1 else ()
    arguments = {
        "past_values": floats(model, BATCH, past, *wide),
        "past_time_features": floats(model, BATCH, past, times),
        "past_observed_mask": torch.ones(BATCH, past, *wide, device="cpu"),
        "future_values": floats(model, BATCH, ahead, *wide),
        "future_time_features": floats(model, BATCH, ahead, times),
    }
    if categories := whole(configured(model, "num_static_categorical_features"), 0):
        arguments["static_categorical_features"] = integers(2, BATCH, categories)
    if numbers := whole(configured(model, "num_static_real_features"), 0):
        arguments["static_real_features"] = floats(model, BATCH, numbers)
    yield {name: value for name, value in arguments.items() if name in names}


@keyword_finder("forecasts", "past_values", "past_values_padding")
def _forecasts(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """Single series with a mask for what is padding, and the class of their frequency."""
    length = whole(configured(model, "context_length"), 64)
    frequency = {"freq": filled(0, BATCH, 1)} if "freq" in names else {}
    yield {"past_values": floats(model, BATCH, length), "past_values_padding": filled(0, BATCH, length), **frequency}


@keyword_finder("decisions", "states", "actions", "rewards", "returns_to_go", "timesteps")
def _decisions(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """States, actions and rewards of an agent."""
    yield {
        "states": floats(model, BATCH, LENGTH, whole(configured(model, "state_dim"), 1)),
        "actions": floats(model, BATCH, LENGTH, whole(configured(model, "act_dim"), 1)),
        "rewards": floats(model, BATCH, LENGTH, 1),
        "returns_to_go": floats(model, BATCH, LENGTH, 1),
        "timesteps": torch.arange(LENGTH, device="cpu").expand(BATCH, -1).contiguous(),
        "attention_mask": filled(1, BATCH, LENGTH),
    }


@keyword_finder("boxes", "input_ids", "bbox")
def _boxes(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """Text with a box on the page for each token, in whole thousandths or as fractions, and the page too if wanted."""
    ids = likeliest(model, "input_ids")
    corners = integers(400, BATCH, ids.shape[1], 2)
    boxes = torch.cat([corners, corners + 1 + integers(400, BATCH, ids.shape[1], 2)], -1)
    more = decoder_ids(model, names)
    fractions = boxes.to(floats(model, 1).dtype) / 1000
    for given in (boxes, fractions, fractions.repeat(1, 1, 2)):
        pages = list(plain_images(model, names))[:1] if not given.is_floating_point() or more else []
        for page in (*pages, {}):
            yield {"input_ids": ids, "bbox": given, **page, **more}


@keyword_finder("regions", "input_ids", "visual_feats", "visual_pos")
def _regions(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """Text beside the features of regions of an image, and where these lie."""
    yield {
        "input_ids": likeliest(model, "input_ids"),
        "visual_feats": floats(model, BATCH, 23, whole(configured(model, "visual_feat_dim"), 1)),
        "visual_pos": floats(model, BATCH, 23, whole(configured(model, "visual_pos_dim"), 4)),
    }


@keyword_finder("frames")
def _frames(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """Sequences of vectors as wide as the model: into both of its stacks, or into the one that it has."""
    width = configured(model, "hidden_size")
    if {"input_values", "decoder_input_values"} <= names and isinstance(width, int):
        yield {name: floats(model, BATCH, LENGTH, width) for name in ("input_values", "decoder_input_values")}
    width = configured(model, "d_model")
    if required(model) == ["inputs"] and isinstance(width, int):
        yield {"inputs": floats(model, BATCH, LENGTH, width)}


@keyword_finder("queries", "query_embeds", "encoder_hidden_states")
def _queries(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """Learned queries that look at the features of an image."""
    width = whole(configured(model, "hidden_size"), 1)
    seen = whole(configured(model, "encoder_hidden_size"), width)
    queries, features = floats(model, BATCH, LENGTH, width), floats(model, BATCH, 23, seen)
    yield {"query_embeds": queries, "encoder_hidden_states": features}


@keyword_finder("points", "pixel_values", "input_points", "input_labels")
def _points(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """An image with points in it to be told from what is around them."""
    asked = {"input_points": floats(model, BATCH, 1, 3, 2).abs(), "input_labels": filled(1, BATCH, 1, 3)}
    grid = configured(model, "image_embedding_size")
    for page in plain_images(model, frozenset({"pixel_values"})):
        if "input_masks" in names and isinstance(grid, int):  # a first guess, four times as fine as the features
            yield {**page, **asked, "input_masks": floats(model, BATCH, 1, 4 * grid, 4 * grid)}
        yield {**page, **asked}


@keyword_finder("prompted images", "pixel_values", "prompt_pixel_values", "prompt_masks")
def _prompted_images(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """An image, another that shows by example what is asked for, and the answer to that."""
    channels, _, _ = image_of(model)
    for height, width in [(high // 2, wide) for high, wide in named_sides(model)] + named_sides(model):
        image = floats(model, BATCH, channels, height, width)  # a model of both, one above the other, halves it
        yield {"pixel_values": image, "prompt_pixel_values": image.clone(), "prompt_masks": image.clone()}


@keyword_finder("classes", "pixel_values", "classes_input_ids", "classes_structure", "tasks_input_ids")
def _classes(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """An image, a text for each class that may be seen in it, how many classes there are, and a text that asks."""
    ids = likeliest(model, "input_ids")
    classes = integers(vocabulary(model), 3 * BATCH, ids.shape[1])
    asked = {
        "classes_input_ids": classes,
        "classes_attention_mask": filled(1, *classes.shape),
        "classes_structure": filled(3, BATCH),
        "tasks_input_ids": ids,
        "tasks_attention_mask": filled(1, *ids.shape),
    }
    for page in plain_images(model, frozenset({"pixel_values"})):
        yield {**page, **asked}


@keyword_finder("entities", "input_ids", "entity_ids", "entity_position_ids")
def _entities(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """A text, and the entities that it names, each with the places of its tokens."""
    ids = likeliest(model, "input_ids")
    entities = integers(whole(configured(model, "entity_vocab_size"), 2), BATCH, 5)
    yield {"input_ids": ids, "entity_ids": entities, "entity_position_ids": integers(ids.shape[1], BATCH, 5, 7)}


@keyword_finder("image places", "input_ids", "pixel_values", "image_embeds_position_mask")
def _image_places(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """An image, and a text in which a mask says where its features go."""
    count = configured(model, "latent_query_num", "num_image_tokens")
    if isinstance(count, int):
        ids = integers(vocabulary(model), BATCH, LENGTH + count)
        places = torch.arange(LENGTH + count, device="cpu").expand(BATCH, -1) < count
        for page in plain_images(model, frozenset({"pixel_values"})):
            yield {**page, "input_ids": ids, "image_embeds_position_mask": places}


def _vector_widths(model: nn.Module) -> list[int]:
    """What the first linear layers take, each width once."""
    return list(dict.fromkeys(m.in_features for m in model.modules() if isinstance(m, nn.Linear)))[:4]


@keyword_finder("vectors")
def _vectors(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """Several sequences of vectors, each as wide as what one of the first linear layers takes."""
    needed = required(model)
    if 1 < len(needed) < 4 and all(name.endswith(("_embeds", "_states", "_features")) for name in needed):
        for chosen in itertools.product(_vector_widths(model), repeat=len(needed)):
            yield {name: floats(model, BATCH, LENGTH, width) for name, width in zip(needed, chosen, strict=True)}


@keyword_finder("actions", "action_embeds", "input_ids", "pixel_values", "pixel_attention_mask")
def _actions(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """What a robot is to do, as vectors, beside a text and what two cameras see."""
    image = configured(model, "image_token_id", "image_token_index")
    if not isinstance(image, int):
        return
    channels, patch, side = image_of(model)
    places = filled(image, BATCH, 2 * (side // patch) ** 2)
    ids = torch.cat([places, integers(min(vocabulary(model), image), BATCH, LENGTH)], 1)
    pixels, pixel_mask = floats(model, BATCH, 2, channels, side, side), filled(1, BATCH, 2).bool()
    for width in _vector_widths(model):
        actions = floats(model, BATCH, 5, width)
        seen = {"action_embeds": actions, "input_ids": ids, "pixel_values": pixels, "pixel_attention_mask": pixel_mask}
        for more in (0, 5) if "attention_mask" in names else ():
            yield {**seen, "attention_mask": filled(1, BATCH, ids.shape[1] + more)}
        yield seen


@keyword_finder("sound twice", "input_values", "input_features")
def _sound_twice(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """A sound as a waveform and as a spectrogram, which has a frame for each hop of the former."""
    hop = configured(model, "hop_length")
    if isinstance(hop, int) and set(required(model)) == {"input_values", "input_features"}:
        wave = floats(model, BATCH, 1, 64 * hop)
        for width in spectrogram_widths(model, getattr(model, "config", None)):
            yield {"input_values": wave, "input_features": floats(model, BATCH, 64, width)}
            yield {"input_values": wave, "input_features": floats(model, BATCH, width, 64)}
        for width in _vector_widths(model):
            yield {"input_values": wave, "input_features": floats(model, BATCH, 64, width)}
