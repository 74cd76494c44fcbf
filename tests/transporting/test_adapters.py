"""A moved adapter does to a moved base what the adapter does to the base."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import permgraph as pg
from permgraph.errors import MismatchError

transformers = pytest.importorskip("transformers")

RANK = 3


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=23, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).double().eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=23, n_embd=16, n_layer=1, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel(config).double().eval()


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], bool]] = {
    "llama": (llama, ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"), False),
    "bert": (bert, ("query", "value", "dense"), False),
    "gpt2": (gpt2, ("c_attn", "c_proj", "c_fc"), True),
}


@functools.cache
def spec_of(
    build: Callable[[], nn.Module], symmetry: Literal["permutation", "general"] = "permutation"
) -> pg.PermutationSpec:
    return pg.auto_spec(build(), symmetry=symmetry)


def adapter_of(net: nn.Module, targets: tuple[str, ...], transposed: bool, seed: int = 0) -> dict[str, Tensor]:
    """A LoRA adapter by the names that PEFT saves."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in net.named_modules():
        weight = getattr(module, "weight", None)
        if name.rpartition(".")[2] in targets and weight is not None:
            outputs, inputs = reversed(weight.shape) if transposed else weight.shape
            for word, shape in (("lora_A", (RANK, inputs)), ("lora_B", (outputs, RANK))):
                drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
                found[f"base_model.model.{name}.{word}.weight"] = drawn / 4
    return found


def adapted(state: Mapping[str, Tensor], adapter: Mapping[str, Tensor], transposed: bool) -> dict[str, Tensor]:
    """The base with the adapter merged into it, as PEFT merges it with a scale of one."""
    new = dict(state)
    for key, b in adapter.items():
        if ".lora_B." in key:
            name = key.removeprefix("base_model.model.").replace(".lora_B.", ".")
            delta = b @ adapter[key.replace(".lora_B.", ".lora_A.")]
            new[name] = state[name] + (delta.T if transposed else delta)
    return new


def outputs(net: nn.Module, state: Mapping[str, Tensor]) -> Tensor:
    net = copy.deepcopy(net)
    net.load_state_dict(state)
    tokens = torch.arange(12).reshape(2, 6) % 23
    with torch.no_grad():
        return net(tokens).logits


@pytest.mark.parametrize("case", CASES)
def test_a_lora_adapter_computes_the_same_on_a_permuted_base(case: str) -> None:
    build, targets, transposed = CASES[case]
    net = build()
    adapter = adapter_of(net, targets, transposed)
    assert len(adapter) >= 6
    turn = spec_of(build).random(1, every_group=True)
    before = outputs(net, adapted(net.state_dict(), adapter, transposed))
    there = turn.apply(net.state_dict())
    moved = pg.transport(turn, adapter)
    assert list(moved) == list(adapter)
    torch.testing.assert_close(outputs(net, adapted(there, moved, transposed)), before, rtol=1e-6, atol=1e-6)
    assert (
        float((outputs(net, adapted(there, adapter, transposed)) - before).abs().max()) > 1e-3
    )  # else it shows nothing
    assert float((before - outputs(net, net.state_dict())).abs().max()) > 1e-3


def test_a_lora_adapter_under_rotations_scales_and_gains() -> None:
    net = llama()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 2)
    adapter = adapter_of(net, CASES["llama"][1], False)
    spec = spec_of(llama, "general")
    turn = spec.random(1)
    assert turn.matrices and turn.scales and turn.gains
    before = outputs(net, adapted(net.state_dict(), adapter, False))
    with pytest.raises(MismatchError, match="whose values are needed: give base="):
        pg.transport(turn, adapter)
    moved = pg.transport(turn, adapter, base=net)
    there = turn.apply(net.state_dict())
    torch.testing.assert_close(outputs(net, adapted(there, moved, False)), before, rtol=1e-7, atol=1e-7)


