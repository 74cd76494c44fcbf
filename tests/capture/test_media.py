"""Inputs of other media than text: each form is found by the names that a model accepts, with sizes that agree."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from permgraph.capture import Captured, capture
from permgraph.capture.inputs.media import count_features


def arguments(captured: Captured) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in captured.inputs.kwargs.items()}


class Tower(nn.Module):
    """A stack of patches to features; every subclass takes them in another form."""

    main_input_name = "pixel_values"

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(patch_size=4, num_channels=3, **config)
        self.embed = nn.Linear(48, 6)


class Grid(Tower):
    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        counts = grid_thw.prod(-1)
        assert pixel_values.shape[0] == sum(counts.tolist())
        return self.embed(pixel_values)


class Packed(Tower):
    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor, spatial_shapes: Tensor) -> Tensor:
        assert pixel_values.shape[:2] == pixel_attention_mask.shape
        assert all(int(rows * columns) == pixel_values.shape[1] for rows, columns in spatial_shapes.tolist())
        return self.embed(pixel_values) * pixel_attention_mask[..., None]


class Placed(Tower):
    def forward(self, pixel_values: Tensor, pixel_position_ids: Tensor) -> Tensor:
        assert pixel_values.shape[:2] == pixel_position_ids.shape[:2] and pixel_position_ids.shape[2] == 2
        return self.embed(pixel_values) + pixel_position_ids.sum(-1, keepdim=True)


class Strip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(patch_size=4, num_channels=3)
        self.embed = nn.Conv2d(3, 6, 4, 4)

    def forward(self, pixel_values: Tensor, target_sizes: Tensor) -> Tensor:
        patches = self.embed(pixel_values).flatten(2)
        assert patches.shape[-1] == int(target_sizes.prod(-1).sum())
        return patches


class Video(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_frames=3, image_size=8)
        self.embed = nn.Conv3d(3, 6, (1, 4, 4), (1, 4, 4))

    def forward(self, pixel_values_videos: Tensor) -> Tensor:
        assert pixel_values_videos.shape[1] == 3
        return self.embed(pixel_values_videos.transpose(1, 2))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Grid(), {"pixel_values": (32, 48), "grid_thw": (2, 3)}),
        (Packed(), {"pixel_values": (2, 16, 48), "pixel_attention_mask": (2, 16), "spatial_shapes": (2, 2)}),
        (Placed(), {"pixel_values": (2, 16, 48), "pixel_position_ids": (2, 16, 2)}),
        (Strip(), {"pixel_values": (1, 3, 4, 128), "target_sizes": (2, 2)}),
        (Video(), {"pixel_values_videos": (2, 3, 3, 8, 8)}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_images_in_every_form(model: nn.Module, expected: dict[str, tuple[int, ...]]) -> None:
    captured = capture(model)
    assert captured.inputs.finder == "images"
    assert arguments(captured) == expected


class Speaking(nn.Module):
    """Reads text in which an image or a sound stands in place of as many tokens as it has features."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            vocab_size=31,
            image_token_id=29,
            audio_token_id=30,
            is_encoder_decoder=False,
            vision_config=SimpleNamespace(image_size=8, patch_size=4, num_channels=3),
            audio_config=SimpleNamespace(num_mel_bins=10),
        )
        self.words = nn.Embedding(31, 6)
        self.sees = nn.Conv2d(3, 6, 4, 4)
        self.hears = nn.Conv1d(10, 6, 4, 4)
        self.head = nn.Linear(6, 5)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.sees(pixel_values).flatten(2).transpose(1, 2)

    def get_audio_features(self, input_features: Tensor) -> Tensor:
        return self.hears(input_features).flatten(2).transpose(1, 2)

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, input_features: Tensor | None = None
    ) -> Tensor:
        hidden = self.words(input_ids)
        media = (
            (29, pixel_values, self.get_image_features),
            (30, input_features, self.get_audio_features),
        )
        for token, values, features_of in media:
            if values is not None:
                features = features_of(values)
                places = input_ids == token
                if int(places.sum()) != features.shape[0] * features.shape[1]:
                    raise ValueError("features and tokens do not match")
                hidden = hidden.masked_scatter(places[..., None], features)
        return self.head(hidden)


