"""A whole model at toy size with random weights: every part is the real class."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from transformers import (
    ByT5Tokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.pipeline import AvatarPipeline


def toy_transformer(audio_heads: int = 2) -> StableAvatarTransformer3DModel:
    torch.manual_seed(1)
    model = StableAvatarTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        text_dim=16,
        text_length=48,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        image_dim=32,
        audio_dim=24,
        audio_heads=audio_heads,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # none may stay at a value that hides its effect
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def toy_vae() -> AutoencoderKLWan:
    torch.manual_seed(2)
    return AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 2, 2], num_res_blocks=1).eval()


def toy_speech_encoder() -> Wav2Vec2Model:
    torch.manual_seed(3)
    return Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=[8] * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        )
    ).eval()


def toy_pipeline() -> AvatarPipeline:
    torch.manual_seed(4)
    text = UMT5EncoderModel(
        UMT5Config(
            vocab_size=384,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    image = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
            hidden_act="gelu",
        )
    )
    return AvatarPipeline(
        transformer=toy_transformer(),
        vae=toy_vae(),
        text_encoder=text.eval(),
        tokenizer=ByT5Tokenizer(),
        image_encoder=image.eval(),
        speech_encoder=toy_speech_encoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        sampling_defaults={
            "steps": 2,
            "window": 17,
            "overlap": 2,
            "sizes": {"square": (32, 32), "wide": (64, 32)},
        },
    )


def toy_folder(folder: Path) -> Path:
    toy_pipeline().save_pretrained(folder)
    return folder
