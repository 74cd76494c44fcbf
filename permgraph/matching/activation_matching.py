"""Activation matching: units correspond where they respond alike to the same inputs.

Li, Yosinski, Clune, Lipson & Hopcroft, "Convergent Learning", 2015; Tatro et al., "Optimizing Mode Connectivity via
Neuron Alignment", 2020; Ainsworth, Hayase & Srinivasa, "Git Re-Basin", 2022, section 3.1.
"""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from permgraph.errors import MismatchError, NonFiniteError, PermgraphError, SpecError
from permgraph.matching.matcher import MatchResult, Progress
from permgraph.matching.replay import Replay, Site
from permgraph.matching.weight_matching import WeightMatching
from permgraph.matching.workers import Workers, require_each_once
from permgraph.networks.batches import seeded, to
from permgraph.spec.expressions import Axis, Fixed, refs, size_of
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.weights.state_dict import StateDict

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ActivationMatching:
    """Maximise the agreement between A's activations and B's permuted ones, over the spec's group.

    One pass over the loader accumulates, for every module whose output carries a group, the cross-correlation of each
    unit of A with each of B over all samples and positions. What the best permutation is then no longer depends on the
    other groups: every group is one assignment, and one with others fibred over it a nested one.

    By default the outputs used are those of linear, convolution, normalisation and embedding modules, in the axis
    expression of the weight that makes them; and for groups that none of these carries, as the channels inside a head
    or the weights of a module of your own, every tensor of the forward pass that does and that is more than another
    tensor rearranged. The forward pass is captured for that on the first batch, and replayed for both networks.

    Args:
        loader: batches, as often as asked for: a tensor, a tuple or list whose first item is the input, or a mapping
            of keyword arguments. Use one that gives the same batches each time, in a fixed order.
        measure: "correlation" (Pearson's, each unit counts alike; a unit that never varies correlates with none),
            "covariance" (each counts by how much it varies) or "inner" (mean products: the least-squares objective of
            Git Re-Basin).
        weight: how much the weights themselves count: the objective of `ascent` over the parameters, times this, is
            added. 0 for activations alone.
        max_batches: stop the loader after so many.
        ascent: how to search; its objective and weights apply to the parameters, if `weight` is not 0.
        tensors: "auto", as said above; "modules" for the outputs of modules only; "graph" for every tensor of the
            forward pass that carries a group and is more than another one rearranged, which needs the spec that
            inference gives, and a network whose path does not depend on values.
        max_units: leave out tensors with more units than that: each needs a matrix of as many rows and columns.
        workers: the processes that match together: each gives a loader of its own part of the data, and all of them get
            the result for the whole. accelerate's loaders are such parts with ``even_batches=False``.
        models: the modules, which `align` fills in.

    Example:
        >>> a, b = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), nn.Sequential(
        ...     nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> from permgraph.matching import align
        >>> align(a, b, ActivationMatching([torch.randn(32, 3)])).outcome
        'converged'
    """

    loader: Iterable[Any]
    measure: Literal["correlation", "covariance", "inner"] = "correlation"
    weight: float = 0.0
    max_batches: int | None = None
    ascent: WeightMatching = field(default_factory=WeightMatching)
    tensors: Literal["auto", "modules", "graph"] = "auto"
    max_units: int = 8192
    workers: Workers | None = field(default=None, compare=False)
    models: tuple[nn.Module, nn.Module] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.measure not in ("correlation", "covariance", "inner"):
            raise PermgraphError(f"unknown measure {self.measure!r}; choose 'correlation', 'covariance' or 'inner'")
        if self.tensors not in ("auto", "modules", "graph"):
            raise PermgraphError(f"unknown tensors {self.tensors!r}; choose 'auto', 'modules' or 'graph'")
        if (self.max_batches is not None and self.max_batches < 1) or self.max_units < 1:
            raise PermgraphError(
                f"max_batches={self.max_batches} and max_units={self.max_units}: give 1 or more, or None for all of "
                f"the batches"
            )
        if self.weight < 0:
            raise PermgraphError(f"weight={self.weight}: give 0 for activations alone, or a positive number")
        if self.workers is not None:
            require_each_once(self.loader)

    def with_models(self, model_a: nn.Module, model_b: nn.Module) -> ActivationMatching:
        """The same matcher for these two modules, which it copies before it runs them."""
        return replace(self, models=(model_a, model_b))

    def match(
        self, a: StateDict, b: StateDict, spec: PermutationSpec, seed: int = 0, progress: Progress | None = None
    ) -> MatchResult:
        """Find the permutation of B that brings it to A.

        Raises:
            MismatchError: there are no modules, or they cannot run on a batch, or do not fit the spec.
            NonFiniteError: an activation is NaN or infinite.
            PermgraphError: the loader yields nothing, or a single sample, of which there is no correlation.
        """
        started = time.perf_counter()
        if self.models is None:
            raise MismatchError(
                "ActivationMatching runs the networks: call align() with modules, or with_models() first"
            )
        spec.check(a)
        spec.check(b)
        device = next((p.device for p in self.models[0].parameters()), torch.device("cpu"))
        with seeded(seed, device):
            observed = _observe(self, self.models, a, b, spec)
        grams = observed.grams
        # <A, pi(B)> is the gain of an assignment where A holds the Gram matrix and B the identity: so activations
        # become parameters of a larger spec, and any search over weights serves for them, nested groups included.
        axes: dict[str, tuple[Axis, ...]] = {
            f"output of {name}": (axis, Fixed(len(gram))) for name, (axis, gram) in grams.items()
        }
        ours = {f"output of {name}": gram for name, (_, gram) in grams.items()}
        theirs = {name: torch.eye(len(gram), dtype=gram.dtype, device=gram.device) for name, gram in ours.items()}
        ascent = self.ascent
        if self.weight:
            ascent = replace(ascent, weights=_Scaled(ascent.weights, self.weight, frozenset(spec.axes)))
            if ascent.dtype is None:  # one for weights and activations alike
                floating = {x.dtype for x in (*a.values(), *b.values()) if x.is_floating_point()}
                ascent = replace(ascent, dtype=torch.float64 if floating == {torch.float64} else torch.float32)
            ours, theirs, axes = {**a, **ours}, {**b, **theirs}, {**spec.axes, **axes}
        larger = PermutationSpec(
            dict(spec.groups), axes, aliases=spec.aliases if self.weight else {}, unused=spec.unused
        )
        if isinstance(ascent.init, Permutation):
            ascent = replace(ascent, init=Permutation(larger, _standing(ascent.init, larger)))
        found = ascent.match(ours, theirs, larger, seed, progress)
        unseen = sorted(set(spec.moving) - set(larger.moving))
        notes = (*found.notes, *observed.notes)
        if unseen:
            what = "module output" if self.tensors == "modules" else "tensor that was compared"
            notes = (*notes, f"no {what} carries {', '.join(unseen)}, so they stay as they are")
        for note in observed.notes:
            log.info(note)
        return replace(
            found,
            outcome="interrupted" if observed.interrupted else found.outcome,
            permutation=Permutation(spec, dict(found.permutation.arrays)),
            notes=notes,
            seconds=time.perf_counter() - started,
        )


