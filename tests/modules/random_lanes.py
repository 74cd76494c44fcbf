"""Random programs over lanes: k modules side by side, to which the same is done, or not quite the same.

A lane is one module's tensor. Steps act on each lane alone, with weights of its own or shared ones; on all lanes
together, in ways that do and do not mind their order; or on one lane alone. What tells lanes apart and what does not
is for the inference to find out: here nobody keeps account of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Lanes = list[Tensor]
Step = Callable[["RandomLanes", random.Random, Lanes, Tensor], "Lanes"]
Join = Callable[["RandomLanes", random.Random, Lanes, Tensor], Tensor]
STEPS: list[Step] = []
APART: list[Step] = []
JOINS: list[Join] = []
WIDTH = 3


def step(function: Step) -> Step:
    STEPS.append(function)
    return function


def apart(function: Step) -> Step:
    """A step that mostly tells lanes apart."""
    APART.append(function)
    return function


def join(function: Join) -> Join:
    JOINS.append(function)
    return function


class RandomLanes(nn.Module):
    """A program that its seed determines."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.weights = nn.ParameterList()
        self.norms = nn.ModuleList()
        self.trace: list[str] = []
        self._building = True
        with torch.no_grad():
            self(self.example())
        self._building = False
        for norm in self.norms:
            norm.reset_running_stats()

    def example(self, batch: int = 4, seed: int = 0) -> Tensor:
        return torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(seed))

    def weight(self, *shape: int) -> Tensor:
        if self._building:
            self.weights.append(nn.Parameter(torch.randn(shape) / max([*shape[-1:], 1]) ** 0.5))
        self._at += 1
        return self.weights[self._at - 1]

    def norm(self, size: int) -> nn.Module:
        if self._building:
            self.norms.append(nn.BatchNorm1d(size))
        self._norm_at += 1
        return self.norms[self._norm_at - 1]

    def linear(self, x: Tensor, out: int = WIDTH) -> Tensor:
        return F.linear(x, self.weight(out, x.shape[-1]), self.weight(out))

    def forward(self, x: Tensor) -> Tensor:
        rng = random.Random(self.seed)
        self._at = self._norm_at = 0
        self.trace = []
        y = x
        for _ in range(rng.choice([1, 1, 2])):
            y = self._block(rng, y)
        return y

    def _block(self, rng: random.Random, x: Tensor) -> Tensor:
        k = rng.choice([2, 3, 3, 4])
        lanes = [torch.tanh(self.linear(x)) for _ in range(k)]
        for _ in range(rng.randint(0, 4)):
            chosen = rng.choice(APART if rng.random() < 0.12 else STEPS)
            self.trace.append(chosen.__name__)
            lanes = chosen(self, rng, lanes, x)
        chosen_join = rng.choice(JOINS)
        self.trace.append(chosen_join.__name__)
        return chosen_join(self, rng, lanes, x)

    def inner(self, rng: random.Random, t: Tensor, among: int) -> Tensor:
        """A module of this program, of which the same lanes draw the same."""
        if among == 0:
            return F.relu(self.linear(t))
        if among == 1:
            return t + self.linear(torch.tanh(self.linear(t, 4)))
        if among == 2:
            return sum((torch.tanh(self.linear(t)) for _ in range(2)), t)
        if among == 3:
            return F.layer_norm(t, (t.shape[-1],), self.weight(t.shape[-1]), self.weight(t.shape[-1]))
        if among == 4:
            return self.norm(t.shape[-1])(t)
        return t * torch.sigmoid(self.weight(t.shape[-1]))


# -- each lane alone ---------------------------------------------------------------------------------------------------


