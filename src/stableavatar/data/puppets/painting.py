"""Small numpy painting kit: soft edges, blobs, noise, layers with premultiplied alpha."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Array = NDArray[Any]
"""Pictures and fields; float32 wherever it is kept."""


def smoothstep(low: float | Array, high: float | Array, value: Array) -> Array:
    """0 below `low`, 1 above `high`, a smooth cubic between; falls instead when low > high."""
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    return (t * t * (3.0 - 2.0 * t)).astype(np.float32)


def blob(x: Array, y: Array, cx: float, cy: float, rx: float, ry: float) -> Array:
    """A Gaussian bump of height 1 at (cx, cy) with standard deviations rx and ry."""
    return np.exp(-0.5 * (((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2)).astype(np.float32)


def over(canvas: Array, colour: Sequence[float] | Array, alpha: Array) -> None:
    """Paint `colour` (three numbers or [H, W, 3]) onto `canvas` [H, W, 3] in place; `alpha` [H, W] covers."""
    canvas += (np.asarray(colour, dtype=np.float32) - canvas) * alpha[..., None]


def noise_field(rng: np.random.Generator, height: int, width: int, cells: float, octaves: int = 4) -> Array:
    """Fractal noise [height, width] of mean 0 and standard deviation 1; `cells` waves across the width."""
    total = np.zeros((height, width), dtype=np.float32)
    for octave in range(octaves):
        across = max(2, round(cells * 2**octave))
        down = max(2, round(across * height / width))
        grid = rng.standard_normal((down + 1, across + 1)).astype(np.float32)
        layer = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(layer, dtype=np.float32) * 0.55**octave
    total -= total.mean()
    return total / max(float(total.std()), 1e-6)


def sample_tiled(field: Array, u: Array, v: Array) -> Array:
    """Bilinear look-up of `field` [h, w] at real coordinates (u across, v down), wrapping round."""
    height, width = field.shape
    x0 = np.floor(u)
    y0 = np.floor(v)
    fx = (u - x0).astype(np.float32)
    fy = (v - y0).astype(np.float32)
    left = x0.astype(np.int64) % width
    top = y0.astype(np.int64) % height
    right = (left + 1) % width
    bottom = (top + 1) % height
    upper = field[top, left] * (1 - fx) + field[top, right] * fx
    lower = field[bottom, left] * (1 - fx) + field[bottom, right] * fx
    return (upper * (1 - fy) + lower * fy).astype(np.float32)


def blur(picture: Array, radius: float) -> Array:
    """Gaussian blur of [H, W] or [H, W, C] in 0..1 by `radius` pixels."""
    if radius < 0.2:
        return picture
    planes = picture[..., None] if picture.ndim == 2 else picture
    blurred = [
        np.asarray(
            Image.fromarray((np.clip(planes[..., c], 0, 1) * 255.0).astype(np.uint8)).filter(
                ImageFilter.GaussianBlur(radius)
            ),
            dtype=np.float32,
        )
        / 255.0
        for c in range(planes.shape[-1])
    ]
    result = np.stack(blurred, axis=-1)
    return result[..., 0] if picture.ndim == 2 else result


def signed_distance(inside: Array, spacing: float) -> Array:
    """Turn an implicit shape (positive inside) into an approximate signed distance in the grid's unit."""
    gradient_y, gradient_x = np.gradient(inside, spacing)
    return (inside / np.maximum(np.hypot(gradient_x, gradient_y), 1e-3)).astype(np.float32)