@dataclass
class _Observed:
    """Gram matrices by what they are of, each with the axis of its units; and what could not be seen."""

    grams: dict[str, tuple[Axis, torch.Tensor]]
    notes: tuple[str, ...]
    interrupted: bool = False


def _observe(
    how: ActivationMatching, models: tuple[nn.Module, nn.Module], a: StateDict, b: StateDict, spec: PermutationSpec
) -> _Observed:
    """Run both networks over the loader once, and compare the units of A with those of B."""
    watched = {} if how.tensors == "graph" else dict(_watched(models[0], spec))
    notes = []
    for name, (axis, _) in list(watched.items()):
        if (units := size_of(axis, spec.groups)) > how.max_units:
            notes.append(f"{name!r} has {units} units, more than max_units={how.max_units}, and is left out")
            del watched[name]
    missing = set(spec.moving) - {group for axis, _ in watched.values() for group in refs(axis)}
    networks = [_Watch(model, state, watched, models[0]) for model, state in zip(models, (a, b), strict=True)]
    found: dict[str, tuple[Axis, _Moments]] = {name: (axis, _Moments()) for name, (axis, _) in watched.items()}
    replay: Replay | None = None
    wanted: dict[int, Site] = {}
    uneven: set[str] = set()

    def see(site: Site, x: torch.Tensor, y: torch.Tensor) -> None:
        if x.shape != y.shape:
            uneven.add(site.name)
        else:
            found.setdefault(site.name, (site.axis, _Moments()))[1].add(x, y)

    batches, interrupted = 0, False
    try:
        with torch.no_grad():
            for batch in how.loader:
                if how.max_batches is not None and batches >= how.max_batches:
                    break
                batches += 1
                if watched:
                    outputs = [network.run(batch, batches) for network in networks]
                    for name in watched:
                        for x, y in zip(outputs[0][name], outputs[1][name], strict=True):
                            found[name][1].add(x, y)
                if batches == 1 and (how.tensors == "graph" or (how.tensors == "auto" and missing)):
                    try:
                        replay = Replay(models, (a, b), spec, _arguments(batch))
                    except PermgraphError as error:
                        if how.tensors == "graph":
                            raise
                        notes.append(f"only the outputs of modules were compared: {error}")
                    else:
                        wanted = {
                            index: site
                            for index, site in replay.sites.items()
                            if (how.tensors == "graph" or site.groups & missing)
                            and size_of(site.axis, spec.groups) <= how.max_units
                        }
                if replay is not None:
                    replay.run(_arguments(batch), batches, wanted, see)
    except KeyboardInterrupt:
        seen = [moments for _, moments in found.values() if moments.count]
        if how.workers is not None or not seen or not all(moments.whole for moments in seen):
            raise  # other processes would wait for this one; or there is nothing to go on with
        interrupted = True
        notes.append(f"interrupted in batch {batches} of the loader: matched by what had been seen")
    if how.workers is not None:
        found, uneven, batches = _over_all(how.workers, found, uneven, batches)
    if not batches:
        raise PermgraphError("the loader yielded no batch: activation matching needs some")
    notes += [f"{name} has as many samples as the weights decide, and is left out" for name in sorted(uneven)]
    grams = {}
    for name, (axis, moments) in found.items():
        if moments.count and name not in uneven:
            gram = moments.gram(how.measure, name)
            if not bool(torch.isfinite(gram).all()):
                raise NonFiniteError(f"an output of {name!r} is NaN or infinite on these inputs")
            grams[name] = (axis, gram.float())
    return _Observed(grams, tuple(notes), interrupted)


