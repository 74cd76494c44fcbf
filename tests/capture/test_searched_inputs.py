"""Inputs that are found by running a module on guesses: small modules of many kinds, in several spellings each."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from permgraph.capture import Captured, capture
from permgraph.capture.inputs.guesses import Guess, beginnings
from permgraph.capture.inputs.trials import Bench
from permgraph.errors import NoInputsError


class Module(nn.Module):
    """A module that is written as a function of its parts and of named arguments."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.forward = run.__get__(self)


def arguments(captured: Captured) -> list[Any]:
    return [*captured.inputs.args, *captured.inputs.kwargs.values()]


def shapes(captured: Captured) -> list[tuple[int, ...]]:
    return [tuple(value.shape) for value in arguments(captured) if isinstance(value, Tensor)]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


# -- a noisy sample, a time, and what it is conditioned on -----------------------------------------------------------


def waves(time: Tensor, width: int) -> Tensor:
    return torch.cos(time[:, None].float() * torch.arange(width))


def denoise(self, sample, timestep, encoder_hidden_states):
    hidden = torch.relu(self.first(sample)) + self.time(waves(timestep, 8))[:, :, None, None]
    pixels = hidden.flatten(2).transpose(1, 2)
    keys, values = self.key(encoder_hidden_states), self.value(encoder_hidden_states)
    pixels = pixels + (self.query(pixels) @ keys.transpose(1, 2)).softmax(-1) @ values
    return self.last(pixels.transpose(1, 2).reshape(hidden.shape))


def denoise_x(self, x, t, context):
    return denoise(self, x, t, context)


def denoise_pooled(self, noisy, sigma, states, pooled):
    assert pooled.ndim == 2
    return denoise(self, noisy, sigma, states) + self.pool(pooled)[:, :, None, None]


def denoise_tokens(self, hidden_states, encoder_hidden_states, timestep):
    hidden = self.first(hidden_states) + self.time(waves(timestep, 8))[:, None]
    return self.last(torch.cat([self.key(encoder_hidden_states), hidden], 1))


def denoising() -> dict[str, nn.Module]:
    return {
        "first": nn.Conv2d(4, 16, 3, padding=1), "time": nn.Linear(8, 16), "query": nn.Linear(16, 12),
        "key": nn.Linear(20, 12), "value": nn.Linear(20, 16), "last": nn.Conv2d(16, 4, 1),
    }  # fmt: skip


def halving(self, sample, timestep, text_embeds):
    down = self.down(sample)
    up = nn.functional.interpolate(self.up(down), scale_factor=4.0)
    return sample + up + (self.time(waves(timestep, 6)) + self.text(text_embeds).mean(1))[:, :, None, None]


DENOISERS = [
    (denoise, denoising(), [(2, 4, 32, 32), (2,), (2, 20)]),
    (denoise_x, denoising(), [(2, 4, 32, 32), (2,), (2, 20)]),
    (denoise_pooled, {**denoising(), "pool": nn.Linear(9, 4)}, [(2, 4, 32, 32), (2,), (2, 20), (2, 9)]),
    (denoise_tokens, {"first": nn.Linear(7, 12), "key": nn.Linear(20, 12), "time": nn.Linear(8, 12),
                      "last": nn.Linear(12, 7)}, [(2, 7), (2, 20), (2,)]),
    (halving, {"down": nn.Conv2d(4, 6, 4, 4), "up": nn.Conv2d(6, 4, 1), "time": nn.Linear(6, 4),
               "text": nn.Linear(10, 4)}, [(2, 4, 32, 32), (2,), (2, 10)]),
]  # fmt: skip


