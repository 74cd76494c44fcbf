"""Measuring a network on data, without leaving a trace on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.errors import EvaluationError, PermgraphError

Loader = Iterable[Any]
Loss = Callable[[Tensor, Tensor], Tensor]


def evaluate_on(
    loader: Loader, loss: Loss = nn.functional.cross_entropy, *, class_dim: int = 1, bins: int | None = None
) -> Callable[[nn.Module], dict[str, float]]:
    """Return a function that gives a classifier's mean loss and accuracy over ``loader``.

    A batch is a tuple whose last element is the targets and whose others are the model's arguments, or a mapping of
    keyword arguments with the targets under ``"labels"``. The model returns logits, or an object with ``.logits``;
    targets are class indices, of the logits' shape without the classes.

    Args:
        loader: a ``DataLoader``, or any sequence of batches. It is read once for each call of the returned function,
            each time with the same state of torch's random generator, which is left as it was.
        loss: called as ``loss(logits, targets)`` with the classes in dimension 1, returns the mean over the batch.
        class_dim: the dimension of the model's logits that holds the classes: -1 for a language model.
        bins: measure the calibration too, over so many bins of confidence: the expected calibration error (Guo et al.
            2017), the mean over answers of the gap between confidence and accuracy in the answer's bin. It is then a
            third metric, ``"calibration"``; lower is better.

    Raises:
        EvaluationError: ``bins`` is below 1. When called: the loader is empty (or a generator that has been used up),
            a batch has no targets or targets of another shape, the model cannot run on it, or is in training mode.

    Example:
        >>> evaluate = evaluate_on([(torch.eye(2), torch.tensor([0, 1]))])
        >>> evaluate(nn.Identity().eval())["accuracy"]
        1.0
    """

    if bins is not None and bins < 1:
        raise EvaluationError(f"bins={bins}: calibration needs 1 or more")

    def evaluate(model: nn.Module) -> dict[str, float]:
        require_eval_mode(model, "the model to evaluate")
        device = device_of(model)
        total, correct, examples, answers = 0.0, 0, 0, 0
        gaps = torch.zeros(bins or 1, dtype=torch.float64)
        with undisturbed():
            for batch in batches(loader):
                args, kwargs, targets = split_batch(batch, device)
                if targets is None:
                    raise EvaluationError(
                        "a batch holds no targets: give (inputs, targets) tuples, or mappings with 'labels'"
                    )
                with fitting(args, kwargs):
                    output = model(*args, **kwargs)
                logits = (output if isinstance(output, Tensor) else output.logits).movedim(class_dim, 1)
                guesses = logits.argmax(1)
                if guesses.shape != targets.shape:
                    raise EvaluationError(
                        f"the logits have shape {tuple(logits.shape)} with classes in dimension 1, so the targets must "
                        f"have shape {tuple(guesses.shape)}, not {tuple(targets.shape)}: check the loader and class_dim"
                    )
                with fitting((logits, targets), what="the loss cannot be taken of logits and targets"):
                    value = loss(logits, targets)
                total += float(value) * len(targets)
                right = guesses == targets
                correct += int(right.sum())
                if bins is not None:
                    confidence = logits.softmax(1).amax(1).double().cpu()
                    places = (confidence * bins).long().clamp(0, bins - 1).flatten()
                    gaps.index_add_(0, places, (confidence - right.double().cpu()).flatten())
                examples += len(targets)
                answers += targets.numel()
        found = {"loss": total / examples, "accuracy": correct / answers}
        return found if bins is None else {**found, "calibration": float(gaps.abs().sum()) / answers}

    return evaluate


@contextmanager
def undisturbed() -> Iterator[None]:
    """Measure without gradients, and leave torch's global random generator as it was.

    A ``DataLoader`` draws from that generator whenever it is iterated, shuffled or not.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        yield


def batches(loader: Loader) -> Iterator[Any]:
    """Yield the batches of ``loader``, at least one."""
    empty = True
    for batch in loader:
        empty = False
        yield batch
    if empty:
        raise EvaluationError(
            "the loader gave no batch: it is empty, or it is a generator that was already used up "
            "(pass a DataLoader or a list of batches, which can be read again)"
        )


def split_batch(batch: Any, device: torch.device | None) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """Return a batch as a model's positional arguments, its keyword arguments, and the targets (or None)."""
    if isinstance(batch, Tensor):
        return (batch.to(device),), {}, None
    if isinstance(batch, Mapping):
        kwargs = {key: _to(value, device) for key, value in batch.items()}
        return (), kwargs, kwargs.pop("labels", None)
    if isinstance(batch, Sequence) and batch:
        *inputs, last = (_to(value, device) for value in batch)
        return (tuple(inputs), {}, last) if inputs else ((last,), {}, None)
    raise EvaluationError(
        f"a batch must be a tensor, a tuple (inputs, targets) or a mapping, not {type(batch).__name__}: "
        "convert it in the loader's collate_fn"
    )


@contextmanager
def fitting(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] = MappingProxyType({}),
    what: str = "the model cannot run on a batch",
) -> Iterator[None]:
    """Say of which shapes a batch is that the model, or the loss, does not take."""
    try:
        yield
    except (PermgraphError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
        which = f"of shape {shapes}" if shapes else "without a tensor"
        raise EvaluationError(f"{what} {which}: {str(error).rstrip('.')}. Check what the loader gives") from error


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the length of the first tensor among a model's arguments."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise EvaluationError("a batch holds no tensor, so its size is not known")


def require_eval_mode(model: nn.Module, role: str) -> None:
    """Refuse a model any part of which is in training mode, naming that part."""
    for name, module in model.named_modules():
        if module.training:
            where = f"its {name!r} ({type(module).__name__}) is" if name else "it is"
            raise EvaluationError(
                f"{role} must be in evaluation mode, but {where} in training mode, where dropout and batch "
                "statistics make a measurement depend on chance: call .eval() first"
            )


def template_of(model: nn.Module | None, **networks: nn.Module | Mapping[str, Tensor]) -> nn.Module:
    """The module in which state dicts are run: ``model``, or else the first of ``networks`` that is one.

    Raises EvaluationError if there is none, or if one of them is in training mode.
    """
    given = {**networks, **({} if model is None else {"model": model})}
    modules = {role: network for role, network in given.items() if isinstance(network, nn.Module)}
    for role, module in modules.items():
        require_eval_mode(module, role)
    if not modules:
        which = "a and b are both" if set(networks) == {"a", "b"} else "the networks are all"
        raise EvaluationError(f"{which} state dicts: pass the module that runs them as model=...")
    return modules["model"] if model is not None else next(iter(modules.values()))


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of the model's first parameter or buffer, or None if it has neither."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return None


def _to(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if isinstance(value, Tensor) and device is not None else value
