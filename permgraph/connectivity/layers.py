"""Layerwise barriers: interpolate one layer, or one group of layers, and leave the rest of the network where it is.

Which layers make the barrier? Singh et al. (2024), "Landscaping Linear Mode Connectivity", and Adilova et al. (2023),
"Layer-wise Linear Mode Connectivity", move one layer at a time: with w(t; S) = a but for the parameters S, which are
(1 - t) a + t b,

    barrier of S  =  max over t of  L(w(t; S)) - [(1 - t) L(a) + t L(b)]

The line is thus the one between the two whole networks, so that barriers of different layers can be compared with each
other and with that of the whole. The far end, a with b's layer in it, is a hybrid of the two, and counts too.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn

from permgraph.connectivity.barriers import Barrier, Evaluate, Prepare, barrier
from permgraph.conventions.displayed import Displayed
from permgraph.conventions.outcomes import StepProgress
from permgraph.conventions.waiting import waits
from permgraph.errors import EvaluationError
from permgraph.networks.evaluate import template_of
from permgraph.weights.identity import SameTensor
from permgraph.weights.state_dict import Network, as_state_dict, check_same_keys


@dataclass(frozen=True, repr=False)
class LayerwiseBarriers(Displayed):
    """What moving one layer at a time does.

    Attributes:
        paths: for each layer, what was measured as it went from a to b while the rest stayed at a.
        whole: what was measured as all went from a to b.
    """

    paths: Mapping[str, Barrier]
    whole: Barrier

    @property
    def barriers(self) -> dict[str, float]:
        """The barrier of each layer in the first metric, over the line between the losses of the two networks."""
        return {name: self.height(name) for name in self.paths}

    def height(self, layer: str, metric: str | None = None) -> float:
        """Return the barrier of one layer in one metric; NaN or infinite where a loss is.

        Raises EvaluationError if there is no such layer or metric.
        """
        if layer not in self.paths:
            raise EvaluationError(f"no layer {layer!r} was measured, only {', '.join(map(repr, self.paths))}")
        path = self.paths[layer]
        metric = metric or path.metric
        if metric not in path.curves:
            raise EvaluationError(f"no metric {metric!r} was measured, only {', '.join(map(repr, path.curves))}")
        sign = -1.0 if metric in path.higher_is_better else 1.0
        ends = [sign * self.whole.curves[metric][at] for at in (0, -1)]
        excess = [
            sign * value - ((1 - t) * ends[0] + t * ends[1])
            for t, value in zip(path.alphas, path.curves[metric], strict=True)
        ]
        return math.nan if any(map(math.isnan, excess)) else max(excess)

    def hybrid(self, layer: str, metric: str | None = None) -> float:
        """Return one metric of the network that is a but for this layer, which is b's."""
        path = self.paths[layer]
        return path.curves[metric or path.metric][-1]

    def __str__(self) -> str:
        width = max(len("layer"), len("(all)"), *(len(name) for name in self.paths))
        lines = [f"{'layer':{width}}  barrier  {self.whole.metric} of a with b's layer"]
        lines += [f"{name:{width}}  {self.height(name):7.4g}  {self.hybrid(name):.4g}" for name in self.paths]
        return "\n".join([*lines, f"{'(all)':{width}}  {self.whole.barrier:7.4g}  {self.whole.losses[-1]:.4g}"])


@waits("measuring layer by layer")
def layerwise_barriers(
    a: Network,
    b: Network,
    evaluate: Evaluate,
    points: int | Sequence[float] = 11,
    *,
    layers: Mapping[str, str | Sequence[str]] | None = None,
    model: nn.Module | None = None,
    prepare: Prepare | None = None,
    higher_is_better: Collection[str] = ("accuracy",),
    progress: StepProgress | None = None,
) -> LayerwiseBarriers:
    """Measure the barrier of each layer by itself: it goes from ``a`` to ``b`` while the others stay at ``a``.

    Args:
        a, b, evaluate, points, model, prepare, higher_is_better: as for ``barrier``.
        layers: a name for each group of layers, to one or several patterns (as in ``fnmatch``) of the state-dict names
            that move with it. By default each module that holds parameters or buffers is a layer of its own, and so is
            each parameter or buffer that the model itself holds.
        progress: called as ``progress(done, all)`` after each evaluation.

    Tied names move together where a pattern matches one of them.

    Raises:
        MismatchError: ``a`` and ``b`` differ in a key or a shape.
        EvaluationError: a layer's patterns match no name; or as for ``barrier``.

    Example:
        >>> a, b = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).eval(), nn.Sequential(
        ...     nn.Linear(2, 3), nn.Linear(3, 1)).eval()
        >>> x = torch.ones(1, 2)
        >>> sorted(layerwise_barriers(a, b, lambda net: net(x).item() ** 2).paths)
        ['0', '1']
    """
    template = template_of(model, a=a, b=b)
    first, second = as_state_dict(a), as_state_dict(b)
    check_same_keys(first, second)
    groups = _layers(first, layers)
    done, every = 0, 0

    def step(_: int, of: int) -> None:
        nonlocal done, every
        done, every = done + 1, of * (len(groups) + 1)
        if progress is not None:
            progress(done, every)

    def along(end: Network, start: Network) -> Barrier:
        return barrier(
            start,
            end,
            evaluate,
            points,
            model=template,
            prepare=prepare,
            higher_is_better=higher_is_better,
            progress=step,
        )

    whole = along(b, a)
    paths = {}
    for layer, names in groups.items():
        paths[layer] = along({name: second[name] if name in names else tensor for name, tensor in first.items()}, a)
    return LayerwiseBarriers(MappingProxyType(paths), whole)


def _layers(state: Mapping[str, Tensor], layers: Mapping[str, str | Sequence[str]] | None) -> dict[str, frozenset[str]]:
    """For each layer, the names that move with it."""
    tied: dict[str, set[str]] = {}
    same = SameTensor()
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            tied.setdefault(same.first_name(name, tensor), set()).add(name)
    found: dict[str, set[str]] = {}
    if layers is None:
        for names in tied.values():
            # A tied tensor belongs to the first module that holds it.
            first = min(names, key=list(state).index)
            found.setdefault(first.rpartition(".")[0] or first, set()).update(names)
        return {layer: frozenset(names) for layer, names in found.items()}
    for layer, given in layers.items():
        patterns = (given,) if isinstance(given, str) else tuple(given)
        matched = {name for name in state if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
        if not matched:
            raise EvaluationError(
                f"layer {layer!r}: no name in the state dict matches {', '.join(map(repr, patterns))}"
            )
        found[layer] = matched.union(*(names for names in tied.values() if names & matched))
    return {layer: frozenset(names) for layer, names in found.items()}
