"""By-products: what a model returns beside its result moves, the spec says how, and verify compares it so."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.errors import SpecError

GENERATOR = torch.Generator().manual_seed(0)
TOKENS = (torch.randint(0, 11, (2, 3), generator=GENERATOR), torch.randint(0, 11, (2, 4), generator=GENERATOR))


class Out(NamedTuple):
    logits: Tensor
    states: Any = None
    more: Any = None


class StatesFirst(NamedTuple):
    states: Tensor
    logits: Tensor


class WithLoss(NamedTuple):
    loss: Tensor
    logits: Tensor
    states: Tensor


@dataclasses.dataclass
class Record:
    logits: Tensor
    states: Tensor


Give = Callable[["EncoderDecoder", Tensor, Tensor], Any]


class EncoderDecoder(nn.Module):
    """A stream of 7 units that both stacks share by their table, 5 units in the encoder, 6 in the decoder."""

    def __init__(self, give: Give) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 7)
        self.up, self.down = nn.Linear(7, 5), nn.Linear(5, 7)
        self.cross = nn.Linear(7, 7)
        self.wide, self.narrow = nn.Linear(7, 6), nn.Linear(6, 7)
        self.head = nn.Linear(7, 11)
        self.give = give

    def forward(self, text: Tensor, answer: Tensor) -> Any:
        states = self.table(text)
        states = states + self.down(torch.relu(self.up(states)))
        stream = self.table(answer) + self.cross(states.mean(1, keepdim=True))
        stream = stream + self.narrow(torch.relu(self.wide(stream)))
        return self.give(self, self.head(stream), states)


def sizes(spec: pg.PermutationSpec) -> list[int]:
    return sorted(group.size for group in spec.moving.values())


def named(m: EncoderDecoder, logits: Tensor, states: Tensor) -> Any:
    return Out(logits, states)


FREE, HELD = [5, 6, 7], [5, 6]  # with the stream, and without it
CASES: list[tuple[str, Give, Any, list[int]]] = [
    ("a named tuple", named, None, FREE),
    ("a named tuple, final", named, "final", FREE),
    ("a named tuple, all", named, "all", HELD),
    ("a name", named, "logits", FREE),
    ("names", named, ["logits", "states"], HELD),
    ("the states alone: the classes move", named, "states", [5, 6, 11]),
    ("a function", named, lambda out: out.logits, FREE),
    ("a function of both", named, lambda out: [out.states, {"logits": out.logits}], HELD),
    ("a dataclass", lambda m, y, h: Record(y, h), None, FREE),
    ("a tuple", lambda m, y, h: (y, h), None, HELD),
    ("a tuple, final", lambda m, y, h: (y, h), "final", FREE),
    ("a tuple, by index", lambda m, y, h: (y, h), "0", FREE),
    ("a dictionary", lambda m, y, h: {"logits": y, "states": h}, None, HELD),
    ("a dictionary, by name", lambda m, y, h: {"logits": y, "states": h}, "logits", FREE),
    ("a list", lambda m, y, h: [y, h], None, HELD),
    ("the first field counts", lambda m, y, h: StatesFirst(h, y), None, HELD),
    ("but if asked for", lambda m, y, h: StatesFirst(h, y), "final", FREE),
    ("a loss before it", lambda m, y, h: WithLoss(y.logsumexp(-1).mean(), y, h), None, FREE),
    ("a loss is no reader", lambda m, y, h: WithLoss(y.logsumexp(-1).mean(), y, h), "final", FREE),
    # The mean takes no notice of the order of the 11 rows.
    ("a loss by parameters is none", lambda m, y, h: StatesFirst(h, m.head(h).mean()), "final", [5, 11]),
    ("a loss of each text", lambda m, y, h: Out(y, h, y.logsumexp(-1)), "final", FREE),
    ("the last state", lambda m, y, h: Out(y, h[:, -1]), None, FREE),
    ("a cache", lambda m, y, h: Out(y, torch.cat([torch.zeros_like(h), h], 1).clone()), None, FREE),
    ("what is computed from the states", lambda m, y, h: Out(y, 2 * h), None, HELD),
    ("the states and what is computed", lambda m, y, h: Out(y, h, 2 * h), None, HELD),
    ("the same twice", lambda m, y, h: Out(y, h, h), None, FREE),
    ("the result twice", lambda m, y, h: Out(y, y.view_as(y), y), None, FREE),
    ("nested", lambda m, y, h: Out(y, Record(h, 1 * h), {"last": [h[:, -1]]}), "final", HELD),
    ("nested, by path", lambda m, y, h: Out(y, Record(h, 1 * h)), ["logits", "states.states"], HELD),
    ("nested, without", lambda m, y, h: Out(y, Record(h, 1 * h)), "logits", FREE),
    ("which state is the largest", lambda m, y, h: Out(y, h.argmax(-1)), None, HELD),
]


@pytest.mark.parametrize(("give", "outputs", "moving"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_counts(give: Give, outputs: Any, moving: list[int]) -> None:
    model = EncoderDecoder(give).eval()
    spec = pg.auto_spec(model, TOKENS, outputs=outputs)
    assert sizes(spec) == moving
    assert spec.log_order() == pytest.approx(sum(math.lgamma(size + 1) for size in moving))
    assert pg.verify(model, spec, TOKENS, further=0).passed


def test_the_spec_says_how_each_output_moves() -> None:
    spec = pg.auto_spec(EncoderDecoder(named).eval(), TOKENS)
    assert {name: " ".join(map(str, axes)) for name, axes in spec.outputs.items()} == {
        "logits": "2 4 11",
        "states": "2 3 table",
    }
    assert spec.by_products == ("states",)
    assert list(spec.moving_outputs) == ["states"]
    assert "\nby-products: states . . table\n" in str(spec)
    assert "by-products: states 2 3 table<" in pg.report(spec).html
    assert "by-products" not in str(pg.auto_spec(EncoderDecoder(named).eval(), TOKENS, outputs="all"))
    assert pg.PermutationSpec.parse(str(spec)).axes == spec.axes
    assert str(spec.rename({"table": "stream"}).outputs["states"][2]) == "stream"
    assert not spec.without(["table"]).moving_outputs


def test_outputs_are_saved_and_older_files_have_none(tmp_path: Path) -> None:
    spec = pg.auto_spec(EncoderDecoder(named).eval(), TOKENS)
    path = tmp_path / "spec.json"
    spec.save(path)
    again = pg.PermutationSpec.load(path)
    assert again == spec and again.outputs == spec.outputs and again.by_products == spec.by_products
    content = json.loads(path.read_text())
    del content["outputs"], content["by_products"]
    path.write_text(json.dumps(content))
    older = pg.PermutationSpec.load(path)
    assert older.outputs == {} and older.by_products == () and older.fingerprint == spec.fingerprint
    path.write_text(json.dumps({**content, "outputs": {"logits": "2 4"}}))
    with pytest.raises(SpecError, match="outputs.logits: should be a list of texts"):
        pg.PermutationSpec.load(path)


def test_verify_moves_by_products_back_and_fails_on_other_axes() -> None:
    """Also on larger sizes; a spec that says the states stay, or move by another group's permutation, fails."""
    model = EncoderDecoder(named).eval()
    spec = pg.auto_spec(model, TOKENS)
    proof = pg.verify(model, spec, TOKENS)
    assert proof.passed and proof.note == "" and proof.outputs == 2
    assert sum(run.error is not None for run in proof.runs) > 1
    stays = dataclasses.replace(spec, by_products=())
    assert not pg.verify(model, stays, TOKENS).passed
    still = dataclasses.replace(spec, outputs={"states": tuple(map(pg.spec.expressions.Fixed, (2, 3, 7)))})
    assert not pg.verify(model, still, TOKENS).passed
    unknown = pg.verify(model, dataclasses.replace(spec, outputs={}), TOKENS)
    assert unknown.passed and unknown.outputs == 1
    assert unknown.note == "by-products that move in a way not known were not compared: states"


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ("logit", "outputs= names 'logit', which the model does not return; it returns logits, states"),
        (["logits", "1"], "outputs= names '1', which the model does not return; it returns logits, states"),
        ("stat", "names 'stat'"),
        (lambda out: out.scores, "the function outputs= failed on what forward returned, a Out: AttributeError"),
        (lambda out: 2 * out.logits, "gave a tensor that forward did not return"),
        (lambda out: None, "gave no tensor"),
        (3, "outputs is 3; it may be 'final', 'all', names of outputs, or a function"),
        ([], "outputs is \\[\\]; it may be"),
    ],
)
def test_what_is_no_output(outputs: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        pg.auto_spec(EncoderDecoder(named).eval(), TOKENS, outputs=outputs)


def test_a_lone_tensor_and_states_alone() -> None:
    lone = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    for outputs in (None, "final", "output"):
        spec = pg.auto_spec(lone, (torch.randn(4, 3),), outputs=outputs)
        assert sizes(spec) == [5] and list(spec.outputs) == ["output"]

    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(6, 7)

        def forward(self, x: Tensor) -> Any:
            a = torch.relu(self.a(x))
            b = torch.relu(self.b(a))
            return Out(a, b, self.c(b))

    model, x = States().eval(), (torch.randn(4, 3),)
    found = {outputs: sizes(pg.auto_spec(model, x, outputs=outputs)) for outputs in (None, "final", "all")}
    assert found == {None: [6], "final": [5, 6], "all": []}, "the last is the result, and the first by default"


@dataclasses.dataclass
class Part:
    """What a part of a model gave: its states, and one of them pooled."""

    states: Tensor
    pooled: Tensor | None = None


@dataclasses.dataclass
class Whole:
    """Logits, and what lies on the way to them."""

    logits: Tensor
    states: Tensor | None = None
    part: Part | None = None


class Parts(nn.Module):
    """An encoder whose states are normalised for the head, and again for whoever looks at them."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.stem, self.norm, self.other = nn.Linear(3, 5), nn.LayerNorm(5), nn.LayerNorm(5)
        self.head, self.more = nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.stem(x))
        states = self.norm(h)
        logits = self.head(states)
        if self.what == "again":
            return Whole(logits, self.norm(h))
        if self.what == "written between":
            first = h.clone()
            h.mul_(2)
            return Whole(self.head(self.norm(first)), self.norm(h))
        if self.what == "another norm":
            return Whole(logits, self.other(h))
        pooled = self.norm(states[:, 0]) if self.what == "pooled" else self.more(states[:, 0])
        return Whole(logits, part=Part(states, pooled))


@pytest.mark.parametrize(
    ("what", "moving"),
    [("again", [5]), ("written between", []), ("another norm", []), ("pooled", [5]), ("another head", [5])],
)
def test_by_products_that_are_computed_once_more(what: str, moving: list[int]) -> None:
    """The same norm of the same states is no result; another one is, and so is what another head makes of a part's."""
    model, x = Parts(what).eval(), (torch.randn(4, 6, 3),)
    spec = pg.auto_spec(model, x)
    assert sizes(spec) == moving
    assert ("part.pooled" in spec.by_products) == (what == "pooled")
    assert pg.verify(model, spec, x).passed


def test_an_output_of_one_pass_counts_in_all() -> None:
    """In training the states are returned after another layer has left them alone: there they are a result."""

    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)
            self.c = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            h = torch.relu(self.a(x))
            return Out(self.c(x) + 0 * self.b(torch.zeros_like(h)) if self.training else self.b(h), h)

    x = (torch.randn(4, 3),)
    assert sizes(pg.auto_spec(Modes().eval(), x)) == []
    assert sizes(pg.auto_spec(Modes().eval(), x, vary=False)) == [5]


