"""The small autoencoder itself: how it is built, run whole, and measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from stableavatar.errors import InputError
from stableavatar.training.tiny.feature_memory import FeatureMemory, chunk_lengths, decode_chunk, encode_chunk


def build_autoencoder(
    base_channels: int = 32, residual_blocks: int = 1, latent_channels: int = 32
) -> AutoencoderKLWan:
    """The untrained autoencoder: 8x in space, 4x in time, 4n+1 frames to n+1 latent frames."""
    vae = AutoencoderKLWan(
        base_dim=base_channels,
        z_dim=latent_channels,
        dim_mult=[1, 2, 2],
        num_res_blocks=residual_blocks,
        attn_scales=[],
        temperal_downsample=[True, True],
        latents_mean=[0.0] * latent_channels,
        latents_std=[1.0] * latent_channels,
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
    channels: int = vae.config.z_dim
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "resample.1", "proj")):
            module.weight.zero_()
            module.bias.zero_()
    torch.nn.init.orthogonal_(vae.quant_conv.weight[:channels].view(channels, -1), gain=2.0)
    torch.nn.init.orthogonal_(vae.post_quant_conv.weight.view(channels, -1))
    # Latents start almost without noise; at unit variance it would drown what the encoder says at first.
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = -6.0


@torch.no_grad()
def start_from(vae: AutoencoderKLWan, folder: Path) -> tuple[list[float], list[float]] | None:
    """Takes over the weights of a trained autoencoder of the same widths and no more latent channels.

    The channels that it lacks are added so that at first every picture comes out as from the file: the
    encoder fills them with new features of its last layer, the decoder does not listen to them yet.

    Returns:
        The latents' mean and standard deviation as the file has them; None where channels were added.

    Raises:
        InputError: other widths, or more latent channels.
    """
    given = AutoencoderKLWan.from_pretrained(folder)
    old, new = given.config.z_dim, vae.config.z_dim
    widths = ("base_dim", "dim_mult", "num_res_blocks", "patch_size", "is_residual")
    if old > new or any(given.config[name] != vae.config[name] for name in widths):
        raise InputError(f"{folder}: its sizes differ, or it has more than {new} latent channels")
    own = vae.state_dict()
    for name, value in given.state_dict().items():
        if old == new or value.shape == own[name].shape:
            own[name].copy_(value)
        elif name.startswith("encoder.conv_out."):
            own[name][: 2 * old] = value
        elif name == "decoder.conv_in.weight":
            own[name].zero_()
            own[name][:, :old] = value
        elif name.startswith("post_quant_conv."):
            grown = torch.zeros_like(own[name])
            grown[:old] = (
                torch.nn.functional.pad(value, (*(0, 0) * 3, 0, new - old)) if value.ndim > 1 else value
            )
            if value.ndim > 1:
                grown[old:, old:] = torch.eye(new - old).view(new - old, new - old, 1, 1, 1)
            own[name].copy_(grown)
        else:  # quant_conv: means first, then log-variances
            grown = torch.zeros_like(own[name])
            for half in (0, 1):
                part = value[half * old : (half + 1) * old]
                if value.ndim > 1:
                    grown[half * new : half * new + old, : 2 * old] = part
                else:
                    grown[half * new : half * new + old] = part
            if value.ndim > 1:
                added = torch.empty(new - old, 2 * (new - old))
                torch.nn.init.orthogonal_(added, gain=2.0)
                grown[old:new, 2 * old :] = added.view(new - old, -1, 1, 1, 1)
            else:
                grown[new + old :] = -6.0
            own[name].copy_(grown)
    return (list(given.config.latents_mean), list(given.config.latents_std)) if old == new else None


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


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, clips: Iterator[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over clips [1, 3, 4n+1, H, W]."""
    total, squares = torch.zeros(2, vae.config.z_dim, dtype=torch.float64)
    count = 0
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
