"""Finders for what is neither text nor plain images nor sound: series, boxes, points, regions, features."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from permgraph.capture.inputs.forms import Arguments, accepted, image_of, ones, plain_images, spectrogram_widths
from permgraph.capture.inputs.layers import (
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
from permgraph.capture.inputs.registry import Candidate, input_finder


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
        pages = list(plain_images(model, names))[:1] if not given.is_floating_point() or more else []
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
    names = accepted(model)
    if {"pixel_values", "input_points", "input_labels"} <= names:
        for page in plain_images(model, frozenset({"pixel_values"})):
            points = floats(model, BATCH, 1, 3, 2).abs()
            asked = {"input_points": points, "input_labels": ones(BATCH, 1, 3)}
            grid = setting(getattr(model, "config", None), "image_embedding_size")
            if "input_masks" in names and isinstance(grid, int):  # a first guess, four times as fine as the features
                yield (), {**page, **asked, "input_masks": floats(model, BATCH, 1, 4 * grid, 4 * grid)}
            yield (), {**page, **asked}


@input_finder("prompted images")
def from_prompted_images(model: nn.Module) -> Iterator[Candidate]:
    """An image, another that shows by example what is asked for, and the answer to that."""
    if {"pixel_values", "prompt_pixel_values", "prompt_masks"} <= accepted(model):
        channels, _, _ = image_of(model)
        for height, width in [(high // 2, wide) for high, wide in named_sides(model)] + named_sides(model):
            image = floats(model, BATCH, channels, height, width)  # a model of both, one above the other, halves it
            yield (), {"pixel_values": image, "prompt_pixel_values": image.clone(), "prompt_masks": image.clone()}


@input_finder("classes")
def from_classes(model: nn.Module) -> Iterator[Candidate]:
    """An image, a text for each class that may be seen in it, how many classes there are, and a text that asks."""
    if {"pixel_values", "classes_input_ids", "classes_structure", "tasks_input_ids"} <= accepted(model):
        ids = next(BY_NAME["input_ids"](model))
        classes = integers(vocabulary(model), 3 * BATCH, ids.shape[1])
        asked = {
            "classes_input_ids": classes,
            "classes_attention_mask": ones(*classes.shape),
            "classes_structure": torch.tensor([3] * BATCH, device="cpu"),
            "tasks_input_ids": ids,
            "tasks_attention_mask": ones(*ids.shape),
        }
        for page in plain_images(model, frozenset({"pixel_values"})):
            yield (), {**page, **asked}


@input_finder("entities")
def from_entities(model: nn.Module) -> Iterator[Candidate]:
    """A text, and the entities that it names, each with the places of its tokens."""
    if {"input_ids", "entity_ids", "entity_position_ids"} <= accepted(model):
        config = getattr(model, "config", None)
        ids = next(BY_NAME["input_ids"](model))
        bound = whole(setting(config, "entity_vocab_size"), 2)
        yield (
            (),
            {
                "input_ids": ids,
                "entity_ids": integers(bound, BATCH, 5),
                "entity_position_ids": integers(ids.shape[1], BATCH, 5, 7),
            },
        )


@input_finder("image places")
def from_image_places(model: nn.Module) -> Iterator[Candidate]:
    """An image, and a text in which a mask says where its features go."""
    names = accepted(model)
    count = setting(getattr(model, "config", None), "latent_query_num", "num_image_tokens")
    if {"input_ids", "pixel_values", "image_embeds_position_mask"} <= names and isinstance(count, int):
        ids = integers(vocabulary(model), BATCH, LENGTH + count)
        places = torch.arange(LENGTH + count, device="cpu").expand(BATCH, -1) < count
        for page in plain_images(model, frozenset({"pixel_values"})):
            yield (), {**page, "input_ids": ids, "image_embeds_position_mask": places}


def _vector_widths(model: nn.Module) -> list[int]:
    """What the first linear layers take, each width once."""
    return list(dict.fromkeys(m.in_features for m in model.modules() if isinstance(m, nn.Linear)))[:4]


@input_finder("vectors")
def from_vectors(model: nn.Module) -> Iterator[Candidate]:
    """Several sequences of vectors, each as wide as what one of the first linear layers takes."""
    names = required(model)
    if not 1 < len(names) < 4 or not all(name.endswith(("_embeds", "_states", "_features")) for name in names):
        return
    for chosen in itertools.product(_vector_widths(model), repeat=len(names)):
        yield (), {name: floats(model, BATCH, LENGTH, width) for name, width in zip(names, chosen, strict=True)}


@input_finder("actions")
def from_actions(model: nn.Module) -> Iterator[Candidate]:
    """What a robot is to do, as vectors, beside a text and what two cameras see."""
    names = accepted(model)
    config = getattr(model, "config", None)
    image = setting(config, "image_token_id", "image_token_index")
    if not {"action_embeds", "input_ids", "pixel_values", "pixel_attention_mask"} <= names or not isinstance(
        image, int
    ):
        return
    channels, patch, side = image_of(model)
    places = torch.full((BATCH, 2 * (side // patch) ** 2), image, device="cpu")
    ids = torch.cat([places, integers(min(vocabulary(model), image), BATCH, LENGTH)], 1)
    seen = {
        "input_ids": ids,
        "pixel_values": floats(model, BATCH, 2, channels, side, side),
        "pixel_attention_mask": ones(BATCH, 2, dtype=torch.bool),
    }
    for width in _vector_widths(model):
        actions = floats(model, BATCH, 5, width)
        if "attention_mask" in names:
            yield (), {"action_embeds": actions, **seen, "attention_mask": ones(BATCH, ids.shape[1])}
            yield (), {"action_embeds": actions, **seen, "attention_mask": ones(BATCH, ids.shape[1] + 5)}
        yield (), {"action_embeds": actions, **seen}


@input_finder("sound twice")
def from_sound_twice(model: nn.Module) -> Iterator[Candidate]:
    """A sound as a waveform and as a spectrogram, which has a frame for each hop of the former."""
    hop = setting(getattr(model, "config", None), "hop_length")
    if isinstance(hop, int) and set(required(model)) == {"input_values", "input_features"}:
        wave = floats(model, BATCH, 1, 64 * hop)
        for width in spectrogram_widths(model, getattr(model, "config", None)):
            yield (), {"input_values": wave, "input_features": floats(model, BATCH, 64, width)}
            yield (), {"input_values": wave, "input_features": floats(model, BATCH, width, 64)}
        for width in _vector_widths(model):
            yield (), {"input_values": wave, "input_features": floats(model, BATCH, 64, width)}
