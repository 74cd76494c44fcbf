"""Random architectures: chains, branches and shared pieces of small blocks, each wired as some published model is.

A block takes features (batch, positions, C) and gives (batch, positions, C'); its attribute ``out`` is C'. Sizes are
few and equal ones are common on purpose: then a wrong tie does not show in the shapes.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSITIONS = 4
BLOCKS: list[type[Block]] = []


class Block(nn.Module):
    """Base of all blocks: made from a random generator and the number of channels that come in."""

    out: int

    def __init__(self, rng: random.Random, width: int) -> None:
        super().__init__()
        self.out = width
        self.build(rng, width)

    def build(self, rng: random.Random, width: int) -> None:
        raise NotImplementedError


def block(kind: type[Block]) -> type[Block]:
    BLOCKS.append(kind)
    return kind


def _width(rng: random.Random) -> int:
    return rng.choice([4, 6, 8, 12])


def _factor(rng: random.Random, n: int) -> int:
    return rng.choice([d for d in range(1, n + 1) if n % d == 0])


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [torch.relu, torch.tanh, F.gelu, torch.sigmoid, F.silu]

# -- by channel --------------------------------------------------------------------------------------------------------


@block
class Dense(Block):
    def build(self, rng: random.Random, width: int) -> None:
        self.out = _width(rng)
        self.map, self.act = nn.Linear(width, self.out, bias=rng.random() < 0.7), rng.choice(ACTIVATIONS)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.map(x))


@block
class Norm(Block):
    def build(self, rng: random.Random, width: int) -> None:
        groups = _factor(rng, width)
        self.kind = rng.choice(["layer", "rms", "batch", "group", "l2"])
        self.norm = {
            "layer": lambda: nn.LayerNorm(width),
            "rms": lambda: nn.RMSNorm(width),
            "batch": lambda: nn.BatchNorm1d(width),
            "group": lambda: nn.GroupNorm(groups, width),
            "l2": nn.Identity,
        }[self.kind]()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind in ("batch", "group"):
            return self.norm(x.transpose(1, 2)).transpose(1, 2)
        return F.normalize(x, dim=-1) if self.kind == "l2" else self.norm(x)


@block
class Gated(Block):
    """A hidden layer of which one half gates the other, in every layout of the two halves."""

    def build(self, rng: random.Random, width: int) -> None:
        self.hidden, self.out = _width(rng), _width(rng)
        self.up, self.down = nn.Linear(width, 2 * self.hidden), nn.Linear(self.hidden, self.out)
        self.layout = rng.choice(
            ["chunk", "split", "every second", "view inner", "view outer", "glu", "unbind", "slice"]
        )

    def forward(self, x: Tensor) -> Tensor:
        y, n = self.up(x), self.hidden
        if self.layout == "chunk":
            gate, up = y.chunk(2, -1)
        elif self.layout == "split":
            gate, up = y.split([n, n], -1)
        elif self.layout == "every second":
            gate, up = y[..., ::2], y[..., 1::2]
        elif self.layout == "view inner":
            y = y.view(*y.shape[:-1], n, 2)
            gate, up = y[..., 0], y[..., 1]
        elif self.layout == "view outer":
            y = y.view(*y.shape[:-1], 2, n)
            gate, up = y[..., 0, :], y[..., 1, :]
        elif self.layout == "unbind":
            gate, up = y.unflatten(-1, (2, n)).unbind(-2)
        elif self.layout == "slice":
            gate, up = y[..., :n], y[..., n:]
        else:
            return self.down(F.glu(y, -1))
        return self.down(torch.sigmoid(gate) * up)


@block
class Shuffle(Block):
    def build(self, rng: random.Random, width: int) -> None:
        self.groups = _factor(rng, width)

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.groups, -1)).transpose(-1, -2).flatten(-2)


@block
class Partly(Block):
    """Only a part of the channels goes through a map; then they are put together, or written back in place."""

    def build(self, rng: random.Random, width: int) -> None:
        self.at = rng.randrange(1, width)
        self.map = nn.Linear(self.at, self.at)
        self.how = rng.choice(["cat", "add in place", "copy in place", "swap", "pad", "mask"])

    def forward(self, x: Tensor) -> Tensor:
        left, right = x[..., : self.at], x[..., self.at :]
        if self.how == "cat":
            return torch.cat([self.map(left), right], -1)
        if self.how == "swap":
            return torch.cat([right, self.map(left)], -1)
        if self.how == "pad":
            return x + F.pad(self.map(left), (0, right.shape[-1]))
        if self.how == "mask":
            mask = torch.zeros(x.shape[-1])
            mask[: self.at] = 1
            return x * mask
        x = x.clone()
        if self.how == "add in place":
            x[..., : self.at] += self.map(left)
        else:
            x[..., : self.at] = self.map(left)
        return x


@block
class OwnOrder(Block):
    """Channels in an order of their own: rolled, flipped, accumulated, looked up, weighted by their number."""

    def build(self, rng: random.Random, width: int) -> None:
        self.how = rng.choice(["roll", "flip", "cumsum", "lookup", "ramp", "sort", "diff", "one-hot"])
        self.map = nn.Linear(width, width)
        self.register_buffer("order", torch.tensor([rng.randrange(width) for _ in range(width)]))
        self.wrap = rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = self.map(x)
        if self.how == "roll":
            y = y.roll(1, -1)
        elif self.how == "flip":
            y = y.flip(-1)
        elif self.how == "cumsum":
            y = y.cumsum(-1)
        elif self.how == "lookup":
            y = y[..., self.order]
        elif self.how == "ramp":
            y = y * torch.arange(y.shape[-1])
        elif self.how == "sort":
            y = y.sort(-1).values
        elif self.how == "diff":
            y = torch.cat([y[..., 1:] - y[..., :-1], y[..., :1]], -1)
        else:
            y = y + F.one_hot(y.argmax(-1), y.shape[-1])
        return x + y if self.wrap else y


@block
class OverChannels(Block):
    """A softmax, a maximum, a mean or a standard deviation over the channels, or over groups of them."""

    def build(self, rng: random.Random, width: int) -> None:
        self.how, self.groups = rng.choice(["softmax", "max", "centre", "std", "logsumexp"]), _factor(rng, width)

    def forward(self, x: Tensor) -> Tensor:
        y = x.unflatten(-1, (self.groups, -1))
        if self.how == "softmax":
            y = y.softmax(-1)
        elif self.how == "max":
            y = y / (1 + y.amax(-1, keepdim=True).abs())
        elif self.how == "centre":
            y = y - y.mean(-2, keepdim=True)
        elif self.how == "std":
            y = y / (1 + y.std(-1, keepdim=True, correction=0))
        else:
            y = y - y.logsumexp(-1, keepdim=True)
        return y.flatten(-2)


@block
class LowRank(Block):
    def build(self, rng: random.Random, width: int) -> None:
        self.a, self.b, self.base = _parameter(2, width), _parameter(width, 2), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + self.b @ self.a, self.base.bias)


@block
class TiedTranspose(Block):
    def build(self, rng: random.Random, width: int) -> None:
        self.weight = _parameter(_width(rng), width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.weight.t()) @ self.weight


@block
class Square(Block):
    """A square weight used as it is and transposed, multiplied with itself, or with its diagonal picked."""

    def build(self, rng: random.Random, width: int) -> None:
        self.weight = _parameter(width, width)
        self.how = rng.choice(["twice", "transposed", "squared", "symmetric", "diagonal", "identity", "triangle"])

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.how == "twice":
            return torch.tanh(x @ w) @ w
        if self.how == "transposed":
            return x @ w + x @ w.t()
        if self.how == "squared":
            return x @ (w @ w)
        if self.how == "symmetric":
            return x @ (w + w.t())
        if self.how == "diagonal":
            return x * w.diagonal()
        if self.how == "triangle":
            return x @ w.tril()
        return x @ (w + torch.eye(w.shape[0]))


@block
class Hyper(Block):
    """The weights of a map are computed from the features themselves."""

    def build(self, rng: random.Random, width: int) -> None:
        self.out = _width(rng)
        self.make = nn.Linear(width, width * self.out)
        self.transposed = rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        flat = self.make(x.mean(1))
        if self.transposed:
            return x @ flat.view(len(x), x.shape[-1], self.out)
        return x @ flat.view(len(x), self.out, x.shape[-1]).transpose(1, 2)


@block
class Bilinear(Block):
    def build(self, rng: random.Random, width: int) -> None:
        self.a, self.b = nn.Linear(width, 3), nn.Linear(width, 4)
        self.out = 12
        self.same = rng.random() < 0.4
        if self.same:
            self.out = 9

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.a(x) if self.same else self.b(x)
        return torch.einsum("bsi,bsj->bsij", a, b).flatten(-2)


@block
class Gram(Block):
    """Products of channel groups with each other, summed over what is inside them."""

    def build(self, rng: random.Random, width: int) -> None:
        self.groups = _factor(rng, width)
        self.map = nn.Linear(width, width)
        self.out = self.groups**2

    def forward(self, x: Tensor) -> Tensor:
        y = self.map(x).unflatten(-1, (self.groups, -1))
        return (y @ y.transpose(-1, -2)).flatten(-2)


# -- attention ---------------------------------------------------------------------------------------------------------


@block
class FusedAttention(Block):
    """Query, key and value from one projection, in every layout."""

    def build(self, rng: random.Random, width: int) -> None:
        self.heads, self.size = rng.choice([1, 2, 3]), rng.choice([3, 4])
        self.out = _width(rng)
        inner = self.heads * self.size
        self.qkv = nn.Linear(width, 3 * inner, bias=rng.random() < 0.5)
        self.proj = nn.Linear(inner, self.out)
        self.layout = rng.choice(["3 h d", "h 3 d", "h 3d chunk", "q|k|v", "d 3 h", "h d 3", "split then view"])
        self.kernel = rng.random() < 0.5
        self.norm = nn.LayerNorm(self.size) if rng.random() < 0.4 else None
        self.bias = _parameter(self.heads, POSITIONS, POSITIONS) if rng.random() < 0.4 else None

    def forward(self, x: Tensor) -> Tensor:
        h, d = self.heads, self.size
        y = self.qkv(x)
        if self.layout == "3 h d":
            q, k, v = y.unflatten(-1, (3, h, d)).permute(2, 0, 3, 1, 4)
        elif self.layout == "h 3 d":
            q, k, v = (t.transpose(1, 2) for t in y.unflatten(-1, (h, 3, d)).unbind(-2))
        elif self.layout == "h 3d chunk":
            q, k, v = y.unflatten(-1, (h, 3 * d)).transpose(1, 2).chunk(3, -1)
        elif self.layout == "q|k|v":
            q, k, v = (t.unflatten(-1, (h, d)).transpose(1, 2) for t in y.chunk(3, -1))
        elif self.layout == "d 3 h":
            q, k, v = y.unflatten(-1, (d, 3, h)).permute(3, 0, 4, 1, 2)
        elif self.layout == "h d 3":
            q, k, v = y.unflatten(-1, (h, d, 3)).permute(4, 0, 2, 1, 3)
        else:
            q, rest = y.split([h * d, 2 * h * d], -1)
            k, v = rest.unflatten(-1, (2, h, d)).permute(2, 0, 3, 1, 4)
            q = q.unflatten(-1, (h, d)).transpose(1, 2)
        if self.norm is not None:
            q, k = self.norm(q), self.norm(k)
        if self.kernel:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        else:
            scores = q @ k.transpose(-1, -2) / d**0.5
            out = (scores if self.bias is None else scores + self.bias).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(-2))


@block
class FewKeys(Block):
    """Grouped-query attention: repeated keys, grouped queries, or one fused projection (K, G+2, D)."""

    def build(self, rng: random.Random, width: int) -> None:
        self.k, self.g, self.d = rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), rng.choice([2, 3])
        self.layout = rng.choice(["repeat", "expand", "grouped", "fused", "enable_gqa"])
        inner = self.k * self.g * self.d
        self.q = nn.Linear(width, inner)
        self.kv = nn.Linear(width, 2 * self.k * self.d)
        self.qkv = nn.Linear(width, self.k * (self.g + 2) * self.d)
        self.proj = nn.Linear(inner, width)
        self.norm = nn.RMSNorm(inner) if rng.random() < 0.3 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        k, g, d = self.k, self.g, self.d
        if self.layout == "fused":
            y = self.qkv(x).unflatten(-1, (k, g + 2, d))
            q, key, value = y[..., :-2, :], y[..., -2, :], y[..., [-1], :].squeeze(-2)
            scores = torch.einsum("bskgd,btkd->bkgst", q, key).softmax(-1)
            return self.proj(torch.einsum("bkgst,btkd->bskgd", scores, value).flatten(2))
        q = self.norm(self.q(x)).unflatten(-1, (k * g, d)).transpose(1, 2)
        key, value = (t.unflatten(-1, (k, d)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        if self.layout == "enable_gqa":
            out = F.scaled_dot_product_attention(q, key, value, enable_gqa=True)
        elif self.layout == "grouped":
            grouped = q.unflatten(1, (k, g))
            weights = (grouped @ key.unsqueeze(2).transpose(-1, -2)).softmax(-1)
            out = (weights @ value.unsqueeze(2)).flatten(1, 2)
        else:
            if self.layout == "repeat":
                key, value = (t.repeat_interleave(g, 1) for t in (key, value))
            else:
                key, value = (t[:, :, None].expand(-1, -1, g, -1, -1).flatten(1, 2) for t in (key, value))
            out = (q @ key.transpose(-1, -2)).softmax(-1) @ value
        return self.proj(out.transpose(1, 2).flatten(2))


@block
class HeadByHead(Block):
    """A module for each head, concatenated or stacked."""

    def build(self, rng: random.Random, width: int) -> None:
        self.d = rng.choice([2, 3])
        self.q, self.k, self.v = (nn.ModuleList(nn.Linear(width, self.d) for _ in range(3)) for _ in range(3))
        self.shared = nn.Linear(width, self.d) if rng.random() < 0.3 else None
        self.proj = nn.Linear(3 * self.d, width)
        self.stacked = rng.choice(["cat", "stack", "stack outer", "sum"])

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            k = self.shared or k
            outs.append((q(x) @ k(x).transpose(1, 2)).softmax(-1) @ v(x))
        if self.stacked == "cat":
            return self.proj(torch.cat(outs, -1))
        if self.stacked == "sum":
            return self.proj(torch.cat([sum(outs), outs[0] * outs[1], outs[2]], -1))
        if self.stacked == "stack":
            return self.proj(torch.stack(outs, -2).flatten(-2))
        return self.proj(torch.stack(outs).permute(1, 2, 0, 3).flatten(-2))


@block
class TalkingHeads(Block):
    def build(self, rng: random.Random, width: int) -> None:
        self.h, self.d = 2, 3
        self.qkv, self.proj = nn.Linear(width, 18), nn.Linear(6, width)
        self.before, self.after = nn.Linear(2, 2), nn.Linear(2, 2) if rng.random() < 0.5 else nn.Identity()
        self.mix_values = rng.random() < 0.3

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.h, self.d)).permute(2, 0, 3, 1, 4)
        scores = self.before((q @ k.transpose(-1, -2)).permute(0, 2, 3, 1)).softmax(2)
        weights = self.after(scores).permute(0, 3, 1, 2)
        out = weights @ v
        if self.mix_values:
            out = out + torch.einsum("bhsd,bgsd,bgsd->bhsd", out, v, q)
        return self.proj(out.transpose(1, 2).flatten(2))


@block
class LinearAttention(Block):
    def build(self, rng: random.Random, width: int) -> None:
        self.h, self.d = 2, 3
        self.q, self.k, self.v = (nn.Linear(width, 6) for _ in range(3))
        self.proj = nn.Linear(6, width)
        self.decay = _parameter(2) if rng.random() < 0.5 else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (self.h, self.d)) for m in (self.q, self.k, self.v))
        state = torch.einsum("bshd,bshe->bhde", q.softmax(-1), v)
        if self.decay is not None:
            state = state * self.decay[:, None, None]
        return self.proj(torch.einsum("bshd,bhde->bshe", k, state).flatten(2))


@block
class ThroughChannels(Block):
    """Attention in which channels attend to channels."""

    def build(self, rng: random.Random, width: int) -> None:
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.same = rng.random() < 0.3

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.q(x) if self.same else self.k(x), self.v(x)
        return v @ (q.transpose(1, 2) @ k).softmax(-1)


# -- routes, recurrence, convolution -----------------------------------------------------------------------------------


@block
class Experts(Block):
    """A mixture of experts: dense, by a loop over the experts, by a lookup of each token's experts, or by slots."""

    def build(self, rng: random.Random, width: int) -> None:
        self.n, hidden = rng.choice([2, 3, 4]), rng.choice([3, 4])
        self.router = nn.Linear(width, self.n)
        self.up, self.down = _parameter(self.n, hidden, width), _parameter(self.n, width, hidden)
        self.how = rng.choice(["dense", "loop", "lookup", "one-hot", "scatter", "groups", "sorted"])
        self.shared = nn.Linear(width, width) if rng.random() < 0.3 else None
        self.top = rng.choice([1, 2])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        scores = self.router(flat).softmax(-1)
        weights, chosen = scores.topk(self.top, -1)
        if self.how == "dense":
            hidden = F.gelu(torch.einsum("td,nhd->tnh", flat, self.up))
            out = torch.einsum("tnh,ndh,tn->td", hidden, self.down, scores)
        elif self.how == "one-hot":
            gate = (F.one_hot(chosen, self.n).to(weights.dtype) * weights[..., None]).sum(1)
            hidden = F.gelu(torch.einsum("td,nhd->tnh", flat, self.up))
            out = torch.einsum("tnh,ndh,tn->td", hidden, self.down, gate)
        elif self.how == "scatter":
            gate = torch.zeros_like(scores).scatter(1, chosen, weights)
            hidden = F.gelu(torch.einsum("td,nhd->tnh", flat, self.up))
            out = torch.einsum("tnh,ndh,tn->td", hidden, self.down, gate)
        elif self.how == "loop":
            out = torch.zeros_like(flat)
            for i in range(self.n):
                gate = ((chosen == i) * weights).sum(-1, keepdim=True)
                out = out + gate * (torch.relu(flat @ self.up[i].t()) @ self.down[i].t())
        elif self.how == "groups":
            group = scores.unflatten(-1, (-1, 1)).amax(-1).argmax(-1)
            hidden = F.gelu(torch.einsum("td,thd->th", flat, self.up[group]))
            out = torch.einsum("th,tdh->td", hidden, self.down[group])
        elif self.how == "sorted":
            order = chosen[:, 0].argsort()
            hidden = F.gelu(torch.einsum("td,thd->th", flat[order], self.up[chosen[order, 0]]))
            out = torch.einsum("th,tdh->td", hidden, self.down[chosen[order, 0]])[order.argsort()]
        else:
            hidden = F.gelu(torch.einsum("td,tkhd->tkh", flat, self.up[chosen]))
            out = torch.einsum("tkh,tkdh,tk->td", hidden, self.down[chosen], weights)
        if self.shared is not None:
            out = out + self.shared(flat)
        return out.view_as(x)


