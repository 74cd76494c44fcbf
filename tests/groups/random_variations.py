"""Random modules that do other things on other inputs: at other lengths, in training, in a second call, with a flag.

A part takes features (batch, positions, C), and gives the same with C' channels; beside them it gets the arguments of
the call. Of the modules that are chained from such parts and from those of `random_models`, inference sees one input,
and an `Occasion` is another: what the spec says must hold there too.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.groups import random_models
from tests.groups.random_models import ACTIVATIONS, Block

LONGEST = 16
GIVEN = 5  # channels of the tensor that may be given
OF_FOUR_POSITIONS = {random_models.Mixer, random_models.Image, random_models.FusedAttention}
STEADY = [kind for kind in random_models.BLOCKS if kind not in OF_FOUR_POSITIONS]
PARTS: dict[str, list[type[Part]]] = {"": [], "given": [], "steps": [], "second": []}


@dataclass(frozen=True)
class Call:
    """The arguments of a call, besides the features."""

    given: Tensor | None = None
    steps: int = 2
    second: bool = False


class Part(Block):
    """Base of the parts that do other things on other occasions."""

    def forward(self, x: Tensor, call: Call) -> Tensor:
        raise NotImplementedError


def part(argument: str = "") -> Any:
    """Note a part, and the argument of the call on which it depends."""

    def note(kind: type[Part]) -> type[Part]:
        PARTS[argument].append(kind)
        return kind

    return note


def _width(rng: random.Random) -> int:
    return rng.choice([4, 6, 8])


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)


# -- lengths -----------------------------------------------------------------------------------------------------------


@part()
class Positions(Part):
    """A table with a row for each position, cut to the length: in rows, in columns, flat, looked up, or repeated."""

    def build(self, rng: random.Random, width: int) -> None:
        self.how = rng.choice(["rows", "columns", "flat", "looked up", "repeated", "resized", "last", "product"])
        shape = {"columns": (width, LONGEST), "flat": (LONGEST * width,), "repeated": (3, width)}
        self.table = _weight(*shape.get(self.how, (LONGEST, width)))

    def forward(self, x: Tensor, call: Call) -> Tensor:
        n, c = x.shape[1:]
        if self.how == "columns":
            return x + self.table[:, :n].t()
        if self.how == "flat":
            return x + self.table[: n * c].view(n, c)
        if self.how == "looked up":
            return x + F.embedding(torch.arange(n), self.table)
        if self.how == "repeated":
            return x + self.table[torch.arange(n) % 3]
        if self.how == "resized":
            return x + F.interpolate(self.table.t()[None], size=n, mode="linear")[0].t()
        if self.how == "last":
            return x + self.table[-n:]
        return x * self.table[:n].sigmoid()


@part()
class BesideTheText(Part):
    """Learnt tokens before the text, and a table for all of them; they are taken off again, or kept."""

    def build(self, rng: random.Random, width: int) -> None:
        self.tokens, self.table = _weight(rng.choice([1, 2]), width), _weight(LONGEST + 2, width)
        self.keep, self.mix = rng.random() < 0.4, nn.Linear(width, width)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        y = torch.cat([self.tokens.expand(len(x), -1, -1), x], 1)
        y = y + self.table[: y.shape[1]]
        y = torch.tanh(self.mix(y) + y.mean(1, keepdim=True))
        return x + y[:, : x.shape[1]] if self.keep else y[:, len(self.tokens) :]


@part()
class OfEachPosition(Part):
    """A layer or a parameter of its own for each position; the last one for all beyond, or all over again."""

    def build(self, rng: random.Random, width: int) -> None:
        self.how, self.over = rng.choice(["list", "dictionary", "parameters", "bank"]), rng.random() < 0.5
        self.count = rng.choice([2, 5, 7])
        if self.how == "list":
            self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(self.count))
        elif self.how == "dictionary":
            self.maps = nn.ModuleDict({f"p{i}": nn.Linear(width, width) for i in range(self.count)})
        elif self.how == "parameters":
            self.maps = nn.ParameterList(_weight(width, width) for _ in range(self.count))
        else:
            self.maps = _weight(self.count, width, width)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        made = []
        for t in range(x.shape[1]):
            at = t % self.count if self.over else min(t, self.count - 1)
            chosen: Any = self.maps[f"p{at}"] if self.how == "dictionary" else self.maps[at]
            made.append(chosen(x[:, t]) if isinstance(chosen, nn.Module) else x[:, t] @ chosen)
        return torch.tanh(torch.stack(made, 1))


@part()
class FromAFirstState(Part):
    """A recurrence over the positions, whose first state is zeros, ones, a buffer, a weight or the first position."""

    def build(self, rng: random.Random, width: int) -> None:
        self.out = _width(rng)
        self.first = rng.choice(["zeros", "ones", "buffer", "weight", "position"])
        self.cell = rng.choice(["plain", "gru", "joined", "gated"])
        self.every = rng.choice([1, 1, 2, 3])
        if self.cell == "gru":
            self.gru = nn.GRUCell(width, self.out)
        elif self.cell == "joined":
            self.joined = nn.Linear(width + self.out, self.out)
        else:
            self.into, self.state = nn.Linear(width, self.out), nn.Linear(self.out, self.out)
        if self.first == "buffer":
            self.register_buffer("start", torch.randn(self.out))
        elif self.first == "weight":
            self.start = _weight(self.out)
        elif self.first == "position":
            self.begin = nn.Linear(width, self.out)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        made = {"zeros": torch.zeros, "ones": torch.ones}.get(self.first)
        if made is not None:
            h = made(len(x), self.out, dtype=x.dtype)
        else:
            h = self.begin(x[:, 0]) if self.first == "position" else self.start.expand(len(x), -1)
        states = []
        for number, t in enumerate(x.unbind(1)):
            if self.cell == "gru":
                h = self.gru(t, h)
            elif self.cell == "joined":
                h = torch.tanh(self.joined(torch.cat([t, h], -1)))
            else:
                new = self.into(t)
                if (number + 1) % self.every == 0:
                    new = new + self.state(h * torch.sigmoid(new) if self.cell == "gated" else h)
                h = torch.tanh(new)
            states.append(h)
        return torch.stack(states, 1)


@part()
class PaddedToEven(Part):
    """Pairs of neighbours become one; a text of odd length is padded before, with zeros, its last or a learnt one."""

    def build(self, rng: random.Random, width: int) -> None:
        self.how = rng.choice(["zeros", "last", "learnt"])
        self.map = nn.Linear(2 * width, width)
        if self.how == "learnt":
            self.token = _weight(width)
        self.inner_first = rng.random() < 0.5

    def forward(self, x: Tensor, call: Call) -> Tensor:
        b, n, c = x.shape
        y = x
        if n % 2:
            more = self.token.expand(b, 1, c) if self.how == "learnt" else x[:, -1:] * (self.how == "last")
            y = torch.cat([x, more], 1)
        pairs = y.reshape(b, -1, 2, c)
        pairs = pairs.transpose(2, 3).flatten(2) if self.inner_first else pairs.flatten(2)
        return torch.tanh(self.map(pairs)).repeat_interleave(2, 1)[:, :n]


@part()
class Windows(Part):
    """Windows of three positions, padded, with a table for the places in each; shifted windows where there are two."""

    def build(self, rng: random.Random, width: int) -> None:
        self.table, self.mix, self.shift = _weight(3, width), nn.Linear(3, 3), rng.random() < 0.5

    def forward(self, x: Tensor, call: Call) -> Tensor:
        b, n, c = x.shape
        y = F.pad(x, (0, 0, 0, -n % 3))
        if self.shift and y.shape[1] > 3:
            y = y.roll(-1, 1)
        y = y.reshape(b, -1, 3, c) + self.table
        y = self.mix(y.transpose(2, 3)).transpose(2, 3).reshape(b, -1, c)
        return x + torch.tanh(y[:, :n])


@part()
class Pyramid(Part):
    """Halves the length as long as it can, a layer for each level; what is left is added at every position."""

    def build(self, rng: random.Random, width: int) -> None:
        self.levels = nn.ModuleList(nn.Conv1d(width, width, 3, 2, 1) for _ in range(5))
        self.least, self.act = rng.choice([1, 2]), rng.choice(ACTIVATIONS)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        y, level = x.transpose(1, 2), 0
        while y.shape[-1] > self.least and level < 5:
            y, level = self.act(self.levels[level](y)), level + 1
        return x + y.mean(-1)[:, None]


@part()
class Pooled(Part):
    """A few places are pooled and flattened into one layer; of a map as small as that nothing is pooled."""

    def build(self, rng: random.Random, width: int) -> None:
        self.places, self.how = rng.choice([1, 2, 4]), rng.choice(["average", "maximum", "first", "padded"])
        self.map, self.squeeze = nn.Linear(self.places * width, width), rng.random() < 0.3

    def forward(self, x: Tensor, call: Call) -> Tensor:
        y = x.transpose(1, 2)
        if self.how == "average":
            y = F.adaptive_avg_pool1d(y, self.places)
        elif self.how == "maximum":
            y = F.adaptive_max_pool1d(y, self.places)
        elif self.how == "first" and y.shape[-1] >= self.places:
            y = y[..., : self.places]
        else:
            y = F.pad(y, (0, max(0, self.places - y.shape[-1])))[..., -self.places :]
        y = torch.tanh(self.map(y.flatten(1)))
        return x + (y.unsqueeze(1).squeeze() if self.squeeze and len(x) > 1 else y)[:, None]


@part()
class Distances(Part):
    """Attention with a learnt bias for each distance, in heads; distances that are too long count as the longest."""

    def build(self, rng: random.Random, width: int) -> None:
        self.heads, self.longest = rng.choice([1, 2]), rng.choice([2, 4, LONGEST])
        self.bias, self.into = _weight(2 * self.longest + 1, self.heads), nn.Linear(width, 3 * 4 * self.heads)
        self.back, self.causal = nn.Linear(4 * self.heads, width), rng.random() < 0.3
        self.in_pieces = rng.random() < 0.3

    def forward(self, x: Tensor, call: Call) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.into(x).view(b, n, 3, self.heads, 4).permute(2, 0, 3, 1, 4)
        far = (torch.arange(n)[:, None] - torch.arange(n)).clamp(-self.longest, self.longest) + self.longest
        scores = q @ k.transpose(-1, -2) + self.bias[far].permute(2, 0, 1)
        if self.causal and n > 1:
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -1e4)
        weights = scores.softmax(-1)
        if self.in_pieces:
            y = torch.cat([weights[:, :, i : i + 3] @ v for i in range(0, n, 3)], 2)
        else:
            y = weights @ v
        return x + self.back(y.transpose(1, 2).flatten(2))


@part()
class LongOnes(Part):
    """Long texts go another way, with layers of their own."""

    def build(self, rng: random.Random, width: int) -> None:
        self.short, self.long, self.long_norm = nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width)
        self.limit, self.both = rng.choice([4, 4, 4, 5]), rng.random() < 0.5

    def forward(self, x: Tensor, call: Call) -> Tensor:
        if x.shape[1] <= self.limit:
            return torch.tanh(self.short(x))
        y = torch.tanh(self.long(self.long_norm(x)))
        return y + self.short(x) if self.both else y


@part()
class Transposed(Part):
    """A map over the positions is made from a weight that is cut to the length on both sides."""

    def build(self, rng: random.Random, width: int) -> None:
        self.over, self.causal = _weight(LONGEST, LONGEST), rng.random() < 0.5
        self.scale = nn.Parameter(torch.randn(LONGEST, 1))

    def forward(self, x: Tensor, call: Call) -> Tensor:
        n = x.shape[1]
        over = self.over[:n, :n]
        return x + torch.tanh((over.tril() if self.causal else over) @ x) * self.scale[:n]


@part()
class OfTheBatch(Part):
    """Statistics over the batch where it is one, as the deviation in the last layers of some discriminators."""

    def build(self, rng: random.Random, width: int) -> None:
        self.map, self.groups = nn.Linear(width + 1, width), rng.choice([1, 2])

    def forward(self, x: Tensor, call: Call) -> Tensor:
        spread = x.std(0, correction=0).mean() if len(x) > 1 else x.new_zeros(())
        return torch.tanh(self.map(torch.cat([x, spread.expand(*x.shape[:2], 1)], -1)))


# -- modes and calls ---------------------------------------------------------------------------------------------------


@part()
class InOneMode(Part):
    """Training alone, or evaluation alone, runs a layer."""

    def build(self, rng: random.Random, width: int) -> None:
        self.how = rng.choice(["residual", "twice", "turned", "norm", "scale"])
        self.map, self.when = nn.Linear(width, width), rng.random() < 0.5
        if self.how == "norm":
            self.norm = nn.LayerNorm(width)
        elif self.how == "scale":
            self.scale = _weight(width)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        if self.training is self.when:
            if self.how == "residual":
                return x + torch.tanh(self.map(x))
            if self.how == "twice":
                return torch.tanh(self.map(torch.tanh(self.map(x))))
            if self.how == "turned":
                return torch.tanh(x @ self.map.weight)
            return self.norm(x) if self.how == "norm" else x * self.scale
        return torch.tanh(self.map(x)) if self.how in ("turned", "norm", "scale") else x


@part()
class Statistics(Part):
    """What is counted in training, and used in evaluation."""

    def build(self, rng: random.Random, width: int) -> None:
        self.own, self.map = rng.random() < 0.5, nn.Linear(width, width)
        if self.own:
            self.register_buffer("mean", torch.randn(width))
        else:
            self.norm = nn.BatchNorm1d(width, affine=rng.random() < 0.5)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        y = self.map(x)
        if not self.own:
            return self.norm(y.transpose(1, 2)).transpose(1, 2)
        if self.training:
            mean = y.mean((0, 1))
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * mean)
            return y - mean
        return y - self.mean


@part()
class KeptState(Part):
    """What is kept for the next call: of the features, of what a layer made of them, or how many calls there were."""

    def build(self, rng: random.Random, width: int) -> None:
        self.how = rng.choice(["mean", "through a map", "buffer", "every second", "counted", "list"])
        self.map = nn.Linear(width, width)
        if self.how != "mean":
            self.back = nn.Linear(width, width)
        self.calls, self.kept, self.past = 0, None, []
        if self.how == "buffer":
            self.register_buffer("state", torch.zeros(width), persistent=rng.random() < 0.5)
        elif self.how == "counted":
            self.register_buffer("number", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, call: Call) -> Tensor:
        y = torch.tanh(self.map(x))
        if self.how == "every second":
            self.calls += 1
            return y + torch.tanh(self.back(x)) if self.calls % 2 == 0 else y
        if self.how == "counted":
            self.number += 1
            return y + torch.tanh(self.back(x)) * (self.number % 2 == 0)
        if self.how == "buffer":
            z = y + self.back(self.state)
            self.state = y.mean((0, 1)).detach()
            return z
        if self.how == "list":
            z = y + self.back(torch.stack(self.past).mean(0)) if self.past else y
            self.past.append(y.mean((0, 1)).detach())
            return z
        z = y if self.kept is None else y + (self.back(self.kept) if self.how == "through a map" else self.kept)
        self.kept = (x if self.how == "through a map" else y).mean((0, 1)).detach()
        return z


@part()
class MadeOnce(Part):
    """What the first call makes for all later ones: a scale from its features, or a table as long as was needed."""

    def build(self, rng: random.Random, width: int) -> None:
        self.how, self.map = rng.choice(["scale", "table"]), nn.Linear(width, width)
        self.made = None

    def forward(self, x: Tensor, call: Call) -> Tensor:
        y = self.map(x)
        if self.how == "scale":
            if self.made is None:
                self.made = 1 / (1 + y.detach().abs().mean((0, 1)))
            return y * self.made
        if self.made is None or len(self.made) < x.shape[1]:
            self.made = torch.arange(x.shape[1], dtype=x.dtype)[:, None].cos()
        return torch.tanh(y) * self.made[: x.shape[1]]


# -- values ------------------------------------------------------------------------------------------------------------


@part()
class ChosenByValues(Part):
    """One expert for all, or one for each text, held in a list; chosen by what comes in."""

    def build(self, rng: random.Random, width: int) -> None:
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(rng.choice([2, 3])))
        self.gate, self.each = nn.Linear(width, len(self.experts)), rng.random() < 0.5

    def forward(self, x: Tensor, call: Call) -> Tensor:
        scores = self.gate(x.mean(1))
        if self.each:
            return torch.stack([self.experts[int(s.argmax())](t) for s, t in zip(scores, x, strict=True)])
        return torch.tanh(self.experts[int(scores.mean(0).argmax())](x))


@part()
class EarlyExit(Part):
    """A layer that is left out where the features are large, or a loop that ends where they are small."""

    def build(self, rng: random.Random, width: int) -> None:
        self.map, self.more, self.loop = nn.Linear(width, width), nn.Linear(width, width), rng.random() < 0.5

    def forward(self, x: Tensor, call: Call) -> Tensor:
        y = torch.tanh(self.map(x))
        if self.loop:
            for _ in range(3):
                if y.mean() < 0:
                    break
                y = torch.tanh(self.more(y))
            return y
        return y if y.mean() > 0 else y + torch.tanh(self.more(x))


# -- arguments ---------------------------------------------------------------------------------------------------------


@part("second")
class BehindAFlag(Part):
    def build(self, rng: random.Random, width: int) -> None:
        self.how, self.map = rng.choice(["more", "instead", "turned"]), nn.Linear(width, width)
        if self.how == "instead":
            self.other = _weight(width)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        if call.second:
            if self.how == "turned":
                return torch.tanh(x @ self.map.weight)
            return x + torch.tanh(self.map(x)) if self.how == "more" else x * self.other
        return x if self.how == "more" else torch.tanh(self.map(x))


@part("given")
class IfGiven(Part):
    """What is made of another tensor, where there is one: a scale, keys and values, or one more summand."""

    def build(self, rng: random.Random, width: int) -> None:
        self.how, self.take = rng.choice(["scale", "attention", "sum", "else"]), nn.Linear(GIVEN, width)
        if self.how == "attention":
            self.query = nn.Linear(width, width)
        elif self.how == "else":
            self.absent = _weight(width)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        if call.given is None:
            return x + self.absent if self.how == "else" else x
        y = self.take(call.given)
        if self.how == "attention":
            return x + (self.query(x) @ y.transpose(1, 2)).softmax(-1) @ y
        y = y.mean(1, keepdim=True)
        return x * y.sigmoid() if self.how == "scale" else x + y


@part("steps")
class ManySteps(Part):
    """A layer that is repeated as often as is said, or one for each time, with a table of the times."""

    def build(self, rng: random.Random, width: int) -> None:
        self.how = rng.choice(["one", "each", "table", "two in turn", "from zeros"])
        count = {"each": 6, "two in turn": 2}.get(self.how, 1)
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        if self.how == "table":
            self.table = _weight(6, width)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        h = torch.zeros_like(x) if self.how == "from zeros" else x
        for i in range(call.steps):
            at = {"each": i % 6, "two in turn": i % 2}.get(self.how, 0)
            y = self.maps[at](h + self.table[i % 6] if self.how == "table" else h)
            h = torch.tanh(y + x) if self.how == "from zeros" else h + torch.tanh(y)
        return h


# -- modules and occasions ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Occasion:
    """Another call than inference saw."""

    x: Tensor
    arguments: dict[str, Any]
    training: bool
    calls: int

    def outputs(self, model: nn.Module, state: dict[str, Tensor]) -> Tensor:
        """What the last of the calls gives, with these weights; the model itself stays as it is."""
        model = copy.deepcopy(model).double().train(self.training)
        model.load_state_dict(state)
        arguments = {n: v.double() if isinstance(v, Tensor) else v for n, v in self.arguments.items()}
        with torch.no_grad():
            return [model(self.x.double(), **arguments) for _ in range(self.calls)][-1]

    def __str__(self) -> str:
        given = {n: tuple(v.shape) if isinstance(v, Tensor) else v for n, v in self.arguments.items()}
        return f"{tuple(self.x.shape)} {given} {'training' if self.training else 'evaluation'}, {self.calls} calls"


class Varied(nn.Module):
    """A chain of parts, determined by its seed."""

    def __init__(self, rng: random.Random, argument: str) -> None:
        super().__init__()
        width = _width(rng)
        self.embed, self.parts = nn.Linear(3, width), nn.ModuleList()
        kinds = PARTS[""] + 5 * PARTS[argument] if argument else PARTS[""]
        chosen = [rng.choice(kinds) for _ in range(rng.choice([1, 2, 3]))]
        chosen += [rng.choice(STEADY) for _ in range(rng.choice([0, 1, 2]))]
        rng.shuffle(chosen)
        for kind in chosen:
            if not 2 <= width <= 24:
                self.parts.append(random_models.Dense(rng, width))
                width = self.parts[-1].out
            self.parts.append(kind(rng, width))
            width = self.parts[-1].out
        self.head, self.pooled = nn.Linear(width, 2), rng.random() < 0.3

    def run(self, x: Tensor, call: Call) -> Tensor:
        x = self.embed(x)
        for each in self.parts:
            x = each(x, call) if isinstance(each, Part) else each(x)
        return self.head(x.mean(1) if self.pooled else x)

    def trace(self) -> list[str]:
        return [f"{type(each).__name__} {getattr(each, 'how', '')}".strip() for each in self.parts]


class Plain(Varied):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, Call())


class WithSteps(Varied):
    def forward(self, x: Tensor, steps: int = 2) -> Tensor:
        return self.run(x, Call(steps=steps))


class WithFlag(Varied):
    def forward(self, x: Tensor, second: bool = False) -> Tensor:
        return self.run(x, Call(second=second))


class WithTensor(Varied):
    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        return self.run(x, Call(given=given))


CLASSES = {"": Plain, "steps": WithSteps, "second": WithFlag, "given": WithTensor}


def random_variation(seed: int) -> tuple[Varied, Tensor, Occasion]:
    """A module in evaluation mode, the input from which its spec is to be inferred, and another occasion."""
    rng = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        argument = rng.choice(["", "", "", "steps", "second", "given"])
        model = CLASSES[argument](rng, argument).eval()
        length = rng.choice([4, 4, 5, 6, 8])
        longer = length + rng.choice([0, 0, 1, 2, 3, 5])
        x, other = torch.randn(2, length, 3), torch.randn(rng.choice([2, 3, 5]), longer, 3)
        values = {"steps": rng.choice([1, 3, 4, 6]), "second": True, "given": torch.randn(len(other), 3, GIVEN)}
        arguments = {argument: values[argument]} if argument and rng.random() < 0.8 else {}
        return model, x, Occasion(other, arguments, rng.random() < 0.4, rng.choice([1, 1, 2, 3]))
