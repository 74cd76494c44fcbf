"""Activation matching: units correspond where they respond alike to the same inputs.

Li, Yosinski, Clune, Lipson & Hopcroft, "Convergent Learning", 2015; Tatro et al., "Optimizing Mode Connectivity via
Neuron Alignment", 2020; Ainsworth, Hayase & Srinivasa, "Git Re-Basin", 2022, section 3.1.
"""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from permgraph.conventions.choices import require_choice
from permgraph.conventions.renamed import renamed
from permgraph.errors import EvaluationError, NonFiniteError, PermgraphError, SpecError
from permgraph.matching.matcher import Matcher, MatchResult, Progress
from permgraph.matching.moments import Moments
from permgraph.matching.replay import Replay, Site
from permgraph.matching.threads import on_free_cores
from permgraph.matching.weight_matching import WeightMatching
from permgraph.matching.workers import Workers, require_each_once
from permgraph.networks.batches import NO_BATCH, Loader, fitting, seeded, to
from permgraph.networks.stacked_module import StackedModule
from permgraph.spec.expressions import Axis, Fixed, Product, refs, size_of
from permgraph.spec.general import Action
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.stacks import dimensions, places
from permgraph.weights.state_dict import StateDict, is_continuous

log = logging.getLogger(__name__)


@renamed(ascent="matcher")
@dataclass(frozen=True)
class ActivationMatching(Matcher):
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
        weight: how much the weights themselves count: the objective of `matcher` over the parameters, times this, is
            added. 0 for activations alone.
        max_batches: stop the loader after so many.
        matcher: how to search; its objective and weights apply to the parameters, if `weight` is not 0.
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

    general: ClassVar[bool] = True

    loader: Loader
    measure: Literal["correlation", "covariance", "inner"] = "correlation"
    weight: float = 0.0
    max_batches: int | None = None
    matcher: WeightMatching = field(default_factory=WeightMatching)
    tensors: Literal["auto", "modules", "graph"] = "auto"
    max_units: int = 8192
    workers: Workers | None = field(default=None, compare=False)
    models: tuple[nn.Module, nn.Module] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require_choice("measure", self.measure, "correlation", "covariance", "inner")
        require_choice("tensors", self.tensors, "auto", "modules", "graph")
        if (self.max_batches is not None and self.max_batches < 1) or self.max_units < 1:
            raise PermgraphError(
                f"max_batches={self.max_batches} and max_units={self.max_units}: give 1 or more, or None for all of "
                f"the batches"
            )
        if self.weight < 0:
            raise PermgraphError(f"weight={self.weight}: give 0 for activations alone, or a positive number")
        if self.workers is not None:
            require_each_once(self.loader)

    @property
    def needs_models(self) -> bool:
        """It does."""
        return True

    def with_models(self, model_a: nn.Module, model_b: nn.Module) -> ActivationMatching:
        """The same matcher for these two modules, which it copies before it runs them."""
        return replace(self, models=(model_a, model_b))

    @on_free_cores
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
        self.require_fit(spec, a, b)
        assert self.models is not None
        device = next((p.device for p in self.models[0].parameters()), torch.device("cpu"))
        with seeded(seed, device):
            observed = _observe(self, self.models, a, b, spec)
        if spec.general is not None:
            from permgraph.matching.general.activations import match_observed

            return match_observed(self, observed, a, b, spec, seed, progress, started)
        grams = {name: (site.axis, observed.gram(name, self.measure).float()) for name, site in observed.sites.items()}
        # <A, pi(B)> is the gain of an assignment where A holds the Gram matrix and B the identity: so activations
        # become parameters of a larger spec, and any search over weights serves for them, nested groups included.
        axes: dict[str, tuple[Axis, ...]] = {
            f"output of {name}": (axis, Fixed(len(gram))) for name, (axis, gram) in grams.items()
        }
        ours = {f"output of {name}": gram for name, (_, gram) in grams.items()}
        theirs = {name: torch.eye(len(gram), dtype=gram.dtype, device=gram.device) for name, gram in ours.items()}
        matcher = self.matcher
        if self.weight:
            matcher = replace(matcher, weights=_Scaled(matcher.weights, self.weight, frozenset(spec.axes)))
            if matcher.dtype is None:  # one for weights and activations alike
                floating = {x.dtype for x in (*a.values(), *b.values()) if is_continuous(x)}
                exact = floating <= {torch.float64, torch.complex128}
                matcher = replace(matcher, dtype=torch.float64 if exact else torch.float32)
            ours, theirs, axes = {**a, **ours}, {**b, **theirs}, {**spec.axes, **axes}
        larger = PermutationSpec(
            dict(spec.groups), axes, aliases=spec.aliases if self.weight else {}, unused=spec.unused
        )
        if isinstance(matcher.init, Permutation):
            init = {name: array for name, array in matcher.init.arrays.items() if name in larger.moving}
            matcher = replace(matcher, init=Permutation(larger, init))
        result = matcher.match(ours, theirs, larger, seed, progress)
        unseen = sorted(set(spec.moving) - set(larger.moving))
        notes = (*result.notes, *observed.notes)
        if unseen:
            what = "module output" if self.tensors == "modules" else "tensor that was compared"
            notes = (*notes, f"no {what} carries {', '.join(unseen)}, so they stay as they are")
        for note in observed.notes:
            log.info(note)
        return replace(
            result,
            outcome="interrupted" if observed.interrupted else result.outcome,
            permutation=Permutation(spec, dict(result.permutation.arrays)),
            notes=notes,
            seconds=time.perf_counter() - started,
        )


