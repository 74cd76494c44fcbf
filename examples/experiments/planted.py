"""Whether a random element of the whole group is found again: small Llama, GPT-2, ViT, Mixtral and LSTM.

A copy of a network is given noise, 2 % of each parameter's deviation, and moved by a random element of its whole group,
in which no group is at rest. Weight matching should bring it back to where it was: the distance to the network is then
that of the noise, or a little less, for the noise itself moves the best element towards it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import arguments, console, finished, table
from models import GPT, Llama
from networks import ViT
from torch import Tensor, nn

import permgraph as pg

WITHIN = 1.05
"""How far from the network, relative to the noise, counts as found again."""

State = dict[str, Tensor]


class LSTM(nn.Module):
    """A language model of two LSTM layers."""

    def __init__(self, characters: int = 31, width: int = 24) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(characters, width), nn.Linear(width, characters)
        self.layers = nn.LSTM(width, width, num_layers=2, batch_first=True)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(text))[0])


def mixtral() -> nn.Module:
    """Transformers' own, with four experts in each of two layers."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def text() -> Tensor:
    return torch.arange(20).reshape(2, 10)


def pixels() -> Tensor:
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Llama": (lambda: Llama(31, width=32, key_heads=2), text),
    "GPT-2": (lambda: GPT(31, width=32), text),
    "ViT": (lambda: ViT(width=32), pixels),
    "Mixtral": (mixtral, text),
    "LSTM": (LSTM, text),
}


def network(name: str) -> tuple[nn.Module, pg.PermutationSpec]:
    """An untrained network, whose gains and biases are not all alike, in float64; and its symmetries."""
    build, inputs = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    x = inputs()
    x = x.double() if x.is_floating_point() else x
    return model, pg.auto_spec(model, (x,), symmetry="general")


def noisy(state: State, spec: pg.PermutationSpec, share: float, seed: int) -> State:
    """The weights with noise on all that can be moved."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: w + share * w.std(correction=0) * torch.randn(w.shape, generator=random, dtype=w.dtype)
        if name in spec.axes
        else w
        for name, w in state.items()
    }


def apart(a: State, b: State, spec: pg.PermutationSpec) -> float:
    """The distance of two networks, over all that can be moved."""
    return float(sum(((a[name] - b[name]) ** 2).sum() for name in spec.axes)) ** 0.5


Found = dict[str, list[tuple[float, float]]]
"""For each network and seed the distance relative to the noise, and the processor time."""


def main(argv: Sequence[str] | None = None) -> Found:
    parser = arguments(__doc__, models=(), seeds=range(20), points=None)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--noise", type=float, default=0.02, help="relative to each parameter's deviation (0.02)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    where, every = console(), Found()
    sheet = table("Planted elements found again", "", "dimension", "found", "furthest", "moved", "s each")
    for name in options.networks:
        model, spec = network(name)
        a: dict[str, Any] = {key: w.detach() for key, w in model.state_dict().items()}
        started_at = []
        for seed in options.seeds:
            near = noisy(a, spec, options.noise, seed)
            moved = spec.random(seed, every_group=True).apply(near)
            began = time.process_time()
            fit = finished(pg.align(a, moved, spec=spec))
            unit = apart(a, near, spec)
            every.setdefault(name, []).append((apart(a, fit.state_dict, spec) / unit, time.process_time() - began))
            started_at.append(apart(a, moved, spec) / unit)
        distances, seconds = zip(*every[name], strict=True)
        found = sum(distance <= WITHIN for distance in distances)
        sheet.add_row(
            name,
            str(spec.dimension()),
            f"{found} of {len(distances)}",
            f"{max(distances):.3f}",
            f"{min(started_at):.0f}",
            f"{sum(seconds) / len(seconds):.1f}",
        )
        where.print(name, *(f"{distance:.3f}" for distance in distances))
    sheet.show(where, options.out / "planted.md", options)
    return every


if __name__ == "__main__":
    main()
