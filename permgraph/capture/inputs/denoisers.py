"""Finders for networks that take the noise out of images, videos and sounds, a step at a time.

Beside what is denoised they take the step, and mostly a text as vectors; some take vectors of the whole text, the
places of tokens, or what else the config names. What the names say is tried, and whatever does not run is dropped.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.capture.inputs.forms import Arguments, keyword_finder
from permgraph.capture.inputs.layers import BATCH, configured, filled, floats, integer, integers, required, whole

#: Tokens of a text, frames, and places along an edge of what is denoised.
TEXT, FRAMES, SIDE = 13, 5, 16
_DENOISED = ("hidden_states", "sample", "latents", "x")
_STEPS = frozenset({"timestep", "timesteps", "t", "r_timestep", "timestep_r", "timestep_ratio"})
#: Those which a network takes even where it does not say that it must.
_FIRST_STEPS = frozenset({"timestep", "timesteps", "t", "timestep_ratio"})
_TEXTS = frozenset({"encoder_hidden_states", "context", "cap_feats", "text_bth"})
_TEXT_PART = re.compile(
    r"(context|caption|text|cap|txt|condition)\w*(embed|proj|norm|in\b)|encoder_hid_proj|attn2\.to_k|y_embedder"
)
_TEXT_WIDTHS = (
    "cross_attention_dim",
    "joint_attention_dim",
    "caption_channels",
    "text_embed_dim",
    "text_dim",
    "cap_feat_dim",
    "encoder_hidden_states_dim",
    "caption_dim",
    "text_embed_dims",
    "in_text_dim",
    "cross_attention_input_dim",
    "context_in_dim",
    "text_states_dim",
    "text_hidden_dim",
    "caption_feature_dim",
    "prompt_embed_dim",
)
_TEXT_MASKS = ("encoder_attention_mask", "encoder_mask", "encoder_hidden_states_mask")
#: What the part is called that takes what is denoised.
_FIRST_PART = re.compile(r"(^|\.)(patch\w*|pos_embed|x_embed\w*|proj_in|conv_in|img_in|input_proj\w*)($|\.)")
#: Vectors of a whole text, by what a config calls their width.
_POOLED_WIDTHS = (
    "pooled_projection_dim",
    "pooled_projection_in_dim",
    "in_text_dim2",
    "clip_text_pooled_in_channels",
    "cond_embed_dim",
)


def _text_widths(model: nn.Module) -> list[int]:
    """How wide the vectors of a text may be: by the config, and by the first layers of what is called after it."""
    named = (
        integer(w[0] if isinstance(w, (list, tuple)) and w else w) for w in (configured(model, n) for n in _TEXT_WIDTHS)
    )
    found = [width for width in named if width]
    for path, part in model.named_modules():
        width = getattr(part, "in_features", None) or next(iter(getattr(part, "normalized_shape", ())), None)
        if isinstance(width, int) and _TEXT_PART.search(path):
            found.append(width)
            break
    return list(dict.fromkeys(found))[:3] or [1]


def _channels(model: nn.Module) -> int:
    first = next((m.in_channels for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), 4)
    return max(1, whole(configured(model, "in_channels", "in_dim", "in_visual_dim", "latent_channels"), first))


def _denoised(model: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """What is denoised, first in the form that the first layer takes; and how many tokens that is in a row."""
    channels = _channels(model)
    size = integer(configured(model, "sample_size"))
    sides = [size] if size is not None and 4 <= size <= 64 else [SIDE]
    high, wide = (integer(configured(model, name)) for name in ("sample_height", "sample_width"))
    if high is not None and wide is not None and high * wide <= 64 * 64:
        sides = []
    edges = [(high or 0, wide or 0)] if not sides else [(side, side) for side in sides]
    frames = whole(configured(model, "sample_frames", "num_frames"), FRAMES)
    shorter = max(1, whole(configured(model, "temporal_compression_ratio"), 1))
    frames = (frames - 1) // shorter + 1 if frames <= 65 else FRAMES
    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    taking = ((path, m) for path, m in model.named_modules() if isinstance(m, layers) and not _is_for_time(m, channels))
    candidates = list(taking)
    first = next((m for path, m in candidates if _FIRST_PART.search(path)), candidates[0][1] if candidates else None)
    row = (floats(model, BATCH, SIDE, channels), SIDE)
    images = [(floats(model, BATCH, channels, *edge), edge[0] * edge[1]) for edge in edges]
    videos = [(floats(model, BATCH, channels, frames, *edge), frames * edge[0] * edge[1]) for edge in edges]
    clips = [(floats(model, BATCH, frames, channels, *edge), frames * edge[0] * edge[1]) for edge in edges]
    sound = (floats(model, BATCH, channels, 32), 32)
    if isinstance(first, nn.Conv3d):
        yield from (*videos, *images, *clips, row)
    elif isinstance(first, nn.Conv1d):
        yield from (sound, row, *images)
    elif isinstance(first, nn.Conv2d):
        yield from (*images, *videos, *clips, row)
    else:
        yield from (row, *videos, *images, *clips, sound)


def _is_for_time(layer: nn.Module, channels: int) -> bool:
    """Whether a first layer can be none that takes what is denoised."""
    return isinstance(layer, nn.Linear) and layer.in_features % max(1, channels) != 0


def _beside(
    model: nn.Module, names: frozenset[str], needed: set[str], pixels: Tensor, tokens: int, width: int
) -> dict[str, Any]:
    """What goes with it, by name: what forward requires or does not do without, and what the config asks for."""
    given: dict[str, Any] = {}
    for name in sorted(names & _STEPS & (needed | _FIRST_STEPS)):
        given[name] = integers(1000, BATCH) if name != "timestep_ratio" else floats(model, BATCH).abs()
    for name in sorted(names & _TEXTS):
        given[name] = floats(model, BATCH, TEXT, width)
    axes = configured(model, "axes_dims_rope", "axes_dim", "axes_dims")
    axes_count = len(axes) if isinstance(axes, (list, tuple)) else 3
    pooled = integer(configured(model, *_POOLED_WIDTHS))
    makers: dict[str, Any] = {
        "pooled_projections": lambda: floats(model, BATCH, pooled or width),
        "txt_ids": lambda: torch.zeros(TEXT, axes_count, device="cpu"),
        "img_ids": lambda: torch.stack([torch.arange(tokens, device="cpu") % 4.0] * axes_count, -1),
        "encoder_attention_mask": lambda: filled(1, BATCH, TEXT).bool(),
        "encoder_mask": lambda: filled(1, BATCH, TEXT).bool(),
        "encoder_hidden_states_mask": lambda: filled(1, BATCH, TEXT).bool(),
        "image_rotary_emb": lambda: _turns(model),
        "class_labels": lambda: filled(1, BATCH),
        "guidance": lambda: floats(model, BATCH).abs(),
        "controlnet_cond": lambda: _condition(model, pixels),
        "added_cond_kwargs": lambda: _added(model),
        **dict.fromkeys(
            ("original_size", "target_size", "crop_coords"), lambda: torch.tensor([[64.0, 64.0]] * BATCH, device="cpu")
        ),
        "added_time_ids": lambda: floats(model, BATCH, 3).abs(),
        "fps": lambda: filled(7, BATCH),
        "image_latents": lambda: pixels.clone(),
    }
    asked = {
        "pooled_projections": pooled is not None or "pooled_projections" in needed,
        "txt_ids": True,
        "img_ids": True,
        "class_labels": configured(model, "num_class_embeds") is not None
        or configured(model, "norm_type") == "ada_norm_zero",
        "guidance": bool(configured(model, "guidance_embeds", "guidance_embed")),
        "added_cond_kwargs": _wants_added(model),
    }
    for name, make in makers.items():
        if name in names and name not in given and (name in needed or asked.get(name, False)):
            given[name] = make()
    return given


def _turns(model: nn.Module) -> Tensor:
    """What turns the pairs of a head's channels at each place of an image, as complex numbers."""
    width, heads = configured(model, "hidden_size"), configured(model, "num_attention_heads")
    channels = whole(width, 64) // max(1, whole(heads, 1))
    angles = torch.arange(64 * 64 * (channels // 2), dtype=torch.float32, device="cpu").reshape(64, 64, -1)
    return torch.polar(torch.ones_like(angles), angles)


def _condition(model: nn.Module, pixels: Tensor) -> Tensor:
    """The picture by which a network for control steers: as finely drawn as pixels, or as what is denoised."""
    channels = integer(configured(model, "conditioning_channels"))
    if channels is None or pixels.ndim != 4:
        return pixels.clone()
    embedding = configured(model, "conditioning_embedding_out_channels")
    times = 2 ** (len(embedding) - 1) if isinstance(embedding, (list, tuple)) else 8
    return floats(model, BATCH, channels, *(times * edge for edge in pixels.shape[-2:]))


def _wants_added(model: nn.Module) -> bool:
    return (
        configured(model, "addition_embed_type") == "text_time"
        or configured(model, "use_additional_conditions") is not None
    )


def _added(model: nn.Module) -> dict[str, Any]:
    """What some networks take beside the step, in a dictionary: a whole text and sizes of the image."""
    times = whole(configured(model, "addition_time_embed_dim"), 256)
    total = integer(configured(model, "projection_class_embeddings_input_dim"))
    if total is None or total <= 6 * times:
        size = torch.tensor([[64.0, 64.0]] * BATCH, device="cpu")
        return {"resolution": size, "aspect_ratio": size[:, :1].clone()}
    return {"text_embeds": floats(model, BATCH, total - 6 * times), "time_ids": floats(model, BATCH, 6).abs()}


def begun(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """What is denoised with its step, the text, and what else is known by its name, of what forward requires."""
    main = next((name for name in _DENOISED if name in names), None)
    needed = set(required(model))
    if main is None or not (names & _STEPS) or getattr(model, "config", None) is None or "input_ids" in needed:
        return
    masks = {name for name in names - needed if name in _TEXT_MASKS}
    for asked in (needed, needed | masks) if masks else (needed,):
        for (pixels, tokens), width in itertools.islice(itertools.product(_denoised(model), _text_widths(model)), 10):
            yield {main: pixels, **_beside(model, names, asked, pixels, tokens, width)}


@keyword_finder("denoisers")
def denoisers(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """What is denoised with its step, the text, and whatever else forward requires or the config asks for."""
    needed = set(required(model))
    yield from (proposed for proposed in begun(model, names) if needed <= proposed.keys())