def test_text_has_as_many_placeholders_as_the_model_has_features() -> None:
    model = Speaking()
    assert count_features(model, "get_image_features", {"pixel_values": torch.zeros(2, 3, 8, 8)}) == 4
    assert count_features(model, "get_image_features", {"pixel_values": torch.zeros(2, 4, 8, 8)}) is None
    captured = capture(model)
    assert captured.inputs.finder == "text with media"
    assert arguments(captured) == {
        "input_ids": (2, 19 + 4 + 3 + 32 + 3), "pixel_values": (2, 3, 8, 8), "input_features": (2, 10, 128),
    }  # fmt: skip
    ids = captured.inputs.kwargs["input_ids"]
    assert int((ids == 29).sum()) == 8 and int((ids == 30).sum()) == 64
    assert captured.unused == ()


class Masked(nn.Module):
    main_input_name = "input_features"

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(37, 5)

    def forward(self, input_features: Tensor, input_features_mask: Tensor) -> Tensor:
        return self.linear(input_features) * input_features_mask[..., None]


def test_sound_comes_with_a_mask_and_with_the_width_of_the_first_layer() -> None:
    captured = capture(Masked())
    assert captured.inputs.finder == "sound"
    assert arguments(captured) == {"input_features": (2, 128, 37), "input_features_mask": (2, 128)}
    assert bool(captured.inputs.kwargs["input_features_mask"].all())


class Forecast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(context_length=12, lags_sequence=[1, 5], prediction_length=4, num_time_features=2)
        self.linear = nn.Linear(3, 5)

    def forward(
        self,
        past_values: Tensor,
        past_time_features: Tensor,
        past_observed_mask: Tensor,
        future_values: Tensor | None = None,
        future_time_features: Tensor | None = None,
    ) -> Tensor:
        assert past_values.shape[1] == 17 and future_values is not None and future_time_features is not None
        known = (past_values * past_observed_mask)[..., None]
        past = torch.cat([known, past_time_features], -1)
        return self.linear(torch.cat([past, torch.cat([future_values[..., None], future_time_features], -1)], 1))


def test_series_reach_back_to_the_longest_lag() -> None:
    captured = capture(Forecast())
    assert captured.inputs.finder == "series"
    assert arguments(captured)["future_time_features"] == (2, 4, 2)


class Boxed(nn.Module):
    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.words, self.whole = nn.Embedding(31, 6), whole
        self.places = nn.Embedding(1000, 6) if whole else nn.Linear(8, 6)

    def forward(self, input_ids: Tensor, bbox: Tensor) -> Tensor:
        placed = self.places(bbox)
        return self.words(input_ids) + (placed.sum(2) if self.whole else placed)


@pytest.mark.parametrize("whole", [True, False])
def test_boxes_are_whole_or_fractions(whole: bool) -> None:
    captured = capture(Boxed(whole))
    assert captured.inputs.finder == "boxes"
    boxes = captured.inputs.kwargs["bbox"]
    assert boxes.shape == (2, 19, 4 if whole else 8)
    assert bool((boxes[..., 2:4] > boxes[..., :2]).all()) and 0 <= float(boxes.min()) <= float(boxes.max()) < 1000


class Pointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=8)
        self.conv, self.point = nn.Conv2d(3, 6, 4, 4), nn.Linear(2, 6)

    def forward(self, pixel_values: Tensor, input_points: Tensor, input_labels: Tensor) -> Tensor:
        marks = self.point(input_points) * input_labels[..., None]
        return self.conv(pixel_values).flatten(2) + marks.sum((1, 2))[..., None]


def test_points_lie_in_an_image() -> None:
    captured = capture(Pointed())
    assert captured.inputs.finder == "points"
    assert arguments(captured) == {
        "pixel_values": (2, 3, 8, 8), "input_points": (2, 1, 3, 2), "input_labels": (2, 1, 3),
    }  # fmt: skip


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(visual_feat_dim=7, visual_pos_dim=4, max_position_embeddings=11)
        self.words, self.sees, self.places = nn.Embedding(31, 6), nn.Linear(7, 6), nn.Linear(4, 6)

    def forward(self, input_ids: Tensor, visual_feats: Tensor, visual_pos: Tensor) -> Tensor:
        return torch.cat([self.words(input_ids), self.sees(visual_feats) + self.places(visual_pos)], 1)


