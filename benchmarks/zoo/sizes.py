"""Models that no machine here can hold, and depth: seconds and memory of `auto_spec`, from configurations alone."""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.sweep import RESULTS

LLAMA_3_70B = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192,
}  # fmt: skip
QWEN3_235B_A22B = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94, "num_attention_heads": 64,
    "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 1536, "num_experts": 128,
    "num_experts_per_tok": 8, "vocab_size": 151936, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "rope_theta": 1000000.0, "max_position_embeddings": 40960, "mlp_only_layers": [],
}  # fmt: skip
DEEPSEEK_V3: dict[str, Any] = {}  # transformers' default configuration of this architecture is the model itself


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**LLAMA_3_70B))


def qwen() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN3_235B_A22B))


def deepseek() -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK_V3))


class Residual(nn.Module):
    """x + conv(relu(norm(conv(x)))) over one stream of channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.norm(self.conv1(x)).relu())


class Dense(nn.Module):
    """Each layer's input is the concatenation of its input and output, nested as deep as there are layers."""

    def __init__(self, layers: int, growth: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, growth, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(growth * (i + 1), growth, 3, padding=1) for i in range(layers))
        self.head = nn.Linear(growth * (layers + 1), 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], 1)
        return self.head(x.mean((2, 3)))


def resnet(layers: int) -> Callable[[], nn.Module]:
    """A residual network with this many convolutions."""

    def build() -> nn.Module:
        blocks = [Residual(32) for _ in range(layers // 2)]
        return nn.Sequential(nn.Conv2d(3, 32, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

    return build


def dense(layers: int) -> Callable[[], nn.Module]:
    """A densely connected network whose concatenations nest this deep."""
    return lambda: Dense(layers)


SIZES: dict[str, Callable[[], nn.Module]] = {
    "Llama-3-70B": llama,
    "Qwen3-235B-A22B": qwen,
    "DeepSeek-V3 (671B)": deepseek,
    **{f"ResNet, {n} layers": resnet(n) for n in (125, 250, 500, 1000)},
    **{f"DenseNet, nested {n} deep": dense(n) for n in (25, 50, 100, 200)},
}


def sweep() -> None:
    """Measure all of them, and record it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in SIZES:
        record = measure(name)
        with (RESULTS / "sizes.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(record, flush=True)


def measure(name: str) -> dict[str, Any]:
    """Seconds, operators, groups and peak memory of one of them, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(sender, name))
    worker.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        found = {"zoo": "sizes", "name": name, "status": "not inferred", "error": "the process ended"}
    worker.join()
    return found


def _work(sender: Connection, name: str) -> None:
    from benchmarks.zoo import operators
    from permgraph.capture import capture
    from permgraph.inference.auto_spec import spec_of

    operators.provide()
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = SIZES[name]()
    started = time.monotonic()
    captured = capture(model)
    middle = time.monotonic()
    spec = spec_of(captured)
    end = time.monotonic()
    sender.send({
        "zoo": "sizes", "name": name, "status": "inferred",
        "parameters": sum(p.numel() for p in model.parameters()),
        "nodes": len(captured.graph.nodes), "groups": len(spec.moving), "log_order": round(spec.log_order(), 1),
        "unknown": [op.operator for op in spec.unknown_ops],
        "capture_seconds": round(middle - started, 2), "infer_seconds": round(end - middle, 2),
        "seconds": round(end - started, 2),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    })  # fmt: skip
