"""Modules made of modules that can change places, written as people write them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D = 5


def mlp(hidden: int = 4, inputs: int = D, outputs: int = D) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class Experts(nn.Module):
    """Experts and what routes to them."""

    def __init__(self, count: int = 3, top: int = 2, hidden: int = 4) -> None:
        super().__init__()
        self.count, self.top = count, top
        self.router = nn.Linear(D, count)
        self.experts = nn.ModuleList([mlp(hidden) for _ in range(count)])

    def gates(self, x: Tensor) -> Tensor:
        return self.router(x).softmax(-1)

    def chosen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.gates(x).topk(self.top, -1)
        return weights / weights.sum(-1, keepdim=True), chosen


class SoftSlices(Experts):
    def forward(self, x: Tensor) -> Tensor:
        gates = self.gates(x)
        out = 0
        for i, expert in enumerate(self.experts):
            out = out + gates[..., i : i + 1] * expert(x)
        return out


class SoftUnbind(Experts):
    def forward(self, x: Tensor) -> Tensor:
        gates = self.gates(x).unbind(-1)
        return sum(g.unsqueeze(-1) * expert(x) for g, expert in zip(gates, self.experts, strict=True))


class SoftEinsum(Experts):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("be,bed->bd", self.gates(x), torch.stack([expert(x) for expert in self.experts], 1))


class SoftMatmul(Experts):
    def forward(self, x: Tensor) -> Tensor:
        made = torch.stack([expert(x) for expert in self.experts], -1)
        return (made @ self.gates(x)[..., None]).squeeze(-1)


class TopKWhere(Experts):
    """Mixtral's way."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.chosen(x)
        mask = F.one_hot(chosen, self.count).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            slot, token = torch.where(mask[i])
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class TopKEqual(Experts):
    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.chosen(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == i)
            out[token] += weights[token, slot, None] * expert(x[token])
        return out


class TopKScatter(Experts):
    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.chosen(x)
        gates = torch.zeros(*x.shape[:-1], self.count, dtype=x.dtype).scatter(-1, chosen, weights)
        return sum(gates[..., i, None] * expert(x) for i, expert in enumerate(self.experts))


class TopKGather(Experts):
    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.chosen(x)
        made = torch.stack([expert(x) for expert in self.experts], 1)
        taken = made.gather(1, chosen[..., None].expand(-1, -1, D))
        return (weights[..., None] * taken).sum(1)


class TopKMasked(Experts):
    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        least = scores.topk(self.top, -1).values[..., -1:]
        gates = scores.masked_fill(scores < least, float("-inf")).softmax(-1)
        return sum(gates[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class TopOneWhere(Experts):
    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1, keepdim=True)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = torch.where(chosen == i, expert(x), out)
        return out


class TopOneMasks(Experts):
    """Switch transformers' way."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = chosen == i
            out[mask] = expert(x[mask])
        return out


class Capacity(Experts):
    """At most two tokens for each expert."""

    def forward(self, x: Tensor) -> Tensor:
        hot = F.one_hot(self.router(x).argmax(-1), self.count)
        kept = hot * (hot.cumsum(0) <= 2)
        return sum(kept[:, i, None] * expert(x) for i, expert in enumerate(self.experts))


class ExpertChoice(Experts):
    """Each expert chooses its tokens."""

    def forward(self, x: Tensor) -> Tensor:
        weights, tokens = self.gates(x).t().topk(2, -1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out.index_add_(0, tokens[i], weights[i, :, None] * expert(x[tokens[i]]))
        return out


class SharedExperts(TopKWhere):
    """Routed ones, and two that every token goes to."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.ModuleList([mlp() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + sum(expert(x) for expert in self.shared)


class ManyGates(nn.Module):
    """One set of experts, and for each of two tasks a router and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([mlp() for _ in range(3)])
        self.gates = nn.ModuleList([nn.Linear(D, 3) for _ in range(2)])
        self.heads = nn.ModuleList([nn.Linear(D, 1) for _ in range(2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        made = torch.stack([expert(x) for expert in self.experts], 1)
        mixed = [(gate(x).softmax(-1)[..., None] * made).sum(1) for gate in self.gates]
        return [head(y) for head, y in zip(self.heads, mixed, strict=True)]


class Hierarchical(nn.Module):
    """A router for groups of experts, each with a router of its own."""

    def __init__(self, groups: int = 2, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(D, groups)
        self.groups = nn.ModuleList([SoftSlices(experts) for _ in range(groups)])

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        return sum(gates[:, i, None] * group(x) for i, group in enumerate(self.groups))


class Summed(nn.Module):
    def __init__(self, count: int = 3, hidden: int = 4) -> None:
        super().__init__()
        self.branches = nn.ModuleList([mlp(hidden) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(branch(x) for branch in self.branches)


class Concatenated(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(D, 4) for _ in range(count)])
        self.out = nn.Linear(4 * count, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(torch.cat([branch(x) for branch in self.branches], -1)))


def convolution(inputs: int, outputs: int, size: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class ResNeXtBlock(nn.Module):
    """Branches of 1x1, 3x3 and 1x1 convolutions, added to what came in."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [nn.Sequential(convolution(3, 4, 1), convolution(4, 4), nn.Conv2d(4, 3, 1)) for _ in range(count)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + sum(branch(x) for branch in self.branches))


class InceptionBlock(nn.Module):
    """A 1x1 branch, two equal 3x3 ones, and a pooled one."""

    def __init__(self) -> None:
        super().__init__()
        self.one = convolution(3, 2, 1)
        self.left = nn.Sequential(convolution(3, 4, 1), convolution(4, 5))
        self.right = nn.Sequential(convolution(3, 4, 1), convolution(4, 5))
        self.pooled = convolution(3, 2, 1)
        self.out = nn.Conv2d(14, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(F.max_pool2d(x, 3, 1, 1))
        return self.out(torch.cat([self.one(x), self.left(x), self.right(x), pooled], 1))


class Kernels(nn.Module):
    """Branches of these kernels, averaged, as in HiFi-GAN."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [nn.ModuleList([nn.Conv1d(3, 4, k, padding=k // 2), nn.Conv1d(4, 3, k, padding=k // 2)]) for k in sizes]
        )

    def forward(self, x: Tensor) -> Tensor:
        total = None
        for first, second in self.branches:
            y = second(F.leaky_relu(first(F.leaky_relu(x, 0.1)), 0.1)) + x
            total = y if total is None else total + y
        return total / len(self.branches)


class SelectiveKernels(nn.Module):
    """Branches, weighed for each channel by a softmax over them, as in SK networks."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.branches = nn.ModuleList([convolution(3, 4) for _ in range(count)])
        self.squeeze = nn.Linear(4, 3)
        self.scores = nn.ModuleList([nn.Linear(3, 4) for _ in range(count)])
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.stack([branch(x) for branch in self.branches], 1)
        squeezed = torch.relu(self.squeeze(made.sum(1).mean((-1, -2))))
        weights = torch.stack([score(squeezed) for score in self.scores], 1).softmax(1)
        return self.out((made * weights[..., None, None]).sum(1))


class Head(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, size) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1) @ self.v(x)


class Heads(nn.Module):
    def __init__(self, count: int = 3, size: int = 4) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Head(size) for _ in range(count)])
        self.out = nn.Linear(count * size, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([head(x) for head in self.heads], -1))


