"""BatchNorm statistics of a network whose weights were interpolated, merged or otherwise moved."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from permgraph.conventions.waiting import waits
from permgraph.errors import EvaluationError
from permgraph.networks.batches import Loader, evaluating, run_over, undisturbed

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)


@waits("measuring statistics")
def recalibrate_batchnorm(model: Module, loader: Loader) -> Module:
    """Return a copy of ``model`` whose normalisation layers' running statistics are those of ``loader``'s data.

    The statistics stored beside interpolated weights belong to neither parent: activations of averaged weights vary
    less, layer after layer (Jordan et al. 2023, "REPAIR: REnormalizing Permuted Activations for Interpolation
    Repair"). One pass over the data replaces them by the average of the batches' statistics, each weighted by its size,
    as in the networks' own training: every BatchNorm sees the activations that the recalibrated ones before it
    send. Everything else, dropout included, runs in evaluation mode, and the copy is returned in the mode of ``model``.

    A network without running statistics comes back as a plain copy. ``model`` itself is not changed. Statistics that
    are NaN or infinite, as weights or data may make them, are logged as a warning.

    Args:
        model: any module.
        loader: batches as for ``evaluate_on``; targets are ignored. Larger batches give better statistics.

    Raises:
        EvaluationError: the loader is empty, or a batch is too small for statistics (one value for each channel).

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2)).eval()
        >>> data = [(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), None)]
        >>> recalibrate_batchnorm(model, data)[0].running_mean
        tensor([2., 5.])
    """
    result = copy.deepcopy(model)
    norms = running_norms(result)
    if not norms:
        logger.info("%s has no running statistics: nothing to recalibrate", type(model).__name__)
        return result
    try:
        with undisturbed(), collecting(result, norms) as weigh:
            run_over(result, loader, weigh)
    except EvaluationError as error:
        if "more than 1 value per channel" not in str(error) and "more than 1 spatial" not in str(error):
            raise
        raise EvaluationError(
            "a batch has one value for each channel, which has no variance: use larger batches "
            "(drop_last=True if it is the last)"
        ) from error
    names = {module: name for name, module in result.named_modules()}
    broken = [names[norm] for norm in norms if not _finite(norm)]
    if broken:
        logger.warning(
            "the statistics of %r are not finite, and so the network is not: check the data of the loader, and the "
            "weights of the model",
            broken[0],
        )
    return result


def _finite(norm: _NormBase) -> bool:
    return all(s is None or bool(torch.isfinite(s).all()) for s in (norm.running_mean, norm.running_var))


def running_norms(model: nn.Module) -> list[_NormBase]:
    """Return the layers that keep running statistics: BatchNorm and its kin."""
    return [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]


@contextmanager
def collecting(model: nn.Module, norms: list[_NormBase]) -> Iterator[Callable[[int], None]]:
    """Let ``norms`` normalise by each batch and gather running statistics anew, while the rest of ``model`` evaluates.

    Yields a function to be told each batch's size beforehand. Modes and momenta are restored at the end.
    """
    momenta = {norm: norm.momentum for norm in norms}
    seen = 0

    def weigh(examples: int) -> None:
        nonlocal seen
        seen += examples
        for norm in norms:
            norm.momentum = examples / seen  # so that running statistics are the mean over all examples so far

    try:
        with evaluating(model):
            for norm in norms:
                norm.training = True
                norm.reset_running_stats()
            yield weigh
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
