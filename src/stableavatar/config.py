"""Sizes of the two published models: the constructor settings of every part, and their noise schedule.

The embedded model ``tiny`` carries its sizes in the ``config.json`` of each of its folders instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Of the sigmas they were trained and are sampled with (`spec/1-model.md`).
TRAINING_STEPS = 1000
SHIFT = 5.0


@dataclass(frozen=True)
class ModelSizes:
    """Keywords for the constructors of a model's parts (`spec/1-model.md`, "Parts").

    Attributes:
        name: what the size is called on the command line.
        transformer: ``StableAvatarTransformer3DModel``.
        vae: diffusers' ``AutoencoderKLWan``.
        text_encoder: transformers' ``UMT5Config``.
        image_encoder: transformers' ``CLIPVisionConfig``.
        speech_encoder: transformers' ``Wav2Vec2Config``.
    """

    name: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    image_encoder: Mapping[str, Any]
    speech_encoder: Mapping[str, Any]


_VAE = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],  # diffusers' spelling
}

_UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "gated-gelu",
}

_VIT_H_14 = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}

_WAV2VEC2_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "conv_dim": [512] * 7,
    "feat_extract_norm": "group",
}

_TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": 4096,
    "text_length": 512,
    "freq_dim": 256,
    "eps": 1e-6,
    "image_dim": 1280,
    "audio_dim": 768,
    "audio_layers": 2,
    "audio_heads": 8,
}

_ENCODERS = {
    "vae": _VAE,
    "text_encoder": _UMT5_XXL,
    "image_encoder": _VIT_H_14,
    "speech_encoder": _WAV2VEC2_BASE,
}

SIZES: Mapping[str, ModelSizes] = {
    "1.3b": ModelSizes(
        name="1.3b",
        transformer={
            **_TRANSFORMER,
            "num_attention_heads": 12,
            "num_layers": 30,
            "ffn_dim": 8960,
            "audio_hidden_dim": None,
        },
        **_ENCODERS,
    ),
    "14b": ModelSizes(
        name="14b",
        transformer={
            **_TRANSFORMER,
            "num_attention_heads": 40,
            "num_layers": 40,
            "ffn_dim": 13824,
            "audio_hidden_dim": 2048,
        },
        **_ENCODERS,
    ),
}


def is_published_size(transformer: Mapping[str, Any]) -> bool:
    """Whether a transformer of these constructor settings is as large as one of the published."""
    told = ("num_attention_heads", "num_layers", "ffn_dim")
    return any(
        all(transformer.get(name) == size.transformer[name] for name in told) for size in SIZES.values()
    )