@dataclass(frozen=True)
class Watched:
    """A module whose output is compared.

    Attributes:
        axis: the expression of its units.
        dim: which dimension of the output they are.
        parameter, of: the parameter, and its dimension, that has these units.
        gain: whether that parameter is a gain, by which the output was multiplied.
        parts: the modules whose outputs, side by side, are the units, where it is a stack of several.
        above: the dimensions of the parameter along which these modules lie.
    """

    axis: Axis
    dim: int
    parameter: str
    of: int = 0
    gain: bool = False
    parts: tuple[str, ...] = ()
    above: int = 0


@dataclass
class Observed:
    """What both networks were seen to do, by what it is of; and what could not be seen.

    Attributes:
        sites: for each name the units' axis and the sums over samples; where a module was watched, it too.
        notes: what was left out, in sentences.
        interrupted: whether Ctrl-C ended it early.
    """

    sites: dict[str, SeenSite]
    notes: tuple[str, ...]
    interrupted: bool = False

    def gram(self, name: str, measure: str) -> torch.Tensor:
        """The agreement of A's units with B's.

        Raises:
            NonFiniteError: an activation was NaN or infinite.
        """
        return self._finite(name, self.sites[name].moments.gram(measure, name))

    def gram_of_vectors(self, name: str) -> torch.Tensor:
        """The covariance of A's units with B's, over the lengths of both: what does not hang on one basis of them."""
        moments = self.sites[name].moments
        sizes = [variance.clamp_min(0).sum() for variance in moments.variances()]
        scale = (sizes[0] * sizes[1]).clamp_min(1e-300).rsqrt()
        return self._finite(name, moments.covariance(name) * scale)

    def _finite(self, name: str, gram: torch.Tensor) -> torch.Tensor:
        if not bool(torch.isfinite(gram).all()):
            raise NonFiniteError(f"an output of {name!r} is NaN or infinite on these inputs")
        return gram


@dataclass(frozen=True)
class SeenSite:
    """The axis of some units, the sums over their samples, and the module that was watched; None for other tensors."""

    axis: Axis
    moments: Moments
    watched: Watched | None


