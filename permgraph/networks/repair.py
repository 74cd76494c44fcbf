"""REPAIR: the activation statistics of an interpolated network, put back where its parents have them.

Jordan, Sedghi, Saukh, Entezari and Neyshabur (2023), "REPAIR: REnormalizing Permuted Activations for Interpolation
Repair". Averaged weights give activations of too little variance, and each layer loses more. REPAIR rescales and
shifts each channel of each layer so that its mean and standard deviation over the data are the average of the
parents', and folds that back into the layer's weight and bias. Where a BatchNorm follows, resetting its running
statistics does the same, because the interpolated affine parameters already hold the interpolated mean and deviation.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from permgraph.conventions.displayed import Displayed
from permgraph.conventions.waiting import waits
from permgraph.errors import EvaluationError, MismatchError, NonFiniteError
from permgraph.networks.batches import Loader, observed, run_over, undisturbed
from permgraph.networks.evaluate import require_eval_mode
from permgraph.networks.statistics import Module, collecting, running_norms

logger = logging.getLogger(__name__)

Layers = Callable[[str, nn.Module], bool]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_AFFINE = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)
_LINEAR_TRANSPOSED = "Conv1D"  # transformers' linear layer with the weight (in, out), known by name so as not to import


@dataclass(frozen=True, repr=False)
class ChannelStatistics(Displayed):
    """Mean and standard deviation of each output channel of a network's affine layers, over some data.

    Both map the layer's name to a float64 tensor of shape ``(channels,)``.
    """

    means: Mapping[str, Tensor]
    deviations: Mapping[str, Tensor]


@waits("measuring statistics")
def channel_statistics(model: nn.Module, loader: Loader, layers: Layers | None = None) -> ChannelStatistics:
    """Return the mean and deviation of each channel that the linear and convolution layers of ``model`` put out.

    They are taken over examples and positions, in one pass over the data, with the model as it is (in evaluation mode).
    Layers that the forward pass does not call by themselves have no entry: ``nn.MultiheadAttention`` uses the weights
    of its output projection directly. Compute them once to ``repair`` many networks with the same parents.

    Args:
        model: any module, in evaluation mode.
        loader: batches as for ``evaluate_on``; targets are ignored.
        layers: called as ``layers(name, module)``; leaves out the layers for which it is false.

    Raises:
        EvaluationError: the loader is empty, or the model is in training mode.
        NonFiniteError: a layer puts out NaN or infinity.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU()).eval()
        >>> _ = net[0].weight.data.fill_(1.0)
        >>> found = channel_statistics(net, [torch.tensor([[0.0, 1.0], [1.0, 2.0]])])
        >>> found.means["0"].tolist(), found.deviations["0"].tolist()
        ([2.0], [1.0])
    """
    require_eval_mode(model, "the model to measure")
    running: dict[str, _Running] = {}

    def observe(name: str, layer: nn.Module, x: Tensor) -> None:
        running.setdefault(name, _Running()).add(x, channel_dim(layer, x))

    with undisturbed(), observed(affine_layers(model, layers), observe):
        run_over(model, loader)
    for name, statistics in running.items():
        if not statistics.finite:
            raise NonFiniteError(
                f"layer {name!r} puts out NaN or infinity, so its channels have no statistics: check the data of the "
                "loader, and the weights of the model (a parent, in repair)"
            )
    return ChannelStatistics(
        means={name: r.mean for name, r in running.items()},
        deviations={name: r.deviation() for name, r in running.items()},
    )


@waits("repairing")
def repair(
    model: Module,
    loader: Loader,
    parents: Sequence[nn.Module | ChannelStatistics],
    *,
    weights: Sequence[float] | None = None,
    layers: Layers | None = None,
) -> Module:
    """Return a copy of ``model`` whose channels have the mean and deviation of its parents' channels, averaged.

    The parents are the networks that were interpolated or merged into ``model``, *after* alignment: channel ``i`` must
    mean the same in each. Each linear or convolution layer is rescaled and shifted, channel by channel, and the change
    is folded into its weight and bias: the copy has the same parameters and the same cost. A layer without bias is
    rescaled only. Running statistics of normalisation layers are recalibrated in the same pass, which is REPAIR for a
    network with BatchNorm. While statistics are gathered each layer already sees the repaired activations of the ones
    before it, batch by batch, as BatchNorm does in training: use batches of some hundred examples.

    Layers are left alone, with a logged warning, when they share a parameter with another layer, when the weight is
    parametrised (weight normalisation), or when the forward pass does not call them; a channel that is constant on
    the data is shifted but not rescaled.

    Args:
        model: the network to repair, in evaluation mode.
        loader: batches as for ``evaluate_on``; targets are ignored.
        parents: two or more modules of the same architecture, or their ``channel_statistics``.
        weights: how much each parent counts, the same for all by default. At ``t`` on the line from a to b:
            ``(1 - t, t)``.
        layers: called as ``layers(name, module)``; leaves out the layers for which it is false.

    Raises:
        EvaluationError: the loader is empty, a model is in training mode, or there are fewer than two parents.
        MismatchError: a layer of ``model`` is missing in a parent, or has another number of channels there.
        NonFiniteError: a layer of a parent puts out NaN or infinity. Where one of ``model`` itself does, as may happen
            on the way between two networks, a warning is logged, and what is returned is no more finite.

    Example:
        >>> a, b = nn.Linear(4, 8).eval(), nn.Linear(4, 8).eval()
        >>> middle = nn.Linear(4, 8).eval()
        >>> _ = middle.load_state_dict({k: (a.state_dict()[k] + b.state_dict()[k]) / 2 for k in a.state_dict()})
        >>> repaired = repair(middle, [torch.randn(100, 4)], parents=(a, b))
    """
    require_eval_mode(model, "the model to repair")
    if len(parents) < 2:
        raise EvaluationError(f"repair needs the networks that were merged, at least 2 parents, not {len(parents)}")
    result = copy.deepcopy(model)
    affine = {name: m for name, m in affine_layers(result, layers).items() if may_be_rewritten(name, m, result)}
    measured = [
        parent if isinstance(parent, ChannelStatistics) else channel_statistics(parent, loader, layers)
        for parent in parents
    ]
    target = _average(measured, weights)
    running: dict[str, _Running] = {}

    def renormalise(name: str, layer: nn.Module, x: Tensor) -> Tensor:
        dim = channel_dim(layer, x)
        channels = x.shape[dim]
        wanted = target.means.get(name)
        if wanted is None or wanted.numel() != channels:
            found = "is not there" if wanted is None else f"has {wanted.numel()}"
            raise MismatchError(
                f"layer {name!r} has {channels} output channels in the model, but {found} in the parents: "
                "parents must be the networks that were merged"
            )
        now = _Running().add(x, dim)
        running.setdefault(name, _Running()).merge(now)
        scale, shift = _correction(now, target, name, layer.bias is not None)
        shape = [1] * x.ndim
        shape[dim] = channels
        return x * scale.to(x).view(shape) + shift.to(x).view(shape)

    norms = running_norms(result)
    with undisturbed(), collecting(result, norms) as weigh, observed(affine, renormalise):
        run_over(result, loader, weigh)
        broken = next((name for name, statistics in running.items() if not statistics.finite), None)
        if broken is not None:
            logger.warning("layer %r of the model puts out NaN or infinity: the repaired model is not finite", broken)
        for name, layer in affine.items():
            if name in running:
                _fuse(layer, *_correction(running[name], target, name, layer.bias is not None))
            else:
                logger.warning("layer %r was not repaired: the forward pass never calls it by itself", name)
    return result


def affine_layers(model: nn.Module, layers: Layers | None = None) -> dict[str, nn.Module]:
    """Return the linear and convolution layers by name."""
    return {
        name: m
        for name, m in model.named_modules()
        if (isinstance(m, _AFFINE) or is_transposed_linear(m)) and (layers is None or layers(name, m))
    }


def is_transposed_linear(layer: nn.Module) -> bool:
    """Whether a layer is transformers' linear layer, whose weight is (in, out)."""
    return type(layer).__name__ == _LINEAR_TRANSPOSED


