"""`least_squares`: the layers of a merged network, fitted to what the networks that were merged compute.

Averaged weights do not give averaged activations. For each linear layer and convolution there is a weight that maps
the inputs of the merged network's layer to the mean of its parents' outputs as well as any can, in closed form: the
solution of a least-squares problem whose two matrices are sums over the data. Nasery et al. (2025), "PLeaS: Merging
Models with Permutations and Least Squares", section 4.2; with each network's own inputs instead, Jin et al. (2023),
"Dataless Knowledge Fusion by Merging Weights of Language Models" (RegMean).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from permgraph.capture.outputs import tensor_leaves
from permgraph.conventions.choices import require_choice
from permgraph.conventions.waiting import waits
from permgraph.errors import EvaluationError, MismatchError, NonFiniteError
from permgraph.merging.patches import has_patches, input_size, patches, weight_as_matrix, write_matrix
from permgraph.merging.places import Places
from permgraph.networks.batches import (
    Loader,
    batch_size,
    batches,
    device_of,
    evaluating,
    require_rereadable,
    run_on,
    split_batch,
    undisturbed,
)
from permgraph.networks.repair import Layers, affine_layers, channel_dim, is_transposed_linear, may_be_rewritten
from permgraph.networks.statistics import collecting, recalibrate_batchnorm, running_norms
from permgraph.weights.combine import shares_of

logger = logging.getLogger(__name__)

Inputs: TypeAlias = Literal["merged", "parents"]

#: Matrices of at most so many bytes are summed up in one pass over the data.
MEMORY = 2**31


@waits("fitting layers")
def least_squares(
    model: nn.Module,
    loader: Loader,
    parents: Sequence[nn.Module],
    *,
    weights: Sequence[float] | None = None,
    inputs: Inputs = "merged",
    ridge: float = 1e-3,
    layers: Layers | None = None,
) -> nn.Module:
    """Return a copy of ``model`` whose layers give the mean of what its parents' give, as nearly as they can.

    The parents are the two networks that were merged into ``model``, *after* alignment. Each linear layer and
    convolution gets the weight and bias of least squared error over all examples and positions, drawn by ``ridge``
    to the weight that it has, so that what the data do not determine stays. Where layers are followed by BatchNorm,
    statistics are recalibrated on the way and at the end. If the outputs come no nearer to the mean of the parents'
    on these data, ``model`` comes back as it was, but for its statistics, with a logged warning.

    Layers are left alone, with a logged warning, when they share a parameter with another layer, when the weight is
    parametrised, when the forward pass does not call them, and transposed convolutions.

    Args:
        model: the network to fit, of the parents' shapes; for one that is wider, see `PartialMerge.least_squares`.
        loader: batches as for ``evaluate_on``, of the tasks of both; targets are ignored. Read once for each layer, or
            once or a few times with ``inputs="parents"``.
        parents: two modules.
        weights: how much each parent counts, alike by default.
        inputs: what a layer is fitted on: ``"merged"``, what reaches it in the network that is being fitted, one layer
            after the other, so that each makes up for the errors of those before it; or ``"parents"``, the mean of
            what reaches it in the parents, as in the paper, for all layers at once.
        ridge: how strongly weights are drawn to those of ``model``, relative to the mean square of the inputs.
        layers: called as ``layers(name, module)``; leaves out the layers for which it is false.

    Raises:
        EvaluationError: the loader is empty or can be read only once, there are not two parents, or ridge is not
            positive.
        MismatchError: a layer has other sizes in a parent.
        NonFiniteError: activations, and so a layer's solution, are NaN or infinite.

    Example:
        >>> a, b = (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval() for _ in "ab")
        >>> middle = copy.deepcopy(a)
        >>> _ = middle.load_state_dict({k: (x + b.state_dict()[k]) / 2 for k, x in a.state_dict().items()})
        >>> fitted = least_squares(middle, [torch.randn(100, 3)], (a, b))
    """
    if len(parents) != 2:
        raise EvaluationError(f"least_squares needs the 2 networks that were merged, not {len(parents)}")
    shares = shares_of(weights, 2)
    pair = (parents[0], parents[1])
    return fit_layers(model, loader, pair, {}, (shares[0], shares[1]), inputs=inputs, ridge=ridge, layers=layers)


def fit_layers(
    model: nn.Module,
    loader: Loader,
    parents: tuple[nn.Module, nn.Module],
    places: Mapping[str, tuple[Places, ...]],
    shares: tuple[float, float],
    *,
    inputs: Inputs = "merged",
    ridge: float = 1e-3,
    layers: Layers | None = None,
) -> nn.Module:
    """`least_squares` of a network that may be wider than its parents, whose units lie at these places in it.

    Args:
        places: for each parameter those of its dimensions; of parameters that are not named they are the parents'.
    """
    require_choice("inputs", inputs, "merged", "parents")
    if not ridge > 0:
        raise EvaluationError(f"ridge is {ridge}: it must be positive")
    require_rereadable(loader)
    fitted = copy.deepcopy(model)
    found = _Fit(fitted, parents, loader, places, shares, ridge)
    with undisturbed(), evaluating(fitted, *parents):
        names = found.in_order(layers)
        for some in [[name] for name in names] if inputs == "merged" else found.portions(names):
            found.solve(some, of_parents=inputs == "parents")
    result = recalibrate_batchnorm(fitted, loader) if running_norms(fitted) else fitted
    start = recalibrate_batchnorm(model, loader) if running_norms(model) else model
    before, after = (_gap(one, parents, loader, shares) for one in (start, result))
    if not after <= before:
        logger.warning(
            "the fitted layers are no nearer to the parents' outputs (%.3g) than the network was (%.3g), which is "
            "returned: give more data, or a larger ridge", after, before,
        )  # fmt: skip
        return copy.deepcopy(start)
    return result


def _gap(model: nn.Module, parents: Sequence[nn.Module], loader: Loader, shares: tuple[float, float]) -> float:
    """The mean square by which a network's outputs differ from the mean of its parents'."""
    total, count = 0.0, 0
    networks = (model, *parents)
    with undisturbed(), evaluating(*networks):
        for batch in batches(loader):
            own, a, b = ([t for t in tensor_leaves(run_on(one, batch)) if t.is_floating_point()] for one in networks)
            for x, y, z in zip(own, a, b, strict=True):
                total += float((x - shares[0] * y - shares[1] * z).double().square().sum())
                count += x.numel()
    return total / max(count, 1)


class _Fit:
    """The layers of a network that is being fitted."""

    def __init__(
        self,
        model: nn.Module,
        parents: Sequence[nn.Module],
        loader: Loader,
        places: Mapping[str, tuple[Places, ...]],
        shares: tuple[float, float],
        ridge: float,
    ) -> None:
        self.model, self.parents, self.loader = model, parents, loader
        self.places, self.shares, self.ridge = places, shares, ridge
        self.norms = running_norms(model)

    def in_order(self, layers: Layers | None) -> list[str]:
        """The layers that can be fitted, in the order in which the forward pass first calls them."""
        known = affine_layers(self.model, layers)
        called: dict[str, None] = {}
        handles = [m.register_forward_pre_hook(lambda _m, _x, n=n: called.setdefault(n)) for n, m in known.items()]
        try:
            for batch in batches(self.loader):
                run_on(self.model, batch)
                break
        finally:
            for handle in handles:
                handle.remove()
        for name in known.keys() - called.keys():
            logger.warning("layer %r is left as it is: the forward pass never calls it by itself", name)
        found = []
        for name in called:
            if not has_patches(known[name]):
                logger.warning("layer %r is left as it is: a transposed or grouped convolution", name)
            elif may_be_rewritten(name, known[name], self.model):
                found.append(name)
        return found

    def portions(self, names: Sequence[str]) -> Iterator[list[str]]:
        """The layers in portions whose matrices take no more than `MEMORY`."""
        some: list[str] = []
        size = 0
        for name in names:
            own = 8 * (input_size(self.model.get_submodule(name)) + 1) ** 2
            if some and size + own > MEMORY:
                yield some
                some, size = [], 0
            some.append(name)
            size += own
        if some:
            yield some

    def solve(self, names: Sequence[str], *, of_parents: bool) -> None:
        """Sum the matrices of these layers up over the data, and write the solutions."""
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        with collecting(self.model, self.norms) as weigh:
            for batch in batches(self.loader):
                args, kwargs, _ = split_batch(batch, device_of(self.model))
                weigh(batch_size(args, kwargs))
                seen = [_seen(parent, names, batch) for parent in self.parents]
                own = None if of_parents else _seen(self.model, names, batch)
                for name in names:
                    if any(name not in one for one in seen):
                        raise MismatchError(f"layer {name!r} is not called in a parent: parents are what was merged")
                    self._add(sums, name, seen, own)
        for name, (inner, outer) in sums.items():
            self._write(name, inner, outer)

    def _add(
        self,
        sums: dict[str, tuple[Tensor, Tensor]],
        name: str,
        seen: Sequence[Mapping[str, list[tuple[Tensor, Tensor]]]],
        own: Mapping[str, list[tuple[Tensor, Tensor]]] | None,
    ) -> None:
        layer = self.model.get_submodule(name)
        of_inputs, of_outputs = self._places_of(name, layer)
        calls = zip(seen[0][name], seen[1][name], strict=True)
        for number, ((x_a, y_a), (x_b, y_b)) in enumerate(calls):
            dim = channel_dim(layer, y_a)
            at = of_outputs or Places.same(y_a.shape[dim])
            target = at.mix(y_a, y_b, dim, self.shares).movedim(dim, -1).flatten(0, -2)
            if own is None:
                dim = channel_dim(layer, x_a)
                x = (of_inputs or Places.same(x_a.shape[dim])).mix(x_a, x_b, dim, self.shares)
            else:
                x = own[name][number][0]
            start = 0
            for rows in patches(layer, x):
                part = target[start : start + len(rows)].to(torch.float64)
                start += len(rows)
                inner, outer = rows.T @ rows, rows.T @ part
                if name in sums:
                    sums[name][0].add_(inner)
                    sums[name][1].add_(outer)
                else:
                    sums[name] = inner, outer

    def _places_of(self, name: str, layer: nn.Module) -> tuple[Places | None, Places | None]:
        own = self.places.get(f"{name}.weight")
        if own is None:
            return None, None
        out, into = (1, 0) if is_transposed_linear(layer) else (0, 1)
        return own[into], own[out]

    def _write(self, name: str, inner: Tensor, outer: Tensor) -> None:
        layer = self.model.get_submodule(name)
        before = weight_as_matrix(layer).to(inner.device)
        drawn = self.ridge * inner.diagonal().mean().clamp(min=1e-30)
        regular = inner + drawn * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
        solution = before + torch.linalg.solve(regular, outer - inner @ before)
        if not bool(torch.isfinite(solution).all()):
            raise NonFiniteError(f"layer {name!r} has no finite solution: its activations hold NaN or infinity")
        write_matrix(layer, solution)


def _seen(model: nn.Module, names: Sequence[str], batch: object) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """What goes into layers and comes out of them on a batch, for each of their calls."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(_layer: nn.Module, given: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], out: Tensor) -> None:
            x = given[0] if given else next(iter(kwargs.values()))
            found.setdefault(name, []).append((x.detach(), out.detach()))

        return see

    handles = [model.get_submodule(n).register_forward_hook(hook(n), with_kwargs=True) for n in names]
    try:
        run_on(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found