def _observe(
    settings: ActivationMatching, models: tuple[nn.Module, nn.Module], a: StateDict, b: StateDict, spec: PermutationSpec
) -> Observed:
    """Run both networks over the loader once, and compare the units of A with those of B."""
    watched = {} if settings.tensors == "graph" else dict(_watched(models[0], spec))
    notes = []
    for name, seen_module in list(watched.items()):
        if (units := size_of(seen_module.axis, spec.groups)) > settings.max_units:
            notes.append(f"{name!r} has {units} units, more than max_units={settings.max_units}, and is left out")
            del watched[name]
    missing = set(spec.moving) - {group for module in watched.values() for group in refs(module.axis)}
    if spec.general is not None:
        # How the matrices and signs of a group act on a tensor between modules, no parameter says.
        missing = {name for name in missing if not (g := spec.groups[name].structure).linear and not g.signs}
    networks = [_Watch(model, state, watched, models[0]) for model, state in zip(models, (a, b), strict=True)]
    found: dict[str, tuple[Axis, Moments]] = {name: (module.axis, Moments()) for name, module in watched.items()}
    replay: Replay | None = None
    wanted: dict[int, Site] = {}
    uneven: set[str] = set()

    def see(site: Site, x: torch.Tensor, y: torch.Tensor) -> None:
        if x.shape != y.shape:
            uneven.add(site.name)
        else:
            found.setdefault(site.name, (site.axis, Moments()))[1].add(x, y)

    seen_batches, interrupted = 0, False
    try:
        with torch.no_grad():
            for number, batch in enumerate(settings.loader, start=1):
                if settings.max_batches is not None and number > settings.max_batches:
                    break
                seen_batches = number
                if watched:
                    outputs = [network.run(batch, number) for network in networks]
                    for name, module in watched.items():
                        seen_of = [_side_by_side(module.parts or (name,), own) for own in outputs]
                        if any(each is None for each in seen_of):
                            uneven.add(name)
                            continue
                        for x, y in zip(*seen_of, strict=True):
                            found[name][1].add(x, y)
                wants_graph = settings.tensors == "graph" or (settings.tensors == "auto" and missing)
                if number == 1 and wants_graph and not isinstance(models[0], StackedModule):
                    try:
                        replay = Replay(models, (a, b), spec, _arguments(batch))
                    except PermgraphError as error:
                        if settings.tensors == "graph":
                            raise
                        notes.append(f"only the outputs of modules were compared: {error}")
                    else:
                        wanted = {
                            index: site
                            for index, site in replay.sites.items()
                            if (settings.tensors == "graph" or site.groups & missing)
                            and size_of(site.axis, spec.groups) <= settings.max_units
                        }
                if replay is not None:
                    replay.run(_arguments(batch), number, wanted, see)
    except KeyboardInterrupt:
        seen = [moments for _, moments in found.values() if moments.count]
        if settings.workers is not None or not seen or not all(moments.whole for moments in seen):
            raise  # other processes would wait for this one; or there is nothing to go on with
        interrupted = True
        notes.append(f"interrupted in batch {seen_batches} of the loader: matched by what had been seen")
    if settings.workers is not None:
        found, uneven, seen_batches = _over_all(settings.workers, found, uneven, seen_batches)
    if not seen_batches:
        raise EvaluationError(NO_BATCH)
    notes += [f"{name} has as many samples as the weights decide, and is left out" for name in sorted(uneven)]
    if replay is None and isinstance(models[0], StackedModule):
        notes.append("of modules that change places the outputs of modules alone were compared")
    sites = {
        name: SeenSite(axis, moments, watched.get(name))
        for name, (axis, moments) in found.items()
        if moments.count and name not in uneven
    }
    return Observed(sites, tuple(notes), interrupted)


def _over_all(
    workers: Workers, found: dict[str, tuple[Axis, Moments]], uneven: set[str], batches: int
) -> tuple[dict[str, tuple[Axis, Moments]], set[str], int]:
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
        moments = found[name][1] if name in found else Moments()
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


def _side_by_side(names: Sequence[str], outputs: Mapping[str, list[torch.Tensor]]) -> list[torch.Tensor] | None:
    """What several modules gave, each time that they ran, as that of one; None if they saw other numbers of samples."""
    calls = [outputs[name] for name in names]
    if len({tuple(x.shape[1:] for x in own) for own in calls}) > 1:
        return None
    return [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*calls, strict=True)]


def _modules(model: nn.Module, spec: PermutationSpec) -> Iterator[tuple[str, nn.Module, tuple[str, ...], int]]:
    """Each module by its name; those of a stack as one, with their names and its number of dimensions of modules."""
    inner = model.inner if isinstance(model, StackedModule) else model
    for name, module in inner.named_modules():
        yield name, module, (), 0
    for stack, names in model.stacks.items() if isinstance(model, StackedModule) else ():
        parts = tuple(name.rpartition(".")[0] for _, name in places(names))
        if stack.endswith(".weight") and all(name.endswith(".weight") for _, name in places(names)):
            yield stack.rpartition(".")[0], inner.get_submodule(parts[0]), parts, len(dimensions(names))