def test_a_value_that_python_reads_and_an_exported_program() -> None:
    class Reads(EncoderDecoder):
        def forward(self, text: Tensor, answer: Tensor) -> Any:
            return super().forward(text, answer if answer.sum().item() > 0 else text)

    spec = pg.auto_spec(Reads(named).eval(), TOKENS)
    assert sizes(spec) == FREE and any("real tensors" in note for note in spec.notes)
    exported = torch.export.export(EncoderDecoder(lambda m, y, h: (y, h)).eval(), TOKENS)
    assert sizes(pg.auto_spec(exported)) == HELD
    assert sizes(pg.auto_spec(exported, outputs="0")) == FREE


@pytest.mark.parametrize(("outputs", "moving"), [(None, []), ("logits", [5]), (lambda out: out.logits, [])])
def test_what_a_flag_adds(outputs: Any, moving: list[int]) -> None:
    """A head of its own, which no flag shows on the way, is a result unless others alone are named.

    A function that is not made for what the flag returns does not say.
    """

    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor, return_more: bool = False) -> Any:
            h = torch.relu(self.a(x))
            return {"logits": self.b(h), "norm": 2 * h} if return_more else Out(self.b(h))

    model, x = Flagged().eval(), (torch.randn(4, 3),)
    spec = pg.auto_spec(model, x, outputs=outputs)
    assert sizes(spec) == moving
    assert pg.verify(model, spec, x, further=0.1).passed


