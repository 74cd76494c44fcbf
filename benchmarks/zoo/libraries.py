"""The models of more libraries: for each its classes, what their constructors want, and a second, larger size of each.

What a table gives stands as it is, by size: a pair in `Sized` is the value for the first and the second.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.own import Detector, Vocoder
from benchmarks.zoo.signatures import small

LARGER = ", larger"
Build = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Sized:
    """A value for each size."""

    first: Any
    second: Any


def both_sizes(models: Mapping[str, Any]) -> list[str]:
    """The names of all models in the first size, then of all in the second."""
    return [*models, *(name + LARGER for name in models)]


def sized(name: str) -> tuple[str, int]:
    """The name of a model without its size, and the size."""
    return (name.removesuffix(LARGER), 2) if name.endswith(LARGER) else (name, 1)


def of_size(values: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The arguments for one size."""
    return {k: (v.first, v.second)[size - 1] if isinstance(v, Sized) else v for k, v in values.items()}


def zoo(
    models: Callable[[], Mapping[str, Build]],
) -> tuple[Callable[[], list[str]], Callable[[str], Iterator[nn.Module]]]:
    """The names and the builder of a zoo whose models are a table from names to builders."""

    def build(name: str) -> Iterator[nn.Module]:
        plain, size = sized(name)
        yield models()[plain](size)

    return (lambda: both_sizes(models())), build


# -- segmentation_models_pytorch --------------------------------------------------------------------------------------

SEGMENTERS = (
    "Unet",
    "UnetPlusPlus",
    "MAnet",
    "Linknet",
    "FPN",
    "PSPNet",
    "DeepLabV3",
    "DeepLabV3Plus",
    "PAN",
    "UPerNet",
    "Segformer",
    "DPT",
)
#: An encoder of each family, a small one and a larger one.
ENCODERS = {
    "resnet": ("resnet18", "resnet34"),
    "resnext": ("resnext50_32x4d", "se_resnext50_32x4d"),
    "densenet": ("densenet121", "densenet169"),
    "vgg": ("vgg11_bn", "vgg13"),
    "mobilenet": ("mobilenet_v2", "mobileone_s0"),
    "efficientnet": ("efficientnet-b0", "efficientnet-b1"),
    "xception": ("xception", "inceptionv4"),
    "mit": ("mit_b0", "mit_b1"),
    "dpn": ("dpn68", "dpn68b"),
    "timm": ("tu-mobilenetv3_small_100", "tu-convnext_atto"),
}


def segmenters() -> dict[str, Build]:
    """Each decoder over a residual network, and one of them over an encoder of each family."""
    import segmentation_models_pytorch as smp

    def built(decoder: str, encoders: tuple[str, str]) -> Build:
        more = {"DPT": {"encoder_name": "tu-vit_tiny_patch16_224"}}.get(decoder, {})

        def build(size: int) -> nn.Module:
            options = {"encoder_name": encoders[size - 1], "encoder_weights": None, "classes": 3 + size, **more}
            if decoder == "DPT":
                options["decoder_fusion_channels"] = 32 * size
            return getattr(smp, decoder)(**options)

        return build

    found = {f"{decoder}/resnet": built(decoder, ENCODERS["resnet"]) for decoder in SEGMENTERS}
    return found | {f"Unet/{family}": built("Unet", names) for family, names in ENCODERS.items()}


# -- open_clip --------------------------------------------------------------------------------------------------------