def _watched(model: nn.Module, spec: PermutationSpec) -> Iterator[tuple[str, Watched]]:
    """Each module whose output has an axis on which something acts."""
    for name, module, parts, depth in _modules(model, spec):
        weight = f"{name}.weight" if name else "weight"
        weight = spec.aliases.get(weight, weight)
        if weight not in spec.axes or not spec.axes[weight][depth:]:
            continue
        above, axes = spec.axes[weight][:depth], spec.axes[weight][depth:]
        found = None
        if isinstance(module, nn.Linear):
            found = Watched(axes[0], -1, weight)
        elif weight in spec.general_gains:
            found = Watched(axes[0], -1, weight, gain=True) if len(axes) == 1 else None
        elif weight in spec.gains_that_stay:
            continue
        elif isinstance(module, nn.LayerNorm):
            # A LayerNorm over several dimensions has as many at its output's end; only one of a single is one axis.
            found = Watched(axes[0], -1, _as_output(name, weight, spec)) if len(axes) == 1 else None
        elif isinstance(module, nn.Embedding):
            found = Watched(axes[1], -1, weight, 1)
        elif isinstance(module, nn.modules.conv._ConvTransposeNd):
            found = Watched(axes[1], 1, weight, 1) if module.groups == 1 else None
        elif isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
            found = Watched(axes[0], 1, _as_output(name, weight, spec))
        elif isinstance(module, nn.modules.conv._ConvNd):
            found = Watched(axes[0], 1, weight)
        if found is None or not found.parameter:
            continue
        if parts:
            found = replace(found, axis=Product((*above, found.axis)), of=found.of + depth, parts=parts, above=depth)
        try:
            acts = any(o.group in spec.acting for o in spec.layout((found.axis, Fixed(1)), name).occurrences)
        except SpecError:  # the axis is fibred over one that stands in another dimension of the weight
            continue
        if acts:
            yield name, found


def _as_output(name: str, weight: str, spec: PermutationSpec) -> str:
    """The parameter on which groups act as on a norm's output: what is added to it; empty where none is known to.

    The weight is multiplied with what the norm was given, and each may have a sign and a scale of its own.
    """
    bias = spec.aliases.get(f"{name}.bias", f"{name}.bias")
    if bias in spec.axes and spec.axes[bias] == spec.axes[weight]:
        return bias
    plain = spec.general is None or all(action == Action() for action in spec.general.actions.get(weight, ()))
    return weight if plain else ""


class _Watch:
    """A copy of a network that keeps the outputs of some of its modules, as (units, samples)."""

    def __init__(self, model: nn.Module, state: StateDict, watched: Mapping[str, Watched], like: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval()
        self.model.load_state_dict(state)
        # Where A is, and as precise, so that one batch serves both.
        there = {**dict(like.named_parameters()), **dict(like.named_buffers())}
        for name, tensor in itertools.chain(self.model.named_parameters(), self.model.named_buffers()):
            if name in there:
                tensor.data = tensor.data.to(there[name])
        self.outputs: dict[str, list[torch.Tensor]] = {}
        self._names = [part for name, module in watched.items() for part in module.parts or (name,)]
        runs = self.model.inner if isinstance(self.model, StackedModule) else self.model
        for name, module in watched.items():
            for part in module.parts or (name,):
                runs.get_submodule(part).register_forward_hook(self._hook(part, module.dim))

    def _hook(self, name: str, dim: int) -> Any:
        def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if isinstance(output, torch.Tensor):
                self.outputs[name].append(output.detach().movedim(dim, 0).flatten(1))

        return keep

    def run(self, batch: Any, number: int) -> dict[str, list[torch.Tensor]]:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.outputs = {name: [] for name in self._names}
        args, kwargs = _arguments(batch)
        with fitting(args, kwargs, what=f"the network cannot run on batch {number} of the loader,"):
            self.model(*(to(x, device) for x in args), **{key: to(value, device) for key, value in kwargs.items()})
        return self.outputs