class _Running:
    """Mean and variance of channels, merged pairwise (Chan et al. 1979), which loses no digits to large means."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())

    def add(self, x: Tensor, dim: int) -> _Running:
        flat = x.detach().movedim(dim, 0).flatten(1).to(torch.promote_types(x.dtype, torch.float32))
        batch = _Running()
        batch.count = flat.shape[1]
        variance, mean = torch.var_mean(flat, dim=1, correction=0)
        batch.mean = mean.to("cpu", torch.float64)
        batch.squares = variance.to("cpu", torch.float64) * batch.count
        return self.merge(batch)

    def merge(self, other: _Running) -> _Running:
        count = self.count + other.count
        if count:
            delta = other.mean - self.mean
            self.mean = self.mean + delta * (other.count / count)
            self.squares = self.squares + other.squares + delta**2 * (self.count * other.count / count)
            self.count = count
        return self

    @property
    def finite(self) -> bool:
        return bool((torch.isfinite(self.mean) & torch.isfinite(self.squares)).all())

    def deviation(self) -> Tensor:
        return (self.squares / max(self.count, 1)).sqrt()


def _average(measured: Sequence[ChannelStatistics], weights: Sequence[float] | None) -> ChannelStatistics:
    shares = [1.0] * len(measured) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(measured) or abs(sum(shares)) < 1e-12:
        raise EvaluationError(f"weights must be one number for each of the {len(measured)} parents, not {weights}")
    shares = [share / sum(shares) for share in shares]
    first = measured[0]
    for other in measured[1:]:
        for name, mean in first.means.items():
            if name not in other.means or other.means[name].shape != mean.shape:
                found = f"{other.means[name].numel()}" if name in other.means else "none"
                raise MismatchError(
                    f"layer {name!r} has {mean.numel()} output channels in the first parent and {found} in another"
                )
    return ChannelStatistics(
        means={n: _sum(s * m.means[n] for s, m in zip(shares, measured, strict=True)) for n in first.means},
        deviations={n: _sum(s * m.deviations[n] for s, m in zip(shares, measured, strict=True)) for n in first.means},
    )


def _sum(tensors: Iterator[Tensor]) -> Tensor:
    """Add tensors of one shape."""
    return torch.stack(list(tensors)).sum(0)


def _correction(now: _Running, target: ChannelStatistics, name: str, biased: bool) -> tuple[Tensor, Tensor]:
    """Return the scale and shift of each channel that take its statistics ``now`` to the target's."""
    deviation, wanted = now.deviation(), target.deviations[name]
    # A channel is constant when its deviation is rounding noise; dividing by that would amplify noise to a signal.
    constant = deviation <= 1e-6 * (now.mean.abs() + wanted + torch.finfo(torch.float32).tiny)
    scale = torch.where(constant, 1.0, wanted / deviation)
    shift = target.means[name] - scale * now.mean if biased else torch.zeros_like(scale)
    return scale, shift


