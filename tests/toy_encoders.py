"""An autoencoder as `tiny` has it and a speech encoder, untrained and so small that they run in a moment."""

import torch
from diffusers import AutoencoderKLWan
from transformers import Wav2Vec2Config, Wav2Vec2Model


def toy_encoder_pair(mean: float = 0.0, deviation: float = 1.0) -> tuple[AutoencoderKLWan, Wav2Vec2Model]:
    """Of 16 latent channels, whose stated mean and deviation are all the same, and 16 features; of one seed."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, latents_mean=[mean] * 16, latents_std=[deviation] * 16,
    )  # fmt: skip
    speech = Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=[8] * 7,
            num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, feat_extract_norm="group",
        )
    )  # fmt: skip
    return vae.eval(), speech.eval()