def contrastive_names() -> list[str]:
    """The configurations, without those whose text tower is in the hub: one of each that differ in more than sizes."""
    import open_clip

    kinds: dict[Any, str] = {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        text = config["text_cfg"]
        if "hf_model_name" not in text:
            kinds.setdefault(_kind(config), name)
    return both_sizes(dict.fromkeys(kinds.values()))


def _kind(config: Any) -> Any:
    """A configuration without its numbers, and its towers' builders without their sizes."""
    if isinstance(config, dict):
        left_out = ("hf_tokenizer_name", "context_length", "timm_drop", "tokenizer_kwargs")
        return tuple((k, _kind(v)) for k, v in sorted(config.items()) if k not in left_out)
    if isinstance(config, str):
        return config.partition("_")[0]
    return bool(config) if isinstance(config, bool) else None


def contrastive_model(name: str) -> Iterator[nn.Module]:
    """The configuration with few heads and layers for each tower; towers of timm are as large as they are."""
    import open_clip

    plain, size = sized(name)
    config = open_clip.get_model_config(plain)
    width = 64 * size
    for part in ("text_cfg", "vision_cfg", "multimodal_cfg"):
        own = config.get(part)
        if own is None:
            continue
        layers = own.get("layers", 2)
        own["layers"] = [size] * len(layers) if isinstance(layers, list) else 1 + size
        own["width"] = own["width"] // 2 if isinstance(layers, list) else width
        own |= {"heads": 2 * size} if "heads" in own else {}
        own |= {"head_width": 32} if "head_width" in own else {}
        own |= {"attn_pooler_heads": 2} if "attn_pooler_heads" in own else {}
        own |= {"vocab_size": 320 * size} if "vocab_size" in own else {}
        own |= {"eos_id": 319} if own.get("eos_id", 0) > 319 else {}
    if not isinstance(config["vision_cfg"].get("layers"), list) or "timm_model_name" in config["vision_cfg"]:
        config["embed_dim"] = width
    config.pop("custom_text", None)
    config = {**config, "vision_cfg": {**config["vision_cfg"]}}
    custom = "multimodal_cfg" in config
    cls = open_clip.CoCa if custom else open_clip.CustomTextCLIP if "init_logit_bias" in config else open_clip.CLIP
    yield cls(**config)


# -- monai ------------------------------------------------------------------------------------------------------------

_TWO = {"spatial_dims": 2, "in_channels": 2, "out_channels": 3}
_STEPS = {"channels": Sized((8, 16, 32), (16, 32, 64)), "strides": (2, 2)}
_DOWN = {"channels": Sized((8, 16), (16, 32)), "strides": (2, 2)}
_GROUPS = {"norm_num_groups": 8}
_LEVELS = {"channels": Sized((16, 32), (32, 64)), "num_res_blocks": 1, **_GROUPS}
_DIFFUSION = {**_TWO, **_LEVELS, "attention_levels": (False, True), "num_head_channels": 8}
MEDICAL: dict[str, dict[str, Any]] = {
    "AHNet": {"layers": (1, 1, 1, 1), "spatial_dims": 2, "upsample_mode": "bilinear"},
    "AttentionUnet": {**_TWO, **_STEPS},
    "AutoEncoder": {**_TWO, **_DOWN},
    "AutoencoderKL": {**_TWO, **_LEVELS, "attention_levels": (False, True), "latent_channels": 4},
    "BasicUNet": {"features": Sized((8, 8, 16, 16, 32, 8), (16, 16, 32, 32, 64, 16))},
    "BasicUNetPlusPlus": {"features": Sized((8, 8, 16, 16, 32, 8), (16, 16, 32, 32, 64, 16)), "spatial_dims": 2},
    "Classifier": {"in_shape": (1, 32, 32), "classes": 5, **_DOWN},
    "Critic": {"in_shape": (1, 32, 32), **_DOWN},
    "ControlNet": {
        "spatial_dims": 2,
        "in_channels": 2,
        **_LEVELS,
        "attention_levels": (False, True),
        "num_head_channels": 8,
        "conditioning_embedding_num_channels": (16,),
    },
    "DAF3D": {"in_channels": 1, "out_channels": 2, "visual_output": False},
    "DecoderOnlyTransformer": {
        "num_tokens": 50,
        "max_seq_len": 40,
        "attn_layers_dim": Sized(32, 64),
        "attn_layers_depth": Sized(2, 3),
        "attn_layers_heads": Sized(2, 4),
    },
    "DenseNet": {**_TWO, "init_features": Sized(16, 32), "growth_rate": Sized(8, 16), "block_config": (2, 2)},
    "DiffusionModelUNet": _DIFFUSION,
    "Discriminator": {"in_shape": (1, 32, 32), **_DOWN},
    "DynUNet": {
        **_TWO,
        "kernel_size": (3, 3, 3),
        "strides": (1, 2, 2),
        "upsample_kernel_size": (2, 2),
        "filters": Sized((8, 16, 32), (16, 32, 64)),
    },
    "EfficientNetBN": {"model_name": Sized("efficientnet-b0", "efficientnet-b1"), "pretrained": False},
    "FlexibleUNet": {"in_channels": 3, "out_channels": 2, "backbone": Sized("efficientnet-b0", "resnet18")},
    "FullyConnectedNet": {"in_channels": 7, "out_channels": 3, "hidden_channels": Sized((16, 32), (32, 64))},
    "Generator": {
        "latent_shape": (12,),
        "start_shape": (16, 4, 4),
        "channels": Sized((16, 8, 1), (32, 16, 1)),
        "strides": (2, 2, 1),
    },
    "GlobalNet": {
        "image_size": (32, 32),
        "spatial_dims": 2,
        "in_channels": 2,
        "num_channel_initial": Sized(8, 16),
        "depth": 2,
    },
    "HighResNet": {"spatial_dims": 2},
    "HoVerNet": {"mode": "fast"},
    "LocalNet": {"spatial_dims": 2, "in_channels": 2, "num_channel_initial": Sized(8, 16), "extract_levels": (0, 1)},
    "MILModel": {"num_classes": 3, "backbone": "resnet18", "pretrained": False, "mil_mode": Sized("att", "att_trans")},
    "MaskedAutoEncoderViT": {
        "in_channels": 1,
        "img_size": (32, 32),
        "patch_size": (8, 8),
        "spatial_dims": 2,
        "hidden_size": Sized(32, 64),
        "mlp_dim": 64,
        "num_layers": 2,
        "num_heads": 2,
        "masking_ratio": 0.5,
        "decoder_hidden_size": 32,
        "decoder_mlp_dim": 64,
        "decoder_num_layers": 1,
        "decoder_num_heads": 2,
    },
    "MedNeXt": {
        "spatial_dims": 2,
        "init_filters": Sized(8, 16),
        "blocks_down": (1, 1, 1, 1),
        "blocks_bottleneck": 1,
        "blocks_up": (1, 1, 1, 1),
    },
    "NaViT": {
        "image_size": 32,
        "patch_size": 8,
        "num_classes": 5,
        "hidden_size": Sized(32, 64),
        "mlp_dim": 64,
        "num_layers": 2,
        "num_heads": 2,
    },
    "MultiScalePatchDiscriminator": {
        "num_d": 2,
        "num_layers_d": 2,
        "spatial_dims": 2,
        "channels": Sized(8, 16),
        "in_channels": 3,
    },
    "PatchDiscriminator": {"spatial_dims": 2, "channels": Sized(8, 16), "in_channels": 3},
    "Quicknat": {},
    "RegUNet": {"spatial_dims": 2, "in_channels": 2, "num_channel_initial": Sized(8, 16), "depth": 2},
    "Regressor": {"in_shape": (1, 32, 32), "out_shape": (3,), **_DOWN},
    "ResNet": {
        "block": "basic",
        "layers": [1, 1, 1, 1],
        "block_inplanes": Sized([8, 16, 24, 32], [16, 24, 32, 48]),
        "n_input_channels": 1,
        "spatial_dims": 2,
    },
    "SEResNet50": {"spatial_dims": 2, "in_channels": 3, "num_classes": 5},
    "SENet154": {"spatial_dims": 2, "in_channels": 3, "num_classes": 5},
    "SPADEAutoencoderKL": {
        "spatial_dims": 2,
        "label_nc": 3,
        "in_channels": 2,
        "out_channels": 2,
        **_LEVELS,
        "attention_levels": (False, True),
        "latent_channels": 4,
        "spade_intermediate_channels": 16,
    },
    "SPADEDiffusionModelUNet": {**_DIFFUSION, "label_nc": 3, "spade_intermediate_channels": 16},
    "SPADENet": {**_TWO, "label_nc": 3, "input_shape": [32, 32], "channels": Sized([16, 8], [32, 16])},
    "SegResNet": {"spatial_dims": 2, "init_filters": Sized(8, 16)},
    "SegResNetDS": {"spatial_dims": 2, "init_filters": Sized(8, 16)},
    "SegResNetDS2": {"spatial_dims": 2, "init_filters": Sized(8, 16)},
    "SegResNetVAE": {"input_image_size": (32, 32), "spatial_dims": 2, "init_filters": Sized(8, 16)},
    "SwinUNETR": {
        "in_channels": 1,
        "out_channels": 2,
        "spatial_dims": 2,
        "feature_size": Sized(12, 24),
        "depths": (1, 1, 1, 1),
    },
    "TorchVisionFCModel": {"pretrained": False, "model_name": Sized("resnet18", "resnet34")},
    "UNETR": {
        "in_channels": 1,
        "out_channels": 2,
        "img_size": 32,
        "spatial_dims": 2,
        "feature_size": Sized(8, 16),
        "hidden_size": Sized(32, 64),
        "mlp_dim": 64,
        "num_heads": 2,
    },
    "UNet": {**_TWO, **_STEPS, "num_res_units": Sized(1, 2)},
    "VNet": {"spatial_dims": 2},
    "VQVAE": {
        **_TWO,
        "channels": Sized((16, 16), (32, 32)),
        "num_res_layers": 1,
        "num_res_channels": Sized((16, 16), (32, 32)),
        "num_embeddings": 24,
        "embedding_dim": 12,
        "downsample_parameters": ((2, 4, 1, 1),) * 2,
        "upsample_parameters": ((2, 4, 1, 1, 0),) * 2,
    },
    "VarAutoEncoder": {"spatial_dims": 2, "out_channels": 3, "in_shape": (2, 32, 32), "latent_size": 6, **_DOWN},
    "VarFullyConnectedNet": {
        "in_channels": 7,
        "out_channels": 3,
        "latent_size": 6,
        "encode_channels": Sized((16,), (32,)),
        "decode_channels": (16,),
    },
    "ViT": {
        "in_channels": 1,
        "img_size": (32, 32),
        "patch_size": (8, 8),
        "spatial_dims": 2,
        "hidden_size": Sized(32, 64),
        "mlp_dim": 64,
        "num_layers": 2,
        "num_heads": 2,
        "classification": Sized(False, True),
    },
    "ViTAutoEnc": {
        "in_channels": 1,
        "img_size": (32, 32),
        "patch_size": (4, 4),
        "spatial_dims": 2,
        "hidden_size": Sized(32, 64),
        "mlp_dim": 64,
        "num_layers": 2,
        "num_heads": 2,
    },
    "VoxelMorph": {"spatial_dims": 2},
    "VoxelMorphUNet": {
        "spatial_dims": 2,
        "in_channels": 2,
        "unet_out_channels": 8,
        "channels": (8, 8),
        "final_conv_channels": (8, 8),
    },
}


def medical() -> dict[str, Build]:
    """Networks of monai, in the plane where they take it."""
    from monai.networks import nets

    def built(name: str, given: Mapping[str, Any]) -> Build:
        def build(size: int) -> nn.Module:
            values = of_size(given, size)
            if name in ("FlexibleUNet",):
                values["pretrained"] = False
            return getattr(nets, name)(**values)

        return build

    return {name: built(name, given) for name, given in MEDICAL.items()}


# -- sentence-transformers --------------------------------------------------------------------------------------------


def sentences() -> dict[str, Build]:
    """Chains of the library's modules over a transformer that is built from a configuration; nothing is downloaded."""
    from sentence_transformers.sentence_transformer import modules
    from transformers import AutoConfig, AutoModel

    class Encoder(nn.Module):
        """The transformer of a chain as the library runs it, less the tokenizer."""

        def __init__(self, kind: str, size: int) -> None:
            super().__init__()
            names = {"distilbert": ("dim", "n_layers", "n_heads", "hidden_dim")}
            width, layers, heads, inner = names.get(
                kind, ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
            )
            config = AutoConfig.for_model(
                kind, **{width: 32 * size, layers: 1 + size, heads: 2 * size, inner: 64 * size, "vocab_size": 320}
            )
            self.auto_model = AutoModel.from_config(config)

        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            found = self.auto_model(input_ids=features["input_ids"], attention_mask=features["attention_mask"])
            return {**features, "token_embeddings": found[0]}

    class Chain(nn.Sequential):
        """Modules that hand on one dictionary."""

    def pooled(kind: str, mode: str) -> Build:
        return lambda size: Chain(Encoder(kind, size), modules.Pooling(32 * size, pooling_mode=mode))

    def followed(*more: Callable[[int], nn.Module]) -> Build:
        def build(size: int) -> nn.Module:
            return Chain(Encoder("bert", size), modules.Pooling(32 * size), *(make(32 * size) for make in more))

        return build

    found = {f"bert/{mode}": pooled("bert", mode) for mode in ("mean", "cls", "max", "weightedmean", "lasttoken")}
    found |= {f"{kind}/mean": pooled(kind, "mean") for kind in ("distilbert", "mpnet", "roberta", "electra", "albert")}
    found["dense"] = followed(lambda width: modules.Dense(width, 24))
    found["dense, normalized"] = followed(lambda width: modules.Dense(width, 24), lambda width: modules.Normalize())
    found["layer norm"] = followed(lambda width: modules.LayerNorm(width))
    found["lstm"] = lambda size: Chain(
        Encoder("bert", size), modules.LSTM(32 * size, 16 * size), modules.Pooling(32 * size)
    )
    found["cnn"] = lambda size: Chain(
        Encoder("bert", size), modules.CNN(32 * size, 12 * size), modules.Pooling(36 * size)
    )
    return found


# -- vit-pytorch ------------------------------------------------------------------------------------------------------

_VIT = {
    "image_size": 32,
    "patch_size": 8,
    "num_classes": 5,
    "dim": Sized(32, 64),
    "depth": Sized(2, 3),
    "heads": Sized(2, 4),
    "mlp_dim": Sized(64, 96),
    "dim_head": 16,
}
_STAGED = {"s1_depth": 1, "s2_depth": 1, "s3_depth": 1, "s4_depth": 1}
#: What the model of a module wants beside the usual.
VISION: dict[str, dict[str, Any]] = {
    "ats_vit": {"max_tokens_per_depth": Sized((9, 5), (9, 7, 5))},
    "cait": {"cls_depth": 1},
    "cct": {
        "img_size": 32,
        "embedding_dim": Sized(32, 64),
        "num_heads": 2,
        "num_layers": 2,
        "n_input_channels": 3,
        "n_conv_layers": 1,
        "kernel_size": 3,
        "stride": 2,
        "padding": 1,
        "num_classes": 5,
        "mlp_ratio": 2.0,
        "positional_embedding": "learnable",
    },
    "cross_vit": {
        "sm_dim": Sized(32, 48),
        "lg_dim": 48,
        "sm_patch_size": 8,
        "lg_patch_size": 16,
        "sm_enc_depth": 1,
        "lg_enc_depth": 1,
        "sm_enc_heads": 2,
        "lg_enc_heads": 2,
        "sm_enc_mlp_dim": 64,
        "lg_enc_mlp_dim": 64,
        "cross_attn_depth": 1,
        "cross_attn_heads": 2,
        "depth": 1,
        "sm_enc_dim_head": 16,
        "lg_enc_dim_head": 16,
        "cross_attn_dim_head": 16,
    },
    "crossformer": {
        "dim": Sized((32, 48, 64, 96), (48, 64, 96, 128)),
        "depth": (1, 1, 1, 1),
        "global_window_size": (2, 2, 1, 1),
        "local_window_size": (2, 2, 2, 1),
    },
    "cvt": {**_STAGED, **{f"s{i}_emb_dim": Sized(16 * i, 24 * i) for i in (1, 2, 3)}, "s2_heads": 2, "s3_heads": 2},
    "levit": {
        "dim": Sized((16, 32), (32, 48)),
        "depth": 1,
        "heads": (2, 4),
        "mlp_mult": 2,
        "dim_key": 8,
        "dim_value": 16,
        "image_size": 64,
        "stages": 2,
    },
    "local_vit": {},
    "look_vit": {"highres_patch_size": 4, "cross_attn_heads": 2, "cross_attn_dim_head": 16},
    "mae": {},
    "max_vit": {"dim_conv_stem": 16, "depth": (1, 1), "window_size": 4, "image_size": 32, "dim_head": 8},
    "max_vit_with_registers": {"dim_conv_stem": 16, "depth": (1, 1), "window_size": 4, "dim_head": 8},
    "mobile_vit": {
        "image_size": (64, 64),
        "dims": Sized([16, 24, 32], [24, 32, 48]),
        "channels": [8, 8, 12, 12, 16, 16, 24, 24, 32, 32, 48],
    },
    "nest": {"num_hierarchies": 2, "block_repeats": (1, 1), "patch_size": 4, "dim": Sized(16, 32)},
    "pit": {"depth": (1, 1, 1)},
    "regionvit": {
        "dim": Sized((16, 32, 48, 64), (32, 48, 64, 96)),
        "depth": (1, 1, 1, 1),
        "window_size": 2,
        "local_patch_size": 2,
        "image_size": 64,
    },
    "scalable_vit": {
        "depth": (1, 1),
        "heads": (2, 2),
        "reduction_factor": (2, 1),
        "window_size": (8, None),
        "dim": Sized(16, 24),
        "image_size": 64,
        "ff_expansion": 2,
        "iwsa_dim_key": 8,
        "iwsa_dim_value": 8,
        "ssa_dim_key": 8,
        "ssa_dim_value": 8,
    },
    "sep_vit": {"dim": Sized(16, 24), "depth": (1, 1), "heads": (2, 2), "window_size": 4, "dim_head": 8},
    "simple_flash_attn_vit_3d": {"image_size": 32, "frames": 4, "image_patch_size": 8, "frame_patch_size": 2},
    "simple_vit_3d": {"frames": 4, "image_patch_size": 8, "frame_patch_size": 2},
    "vit_3d": {"frames": 4, "image_patch_size": 8, "frame_patch_size": 2},
    "cct_3d": {
        "img_size": 32,
        "num_frames": 4,
        "embedding_dim": Sized(32, 64),
        "num_heads": 2,
        "num_layers": 2,
        "n_input_channels": 3,
        "n_conv_layers": 1,
        "kernel_size": 3,
        "stride": 2,
        "padding": 1,
        "num_classes": 5,
        "frame_kernel_size": 3,
        "mlp_ratio": 2.0,
        "positional_embedding": "learnable",
    },
    "simple_vit_1d": {"seq_len": 64, "channels": 3},
    "vit_1d": {"seq_len": 64, "channels": 3},
    "t2t": {"t2t_layers": ((7, 4), (3, 2))},
    "twins_svt": {
        f"s{i}_{what}": value
        for i in (1, 2, 3, 4)
        for what, value in (
            ("emb_dim", Sized(16 * i, 24 * i)),
            ("depth", 1),
            ("patch_size", 2),
            ("local_patch_size", 2),
            ("global_k", 2),
        )
    }
    | {"s4_local_patch_size": 1},
    "vit_nd": {"ndim": 2, "input_shape": (32, 32)},
    "vit_nd_rotary": {"ndim": 2, "input_shape": (32, 32)},
    "vit_nd_pope": {"ndim": 2, "input_shape": (32, 32)},
    "vivit": {"frames": 4, "image_patch_size": 8, "frame_patch_size": 2, "spatial_depth": 1, "temporal_depth": 1},
    "vivit_with_moss": {
        "frames": 4,
        "image_patch_size": 8,
        "frame_patch_size": 2,
        "spatial_depth": 1,
        "temporal_depth": 1,
    },
    "xcit": {"cls_depth": 1},
    "vit_with_patch_merger": {"patch_merge_layer": 1, "patch_merge_num_tokens": 4},
    "na_vit_nested_tensor_3d": {"image_patch_size": 8, "frame_patch_size": 2, "max_frames": 16},
    "simple_vit_with_fft": {"freq_patch_size": 8},
    "simple_vit_with_hyper_connections": {"num_residual_streams": 2},
    "simple_uvit": {"num_register_tokens": 2},
    "jumbo_vit": {"num_jumbo_cls": 2},
}
#: Wrappers, whose arguments are other models of the library, and modules that only hold parts.
NOT_MODELS = {
    "accept_video_wrapper",
    "dino",
    "distill",
    "es_vit",
    "extractor",
    "learnable_memory_vit",
    "lejepa",
    "levjepa",
    "levjepa_nd",
    "mae",
    "mpp",
    "mp3",
    "recorder",
    "simmim",
    "efficient",
    "vit_nd_masking",
    "vaat",
    "vat",
    "vat_siglip",
    "wwt",
}
CLASSES = {"normalized_vit": "nViT"}


def vision() -> dict[str, Build]:
    """The model of each module of vit-pytorch."""
    import vit_pytorch

    names = [found.name for found in pkgutil.iter_modules(vit_pytorch.__path__)]
    return {name: _vision(name) for name in names if name not in NOT_MODELS}


def _vision(name: str) -> Build:
    def build(size: int) -> nn.Module:
        module = importlib.import_module(f"vit_pytorch.{name}")
        own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        cls = getattr(module, CLASSES[name]) if name in CLASSES else own[-1]
        wanted = {**_VIT, **VISION.get(name, {})}
        taken = inspect.signature(cls.__init__).parameters
        every = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        given = VISION.get(name, {})
        return cls(**of_size({k: v for k, v in wanted.items() if k in taken or (every and k in given)}, size))

    return build


# -- x-transformers ---------------------------------------------------------------------------------------------------

#: Flags that want an argument beside them, or another stack.
BESIDE: dict[str, dict[str, Any]] = {
    "rotary_xpos": {"rotary_pos_emb": True},
    "dynamic_pos_bias_norm": {"dynamic_pos_bias": True},
    "dynamic_pos_bias_log_distance": {"dynamic_pos_bias": True},
    "learned_reinject_input_gate": {"reinject_input": True},
    "cross_residual_attn": {"cross_attend": True, "residual_attn": True},
    "use_adaptive_layernorm": {"dim_condition": 24},
    "use_adaptive_rmsnorm": {"dim_condition": 24},
    "only_cross": {"cross_attend": True},
    "attn_qk_norm_dim_scale": {"attn_qk_norm": True},
    "attn_use_latent_q": {"attn_dim_latent_q": 16},
    "attn_use_latent_kv": {"attn_dim_latent_kv": 16},
    "attn_cope_soft_onehot_pos": {"attn_use_cope": True},
    "use_adaptive_layerscale": {"use_adaptive_rmsnorm": True, "dim_condition": 24},
    "attn_cope_talking_heads": {"attn_use_cope": True},
    "adaptive_condition_mlp": {"use_adaptive_rmsnorm": True, "dim_condition": 24},
    "ff_glu_mult_bias": {"ff_glu": True},
    "attn_data_dependent_alibi_per_row": {"attn_data_dependent_alibi": True},
    "unet_skips": {"depth": 4},
    "attn_aggregated_residuals": {"attn_aggregated_residual_kwargs": {"lora_rank": 8}},
    "gated_multi_residual": {"residual_fn_kwargs": {"read_gate_rank": 8}},
    "attn_learned_value_residual_mix": {"add_value_residual": True},
    "pre_norm_has_final_norm": {},
}
#: Choices that are no flags.
CHOICES: dict[str, dict[str, Any]] = {
    "attn_kv_heads": {"attn_kv_heads": 1},
    "attn_num_mem_kv": {"attn_num_mem_kv": 3},
    "shift_tokens": {"shift_tokens": 1},
    "attn_sparse_topk": {"attn_sparse_topk": 4},
    "num_residual_streams": {"num_residual_streams": 3},
    "sandwich_coef": {"depth": 4, "sandwich_coef": 1},
    "attn_value_dim_head": {"attn_value_dim_head": 12},
    "par_ratio": {"depth": 4, "par_ratio": 2},
    "attn_qk_norm_groups": {"attn_qk_norm": True, "attn_qk_norm_groups": 2},
    "alibi_num_heads": {"alibi_pos_bias": True, "alibi_num_heads": 1},
    "rotate_num_heads": {"rotary_pos_emb": True, "rotate_num_heads": 1},
}


def flagged() -> dict[str, Build]:
    """A decoder and a wrapper with each of their flags turned over, one after the other; and other stacks."""
    import x_transformers as x

    source = importlib.import_module("x_transformers.x_transformers")

    def flags(cls: type, prefix: str = "") -> dict[str, bool]:
        parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
        return {prefix + p.name: not p.default for p in parameters if isinstance(p.default, bool)}

    def decoder(size: int, **options: Any) -> Any:
        return x.Decoder(**{"dim": 32 * size, "depth": 1 + size, "heads": 2 * size, "attn_dim_head": 16, **options})

    def wrapped(options: dict[str, Any], outer: dict[str, Any]) -> Build:
        def build(size: int) -> nn.Module:
            layers = decoder(size, **options)
            return x.TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=layers, **outer)

        return build

    left_out = {"causal", "verbose", "attn_causal", "attn_onnxable", "attn_on_attn", "attn_hybrid_learned_mix"}
    layers = flags(source.AttentionLayers) | flags(source.Attention, "attn_") | flags(source.FeedForward, "ff_")
    found: dict[str, Build] = {"plain": wrapped({}, {})}
    for name, value in layers.items():
        if name not in left_out:
            found[f"layers/{name}"] = wrapped({name: value, **BESIDE.get(name, {})}, {})
    for name, options in CHOICES.items():
        found[f"layers/{name}"] = wrapped(options, {})
    for name, value in flags(x.TransformerWrapper).items():
        found[f"wrapper/{name}"] = wrapped({}, {name: value})
    found["wrapper/num_memory_tokens"] = wrapped({}, {"num_memory_tokens": 3})
    found["wrapper/emb_dim"] = wrapped({}, {"emb_dim": 24})
    found["encoder"] = lambda size: x.TransformerWrapper(
        num_tokens=50,
        max_seq_len=32,
        attn_layers=x.Encoder(dim=32 * size, depth=1 + size, heads=2 * size, attn_dim_head=16),
    )
    found["layers alone"] = lambda size: decoder(size)
    found["images"] = lambda size: x.ViTransformerWrapper(
        image_size=32,
        patch_size=8,
        num_classes=5,
        attn_layers=x.Encoder(dim=32 * size, depth=1 + size, heads=2, attn_dim_head=16),
    )
    found["continuous"] = lambda size: x.ContinuousTransformerWrapper(
        dim_in=12,
        dim_out=7,
        max_seq_len=32,
        attn_layers=x.Encoder(dim=32 * size, depth=1 + size, heads=2, attn_dim_head=16),
    )
    found["encoder and decoder"] = lambda size: x.XTransformer(
        dim=32 * size,
        enc_num_tokens=50,
        enc_depth=1 + size,
        enc_heads=2,
        enc_max_seq_len=32,
        dec_num_tokens=60,
        dec_depth=2,
        dec_heads=2,
        dec_max_seq_len=32,
    )
    found["several inputs"] = lambda size: x.MultiInputTransformerWrapper(
        num_tokens={"note": 20, "pitch": 30}, max_seq_len=32, attn_layers=decoder(size)
    )
    found["numbers"] = lambda size: x.XValTransformerWrapper(
        num_tokens=20, numerical_token_id=3, max_seq_len=32, attn_layers=decoder(size)
    )
    return found