def _over_all(
    workers: Workers, found: dict[str, tuple[Axis, _Moments]], uneven: set[str], batches: int
) -> tuple[dict[str, tuple[Axis, _Moments]], set[str], int]:
    """What all processes have observed, each on its part of the data."""
    seen = {name: (axis, moments) for name, (axis, moments) in found.items() if moments.count}
    axes = workers.merge(lambda: {name: axis for name, (axis, _) in seen.items()})
    shifts = workers.merge(
        lambda: {name: [shift.cpu() for shift in moments.shifts] for name, (_, moments) in seen.items()}
    )
    uneven = set(workers.merge(lambda: dict.fromkeys(uneven)))
    batches = sum(workers.merge(lambda: {str(workers.rank): batches}).values())
    whole = {}
    for name in sorted(axes):
        moments = found[name][1] if name in found else _Moments()
        moments.add_up(workers, shifts[name])
        whole[name] = (axes[name], moments)
    return whole, uneven, batches


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as positional and keyword arguments of the network."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (batch[0] if isinstance(batch, Sequence) else batch,), {}


@dataclass(frozen=True)
class _Scaled:
    """The weights of a search, times a factor on the parameters and left alone on activations."""

    weights: Any
    factor: float
    parameters: frozenset[str]

    def __call__(self, name: str, tensor: torch.Tensor) -> Any:
        if name not in self.parameters:
            return 1.0
        weights = {} if self.weights is None else self.weights
        own = weights(name, tensor) if callable(weights) else weights.get(name, 1.0)
        return own * self.factor