@block
class TwoRoutes(Block):
    """Two routers over one bank of experts; with the second's choice, the hidden units of the two meet or do not."""

    def build(self, rng: random.Random, width: int) -> None:
        self.up, self.down = _parameter(3, 4, width), _parameter(3, width, 4)
        self.a, self.b = nn.Linear(width, 3), nn.Linear(width, 3)
        self.crossed = rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).argmax(-1)
        b = self.b(x).argmax(-1) if self.crossed else a
        hidden = torch.tanh(torch.einsum("bsd,bshd->bsh", x, self.up[a]))
        return torch.einsum("bsh,bsdh->bsd", hidden, self.down[b])


@block
class Codebook(Block):
    """Features are replaced by the nearest entry of a table, or by one that their largest channel chooses."""

    def build(self, rng: random.Random, width: int) -> None:
        self.table = nn.Embedding(width, width)
        self.how = rng.choice(["nearest", "largest", "tied", "both"])

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "nearest":
            return x + self.table(torch.cdist(x, self.table.weight[None]).argmin(-1))
        if self.how == "largest":
            return x + self.table(x.argmax(-1))
        scores = x @ self.table.weight.t()
        return self.table(scores.argmax(-1)) + (scores if self.how == "both" else x)


@block
class Recurrent(Block):
    def build(self, rng: random.Random, width: int) -> None:
        self.both = rng.random() < 0.4
        hidden = rng.choice([3, 4])
        kind = rng.choice([nn.LSTM, nn.GRU, nn.RNN])
        more = {"proj_size": 2} if kind is nn.LSTM and rng.random() < 0.4 else {}
        self.core = kind(width, hidden, rng.choice([1, 2]), batch_first=True, bidirectional=self.both, **more)
        self.out = (1 + self.both) * (2 if more else hidden)
        self.last = rng.random() < 0.3

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.core(x)
        if self.last:
            state = state[0] if isinstance(state, tuple) else state
            y = y + state[-1].unsqueeze(1).repeat(1, 1, 1 + self.both)
        return y


