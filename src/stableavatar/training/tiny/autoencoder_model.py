"""The small autoencoder itself: how it is built, run whole, and measured."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKLWan

from stableavatar.training.tiny.feature_memory import FeatureMemory, chunk_lengths, decode_chunk, encode_chunk


def build_autoencoder(base_channels: int = 32, residual_blocks: int = 1) -> AutoencoderKLWan:
    """The untrained autoencoder: 8x in space, 4x in time, 16 channels, 4n+1 frames to n+1 latent frames."""
    vae = AutoencoderKLWan(
        base_dim=base_channels,
        z_dim=16,
        dim_mult=[1, 2, 2],
        num_res_blocks=residual_blocks,
        attn_scales=[],
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )
    _start_as_skips(vae)
    return vae


@torch.no_grad()
def _start_as_skips(vae: AutoencoderKLWan) -> None:
    """Silences every residual branch, so that at first the averaging skips alone carry colour to the latents.

    With the usual start the branches grow to a hundred times the skips within a thousand steps, colour drowns
    on the way, and the latents end up with six effective dimensions of sixteen.
    """
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "resample.1", "proj")):
            module.weight.zero_()
            module.bias.zero_()
    torch.nn.init.orthogonal_(vae.quant_conv.weight[:16].view(16, -1), gain=2.0)
    torch.nn.init.orthogonal_(vae.post_quant_conv.weight.view(16, -1))
    # Latents start almost without noise; at unit variance it would drown what the encoder says at first.
    vae.quant_conv.weight[16:] = 0
    vae.quant_conv.bias[16:] = -6.0


@torch.no_grad()
def reconstruct(vae: AutoencoderKLWan, frames: torch.Tensor, longest_chunk: int = 20) -> torch.Tensor:
    """Frames [B, 3, 4n+1, H, W] in [-1, 1], through the latents' means and back, float32 in [-1, 1]."""
    memory = FeatureMemory(vae)
    made, start = [], 0
    for length in chunk_lengths(frames.shape[2], longest_chunk):
        with torch.autocast("cpu", torch.bfloat16):
            mean, _ = encode_chunk(vae, frames[:, :, start : start + length], memory)
            made.append(decode_chunk(vae, mean, memory).float().clamp(-1, 1))
        start += length
    return torch.cat(made, dim=2)


def peak_signal_to_noise(made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of each frame [F] of clips [B, 3, F, H, W] in [-1, 1], errors pooled over the batch."""
    return 10 * torch.log10(4 / (made - true).square().mean(dim=(0, 1, 3, 4)).clamp_min(1e-12))


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, clips: Iterator[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over clips [1, 3, 4n+1, H, W]."""
    total, squares, count = torch.zeros(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64), 0
    for clip in clips:
        with torch.autocast("cpu", torch.bfloat16):
            mean, _ = encode_chunk(vae, clip, FeatureMemory(vae))
        values = mean.double()
        total += values.sum(dim=(0, 2, 3, 4))
        squares += values.square().sum(dim=(0, 2, 3, 4))
        count += values[:, 0].numel()
    average = total / count
    deviation = (squares / count - average.square()).clamp_min(1e-12).sqrt()
    return average.tolist(), deviation.tolist()