def test_regions_stand_beside_a_text_no_longer_than_there_are_positions() -> None:
    captured = capture(Regions())
    assert captured.inputs.finder == "regions"
    assert arguments(captured) == {"input_ids": (2, 11), "visual_feats": (2, 23, 7), "visual_pos": (2, 23, 4)}


class Frames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=6)
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, input_values: Tensor, decoder_input_values: Tensor) -> Tensor:
        return self.linear(self.norm(input_values).mean(1, keepdim=True) + decoder_input_values)


def test_frames_go_into_both_stacks() -> None:
    captured = capture(Frames())
    assert captured.inputs.finder == "frames"
    assert arguments(captured) == {"input_values": (2, 19, 6), "decoder_input_values": (2, 19, 6)}


class Spectral(nn.Module):
    """Reads its mask, which has a default that does not do."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.linear, self.config = nn.Linear(37, 5), SimpleNamespace()
        self.forward = self.under_features if name == "input_features_mask" else self.under_attention  # type: ignore

    def under_features(self, input_features: Tensor, input_features_mask: Tensor | None = None) -> Tensor:
        assert input_features_mask is not None, "the mask is missing"
        return self.linear(input_features) * input_features_mask[..., None]

    def under_attention(self, input_features: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.under_features(input_features, attention_mask)


@pytest.mark.parametrize("mask", ["input_features_mask", "attention_mask"])
def test_sound_comes_with_a_mask_that_has_a_default_where_it_does_not_run_without(mask: str) -> None:
    captured = capture(Spectral(mask))
    assert captured.inputs.finder == "sound"
    assert arguments(captured) == {"input_features": (2, 128, 37), mask: (2, 128)}


class Listening(Speaking):
    """Does not say how many features a sound has: the one placeholder makes room for all of them."""

    get_audio_features = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        del self.config.image_token_id, self.sees

    def forward(self, input_ids: Tensor, input_features: Tensor | None = None) -> Tensor:  # type: ignore[override]
        hidden = self.words(input_ids)
        if input_features is not None:
            features = self.hears(input_features).flatten(2).transpose(1, 2)
            assert bool(((input_ids == 30).sum(1) == 1).all()), "one placeholder for each sound"
            hidden = torch.cat([hidden[input_ids != 30].view(len(hidden), -1, 6), features], 1)
        return self.head(hidden)


def test_one_placeholder_where_a_model_makes_room_itself() -> None:
    captured = capture(Listening())
    assert captured.inputs.finder == "text with media"
    assert captured.unused == () and int((captured.inputs.kwargs["input_ids"] == 30).sum()) == 2
    assert captured.inputs.kwargs["input_features"].shape == (2, 10, 128)


class Sharp(Speaking):
    """Sees an image at two resolutions, for one of which it has a table by the number of patches."""

    def __init__(self) -> None:
        super().__init__()
        del self.config.audio_token_id, self.hears
        self.config.high_res_vision_config = SimpleNamespace(image_size=16)
        self.config.queries = {"25": 3}
        self.finely = nn.Conv2d(3, 6, 8, 8)

    def get_image_features(self, pixel_values: Tensor, high_res_pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        coarse = self.sees(pixel_values).flatten(2).transpose(1, 2)[:, : self.config.queries[str(25)]]
        assert pixel_values.shape[-1] == 20 and high_res_pixel_values.shape[-1] == 16
        return torch.cat([coarse, self.finely(high_res_pixel_values).flatten(2).transpose(1, 2)], 1)

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, pixel_values: Tensor | None = None, high_res_pixel_values: Tensor | None = None
    ) -> Tensor:
        hidden = self.words(input_ids)
        if pixel_values is not None and high_res_pixel_values is not None:
            features = self.get_image_features(pixel_values, high_res_pixel_values)
            hidden = hidden.masked_scatter((input_ids == 29)[..., None], features)
        return self.head(hidden)


def test_images_of_two_resolutions_and_of_a_size_for_which_there_is_a_table() -> None:
    model = Sharp()
    model.config.vision_config.patch_size = 4
    captured = capture(model)
    assert captured.inputs.finder == "text with media" and captured.unused == ()
    assert arguments(captured) | {"input_ids": ()} == {
        "input_ids": (), "pixel_values": (2, 3, 20, 20), "high_res_pixel_values": (2, 3, 16, 16),
    }  # fmt: skip
    assert int((captured.inputs.kwargs["input_ids"] == 29).sum()) == 2 * (3 + 4)


class Levels(nn.Module):
    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        heard = SimpleNamespace(n_mel_bins=7, vocab_size=16)
        seen = SimpleNamespace(temporal_patch_size=2, patch_size=4, num_channels=3)
        self.config = SimpleNamespace(
            vocab_size=31, audio_token_id=30, image_token_id=29, audio_config=heard, vision_config=seen
        )
        self.words, self.levels, self.patches = nn.Embedding(31, 6), nn.Embedding(7 * 16, 6), nn.Linear(96, 6)

    def get_audio_features(self, audio_input_ids: Tensor) -> Tensor:
        return self.levels(audio_input_ids + 16 * torch.arange(7)).sum(2)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        assert pixel_values.ndim == 5 and pixel_values.shape[1:] == (2, 4, 4, 3)
        return self.patches(pixel_values.flatten(1))[:, None]

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, audio_input_ids: Tensor | None = None
    ) -> Tensor:
        hidden = self.words(input_ids)
        if audio_input_ids is not None:
            hidden = hidden.masked_scatter((input_ids == 30)[..., None], self.get_audio_features(audio_input_ids))
        if pixel_values is not None:
            hidden = hidden.masked_scatter((input_ids == 29)[..., None], self.get_image_features(pixel_values))
        return hidden


def test_sound_in_levels_and_patches_that_span_frames() -> None:
    captured = capture(Levels())
    assert captured.inputs.finder == "text with media" and captured.unused == ()
    assert captured.inputs.kwargs["audio_input_ids"].shape == (2, 19, 7)
    assert captured.inputs.kwargs["pixel_values"].shape == (32, 2, 4, 4, 3)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=31, entity_vocab_size=5)
        self.words, self.entities, self.places = nn.Embedding(31, 6), nn.Embedding(5, 6), nn.Embedding(19, 6)

    def forward(
        self, input_ids: Tensor, entity_ids: Tensor | None = None, entity_position_ids: Tensor | None = None
    ) -> Tensor:
        hidden = self.words(input_ids)
        if entity_ids is not None and entity_position_ids is not None:
            hidden = torch.cat([hidden, self.entities(entity_ids) + self.places(entity_position_ids).mean(-2)], 1)
        return hidden


def test_entities_stand_beside_a_text() -> None:
    captured = capture(Named())
    assert captured.inputs.finder == "entities" and captured.unused == ()
    assert arguments(captured) == {"input_ids": (2, 19), "entity_ids": (2, 5), "entity_position_ids": (2, 5, 7)}


class Compared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 4, 4)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            raise ValueError("two images for each sample")
        first, second = (self.conv(pixel_values[:, i]).flatten(2) for i in range(2))
        return first.transpose(1, 2) @ second


def test_images_come_in_pairs() -> None:
    captured = capture(Compared())
    assert captured.inputs.finder == "pairs of images"
    assert arguments(captured) == {"pixel_values": (2, 2, 1, 64, 64)}


class Lonely(nn.Module):
    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=31)
        self.words = nn.Embedding(31, 6)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.words(input_ids).view(1, input_ids.shape[1], 6)


def test_a_batch_of_one_for_a_model_that_takes_no_other() -> None:
    captured = capture(Lonely())
    assert captured.inputs.finder == "one sample"
    assert arguments(captured) == {"input_ids": (1, 19)}


class Guessed(Pointed):
    def __init__(self) -> None:
        super().__init__()
        self.config.prompts = SimpleNamespace(image_embedding_size=2)
        self.guess = nn.Conv2d(1, 6, 4, 4)

    def forward(  # type: ignore[override]
        self, pixel_values: Tensor, input_points: Tensor, input_labels: Tensor, input_masks: Tensor | None = None
    ) -> Tensor:
        found = super().forward(pixel_values, input_points, input_labels)
        return found if input_masks is None else found + self.guess(input_masks).flatten(2)


def test_points_come_with_a_first_guess() -> None:
    captured = capture(Guessed())
    assert captured.inputs.finder == "points" and captured.unused == ()
    assert captured.inputs.kwargs["input_masks"].shape == (2, 1, 8, 8)


class Reserved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=31, latent_query_num=5, image_size=8)
        self.words, self.sees = nn.Embedding(31, 6), nn.Conv2d(3, 6, 4, 4)
        self.queries = nn.Linear(4, 5)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, image_embeds_position_mask: Tensor) -> Tensor:
        features = self.queries(self.sees(pixel_values).flatten(2)).transpose(1, 2)
        return self.words(input_ids).masked_scatter(image_embeds_position_mask[..., None], features)


def test_a_mask_says_where_the_features_of_an_image_go() -> None:
    captured = capture(Reserved())
    assert captured.inputs.finder == "image places" and captured.unused == ()
    assert captured.inputs.kwargs["image_embeds_position_mask"].sum(1).tolist() == [5, 5]


class Several(nn.Module):
    """Reads text in which some words see one of several images."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=31, image_size=8)
        self.words, self.sees = nn.Embedding(31, 6), nn.Conv2d(3, 6, 4, 4)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_encoder_embeddings: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
    ) -> Tensor:
        if pixel_values is None or image_attention_mask is None:
            raise ValueError("an image is missing")
        batch, count = pixel_values.shape[:2]
        seen = self.sees(pixel_values.flatten(0, 1)).mean((2, 3)).view(batch, count, 6)
        return self.words(input_ids) + image_attention_mask.to(seen.dtype) @ seen


