"""What complaints say of arguments that are absent, of masks, of numbers in lists, and of parts put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from permgraph.capture import Captured, capture
from permgraph.capture.inputs.failing_source import names_at_fault
from permgraph.capture.inputs.guesses import Guess, beginnings, paired, values_of
from permgraph.capture.inputs.mends import mends
from permgraph.capture.inputs.trials import Failure


class Module(nn.Module):
    """A module that is written as a function of its parts and of named arguments."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.forward = run.__get__(self)


def given(captured: Captured) -> list[Any]:
    return [*captured.inputs.args, *captured.inputs.kwargs.values()]


# -- whose value was None ---------------------------------------------------------------------------------------------


class Styled(nn.Module):
    """Adds a style, of which it says nothing where there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(5, 6)

    def forward(self, hidden: Tensor, labels: Tensor | None) -> Tensor:
        return hidden + self.table(labels.float())


class Deep(nn.Module):
    """Hands optional arguments on, under other names, over several lines."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.styled = nn.Linear(4, 6), Styled()

    def forward(self, x: Tensor, mask: Tensor | None = None, style: Tensor | None = None) -> Tensor:
        hidden = self.first(x)
        return self.styled(
            hidden if mask is None else hidden * mask,
            labels=style,
        )


def failure_of(model: nn.Module, *args: Any) -> Exception:
    with pytest.raises(Exception) as caught:
        model(*args)
    return caught.value


def test_the_argument_that_was_none_is_found_through_calls() -> None:
    error = failure_of(Deep(), torch.randn(2, 4))
    missed, stated = names_at_fault(Deep(), error)
    assert missed == ["style", "mask"]  # the one that was handed on first
    assert {"hidden", "mask", "style"} <= set(stated)


def test_an_error_outside_of_forward_names_nothing() -> None:
    assert names_at_fault(Deep(), failure_of(nn.Linear(2, 3), torch.randn(5, 4))) == ([], [])


def test_what_was_none_is_given() -> None:
    captured = capture(Deep())
    assert captured.unused == ()
    assert captured.inputs.kwargs["style"].shape[-1] == 5
    assert "mask" not in captured.inputs.kwargs


class Optional(nn.Module):
    """Has no part for an argument that its signature lists."""

    part: nn.Module | None = None

    def forward(self, x: Tensor, step: Tensor | None = None) -> Tensor:
        return x if step is None else x + self.part(step)


def test_an_argument_in_the_way_is_left_out() -> None:
    model = Optional()
    guesses = {"x": Guess("real", (2, 3)), "step": Guess("real", (2, 3))}
    error = failure_of(model, *values_of(model, guesses).values())
    assert {"x": guesses["x"]} in [mended for _, mended in mends(model, guesses, Failure(error))]


# -- masks ------------------------------------------------------------------------------------------------------------


def test_masks_are_as_long_as_what_they_are_called_after() -> None:
    guesses = {
        "hidden_states": Guess("real", (2, 19, 8)), "text_states": Guess("real", (2, 7, 8)),
        "hidden_mask": Guess("mask", (2, 5)), "text_mask": Guess("mask", (2, 5)),
        "padding": Guess("mask", (2, 1, 8, 8)),
    }  # fmt: skip
    made = paired(guesses)
    assert made["hidden_mask"].shape == (2, 19) and made["text_mask"].shape == (2, 7)
    assert made["padding"] == guesses["padding"]


def attends(self, hidden_states, encoder_hidden_states, encoder_attention_mask):
    """A mask of another length is filled up, so that no complaint names the length that it has."""
    missing = encoder_hidden_states.shape[1] - encoder_attention_mask.shape[1]
    mask = nn.functional.pad(encoder_attention_mask, (0, encoder_hidden_states.shape[1])) if missing else None
    mask = encoder_attention_mask if mask is None else mask
    scores = self.query(hidden_states) @ self.key(encoder_hidden_states).transpose(1, 2)
    weights = scores.masked_fill(~mask[:, None], -1e9).softmax(-1)
    return weights @ self.value(encoder_hidden_states)


def test_masks_that_are_filled_up() -> None:
    model = Module(attends, query=nn.Linear(6, 12), key=nn.Linear(10, 12), value=nn.Linear(10, 5))
    captured = capture(model)
    hidden, text, mask = given(captured)
    assert hidden.shape[-1] == 6 and text.shape[-1] == 10 and mask.shape == text.shape[:2]


def padded(self, hidden_states, text_mask, text_states):
    """Where the mask is not set, what has been learnt stands: for so many words and no more."""
    text = torch.where(text_mask[..., None], self.text(text_states), self.learnt)
    return self.last(torch.cat([self.first(hidden_states), text], 1))


def test_masks_and_sequences_as_long_as_a_parameter() -> None:
    learnt = nn.Parameter(torch.randn(11, 8))
    parts = {"first": nn.Linear(6, 8), "text": nn.Linear(9, 8), "last": nn.Linear(8, 2)}
    captured = capture(Module(padded, learnt=learnt, **parts))
    assert captured.unused == ()
    _, mask, text = given(captured)
    assert mask.shape == text.shape[:2] == (2, 11)


# -- numbers ----------------------------------------------------------------------------------------------------------


