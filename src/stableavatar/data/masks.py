"""Face and lip masks at the size of the latents."""

import torch
from torch.nn import functional


def masks_to_latents(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize masks `[T, h, w]` in [0, 1] of T = 4n+1 frames to `[n+1, height, width]`, trilinearly (spec 4,
    "A sample").

    Raises:
        ValueError: T is not 4n+1.
    """
    frames = mask.shape[0]
    if frames % 4 != 1:
        raise ValueError(f"{frames} mask frames: a clip has 4n+1")
    size = ((frames - 1) // 4 + 1, height, width)
    resized = functional.interpolate(mask.float()[None, None], size=size, mode="trilinear")
    return resized[0, 0].clamp(0, 1)