@step
def own_module(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    kind = rng.randrange(6)
    return [m.inner(rng, lane, kind) for lane in lanes]


@step
def shared_module(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    w, b = m.weight(WIDTH, WIDTH), m.weight(WIDTH)
    return [torch.tanh(F.linear(lane, w, b)) for lane in lanes]


@step
def shared_norm(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    norm = m.norm(WIDTH)
    return [norm(lane) for lane in lanes]


@step
def with_input(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    return [x * lane + lane if rng.random() < 2 else lane for lane in lanes]


@step
def slices_of_a_shared_map(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    h = m.linear(x, WIDTH * len(lanes))
    parts = h.chunk(len(lanes), -1) if rng.random() < 0.5 else h.split(WIDTH, -1)
    return [lane * part for lane, part in zip(lanes, parts, strict=True)]


@step
def router(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    g = m.linear(x, len(lanes))
    g = rng.choice([lambda t: t.softmax(-1), torch.sigmoid, torch.relu, lambda t: t.topk(1).values + t])(g)
    if rng.random() < 0.5:
        return [g[:, i : i + 1] * lane for i, lane in enumerate(lanes)]
    return [s[:, None] * lane for s, lane in zip(g.unbind(-1), lanes, strict=True)]


@step
def chosen(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    g = m.linear(x, len(lanes))
    if rng.random() < 0.3:
        g = torch.relu(g)
    sel = g.topk(min(2, len(lanes)), -1).indices if rng.random() < 0.5 else g.argmax(-1, keepdim=True)
    shift = int(rng.random() < 0.1)
    return [lane * (sel == i + shift).any(-1, keepdim=True) for i, lane in enumerate(lanes)]


@step
def one_hot(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    hot = F.one_hot(m.linear(x, len(lanes)).argmax(-1), len(lanes)).to(x.dtype)
    return [lane * h[:, None] for lane, h in zip(lanes, hot.unbind(-1), strict=True)]


@step
def own_scale(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    scale = m.weight(len(lanes))
    return [lane * scale[i] for i, lane in enumerate(lanes)]


@step
def in_place(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    lanes = [lane * 1.0 for lane in lanes]
    for lane in lanes:
        lane.mul_(2.0) if rng.random() < 2 else lane
    return lanes


# -- all lanes together ------------------------------------------------------------------------------------------------


@step
def against_the_mean(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    mean = sum(lanes) / len(lanes)
    return [torch.tanh(lane - mean) for lane in lanes]


@step
def against_all_others(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    return [sum(other for j, other in enumerate(lanes) if j != i) * lane for i, lane in enumerate(lanes)]


@step
def around(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    return [lane + torch.tanh(lanes[(i + 1) % len(lanes)]) for i, lane in enumerate(lanes)]


@step
def stacked(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    at = rng.choice([0, 1, 2])
    s = torch.stack(lanes, at)
    k = len(lanes)
    kind = rng.randrange(16)
    if kind == 0:
        s = s.softmax(at) * s
    elif kind == 1:
        s = s.sort(at).values
    elif kind == 2:
        s = s.cumsum(at)
    elif kind == 3:
        s = s - s.mean(at, keepdim=True)
    elif kind == 4:
        s = s + s.flip(at)
    elif kind == 5:
        s = s * s.roll(1, at)
    elif kind == 6:
        t = s.movedim(at, 1)
        s = F.scaled_dot_product_attention(t, t, t, is_causal=rng.random() < 0.3).movedim(1, at)
    elif kind == 7:
        s = (s.movedim(at, -1) * m.weight(k)).movedim(-1, at)
    elif kind == 8:
        s = torch.tanh(F.linear(s.movedim(at, -1), m.weight(k, k))).movedim(-1, at)
    elif kind == 9:
        s = F.layer_norm(s.movedim(at, -1), (k,), m.weight(k), m.weight(k)).movedim(-1, at)
    elif kind == 10:
        t = s.movedim(at, 1).reshape(-1, WIDTH)
        s = torch.tanh(m.linear(t)).reshape(x.shape[0], k, WIDTH).movedim(1, at)
    elif kind == 11:
        t = s.movedim(at, rng.choice([0, 1, 2])).reshape(x.shape[0], k * WIDTH)
        s = torch.tanh(m.linear(t, k * WIDTH)).reshape(x.shape[0], k, WIDTH).movedim(1, at)
    elif kind == 12:
        i = (torch.relu(s) if rng.random() < 0.4 else s).argmax(at, keepdim=True)
        s = s + s.tanh().gather(at, i)
    elif kind == 13:
        t = s.movedim(at, 1)
        s = ((t @ t.transpose(1, 2)).tril() if rng.random() < 0.3 else t @ t.transpose(1, 2)).tanh() @ t
        s = s.movedim(1, at)
    elif kind == 14:
        t = s.movedim(at, 1)
        s = F.conv1d(t, m.weight(k, 1, 1), groups=k).movedim(1, at)
    else:
        s = m.norm(k)(s.movedim(at, 1)).movedim(1, at)
    return list(s.unbind(at)) if rng.random() < 0.5 else [s.select(at, i) for i in range(k)]


@step
def put_together(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    k = len(lanes)
    c = torch.cat(lanes, -1)
    kind = rng.randrange(5)
    if kind == 0:
        c = torch.tanh(m.linear(c, WIDTH * k))
    elif kind == 1:
        c = F.layer_norm(c, (WIDTH * k,), m.weight(WIDTH * k), m.weight(WIDTH * k))
    elif kind == 2:
        c = m.norm(WIDTH * k)(c)
    elif kind == 3:
        c = F.group_norm(c, rng.choice([k, WIDTH]), m.weight(WIDTH * k))
    else:
        c = c.reshape(-1, k, WIDTH).transpose(1, 2).reshape(-1, k * WIDTH)
    return list(c.chunk(k, -1)) if rng.random() < 0.5 else [c[:, i * WIDTH : (i + 1) * WIDTH] for i in range(k)]


@step
def running_sum(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    total = torch.zeros_like(x)
    seen = total.view(-1)
    found = []
    late = rng.random() < 0.7
    for lane in lanes:
        total.add_(lane)
        found.append(None if late else seen.view_as(x) * lane)
    return [lane * total for lane in lanes] if late else [f + 0 * l for f, l in zip(found, lanes, strict=True)]


@step
def by_experts(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    """Each lane says how much of each lane there shall be."""
    g = sum(m.linear(lane, len(lanes)) for lane in lanes).softmax(-1)
    return [g[:, i : i + 1] * lane for i, lane in enumerate(lanes)]


@step
def written(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    out = torch.zeros(len(lanes), *x.shape, dtype=x.dtype)
    for i, lane in enumerate(lanes):
        out[i] = lane
    return [*torch.tanh(out)]


# -- one lane, or each another way -------------------------------------------------------------------------------------


@apart
def one_alone(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    i = rng.randrange(len(lanes))
    return [torch.sin(lane) if j == i else lane for j, lane in enumerate(lanes)]


@apart
def by_number(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    return [lane * (i + 1) for i, lane in enumerate(lanes)]


@apart
def by_table(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    table = torch.arange(len(lanes), dtype=x.dtype)
    return [lane + table[i] for i, lane in enumerate(lanes)]


@apart
def swapped(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    return [lanes[1] * lanes[0], *lanes[1:]]


@apart
def chained(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    found = [lanes[0]]
    for lane in lanes[1:]:
        found.append(torch.tanh(found[-1]) + lane)
    return found


@apart
def one_in_place(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    lanes = [lane * 1.0 for lane in lanes]
    part = lanes[0][:, :1]
    part.add_(1.0)
    return lanes


@apart
def overlapping(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    h = m.linear(x, WIDTH + len(lanes))
    return [lane * h[:, i : i + WIDTH] for i, lane in enumerate(lanes)]


@apart
def by_input(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    return [lane * x[:, i % WIDTH : i % WIDTH + 1] for i, lane in enumerate(lanes)]


@apart
def noisy(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Lanes:
    return [lane + torch.rand((), dtype=x.dtype) for lane in lanes]


# -- the end -----------------------------------------------------------------------------------------------------------


@join
def added(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Tensor:
    return sum(lanes)


@join
def accumulated(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    rows = torch.arange(x.shape[0])
    for lane in lanes:
        out.index_add_(0, rows, lane) if rng.random() < 2 else out
    return out


@join
def subtracted(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Tensor:
    return lanes[0] - sum(lanes[1:])


@join
def multiplied(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Tensor:
    out = lanes[0]
    for lane in lanes[1:]:
        out = out * lane
    return out


@join
def mapped(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Tensor:
    return m.linear(torch.cat(lanes, -1))


@join
def mapped_twice(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Tensor:
    return m.linear(torch.cat([*lanes, *(lanes if rng.random() < 0.5 else reversed(lanes))], -1))


@join
def reduced(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Tensor:
    s = torch.stack(lanes)
    kind = rng.randrange(8)
    if kind == 0:
        return s.amax(0)
    if kind == 1:
        return s.logsumexp(0)
    if kind == 2:
        return s.median(0).values
    if kind == 3:
        return s.std(0)
    if kind == 4:
        return m.linear(s.sort(0).values.movedim(0, 1).flatten(1))
    if kind == 5:
        return s.argmax(0).to(x.dtype)
    if kind == 6:
        return s.flatten().argmax().to(x.dtype) + s.sum(0)
    return s.prod(0)


@join
def larger(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Tensor:
    out = lanes[0]
    for lane in lanes[1:]:
        out = torch.maximum(out, lane)
    return out


@join
def where(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Tensor:
    sel = m.linear(x, len(lanes)).argmax(-1, keepdim=True)
    out = x
    for i, lane in enumerate(lanes):
        out = torch.where(sel == i, lane, out)
    return out


@join
def put(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Tensor:
    sel = m.linear(x, len(lanes)).argmax(-1)
    out = torch.zeros_like(x)
    for i, lane in enumerate(lanes):
        out[sel == i] = lane[sel == i]
    return out


@join
def weighed(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Tensor:
    return torch.einsum("bk,bkd->bd", m.linear(x, len(lanes)).softmax(-1), torch.stack(lanes, 1))


@join
def first(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Tensor:
    return lanes[0]


@join
def through_time(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Tensor:
    h = torch.zeros_like(x)
    for t in torch.tanh(m.linear(torch.stack(lanes))).unbind(0):
        h = torch.tanh(h * 0.5 + t)
    return h


@join
def nearby(m: RandomLanes, rng: random.Random, lanes: Lanes, x: Tensor) -> Tensor:
    return abs(lanes[0] - lanes[1]).add(sum(lanes[2:]))
