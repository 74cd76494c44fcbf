"""Networks of the same keys and shapes: pairs of other structure, and pairs of the same that compute something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Body = Callable[[Any, Tensor], Any]
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers by name, and what to do with them."""

    def __init__(self, layers: dict[str, Callable[[], nn.Module]], body: Body) -> None:
        super().__init__()
        for name, make in layers.items():
            self.add_module(name, make())
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def linear(**sizes: tuple[int, int]) -> dict[str, Callable[[], nn.Module]]:
    return {name: (lambda i=i, o=o: nn.Linear(i, o)) for name, (i, o) in sizes.items()}


QKV = linear(q=(8, 16), k=(8, 16), v=(8, 16), o=(16, 3))


def attention(heads: int, *, head_last: bool = False, rotate: bool = False, kv: int | None = None) -> Body:
    def split(y: Tensor, n: int) -> Tensor:
        y = y.unflatten(-1, (-1, n)).mT if head_last else y.unflatten(-1, (n, -1))
        return y.transpose(1, 2)

    def body(net: Any, x: Tensor) -> Tensor:
        q, k, v = split(net.q(x), heads), split(net.k(x), heads), split(net.v(x), heads)
        if rotate:
            angle = torch.arange(q.shape[-1] // 2) * torch.arange(q.shape[-2]).unsqueeze(-1) / 7
            q, k = (torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
                    for a, b in (t.chunk(2, -1) for t in (q, k)))  # fmt: skip
        y = ((q @ k.mT) / 3).softmax(-1) @ v
        return net.o(y.transpose(1, 2).flatten(2))

    return body


def fused(order: str) -> Body:
    def body(net: Any, x: Tensor) -> Tensor:
        y = net.qkv(x)
        if order == "qkv first":
            q, k, v = y.unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = y.unflatten(-1, (4, 3, 4)).permute(3, 0, 2, 1, 4)
        return net.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))

    return body


def normed(groups: int) -> dict[str, Callable[[], nn.Module]]:
    return {"a": lambda: nn.Conv2d(3, 8, 3), "n": lambda: nn.GroupNorm(groups, 8), "o": lambda: nn.Conv2d(8, 2, 1)}


def chain(net: Any, x: Tensor) -> Tensor:
    for layer in net.children():
        x = layer(x).tanh()
    return x


def multihead(heads: int) -> dict[str, Callable[[], nn.Module]]:
    return {"e": lambda: nn.Linear(8, 12), "m": lambda: nn.MultiheadAttention(12, heads, batch_first=True),
            "o": lambda: nn.Linear(12, 3)}  # fmt: skip


def with_multihead(net: Any, x: Tensor) -> Tensor:
    y = net.e(x)
    return net.o(net.m(y, y, y, need_weights=False)[0])


class Tied(nn.Module):
    def __init__(self, tied: bool, between: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.between = nn.Linear(6, 6) if between else nn.Identity()
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.embed((x[..., 0] * 5).long().clamp(0, 10)).tanh()))


def experts(count: int) -> Body:
    def body(net: Any, x: Tensor) -> Tensor:
        hidden = net.up(x).relu().unflatten(-1, (count, -1))
        return net.down((hidden * hidden.square().mean(-1, keepdim=True).softmax(-2)).flatten(-2))

    return body


MLP = linear(a=(8, 12), b=(12, 12), c=(12, 12), o=(12, 3))
GATED = linear(a=(8, 12), o=(6, 3))
CONV = {"a": lambda: nn.Conv2d(3, 8, 3), "b": lambda: nn.Conv2d(8, 8, 3, groups=4), "o": lambda: nn.Linear(32, 3)}


def shuffled(groups: int) -> Body:
    def body(net: Any, x: Tensor) -> Tensor:
        y = net.a(x).relu()
        return net.o(net.b(y.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)).flatten(1))

    return body


Pair = tuple[Callable[[], nn.Module], Callable[[], nn.Module], Tensor]


def net(layers: dict[str, Callable[[], nn.Module]], *bodies: Body, x: Tensor = X) -> Pair:
    one, other = bodies
    return (lambda: Net(layers, one)), (lambda: Net(layers, other)), x


def mixed(net: Any, x: Tensor) -> Tensor:
    y = net.a(x).tanh()
    return net.o((y + net.c(net.b(y).relu())).sin())


