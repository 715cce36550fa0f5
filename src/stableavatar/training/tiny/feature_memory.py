"""The video autoencoder in chunks of any length, its causal feature memory carried along.

diffusers' own `encode` and `decode` feed the first frame and then four frames, or one latent frame, at a
time. Larger chunks give the same numbers (the memory is what makes them so) with far fewer kernel calls,
and a clip of any length can be trained on in pieces, the memory detached between them.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanRMS_norm,
    patchify,
    unpatchify,
)
from torch.nn.grad import conv2d_weight, conv3d_input


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
    """Frames [B, 3, F, H, W] in [-1, 1] to mean and log-variance of latents, each [B, C, f, H/8, W/8].

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
    """Latents [B, C, f, h, w] (not normalised) to frames [B, 3, F, 8h, 8w], not clamped.

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


class _Convolution(torch.autograd.Function):
    """A 3D convolution without stride or padding, the gradient of its kernel taken as of 2D convolutions.

    On processors with AMX oneDNN's bfloat16 gradient of a 3D kernel is wrong at many sizes, by a tenth or
    not a number, and for a kernel of one pixel it writes past its memory (torch 2.13). Of 2D kernels it is
    right, and a training step takes 1.0 s in place of 0.8.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return torch.nn.functional.conv3d(x, weight, bias)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = None, None, None
        if ctx.needs_input_grad[0]:
            of_input = conv3d_input(x.shape, weight, gradient)
        if ctx.needs_input_grad[1]:
            frames = gradient.shape[2]
            flat = gradient.transpose(1, 2).flatten(0, 1)
            shape = (weight.shape[0], weight.shape[1], *weight.shape[3:])
            of_weight = torch.stack(
                [
                    conv2d_weight(x[:, :, at : at + frames].transpose(1, 2).flatten(0, 1), shape, flat)
                    for at in range(weight.shape[2])
                ],
                dim=2,
            )
        if ctx.has_bias and ctx.needs_input_grad[2]:
            of_bias = gradient.sum(dim=(0, 2, 3, 4))
        return of_input, of_weight, of_bias


class _TrainedConvolution(WanCausalConv3d):
    """Wan's causal convolution, which pads before it calls this."""

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        result: torch.Tensor = _Convolution.apply(input, weight, bias)
        return result


def use_training_kernels(vae: AutoencoderKLWan) -> None:
    """Replaces the arithmetic of the norms of `vae` by a faster equal one, that of its 3D convolutions by one
    whose gradient is right.

    Parameters and files stay as they are.
    """
    for module in vae.modules():
        if isinstance(module, WanRMS_norm) and isinstance(module.bias, float):
            module.forward = _QuickNorm(module)
        elif type(module) is WanCausalConv3d and module.stride == (1, 1, 1):
            module.__class__ = _TrainedConvolution


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
