"""Example inputs are found from the config, the signature and the layers; or the error says what was tried."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from permgraph.capture import capture, find_inputs, input_finder
from permgraph.capture.inputs.registry import Candidate, _finders
from permgraph.errors import CaptureError


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    captured = capture(model)
    return [tuple(node.meta["val"].shape) for node in captured.placeholders("input")]


class Small(nn.Module):
    """A CIFAR-sized classifier: only 32 pixels fit."""

    def __init__(self, side: int = 32) -> None:
        super().__init__()
        self.head = nn.Linear(4 * (side // 4) ** 2, 10)  # registered before the layer that is met first
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.max_pool2d(self.conv(x), 4).flatten(1))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Linear(3, 5), [(2, 3)]),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 5)), [(2, 784)]),
        (nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3)), [(2, 19)]),
        (nn.EmbeddingBag(11, 4), [(2, 19)]),
        (nn.Conv1d(3, 4, 5), [(2, 3, 32)]),
        (nn.Conv2d(3, 4, 5), [(2, 3, 32, 32)]),
        (nn.Conv3d(3, 4, 5), [(2, 3, 8, 32, 32)]),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 3)), [(2, 1, 28, 28)]),
        (Small(), [(2, 3, 32, 32)]),
        (Small(96), [(2, 3, 96, 96)]),
        (nn.LSTM(3, 5), [(2, 19, 3)]),
        (nn.GRUCell(3, 5), [(2, 3)]),
        (nn.BatchNorm1d(3), [(2, 3)]),
        (nn.BatchNorm3d(3), [(2, 3, 19, 19, 19)]),
        (nn.GroupNorm(2, 4), [(2, 4)]),
        (nn.LayerNorm(4), [(2, 4)]),
        (nn.ReLU(), [(2, 19)]),
        (nn.Transformer(8, 2, 1, 1, 16, batch_first=True), [(2, 19, 8), (2, 19, 8)]),
        (nn.TransformerDecoderLayer(8, 2, 16), [(2, 19, 8), (2, 19, 8)]),
        (nn.MultiheadAttention(8, 2), [(2, 19, 8)] * 3),
        (nn.Bilinear(3, 4, 5), [(2, 3), (2, 4)]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_inputs_for_layers(model: nn.Module, expected: list[tuple[int, ...]]):
    assert shapes(model) == expected


def test_token_ids_stay_within_the_vocabulary():
    captured = capture(nn.Embedding(3, 4))
    (ids,) = captured.inputs.args
    assert ids.dtype == torch.int64
    assert 0 <= int(ids.min()) <= int(ids.max()) < 3


def test_a_text_has_the_tokens_with_which_other_media_begin():
    class Spoken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(vocab_size=13, audio_bos_token_id=11, image_bos_token_id=99, eos_token_id=12)
            self.words, self.first = nn.Embedding(13, 5), nn.Parameter(torch.zeros(5))

        def forward(self, input_ids):
            return torch.where((input_ids == 11)[..., None], self.first, self.words(input_ids))

    ids = capture(Spoken()).inputs.args[0]
    assert (ids == 11).any(1).all() and ids.max() == 12 and (ids[:, -1] == 12).all()


def test_arguments_by_name_and_by_layer():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.conv = nn.Conv2d(3, 6, 2)

        def forward(self, input_ids: Tensor, pixel_values: Tensor, scale: float = 1.0) -> Tensor:
            return self.embed(input_ids).sum(1) + self.conv(pixel_values).sum((2, 3)) * scale

    assert shapes(Model()) == [(2, 19), (2, 3, 64, 64)]


def test_bare_parameters():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    assert shapes(Model()) == [(2, 5)]


def test_inputs_take_the_dtype_of_the_model():
    captured = capture(nn.Linear(3, 5).to(torch.bfloat16))
    assert captured.inputs.args[0].dtype == torch.bfloat16
    assert captured.mode == "fake"


def test_inputs_run_for_real_and_leave_the_generator_alone():
    model = Small()
    state = torch.get_rng_state()
    captured = capture(model)
    assert torch.equal(state, torch.get_rng_state())
    assert model(*captured.inputs.args).shape == (2, 10)
    assert torch.equal(captured.inputs.args[0], capture(model).inputs.args[0])


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor, word: str) -> Tensor:
        if word != "open":
            raise ValueError(f"not the word\nbut {type(word).__name__}")
        return self.linear(x)


def test_when_nothing_runs_the_error_lists_what_was_tried():
    with pytest.raises(CaptureError) as caught:
        capture(Stubborn())
    message = str(caught.value)
    assert "no example inputs for Stubborn" in message
    assert "forward(x: " in message
    assert "  layers: (float32[2, 3], float32[2, 3]), layers: (" in message
    assert " more: ValueError: not the word\n" in message, "what failed alike stands in one line"
    assert "but str" not in message, "one line for each candidate"
    assert message.endswith("with which model(*example_inputs, **example_kwargs) runs.")


def test_given_inputs_win_and_are_the_only_ones_tried():
    captured = capture(nn.Linear(3, 5), (torch.zeros(11, 3),))
    assert captured.inputs.finder == "given"
    assert tuple(captured.placeholders("input")[0].meta["val"].shape) == (11, 3)
    with pytest.raises(CaptureError, match="does not run on the inputs given"):
        capture(nn.Linear(3, 5), (torch.zeros(11, 4),))
    with pytest.raises(CaptureError, match="not the word"):
        capture(Stubborn(), (torch.zeros(2, 3), "sesame"))
    assert capture(Stubborn(), (torch.zeros(2, 3),), {"word": "open"}).mode == "fake"


def test_users_add_finders():
    calls = []

    @input_finder("sesame")
    def words(model: nn.Module) -> Iterator[Candidate]:
        calls.append(model)
        if isinstance(model, Stubborn):
            yield (torch.zeros(5, 3),), {"word": "sesame"}
            yield (torch.zeros(5, 3),), {"word": "open"}

    try:
        captured = capture(Stubborn())
        assert captured.inputs.finder == "sesame"
        assert captured.inputs.kwargs == {"word": "open"}
        assert captured.inputs.describe() == "(float32[5, 3], word='open')"
        assert shapes(nn.Linear(3, 5)) == [(2, 3)], "a finder without a candidate stands back"
        assert len(calls) == 2
    finally:
        del _finders["sesame"]


def test_a_successful_candidate_runs_once():
    runs: list[Any] = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            runs.append(tuple(x.shape))
            return self.linear(x)

    capture(Model())
    assert runs == [(2, 3)]


def test_no_candidate_comes_twice():
    described = [candidate.describe() for candidate in find_inputs(nn.Linear(7, 7))]
    assert len(described) == len(set(described))


def test_a_module_without_a_forward_is_refused_at_once():
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.image = nn.Linear(2, 3), nn.Linear(3, 4)

    with pytest.raises(CaptureError, match=r"Holder has no forward of its own: take one of its parts \(text, image\)"):
        capture(Holder())


def test_a_layer_whose_width_is_a_number_of_numpys() -> None:
    model = nn.Sequential(nn.Linear(np.prod([2, 3]), 16), nn.ReLU(), nn.Linear(16, 3))
    assert shapes(model) == [(2, 6)]


@pytest.mark.parametrize("name", ["inputs", "input_values", "pixel_values", "tokens"])
def test_a_name_that_says_something_else_here(name: str) -> None:
    """Where nothing that the argument's name stands for fits, the layers are asked as for any other name."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv1d(5, 8, 3), nn.Linear(8, 4)

        def run(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.first(x)).mean(2))

    scope: dict[str, Any] = {}
    exec(f"def forward(self, {name}):\n    return self.run({name})", scope)
    Model.forward = scope["forward"]
    assert [shape[:2] for shape in shapes(Model())] == [(2, 5)]