@block
class StateSpace(Block):
    """A diagonal recurrence whose inputs choose what enters the state."""

    def build(self, rng: random.Random, width: int) -> None:
        self.b, self.c, self.dt = nn.Linear(width, 3), nn.Linear(width, 3), nn.Linear(width, width)
        self.a = _parameter(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, c, dt = self.b(x), self.c(x), F.softplus(self.dt(x))
        state, outs = torch.zeros(len(x), x.shape[-1], 3), []
        for t in range(x.shape[1]):
            decay = torch.exp(-dt[:, t, :, None] * self.a.exp())
            state = state * decay + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
            outs.append((state * c[:, t, None]).sum(-1))
        return torch.stack(outs, 1)


@block
class Convolution(Block):
    def build(self, rng: random.Random, width: int) -> None:
        groups = _factor(rng, width)
        self.out = groups * rng.choice([1, 2, 3])
        self.conv = nn.Conv1d(width, self.out, 3, padding=1, groups=groups)
        self.norm = nn.GroupNorm(_factor(rng, self.out), self.out) if rng.random() < 0.4 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x.transpose(1, 2)))).transpose(1, 2)


@block
class Image(Block):
    """Positions as a picture of 2 x 2: merged into channels and spread again."""

    def build(self, rng: random.Random, width: int) -> None:
        self.how = rng.choice(["merge", "unshuffle", "shuffle", "patches"])
        self.map = nn.Linear(4 * width, 4 * width)
        self.spread = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        image = x.view(len(x), 2, 2, -1)
        if self.how == "merge":
            parts = [image[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
            y = self.map(torch.cat(parts, -1))
            return y.view(len(x), 4, -1)
        if self.how == "patches":
            y = self.map(image.reshape(len(x), 1, -1)).view(len(x), 2, 2, -1)
            return y.reshape(len(x), 4, -1)
        if self.how == "unshuffle":
            y = F.pixel_unshuffle(image.permute(0, 3, 1, 2), 2).flatten(1)
            return self.map(y).view(len(x), -1, 4).transpose(1, 2)
        y = F.pixel_shuffle(self.spread(image).permute(0, 3, 1, 2), 2)
        return F.avg_pool2d(y, 2).flatten(2).transpose(1, 2)


@block
class Mixer(Block):
    def build(self, rng: random.Random, width: int) -> None:
        self.up, self.down = nn.Linear(POSITIONS, 6), nn.Linear(6, POSITIONS)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x.transpose(1, 2)))).transpose(1, 2)