class MultiQuery(nn.Module):
    """Queries of each head's own, keys and values of all."""

    def __init__(self, count: int = 3, size: int = 4) -> None:
        super().__init__()
        self.queries = nn.ModuleList([nn.Linear(D, size) for _ in range(count)])
        self.key, self.value = nn.Linear(D, size), nn.Linear(D, size)
        self.out = nn.Linear(count * size, D)

    def forward(self, x: Tensor) -> Tensor:
        keys, values = self.key(x).transpose(-1, -2), self.value(x)
        return self.out(torch.cat([(query(x) @ keys).softmax(-1) @ values for query in self.queries], -1))


class ParallelAttention(nn.Module):
    def __init__(self, count: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.attention = nn.ModuleList([nn.MultiheadAttention(6, heads, batch_first=True) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(a(x, x, x, need_weights=False)[0] for a in self.attention)


class Ensemble(nn.Module):
    """Networks of which `how` makes one result."""

    def __init__(self, how: str, count: int = 3) -> None:
        super().__init__()
        self.how = how
        self.members = nn.ModuleList([mlp(outputs=2) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.how == "product":
            out = 1
            for member in self.members:
                out = out * member(x)
            return out
        made = torch.stack([member(x) for member in self.members])
        if self.how == "mean":
            return made.mean(0)
        if self.how == "mean and deviation":
            return made.mean(0), made.std(0)
        if self.how == "median":
            return made.median(0).values
        if self.how == "sorted":
            return made.sort(0).values
        if self.how == "votes":
            return F.one_hot(made.argmax(-1), 2).sum(0)
        assert self.how == "probabilities"
        return made.softmax(-1).mean(0).log()


class MixtureDensity(nn.Module):
    """Components, each a module with a weight, a mean and a scale; and the density of a target."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.components = nn.ModuleList([mlp(outputs=3) for _ in range(count)])

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        made = torch.stack([component(x) for component in self.components], 1)
        logit, mean, scale = made.unbind(-1)
        density = -0.5 * ((target[:, None] - mean) / scale.exp()) ** 2 - scale
        return torch.logsumexp(logit.log_softmax(1) + density, 1)


class Capsules(nn.Module):
    """Primary capsules, routed by agreement to three others."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.primary = nn.ModuleList([nn.Linear(D, 6) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        votes = torch.stack([p(x).view(-1, 3, 2) for p in self.primary], 1)
        logits = torch.zeros(*votes.shape[:3], dtype=x.dtype)
        out = votes.new_zeros(())
        for _ in range(2):
            out = (logits.softmax(2)[..., None] * votes).sum(1)
            out = out * out.norm(dim=-1, keepdim=True) / (1 + out.square().sum(-1, keepdim=True))
            logits = logits + (votes * out[:, None]).sum(-1)
        return out.norm(dim=-1)


class LSTMEnsemble(nn.Module):
    def __init__(self, count: int = 3, size: int = 4) -> None:
        super().__init__()
        self.members = nn.ModuleList([nn.LSTM(D, size, batch_first=True) for _ in range(count)])
        self.heads = nn.ModuleList([nn.Linear(size, 2) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        return sum(head(m(x)[0][:, -1]) for m, head in zip(self.members, self.heads, strict=True)) / len(self.heads)


class CellEnsemble(nn.Module):
    def __init__(self, count: int = 3, size: int = 4) -> None:
        super().__init__()
        self.size = size
        self.cells = nn.ModuleList([nn.LSTMCell(D, size) for _ in range(count)])
        self.out = nn.Linear(size, 2)

    def forward(self, x: Tensor) -> Tensor:
        states = [(x.new_zeros(len(x), self.size),) * 2 for _ in self.cells]
        for t in range(x.shape[1]):
            states = [cell(x[:, t], state) for cell, state in zip(self.cells, states, strict=True)]
        return self.out(torch.stack([h for h, _ in states]).mean(0))


class LowRankMixture(nn.Module):
    """A layer, and a mixture of low-rank ones added to it."""

    def __init__(self, count: int = 3, rank: int = 2) -> None:
        super().__init__()
        self.base, self.router = nn.Linear(D, D), nn.Linear(D, count)
        self.down = nn.ModuleList([nn.Linear(D, rank, bias=False) for _ in range(count)])
        self.up = nn.ModuleList([nn.Linear(rank, D, bias=False) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        y = self.base(x)
        for i, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            y = y + gates[..., i, None] * up(down(x))
        return y


class MixedEdge(nn.Module):
    """The operations on an edge of a cell that is searched for, some of one kind, each with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = nn.ModuleList([convolution(3, 3), convolution(3, 3), nn.Identity(), nn.AvgPool2d(3, 1, 1)])
        self.weights = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights.softmax(-1)
        return sum(w * operation(x) for w, operation in zip(weights, self.operations, strict=True))


class Cell(nn.Module):
    """Two edges from one node to another."""

    def __init__(self) -> None:
        super().__init__()
        self.edges = nn.ModuleList([MixedEdge() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return sum(edge(x) for edge in self.edges)


class Towers(nn.Module):
    """Two towers of one input, and how like one another they find it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.left, self.right = mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left(x), self.right(x)
        if self.how == "dot":
            return (a * b).sum(-1)
        if self.how == "cosine":
            return F.cosine_similarity(a, b, dim=-1)
        if self.how == "distance":
            return (a - b).abs().sum(-1)
        if self.how == "squares":
            return (a - b).pow(2).sum(-1).sqrt()
        if self.how == "square":
            return torch.square(a - b).mean(-1)
        assert self.how == "norm"
        return (a - b).norm(dim=-1)


class Nested(nn.Module):
    """Branches of branches."""

    def __init__(self, outer: int = 2, inner: int = 3) -> None:
        super().__init__()
        self.outer = nn.ModuleList([Summed(inner) for _ in range(outer)])
        self.maps = nn.ModuleList([nn.Linear(D, 4) for _ in range(outer)])
        self.out = nn.Linear(4, D)

    def forward(self, x: Tensor) -> Tensor:
        made = [torch.tanh(f(branch(x))) for f, branch in zip(self.maps, self.outer, strict=True)]
        return self.out(sum(made))


class StackedState(nn.Module):
    """Networks run at once, their weights one tensor of each kind."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        networks = [mlp() for _ in range(count)]
        state, _ = torch.func.stack_module_state(networks)
        self.names = list(state)
        self.weights = nn.ParameterList([nn.Parameter(state[name].detach()) for name in self.names])
        self.one = [mlp().to("meta")]  # its structure alone

    def forward(self, x: Tensor) -> Tensor:
        def run(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.one[0], weights, (x,))

        return torch.func.vmap(run)(dict(zip(self.names, self.weights, strict=True))).sum(0)


class NumberedParts(nn.Module):
    """A vector for each module, looked up by its number."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.members = nn.ModuleList([mlp() for _ in range(count)])
        self.numbers = nn.Embedding(count, D)

    def forward(self, x: Tensor) -> Tensor:
        numbers = self.numbers(torch.arange(len(self.members)))
        return torch.tanh(torch.stack([m(x) for m in self.members], 1) + numbers).sum(1)


class NormedTogether(nn.Module):
    """Branches side by side, under one normalisation: of all, or of each by itself."""

    def __init__(self, norm: nn.Module, count: int = 3) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(D, 4) for _ in range(count)])
        self.norm = norm
        self.out = nn.Linear(4 * count, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(torch.cat([branch(x) for branch in self.branches], -1)))


class SetOfBranches(nn.Module):
    """Attention among what branches make, and its mean."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.branches = nn.ModuleList([mlp(outputs=6) for _ in range(count)])
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.stack([branch(x) for branch in self.branches], 1)
        return self.attention(made, made, made, need_weights=False)[0].mean(1)


class RegulatedExperts(SoftSlices):
    """Experts that drop, and normalise over the batch, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.3), nn.Linear(4, D))
                for _ in range(self.count)
            ]
        )
