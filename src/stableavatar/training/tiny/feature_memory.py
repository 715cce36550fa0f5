"""The video autoencoder in chunks of any length, its causal feature memory carried along.

diffusers' own `encode` and `decode` feed the first frame and then four frames, or one latent frame, at a
time. Larger chunks give the same numbers (the memory is what makes them so) with far fewer kernel calls,
and a clip of any length can be trained on in pieces, the memory detached between them.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm, patchify, unpatchify


class FeatureMemory:
    """What the causal convolutions remember of a clip between chunks; a new one for each clip."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        counts = vae._cached_conv_counts
        self.encoder: list[Any] = [None] * counts["encoder"]
        self.decoder: list[Any] = [None] * counts["decoder"]
        self.encoded = False
        self.decoded = False

    def detach(self) -> None:
        """Cuts the gradient: the next chunk sees the features, and does not train what made them."""
        for features in (self.encoder, self.decoder):
            features[:] = [value.detach() if isinstance(value, torch.Tensor) else value for value in features]


def encode_chunk(
    vae: AutoencoderKLWan, frames: torch.Tensor, memory: FeatureMemory
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames [B, 3, F, H, W] in [-1, 1] to mean and log-variance of latents, each [B, 16, f, H/8, W/8].

    A clip's first chunk has F = 4f-3 frames, every later one F = 4f; ValueError otherwise.
    """
    count = frames.shape[2]
    if (count - (0 if memory.encoded else 1)) % 4:
        raise ValueError(f"a chunk of {count} frames does not fall on the latent grid")
    patches = patchify(frames, vae.config.patch_size or 1)
    pieces = [patches] if memory.encoded else [patches[:, :, :1], patches[:, :, 1:]]
    memory.encoded = True
    encoded = [
        vae.encoder(piece, feat_cache=memory.encoder, feat_idx=[0]) for piece in pieces if piece.shape[2]
    ]
    mean, log_variance = vae.quant_conv(torch.cat(encoded, dim=2)).chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decode_chunk(vae: AutoencoderKLWan, latents: torch.Tensor, memory: FeatureMemory) -> torch.Tensor:
    """Latents [B, 16, f, h, w] (not normalised) to frames [B, 3, F, 8h, 8w], not clamped.

    F = 4f-3 first, 4f later.
    """
    features = vae.post_quant_conv(latents)
    decoded = []
    if not memory.decoded:
        first, features = features[:, :, :1], features[:, :, 1:]
        decoded.append(vae.decoder(first, feat_cache=memory.decoder, feat_idx=[0], first_chunk=True))
        memory.decoded = True
    if features.shape[2]:
        decoded.append(vae.decoder(features, feat_cache=memory.decoder, feat_idx=[0]))
    frames: torch.Tensor = unpatchify(torch.cat(decoded, dim=2), vae.config.patch_size or 1)
    return frames


class _QuickNorm:
    """The arithmetic of `WanRMS_norm` in fewer passes: a training step takes three quarters of the time."""

    def __init__(self, module: WanRMS_norm) -> None:
        self.module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        energy = (x * x).sum(dim=1, keepdim=True, dtype=torch.float32)
        gain = (self.module.scale * energy.clamp_min(1e-12).rsqrt()).to(x.dtype)
        result: torch.Tensor = x * gain * self.module.gamma.to(x.dtype)
        return result


def use_quick_norms(vae: AutoencoderKLWan) -> None:
    """Replaces the arithmetic of the norms of `vae` by a faster equal one.

    Parameters and files stay as they are.
    """
    for module in vae.modules():
        if isinstance(module, WanRMS_norm) and isinstance(module.bias, float):
            module.forward = _QuickNorm(module)


def chunk_lengths(frames: int, longest: int) -> list[int]:
    """Cuts a clip of 4n+1 frames into chunks on the latent grid; the first has one frame more than others.

    `longest`, the most frames of a later chunk, is a multiple of 4. Raises ValueError when the clip is not
    on the latent grid.
    """
    if frames % 4 != 1 or longest % 4:
        raise ValueError(f"{frames} frames in chunks of {longest}: a clip has 4n+1 frames, a chunk 4n")
    lengths = [min(frames, longest + 1)]
    while sum(lengths) < frames:
        lengths.append(min(longest, frames - sum(lengths)))
    return lengths
