"""`SentencePipeline`: the modules of a sentence-transformers folder as one network, from tokens to embeddings."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.errors import CaptureError
from permgraph.io.parts import SentenceModule, sentence_modules

CONFIGURATION = "config.json"
TRANSFORMER_CONFIGURATION = "sentence_bert_config.json"  # those by other names are of old, and tell no task
NAMED_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The settings of old that each ask for one way to pool, in the order in which their results are joined."""


class SentencePipeline(nn.Module):
    """A transformer, and what a sentence-transformers folder has after it; its embedding is the output.

    ``forward(input_ids, attention_mask)`` takes two integer tensors of shape ``(sentences, tokens)`` and returns the
    embeddings, of shape ``(sentences, features)``. A parameter's name begins with its module's in ``modules.json``.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    @property
    def config(self) -> Any:
        """The transformer's configuration, which says what it is run on."""
        return next(self.children()).config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The embeddings of sentences, ``(sentences, features)``."""
        first, *others = self.children()
        x = first(input_ids=input_ids, attention_mask=attention_mask)[0]
        for module in others:
            x = module(x, attention_mask) if isinstance(module, Pooling) else module(x)
        embedding: Tensor = x
        return embedding


class Pooling(nn.Module):
    """One vector for each sentence from those of its tokens, by one way or several whose results are joined.

    The ways are those of ``sentence_transformers``: the first token, the last, the maximum, or a mean over the tokens
    that the mask shows, plain, over the root of their number, or by their places.
    """

    def __init__(self, modes: tuple[str, ...]) -> None:
        super().__init__()
        self.modes = modes

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """From ``(sentences, tokens, features)`` to ``(sentences, features of all ways)``."""
        return torch.cat([self._pooled(mode, x, mask) for mode in self.modes], dim=-1)

    def _pooled(self, mode: str, x: Tensor, mask: Tensor) -> Tensor:
        shown = mask.unsqueeze(-1).to(x.dtype)
        places = torch.arange(x.shape[1], device=x.device)
        if mode == "cls":
            return self._token(x, mask.to(torch.int).argmax(1))
        if mode == "lasttoken":
            return self._token(x * shown, (mask * (places + 1)).argmax(1))
        if mode == "max":
            return x.masked_fill(shown == 0, float("-inf")).max(dim=1).values
        if mode == "weightedmean":
            before = mask.to(torch.int).argmax(1).reshape(-1, 1, 1)
            shown = shown * (places.reshape(1, -1, 1) + 1 - before).to(x.dtype)
        count = shown.sum(1).clamp(min=1e-9)
        return (x * shown).sum(1) / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)

    @staticmethod
    def _token(x: Tensor, at: Tensor) -> Tensor:
        return torch.gather(x, 1, at.reshape(-1, 1, 1).expand(-1, 1, x.shape[-1])).squeeze(1)


class Dense(nn.Module):
    """A linear layer with an activation, and what went in besides if it is residual."""

    def __init__(self, inputs: int, outputs: int, bias: bool, activation: nn.Module, residual: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)
        self.activation_function = activation
        if residual:
            self.residual = nn.Linear(inputs, outputs, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """From ``(sentences, inputs)`` to ``(sentences, outputs)``."""
        out: Tensor = self.activation_function(self.linear(x))
        return out + self.residual(x) if hasattr(self, "residual") else out


class Norm(nn.Module):
    """A layer norm over the features."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        out: Tensor = self.norm(x)
        return out


