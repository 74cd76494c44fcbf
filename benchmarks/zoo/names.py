"""Names for the models of a zoo, and how each is built: all that the sweeps know about a library."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.zoo import libraries
from benchmarks.zoo.diffusion import FULL, diffusion_model, diffusion_names, full_model
from benchmarks.zoo.small import small_models


@dataclass(frozen=True)
class Zoo:
    """A library of models. `names` may be slow (it imports the library).

    `build` makes one model, untrained; where there are several ways, each when it is asked for, the smallest first.
    `meta` builds models on the meta device, at their full size: they are captured and inferred, not verified.
    `library` is what is imported, and `extra` what brings it: `pip install permgraph[zoos]`.
    """

    title: str
    names: Callable[[], list[str]]
    build: Callable[[str], Iterator[nn.Module]]
    meta: bool = False
    library: str = "torch"
    extra: str = "zoo"

    def require(self) -> None:
        """Raises `ImportError` with the next step where the library is not installed."""
        if importlib.util.find_spec(self.library) is None:
            raise ImportError(
                f"the zoo of {self.title} needs {self.library}, which is not installed: "
                f"pip install permgraph[{self.extra}]"
            )


# -- torchvision ------------------------------------------------------------------------------------------------------


def torchvision_names() -> list[str]:
    import torchvision

    return sorted(torchvision.models.list_models())


def torchvision_model(name: str) -> Iterator[nn.Module]:
    import torchvision

    takes = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    backbone = {"weights_backbone": None} if "weights_backbone" in takes else {}
    yield torchvision.models.get_model(name, weights=None, **backbone)


# -- timm -------------------------------------------------------------------------------------------------------------


def timm_entrypoints() -> list[str]:
    """One of each architecture module, then another of each, and so on: a sweep that is cut short has seen them all."""
    import timm

    modules = [sorted(timm.list_models(module=module)) for module in sorted(timm.list_modules())]
    rounds = itertools.zip_longest(*modules)
    return list(dict.fromkeys(name for one_of_each in rounds for name in one_of_each if name is not None))


def timm_model(name: str) -> Iterator[nn.Module]:
    import timm

    yield timm.create_model(name)


def timm_smallest() -> list[str]:
    """Of each of timm's architecture modules the model with the fewest parameters."""
    import timm

    smallest: dict[str, tuple[int, str]] = {}
    for module in sorted(timm.list_modules()):
        for name in sorted(timm.list_models(module=module)):
            with torch.device("meta"), contextlib.suppress(Exception):
                size = sum(p.numel() for p in timm.create_model(name).parameters())
                smallest[module] = min(smallest.get(module, (size, name)), (size, name))
    return [name for _, name in smallest.values()]


# -- transformers -----------------------------------------------------------------------------------------------------

#: The heads that are swept, as the names of the mappings in which transformers keeps them.
HEADS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING",
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "question-answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "ctc": "MODEL_FOR_CTC_MAPPING",
    "speech-seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "audio-classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    "object-detection": "MODEL_FOR_OBJECT_DETECTION_MAPPING",
    "semantic-segmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING",
    "depth-estimation": "MODEL_FOR_DEPTH_ESTIMATION_MAPPING",
}


def _model_types(mapping: str) -> dict[str, str]:
    """Class name to model type, over everything that a mapping of transformers lists; nothing is imported for it."""
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for model_type, listed in getattr(modeling_auto, mapping)._model_mapping.items():
        for name in listed if isinstance(listed, (tuple, list)) else (listed,):
            found.setdefault(name, model_type)
    return found


def transformers_names() -> list[str]:
    """Every architecture that `AutoModel` maps to."""
    return sorted(_model_types("MODEL_MAPPING"))


#: So many architectures with each head are swept: the first by name, and those whose type has the most heads.
BY_NAME, WIDELY_USED = 12, 6


def heads_names() -> list[str]:
    """Architectures with a head, as ``head/class``: one of each head, then another of each, and so on.

    Of each head the first by name, a sample that nobody picked, and those of the model types that occur under the most
    heads, which are the ones that people have built most upon.
    """
    listed = {head: _model_types(mapping) for head, mapping in HEADS.items()}
    heads = Counter(model_type for types in listed.values() for model_type in set(types.values()))
    chosen: list[list[str]] = []
    for head, types in listed.items():
        by_name = sorted(types)
        by_use = sorted(types, key=lambda cls: (-heads[types[cls]], cls))
        chosen.append([f"{head}/{cls}" for cls in dict.fromkeys([*by_use[:WIDELY_USED], *by_name[:BY_NAME]])])
    return [name for one_of_each in itertools.zip_longest(*chosen) for name in one_of_each if name is not None]


def transformers_model(name: str) -> Iterator[nn.Module]:
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    head, _, cls_name = name.rpartition("/")
    mapping = HEADS[head] if head else "MODEL_MAPPING"
    table = getattr(modeling_auto, mapping)
    model_type = _model_types(mapping)[cls_name]
    try:
        cls = table._load_attr_from_module(model_type, cls_name)
    except ValueError:  # listed, and not exported: it lies beside the model that it is a part of
        package = model_type_to_module_name(model_type)
        cls = getattr(importlib.import_module(f"transformers.models.{package}.modeling_{package}"), cls_name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from small_models(cls)


ZOOS: dict[str, Zoo] = {
    "torchvision": Zoo("torchvision", torchvision_names, torchvision_model, library="torchvision"),
    "timm": Zoo("timm, the smallest model of each architecture module", timm_smallest, timm_model, library="timm"),
    "timm-meta": Zoo("timm, every entrypoint on the meta device", timm_entrypoints, timm_model, True, "timm"),
    "transformers": Zoo(
        "transformers, every architecture of AutoModel", transformers_names, transformers_model, library="transformers"
    ),
    "heads": Zoo("transformers, with the heads people use", heads_names, transformers_model, library="transformers"),
    "own": Zoo("models written here", *libraries.zoo(libraries.own)),
    "diffusers": Zoo("diffusers", diffusion_names, diffusion_model, library="diffusers", extra="zoos"),
    "diffusers-meta": Zoo(
        "diffusers, at full size on the meta device", lambda: list(FULL), full_model, True, "diffusers", "zoos"
    ),
    "open-clip": Zoo(
        "open_clip", libraries.contrastive_names, libraries.contrastive_model, library="open_clip", extra="zoos"
    ),
    "segmentation": Zoo(
        "segmentation_models_pytorch", *libraries.zoo(libraries.segmenters),
        library="segmentation_models_pytorch", extra="zoos",
    ),
    "monai": Zoo("monai", *libraries.zoo(libraries.medical), library="monai", extra="zoos"),
    "sentence-transformers": Zoo(
        "sentence-transformers", *libraries.zoo(libraries.sentences), library="sentence_transformers", extra="zoos"
    ),
    "vit-pytorch": Zoo("vit-pytorch", *libraries.zoo(libraries.vision), library="vit_pytorch", extra="zoos"),
    "x-transformers": Zoo(
        "x-transformers, a flag at a time", *libraries.zoo(libraries.flagged), library="x_transformers", extra="zoos"
    ),
    "torch-geometric": Zoo(
        "torch_geometric", *libraries.zoo(libraries.graphs), library="torch_geometric", extra="zoos"
    ),
    "spandrel": Zoo("spandrel", *libraries.zoo(libraries.restorers), library="spandrel", extra="zoos"),
}  # fmt: skip