def test_of_an_alignment_over_general_symmetries_nothing_need_be_said() -> None:
    net, spec = llama(), spec_of(llama, "general")
    other = copy.deepcopy(net)
    other.load_state_dict(spec.random(4).apply(net.state_dict()))
    adapter = adapter_of(other, ("q_proj", "up_proj"), False)
    before = outputs(net, adapted(other.state_dict(), adapter, False))
    fit = pg.align(net, other, spec=spec)
    after = outputs(net, adapted(fit.state_dict, fit.transport(adapter), False))
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_magnitudes_tables_modules_that_are_saved_and_a_whole_adapted_model() -> None:
    net = bert()
    turn = spec_of(bert).random(1, every_group=True)
    query, table = "bert.encoder.layer.0.attention.self.query", "bert.embeddings.word_embeddings"
    whole = {f"base_model.model.{name}": tensor for name, tensor in net.state_dict().items()}
    weight = whole.pop(f"base_model.model.{query}.weight")
    given: dict[str, Tensor] = {
        **whole,
        f"base_model.model.{query}.base_layer.weight": weight,
        f"base_model.model.{query}.lora_magnitude_vector.default.weight": weight.norm(dim=1),
        f"base_model.model.{query}.lora_B.default.bias": torch.arange(16.0),
        f"base_model.model.{query}.ia3_l.default": torch.arange(16.0)[None],
        "base_model.model.classifier.modules_to_save.default.weight": net.classifier.weight,
        f"base_model.model.{table}.lora_embedding_A.default": torch.randn(RANK, 23),
        f"base_model.model.{table}.lora_embedding_B.default": torch.randn(16, RANK),
    }
    moved = pg.transport(turn, given)
    there = turn.apply(net.state_dict())
    name = f"base_model.model.{query}."
    assert torch.equal(moved[f"{name}base_layer.weight"], there[f"{query}.weight"])
    torch.testing.assert_close(
        moved[f"{name}lora_magnitude_vector.default.weight"], there[f"{query}.weight"].norm(dim=1)
    )
    assert torch.equal(moved[f"{name}lora_B.default.bias"], turn.apply_to(f"{query}.bias", torch.arange(16.0)))
    gated = turn.apply_to(f"{query}.weight", weight * torch.arange(16.0))  # a gate (1, n) is on the inputs
    torch.testing.assert_close(there[f"{query}.weight"] * moved[f"{name}ia3_l.default"], gated)
    assert torch.equal(moved["base_model.model.classifier.modules_to_save.default.weight"], there["classifier.weight"])
    table_name = f"base_model.model.{table}.lora_embedding_"
    delta = (given[f"{table_name}B.default"] @ given[f"{table_name}A.default"]).T
    new = (moved[f"{table_name}B.default"] @ moved[f"{table_name}A.default"]).T
    torch.testing.assert_close(new, turn.apply_to(f"{table}.weight", delta))


def test_a_square_layer_of_inputs_and_outputs_is_told_by_its_bias() -> None:
    net = gpt2()
    adapter = {key: tensor for key, tensor in adapter_of(net, ("c_proj",), True).items() if "attn" in key}
    assert all(set(tensor.shape) == {16, RANK} for tensor in adapter.values())
    turn = spec_of(gpt2).random(1, every_group=True)
    before = outputs(net, adapted(net.state_dict(), adapter, True))
    there = adapted(turn.apply(net.state_dict()), pg.transport(turn, adapter), True)
    torch.testing.assert_close(outputs(net, there), before)


def test_what_does_not_fit_is_refused() -> None:
    net = bert()
    turn = spec_of(bert).random(1)
    key = "base_model.model.bert.encoder.layer.0.attention.self.query"
    for given, said in (
        (
            {f"{key}.lora_A.weight": torch.ones(RANK, 7)},
            "'base_model.*lora_A.weight' has shape \\(3, 7\\), but 16 is due",
        ),
        ({"other.lora_A.weight": torch.ones(RANK, 7)}, "none of the checkpoint's 1 keys"),
        ({**adapter_of(net, ("query", "value"), False), "prompt": torch.ones(4, 16)}, "'prompt', of shape .* axes="),
        ({f"{key}.lora_magnitude_vector": torch.ones(16, 2)}, "but one vector is due"),
    ):
        with pytest.raises(MismatchError, match=said):
            pg.transport(turn, given)