# -- torch_geometric --------------------------------------------------------------------------------------------------


def graphs() -> dict[str, Build]:
    """Its models, and a stack of two layers of each of its convolutions that take nodes and edges alone."""
    from torch_geometric import nn as gnn
    from torch_geometric.nn import models

    def plain(name: str, **more: Any) -> Build:
        return lambda size: getattr(models, name)(
            in_channels=12, hidden_channels=16 * size, num_layers=1 + size, out_channels=5, **more
        )

    found = {name: plain(name) for name in ("GCN", "GraphSAGE", "GIN", "GAT", "EdgeCNN")}
    degrees = torch.tensor([0, 4, 6, 3, 2])
    found["PNA"] = plain("PNA", aggregators=["mean", "max"], scalers=["identity", "amplification"], deg=degrees)
    found["GCN, norm and jumping"] = plain("GCN", norm="BatchNorm", jk="cat")
    found["GAT, v2"] = plain("GAT", v2=True, heads=2)
    found["MLP"] = lambda size: models.MLP([12, 16 * size, 16 * size, 5])
    found["GraphUNet"] = lambda size: models.GraphUNet(12, 16 * size, 5, depth=1 + size)
    found["SchNet"] = lambda size: models.SchNet(16 * size, 16 * size, 1 + size, 10)
    found["DimeNet"] = lambda size: models.DimeNet(16 * size, 5, 1, 4, 3, 3)
    found["DimeNetPlusPlus"] = lambda size: models.DimeNetPlusPlus(16 * size, 5, 1, 8, 4, 16, 3, 3)
    found["AttentiveFP"] = lambda size: models.AttentiveFP(12, 16 * size, 5, 6, 1 + size, 2)
    found["RECT_L"] = lambda size: models.RECT_L(12, 16 * size)
    found["LINKX"] = lambda size: models.LINKX(19, 12, 16 * size, 5, 1 + size)
    found["LightGCN"] = lambda size: models.LightGCN(19, 16 * size, 2)
    found["GNNFF"] = lambda size: models.GNNFF(16 * size, 16 * size, 1 + size)
    found["PMLP"] = lambda size: models.PMLP(12, 16 * size, 5, 1 + size)
    found["NeuralFingerprint"] = lambda size: models.NeuralFingerprint(12, 16 * size, 5, 1 + size)
    found["ViSNet"] = lambda size: models.ViSNet(
        hidden_channels=16 * size, num_heads=2, num_layers=1 + size, num_rbf=8, max_z=10
    )
    found["SGFormer"] = lambda size: models.SGFormer(12, 16 * size, 5)
    found["Polynormer"] = lambda size: models.Polynormer(12, 16 * size, 5)
    found["SignedGCN"] = lambda size: models.SignedGCN(12, 16 * size, 1 + size)
    convolutions = (
        "GCNConv",
        "ChebConv",
        "SAGEConv",
        "GraphConv",
        "GatedGraphConv",
        "ResGatedGraphConv",
        "GATConv",
        "GATv2Conv",
        "TransformerConv",
        "AGNNConv",
        "TAGConv",
        "ARMAConv",
        "SGConv",
        "SSGConv",
        "APPNP",
        "MFConv",
        "FeaStConv",
        "LEConv",
        "ClusterGCNConv",
        "GENConv",
        "SuperGATConv",
        "EGConv",
        "FAConv",
        "GCN2Conv",
        "MixHopConv",
        "LGConv",
    )
    more: dict[str, dict[str, Any]] = {"ChebConv": {"K": 3}, "SSGConv": {"alpha": 0.2}, "EGConv": {"num_heads": 4}}

    class Stack(nn.Module):
        """Two convolutions over the same edges, with a nonlinearity between them."""

        def __init__(self, first: nn.Module, second: nn.Module) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x, edge_index).relu(), edge_index)

    def stacked(name: str) -> Build:
        cls = getattr(gnn, name)
        return lambda size: Stack(cls(12, 16 * size, **more.get(name, {})), cls(16 * size, 8, **more.get(name, {})))

    left_out = {"APPNP", "AGNNConv", "FAConv", "GCN2Conv", "LGConv", "MixHopConv", "GatedGraphConv"}
    return found | {name: stacked(name) for name in convolutions if name not in left_out}