def test_a_mask_says_which_words_see_which_image() -> None:
    captured = capture(Several())
    assert captured.inputs.finder == "images"
    assert arguments(captured) == {
        "input_ids": (2, 19), "pixel_values": (2, 1, 3, 8, 8), "image_attention_mask": (2, 19, 1),
    }  # fmt: skip


class Books(nn.Module):
    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=31, num_codebooks=4)
        self.books = nn.ModuleList(nn.Embedding(31, 6) for _ in range(4))

    def forward(self, input_ids: Tensor, lang_ids: Tensor | None = None) -> Tensor:
        rows = input_ids.reshape(-1, 4, input_ids.shape[-1])
        if rows.shape[-1] != 19:
            raise ValueError("a row for each codebook")
        return sum(book(rows[:, i]) for i, book in enumerate(self.books))


def test_sound_as_tokens_with_a_row_for_each_codebook() -> None:
    captured = capture(Books())
    assert captured.inputs.finder == "huggingface" and arguments(captured) == {"input_ids": (8, 19)}


class Spoken(nn.Module):
    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=31)
        self.words, self.languages = nn.Embedding(31, 6), nn.Embedding(3, 6)

    def forward(self, input_ids: Tensor, lang_ids: Tensor | None = None) -> Tensor:
        if lang_ids is None:
            raise ValueError("which language?")
        return self.words(input_ids) + self.languages(lang_ids)[:, None]


