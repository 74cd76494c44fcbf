"""The finders of example inputs that come with the library.

Sizes are only bookkeeping to the graph, so they are small, and unlike the sizes that models are made of: a batch of 2,
19 positions. Values are random and fixed, so that the inputs may serve for a real forward pass later.
"""

from __future__ import annotations

import inspect
import itertools
import math
import numbers
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.capture.inputs.registry import Candidate, input_finder
from permgraph.capture.python_state import attributes_of

BATCH = 2
LENGTH = 19
#: So long the finder of layers tries candidates before the search has its turn, and as long after it.
SECONDS_FOR_LAYERS = 2.5
#: Where to try one takes little, so many are tried, and for so long at the least.
MANY, LEAST_SECONDS = 30, 1.0
#: Square image sizes in the order in which they are tried.
SIDES = (32, 64, 224, 299, 28, 96, 128, 160, 192, 256, 384, 448, 512, 16, 8)


def floats(model: nn.Module, *shape: int) -> Tensor:
    """Normal random numbers in the dtype of the model's first floating-point parameter."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)
    return values.to(dtype)


def integers(bound: int, *shape: int) -> Tensor:
    """Random integers from 0 up to, and without, `bound`."""
    return torch.randint(max(bound, 1), shape, generator=torch.Generator().manual_seed(0), device="cpu")


def filled(value: int, *shape: int) -> Tensor:
    """The same integer throughout."""
    return torch.full(shape, value, device="cpu")


# -- what a config or the module's attributes say about sizes -----------------------------------------------------


def setting(config: Any, *names: str) -> Any:
    """The first of these attributes that a config has, looking into the configs inside it afterwards."""
    pending, seen = [config], set()
    while pending:
        current = pending.pop(0)
        values = current if isinstance(current, dict) else attributes_of(current)
        if values is None or isinstance(current, (nn.Module, Tensor, type)) or id(current) in seen:
            continue
        seen.add(id(current))
        for name in names:
            value = values.get(name) if isinstance(current, dict) else _attribute(current, name)
            if value is not None:
                return value
        pending.extend(value for value in values.values() if attributes_of(value) is not None)
    return None


def _attribute(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name, None)
    except Exception:  # whatever a property of somebody's configuration raises, it names no size
        return None


def configured(model: nn.Module, *names: str) -> Any:
    """The first of these that a model's config names."""
    return setting(getattr(model, "config", None), *names)


def integer(value: Any) -> int | None:
    """A whole number, Python's or numpy's, as Python's; None for anything else, truth values too."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def whole(value: Any, default: int) -> int:
    """A size as one number: a pair or a dict of sizes gives its first."""
    if isinstance(value, dict):
        value = next(iter(value.values()), None)
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    number = integer(value)
    return default if number is None else number


def named_sides(model: nn.Module) -> list[tuple[int, int]]:
    """Heights and widths of images that the model's config or its modules name."""
    named: list[Any] = [configured(model, "image_size", "img_size", "input_size", "max_img_size", "crop_size")]
    for module in model.modules():
        named += [vars(module).get("image_size"), vars(module).get("img_size")]
    found: list[tuple[int, int]] = []
    for value in named:
        if isinstance(value, dict) and {"height", "width"} <= value.keys():
            value = (value["height"], value["width"])
        pair = value if isinstance(value, (list, tuple)) else (value, value)
        height, width = map(integer, pair) if len(pair) == 2 else (None, None)
        if height is not None and width is not None:
            found.append((height, width))
    return list(dict.fromkeys(found))


def sides(model: nn.Module) -> list[tuple[int, int]]:
    """Heights and widths to try: those that the model names, then common ones."""
    return list(dict.fromkeys([*named_sides(model), *((side, side) for side in SIDES)]))


def vocabulary(model: nn.Module) -> int:
    """How many token ids are safe to use."""
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    bound = configured(model, "vocab_size", "n_tokens", "num_embeddings")
    first = tables[0] if tables else 3
    return min(whole(bound, first), first) if tables else whole(bound, 3)


