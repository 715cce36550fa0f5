"""The portrait into what the transformer needs of it: embeddings, and a reference condition (spec 1)."""

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from transformers import CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from stableavatar.models.latents import normalise_latents


def picture_tensor(picture: NDArray[np.uint8]) -> torch.Tensor:
    """A picture, uint8 `[H, W, 3]`, as float32 `[3, H, W]` in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float() / 127.5 - 1


def portrait_pixels(picture: torch.Tensor, size: int) -> torch.Tensor:
    """What the portrait encoder sees: float32 `[1, 3, size, size]`.

    Bicubic, not antialiased and squeezed to a square, as the weights were trained; normalised with CLIP's
    mean and std.

    Args:
        picture: `[3, H, W]` in [-1, 1].
    """
    pixels = torch.nn.functional.interpolate(
        picture[None].float(), size=(size, size), mode="bicubic", align_corners=False
    )
    mean, std = (
        torch.tensor(v, device=picture.device).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    return (pixels * 0.5 + 0.5 - mean) / std


@torch.no_grad()
def portrait_embeddings(image_encoder: CLIPVisionModel, picture: torch.Tensor) -> torch.Tensor:
    """Embeddings of the portrait: all tokens of the hidden state before the encoder's last block, `[1, P,
    image_dim]`.

    Args:
        picture: `[3, H, W]` in [-1, 1], on the device that the encoder computes on.
    """
    pixels = portrait_pixels(picture, image_encoder.config.image_size).to(image_encoder.dtype)
    return image_encoder(pixels, output_hidden_states=True).hidden_states[-2]


@torch.no_grad()
def reference_condition(vae: AutoencoderKLWan, picture: torch.Tensor, frames: int) -> torch.Tensor:
    """Mask and encoded reference clip of a window: float32 `[1, 4 + C, F, H/8, W/8]` on the autoencoder's
    device.

    The clip is the portrait, then mid-grey; its latents are the mode of what the autoencoder gives,
    normalised. The mask is one for the first frame, which stands four times, so that frames + 3 fold into F
    latents of 4 channels.

    Args:
        picture: `[3, H, W]` in [-1, 1], on the device that the autoencoder computes on.
        frames: T = 4·(F-1)+1 frames of a window.
    """
    latents = encode_clips(vae, reference_clips(picture[None], frames))
    return torch.cat([reference_mask(latents), latents], dim=1)


def reference_clips(pictures: torch.Tensor, frames: int) -> torch.Tensor:
    """Clips `[B, 3, frames, H, W]` of pictures `[B, 3, H, W]`: each picture, then mid-grey."""
    clips = pictures.new_zeros(len(pictures), 3, frames, *pictures.shape[2:])
    clips[:, :, 0] = pictures
    return clips


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Normalised latents, float32 `[B, C, F, H/8, W/8]`, of clips float32 `[B, 3, T, H, W]` in [-1, 1], all
    on the autoencoder's device: the mode of what it gives. They are encoded as a whole, also where the
    autoencoder is set to tiles: the model was trained with no others."""
    tiling, vae.use_tiling = vae.use_tiling, False
    try:
        raw = vae.encode(clips.to(vae.dtype)).latent_dist.mode()
    finally:
        vae.use_tiling = tiling
    return normalise_latents(vae, raw.float())


def reference_mask(latents: torch.Tensor) -> torch.Tensor:
    """The four mask channels beside latents `[B, C, F, H, W]`: ones for the first frame, which is known."""
    mask = torch.zeros_like(latents[:, :4])
    mask[:, :, 0] = 1
    return mask