def test_a_language_is_given_where_a_model_asks_for_one() -> None:
    assert arguments(capture(Spoken())) == {"input_ids": (2, 19), "lang_ids": (2,)}


class Framed(nn.Module):
    main_input_name = "input_values"

    def __init__(self) -> None:
        super().__init__()
        self.config, self.linear = SimpleNamespace(), nn.Linear(1920, 5)

    def forward(self, input_values: Tensor) -> Tensor:
        return self.linear(input_values.unflatten(1, (-1, 1920)))


def test_a_waveform_has_whole_frames() -> None:
    assert arguments(capture(Framed())) == {"input_values": (2, 9600)}


class Both(nn.Module):
    """Runs on a text alone, and leaves what it sees unread then."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=31, image_size=8, task_seq_len=7)
        self.words, self.sees, self.task = nn.Embedding(31, 6), nn.Conv2d(3, 6, 4, 4), nn.Linear(7, 6)

    def forward(self, input_ids: Tensor, task_inputs: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        hidden = self.words(input_ids) + self.task(task_inputs)[:, None]
        return hidden if pixel_values is None else hidden + self.sees(pixel_values).mean((2, 3))[:, None]


def test_a_text_stands_beside_an_image_before_it_stands_alone() -> None:
    captured = capture(Both())
    assert captured.unused == ()
    assert arguments(captured) == {"input_ids": (2, 19), "pixel_values": (2, 3, 8, 8), "task_inputs": (2, 7)}


class Unnamed(nn.Module):
    main_input_name = "inputs"

    def __init__(self) -> None:
        super().__init__()
        self.config, self.linear = SimpleNamespace(image_size=8), nn.Linear(6, 5)
        self.embed = nn.Parameter(torch.ones(3, 6))

    def forward(self, inputs: Tensor | None = None) -> Tensor:
        assert inputs is not None and inputs.shape[-2:] == (8, 8)
        return self.linear(inputs.flatten(2).transpose(1, 2) @ self.embed)


def test_an_argument_whose_name_says_nothing_is_an_image_where_the_config_has_a_size() -> None:
    captured = capture(Unnamed())
    assert captured.inputs.finder == "huggingface" and arguments(captured) == {"inputs": (2, 3, 8, 8)}


class Context(nn.Module):
    """Takes two sequences, of which one is wider."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.narrow = nn.Linear(6, 5), nn.Linear(14, 6)

    def forward(self, noise_embeds: Tensor, context_hidden_states: Tensor) -> Tensor:
        return self.mix(noise_embeds + self.narrow(context_hidden_states).mean(1, keepdim=True))