@block
class Graph(Block):
    """Message passing over fixed edges."""

    def build(self, rng: random.Random, width: int) -> None:
        self.message = nn.Linear(2 * width, width)
        self.register_buffer("source", torch.tensor([0, 1, 2, 3, 0]))
        self.register_buffer("target", torch.tensor([1, 2, 3, 0, 2]))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.cat([x[:, self.source], x[:, self.target]], -1)
        return torch.zeros_like(x).index_add(1, self.target, torch.relu(self.message(pairs)))


@block
class Columns(Block):
    """The channels as columns that are unbound, changed one by one or in place, and stacked again."""

    def build(self, rng: random.Random, width: int) -> None:
        self.groups = _factor(rng, width)
        self.scale = _parameter(width // self.groups)
        self.maps = nn.ModuleList(nn.Linear(width // self.groups, width // self.groups) for _ in range(self.groups))
        self.how = rng.choice(["each", "shared", "first", "reversed", "in place"])

    def forward(self, x: Tensor) -> Tensor:
        parts = list(x.unflatten(-1, (self.groups, -1)).unbind(-2))
        if self.how == "each":
            parts = [m(p) for m, p in zip(self.maps, parts, strict=True)]
        elif self.how == "shared":
            parts = [self.maps[0](p) for p in parts]
        elif self.how == "first":
            parts[0] = parts[0] * self.scale
        elif self.how == "reversed":
            parts = parts[::-1]
        else:
            y = torch.zeros(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)
            for i, part in enumerate(parts):
                y[..., i, :] = torch.tanh(part) * self.scale
            return y.flatten(-2)
        return torch.stack(parts, -2).flatten(-2)


# -- wirings -----------------------------------------------------------------------------------------------------------


class Chain(Block):
    def __init__(self, rng: random.Random, width: int, depth: int, length: int) -> None:
        nn.Module.__init__(self)
        self.steps = nn.ModuleList()
        for _ in range(length):
            self.steps.append(step := _any(rng, width, depth))
            width = step.out
        self.out = width

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class Wired(Block):
    """Chains side by side: added, concatenated, gated, or one used twice."""

    def __init__(self, rng: random.Random, width: int, depth: int) -> None:
        nn.Module.__init__(self)
        self.how = rng.choice(["residual", "residual", "dense", "sum", "product", "twice"])
        self.a = Chain(rng, width, depth - 1, rng.choice([1, 2]))
        self.b = Chain(rng, width, depth - 1, 1)
        self.fit = nn.Linear(self.a.out, width)
        self.fit_b = nn.Linear(self.b.out, width)
        self.out = width + self.a.out if self.how == "dense" else width

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.how == "dense":
            return torch.cat([x, y], -1)
        y = self.fit(y)
        if self.how == "residual":
            return x + y
        if self.how == "twice":
            return self.fit(self.a(y))
        z = self.fit_b(self.b(x))
        return y + z if self.how == "sum" else y * z


def _any(rng: random.Random, width: int, depth: int) -> Block:
    if not 2 <= width <= 24:
        return Dense(rng, width)
    if depth > 0 and rng.random() < 0.35:
        return Wired(rng, width, depth)
    return rng.choice(BLOCKS)(rng, width)


class RandomNetwork(nn.Module):
    """A random architecture, determined by its seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.tokens = rng.random() < 0.4
        width = _width(rng)
        self.embed = nn.Embedding(11, width) if self.tokens else nn.Linear(3, width)
        self.body = Chain(rng, width, 2, rng.choice([1, 2, 3, 4]))
        self.head = nn.Linear(self.body.out, 11 if self.tokens else 2)
        if self.tokens and self.body.out == width and rng.random() < 0.6:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)))

    def example(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        if self.tokens:
            return torch.randint(0, 11, (2, POSITIONS), generator=generator)
        return torch.randn(2, POSITIONS, 3, generator=generator)
