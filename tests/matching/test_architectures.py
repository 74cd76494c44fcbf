"""Planted permutations of inferred specs: heads, channels inside heads, experts and groups of filters come back."""

from __future__ import annotations

import pytest
import torch

import permgraph
from permgraph.matching import WeightMatching

pytestmark = pytest.mark.slow

SMALL = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
}  # fmt: skip


def network(name):
    if name == "ResNeXt":
        torchvision = pytest.importorskip("torchvision")
        block = torchvision.models.resnet.Bottleneck
        return torchvision.models.ResNet(block, [1, 2, 1, 1], groups=8, width_per_group=4)
    transformers = pytest.importorskip("transformers")
    config = {
        "Llama": {"num_key_value_heads": 2},
        "GPTNeoX": {},
        "Mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    }[name]
    made = getattr(transformers, f"{name}Config")(**SMALL, **config)
    return getattr(transformers, f"{name}ForCausalLM")(made)


@pytest.mark.parametrize("name", ["Llama", "GPTNeoX", "Mixtral", "ResNeXt"])
def test_a_planted_permutation_comes_back_exactly(name):
    model = network(name)
    spec = permgraph.auto_spec(model)
    generator = torch.Generator().manual_seed(0)

    def noise(state, scale):
        made = {n: torch.randn(t.shape, generator=generator) * scale for n, t in state.items() if t.is_floating_point()}
        return {**made, **{n: made[c] for n, c in spec.aliases.items() if n in state}}

    a = {**model.state_dict(), **noise(model.state_dict(), 1.0)}
    secret = spec.random(1)
    b = {n: t + extra if (extra := added.get(n)) is not None else t for added in [noise(a, 0.3)]
         for n, t in secret.inverse().apply(a).items()}  # fmt: skip
    assert any(group.parents for group in spec.moving.values())
    assert WeightMatching().match(a, b, spec, 0).permutation == secret