# -- tensors for an argument of a known name --------------------------------------------------------------------


def _text_lengths(model: nn.Module) -> list[int]:
    """How many tokens the parts of a model say that a text has, where they say it."""
    held = (
        vars(module).get(name) for module in model.modules() for name in ("context_length", "max_seq_len", "block_size")
    )
    lengths = (integer(value) for value in held)
    return list(dict.fromkeys(length for length in lengths if length is not None and 1 < length <= 4096))[:1]


def _token_ids(model: nn.Module) -> Iterator[Tensor]:
    bound = vocabulary(model)
    config = getattr(model, "config", None)
    books = setting(config, "num_codebooks", "n_codebooks", "num_quantizers", "delay_pattern")
    count = len(books) if isinstance(books, list) else whole(books, 0)
    end = setting(config, "eos_token_id")
    told = vars(config).items() if hasattr(config, "__dict__") else ()
    starts = [v for k, v in told if k.endswith("_bos_token_id") and isinstance(v, int) and 0 < v < bound and v != end]
    # Then multiple choice; and sound as tokens of several codebooks, with or without those of a text beside them, or
    # with those of each codebook in a row of their own.
    coded = ((BATCH, LENGTH, count), (BATCH, LENGTH, count + 1), (BATCH * count, LENGTH)) if count else ()
    tables = (setting(config, "max_position_embeddings"), setting(config, "max_target_positions"))
    most = min((size for size in tables if isinstance(size, int) and size > 1), default=LENGTH)
    short = ((BATCH, most),) if most < LENGTH else ()
    exact = tuple((BATCH, length) for length in _text_lengths(model))
    for shape in (*short, (BATCH, LENGTH), *exact, (BATCH, 64), (BATCH, 3, LENGTH), *coded, (BATCH, 5)):
        ids = integers(bound, *shape)
        if isinstance(end, int) and 0 < end < bound:  # once, and last: some heads read what stands there
            ids[ids == end] = end - 1
            ids[..., -1] = end
        if len(shape) == 2:  # in whose places some models put what they have learnt
            for at, start in enumerate(starts[:4]):
                ids[..., shape[-1] // 2 + at] = start
        yield ids


def _text_around_image(model: nn.Module) -> Iterator[Tensor]:
    image = configured(model, "image_token_id", "image_token_index")
    count = configured(model, "image_seq_length", "mm_tokens_per_image", "num_image_tokens", "num_query_tokens")
    if isinstance(image, int) and isinstance(count, int):  # the places where the features of one image go
        ids = integers(min(vocabulary(model), image), BATCH, LENGTH)
        yield torch.cat([ids, filled(image, BATCH, count)], 1)
    yield from _token_ids(model)


def _edges_in_patches(config: Any) -> Iterator[int]:
    """The edge of an image that has to hold a number of patches, for windows of them or after it has been scaled."""
    patch, windows, ratios = (setting(config, name) for name in ("patch_size", "num_windows", "scaled_images_ratios"))
    if isinstance(patch, int) and isinstance(windows, int):
        # Whole windows, and as many patches as there are queries, each of which takes one to begin with.
        rows = math.isqrt(max(whole(setting(config, "num_queries"), 1) - 1, 0)) + 1
        yield patch * windows * -(-rows // windows)
    if isinstance(patch, int) and isinstance(ratios, (list, tuple)) and ratios:
        yield math.ceil(patch / min(ratios))


def _pixels(model: nn.Module) -> Iterator[Tensor]:
    config = getattr(model, "config", None)
    first = next((m.in_channels for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), 3)
    channels = whole(setting(config, "num_channels", "in_channels", "in_chans"), first)
    frames = setting(config, "num_frames")
    common = sides(model)
    for edge in _edges_in_patches(config):
        yield floats(model, BATCH, channels, edge, edge)
    # Reduced keys (a grid of one eighth and the like) are one single key at 32, over which nothing can move.
    for height, width in dict.fromkeys([*named_sides(model), (64, 64), *common[:6]]):
        if isinstance(frames, int):
            yield floats(model, BATCH, frames, channels, height, width)
        yield floats(model, BATCH, channels, height, width)


def _clips(model: nn.Module) -> Iterator[Tensor]:
    """A few frames of each size that the model names; then what may be images as well."""
    channels, frames = (
        whole(configured(model, "num_channels", "in_chans"), 3),
        whole(configured(model, "num_frames"), 2),
    )
    for height, width in named_sides(model)[:2]:
        yield floats(model, BATCH, frames, channels, height, width)
    yield from _pixels(model)


def _waveform(model: nn.Module) -> Iterator[Tensor]:
    length, mels = configured(model, "max_length"), configured(model, "num_mel_bins")
    if isinstance(length, int) and isinstance(mels, int):
        yield floats(model, BATCH, length, mels)
    yield floats(model, BATCH, 4001)
    yield floats(model, BATCH, 9600)  # whole frames of 5, 10, 20, 40, 80 or 120 ms
    yield floats(model, BATCH, whole(configured(model, "audio_channels"), 1), 4001)


def _anything(model: nn.Module) -> Iterator[Tensor]:
    """For an argument whose name says nothing: images of the size that the config names, else a waveform."""
    if configured(model, "image_size") is not None:
        yield from itertools.islice(_pixels(model), 3)
    yield from _waveform(model)


def _spectrogram(model: nn.Module) -> Iterator[Tensor]:
    mels = whole(configured(model, "num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels"), 80)
    positions = configured(model, "max_source_positions")
    if isinstance(positions, int):
        yield floats(model, BATCH, mels, 2 * positions)
    width = whole(configured(model, "feature_projection_input_dim", "input_feat_per_channel"), mels)
    yield floats(model, BATCH, 64, width)
    yield floats(model, BATCH, mels, 64)
    yield floats(model, BATCH, 1, 256, mels)  # as an image of one channel


def _series(model: nn.Module) -> Iterator[Tensor]:
    length = whole(configured(model, "context_length"), LENGTH)
    yield floats(model, BATCH, length, whole(configured(model, "num_input_channels"), 1))
    yield floats(model, BATCH, length)


def _patches(model: nn.Module) -> Iterator[Tensor]:
    """The patches of that one image as rows, flattened as the first layer wants them."""
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d, nn.Linear))), None)
    if isinstance(first, nn.Linear):
        yield floats(model, 16, first.in_features)
    elif first is not None:
        yield floats(model, 16, first.in_channels * math.prod(first.kernel_size))


