"""Tables that end: on tensors without data, too, no place is looked up that is not there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import permgraph as pg
from permgraph.errors import CaptureError

HOW = ("index", "embedding", "index_select", "two indices")


class Positions(nn.Module):
    """Token embeddings with a table of so many positions, read in one of several ways."""

    def __init__(self, how: str, most: int = 7) -> None:
        super().__init__()
        self.how = how
        self.embed, self.out = nn.Embedding(11, 4), nn.Linear(4, 3)
        self.table = nn.Parameter(torch.randn(most, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1])
        if self.how == "index":
            at = self.table[places]
        elif self.how == "embedding":
            at = F.embedding(places, self.table)
        elif self.how == "index_select":
            at = self.table.index_select(0, places)
        else:
            at = self.table[places[:, None], torch.arange(4)]
        return self.out((self.embed(tokens) + at).tanh())  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", HOW)
def test_no_pass_runs_past_the_end_of_a_table(how: str) -> None:
    model = Positions(how).eval()
    spec = pg.auto_spec(model)
    assert pg.verify(model, spec).passed
    with pytest.raises(CaptureError, match="out of bounds"):
        pg.auto_spec(model, (torch.zeros(2, 9, dtype=torch.long),))


def test_places_from_the_end_and_masks_are_there() -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).tanh()
            mask = torch.tensor([True, False, True, True, False, True])
            return self.b(h[:, torch.tensor([-6, -1, 5, 0])]) + h[:, mask].sum(1, keepdim=True)  # type: ignore[no-any-return]

    model, x = Ends().eval(), (torch.randn(4, 3),)
    assert pg.verify(model, pg.auto_spec(model, x), x).passed


def test_whisper_stops_where_its_positions_do() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=5, decoder_ffn_dim=5, vocab_size=37, max_source_positions=12, max_target_positions=6,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    proof = pg.verify(model, pg.auto_spec(model))
    assert proof.passed and not any("out of bounds" in (run.reason or "") for run in proof.runs)
