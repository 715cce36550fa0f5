"""Keeps the autoencoder off two slow paths of torch on the CPU; the results differ by rounding.

Small 3D convolutions: of a single float32 clip, torch gives a 3D convolution to oneDNN only above a size
(`use_mkldnn` in its `Convolution.cpp`); below it a plain loop does the work, up to eight times slower. Small
pictures decode one latent frame at a time, so most of their convolutions lie below. As a sum of 2D
convolutions over the kernel's time steps, with the frames as the batch, they stay with oneDNN.

Norms over the channels: `F.normalize` took 5 to 13 times as long as squaring, adding up and multiplying whole
pictures (32 and 64 channels, one thread).
"""

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from torch import nn

ONEDNN_SIZE = 20_480
"""Batch x channels x frames x height from which on torch leaves the convolution to oneDNN."""


_LEAST_ENERGY = 1e-24  # `F.normalize` divides by the norm, but by no less than 1e-12


class SmallCausalConv3d(WanCausalConv3d):
    """`WanCausalConv3d` that does small float32 convolutions of one clip on the CPU frame by frame."""

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if not _is_slow(input):
            return super()._conv_forward(input, weight, bias)
        stride, *plane = self.stride
        reach = weight.shape[2]
        count = (input.shape[2] - reach) // stride + 1
        frames = input[0].transpose(0, 1)  # [frames, channels, height, width]
        made = None
        for k in range(reach):
            seen = frames[k : k + (count - 1) * stride + 1 : stride]
            part = F.conv2d(seen, weight[:, :, k], bias if made is None else None, tuple(plane))
            made = part if made is None else made + part
        assert made is not None
        return made.transpose(0, 1)[None]


class QuickRMSNorm(WanRMS_norm):
    """`WanRMS_norm` that does float32 on the CPU by whole pictures, where the channels come first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.channel_first or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        energy = x.square().sum(dim=1, keepdim=True)
        gain = energy.clamp_min(_LEAST_ENERGY).rsqrt() * self.scale
        return x * gain * self.gamma + self.bias


def avoid_slow_kernels(model: nn.Module) -> None:
    """Let a Wan autoencoder's convolutions and norms, in place, avoid the slow paths; its weights stay."""
    for module in model.modules():
        if type(module) is WanCausalConv3d:
            module.__class__ = SmallCausalConv3d
        elif type(module) is WanRMS_norm:
            module.__class__ = QuickRMSNorm


def _is_slow(clips: torch.Tensor) -> bool:
    batch, channels, frames, height, _ = clips.shape
    small = batch == 1 and channels * frames * height <= ONEDNN_SIZE
    return small and clips.device.type == "cpu" and clips.dtype == torch.float32