def _standing(permutation: Permutation, spec: PermutationSpec) -> dict[str, Any]:
    return {name: array for name, array in permutation.arrays.items() if name in spec.moving}


def _watched(model: nn.Module, spec: PermutationSpec) -> Iterator[tuple[str, tuple[Axis, int]]]:
    """Each module whose output has an axis that moves: its name, that axis's expression, and which dimension it is."""
    for name, module in model.named_modules():
        weight = f"{name}.weight" if name else "weight"
        weight = spec.aliases.get(weight, weight)
        if weight not in spec.axes or not spec.axes[weight]:
            continue
        axes = spec.axes[weight]
        if isinstance(module, nn.Linear | nn.LayerNorm):
            # A LayerNorm over several dimensions has as many at its output's end; only one of a single is one axis.
            found = (axes[0], -1) if isinstance(module, nn.Linear) or len(axes) == 1 else None
        elif isinstance(module, nn.Embedding):
            found = (axes[1], -1)
        elif isinstance(module, nn.modules.conv._ConvTransposeNd):
            found = (axes[1], 1) if module.groups == 1 else None
        elif isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
            found = (axes[0], 1)
        else:
            found = None
        if found is None:
            continue
        try:
            moves = any(o.group in spec.moving for o in spec.layout((found[0], Fixed(1)), name).occurrences)
        except SpecError:  # the axis is fibred over one that stands in another dimension of the weight
            continue
        if moves:
            yield name, found