class Grid(nn.Module):
    """Tokens of an image, and for each sample how many frames, rows and columns they make."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, hidden_states: Tensor, shapes: list[tuple[int, int, int]], scale: float) -> Tensor:
        assert all(isinstance(size, int) for shape in shapes for size in shape)
        hidden = self.first(hidden_states)
        frames, rows, columns = shapes[0]
        grid = hidden.view(hidden.shape[0], frames, rows, columns, -1)
        return self.last(torch.relu(grid * scale))


def test_numbers_in_lists() -> None:
    captured = capture(Grid())
    tokens, shapes, scale = given(captured)
    assert tokens.shape[1] == shapes[0][0] * shapes[0][1] * shapes[0][2]
    assert isinstance(scale, float) and captured.unused == ()


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (tuple[int, int, int], (2, 2, 2)),
        (list[int], [2, 2]),
        (list[list[tuple[int, int]]], [[(2, 2), (2, 2)], [(2, 2), (2, 2)]]),
        (tuple[int, int] | None, (2, 2)),
    ],
)
def test_what_an_annotation_says_of_numbers(annotation, expected) -> None:
    first = beginnings(nn.Linear(2, 3), "anything", 0, annotation)[0]
    assert values_of(nn.Linear(2, 3), {"anything": first})["anything"] == expected


def test_lists_of_tensors_are_no_lists_of_numbers() -> None:
    kinds = {guess.kind for guess in beginnings(nn.Linear(2, 3), "parts", 0, list[Tensor])}
    assert "numbers" not in kinds and "list" in kinds


# -- sizes that several arguments make together -----------------------------------------------------------------------


def sized(self, hidden, target_size, crop):
    waves = torch.cat(
        [(size.flatten()[:, None] * torch.arange(4)).view(size.shape[0], -1) for size in (target_size, crop)], 1
    )
    return self.last(self.first(hidden) + self.sizes(waves)[:, None])


def test_numbers_that_all_go_into_one_row() -> None:
    model = Module(sized, first=nn.Linear(6, 8), sizes=nn.Linear(16, 8), last=nn.Linear(8, 2))
    _, size, crop = given(capture(model))
    assert size.shape == crop.shape == (2, 2)


def joined(self, hidden_states, encoder_hidden_states, pooled):
    text = torch.cat([self.text(encoder_hidden_states), self.pool(pooled)[:, None]], 1)
    return self.last(torch.cat([text, self.first(hidden_states)], 1) + self.places)


def test_sequences_that_make_one_of_a_certain_length() -> None:
    parts = {"first": nn.Linear(6, 8), "text": nn.Linear(9, 8), "pool": nn.Linear(5, 8), "last": nn.Linear(8, 2)}
    captured = capture(Module(joined, places=nn.Parameter(torch.randn(1, 40, 8)), **parts))
    hidden, text, pooled = given(captured)
    assert hidden.shape[1] + text.shape[1] + 1 == 40 and pooled.shape == (2, 5)


def layered(self, x, layers: list):
    for at in range(3):
        x = x + self.text(layers[at])
    return self.last(x)


def test_lists_that_are_too_short() -> None:
    captured = capture(Module(layered, text=nn.Linear(5, 8), last=nn.Linear(8, 2)))
    assert len(given(captured)[1]) >= 3


class Told(nn.Module):
    """Says which shape it wants, with letters for what may be anything."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.places = nn.Linear(6, 8), nn.Linear(3, 8)

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        if position_ids.ndim != 3 or position_ids.shape[-1] != 3:
            raise ValueError(f"position_ids must have shape (B, L, 3), got {tuple(position_ids.shape)}.")
        return self.first(x) + self.places(position_ids.float())


def test_shapes_with_letters() -> None:
    x, places = given(capture(Told()))
    assert places.shape[-1] == 3 and x.shape[:2] == places.shape[:2]


def several_tokens_each(self, sample, pooled):
    """A vector for each of several tokens, of which each becomes two."""
    words = self.map(pooled).view(pooled.shape[0], pooled.shape[1] * 2, -1)
    return self.last(torch.relu(self.first(sample) + words.mean(1)[..., None, None]))


def test_vectors_that_are_sequences() -> None:
    parts = {"first": nn.Conv2d(3, 8, 1), "map": nn.Linear(5, 16), "last": nn.Conv2d(8, 2, 1)}
    _, pooled = given(capture(Module(several_tokens_each, **parts)))
    assert len(pooled.shape) == 3 and pooled.shape[-1] == 5


def filled_up(self, hidden_states, text_states, text_mask, more_states, more_mask):
    """Two texts in a row with their masks; where those are not set, what has been learnt for so many places stands."""
    texts = torch.cat([self.text(text_states), self.more(more_states)], 1)
    both = torch.where(torch.cat([text_mask, more_mask], 1)[..., None], texts, self.learnt)
    return self.last(torch.cat([self.first(hidden_states), both], 1))


def test_sequences_and_their_masks_change_together() -> None:
    parts = {"first": nn.Linear(6, 8), "text": nn.Linear(5, 8), "more": nn.Linear(7, 8), "last": nn.Linear(8, 2)}
    captured = capture(Module(filled_up, learnt=nn.Parameter(torch.randn(90, 8)), **parts))
    _, text, text_mask, more, more_mask = given(captured)
    assert text.shape[1] + more.shape[1] == text_mask.shape[1] + more_mask.shape[1] == 90
