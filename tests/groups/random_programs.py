"""Random programs: operators drawn one by one, on tensors of any shape, with weights that are often shared.

Where `random_models` puts together blocks as people write them, a program here is what nobody would write: it reshapes
across heads, writes into views of views, looks up by what it has sorted, and multiplies weights with their transposes.
Sizes are few and mostly equal, so that a wrong tie does not show in the shapes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[["RandomProgram", random.Random, Tensor], "Tensor | None"]
STEPS: list[Step] = []
MOST = 1500  # elements of a tensor
SIZES = [2, 3, 4, 6]


def step(function: Step) -> Step:
    """One kind of operation: from a tensor of the pool to a new one, or None where it does not fit."""
    STEPS.append(function)
    return function


class RandomProgram(nn.Module):
    """A program of so many steps, determined by its seed."""

    def __init__(self, seed: int, steps: int | None = None) -> None:
        super().__init__()
        self.seed = seed
        self.steps = steps or random.Random(seed).randint(3, 14)
        self.weights = nn.ParameterList()
        self.trace: list[str] = []
        self._building = True
        with torch.no_grad():
            self(self.example())
        self._building = False

    def example(self) -> Tensor:
        return torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        rng = random.Random(self.seed)
        self._at = 0
        trace = []
        self.pool = [self._linear(rng, x, 6), self._linear(rng, x, rng.choice(SIZES))]
        for _ in range(self.steps):
            made = None
            while made is None:
                kind, given = rng.choice(STEPS), rng.choice(self.pool[-4:])
                if given.numel() <= MOST:
                    made = kind(self, rng, given)
                    if made is not None and (made.numel() > MOST or made.ndim > 5 or made.numel() == 0):
                        made = None
            trace.append(f"{kind.__name__} {tuple(given.shape)} -> {tuple(made.shape)}")
            self.pool.append(made)
        self.trace = trace
        results = [self._result(rng, t) for t in self.pool[-2:]]
        self.pool = []
        return torch.stack(results)

    def weight(self, rng: random.Random, *shape: int) -> Tensor:
        """The next weight; or one that was used before, as it is or transposed."""
        if self._at and rng.random() < 0.25:
            known = [w for w in self.weights[: self._at] if tuple(w.shape) == shape]
            turned = [w for w in self.weights[: self._at] if w.ndim == 2 and tuple(w.shape[::-1]) == shape]
            if known:
                return rng.choice(known)
            if turned:
                return rng.choice(turned).t()
        if self._building:
            self.weights.append(nn.Parameter(torch.randn(shape) / math.sqrt(max([*shape[-1:], 1]))))
        self._at += 1
        return self.weights[self._at - 1]

    def partner(self, rng: random.Random, t: Tensor) -> Tensor | None:
        """Another tensor of the same shape: of the pool, or made from one by a map of its last dimension."""
        found = [u for u in self.pool if u.shape == t.shape and u is not t]
        near = [u for u in self.pool if u.ndim == t.ndim and u.shape[:-1] == t.shape[:-1]]
        if found and rng.random() < 0.7:
            return rng.choice(found)
        if near and t.ndim:
            return self._linear(rng, rng.choice(near), t.shape[-1])
        return found[0] if found else None

    def _linear(self, rng: random.Random, t: Tensor, out: int) -> Tensor:
        return F.linear(t, self.weight(rng, out, t.shape[-1]), self.weight(rng, out) if rng.random() < 0.5 else None)

    def _result(self, rng: random.Random, t: Tensor) -> Tensor:
        """Two numbers: each tensor is mapped and added up, as little as can be."""
        if t.ndim == 0:
            return t.expand(2)
        y = self._linear(rng, torch.tanh(t), 2)
        return y.mean(tuple(range(y.ndim - 1))) if y.ndim > 1 else y


def _dim(rng: random.Random, t: Tensor, least: int = 2) -> int | None:
    dims = [d for d in range(t.ndim) if t.shape[d] >= least]
    return rng.choice(dims) if dims else None


def _factors(rng: random.Random, n: int) -> tuple[int, int] | None:
    found = [(d, n // d) for d in range(2, n) if n % d == 0]
    return rng.choice(found) if found else None


# -- maps --------------------------------------------------------------------------------------------------------------


@step
def linear(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    return m._linear(rng, t, rng.choice([*SIZES, t.shape[-1]])) if t.ndim else None


@step
def residual(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    return t + torch.tanh(m._linear(rng, t, t.shape[-1])) if t.ndim else None


@step
def mapped_dimension(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    d = _dim(rng, t)
    if d is None:
        return None
    return m._linear(rng, t.movedim(d, -1), rng.choice([t.shape[d], *SIZES])).movedim(-1, d)


@step
def contraction(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    """An einsum with another tensor of the pool: some letters shared, of which some are summed."""
    other = rng.choice(m.pool)
    letters = "abcdefghij"
    left = letters[: t.ndim]
    right, free = "", iter(letters[t.ndim :])
    for size in other.shape:
        same = [c for c, n in zip(left, t.shape, strict=True) if n == size and c not in right]
        right += rng.choice(same) if same and rng.random() < 0.7 else next(free, "z")
    if "z" in right:
        return None
    every = list(dict.fromkeys(left + right))
    kept = [c for c in every if rng.random() < 0.6]
    rng.shuffle(kept)
    sizes = {**dict(zip(left, t.shape, strict=True)), **dict(zip(right, other.shape, strict=True))}
    if math.prod(sizes[c] for c in every) > 20 * MOST or math.prod(sizes[c] for c in kept) > MOST or len(kept) > 5:
        return None
    return torch.tanh(torch.einsum(f"{left},{right}->{''.join(kept)}", t, other))


@step
def convolution(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    if t.ndim != 3:
        return None
    groups = rng.choice([g for g in range(1, t.shape[1] + 1) if t.shape[1] % g == 0])
    out = groups * rng.choice([1, 2])
    kernel = rng.choice([1, 3, t.shape[2]])
    return F.conv1d(t, m.weight(rng, out, t.shape[1] // groups, kernel), padding=1 if kernel == 3 else 0, groups=groups)


@step
def attention(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    if t.ndim < 3:
        return None
    k, v = m.partner(rng, t), m.partner(rng, t)
    return None if k is None or v is None else F.scaled_dot_product_attention(t, k, v)


@step
def looked_up_table(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    return F.embedding(t.argmax(-1), m.weight(rng, t.shape[-1], rng.choice(SIZES))) if t.ndim > 1 else None


@step
def chosen_weights(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    if not 1 <= t.ndim <= 3:
        return None
    n, out = rng.choice([2, 3]), rng.choice(SIZES)
    chosen = F.linear(t, m.weight(rng, n, t.shape[-1])).topk(rng.choice([1, 2]), -1).indices
    weights = m.weight(rng, n, out, t.shape[-1])[chosen]
    y = torch.einsum("...koi,...i->...ko", weights, t)
    return y.sum(-2) if rng.random() < 0.5 else y


# -- element by element ------------------------------------------------------------------------------------------------


@step
def unary(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    return rng.choice([torch.tanh, torch.relu, torch.sigmoid, torch.abs, F.gelu, torch.sin, torch.square, torch.round])(
        t
    )


@step
def binary(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    other = m.partner(rng, t)
    if other is None:
        return None
    kind = rng.choice([torch.add, torch.sub, torch.mul, torch.maximum, lambda a, b: torch.where(a > b, a, b * 2)])
    return kind(t, other)


@step
def broadcast(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    """Plus, or times, a weight that has some of the dimensions."""
    dims = [d for d in range(t.ndim) if rng.random() < 0.5]
    weight = m.weight(rng, *(t.shape[d] for d in dims))
    weight = weight.reshape([t.shape[d] if d in dims else 1 for d in range(t.ndim)])
    return t * weight if rng.random() < 0.5 else t + weight


@step
def transposed_sum(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    same = [(i, j) for i in range(t.ndim) for j in range(i) if t.shape[i] == t.shape[j]]
    return t + t.transpose(*rng.choice(same)) * 2 if same else None


@step
def outer(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    return torch.tanh(t)[..., :, None] * rng.choice([t, torch.sigmoid(t)])[..., None, :] if t.ndim else None


@step
def constants(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    if not t.ndim:
        return None
    n = t.shape[-1]
    kind = rng.choice(["ones", "zeros", "arange", "eye", "mask", "one at"])
    if kind == "ones":
        return t * torch.ones(n).expand(t.shape) + torch.zeros_like(t)
    if kind == "zeros":
        return torch.cat([t, torch.zeros(*t.shape[:-1], 2)], -1)
    if kind == "arange":
        return t * torch.arange(n)
    if kind == "eye":
        return t @ (torch.eye(n) + 0.5 * m.weight(rng, n, n))
    if kind == "mask":
        return t.masked_fill(torch.arange(n) >= rng.randrange(1, n + 1), -1.0)
    return t + F.one_hot(torch.tensor(rng.randrange(n)), n)


# -- along dimensions --------------------------------------------------------------------------------------------------


@step
def along(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    d = _dim(rng, t)
    if d is None:
        return None
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda y: y.softmax(d), lambda y: F.normalize(y, dim=d), lambda y: y - y.mean(d, keepdim=True),
        lambda y: y / (1 + y.std(d, keepdim=True, correction=0)), lambda y: y.flip(d), lambda y: y.roll(1, d),
        lambda y: y.cumsum(d), lambda y: y.sort(d).values, lambda y: y * (y == y.amax(d, keepdim=True)),
    ]  # fmt: skip
    return rng.choice(kinds)(t)


@step
def reduced(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    d = _dim(rng, t)
    if d is None or t.ndim < 2:
        return None
    kinds: list[Callable[..., Tensor]] = [torch.mean, torch.sum, torch.amax, torch.logsumexp]
    return rng.choice(kinds)(t, d, keepdim=rng.random() < 0.4)


@step
def normalised(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    if not t.ndim:
        return None
    if t.ndim >= 2 and rng.random() < 0.4:
        groups = rng.choice([g for g in range(1, t.shape[1] + 1) if t.shape[1] % g == 0])
        return F.group_norm(t, groups, m.weight(rng, t.shape[1])) if t[0].numel() > groups else None
    shape = t.shape[-rng.randint(1, min(2, t.ndim)) :]
    return F.layer_norm(t, shape, m.weight(rng, *shape))


# -- moving about ------------------------------------------------------------------------------------------------------


@step
def split_dimension(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    d = _dim(rng, t, 4)
    found = None if d is None else _factors(rng, t.shape[d])
    return None if d is None or found is None else t.unflatten(d, found)


@step
def merged_dimensions(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    if t.ndim < 2:
        return None
    d = rng.randrange(t.ndim - 1)
    return t.flatten(d, d + 1)


@step
def permuted(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    order = list(range(t.ndim))
    rng.shuffle(order)
    return t.permute(order) if t.ndim > 1 else None


@step
def reshaped(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    shape, left = [], t.numel()
    while left > 1:
        n = rng.choice([d for d in range(2, left + 1) if left % d == 0 and (d <= 8 or left > 64)] or [left])
        shape.append(n)
        left //= n
    return t.reshape(shape) if 1 <= len(shape) <= 4 else None


@step
def shuffled(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    d = _dim(rng, t, 4)
    found = None if d is None else _factors(rng, t.shape[d])
    return None if d is None or found is None else t.unflatten(d, found).transpose(d, d + 1).flatten(d, d + 1)


@step
def repeated(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    d = _dim(rng, t)
    if d is None:
        return None
    kinds: list[Callable[[], Tensor]] = [
        lambda: t.repeat_interleave(2, d),
        lambda: t.repeat(*(2 if i == d else 1 for i in range(t.ndim))),
        lambda: t.unsqueeze(d).expand(*t.shape[:d], 3, *t.shape[d:]),
        lambda: t.mean(d, keepdim=True).expand(t.shape),
    ]
    return rng.choice(kinds)()


# -- parts -------------------------------------------------------------------------------------------------------------


@step
def part(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    d = _dim(rng, t)
    if d is None:
        return None
    n = t.shape[d]
    start = rng.randrange(n)
    kinds: list[Callable[[], Tensor]] = [
        lambda: t.narrow(d, start, rng.randint(1, n - start)),
        lambda: t.select(d, start),
        lambda: rng.choice(t.chunk(2, d)),
        lambda: t.transpose(0, d)[rng.randrange(2) :: 2].transpose(0, d),
        lambda: t.index_select(d, torch.tensor([rng.randrange(n) for _ in range(rng.choice([1, 2, n]))])),
    ]
    return rng.choice(kinds)()


@step
def put_together(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    other = rng.choice([t, torch.tanh(t), m.partner(rng, t)])
    if other is None or not t.ndim:
        return None
    d = rng.randrange(t.ndim)
    return torch.stack([t, other], d) if rng.random() < 0.5 else torch.cat([t, other], d)


@step
def parts_apart(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    """Two parts, of which one is changed, together again in either order."""
    d = _dim(rng, t)
    if d is None:
        return None
    at = rng.randrange(1, t.shape[d])
    parts = list(t.split([at, t.shape[d] - at], d))
    parts[0] = torch.relu(parts[0]) * m.weight(rng)
    if rng.random() < 0.3:
        parts.reverse()
    return torch.cat(parts, d)


@step
def gated(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    d = _dim(rng, t)
    if d is None or t.shape[d] % 2:
        return None
    a, b = t.chunk(2, d) if rng.random() < 0.5 else t.unflatten(d, (-1, 2)).unbind(d + 1)
    return a * torch.sigmoid(b)


@step
def padded(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    return F.pad(t, (rng.choice([0, 1, -1]) if t.shape[-1] > 1 else 0, rng.choice([0, 2]))) if t.ndim else None


@step
def windows(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    d = _dim(rng, t, 4)
    return None if d is None else t.unfold(d, 2, rng.choice([1, 2]))


# -- in place ----------------------------------------------------------------------------------------------------------


@step
def written(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    """A copy, zeros, or what was expanded, into a view of which something is written."""
    base = rng.choice([t.clone, lambda: torch.zeros_like(t), lambda: t[:1].expand(t.shape).clone()])() if t.ndim else t
    d = _dim(rng, t)
    if d is None:
        return None
    start = rng.randrange(t.shape[d])
    view = base.narrow(d, start, rng.randint(1, t.shape[d] - start))
    if rng.random() < 0.4:
        e = _dim(rng, view)
        found = None if e is None else _factors(rng, view.shape[e])
        if e is not None and found is not None:
            view = view.unflatten(e, found).select(e + rng.randrange(2), 0)
    if rng.random() < 0.3 and view.ndim > 1:
        view = view.transpose(0, 1)
    how = rng.randrange(6)
    if how == 0:
        view.mul_(m.weight(rng, view.shape[-1]) if view.ndim else 2.0)
    elif how == 1:
        view.copy_(m.weight(rng, *view.shape[-1:]))
    elif how == 2:
        view.add_(view.clone().mean())
    elif how == 3:
        view.fill_(0.5)
    elif how == 4:
        view.relu_()
    else:
        view.copy_(torch.tanh(view.flip(0) if view.ndim else view) + t.flatten()[0])
    return base


@step
def square(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    if not t.ndim or t.shape[-1] > 6:
        return None
    n = t.shape[-1]
    w = m.weight(rng, n, n)
    kinds: list[Callable[[], Tensor]] = [
        lambda: t @ w @ w, lambda: t @ w + t @ w.t(), lambda: t @ (w + w.t()), lambda: t * w.diagonal(),
        lambda: t @ torch.matrix_exp(w - w.t()), lambda: t @ torch.linalg.inv(w @ w.t() + torch.eye(n)),
        lambda: t @ w.tril(), lambda: (t @ w) * w.sum(0) * w.sum(1), lambda: t @ torch.diag_embed(w[0]),
        lambda: t @ w.softmax(0), lambda: t @ torch.cdist(w, w.t()), lambda: t[..., None, :] * w,
    ]  # fmt: skip
    return rng.choice(kinds)()


# -- by index ----------------------------------------------------------------------------------------------------------


@step
def by_index(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    d = _dim(rng, t)
    if d is None:
        return None
    n, other = t.shape[d], m.partner(rng, t)
    other = torch.sin(t) if other is None else other
    order = other.argsort(d)
    first = other.argmax(d, keepdim=True)
    kinds: list[Callable[[], Tensor]] = [
        lambda: t.gather(d, order), lambda: t.gather(d, first).expand(t.shape) + t,
        lambda: torch.zeros_like(t).scatter(d, order, t), lambda: torch.zeros_like(t).scatter_add(d, order, t),
        lambda: t.gather(d, other.topk(2, d).indices), lambda: t.topk(min(2, n), d).values,
        lambda: F.one_hot(first.squeeze(d), n) * 1.5, lambda: t.masked_fill(other > 0, 0.0),
        lambda: t.scatter(d, first, 1.0), lambda: t.gather(d, order.argsort(d)),
        lambda: t * (first == torch.arange(n).reshape([-1 if i == d else 1 for i in range(t.ndim)])),
        lambda: torch.zeros_like(t).index_add(d, torch.arange(n).flip(0), t),
        lambda: t.index_select(d, other.flatten()[:n].argsort()) if other.numel() >= n else t,
        lambda: t.index_select(d, other.movedim(d, 0).flatten(1).sum(1).argsort()) if t.ndim > 1 else t,
    ]  # fmt: skip
    return rng.choice(kinds)()


@step
def numbers(m: RandomProgram, rng: random.Random, t: Tensor) -> Tensor | None:
    """What an index is worth as a number, or as an index of something else."""
    if t.ndim < 2:  # a single index would be read by Python
        return None
    n = t.shape[-1]
    index = rng.choice([t.argmax, t.argmin, lambda d: torch.relu(t).argmax(d), lambda d: (t > 0).long().argmax(d)])(-1)
    kinds: list[Callable[[], Tensor]] = [
        lambda: t * index[..., None], lambda: m.weight(rng, n, 3)[(index + 1) % n], lambda: m.weight(rng, n)[index],
        lambda: m.weight(rng, n, n)[index, index], lambda: t + torch.stack([index, index], -1).sum(-1, keepdim=True),
        lambda: m.weight(rng, n, n).t()[index] * t, lambda: m.weight(rng, n + 1, 2)[index],
        lambda: torch.bincount(index.flatten(), minlength=n)[:n] * t,
    ]  # fmt: skip
    return rng.choice(kinds)()
