"""Latents to frames, one latent frame at a time (spec 2, "Decoding").

The autoencoder's decoder is causal: with the feature memory of its convolutions kept, latent after latent
gives the same frames as decoding all at once, so nothing grows with the length of the video.
"""

from collections.abc import Iterable, Iterator

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify


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


@torch.no_grad()
def stream_decode(
    vae: AutoencoderKLWan, latents: Iterable[torch.Tensor], device: torch.device | None = None
) -> Iterator[torch.Tensor]:
    """Decode normalised latents as they come.

    Args:
        latents: latent frames `[C, H, W]` in order.
        device: where the autoencoder computes, by default where its weights lie.

    Yields:
        frames `[3, 8·H, 8·W]`, float32 in [-1, 1] on that device: one for the first latent, four
        for every other.
    """
    hook = getattr(
        vae, "_hf_hook", None
    )  # of model offloading, which only watches encode, decode and forward
    if hook is not None:
        hook.pre_forward(vae)
    memory: list[torch.Tensor | None] = [None] * vae._cached_conv_counts["decoder"]
    patch = vae.config.patch_size
    device = device or vae.device
    for index, latent in enumerate(latents):
        raw = denormalise_latents(vae, latent.to(device, torch.float32)[None, :, None])
        hidden = vae.post_quant_conv(raw.to(vae.dtype))
        frames = vae.decoder(hidden, feat_cache=memory, feat_idx=[0], first_chunk=index == 0)
        if patch is not None:
            frames = unpatchify(frames, patch_size=patch)
        yield from frames[0].float().clamp(-1, 1).unbind(1)