def _fuse(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    exact = weight.detach().to("cpu", torch.float64)
    if isinstance(layer, _TRANSPOSED):
        # (in, out / groups, ...): group g of the inputs makes outputs g * out / groups onwards.
        groups = layer.groups
        blocks = exact.view(groups, exact.shape[0] // groups, exact.shape[1], -1)
        exact = (blocks * scale.view(groups, 1, -1, 1)).view(exact.shape)
    elif is_transposed_linear(layer):
        exact = exact * scale
    else:
        exact = exact * scale.view(-1, *[1] * (exact.ndim - 1))
    weight.copy_(exact)
    if isinstance(bias, Tensor):
        bias.copy_(bias.detach().to("cpu", torch.float64) * scale + shift)


def may_be_rewritten(name: str, layer: nn.Module, model: nn.Module) -> bool:
    """Whether a layer's weight and bias are its own to change; a warning says why not."""
    owned = [layer._parameters.get("weight"), layer._parameters.get("bias")]
    if owned[0] is None:
        logger.warning("layer %r is left as it is: its weight is parametrised", name)
        return False
    names: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(parameter_name)
    for own in owned:
        if own is not None and len(names[id(own)]) > 1:
            logger.warning("layer %r is left as it is: tied parameter %s", name, " = ".join(names[id(own)]))
            return False
    return True


def channel_dim(layer: nn.Module, output: Tensor) -> int:
    """The dimension of a layer's output that holds its channels."""
    spatial = layer.weight.ndim - 2  # type: ignore[operator]
    return int(output.ndim - 1 - spatial)