class _Watch:
    """A copy of a network that keeps the outputs of some of its modules, as (units, samples)."""

    def __init__(
        self, model: nn.Module, state: StateDict, watched: Mapping[str, tuple[Axis, int]], like: nn.Module
    ) -> None:
        self.model = copy.deepcopy(model).eval()
        self.model.load_state_dict(state)
        # Where A is, and as precise, so that one batch serves both.
        there = {**dict(like.named_parameters()), **dict(like.named_buffers())}
        for name, tensor in itertools.chain(self.model.named_parameters(), self.model.named_buffers()):
            if name in there:
                tensor.data = tensor.data.to(there[name])
        self.outputs: dict[str, list[torch.Tensor]] = {}
        for name, (_, dim) in watched.items():
            self.model.get_submodule(name).register_forward_hook(self._hook(name, dim))

    def _hook(self, name: str, dim: int) -> Any:
        def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            self.outputs[name].append(output.detach().movedim(dim, 0).flatten(1))

        return keep

    def run(self, batch: Any, number: int) -> dict[str, list[torch.Tensor]]:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.outputs = {name: [] for name in dict(self.model.named_modules())}
        args, kwargs = _arguments(batch)
        try:
            self.model(*(to(x, device) for x in args), **{key: to(value, device) for key, value in kwargs.items()})
        except Exception as error:
            shape = tuple(getattr(batch[0] if isinstance(batch, Sequence) and batch else batch, "shape", ()))
            raise MismatchError(
                f"the network cannot run on batch {number} of the loader, of shape {shape}: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
        return self.outputs


class _Moments:
    """Running sums over samples of two sets of units, from which correlations follow; float64 after each batch.

    Each unit is shifted by its mean over the first batch, so that no large mean drowns its variance.
    """

    def __init__(self) -> None:
        self.count = 0
        self.whole = True  # false only where an interruption came in the middle of adding

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add a batch: (units, samples) of A and of B."""
        x, y = x.float(), y.float()
        if not self.count:
            self.shifts = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
            zeros = torch.zeros(len(x), dtype=torch.float64, device=x.device)
            self.sums, self.squares = [zeros, zeros.clone()], [zeros.clone(), zeros.clone()]
            self.products = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
        x, y = x - self.shifts[0], y - self.shifts[1]
        product = (x @ y.mT).double()
        sums = [total + z.sum(1).double() for total, z in zip(self.sums, (x, y), strict=True)]
        squares = [total + z.square().sum(1).double() for total, z in zip(self.squares, (x, y), strict=True)]
        self.whole = False
        self.products += product
        self.sums, self.squares, self.count = sums, squares, self.count + x.shape[1]
        self.whole = True

    def add_up(self, workers: Workers, shifts: Sequence[torch.Tensor]) -> None:
        """Make these the sums over all processes, each unit shifted by `shifts` on all of them."""
        if not self.count:
            sizes = [len(shift) for shift in shifts]
            self.shifts = (shifts[0], shifts[1])
            self.sums, self.squares = ([torch.zeros(n, dtype=torch.float64) for n in sizes] for _ in range(2))
            self.products = torch.zeros(sizes[0], sizes[1], dtype=torch.float64)
        to = [shift.to(self.products.device) for shift in shifts]
        x, y = ((mine - other).double()[:, 0] for mine, other in zip(self.shifts, to, strict=True))
        self.products = (
            self.products + torch.outer(x, self.sums[1]) + torch.outer(self.sums[0], y) + self.count * torch.outer(x, y)
        )
        for k, z in enumerate((x, y)):
            self.squares[k] = self.squares[k] + 2 * z * self.sums[k] + self.count * z.square()
            self.sums[k] = self.sums[k] + self.count * z
        self.shifts = (to[0], to[1])
        self.products = workers.sum(self.products)
        self.sums, self.squares = ([workers.sum(z) for z in both] for both in (self.sums, self.squares))
        self.count = int(workers.sum(torch.tensor(self.count)))

    def gram(self, measure: str, name: str) -> torch.Tensor:
        """The agreement of each unit of A (rows) with each of B, by one of the measures of `ActivationMatching`."""
        return {"correlation": self.correlation, "covariance": self.covariance, "inner": self.product}[measure](name)

    def product(self, name: str = "") -> torch.Tensor:
        """The mean of A's activation times B's, for each pair of units."""
        x, y = (shift.double()[:, 0] for shift in self.shifts)
        mean_x, mean_y = (total / self.count for total in self.sums)
        return self.products / self.count + torch.outer(x, mean_y) + torch.outer(mean_x, y) + torch.outer(x, y)

    def covariance(self, name: str) -> torch.Tensor:
        """The covariance of each pair of units."""
        if self.count < 2:
            raise PermgraphError(
                f"the loader gave a single sample for {name!r}: a correlation or covariance needs two or more; "
                f"give more data, or measure='inner'"
            )
        means = [total / self.count for total in self.sums]
        return self.products / self.count - torch.outer(means[0], means[1])

    def correlation(self, name: str) -> torch.Tensor:
        """Pearson's correlation of each pair of units; 0 for a unit that does not vary."""
        covariance = self.covariance(name)
        means = [total / self.count for total in self.sums]
        scale = []
        for mean, square, shift in zip(means, self.squares, self.shifts, strict=True):
            variance = square / self.count - mean.square()
            # What float32 leaves of a unit that is constant is not variance.
            still = variance <= 1e-12 * (square / self.count + shift.double()[:, 0].square())
            scale.append(torch.where(still, 0.0, variance.clamp_min(1e-300).rsqrt()))
        return covariance * torch.outer(scale[0], scale[1])
