"""The models of diffusers: every class in two small sizes, and what people make pictures with at full size.

Small ones are made from the defaults of their constructors (`signatures`), with what the table here gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from benchmarks.zoo.libraries import Sized, both_sizes, of_size, sized
from benchmarks.zoo.signatures import small

#: Bases, and what is made of several other models or needs one.
NOT_MODELS = re.compile(
    r"^ModelMixin$|Multi\w*ControlNetModel$|^MultiAdapter$|^ControlNetXSAdapter$|^MotionAdapter$|^ModularPipeline"
)
_UNET = {
    "block_out_channels": Sized((32, 64), (32, 64)),
    "layers_per_block": Sized(1, 2),
    "norm_num_groups": 8,
    "cross_attention_dim": Sized(24, 40),
    "sample_size": 16,
}
_PLAIN = {key: value for key, value in _UNET.items() if key != "sample_size"}
_DOWN = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
_CODER = {
    "block_out_channels": Sized((16, 32), (32, 64)),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
_DIT = {"num_attention_heads": Sized(2, 4), "attention_head_dim": 16, "num_layers": Sized(2, 3), "sample_size": 16}
_CLIP = {"sample_height": 8, "sample_width": 8, "sample_frames": 5, "max_text_seq_length": 13, "text_embed_dim": 32}
_FOUR = {"block_out_channels": Sized((32, 64, 64, 64), (64, 64, 96, 96)), "layers_per_block": 1}
_SOUNDING = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": Sized(2, 4),
    "attention_head_dim": 16,
    "cross_attention_dim": Sized(32, 64),
    "audio_in_channels": 12,
    "audio_out_channels": 12,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": Sized(1, 2),
    "caption_channels": 24,
}
GIVEN: dict[str, dict[str, Any]] = {
    "I2VGenXLUNet": {
        **_UNET,
        "norm_num_groups": 32,
        "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    },
    "SparseControlNetModel": {
        **_PLAIN,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "motion_num_attention_heads": 2,
        "conditioning_embedding_out_channels": (16, 32),
    },
    "WanVACETransformer3DModel": {"vace_layers": [0, 1]},
    "Kandinsky3UNet": {"block_out_channels": Sized((32, 64, 64, 64), (64, 64, 96, 96)), "groups": 8},
    "AutoencoderKLHunyuanVideo15": {
        "block_out_channels": Sized((32, 64), (64, 96)),
        "layers_per_block": 1,
        "latent_channels": 8,
        "spatial_compression_ratio": 2,
        "temporal_compression_ratio": 1,
    },
    "AutoencoderKLKVAEVideo": {
        "ch": Sized(32, 64),
        "ch_mult": (1, 2),
        "num_res_blocks": 1,
        "temporal_compress_times": 2,
    },
    "AutoencoderKLMiniMaxH3": {
        "block_out_channels": Sized((32, 64), (64, 96)),
        "layers_per_block": 1,
        "spatial_downsample_factors": (2, 2),
        "temporal_downsample_factors": (1, 2),
        "norm_num_groups": 8,
        "decoder_num_layers": Sized(1, 2),
        "decoder_num_attention_heads": 2,
        "decoder_attention_head_dim": 32,
    },
    "AutoencoderKLQwenImage21": {
        "base_dim": Sized(16, 32),
        "decoder_base_dim": Sized(16, 32),
        "dim_mult": [1, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False],
        "is_residual": False,
    },
    "AutoencoderOobleck": {
        "encoder_hidden_size": Sized(16, 32),
        "decoder_channels": Sized(16, 32),
        "decoder_input_channels": 8,
        "downsampling_ratios": [2, 4],
        "channel_multiples": [1, 2],
    },
    "AutoencoderKLAllegro": {
        "block_out_channels": Sized((16, 32), (32, 64)),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("AllegroDownBlock3D",) * 2,
        "up_block_types": ("AllegroUpBlock3D",) * 2,
        "temporal_downsample_blocks": (True, False),
        "temporal_upsample_blocks": (False, True),
        "sample_size": 32,
    },
    "ConsistencyDecoderVAE": {
        "encoder_block_out_channels": Sized((32, 64), (64, 96)),
        "encoder_down_block_types": ("DownEncoderBlock2D",) * 2,
        "encoder_layers_per_block": 1,
        "decoder_block_out_channels": Sized((32, 64), (64, 96)),
        "decoder_layers_per_block": 1,
        "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    },
    "ControlNetUnionModel": {
        **_PLAIN,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "conditioning_embedding_out_channels": (16, 32),
        "num_trans_channel": Sized(32, 32),
        "num_trans_head": 2,
        "num_proj_channel": Sized(32, 32),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
    "Cosmos3AVAEAudioTokenizer": {
        "vocoder_input_dim": 8,
        "dec_dim": Sized(16, 32),
        "dec_c_mults": (1, 2),
        "dec_strides": (2, 4),
        "enc_dim": Sized(16, 32),
        "enc_intermediate_dim": 32,
        "enc_num_layers": 1,
        "enc_num_blocks": 1,
        "enc_latent_dim": 16,
        "enc_c_mults": (1, 2),
        "enc_strides": (2, 4),
    },
    "DreamLiteTransformer2DModel": {
        "num_attention_heads": Sized(2, 4),
        "attention_head_dim": 16,
        "in_channels": 32,
        "cross_attention_dim": 24,
        "norm_num_groups": 8,
    },
    "DreamLiteUNetModel": {
        "block_out_channels": Sized((32, 64), (64, 96)),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
        "attention_head_dim": 16,
        "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        "sample_size": 16,
    },
    "Kandinsky5Transformer3DModel": {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": 24,
        "in_text_dim2": 20,
        "time_dim": 32,
        "model_dim": Sized(32, 64),
        "ff_dim": 64,
        "num_text_blocks": 1,
        "num_visual_blocks": 1,
        "axes_dims": (4, 6, 6),
    },
    "Kandinsky6Transformer3DModel": {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": 24,
        "in_text_dim2": 20,
        "time_dim": 32,
        "model_dim": Sized(32, 64),
        "ff_dim": 64,
        "num_text_blocks": 1,
        "num_visual_blocks": 1,
        "axes_dims": (4, 6, 6),
    },
    "Kandinsky6SRTransformer3DModel": {
        "in_visual_dim": 8,
        "out_visual_dim": 16,
        "time_dim": 32,
        "model_dim": Sized(32, 64),
        "ff_dim": 64,
        "num_visual_blocks": 1,
        "axes_dims": (4, 6, 6),
    },
    "Kandinsky6SRVAE": {
        "encoder_block_out_channels": Sized((16, 32), (32, 64)),
        "decoder_block_out_channels": Sized((16, 32), (32, 64)),
        "layers_per_block": 1,
        "latent_channels": 8,
        "temporal_compression_ratio": 2,
        "temporal_compression_start_level": 0,
    },
    "LTX2VideoDiffusionDecoderModel": {
        "latent_channels": 8,
        "decoder_head_dim": 16,
        "decoder_stage_channels": Sized((64, 32, 32, 32, 32), (128, 64, 64, 64, 64)),
        "decoder_stage_depths": (1, 1, 1, 1, 1),
        "decoder_upsample_channel_reductions": (2, 1, 1, 1),
        "decoder_t_emb_dim": 32,
    },
    "LTX2VideoTransformer3DModel": _SOUNDING,
    "SanaWMLTX2RefinerTransformer3DModel": _SOUNDING,
    "LongCatAudioDiTVae": {
        "channels": Sized(16, 32),
        "c_mults": [1, 2],
        "strides": [2, 4],
        "latent_dim": 8,
        "encoder_latent_dim": 16,
        "downsampling_ratio": 8,
    },
    "OmniGenTransformer2DModel": {
        "hidden_size": Sized(32, 64),
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "num_layers": Sized(2, 3),
        "vocab_size": 320,
        "pad_token_id": 0,
        "pos_embed_max_size": 24,
        "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
    },
    "UNetControlNetXSModel": {
        "sample_size": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": Sized((32, 64), (64, 96)),
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
        "num_attention_heads": 2,
        "ctrl_conditioning_embedding_out_channels": (16, 32),
        "ctrl_block_out_channels": (8, 16),
        "ctrl_num_attention_heads": 2,
        "ctrl_max_norm_num_groups": 4,
    },
    "HunyuanVideoFramepackTransformer3DModel": {
        "num_attention_heads": Sized(2, 4),
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "rope_axes_dim": (4, 6, 6),
        "text_embed_dim": 24,
        "pooled_projection_dim": 20,
        "image_proj_dim": 28,
        "has_image_proj": True,
        "has_clean_x_embedder": True,
    },
    "AsymmetricAutoencoderKL": {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "down_block_out_channels": Sized((16, 32), (32, 64)),
        "layers_per_down_block": 1,
        "up_block_out_channels": Sized((16, 32), (32, 64)),
        "layers_per_up_block": 1,
        "norm_num_groups": 8,
    },
    "AutoencoderKL": _CODER,
    "VQModel": _CODER,
    "AutoencoderKLTemporalDecoder": {
        "block_out_channels": Sized((32, 64), (32, 96)),
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
    },
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 8,
        "block_out_channels": Sized((32, 64), (64, 96)),
        "layers_per_block": 1,
        "spatial_compression_ratio": 2,
        "sample_size": 32,
    },
    "AutoencoderDC": {
        "encoder_block_out_channels": Sized((32, 64), (64, 128)),
        "decoder_block_out_channels": Sized((32, 64), (64, 128)),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "attention_head_dim": 16,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "encoder_qkv_multiscales": ((), (5,)),
        "decoder_qkv_multiscales": ((), (5,)),
        "latent_channels": 8,
    },
    "UNet1DModel": {"extra_in_channels": 64, "sample_size": 64},
    "UNet2DModel": {
        "block_out_channels": Sized((32, 64), (32, 96)),
        "layers_per_block": Sized(1, 2),
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "sample_size": 16,
    },
    "UNet2DConditionModel": {**_UNET, **_DOWN},
    "ControlNetModel": {
        **_PLAIN,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "conditioning_embedding_out_channels": (16, 32),
    },
    "UNet3DConditionModel": {
        **_UNET,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    },
    "UNetMotionModel": {
        **_UNET,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        "motion_num_attention_heads": 2,
    },
    "UNetSpatioTemporalConditionModel": {
        "block_out_channels": Sized((32, 64), (32, 64)),
        "layers_per_block": 1,
        "sample_size": 16,
        "cross_attention_dim": 24,
        "num_attention_heads": (2, 4),
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 48,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    },
    "Transformer2DModel": {**_DIT, "in_channels": 32, "cross_attention_dim": 24, "norm_num_groups": 8},
    "TransformerTemporalModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 32,
        "norm_num_groups": 8,
    },
    "DiTTransformer2DModel": _DIT,
    "SD3Transformer2DModel": {
        **_DIT,
        "joint_attention_dim": 32,
        "caption_projection_dim": Sized(32, 64),
        "pooled_projection_dim": 48,
        "pos_embed_max_size": 24,
    },
    "PixArtTransformer2DModel": {**_DIT, "cross_attention_dim": Sized(32, 64), "caption_channels": 48},
    "CogVideoXTransformer3DModel": _CLIP,
    "ConsisIDTransformer3DModel": {**_CLIP, "is_train_face": False},
    "LatteTransformer3DModel": {**_DIT, "in_channels": 4, "caption_channels": 48, "patch_size": 2, "video_length": 5},
    "HunyuanDiT2DModel": {**_DIT, "in_channels": 4, "patch_size": 2, "hidden_size": Sized(32, 64), "num_layers": 2},
    "HunyuanDiT2DControlNetModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "sample_size": 16,
        "transformer_num_layers": 4,
        "in_channels": 4,
        "patch_size": 2,
        "hidden_size": Sized(32, 64),
    },
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "caption_channels": [32, 48],
        "text_emb_dim": 24,
        "num_routed_experts": 2,
        "num_activated_experts": 1,
        "axes_dims_rope": (8, 4, 4),
        "max_resolution": (16, 16),
        "llama_layers": (0, 0),
    },
    "FluxTransformer2DModel": {
        "num_layers": Sized(1, 2),
        "num_single_layers": Sized(1, 2),
        "attention_head_dim": 16,
        "in_channels": 8,
        "num_attention_heads": Sized(2, 4),
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": Sized(False, True),
    },
    "LuminaNextDiT2DModel": {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": Sized(48, 96),
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "cross_attention_dim": 24,
    },
    "EasyAnimateTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "text_embed_dim": 24,
        "patch_size": 2,
        "sample_width": 16,
        "sample_height": 16,
    },
    "T2IAdapter": {"channels": Sized([16, 32, 48, 64], [32, 48, 64, 96]), "num_res_blocks": 1},
    "PriorTransformer": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "embedding_dim": 32,
        "num_embeddings": 7,
    },
}


def diffusion_classes() -> dict[str, type[nn.Module]]:
    """Every class of a model that the library exports."""
    import diffusers

    names = [name for name in dir(diffusers.models) + list(diffusers._import_structure["models"]) if name[0].isupper()]
    found = {name: getattr(diffusers, name, None) for name in sorted(set(names))}
    return {
        name: cls
        for name, cls in found.items()
        if isinstance(cls, type) and issubclass(cls, nn.Module) and not NOT_MODELS.search(name)
    }


def _class(name: str) -> type[nn.Module]:
    """One class, without an import of all others."""
    import diffusers

    found: type[nn.Module] = getattr(diffusers, name)
    return found


def diffusion_names() -> list[str]:
    return both_sizes(diffusion_classes())


def diffusion_model(name: str) -> Iterator[nn.Module]:
    plain, size = sized(name)
    yield small(_class(plain), size, of_size(GIVEN.get(plain, {}), size))


#: At full size: the U-Nets and transformers of checkpoints that are in use, by their published configurations.
FULL: Mapping[str, tuple[str, dict[str, Any]]] = {
    "Stable Diffusion 1.5, U-Net": (
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    ),
    "Stable Diffusion XL, U-Net": (
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2, 10),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "Stable Diffusion 3, transformer": (
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
    ),
    "Flux.1 dev, transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "PixArt sigma, transformer": (
        "PixArtTransformer2DModel",
        {"sample_size": 128, "caption_channels": 4096, "cross_attention_dim": 1152},
    ),
    "Wan 2.1 14B, transformer": ("WanTransformer3DModel", {}),
    "CogVideoX 2B, transformer": ("CogVideoXTransformer3DModel", {"sample_frames": 9}),
    "Stable Diffusion, autoencoder": (
        "AutoencoderKL",
        {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "sample_size": 512,
        },
    ),
}


def full_model(name: str) -> Iterator[nn.Module]:
    cls, given = FULL[name]
    yield _class(cls)(**given)
