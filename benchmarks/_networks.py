"""The pairs of networks on which matching is measured."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.zoo import operators
from permgraph.verification.double_precision import in_double_precision

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

State = dict[str, torch.Tensor]


def perceptron(width: int) -> nn.Sequential:
    sizes = [784, width, width, width, 10]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    """A block of a CIFAR ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.short = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.short(x))


def resnet20(width: int, colours: int = 3) -> nn.Sequential:
    channels = [16 * width, 32 * width, 64 * width]
    stem = nn.Conv2d(colours, channels[0], 3, 1, 1, bias=False)
    blocks: list[nn.Module] = [stem, nn.BatchNorm2d(channels[0]), nn.ReLU()]
    inputs = channels[0]
    for stage, outputs in enumerate(channels):
        for block in range(3):
            blocks.append(Residual(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def torchvision_model(name: str) -> nn.Module:
    operators.declare()
    import torchvision

    return torchvision.models.get_model(name)  # type: ignore[no-any-return]


def llama(words: int = 32000, width: int = 768, units: int = 3072, layers: int = 12, heads: int = 12) -> nn.Module:
    operators.declare()
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=units,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    return transformers.LlamaForCausalLM(config)


def on_digits(name: str, *sizes: int) -> nn.Module:
    import networks

    return getattr(networks, name)(*sizes)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Network:
    """A network to be drawn at random, or trained on scikit-learn's digits.

    Attributes:
        label: what tables call it.
        build: makes one with weights drawn from torch's generator.
        inputs: the shape of a batch of one; of token numbers if `tokens`.
        training: epochs, learning rate and weight decay; None for a network that stays as it was drawn.
    """

    label: str
    build: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    tokens: bool = False
    training: tuple[int, float, float] | None = None

    def example(self) -> torch.Tensor:
        """A batch of one that holds zeros."""
        return torch.zeros(self.inputs, dtype=torch.long if self.tokens else torch.float32)

    def state(self, seed: int) -> State:
        """The weights of one network."""
        if self.training is None:
            torch.manual_seed(seed)
            return dict(self.build().state_dict())
        import networks

        epochs, rate, decay = self.training
        trained = networks.train(self.build, _digits(), seed=seed, epochs=epochs, rate=rate, decay=decay)
        return dict(trained.state_dict())


@functools.cache
def _digits() -> Any:
    import networks

    return networks.digits()[0]


IMAGE = (1, 3, 224, 224)
NETWORKS: dict[str, Network] = {
    "mlp512": Network("MLP 784-512³-10", lambda: perceptron(512), (1, 784)),
    "mlp4096": Network("MLP 784-4096³-10", lambda: perceptron(4096), (1, 784)),
    "resnet20x1": Network("ResNet-20 × 1", lambda: resnet20(1), (1, 3, 32, 32)),
    "resnet20x4": Network("ResNet-20 × 4", lambda: resnet20(4), (1, 3, 32, 32)),
    "resnet20x16": Network("ResNet-20 × 16", lambda: resnet20(16), (1, 3, 32, 32)),
    "resnet18": Network("ResNet-18", lambda: torchvision_model("resnet18"), IMAGE),
    "resnet50": Network("ResNet-50", lambda: torchvision_model("resnet50"), IMAGE),
    "vgg16_bn": Network("VGG16-BN", lambda: torchvision_model("vgg16_bn"), IMAGE),
    "vit_b_16": Network("ViT-B/16", lambda: torchvision_model("vit_b_16"), IMAGE),
    "llama_7m": Network("Llama of 7M", lambda: llama(1000, 256, 1024, 6, 4), (1, 8), tokens=True),
    "llama_33m": Network("Llama of 33M", lambda: llama(8000, 512, 2048, 6, 8), (1, 8), tokens=True),
    "llama_160m": Network("Llama of 160M", llama, (1, 8), tokens=True),
    "digits_mlp16": Network(
        "MLP 64-16³-10, trained", lambda: on_digits("MLP", 16), (1, 1, 8, 8), training=(20, 1e-2, 0.2)
    ),
    "digits_mlp64": Network(
        "MLP 64-64³-10, trained", lambda: on_digits("MLP", 64), (1, 1, 8, 8), training=(20, 1e-2, 0.2)
    ),
    "digits_mlp128": Network(
        "MLP 64-128³-10, trained", lambda: on_digits("MLP", 128), (1, 1, 8, 8), training=(20, 1e-2, 0.2)
    ),
    "digits_mlp256": Network(
        "MLP 64-256³-10, trained", lambda: on_digits("MLP", 256), (1, 1, 8, 8), training=(20, 1e-2, 0.2)
    ),
    "digits_mlp512": Network(
        "MLP 64-512³-10, trained", lambda: on_digits("MLP", 512), (1, 1, 8, 8), training=(20, 1e-2, 0.2)
    ),
    "digits_resnet16": Network(
        "ResNet of width 16, trained", lambda: on_digits("ResNet", 16), (1, 1, 8, 8), training=(8, 1e-2, 0.5)
    ),
    "digits_resnet20": Network("ResNet-20 × 1, trained", lambda: resnet20(1, 1), (1, 1, 8, 8), training=(8, 1e-2, 0.5)),
    "digits_vit64": Network(
        "ViT of width 64, trained", lambda: on_digits("ViT", 64, 4, 1), (1, 1, 8, 8), training=(15, 5e-3, 0.5)
    ),
}


@torch.no_grad()
def function_error(network: Network, permute: Callable[[State], State], *, statistics: bool) -> float:
    """The largest change of an output when weights are permuted, over the largest output, in float64.

    The weights are drawn for this alone, all of them: a norm layer that is new scales all channels alike, so that no
    permutation could be seen in it. The statistics of BatchNorm are drawn only if `statistics`.
    """
    generator = torch.Generator().manual_seed(0)
    model = network.build().double().eval()
    weights = {name for name, _ in model.named_parameters()}
    drawn = {}
    for name, tensor in model.state_dict().items():
        drawn[name] = tensor
        if tensor.is_floating_point() and (name in weights or statistics):
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            # Means, scales and variances about one, in the order of magnitude that a trained network has them in.
            drawn[name] = noise / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 1.0 + 0.3 * noise.clamp(-3, 3)
    x = torch.randn(network.inputs, generator=generator, dtype=torch.float64)
    if network.tokens:
        x = torch.randint(0, 1000, network.inputs, generator=generator)
    outputs = []
    for state in (drawn, permute(drawn)):
        model.load_state_dict(state)
        with in_double_precision():  # where code asks for float32, as in Llama's norms
            y = model(x)
        outputs.append(y if isinstance(y, torch.Tensor) else y.logits)
    return float((outputs[1] - outputs[0]).abs().max() / outputs[0].abs().max())