# -- spandrel ---------------------------------------------------------------------------------------------------------

_FEW = {"depths": (1, 1), "num_heads": (2, 2), "embed_dim": Sized(24, 36)}
RESTORERS: dict[str, dict[str, Any]] = {
    "ATD": {"depths": (2, 2), "num_heads": (2, 2), "embed_dim": Sized(24, 36), "window_size": 8},
    "DAT": {"depth": (2, 2), "num_heads": (2, 2), "embed_dim": Sized(24, 36), "split_size": (4, 8)},
    "DRCT": {"depths": (1, 1), "num_heads": (2, 2), "embed_dim": Sized(24, 36), "window_size": 8},
    "HAT": {**_FEW, "window_size": 8},
    "SwinIR": {**_FEW, "window_size": 8},
    "Swin2SR": {**_FEW, "window_size": 8},
    "RGT": {"depth": (1, 1), "num_heads": (2, 2), "embed_dim": Sized(24, 36), "split_size": (4, 4)},
    "ESRGAN": {"num_filters": Sized(16, 24), "num_blocks": Sized(1, 2)},
    "Compact": {"num_feat": Sized(16, 24), "num_conv": 2},
    "NAFNet": {"width": Sized(8, 16)},
    "DRUNet": {"nc": Sized([8, 16, 24, 32], [16, 24, 32, 48]), "nb": Sized(1, 2)},
    "DCTLSA": {"nf": Sized(20, 30), "num_head": 5, "num_modules": 6},
    "AuraSR": {"style_network": {"dim_in": 16, "dim_out": 16, "depth": 1}},
    "DnCNN": {"nc": Sized(16, 24), "nb": 4},
    "FBCNN": {"nc": Sized([8, 16, 24, 512], [16, 24, 32, 512]), "nb": 1},
    "IPT": {},
    "GFPGAN": {"out_size": 32, "num_style_feat": 32, "channel_multiplier": 1, "num_mlp": 2, "different_w": True},
    "Uformer": {
        "img_size": 32,
        "embed_dim": Sized(16, 32),
        "depths": [1] * 9,
        "win_size": 4,
        "num_heads": [1, 2, 2, 2, 2, 2, 2, 2, 1],
    },
    "SCUNet": {"config": [1] * 7, "dim": Sized(32, 64)},
    "MixDehazeNet": {"embed_dims": [8, 16, 24, 16, 8], "depths": [1, 1, 1, 1, 1]},
    "RetinexFormer": {"n_feat": Sized(16, 24)},
    "OmniSR": {"num_feat": Sized(16, 24), "res_num": 1, "block_num": 1, "window_size": 8},
}


def restorers() -> dict[str, Build]:
    """The architectures that spandrel registers, each by the class that it makes."""
    import spandrel

    def class_of(architecture: Any) -> type[nn.Module]:
        module = importlib.import_module(type(architecture).__module__)
        name = {"KBNet": "KBNet_s", "MMRealSR": "MMRealSR", "RealCUGAN": "UpCunet2x"}.get(
            architecture.id, architecture.id
        )
        found = getattr(module, name, None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
        raise ValueError(f"{architecture.id} has no class of its name")

    def built(architecture: Any) -> Build:
        def build(size: int) -> nn.Module:
            return small(class_of(architecture), size, of_size(RESTORERS.get(architecture.id, {}), size))

        return build

    every = [entry.architecture for entry in spandrel.MAIN_REGISTRY.architectures()]
    return {one.id: built(one) for one in every}


# -- own --------------------------------------------------------------------------------------------------------------


def own() -> dict[str, Build]:
    """A detector like YOLOv8 and a vocoder like VITS."""
    return {
        "detector like YOLOv8": lambda size: Detector(8 * size, size, 5 + size),
        "vocoder like VITS": lambda size: Vocoder(20, 16, 12 * (1 + size), 1 + size),
    }
