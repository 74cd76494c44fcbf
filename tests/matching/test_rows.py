"""Networks of other vocabularies and other classes are matched by the rows that mean the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.errors import MismatchError
from permgraph.matching.rows import rows_by_name


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Model(nn.Module):
    def __init__(self, tokens: int, classes: int = 4, tied: bool = False) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(tokens, 6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.words, self.head = nn.Linear(6, tokens, bias=False), nn.Linear(6, classes)
        if tied:
            self.words.weight = self.table.weight

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(tokens)
        x = x + self.down(self.up(x).relu())
        return self.words(x), self.head(x.mean(1))


TOKENS = torch.tensor([[0, 3, 1, 2]])
WORDS_A = ["the", "cat", "sat", "on", "mat", "<pad>", "<bos>", "dog", "ran"]
WORDS_B = ["<pad>", "the", "dog", "ran", "on", "mat", "cat", "sat", "hat", "<new>", "<bos>"]


def spec_of(model: Model) -> pg.PermutationSpec:
    return pg.auto_spec(model, (TOKENS,))


def with_rows(a: Model, b: Model) -> None:
    """Give B the weights of A, each row where B has that word; its own for those that A has not."""
    state = b.state_dict()
    for name, tensor in a.state_dict().items():
        if name in ("table.weight", "words.weight"):
            for row, word in enumerate(WORDS_B):
                if word in WORDS_A:
                    state[name][row] = tensor[WORDS_A.index(word)]
        else:
            state[name] = tensor
    b.load_state_dict(state)


def renumbered(b: Model, seed: int = 1) -> Model:
    other = copy.deepcopy(b)
    other.load_state_dict(spec_of(b).random(seed, every_group=True).apply(b.state_dict()))
    return other


@pytest.mark.parametrize("tied", [False, True])
def test_other_vocabularies_are_matched_by_their_tokens(tied: bool) -> None:
    a, b = Model(9, tied=tied), Model(11, tied=tied)
    with_rows(a, b)
    given = renumbered(b)
    words = (rows_by_name(WORDS_A), rows_by_name(WORDS_B))
    fit = pg.align(a, given, rows=words, example_inputs=(TOKENS,))
    for name, tensor in b.state_dict().items():  # also the rows that A has not, which went along
        assert torch.equal(fit.state_dict[name], tensor)
    assert any("of 9 rows in A and 11 in B, 9 are in common, by their names" in note for note in fit.notes)
    assert fit.permutation.spec.shapes["table.weight"] == (11, 6)
    assert torch.equal(fit.model()(TOKENS)[0], b(TOKENS)[0])
    # By place the words are others, and say nothing.
    by_place = pg.align(a, given, rows="common", example_inputs=(TOKENS,))
    assert "9 are in common, the first of both" in by_place.notes[0]
    torch.testing.assert_close(by_place.model()(TOKENS)[0], given(TOKENS)[0])


def test_equal_numbers_of_rows_in_another_order() -> None:
    a, b = Model(9), Model(9)
    order = torch.randperm(9)
    state = {**a.state_dict(), **{n: a.state_dict()[n][order] for n in ("table.weight", "words.weight")}}
    b.load_state_dict(state)
    words = (WORDS_A, [WORDS_A[row] for row in order])
    a.get_input_embeddings = lambda: a.table  # type: ignore[assignment]
    a.get_output_embeddings = lambda: a.words  # type: ignore[assignment]
    fit = pg.align(a, renumbered(b), rows=words, spec=spec_of(Model(9)))
    assert all(torch.equal(fit.state_dict[name], tensor) for name, tensor in state.items())


def test_added_tokens_without_names() -> None:
    a, b = Model(9), Model(11)
    state = {
        n: torch.cat([t, torch.randn(2, 6)]) if n in ("table.weight", "words.weight") else t
        for n, t in a.state_dict().items()
    }
    b.load_state_dict(state)
    for spec in (spec_of(a), pg.auto_spec(a, (TOKENS,), symmetry="general")):
        fit = pg.align(a.state_dict(), renumbered(b).state_dict(), spec=spec, rows="common")
        for name, tensor in state.items():
            torch.testing.assert_close(fit.state_dict[name], tensor, rtol=1e-4, atol=1e-5)


def test_other_classes_beside_other_tokens() -> None:
    a, b = Model(9), Model(11, classes=3)
    with pytest.raises(MismatchError, match=r"'table\.weight' has shape \(9, 6\) in A but \(11, 6\) in B.*rows= says"):
        pg.align(a, b, example_inputs=(TOKENS,))
    labels = ({0: "cat", 1: "dog", 2: "fish", 3: "cow"}, {0: "cow", 1: "cat", 2: "hen"})
    with pytest.raises(MismatchError, match="'head.weight' has shape .* nothing says which rows mean the same"):
        pg.align(a, b, rows=(WORDS_A, WORDS_B), example_inputs=(TOKENS,))
    fit = pg.align(a, b, rows=[(WORDS_A, WORDS_B), labels], example_inputs=(TOKENS,))
    assert len(fit.notes) == 2 and "of 4 rows in A and 3 in B, 2 are in common" in fit.notes[1]
    torch.testing.assert_close(fit.model()(TOKENS), b(TOKENS))


def test_a_merge_has_the_first_ones_rows() -> None:
    a, b = Model(9), Model(11)
    with_rows(a, b)
    given = renumbered(b)
    merged = pg.merge([a, given], rows=(WORDS_A, WORDS_B), example_inputs=(TOKENS,))
    net = Model(9)
    net.load_state_dict(merged.state_dict)
    for mine, its in zip(net(TOKENS), a(TOKENS), strict=True):
        torch.testing.assert_close(mine, its)
    assert any("the result has the rows of model 0" in note for note in merged.notes)
    # The other way round B's own rows are B's, whatever the weights.
    merged = pg.merge([b, a], pg.ToReference(), rows=(WORDS_B, WORDS_A), weights=[1, 3], example_inputs=(TOKENS,))
    for name, tensor in b.state_dict().items():
        torch.testing.assert_close(merged.state_dict[name], tensor)


def test_each_row_is_the_mean_of_those_that_have_it() -> None:
    spec = pg.PermutationSpec.parse("w 3x2 . h | v 1x2 . h | groups: h 2".replace(" | ", "\n"))
    a = {"w": torch.tensor([[1.0, 8.0], [2.0, 9.0], [3.0, 7.0]]), "v": torch.tensor([[0.0, 1.0]])}
    b = {"w": torch.tensor([[5.0, 9.0], [4.0, 8.0]]), "v": torch.tensor([[0.0, 1.0]])}
    merged = pg.merge([a, b], pg.ToReference(), spec=spec, weights=[1, 3], rows=(["x", "y", "z"], ["z", "x"]))
    expected = [[1 / 4 + 4 * 3 / 4, 8.0], [2.0, 9.0], [3 / 4 + 5 * 3 / 4, 7 / 4 + 9 * 3 / 4]]
    torch.testing.assert_close(merged.state_dict["w"], torch.tensor(expected))


def test_what_is_refused() -> None:
    a, b = Model(9), Model(11)
    wide = copy.deepcopy(b)
    wide.up, wide.down = nn.Linear(6, 13), nn.Linear(13, 6)
    for other, rows, said in (
        (b, (WORDS_A,), "the names of 1 networks, and there are 2"),
        (b, "first", 'rows is "common", or the names'),
        (b, (WORDS_A, [f"{word}!" for word in WORDS_B]), "no row of A has the name of one"),
        (wide, "common", r"'up\.weight' has shape \(12, 6\) in A but \(13, 6\) in B|not the same symmetries"),
    ):
        with pytest.raises(MismatchError, match=said):
            pg.align(a, other, rows=rows, example_inputs=(TOKENS,))  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="ActivationMatching runs the networks, whose rows differ"):
        pg.align(a, b, pg.ActivationMatching([TOKENS]), rows="common", example_inputs=(TOKENS,))


def test_modules_of_transformers_with_other_classes_need_no_names() -> None:
    transformers = pytest.importorskip("transformers")
    size = {
        "vocab_size": 23,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 12,
    }
    labels = ({0: "bad", 1: "good"}, {0: "none", 1: "good", 2: "bad"})
    a, b = (
        transformers.BertForSequenceClassification(transformers.BertConfig(**size, id2label=each)).eval()
        for each in labels
    )
    head = b.classifier.weight.detach().clone()
    head[[2, 1]] = a.classifier.weight.detach()
    state = {**a.state_dict(), "classifier.weight": head, "classifier.bias": torch.zeros(3)}
    spec = pg.auto_spec(a)
    b.load_state_dict(state)
    given = copy.deepcopy(b)
    turn = pg.auto_spec(b).random(1, every_group=True)
    given.load_state_dict(turn.apply(b.state_dict()))
    fit = pg.align(a, given, spec=spec)
    assert all(torch.equal(fit.state_dict[name], tensor) for name, tensor in b.state_dict().items())
    assert "of 2 rows in A and 3 in B, 2 are in common, by their classes" in fit.notes[0]


def test_tied_and_untied_modules_are_aligned_and_noted() -> None:
    tied, untied = Model(9, tied=True), Model(9)
    untied.load_state_dict(tied.state_dict())
    for a, b in ((tied, untied), (untied, tied)):
        fit = pg.align(a, renumbered(b), example_inputs=(TOKENS,))
        assert all(torch.equal(fit.state_dict[name], tensor) for name, tensor in b.state_dict().items())
        assert any("ties 'words.weight'" in note or "B 'words.weight' to" in note for note in fit.notes)
        assert torch.equal(fit.model()(TOKENS)[0], b(TOKENS)[0])