GRIDS = ("grid_thw", "image_grid_thw")
#: Makers of an argument's values, likeliest first, by the argument's name.
BY_NAME: dict[str, Callable[[nn.Module], Iterable[Tensor]]] = {
    **dict.fromkeys(("input_ids", "decoder_input_ids", "qformer_input_ids", "token_ids", "tokens", "idx"), _token_ids),
    "pixel_values": _pixels,
    "pixel_values_videos": _clips,
    "input_values": _waveform,
    "inputs": _anything,
    "input_features": _spectrogram,
    "past_values": _series,
    **dict.fromkeys(
        ("mask", "attention_mask", "padding_mask", "decoder_attention_mask"),
        lambda model: [filled(1, BATCH, LENGTH).bool(), filled(1, BATCH, LENGTH)],
    ),
    **dict.fromkeys(
        ("t", "time", "timestep", "timesteps"), lambda model: [integers(2, BATCH), floats(model, BATCH).abs()]
    ),
    "bbox": lambda model: [filled(0, BATCH, LENGTH, 4)],
    "lang_ids": lambda model: [filled(0, BATCH)],
    "task_inputs": lambda model: [floats(model, BATCH, whole(configured(model, "task_seq_len"), LENGTH))],
    **dict.fromkeys(("token_type_ids", "position_ids", "segment_ids"), lambda model: [filled(0, BATCH, LENGTH)]),
    "edge_index": lambda model: [integers(BATCH, 2, LENGTH)],  # nodes are counted where others count the batch
    **dict.fromkeys(GRIDS, lambda model: [torch.tensor([[1, 4, 4]], device="cpu")]),  # one image: frames, rows, columns
}