#: By name: two networks of equal shapes and other symmetries, and a parameter on which they differ first.
OTHER_STRUCTURE: dict[str, tuple[Pair, str]] = {
    "2 heads, 8 heads": (net(QKV, attention(2), attention(8)), "q.weight"),
    "heads first, heads last": (net(QKV, attention(2), attention(2, head_last=True)), "q.weight"),
    "rotary embedding or none": (net(QKV, attention(2), attention(2, rotate=True)), "q.weight"),
    "a fused projection by parts, by heads": (
        net(linear(qkv=(8, 48), o=(16, 3)), fused("qkv first"), fused("heads first")), "qkv.weight"),
    "torch's attention of 2 heads, of 4": (
        (lambda: Net(multihead(2), with_multihead), lambda: Net(multihead(4), with_multihead), X), "m.in_proj_weight"),
    "4 norm groups, 8": ((lambda: Net(normed(4), chain), lambda: Net(normed(8), chain), IMAGE), "a.weight"),
    "a residual connection or none": (net(MLP, lambda n, x: n.o(n.c(n.b(n.a(x)).relu()).relu()), mixed), "c.weight"),
    "one after the other, side by side": (
        net(MLP, lambda n, x: n.o(n.c(n.b(n.a(x)).relu()).relu()),
            lambda n, x: n.o(n.b(n.a(x)).relu() + n.c(n.a(x)).tanh())), "c.weight"),
    "layers in another order": (
        net(MLP, lambda n, x: n.o(n.c(n.b(n.a(x)).relu()).relu()),
            lambda n, x: n.o(n.b(n.c(n.a(x)).relu()).relu())), "b.weight"),
    "a weight from the right, from the left": (
        net(MLP, lambda n, x: n.o(n.a(x) @ n.b.weight + n.b.bias + 0 * n.c(n.a(x))),
            lambda n, x: n.o(n.a(x) @ n.b.weight.T + n.b.bias + 0 * n.c(n.a(x)))), "b.weight"),
    "a layer twice, once": (
        net(MLP, lambda n, x: n.o(n.c(n.b(n.b(n.a(x)).relu()).relu())), lambda n, x: n.o(n.c(n.b(n.a(x)).relu()))),
        "b.weight"),
    "a layer that is read, and not": (
        net(MLP, lambda n, x: n.o(n.c(n.b(n.a(x)).relu()).relu()), lambda n, x: n.o(n.b(n.a(x)).relu())), "c.weight"),
    "halves gated, pairs gated": (
        net(GATED, lambda n, x: n.o(F.glu(n.a(x))), lambda n, x: n.o(n.a(x)[..., ::2] * n.a(x)[..., 1::2].sigmoid())),
        "a.weight"),
    "maxima over pairs, over halves": (
        net(GATED, lambda n, x: n.o(n.a(x).unflatten(-1, (6, 2)).amax(-1)),
            lambda n, x: n.o(n.a(x).unflatten(-1, (2, 6)).amax(-2))), "a.weight"),
    "channels first, channels last, before a linear layer": (
        net({"a": lambda: nn.Conv2d(3, 8, 3), "o": lambda: nn.Linear(128, 3)},
            lambda n, x: n.o(n.a(x).relu().flatten(1)), lambda n, x: n.o(n.a(x).relu().movedim(1, -1).flatten(1)),
            x=IMAGE), "o.weight"),
    "channels shuffled or not": (net(CONV, shuffled(1), shuffled(2), x=IMAGE), "a.weight"),
    "4 experts of 6, 6 of 4": (net(linear(up=(8, 24), down=(24, 3)), experts(4), experts(6)), "up.weight"),
    "units by their number": (
        net(MLP, lambda n, x: n.o(n.c(n.b(n.a(x)).relu()).relu()),
            lambda n, x: n.o(n.c((n.b(n.a(x)) * torch.arange(12.0)).relu()).relu())), "b.weight"),
    "units summed from the first on": (
        net(MLP, lambda n, x: n.o(n.c(n.b(n.a(x)).relu()).relu()),
            lambda n, x: n.o(n.c(n.b(n.a(x)).relu().cumsum(-1)).relu())), "b.weight"),
    "units that are returned as well": (
        net(MLP, lambda n, x: n.o(n.c(n.b(n.a(x)).relu()).relu()),
            lambda n, x: (n.o(n.c(n.b(n.a(x)).relu()).relu()), n.a(x))), "a.weight"),
    "neighbours added": (
        net(MLP, lambda n, x: n.o(n.c(n.b(n.a(x)).relu()).relu()),
            lambda n, x: n.o(n.c((lambda h: h + h.roll(1, -1))(n.b(n.a(x)).relu())).relu())), "b.weight"),
}  # fmt: skip


def plain(activation: Callable[[Tensor], Tensor]) -> Body:
    return lambda n, x: n.o(activation(n.c(activation(n.b(n.a(x)))))) if activation else None


def masked(fill: Callable[[Tensor], Tensor]) -> Body:
    def body(n: Any, x: Tensor) -> Tensor:
        scores = n.q(x) @ n.k(x).mT
        return n.o(scores.masked_fill(fill(torch.ones(5, 5)) == 0, -9.0).softmax(-1) @ n.v(x))

    return body


def layer_normed(eps: float) -> dict[str, Callable[[], nn.Module]]:
    return {"a": lambda: nn.Linear(8, 6), "n": lambda: nn.LayerNorm(6, eps), "o": lambda: nn.Linear(6, 3)}


#: By name: two networks of the same symmetries that compute something else, and a word of what says so.
OTHER_FUNCTION: dict[str, tuple[Pair, str]] = {
    "another activation": (net(MLP, plain(torch.relu), plain(torch.tanh)), "aten.tanh"),
    "another slope": (
        net(MLP, plain(F.leaky_relu), plain(lambda h: F.leaky_relu(h, 0.2))), "aten.leaky_relu.default(0.2)"),
    "another mask": (net(QKV, masked(torch.tril), masked(torch.triu)), "aten.triu"),
    "another eps": ((lambda: Net(layer_normed(1e-5), chain), lambda: Net(layer_normed(1e-3), chain), X), "0.001"),
    "another scale": (net(QKV, lambda n, x: n.o((n.q(x) @ n.k(x).mT / 4).softmax(-1) @ n.v(x)),
                          lambda n, x: n.o((n.q(x) @ n.k(x).mT / 2).softmax(-1) @ n.v(x))), "aten.div"),
}  # fmt: skip
