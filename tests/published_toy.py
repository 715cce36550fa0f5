"""A whole published layout at toy size, written with random weights under published names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from stableavatar.checkpoints import names
from stableavatar.models.transformer import StableAvatarTransformer3DModel

BASE = "Wan2.1-Fun-V1.1-1.3B-InP"
OVERLAYS = "StableAvatar-1.3B"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
T5 = "models_t5_umt5-xxl-enc-bf16.pth"

TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "text_length": 32,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "image_dim": 80,
    "audio_dim": 32,
}
PUBLISHED_CONFIG = {"dim": 24, "num_heads": 2, "num_layers": 2, "ffn_dim": 32, "text_len": 32, "eps": 1e-6}
SPEECH: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter, those that start at zero or one included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def toy_transformer(seed: int = 0, **settings: Any) -> StableAvatarTransformer3DModel:
    model = randomise(StableAvatarTransformer3DModel(**{**TRANSFORMER, **settings}), seed)
    assert isinstance(model, StableAvatarTransformer3DModel)
    return model


def toy_vae(seed: int = 1) -> nn.Module:
    return randomise(AutoencoderKLWan(base_dim=4), seed)


def toy_text_encoder(seed: int = 2) -> nn.Module:
    config = UMT5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3)
    return randomise(UMT5EncoderModel(config), seed)


def toy_image_encoder(seed: int = 3) -> nn.Module:
    config = CLIPVisionConfig(
        hidden_size=80,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=56,
        patch_size=14,
        hidden_act="gelu",
    )
    return randomise(CLIPVisionModel(config), seed)


def toy_speech_encoder(seed: int = 4) -> nn.Module:
    return randomise(Wav2Vec2ForCTC(Wav2Vec2Config(**SPEECH)), seed)


def copies(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def published_transformer(seed: int = 0, **settings: Any) -> names.StateDict:
    """The toy transformer's weights under the published names."""
    return copies(names.to_published("transformer", toy_transformer(seed, **settings).state_dict()))


def write_published(root: Path) -> Path:
    """Write the layout of `spec/3-checkpoints.md`: base, two overlays, encoders, tokenizer."""
    base, overlays = root / BASE, root / OVERLAYS
    base.mkdir(parents=True)
    overlays.mkdir()
    video_only = {
        name: tensor
        for name, tensor in toy_transformer(10).state_dict().items()
        if not names.is_audio_name(name)
    }
    save_file(
        copies(names.to_published("transformer", video_only)), base / "diffusion_pytorch_model.safetensors"
    )
    (base / "config.json").write_text(json.dumps(PUBLISHED_CONFIG))
    for seed, variant in ((0, "square"), (20, "rec-vec")):
        state = copies(names.to_published("transformer", toy_transformer(seed).state_dict()))
        torch.save(state, overlays / f"transformer3d-{variant}.pt")
    torch.save(copies(names.to_published("vae", toy_vae().state_dict())), base / "Wan2.1_VAE.pth")
    text = copies(names.to_published("text_encoder", toy_text_encoder().state_dict()))
    torch.save({name: tensor.bfloat16() for name, tensor in text.items()}, base / T5)
    image = copies(names.to_published("image_encoder", toy_image_encoder().state_dict()))
    image |= {
        "visual.head": torch.zeros(80, 8),
        "log_scale": torch.zeros(()),
        "textual.norm.bias": torch.ones(4),
    }
    torch.save(image, base / CLIP)
    tokenizer = Tokenizer(
        models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "hello": 3}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (base / "google" / "umt5-xxl").mkdir(parents=True)
    tokenizer.save(str(base / "google" / "umt5-xxl" / "tokenizer.json"))
    speech = root / "wav2vec2-base-960h"
    toy_speech_encoder().save_pretrained(speech)
    return root