def likeliest(model: nn.Module, name: str) -> Tensor:
    """The likeliest values of an argument of a known name."""
    return next(iter(BY_NAME[name](model)))


# -- tensors for a layer ----------------------------------------------------------------------------------------


def _for_layer(model: nn.Module, layer: nn.Module) -> Iterator[Tensor]:
    """Inputs that a layer accepts."""
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        yield from _token_ids(model)
    elif isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d)):
        lengths = (32, 64, 128, 256, 1024, 4096, 16000)
        for length in lengths:
            yield floats(model, BATCH, layer.in_channels, length)
        if layer.in_channels == 1:  # a waveform, to which the module itself adds the channel
            for length in lengths[-3:]:
                yield floats(model, BATCH, length)
    elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        found = sides(model)
        if layer.in_channels == 1:  # MNIST's size, tried early for MNIST's one channel
            found = [(28, 28), *found]
        for height, width in found:
            yield floats(model, BATCH, layer.in_channels, height, width)
    elif isinstance(layer, (nn.Conv3d, nn.ConvTranspose3d)):
        for frames, side in ((8, 32), (9, 64), (17, 64), (16, 112), (16, 224), (32, 64), (32, 224)):
            yield floats(model, BATCH, layer.in_channels, frames, side, side)
    elif isinstance(layer, (nn.Linear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)):
        sizes = (integer(getattr(layer, name, None)) for name in ("in_features", "input_size", "embed_dim"))
        for size in (size for size in sizes if size is not None):
            if not isinstance(layer, (nn.RNNBase, nn.MultiheadAttention)):
                yield floats(model, BATCH, size)
            yield floats(model, BATCH, LENGTH, size)
            if isinstance(layer, nn.Linear):  # channels last, as in patch merging
                yield floats(model, BATCH, LENGTH, LENGTH, size)
    elif isinstance(layer, nn.Bilinear):
        yield floats(model, BATCH, layer.in1_features)
    elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        shape = tuple(layer.normalized_shape)
        yield floats(model, BATCH, *shape)
        yield floats(model, BATCH, LENGTH, *shape)
    elif isinstance(layer, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        channels = layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features
        for space in ((), (LENGTH,), (LENGTH, LENGTH), (LENGTH, LENGTH, LENGTH)):
            yield floats(model, BATCH, channels, *space)


def _layers(model: nn.Module, limit: int = 6) -> Iterator[nn.Module]:
    """The first layer of each kind; the order of registration is close to that of execution, and not always it."""
    kinds: set[type] = set()
    for module in model.modules():
        if type(module) not in kinds and next(_for_layer(model, module), None) is not None:
            kinds.add(type(module))
            yield module
            if len(kinds) == limit:
                return


def _shapes(model: nn.Module) -> Iterator[Tensor]:
    """Inputs for the layers, then for bare parameters as matrices, then for anything."""
    for layer in _layers(model):
        yield from _for_layer(model, layer)
    held = {
        id(p) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd) for p in m.parameters(recurse=False)
    }
    for parameter in itertools.islice((p for p in model.parameters() if id(p) not in held), 3):
        for size in parameter.shape[::-1]:
            yield floats(model, BATCH, size)
            yield floats(model, BATCH, LENGTH, size)
    yield floats(model, BATCH, LENGTH)
    yield floats(model, BATCH, 3, 32, 32)
    yield integers(vocabulary(model), BATCH, LENGTH)


