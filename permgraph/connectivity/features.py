"""Layerwise linear feature connectivity: whether the features of the network between are the features between.

Zhou et al. (2023), "Going Beyond Linear Mode Connectivity: The Layerwise Linear Feature Connectivity". With f_l(w; x)
the output of a module l, and w(t) = (1 - t) a + t b, two networks are connected in this sense where at each module

    f_l(w(t); x)  =  c · [(1 - t) f_l(a; x) + t f_l(b; x)]      for some c > 0, for all x

This is more than a flat loss on the line, and implies it where the loss is convex in the features. What is measured is
the cosine between the two sides, 1 where the features point the same way, and the scale c.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.connectivity.barriers import Prepare
from permgraph.conventions.displayed import Displayed
from permgraph.conventions.waiting import waits
from permgraph.errors import EvaluationError
from permgraph.networks.batches import Loader, batches, device_of, fitting, observed, split_batch, undisturbed
from permgraph.networks.evaluate import template_of
from permgraph.weights.combine import interpolate
from permgraph.weights.state_dict import Network, as_state_dict, check_same_keys


@dataclass(frozen=True, repr=False)
class FeatureAgreement(Displayed):
    """How the features at one module of the network between compare with the features between.

    Attributes:
        cosine: the mean over samples of the cosine of f(w(t); x) and (1 - t) f(a; x) + t f(b; x).
        scale: the mean over samples of c, the factor that brings the second closest to the first.
        cosine_ends: the mean cosine of f(a; x) and f(b; x): with features that agree, there is little to connect.
        samples: how many samples the means are over.
        skipped: samples with features that are all zero on one side, which have no direction; not in the means.
    """

    cosine: float
    scale: float
    cosine_ends: float
    samples: int
    skipped: int = 0


@dataclass(frozen=True, repr=False)
class FeatureConnectivity(Displayed):
    """Layerwise linear feature connectivity at one point of the line between two networks.

    Attributes:
        t: the point, from 0 (network a) to 1 (network b).
        layers: module name to what was found there, in the order in which the modules run. The second and later
            outputs of a module that runs several times are ``name#2``, ``name#3``, ...
    """

    t: float
    layers: Mapping[str, FeatureAgreement] = field(default_factory=dict)

    @property
    def worst(self) -> tuple[str, float]:
        """The module whose cosine is smallest, and that cosine (NaN where nothing could be measured)."""
        cosines = {name: layer.cosine for name, layer in self.layers.items()}
        name = min(cosines, key=lambda n: -math.inf if math.isnan(cosines[n]) else cosines[n])
        return name, cosines[name]

    def __str__(self) -> str:
        width = max(len("module"), *(len(name) for name in self.layers))
        lines = [f"{'module':{width}}  cosine   scale    cosine of a and b"]
        lines += [f"{n:{width}}  {x.cosine:.4f}   {x.scale:.4f}   {x.cosine_ends:.4f}" for n, x in self.layers.items()]
        return "\n".join(lines)


@waits("comparing features")
def feature_connectivity(
    a: Network,
    b: Network,
    loader: Loader,
    t: float = 0.5,
    *,
    modules: Sequence[str] | None = None,
    model: nn.Module | None = None,
    prepare: Prepare | None = None,
) -> FeatureConnectivity:
    """Compare, module by module, the features of the interpolated network with the interpolated features.

    Align ``b`` to ``a`` first: features of networks that do not correspond have nothing to interpolate.

    Args:
        a: a module, or a state dict.
        b: a module or a state dict of the same keys and shapes.
        loader: batches as for ``evaluate_on``; targets are ignored.
        t: the point on the line, from 0 (``a``) to 1 (``b``).
        modules: the names of the modules to look at; by default all that are called and give a floating-point tensor
            (or a tuple or mapping whose first tensor is one) with the batch first.
        model: the module to put state dicts in, when neither ``a`` nor ``b`` is one.
        prepare: called as ``prepare(network, t)`` on the interpolated network, returns the network to use, of the same
            module names; to recalibrate BatchNorm, say.

    The modules must be in evaluation mode, and none is changed.

    Raises:
        MismatchError: ``a`` and ``b`` differ in a key or a shape.
        EvaluationError: there is no module, or it is in training mode; the loader is empty; a name in ``modules`` is
            not a module, or was not called, or gives no floating-point tensor.

    Example:
        >>> a, b = nn.Sequential(nn.Linear(3, 2)).eval(), nn.Sequential(nn.Linear(3, 2)).eval()
        >>> found = feature_connectivity(a, b, [torch.randn(8, 3)])  # a linear layer's features are linear in it
        >>> round(found.layers["0"].cosine, 4), round(found.layers["0"].scale, 4)
        (1.0, 1.0)
    """
    template = template_of(model, a=a, b=b)
    check_same_keys(as_state_dict(a), as_state_dict(b))
    known = dict(template.named_modules())
    for name in modules or ():
        if name not in known:
            raise EvaluationError(f"the model has no module {name!r}; its modules are those of model.named_modules()")
    wanted = [name for name in known if name] if modules is None else list(modules)
    sums: dict[str, _Sums] = {}
    with undisturbed():
        networks = []
        for point in (0.0, 1.0, t):
            network = copy.deepcopy(template)
            network.load_state_dict(interpolate(a, b, point))
            networks.append(network)
        if prepare is not None:
            networks[2] = prepare(networks[2], t)
        for batch in batches(loader):
            args, kwargs, _ = split_batch(batch, device_of(template))
            outputs = [_features(network, wanted, args, kwargs) for network in networks]
            for name in outputs[0]:
                if all(name in output for output in outputs):
                    one, other, between = (output[name] for output in outputs)
                    sums.setdefault(name, _Sums()).add(one, other, between, t)
    for name in modules or ():
        if name not in sums:
            raise EvaluationError(f"module {name!r} was not called, or gives no floating-point tensor with samples")
    if not sums:
        raise EvaluationError("no module gave a floating-point tensor: name the modules to look at")
    return FeatureConnectivity(t, MappingProxyType({name: found.agreement() for name, found in sums.items()}))


class _Sums:
    """Sums over samples, in float64."""

    def __init__(self) -> None:
        self.cosine = self.scale = self.ends = 0.0
        self.samples = self.skipped = 0

    def add(self, one: Tensor, other: Tensor, between: Tensor, t: float) -> None:
        a, b, middle = (x.flatten(1).double() for x in (one, other, between))
        mean = (1 - t) * a + t * b
        norms = [x.norm(dim=1) for x in (a, b, middle, mean)]
        usable = torch.stack([norm != 0 for norm in norms]).all(0)
        dot = (middle * mean).sum(1)
        self.samples += int(usable.sum())
        self.skipped += int((~usable).sum())
        self.cosine += float((dot / (norms[2] * norms[3]))[usable].sum())
        self.scale += float((dot / norms[3] ** 2)[usable].sum())
        self.ends += float(((a * b).sum(1) / (norms[0] * norms[1]))[usable].sum())

    def agreement(self) -> FeatureAgreement:
        n = self.samples
        cosine, scale, ends = (total / n if n else math.nan for total in (self.cosine, self.scale, self.ends))
        return FeatureAgreement(cosine, scale, ends, n, self.skipped)


def _features(
    network: nn.Module, wanted: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The outputs of the wanted modules in one pass, in the order in which they were given out."""
    seen: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def see(name: str, _module: nn.Module, output: Any) -> None:
        tensor = _first_tensor(output)
        if tensor is not None and tensor.is_floating_point() and tensor.ndim > 1:
            calls[name] = calls.get(name, 0) + 1
            # A copy, for a later in-place operation would change what was seen.
            seen[name if calls[name] == 1 else f"{name}#{calls[name]}"] = tensor.clone()

    known = dict(network.named_modules())
    with observed({name: known[name] for name in wanted}, see), fitting(args, kwargs):
        network(*args, **kwargs)
    return seen


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        output = next((value for value in output if isinstance(value, Tensor)), None)
    return output if isinstance(output, Tensor) else None