class Normalize(nn.Module):
    """Embeddings of length 1."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return nn.functional.normalize(x, p=2, dim=-1)


def sentence_pipeline(folder: Path, transformer: Callable[[Path], Callable[[], nn.Module]]) -> Callable[[], nn.Module]:
    """What makes the network of a sentence-transformers folder.

    Args:
        folder: with ``modules.json``.
        transformer: what makes the headless model that a folder of transformers describes.

    Raises:
        CaptureError: a module is of a kind that is not known, or is set to something that is not.
        CheckpointError: ``modules.json`` is no list of modules.
    """
    first, *others = sentence_modules(folder)
    if first.kind != "Transformer":
        raise _unknown(folder, first)
    settings = _settings(first, TRANSFORMER_CONFIGURATION)
    task = settings.get("transformer_task", "feature-extraction")
    text = (settings.get("modality_config") or {}).get("text", {"method": "forward"})
    if task != "feature-extraction" or text.get("method_output_name", "last_hidden_state") != "last_hidden_state":
        raise CaptureError(
            f"{folder}: its transformer's task is {task!r} with {text}: only embeddings of texts are known"
        )
    makers: dict[str, Callable[[], nn.Module]] = {first.name: transformer(first.folder)}
    for module in others:
        makers[module.name] = _maker(folder, module)
    return lambda: SentencePipeline({name: make() for name, make in makers.items()})


def _maker(folder: Path, module: SentenceModule) -> Callable[[], nn.Module]:
    """What makes a module after the transformer."""
    if module.package.partition(".")[0] != "sentence_transformers" or module.kind not in MAKERS:
        raise _unknown(folder, module)
    settings = _settings(module, CONFIGURATION)
    for key in ("module_input_name", "module_output_name"):
        if settings.get(key) not in (None, "sentence_embedding"):
            raise CaptureError(f"{module.folder}: {key} is {settings[key]!r}: only sentence embeddings are known")
    try:
        return MAKERS[module.kind](module, settings)
    except KeyError as error:
        raise CaptureError(f"{module.folder / CONFIGURATION}: it does not say {error}") from None


def _pooling(module: SentenceModule, settings: Mapping[str, Any]) -> Callable[[], nn.Module]:
    asked = settings.get("pooling_mode") or [mode for key, mode in NAMED_MODES.items() if settings.get(key)] or ["mean"]
    modes = (asked,) if isinstance(asked, str) else tuple(asked)
    unknown = [mode for mode in modes if mode not in NAMED_MODES.values()]
    if unknown:
        raise CaptureError(
            f"{module.folder}: pools by {unknown[0]!r}, which is not known: {', '.join(NAMED_MODES.values())}"
        )
    return lambda: Pooling(modes)


def _dense(module: SentenceModule, settings: Mapping[str, Any]) -> Callable[[], nn.Module]:
    inputs, outputs = int(settings["in_features"]), int(settings["out_features"])
    named = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
    package, _, kind = named.rpartition(".")
    known = getattr(importlib.import_module("torch.nn"), kind, None) if package.partition(".")[0] == "torch" else None
    if not (isinstance(known, type) and issubclass(known, nn.Module)):
        raise CaptureError(f"{module.folder}: its activation is {named}, which is none of torch.nn, and is not run")
    bias, residual = bool(settings.get("bias", True)), bool(settings.get("use_residual", False))
    return lambda: Dense(inputs, outputs, bias, known(), residual)


MAKERS: Mapping[str, Callable[[SentenceModule, Mapping[str, Any]], Callable[[], nn.Module]]] = {
    "Pooling": _pooling,
    "Dense": _dense,
    "LayerNorm": lambda _, settings: lambda: Norm(int(settings["dimension"])),
    "Dropout": lambda _, settings: lambda: nn.Dropout(float(settings.get("dropout", 0.2))),
    "Normalize": lambda _module, _settings: Normalize,
}
"""The modules that may stand after the transformer, by class."""


def _settings(module: SentenceModule, name: str) -> dict[str, Any]:
    path = module.folder / name
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise CaptureError(f"{path}: not a configuration: {error}") from None
    if not isinstance(found, dict):
        raise CaptureError(f"{path}: not a configuration, but a {type(found).__name__}")
    return found


def _unknown(folder: Path, module: SentenceModule) -> CaptureError:
    return CaptureError(
        f"{folder}: its module {module.name!r} is a {module.kind} of {module.package or 'nothing'}; known are a "
        f"Transformer and after it {', '.join(MAKERS)} of sentence_transformers: build it in a file of yours and say "
        "file.py:factory"
    )