def for_unread(model: nn.Module, name: str, unread: Collection[str]) -> Iterator[Tensor]:
    """Tensors for an argument that may be what unread parameters wait for, the likeliest first, none twice.

    By the argument's name where that says something, then for each layer all of whose parameters are unread: tables
    first, since what is looked up comes before what is made of it, wherever a module registers them.
    """
    yield from BY_NAME[name](model) if name in BY_NAME else ()
    waiting: list[nn.Module] = []
    for path, layer in model.named_modules():
        held = [f"{path}.{own}" if path else own for own, _ in layer.named_parameters(recurse=False)]
        if held and all(own in unread for own in held):
            waiting.append(layer)
    seen: set[tuple[torch.dtype, torch.Size]] = set()
    for layer in sorted(waiting, key=lambda layer: not isinstance(layer, (nn.Embedding, nn.EmbeddingBag))):
        for tensor in itertools.islice(_for_layer(model, layer), 2):
            if (tensor.dtype, tensor.shape) not in seen:
                seen.add((tensor.dtype, tensor.shape))
                yield tensor


STARRED = "input"
"""What an argument is called that only a bare `*args` takes."""


def required(model: nn.Module) -> list[str]:
    """The names of the arguments of `forward` that have no default; a bare `*args` counts as one."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ["input"]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = (*positional, inspect.Parameter.KEYWORD_ONLY)
    names = [p.name for p in parameters if p.kind in named and p.default is p.empty]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    optional = [p.name for p in parameters if p.kind in positional]
    return names or ([STARRED] if variadic else optional[:1])


def placed(model: nn.Module, values: dict[str, Any]) -> Candidate:
    """Arguments by name as a call takes them: by position, but for those after a bare star or after one left out."""
    parameters = inspect.signature(model.forward).parameters
    keyword = {p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    order = [
        p.name for p in parameters.values() if p.name not in keyword and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    left_out = next((at for at, name in enumerate(order) if name not in values), len(order))
    keyword |= set(order[left_out:])
    others = [name for name in values if name not in parameters or name not in {*order, *keyword}]
    kinds = {p.kind for p in parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:  # handed on to a part that knows them
        positional = {STARRED} if inspect.Parameter.VAR_POSITIONAL in kinds else set()
        keyword, others = keyword | {*others} - positional, [name for name in others if name in positional]
    args = tuple(values[name] for name in order[:left_out]) + tuple(values[name] for name in others)
    return args, {name: value for name, value in values.items() if name in keyword}


# -- the finders; the last one is asked first ---------------------------------------------------------------------


@input_finder("one sample")
def from_one_sample(model: nn.Module) -> Iterator[Candidate]:
    """What the config asks for, with a batch of one: some models were never run on two."""
    for args, kwargs in itertools.islice(from_huggingface(model), 12):
        yield args, {name: value[:1] if isinstance(value, Tensor) else value for name, value in kwargs.items()}


@input_finder("pairs of images")
def from_pairs(model: nn.Module) -> Iterator[Candidate]:
    """Two images for each sample, which are compared."""
    if required(model) == ["pixel_values"]:
        channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
        for height, width in dict.fromkeys([(64, 64), *named_sides(model), (128, 128)]):
            yield (), {"pixel_values": floats(model, BATCH, 2, channels, height, width)}


@input_finder("layers")
def from_layers(model: nn.Module) -> Iterator[Candidate]:
    """Each required argument by its name where that says something, else by the first layers of the model.

    For some seconds, after which the search has its turn.
    """
    yield from within_seconds(layers_at_length(model), SECONDS_FOR_LAYERS)


_IMAGE_NAMES, _TEXT_NAMES = ("image", "images", "pixel_values"), ("text", "texts", "tokens", "captions", "input_ids")


@input_finder("image and text")
def from_image_and_text(model: nn.Module) -> Iterator[Candidate]:
    """An image and a text for a module that requires neither, so that both of its towers are read in one pass."""
    yield from within_seconds(_images_and_texts(model), SECONDS_FOR_LAYERS)


def _images_and_texts(model: nn.Module) -> Iterator[Candidate]:
    try:
        optional = {n for n, p in inspect.signature(model.forward).parameters.items() if p.default is None}
    except (TypeError, ValueError):
        return
    image = next((name for name in _IMAGE_NAMES if name in optional), None)
    text = next((name for name in _TEXT_NAMES if name in optional), None)
    layer = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if image is None or text is None or layer is None or any(name not in optional for name in required(model)):
        return
    for height, width in sides(model)[:8]:
        for ids in itertools.islice(_token_ids(model), 3):
            yield (), {image: floats(model, BATCH, layer.in_channels, height, width), text: ids}


def within_seconds(candidates: Iterator[Candidate], seconds: float) -> Iterator[Candidate]:
    """Candidates until so much computing time has gone by, or less where to try one takes little, since the second.

    Trying the first may load much of torch.
    """
    began, limit = None, seconds
    for number, candidate in enumerate(candidates):
        yield candidate
        now = time.process_time()
        if number == 2 and began is not None:
            limit = min(seconds, max(LEAST_SECONDS, MANY * (now - began) / 2))
        began = now if began is None else began
        if now - began > limit:
            return


def layers_at_length(model: nn.Module) -> Iterator[Candidate]:
    """All that the finder of layers has."""
    names = required(model)
    known = {name: list(BY_NAME[name](model)) for name in names if name in BY_NAME}
    # At last as if no name said anything: one model's `inputs` are a sound, and another's are images.
    for trusted in (known, {}) if known else ({},):
        for shape in _shapes(model) if len(trusted) < len(names) else (torch.empty(0),):
            for choice in itertools.islice(itertools.product(*trusted.values()), 4):
                chosen = dict(zip(trusted, choice, strict=True))
                # Each argument is a tensor of its own: attention, for one, asks whether its query is its key.
                yield placed(model, {name: chosen[name] if name in chosen else shape.clone() for name in names})
    if not known:
        bilinear = next((m for m in model.modules() if isinstance(m, nn.Bilinear)), None)
        if bilinear is not None and len(names) == 2:
            yield (floats(model, BATCH, bilinear.in1_features), floats(model, BATCH, bilinear.in2_features)), {}
    # Detectors take a list of images.
    if names[:1] == ["images"]:
        yield ([floats(model, 3, 64, 64), floats(model, 3, 64, 64)],), {}


@input_finder("timm")
def from_timm(model: nn.Module) -> Iterator[Candidate]:
    """The input size of the pretrained config, unless the model was built for another."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = setting(config, "input_size")
    if not (isinstance(size, (list, tuple)) and len(size) == 3):
        return
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), size[0])
    for height, width in dict.fromkeys([*named_sides(model), tuple(size[1:])]):
        for depth in dict.fromkeys((channels, size[0])):
            yield (floats(model, BATCH, depth, height, width),), {}


