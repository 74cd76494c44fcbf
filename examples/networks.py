"""The small networks that the demo trains, and the digits that it trains them on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, relu, scaled_dot_product_attention

Batch = tuple[Tensor, Tensor]


class MLP(nn.Module):
    """Three hidden layers."""

    def __init__(self, width: int = 512, depth: int = 3) -> None:
        super().__init__()
        sizes = [64, *[width] * depth]
        self.hidden = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(sizes))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        for layer in self.hidden:
            x = relu(layer(x))
        return self.head(x)


class Block(nn.Module):
    """Two convolutions and a shortcut, with BatchNorm after each convolution (He et al. 2016)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            conv = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Two stages of one block each, for images of 8 by 8."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.stage1 = nn.Sequential(Block(width, width, 2))
        self.stage2 = nn.Sequential(Block(width, 2 * width, 2))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = relu(self.bn(self.conv(images)))
        x = self.stage2(self.stage1(x))
        return self.head(x.mean((2, 3)))


class Encoder(nn.Module):
    """Self-attention, of the places before each alone if it is causal, and a feed-forward layer; norms beforehand."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.down(gelu(self.up(self.norm2(x))))

    def attend(self, x: Tensor) -> Tensor:
        """What each place takes from the others."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class ViT(nn.Module):
    """A vision transformer over 16 patches of 2 by 2 pixels, read out by the mean of its tokens."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(Encoder(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def digits() -> tuple[Batch, Batch]:
    """Return scikit-learn's 1,797 handwritten digits, four fifths to train on and one fifth to test on."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[360:], order[:360]
    return (images[train], labels[train]), (images[test], labels[test])


def train(
    build: Callable[[], nn.Module],
    data: Batch,
    *,
    seed: int,
    epochs: int,
    rate: float,
    decay: float,
    batch: int = 64,
    progress: Callable[[], None] = lambda: None,
) -> nn.Module:
    """Return a network trained with AdamW and a one-cycle rate; the seed sets its start and the order of the data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    order = torch.Generator().manual_seed(seed)
    images, labels = data
    steps = -(-len(labels) // batch)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=order).split(batch):
            optimiser.zero_grad()
            cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimiser.step()
            schedule.step()
        progress()
    return model.eval()
