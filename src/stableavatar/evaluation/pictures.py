"""Likeness of pictures: PSNR, structural similarity and sharpness, over a clip, where a mask says to look."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray

from stableavatar.evaluation.observation import Frames, Mask

_CHUNK = 50
_LUMA = (0.299, 0.587, 0.114)


def _check(made: Frames, true: Frames) -> None:
    if made.shape != true.shape or made.ndim != 4 or made.shape[-1] != 3:
        raise ValueError(f"clips of {made.shape} and {true.shape}: both must be [frames, height, width, 3]")


@functools.lru_cache(maxsize=4)
def _smoother(size: int, sigma: float) -> torch.Tensor:
    """The matrix [size, size] of a Gaussian mean along a side of that length; edges repeat."""
    reach = round(3.5 * sigma)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    places = (torch.arange(size)[:, None] + offsets).clamp(0, size - 1)
    return torch.zeros(size, size).scatter_add_(1, places, (weights / weights.sum()).expand(size, -1))


def _blur(pictures: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian mean of [B, C, H, W]; edges repeat. By matrices: at these sizes faster than a convolution."""
    height, width = pictures.shape[2:]
    return _smoother(height, sigma) @ pictures @ _smoother(width, sigma).T


def structural_similarity(made: Frames, true: Frames, where: Mask | None = None) -> NDArray[np.float64]:
    """SSIM of each frame, 1 where equal, over the pixels of `where` (default: all), as the mean over R, G and
    B.

    The usual form: Gaussian window of 1.5 pixels, constants 0.01 and 0.03 of 255 (Wang et al., 2004).

    Args:
        made, true: clips [F, H, W, 3].
        where: [H, W].

    Raises:
        ValueError: the clips differ in shape, or `where` is empty.
    """
    _check(made, true)
    chosen = torch.ones(made.shape[1:3]) if where is None else torch.from_numpy(where.astype(np.float32))
    if not chosen.any():
        raise ValueError("the mask of a structural similarity is empty")
    first, second = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for start in range(0, len(made), _CHUNK):
        x = torch.from_numpy(made[start : start + _CHUNK].astype(np.float32)).permute(0, 3, 1, 2)
        y = torch.from_numpy(true[start : start + _CHUNK].astype(np.float32)).permute(0, 3, 1, 2)
        mean_x, mean_y = _blur(x, 1.5), _blur(y, 1.5)
        variance_x = (_blur(x * x, 1.5) - mean_x**2).clamp_min(0)
        variance_y = (_blur(y * y, 1.5) - mean_y**2).clamp_min(0)
        covariance = _blur(x * y, 1.5) - mean_x * mean_y
        light = (2 * mean_x * mean_y + first) / (mean_x**2 + mean_y**2 + first)
        structure = (2 * covariance + second) / (variance_x + variance_y + second)
        similarity = (light * structure).mean(dim=1)
        values.append(((similarity * chosen).sum(dim=(1, 2)) / chosen.sum()).double().numpy())
    return np.concatenate(values)


def signal_to_noise(made: Frames, true: Frames, where: Mask | None = None) -> NDArray[np.float64]:
    """PSNR of each frame in dB, at most 100, over the pixels of `where` (default: all). Raises as
    :func:`structural_similarity`."""
    _check(made, true)
    if where is not None and not where.any():
        raise ValueError("the mask of a signal-to-noise ratio is empty")
    chosen = np.ones(made.shape[1:3], dtype=bool) if where is None else where
    errors = [
        np.square(a[chosen].astype(np.float64) - b[chosen]).mean() for a, b in zip(made, true, strict=True)
    ]
    return 10 * np.log10(255**2 / np.maximum(errors, 255**2 * 1e-10))


def sharpness(frames: Frames, where: Mask | None = None) -> float:
    """Mean square of the Laplacian of the luma (levels squared) over the pixels of `where`, edges of the
    picture left out."""
    luma = frames.astype(np.float32) @ np.asarray(_LUMA, dtype=np.float32)
    laplacian = (
        luma[:, :-2, 1:-1]
        + luma[:, 2:, 1:-1]
        + luma[:, 1:-1, :-2]
        + luma[:, 1:-1, 2:]
        - 4 * luma[:, 1:-1, 1:-1]
    )
    chosen = np.ones(frames.shape[1:3], dtype=bool) if where is None else where
    return float(np.square(laplacian[:, chosen[1:-1, 1:-1]]).mean())


def detail_bands(frames: Frames, where: Mask | None = None) -> NDArray[np.float64]:
    """Mean squares of the luma's finest detail (levels squared, [12]).

    In blocks of 2x2 pixels, laid in each of the four ways: from above to below, from left to right, and
    across; over the blocks that lie in `where` as a whole.
    """
    luma = frames.astype(np.float32) @ np.asarray(_LUMA, dtype=np.float32)
    chosen = np.ones(frames.shape[1:3], dtype=bool) if where is None else where
    energies = []
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        height, width = (luma.shape[1] - down) // 2, (luma.shape[2] - right) // 2
        laid = np.s_[..., down : down + 2 * height, right : right + 2 * width]
        inside = chosen[laid].reshape(height, 2, width, 2).all(axis=(1, 3))
        blocks = luma[laid].reshape(len(luma), height, 2, width, 2).swapaxes(2, 3)[:, inside]
        (first, second), (third, fourth) = blocks.transpose(2, 3, 0, 1)
        for band in (
            first + second - third - fourth,
            first - second + third - fourth,
            first - second - third + fourth,
        ):
            energies.append(np.square(band / 2).mean(dtype=np.float64))
    return np.array(energies)


def shifted(frames: Frames, right: int, down: int) -> Frames:
    """The clip moved by whole pixels; what comes in from the edge repeats it."""
    reach = max(abs(right), abs(down))
    padded = np.pad(frames, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    height, width = frames.shape[1:3]
    return padded[:, reach - down : reach - down + height, reach - right : reach - right + width]
