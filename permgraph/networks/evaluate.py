"""Measuring a network on data, without leaving a trace on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from permgraph.errors import EvaluationError
from permgraph.networks.batches import (
    UNCOUNTED,
    Loader,
    Loss,
    are_the_tokens,
    batches,
    device_of,
    fitting,
    loss_of,
    next_tokens,
    split_labelled,
    undisturbed,
)
from permgraph.weights.state_dict import Network


def evaluate_on(
    loader: Loader,
    loss: Loss = nn.functional.cross_entropy,
    *,
    class_dim: int | None = None,
    bins: int | None = None,
    shift: bool | None = None,
) -> Callable[[nn.Module], dict[str, float]]:
    """Return a function that gives a classifier's mean loss and accuracy over ``loader``.

    A batch is a tuple whose last element is the targets and whose others are the model's arguments, or a mapping of
    keyword arguments with the targets under ``"labels"``. The model returns logits, or an object with ``.logits``;
    targets are class indices, of the logits' shape without the classes, or -100 where a place does not count. A batch
    counts by its answers. The labels of Hugging Face's causal language models, which are their ``input_ids``, are
    compared with the logits one place before, so that the loss is the model's own.

    Args:
        loader: a ``DataLoader``, or any sequence of batches. It is read once for each call of the returned function,
            each time with the same state of torch's random generator, which is left as it was.
        loss: called as ``loss(logits, targets)`` with the classes in dimension 1, returns the mean over the batch.
        class_dim: the dimension of the model's logits that holds the classes; by default the one without which they
            have the targets' shape: of 1 and the last, where both fit, 1 for images and the last for ``input_ids``.
        bins: measure the calibration too, over so many bins of confidence: the expected calibration error (Guo et al.
            2017), the mean over answers of the gap between confidence and accuracy in the answer's bin. It is then a
            third metric, ``"calibration"``; lower is better.
        shift: whether targets are tokens, each of which is predicted at the place before it; by default where a model
            of transformers returns the output of a causal one, and they are ``input_ids`` wherever they are not -100.

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
        total, correct, answers = 0.0, 0, 0
        gaps = torch.zeros(bins or 1, dtype=torch.float64)
        with undisturbed():
            for batch in batches(loader):
                args, kwargs, targets = split_labelled(batch, device)
                with fitting(args, kwargs):
                    output = model(*args, **kwargs)
                if shift or (shift is None and _is_causal(output) and are_the_tokens(targets, kwargs.get("input_ids"))):
                    targets = next_tokens(targets)
                logits = output if isinstance(output, Tensor) else output.logits
                logits = logits.movedim(_classes(logits, targets, class_dim, "input_ids" in kwargs), 1)
                guesses = logits.argmax(1)
                if guesses.shape != targets.shape:
                    raise EvaluationError(
                        f"the logits have shape {tuple(logits.shape)} with classes in dimension 1, so the targets must "
                        f"have shape {tuple(guesses.shape)}, not {tuple(targets.shape)}: check the loader and class_dim"
                    )
                counted = targets != UNCOUNTED
                count = int(counted.sum())
                if not count:
                    continue
                total += float(loss_of(loss, logits, targets)) * count
                right = (guesses == targets)[counted]
                correct += int(right.sum())
                if bins is not None:
                    confidence = logits.softmax(1).amax(1)[counted].double().cpu()
                    places = (confidence * bins).long().clamp(0, bins - 1)
                    gaps.index_add_(0, places, confidence - right.double().cpu())
                answers += count
        if not answers:
            raise EvaluationError("no target counts: all are -100, or each text is a single token")
        metrics = {"loss": total / answers, "accuracy": correct / answers}
        return metrics if bins is None else {**metrics, "calibration": float(gaps.abs().sum()) / answers}

    return evaluate


def _is_causal(output: object) -> bool:
    """Whether an output is that of a causal language model of transformers, by the name of its class."""
    return "CausalLM" in type(output).__name__


def _classes(logits: Tensor, targets: Tensor, asked: int | None, tokens: bool) -> int:
    """The dimension of the logits that holds the classes: the one asked for, or that without which the shapes agree."""
    if asked is not None or logits.ndim < 3:
        return 1 if asked is None else asked
    last = logits.shape[:-1] == targets.shape
    first = (logits.shape[0], *logits.shape[2:]) == targets.shape
    return -1 if last and (tokens or not first) else 1


def require_eval_mode(model: nn.Module, role: str) -> None:
    """Refuse a model any part of which is in training mode, naming that part."""
    for name, module in model.named_modules():
        if module.training:
            where = f"its {name!r} ({type(module).__name__}) is" if name else "it is"
            raise EvaluationError(
                f"{role} must be in evaluation mode, but {where} in training mode, where dropout and batch "
                "statistics make a measurement depend on chance: call .eval() first"
            )


def template_of(model: nn.Module | None, **networks: Network) -> nn.Module:
    """The module in which state dicts are run: ``model``, or else the first of ``networks`` that is one.

    Raises EvaluationError if there is none, if one of them is in training mode, or if the one to run has no values.
    """
    given = {**networks, **({} if model is None else {"model": model})}
    modules = {role: network for role, network in given.items() if isinstance(network, nn.Module)}
    for role, module in modules.items():
        require_eval_mode(module, role)
    if not modules:
        which = "a and b are both" if set(networks) == {"a", "b"} else "the networks are all"
        raise EvaluationError(f"{which} state dicts: pass the module that runs them as model=...")
    role, module = ("model", model) if model is not None else next(iter(modules.items()))
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise EvaluationError(f"{role} is offloaded or without values: pass a module that holds them as model=...")
    return module
