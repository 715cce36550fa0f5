"""Latents between the autoencoder's own numbers and those that the transformer knows."""

import torch
from diffusers import AutoencoderKLWan


def normalise_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """The autoencoder's raw latents `[B, C, F, H, W]` to those that the transformer knows."""
    mean, std = _statistics(vae, latents)
    return (latents - mean) / std


def denormalise_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """The transformer's latents `[B, C, F, H, W]` to the autoencoder's raw ones."""
    mean, std = _statistics(vae, latents)
    return latents * std + mean


def _statistics(vae: AutoencoderKLWan, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