def ends(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the length of a sequence, which is anything."""
    return (shape[0], shape[-1]) if len(shape) == 3 else shape


@pytest.mark.parametrize(("run", "parts", "expected"), DENOISERS, ids=lambda value: getattr(value, "__name__", ""))
def test_samples_with_a_time_and_states(run, parts, expected) -> None:
    captured = capture(Module(run, **parts))
    assert [ends(shape) for shape in shapes(captured)] == expected
    assert captured.unused == ()


# -- sequences with their lengths -------------------------------------------------------------------------------------


def masked_by_length(self, input, lengths):
    places = torch.arange(input.shape[1])[None] < lengths[:, None]
    return self.last(torch.relu(self.first(input)) * places[..., None])


def masked_channels_first(self, x, x_len):
    places = torch.arange(x.shape[2], device=x.device)[None] < x_len[:, None]
    return self.last(torch.relu(self.first(x)) * places[:, None])


def packed(self, frames, lens):
    rows = nn.utils.rnn.pack_padded_sequence(frames, lens, batch_first=True, enforce_sorted=False)
    return self.last(nn.utils.rnn.pad_packed_sequence(self.first(rows)[0], batch_first=True)[0])


def padded_to_longest(self, features, feature_lengths):
    longest = int(feature_lengths.max())
    assert features.size(1) == longest, "the longest sample fills the batch"
    return self.last(torch.relu(self.first(features)))


def mean_of_words(self, tokens, seq_lens):
    places = torch.arange(tokens.shape[1])[None] < seq_lens[:, None]
    return self.last((self.words(tokens) * places[..., None]).sum(1) / seq_lens[:, None])


LINEAR = {"first": nn.Linear(6, 16), "last": nn.Linear(16, 3)}
SEQUENCES = [
    (masked_by_length, LINEAR),
    (masked_channels_first, {"first": nn.Conv1d(6, 16, 3, padding=1), "last": nn.Conv1d(16, 3, 1)}),
    (packed, {"first": nn.GRU(6, 8, batch_first=True), "last": nn.Linear(8, 3)}),
    (padded_to_longest, LINEAR),
    (mean_of_words, {"words": nn.Embedding(11, 6), "last": nn.Linear(6, 3)}),
]


@pytest.mark.parametrize(("run", "parts"), SEQUENCES, ids=lambda value: getattr(value, "__name__", ""))
def test_sequences_with_their_lengths(run, parts) -> None:
    captured = capture(Module(run, **parts))
    sequence, lengths = arguments(captured)
    assert lengths.shape == (2,) and not lengths.is_floating_point()
    assert 1 <= int(lengths.min()) <= int(lengths.max()) <= max(sequence.shape[1:])
    assert captured.unused == ()


# -- videos -----------------------------------------------------------------------------------------------------------


def video_patches(self, video):
    b, c, f, h, w = video.shape
    cut = video.reshape(b, c, f // 2, 2, h // 8, 8, w // 8, 8).permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)
    return self.last(torch.relu(self.first(self.norm(cut))).mean(1))


def frame_by_frame(self, x):
    b, t, c, h, w = x.shape
    return self.last(torch.relu(self.first(x.view(b * t, c, h, w))).mean((2, 3)).view(b, t, -1).mean(1))


def clip_with_places(self, clips):
    batch, frames = clips.size(0), clips.size(1)
    seen = self.first(clips.flatten(0, 1)).flatten(2).mean(2).unflatten(0, (batch, frames))
    return self.last(torch.relu(seen + self.places))


def video_channels_last(self, frames):
    *_, channels = frames.shape
    assert len(frames.shape) == 5 and channels == 3
    return self.last(torch.relu(self.first(frames)).mean((1, 2, 3)))


VIDEOS = [
    (video_patches, {"norm": nn.LayerNorm(384), "first": nn.Linear(384, 16), "last": nn.Linear(16, 3)}, (2, 3)),
    (frame_by_frame, {"first": nn.Conv2d(3, 16, 3), "last": nn.Linear(16, 3)}, (2,)),
    (frame_by_frame, {"first": nn.Conv2d(1, 16, 3), "last": nn.Linear(16, 3)}, (2,)),
    (clip_with_places, {"first": nn.Conv2d(3, 8, 8, 8), "last": nn.Linear(8, 3), "places": parameter(1, 6, 8)}, (2, 6)),
    (video_channels_last, {"first": nn.Linear(3, 8), "last": nn.Linear(8, 3)}, (2,)),
]


@pytest.mark.parametrize(("run", "parts", "begins"), VIDEOS, ids=lambda value: getattr(value, "__name__", ""))
def test_videos(run, parts, begins) -> None:
    captured = capture(Module(run, **parts))
    (shape,) = shapes(captured)
    assert len(shape) == 5 and shape[: len(begins)] == begins
    assert captured.unused == ()


# -- exactly so many tokens -------------------------------------------------------------------------------------------


def mixed_over_places(self, x):
    return self.last(torch.relu(torch.einsum("bnd,nm->bmd", self.words(x), self.mix)))


def table_of_places(self, tokens):
    return self.last(torch.relu(self.words(tokens) + self.places))


def table_with_first(self, ids):
    first = self.first.expand(ids.shape[0], -1, -1)
    return self.last(torch.relu(torch.cat([first, self.words(ids)], 1) + self.places))


def asserted(self, x):
    n = x.shape[1]
    assert n == self.places.shape[1]
    return self.last(torch.relu(self.words(x)).mean(1)) + self.places.sum()


def flattened(self, x):
    return self.last(torch.relu(self.words(x).flatten(1)))


def refused(self, x):
    if x.shape[1] != 12:
        raise ValueError(f"this model takes 12 tokens, and not {x.shape[1]}")
    return self.last(torch.relu(self.words(x)))


TOKENS = [
    (mixed_over_places, {"mix": parameter(16, 16)}, 16),
    (table_of_places, {"places": parameter(1, 12, 8)}, 12),
    (table_of_places, {"places": parameter(33, 8)}, 33),
    (table_with_first, {"first": parameter(1, 1, 8), "places": parameter(1, 17, 8)}, 16),
    (asserted, {"places": parameter(1, 21)}, 21),
    (flattened, {"last": nn.Linear(80, 3)}, 10),
    (refused, {}, 12),
]


@pytest.mark.parametrize(("run", "parts", "length"), TOKENS, ids=lambda value: getattr(value, "__name__", ""))
def test_exactly_so_many_tokens(run, parts, length) -> None:
    captured = capture(Module(run, **{"words": nn.Embedding(30, 8), "last": nn.Linear(8, 3), **parts}))
    (ids,) = arguments(captured)
    assert ids.shape == (2, length) and not ids.is_floating_point()


# -- what defaults to None, and must be given ------------------------------------------------------------------------


def with_classes(self, x, class_labels=None):
    if class_labels is None:
        raise ValueError("class_labels should be provided")
    return self.last(torch.relu(self.first(x) + self.table(class_labels)))


def with_classes_unsaid(self, x, mask=None, y=None):
    return self.last(torch.relu(self.first(x) + self.table(y)))


def with_states(self, x, context=None):
    assert context is not None
    return self.last(torch.relu(self.first(x) + self.other(context).mean(1)))


def with_two(self, x, scale=None, extra=None, unused=None):
    hidden = torch.relu(self.first(x)) * scale.unsqueeze(-1)
    return self.last(hidden + self.other(extra))


def both(self, image=None, text=None):
    if image is None or text is None:
        raise ValueError("image and text are required")
    return self.sees(image).mean((2, 3)) @ self.reads(text).mean(1).T


CLASSES = {"first": nn.Linear(6, 16), "table": nn.Embedding(5, 16), "last": nn.Linear(16, 3)}
OTHERS = {"first": nn.Linear(6, 16), "other": nn.Linear(9, 16), "last": nn.Linear(16, 3)}
REQUIRED = [
    (with_classes, CLASSES),
    (with_classes_unsaid, CLASSES),
    (with_states, OTHERS),
    (with_two, OTHERS),
    (both, {"sees": nn.Conv2d(3, 8, 8, 8), "reads": nn.Embedding(30, 8)}),
]


@pytest.mark.parametrize(("run", "parts"), REQUIRED, ids=lambda value: getattr(value, "__name__", ""))
def test_arguments_that_default_to_none_and_must_be_given(run, parts) -> None:
    captured = capture(Module(run, **parts))
    assert captured.unused == () and captured.mode == "fake"


# -- bags of instances ------------------------------------------------------------------------------------------------


def images_in_bags(self, x):
    b, n = x.shape[:2]
    return self.last(torch.relu(self.first(x.flatten(0, 1))).mean((2, 3)).view(b, n, -1).mean(1))


def list_of_bags(self, bags):
    sizes = [len(bag) for bag in bags]
    return torch.stack([self.last(h.mean(0)) for h in self.first(torch.cat(bags)).relu().split(sizes)])


def checked_list(self, x):
    if not isinstance(x, (list, tuple)):
        raise TypeError(f"expected a list of tensors, got {type(x).__name__}")
    return torch.stack([self.last(self.first(bag).relu().mean(0)) for bag in x])


def one_bag(self, bag):
    if bag.ndim != 2:
        raise ValueError("a bag is of shape (instances, features)")
    weights = self.attend(self.first(bag).tanh()).softmax(0)
    return self.last((weights * self.first(bag)).sum(0))


BAGS = [
    (images_in_bags, {"first": nn.Conv2d(3, 16, 3), "last": nn.Linear(16, 3)}),
    (list_of_bags, LINEAR),
    (checked_list, LINEAR),
    (one_bag, {**LINEAR, "attend": nn.Linear(16, 1)}),
]


@pytest.mark.parametrize(("run", "parts"), BAGS, ids=lambda value: getattr(value, "__name__", ""))
def test_bags_of_instances(run, parts) -> None:
    assert capture(Module(run, **parts)).unused == ()


# -- graphs -----------------------------------------------------------------------------------------------------------


def messages(self, x, edge_index):
    source, target = edge_index
    hidden = self.first(x)
    return self.last(torch.relu(torch.zeros_like(hidden).index_add(0, target, hidden[source])))


def weighted(self, x, edge_index, edge_attr):
    source, target = edge_index[0], edge_index[1]
    hidden = self.first(x)
    sent = hidden[source] * self.link(edge_attr)
    return self.last(torch.relu(torch.zeros_like(hidden).index_add(0, target, sent)))


def pooled(self, x, edge_index, batch):
    hidden = torch.relu(self.first(x))
    hidden = hidden + torch.zeros_like(hidden).index_add(0, edge_index[1], hidden[edge_index[0]])
    return self.last(torch.zeros(2, 16).index_add(0, batch, hidden))


def of_data(self, data):
    return messages(self, data.x, data.edge_index)


def of_data_pooled(self, graph):
    x, edge_index, batch = graph.x, graph.edge_index, graph.batch
    return pooled(self, x, edge_index, batch)


def of_mapping(self, inputs):
    return messages(self, inputs["x"], inputs["edge_index"])


def dense(self, h, adj):
    return self.last(torch.relu(adj @ self.first(h)))


GRAPHS = [
    (messages, LINEAR), (weighted, {**LINEAR, "link": nn.Linear(5, 16)}), (pooled, LINEAR), (of_data, LINEAR),
    (of_data_pooled, LINEAR), (of_mapping, LINEAR), (dense, LINEAR),
]  # fmt: skip


@pytest.mark.parametrize(("run", "parts"), GRAPHS, ids=lambda value: getattr(value, "__name__", ""))
def test_graphs(run, parts) -> None:
    captured = capture(Module(run, **parts))
    assert captured.unused == () and captured.mode == "fake"


# -- what nobody could find, and what must not be guessed -------------------------------------------------------------


def never(self, x, y):
    raise ValueError("no")


def only_a_word(self, x, mode):
    return {"sum": self.first(x).sum}[mode]()


def only_its_class(self, box):
    assert type(box).__name__ == "Box"
    return self.first(box.content)


@pytest.mark.parametrize("run", [never, only_a_word, only_its_class], ids=lambda run: run.__name__)
def test_a_search_without_an_end_is_given_up_in_seconds(run) -> None:
    began = time.process_time()
    with pytest.raises(NoInputsError, match="Tried:\n"):
        capture(Module(run, first=nn.Linear(6, 16)))
    assert time.process_time() - began < 10  # it is less than half of this alone


def test_what_the_search_tried_is_listed() -> None:
    def refuses(self, x, y):
        raise ValueError(f"not of {len(self.first(x).shape)} dimensions")

    with pytest.raises(NoInputsError, match=r"search: .*not of \d dimensions"):
        capture(Module(refuses, first=nn.Linear(6, 16)))


def test_trials_share_one_copy_of_the_module() -> None:
    model = nn.Linear(3, 4)
    with Bench(model) as bench:
        failed, ran = (bench.attempt({"input": torch.zeros(2, width)}, 5.0) for width in (5, 3))
        assert bench._call is not None
    assert failed.failure is not None and failed.failure.function == "linear" and failed.progress == 0
    assert ran.failure is None and ran.progress == 1


def test_a_name_is_a_hint_and_no_verdict() -> None:
    def misnamed(self, lengths, edge_index):
        return self.last(torch.relu(self.first(lengths).mean(2) + self.other(edge_index).mean(1)))

    captured = capture(Module(misnamed, first=nn.Conv1d(5, 16, 3), other=nn.Linear(9, 16), last=nn.Linear(16, 3)))
    assert captured.unused == ()


def test_what_an_argument_may_be_begins_with_its_name() -> None:
    model = nn.Linear(3, 5)
    assert beginnings(model, "x_lengths", 1)[0].kind == "lengths"
    assert beginnings(model, "edgeIndex", 1)[0].kind == "edges"
    assert beginnings(model, "zzz", 1)[0] == Guess("real", (2, 23, 41))
    assert beginnings(model, "steps", 1, int) == [Guess("number", bound=2)]
    assert beginnings(model, "video", 0)[0].shape == (2, 3, 8, 32, 32)
