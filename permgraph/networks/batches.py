"""Batches: what a loader may give, how a batch becomes a network's arguments, and what is said of one that does not.

A batch is a tuple whose last element is the targets and whose others are the network's arguments, a mapping of keyword
arguments with the targets under ``"labels"``, or a tensor by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from permgraph.errors import EvaluationError, NonFiniteError, PermgraphError, in_one_line

Loader: TypeAlias = Iterable[Any]
Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""Called with the network's output (or its ``.logits``) and the targets, gives the mean over the batch."""
MakeOptimizer: TypeAlias = Callable[[list[Tensor]], torch.optim.Optimizer]
"""Makes an optimizer for a list of tensors."""

NO_BATCH = (
    "the loader gave no batch: it is empty, or it is a generator that was already used up "
    "(pass a DataLoader or a list of batches, which can be read again)"
)


@contextmanager
def seeded(seed: int, device: torch.device | None) -> Iterator[torch.Generator]:
    """A generator, and torch's global ones seeded for as long, and afterwards as they were."""
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for each in devices:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Measure without gradients, and leave torch's global random generator as it was.

    A ``DataLoader`` draws from that generator whenever it is iterated, shuffled or not.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Run models in evaluation mode; afterwards each of their modules is in its own mode again."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def require_rereadable(loader: Loader) -> None:
    """Refuse a generator, which gives its batches only once."""
    if isinstance(loader, Iterator):
        raise EvaluationError(
            "the loader is a generator, which can be read only once: give a DataLoader or a list of batches"
        )


def batches(loader: Loader) -> Iterator[Any]:
    """The batches of a loader; raises EvaluationError if there is none."""
    empty = True
    for batch in loader:
        empty = False
        yield batch
    if empty:
        raise EvaluationError(NO_BATCH)


def split_batch(batch: Any, device: torch.device | None) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """A batch on the device, as positional arguments, keyword arguments, and the targets (or None)."""
    if isinstance(batch, Tensor):
        return (to(batch, device),), {}, None
    if isinstance(batch, Mapping):
        kwargs = {key: to(value, device) for key, value in batch.items()}
        return (), kwargs, kwargs.pop("labels", None)
    if isinstance(batch, Sequence) and batch:
        *inputs, last = (to(value, device) for value in batch)
        return (tuple(inputs), {}, last) if inputs else ((last,), {}, None)
    raise EvaluationError(
        f"a batch must be a tensor, a tuple (inputs, targets) or a mapping, not {type(batch).__name__}: "
        "convert it in the loader's collate_fn"
    )


def split_labelled(batch: Any, device: torch.device | None) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """`split_batch` of a batch that must have targets."""
    args, kwargs, targets = split_batch(batch, device)
    if targets is None:
        raise EvaluationError("a batch holds no targets: give (inputs, targets) tuples, or mappings with 'labels'")
    return args, kwargs, targets


UNCOUNTED = -100
"""The target of a place that does not count, as in `torch.nn.functional.cross_entropy`."""


def next_tokens(labels: Tensor) -> Tensor:
    """Labels that stand at their own tokens, (N, T), each moved to the place before it, where it is predicted.

    So Hugging Face's causal models read ``labels``, which are the ``input_ids`` themselves. The last place of each row
    predicts nothing that is known, and does not count.
    """
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=UNCOUNTED)


def are_the_tokens(targets: Any, tokens: Any) -> bool:
    """Whether labels are the tokens of their batch at every place that counts, and some place does."""
    if not isinstance(targets, Tensor) or not isinstance(tokens, Tensor):
        return False
    if targets.ndim != 2 or targets.shape != tokens.shape or targets.is_floating_point():
        return False
    counted = targets != UNCOUNTED
    return bool(counted.any()) and bool((targets == tokens)[counted].all())


@contextmanager
def fitting(
    args: Sequence[Any],
    kwargs: Mapping[str, Any] = MappingProxyType({}),
    what: str = "the model cannot run on a batch",
) -> Iterator[None]:
    """Raise EvaluationError, with the shapes of a batch, where the code inside fails on it.

    Running out of memory says nothing of the batch, and passes as it is; so does what permgraph itself refuses.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, PermgraphError) or is_out_of_memory(error):
            raise
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
        which = f"of shape {shapes}" if shapes else "without a tensor"
        said = in_one_line(error).rstrip(".")
        raise EvaluationError(f"{what} {which}: {said}. Check what the loader gives") from error


def run_on(model: nn.Module, batch: Any) -> Any:
    """What a model returns on a batch."""
    args, kwargs, _ = split_batch(batch, device_of(model))
    with fitting(args, kwargs):
        return model(*args, **kwargs)


def run_over(model: nn.Module, loader: Loader, before: Callable[[int], object] | None = None) -> None:
    """Run a model on every batch; ``before`` is told how many examples each has, beforehand."""
    device = device_of(model)
    for batch in batches(loader):
        args, kwargs, _ = split_batch(batch, device)
        if before is not None:
            before(batch_size(args, kwargs))
        with fitting(args, kwargs):
            model(*args, **kwargs)


@contextmanager
def observed(modules: Mapping[str, nn.Module], see: Callable[[str, nn.Module, Any], Any]) -> Iterator[None]:
    """Call ``see(name, module, output)`` on each output; what it returns, if anything, takes the output's place."""

    def hook(name: str) -> Callable[[nn.Module, Any, Any], Any]:
        return lambda module, _inputs, output: see(name, module, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine, not the batch or the network, is to blame."""
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def loss_of(loss: Loss, output: Any, targets: Any) -> Tensor:
    """The loss of a network's output, or of its ``.logits``.

    Raises:
        EvaluationError: the loss does not take them, or is not one number.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", output)
    with fitting((logits, targets), what="the loss cannot be taken of logits and targets"):
        value = loss(logits, targets)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise EvaluationError("loss must return one number as a tensor: the mean over the batch")
    return value


def require_finite_loss(value: Tensor, network: str, batch: str = "a batch") -> None:
    """Refuse a loss that is NaN or infinite, of the network ("at the midpoint") and the batch that are named."""
    if not bool(torch.isfinite(value.detach())):
        raise NonFiniteError(
            f"the loss {network} is {value.item()} on {batch}: check the data and the weights, or lower the rate"
        )


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The length of the first tensor among a model's arguments."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise EvaluationError("a batch holds no tensor, so its size is not known")


def device_of(model: nn.Module) -> torch.device | None:
    """The device of the model's first parameter or buffer, or None if it has neither."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return None


def to(value: Any, device: torch.device | None) -> Any:
    """A tensor on the device, if one is given; anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) and device is not None else value