def test_sequences_of_vectors_are_each_as_wide_as_some_layer_takes() -> None:
    captured = capture(Context())
    assert captured.inputs.finder == "vectors"
    assert arguments(captured) == {"noise_embeds": (2, 19, 6), "context_hidden_states": (2, 19, 14)}


class Robot(nn.Module):
    """Sees with two cameras, and reads."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_token_id=7, image_size=8, patch_size=4, num_channels=3, vocab_size=11)
        self.act, self.words, self.sees = nn.Linear(10, 6), nn.Embedding(11, 6), nn.Conv2d(3, 6, 4, 4)

    def forward(
        self,
        action_embeds: Tensor,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
    ) -> Tensor:
        assert input_ids is not None and pixel_values is not None and pixel_attention_mask is not None
        seen = self.sees(pixel_values.flatten(0, 1)).flatten(2).transpose(1, 2).reshape(2, -1, 6)
        assert pixel_values.shape[:2] == pixel_attention_mask.shape and (input_ids == 7).sum() == 2 * seen.shape[1]
        return torch.cat([self.words(input_ids), seen, self.act(action_embeds)], 1)


def test_actions_stand_beside_what_two_cameras_see() -> None:
    captured = capture(Robot())
    assert captured.inputs.finder == "actions" and captured.unused == ()
    assert arguments(captured)["action_embeds"] == (2, 5, 10) and arguments(captured)["pixel_values"] == (2, 2, 3, 8, 8)


class HeardTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hop_length=4, num_mel_bins=6)
        self.wave, self.bands = nn.Conv1d(1, 5, 4, 4), nn.Linear(6, 5)

    def forward(self, input_values: Tensor, input_features: Tensor) -> Tensor:
        return self.wave(input_values).transpose(1, 2) + self.bands(input_features)


def test_a_waveform_and_a_spectrogram_are_of_one_sound() -> None:
    captured = capture(HeardTwice())
    assert captured.inputs.finder == "sound twice"
    assert arguments(captured) == {"input_values": (2, 1, 256), "input_features": (2, 64, 6)}


class Overlaid(nn.Module):
    """Adds what it hears to what it reads, token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=31, num_mel_bins=10)
        self.words, self.hears = nn.Embedding(31, 6), nn.Conv1d(10, 6, 8, 8)

    def get_audio_features(self, input_features: Tensor) -> Tensor:
        return self.hears(input_features).transpose(1, 2)

    def forward(self, input_ids: Tensor | None = None, input_features: Tensor | None = None) -> Tensor:
        assert input_ids is not None and input_features is not None
        return self.words(input_ids) + self.get_audio_features(input_features)


def test_a_sound_over_a_text_has_as_many_features_as_that_has_tokens() -> None:
    captured = capture(Overlaid())
    assert captured.inputs.finder == "sound over text" and captured.unused == ()
    assert arguments(captured) == {"input_ids": (2, 16), "input_features": (2, 10, 128)}


