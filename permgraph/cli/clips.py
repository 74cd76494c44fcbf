"""Models of open_clip, built from the configuration in their folder, and what they are run on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from permgraph.capture.inputs import input_finder
from permgraph.errors import CaptureError


def open_clip_model(path: Path) -> Callable[[], Any]:
    """What makes the model that an ``open_clip_config.json`` describes; no weights are read.

    Raises:
        CaptureError: the file is none, or its model needs weights that are not in the folder.
        MissingExtraError: open_clip is not installed.
    """
    from permgraph.cli.folders import package

    open_clip = package("open_clip", "open-clip")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
        text = config["text_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CaptureError(f"{path}: not a configuration of open_clip: {type(error).__name__}: {error}") from None
    config = copy.deepcopy(config)
    custom = config.pop("custom_text", False) or "hf_model_name" in text
    if text.get("hf_model_name") and not text.get("hf_model_config"):
        raise CaptureError(
            f"{path}: its text tower is {text['hf_model_name']!r} of the Hub, which is not in the folder: build it in "
            "a file of yours and say file.py:factory"
        )
    coca = custom and "multimodal_cfg" in config
    made = open_clip.CoCa if coca else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    return lambda: made(**config)


@input_finder("open_clip")
def of_open_clip(model: nn.Module) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """An image and a text, so that both towers are run."""
    if type(model).__module__.partition(".")[0] != "open_clip" or not hasattr(model, "visual"):
        return
    size = getattr(model.visual, "image_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    length = getattr(model, "context_length", 77)
    bound = int(getattr(model, "vocab_size", None) or getattr(getattr(model, "text", None), "vocab_size", None) or 2)
    drawn = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    image = torch.randn((2, 3, height, width), generator=drawn).to(dtype)
    yield (), {"image": image, "text": torch.randint(bound, (2, length), generator=drawn)}