def test_alignment_with_a_spec_that_counts_otherwise() -> None:
    """The module beside a state dict is held against the spec as it was asked for, also where a file does not say."""
    a, b = EncoderDecoder(named).eval(), EncoderDecoder(named).eval()
    for outputs in (None, "all", "logits"):
        spec = pg.auto_spec(b, TOKENS, outputs=outputs)
        given: Any = dict(example_inputs=TOKENS)
        for one in (spec, dataclasses.replace(spec, outputs={}, by_products=())):
            fit = pg.align(a.state_dict(), b, spec=one, **given)
            assert fit.permutation.spec.fingerprint == spec.fingerprint
            proof = pg.verify(b, permutation=fit.permutation, example_inputs=TOKENS, further=0)
            assert proof.passed == (bool(one.outputs) or outputs == "all"), "else nothing says that states may move"


def test_general_structures_leave_out_what_they_mix() -> None:
    """Between linear layers any invertible matrix acts, on the states too, which verify then leaves out."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Any:
            h = self.a(x)
            return Out(self.b(h), h)

    model, x = Linear().eval(), (torch.randn(4, 3),)
    spec = pg.auto_spec(model, x, symmetry="general")
    assert spec.dimension() == 25 and " ".join(map(str, spec.outputs["states"])) == "4 a"
    assert pg.auto_spec(model, x, symmetry="general", outputs="all").dimension() == 0
    proof = pg.verify(model, spec, x)
    assert proof.passed and proof.note.endswith("were not compared: states")
    assert pg.verify(model, spec.permutations(), x).note == ""


def transformer(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = dict(vocab_size=40, d_model=8)
    layers: dict[str, Any] = dict(
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=11, decoder_ffn_dim=13, max_position_embeddings=20,
    )  # fmt: skip
    tower: dict[str, Any] = dict(num_hidden_layers=1, intermediate_size=11, projection_dim=6)
    text = dict(vocab_size=40, hidden_size=8, num_attention_heads=2, max_position_embeddings=12, **tower)
    vision = dict(hidden_size=12, num_attention_heads=3, image_size=8, patch_size=4, **tower)
    config: Any = {
        "T5": lambda: transformers.T5Config(
            d_kv=3, d_ff=11, num_layers=1, num_heads=2, decoder_start_token_id=0, **small
        ),
        "Bart": lambda: transformers.BartConfig(**small, **layers),
        "CLIP": lambda: transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6),
        "Bert": lambda: transformers.BertConfig(
            vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=11
        ),
    }[name]()
    kind = {"CLIP": "CLIPModel", "Bert": "BertModel"}.get(name, f"{name}ForConditionalGeneration")
    model: nn.Module = getattr(transformers, kind)(config)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "result", "by_products"),
    [
        ("T5", ["logits"], {"encoder_last_hidden_state"}),
        ("Bart", ["logits"], {"encoder_last_hidden_state"}),
        (
            "CLIP",
            ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"],
            {"text_model_output.last_hidden_state", "vision_model_output.last_hidden_state"},
        ),
        ("Bert", ["last_hidden_state", "pooler_output"], set()),
    ],
)
def test_transformers(name: str, result: list[str], by_products: set[str]) -> None:
    model = transformer(name)
    spec = pg.auto_spec(model)
    assert by_products <= set(spec.by_products) and by_products == set(spec.moving_outputs)
    asked = pg.auto_spec(model, outputs=result)
    assert asked.axes == spec.axes and asked.log_order() == spec.log_order()
    everything = pg.auto_spec(model, outputs="all").log_order()
    assert (everything < spec.log_order() - 1) == bool(by_products)
    assert pg.verify(model, spec, further=0).passed


def test_the_stream_of_t5_is_all_that_its_encoder_states_pin() -> None:
    model = transformer("T5")
    gained = pg.auto_spec(model).log_order() - pg.auto_spec(model, outputs="all").log_order()
    assert gained == pytest.approx(math.lgamma(8 + 1))


def test_clip_lets_its_projection_move_where_the_embeddings_do_not_count() -> None:
    """The embeddings are results by default; the logits alone leave their 6 units free, and nothing else."""
    model = transformer("CLIP")
    spec = pg.auto_spec(model, outputs=["logits_per_image", "logits_per_text"])
    assert {"text_embeds", "image_embeds"} <= set(spec.moving_outputs)
    assert spec.log_order() - pg.auto_spec(model).log_order() == pytest.approx(math.lgamma(6 + 1))
