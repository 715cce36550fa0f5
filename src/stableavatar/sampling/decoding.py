"""Latents to frames, one latent frame at a time (spec 2, "Decoding").

The autoencoder's decoder is causal: with the feature memory of its convolutions kept, latent after latent
gives the same frames as decoding all at once, so nothing grows with the length of the video.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

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


class StreamDecoder:
    """Decodes normalised latents one latent frame at a time, keeping the decoder's feature memory.

    Args:
        device: where the autoencoder computes, by default where its weights lie.
    """

    def __init__(self, vae: AutoencoderKLWan, device: torch.device | None = None) -> None:
        self.vae = vae
        self.device = device or vae.device
        self.taken = 0  # latent frames decoded
        # Of each convolution the last frames that it saw; before it has seen enough None, or a mark.
        self._memory: list[torch.Tensor | str | None] = [None] * vae._cached_conv_counts["decoder"]
        hook = getattr(vae, "_hf_hook", None)  # of offloading, which only watches encode, decode and forward
        if hook is not None:
            hook.pre_forward(vae)

    @torch.no_grad()
    def decode(self, latent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The frames `[3, 8·H, 8·W]` of the next latent frame `[C, H, W]`, float32 in [-1, 1] on the device:
        one of the first, four of every other."""
        vae = self.vae
        raw = denormalise_latents(vae, latent.to(self.device, torch.float32)[None, :, None])
        hidden = vae.post_quant_conv(raw.to(vae.dtype))
        frames = vae.decoder(hidden, feat_cache=self._memory, feat_idx=[0], first_chunk=self.taken == 0)
        self.taken += 1
        if vae.config.patch_size is not None:
            frames = unpatchify(frames, patch_size=vae.config.patch_size)
        return frames[0].float().clamp(-1, 1).unbind(1)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What `restore` goes on from: tensors, and the rest as JSON."""
        tensors = {str(i): part for i, part in enumerate(self._memory) if isinstance(part, torch.Tensor)}
        marks = {str(i): part for i, part in enumerate(self._memory) if isinstance(part, str)}
        return tensors, {"taken": self.taken, "marks": marks}

    def restore(self, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.taken = rest["taken"]
        for index in range(len(self._memory)):
            tensor = tensors.get(str(index))
            self._memory[index] = rest["marks"].get(str(index)) if tensor is None else tensor.to(self.device)


def stream_decode(
    vae: AutoencoderKLWan, latents: Iterable[torch.Tensor], device: torch.device | None = None
) -> Iterator[torch.Tensor]:
    """Frames of latents as they come; see `StreamDecoder`.

    Args:
        latents: latent frames `[C, H, W]` in order.
    """
    decoder = StreamDecoder(vae, device)
    for latent in latents:
        yield from decoder.decode(latent)