class Windowed(nn.Module):
    """Cuts an image into windows of patches, and takes the likeliest patches for its queries to begin with."""

    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(patch_size=4, num_windows=3, num_queries=70, image_size=10)
        self.embed = nn.Conv2d(3, 6, 4, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.embed(pixel_values)
        assert patches.shape[-1] % 3 == 0
        return patches.flatten(2).topk(70, dim=-1).values


def test_images_have_whole_windows_and_enough_patches_for_the_queries() -> None:
    assert arguments(capture(Windowed())) == {"pixel_values": (2, 3, 36, 36)}


class Scaled(nn.Module):
    """Cuts patches from an image at several scales."""

    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(patch_size=40, scaled_images_ratios=[0.25, 1])
        self.embed = nn.Conv2d(3, 6, 40, 40)

    def forward(self, pixel_values: Tensor) -> Tensor:
        small = nn.functional.interpolate(pixel_values, scale_factor=0.25)
        return self.embed(small).mean((2, 3)) + self.embed(pixel_values).mean((2, 3))


def test_images_are_large_enough_to_be_scaled() -> None:
    assert arguments(capture(Scaled())) == {"pixel_values": (2, 3, 160, 160)}


class Clips(nn.Module):
    """Reads a text beside a video, and does not say how many frames it wants."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=31, image_size=8)
        self.words, self.sees = nn.Embedding(31, 6), nn.Conv2d(3, 6, 4, 4)

    def forward(self, input_ids: Tensor, pixel_values_videos: Tensor) -> Tensor:
        batch, frames = pixel_values_videos.shape[:2]
        seen = self.sees(pixel_values_videos.flatten(0, 1)).mean((2, 3)).unflatten(0, (batch, frames))
        return self.words(input_ids) + seen.mean(1, keepdim=True)


def test_a_few_frames_stand_beside_a_text() -> None:
    assert arguments(capture(Clips())) == {"input_ids": (2, 19), "pixel_values_videos": (2, 2, 3, 8, 8)}


class Cut(nn.Module):
    """Takes an image in as many parts as one of the listed grids has, and the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=31, image_size=8, patch_size=4, num_channels=3)
        self.config.image_grid_pinpoints, self.config.image_token_id = [[8, 24], [16, 24]], 7
        self.words, self.sees = nn.Embedding(31, 6), nn.Conv2d(3, 6, 8, 8)

    def get_image_features(self, pixel_values: Tensor, image_sizes: Tensor) -> Tensor:
        assert pixel_values.shape[1] == 7 and image_sizes.shape == (2, 2)
        return self.sees(pixel_values.flatten(0, 1)).flatten(1).unflatten(0, (2, 7))

    def forward(
        self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, image_sizes: Tensor | None = None
    ) -> Tensor:
        assert input_ids is not None
        if pixel_values is None or image_sizes is None:
            return self.words(input_ids)
        features = self.get_image_features(pixel_values, image_sizes)
        return self.words(input_ids).masked_scatter((input_ids == 7)[..., None], features)


def test_images_come_in_as_many_parts_as_the_listed_grids_have() -> None:
    captured = capture(Cut())
    assert captured.unused == () and arguments(captured)["pixel_values"] == (2, 7, 3, 8, 8)


class Sampled(nn.Module):
    """A waveform without channels goes through a filter bank, as in the recognisers that people write themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.window = nn.Buffer(torch.hann_window(64))
        self.embed = nn.Linear(33, 6)

    def forward(self, wav: Tensor) -> Tensor:
        assert wav.ndim == 2
        spectrum = torch.stft(wav, 64, 32, window=self.window, return_complex=True).abs()
        return self.embed(spectrum.transpose(1, 2)).relu()


class Filtered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv1d(1, 6, 400, 160)

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 2
        return self.filters(x[:, None]).relu()


class Mels(nn.Module):
    """What goes by the name of a waveform is a spectrogram."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv1d(20, 6, 3)

    def forward(self, audio: Tensor) -> Tensor:
        return self.embed(audio)


def test_a_waveform_by_its_name_or_by_the_first_filters() -> None:
    named = capture(Sampled())
    assert named.inputs.finder == "waveforms" and named.inputs.args[0].shape == (2, 9600)
    assert capture(Filtered()).inputs.args[0].shape == (2, 1024)
    assert capture(Mels()).inputs.args[0].shape == (2, 20, 32)