def test_magnitudes_do_not_go_along_with_matrices() -> None:
    net = llama()
    turn = spec_of(llama, "general").random(1)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    with pytest.raises(MismatchError, match="goes along with permutations, but .* acts on 'model"):
        pg.transport(turn, {key: torch.ones(16)}, base=net)


def test_a_sparse_autoencoder_of_the_stream() -> None:
    """Its reconstruction of the moved stream is the moved reconstruction, over permutations and rotations."""
    symmetries: tuple[Literal["permutation", "general"], ...] = ("permutation", "general")
    for symmetry in symmetries:
        net = llama()
        spec = spec_of(llama, symmetry)
        turn: Any = spec.random(1)
        stream = spec.axes["model.embed_tokens.weight"][1]
        dictionary = {
            "W_enc": torch.randn(16, 40, dtype=torch.float64), "b_enc": torch.randn(40, dtype=torch.float64),
            "W_dec": torch.randn(40, 16, dtype=torch.float64), "b_dec": torch.randn(16, dtype=torch.float64),
        }  # fmt: skip
        axes = {"W_enc": (str(stream), None), "b_enc": None, "W_dec": f". {stream}", "b_dec": [str(stream)]}
        moved = pg.transport(turn, dictionary, axes=axes)
        table = ("model.embed_tokens.weight", 1)
        by_parameter = {"W_enc": (table, None), "b_enc": None, "W_dec": (None, table), "b_dec": (table,)}
        for name, tensor in pg.transport(turn, dictionary, axes=by_parameter).items():
            torch.testing.assert_close(tensor, moved[name])

        def through(x: Tensor, w: dict[str, Tensor]) -> Tensor:
            return ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu() @ w["W_dec"] + w["b_dec"]

        x = net.model.embed_tokens.weight.detach()
        there = turn.apply(net.state_dict())["model.embed_tokens.weight"]
        expected = pg.transport(turn, {"model.embed_tokens.weight": through(x, dictionary)})
        torch.testing.assert_close(through(there, moved), expected["model.embed_tokens.weight"])
        for wrong, said in (
            ({**axes, "b_dec": (str(stream), None)}, "'b_dec' has 1 dimensions"),
            ({n: a for n, a in axes.items() if n != "b_enc"}, "does not say what the dimensions of 'b_enc' are"),
            ({**axes, "W_end": None}, "names 'W_end', which is not there"),
            ({**axes, "b_enc": (str(stream),)}, "shape|sizes"),
            ({**axes, "b_dec": ("nowhere",)}, "nowhere"),
            ({**axes, "b_dec": (("model.embed_tokens.weight", 2),)}, "there is no dimension 2"),
        ):
            with pytest.raises(MismatchError, match=said):
                pg.transport(turn, dictionary, axes=wrong)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_that_peft_saves_load_on_the_moved_base(tmp_path: Path, dora: bool) -> None:
    peft = pytest.importorskip("peft")
    net = llama()
    base = copy.deepcopy(net)
    config = peft.LoraConfig(
        r=RANK, target_modules=["q_proj", "v_proj", "up_proj"], use_dora=dora, modules_to_save=["lm_head"]
    )
    model = peft.get_peft_model(net, config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    tokens = torch.arange(12).reshape(2, 6) % 23
    with torch.no_grad():
        before, without = model(tokens).logits, base(tokens).logits
    assert float((before - without).abs().max()) > 1e-2
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any("magnitude" in key for key in saved) == dora and any("lm_head" in key for key in saved)
    turn = spec_of(llama).random(1, every_group=True)
    base.load_state_dict(turn.apply(base.state_dict()))
    save_file(pg.transport(turn, saved), tmp_path / "adapter_model.safetensors", {"format": "pt"})
    again = peft.PeftModel.from_pretrained(base, tmp_path).double().eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, before, rtol=1e-5, atol=1e-5)
    # The adapted model's own state dict, with the base in it, moves as a whole.
    whole = pg.transport(turn, model.state_dict())
    model.load_state_dict(whole)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-5, atol=1e-5)