@input_finder("huggingface")
def from_huggingface(model: nn.Module) -> Iterator[Candidate]:
    """Keyword arguments named by `main_input_name`, filled in from the config; then the model's own `dummy_inputs`."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or not isinstance(main, str):
        return
    accepted = inspect.signature(model.forward).parameters
    always = ["decoder_input_ids"] if getattr(config, "is_encoder_decoder", False) else []
    always += [name for name in BY_NAME if name in accepted and accepted[name].default is inspect.Parameter.empty]
    pairs = [["input_ids", other] for other in ("pixel_values", "input_features", "input_values", "bbox")]
    # A text beside an image before each alone: a pass with one of them would never read the parts for the other.
    wanted = [pairs[0], [main], *pairs[1:], [main, "attention_mask"], [main, "lang_ids"]]
    for names in wanted:
        if all(name in accepted and name in BY_NAME for name in names):
            every = list(dict.fromkeys([*names, *(name for name in always if name in accepted)]))
            makers = [BY_NAME[name](model) for name in every]
            if {"input_ids", "pixel_values"} <= set(every):
                makers[every.index("input_ids")] = _text_around_image(model)
            for choice in itertools.islice(itertools.product(*makers), 8):
                yield (), dict(zip(every, choice, strict=True))
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, dict):
        yield (), dict(dummy)


@input_finder("patches")
def from_patches(model: nn.Module) -> Iterator[Candidate]:
    """Vision towers that take the patches of images of any size in one row, and each image's rows and columns."""
    names = required(model)
    if set(names) & set(GRIDS):
        for patches in _patches(model):
            yield (), {name: likeliest(model, name) if name in GRIDS else patches for name in names}