class Seen(nn.Module):
    """A video and its sound, with or without a text."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=8, vocab_size=11)
        self.words, self.sight, self.sound = nn.Embedding(11, 6), nn.Linear(192, 6), nn.Conv1d(1, 6, 400, 400)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values_videos: Tensor | None = None,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        assert pixel_values_videos is not None and input_values is not None and attention_mask is not None
        words = (self.words(input_ids) * attention_mask[..., None]).mean(1)
        return words + self.sight(pixel_values_videos.flatten(2)).mean(1) + self.sound(input_values).mean(2)


def test_a_video_comes_with_its_sound() -> None:
    captured = capture(Seen())
    assert captured.inputs.finder == "sound with video" and not captured.unused
    assert arguments(captured)["pixel_values_videos"] == (2, 2, 3, 8, 8)
    assert arguments(captured)["input_values"] == (2, 1, 9600)


class Open(nn.Module):
    """Classes are named by texts, and so is what is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=8, vocab_size=11, num_channels=3)
        self.words, self.sight = nn.Embedding(11, 6), nn.Linear(192, 6)

    def forward(
        self,
        pixel_values: Tensor,
        classes_input_ids: Tensor,
        classes_attention_mask: Tensor,
        tasks_input_ids: Tensor,
        tasks_attention_mask: Tensor,
        classes_structure: Tensor,
    ) -> Tensor:
        assert classes_input_ids.shape == classes_attention_mask.shape
        sizes = classes_structure.tolist()
        assert sum(sizes) == classes_input_ids.shape[0] and len(sizes) == pixel_values.shape[0]
        classes = torch.stack([part.mean(0) for part in self.words(classes_input_ids).mean(1).split(sizes)])
        return classes * self.sight(pixel_values.flatten(1)) + self.words(tasks_input_ids).mean(1)


def test_classes_are_texts_and_their_number_is_told() -> None:
    captured = capture(Open())
    assert captured.inputs.finder == "classes"
    assert arguments(captured)["classes_input_ids"] == (6, 19)


class Asked(nn.Module):
    """A text reads an image before the features are put into another; the images may be the frames of a video."""

    def __init__(self, medium: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=8, vocab_size=11, num_channels=3, **{f"{medium}_token_id": 10})
        self.words, self.sight, self.medium = nn.Embedding(11, 6), nn.Linear(192, 6), medium
        if medium == "image":
            self.get_image_features = self.features
        else:
            self.get_video_features = self.features

    def features(self, pixel_values: Tensor, qformer_input_ids: Tensor) -> Tensor:
        assert pixel_values.ndim == (4 if self.medium == "image" else 5)
        seen = self.sight(pixel_values.reshape(pixel_values.shape[0], -1, 192))
        return seen * self.words(qformer_input_ids).mean(1, keepdim=True)

    def forward(self, pixel_values: Tensor, qformer_input_ids: Tensor, input_ids: Tensor | None = None) -> Tensor:
        assert input_ids is not None
        seen, places = self.features(pixel_values, qformer_input_ids), input_ids == 10
        assert int(places.sum()) == seen.shape[0] * seen.shape[1]
        words = self.words(input_ids)
        return words.masked_scatter(places[..., None].expand_as(words), seen)


@pytest.mark.parametrize("medium", ["image", "video"])
def test_a_second_text_asks_what_is_to_be_seen(medium: str) -> None:
    captured = capture(Asked(medium))
    assert captured.inputs.finder == "text with media" and not captured.unused
    frames = () if medium == "image" else (4,)
    assert arguments(captured)["pixel_values"] == (2, *frames, 3, 8, 8)


class Headed(nn.Module):
    """Puts a head on a model that sees, and does not hand its method on."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Speaking()
        self.config, self.out = self.model.config, nn.Linear(5, 3)

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        return self.out(self.model(input_ids, pixel_values))


def test_the_part_below_a_head_says_how_many_features_there_are() -> None:
    captured = capture(Headed())
    assert captured.inputs.finder == "text with media"
    assert int((captured.inputs.kwargs["input_ids"] == 29).sum()) == 8
    assert "model.sees.weight" not in captured.unused
