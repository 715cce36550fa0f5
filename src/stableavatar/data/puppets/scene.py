"""What stands still behind and below a puppet's head: background, neck and clothes."""

from __future__ import annotations

import functools
import math

import numpy as np

from stableavatar.data.puppets.identity import Identity
from stableavatar.data.puppets.painting import Array, blur, noise_field, over, smoothstep
from stableavatar.errors import extra_missing

_PICTURES = (
    "brick",
    "grass",
    "gravel",
    "chelsea",
    "coffee",
    "rocket",
    "hubble_deep_field",
    "camera",
    "stereo_motorcycle",
)
"""Pictures inside scikit-image's wheel. The portrait `astronaut` is left out: it is for evaluation only."""


@functools.lru_cache(maxsize=len(_PICTURES))
def _picture(name: str) -> Array:
    try:
        from skimage import data
    except ImportError as error:
        raise extra_missing(
            "Backgrounds of puppets need scikit-image, which is not installed", "tiny"
        ) from error
    loaded = getattr(data, name)()
    picture = np.asarray(loaded[0] if isinstance(loaded, tuple) else loaded)
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=-1)
    return picture[..., :3].astype(np.float32) / 255.0


def _crop(rng: np.random.Generator, picture: Array, size: int) -> Array:
    from PIL import Image

    side = int(min(picture.shape[:2]) * rng.uniform(0.45, 1.0))
    top = int(rng.integers(0, picture.shape[0] - side + 1))
    left = int(rng.integers(0, picture.shape[1] - side + 1))
    part = picture[top : top + side, left : left + side]
    if rng.uniform() < 0.5:
        part = part[:, ::-1]
    image = Image.fromarray((part * 255).astype(np.uint8)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.float32) / 255.0


def paint_background(identity: Identity, size: int) -> Array:
    """Background [size, size, 3] in 0..1."""
    rng = np.random.default_rng([identity.seed, 303])
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(axis, axis)
    first, second, third = (np.asarray(c, dtype=np.float32) for c in identity.background_colours)
    canvas: Array = np.broadcast_to(first, (size, size, 3)).astype(np.float32).copy()
    kind = identity.background
    angle = rng.uniform(0, 2 * math.pi)
    ramp = (x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle)
    if kind == "plain":
        over(canvas, second, 0.1 * smoothstep(-0.6, 0.6, ramp))
    elif kind == "gradient":
        over(canvas, second, smoothstep(-0.6, 0.6, ramp))
    elif kind == "vignette":
        over(canvas, second * 0.5, smoothstep(0.15, 0.85, np.hypot(x - 0.5, y - 0.4)))
    elif kind == "noise":
        cells = float(rng.uniform(2, 8))
        over(canvas, second, smoothstep(-1.5, 1.5, noise_field(rng, size, size, cells, 4)))
        over(canvas, third, 0.6 * smoothstep(0.3, 1.6, noise_field(rng, size, size, cells, 4)))
    elif kind == "stripes":
        waves = np.sin(ramp * rng.uniform(15, 60))
        over(canvas, second, 0.7 * smoothstep(-0.3, 0.3, waves))
    elif kind == "blocks":
        over(canvas, second, 0.3 * smoothstep(-0.6, 0.6, ramp))
        for _ in range(int(rng.integers(4, 12))):
            cx, cy, half_x, half_y = (
                rng.uniform(0, 1),
                rng.uniform(0, 0.9),
                rng.uniform(0.04, 0.25),
                rng.uniform(0.04, 0.3),
            )
            colour = third * rng.uniform(0.4, 1.3) + second * rng.uniform(0, 0.4)
            edge = np.maximum(np.abs(x - cx) - half_x, np.abs(y - cy) - half_y)
            over(canvas, np.clip(colour, 0, 1), 0.85 * (1 - smoothstep(-0.5 / size, 1.0 / size, edge)))
    elif kind == "bokeh":
        over(canvas, second * 0.5, smoothstep(-0.6, 0.6, ramp))
        for _ in range(int(rng.integers(6, 22))):
            cx, cy, radius = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.02, 0.1)
            disc = 1 - smoothstep(radius * 0.85, radius, np.hypot(x - cx, y - cy))
            over(canvas, np.clip(third * rng.uniform(0.6, 1.5), 0, 1), float(rng.uniform(0.15, 0.6)) * disc)
    else:
        picture = _crop(rng, _picture(_PICTURES[int(rng.integers(len(_PICTURES)))]), size)
        canvas = picture * float(rng.uniform(0.6, 1.05))
        over(canvas, first, np.full_like(x, rng.uniform(0, 0.35)))
    canvas = blur(np.clip(canvas, 0, 1), identity.background_blur * size)
    return np.clip(canvas * np.asarray(identity.light_colour, dtype=np.float32), 0, 1).astype(np.float32)


def paint_body(identity: Identity, size: int) -> Array:
    """Neck, shoulders and clothes as premultiplied RGBA [size, size, 4], in the frame's own pixels."""
    rng = np.random.default_rng([identity.seed, 404])
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    gx, gy = np.meshgrid(axis, axis)
    x = (gx - identity.centre[0]) / identity.scale
    y = (gy - identity.centre[1]) / identity.scale
    soft = 1.2 / (identity.scale * size)
    lx = identity.light[0]

    neck_width = identity.face_half_width * (
        0.52 if identity.person == "woman" else 0.66
    ) + 0.06 * smoothstep(0.9, 1.3, y)
    neck = 1 - smoothstep(-soft, soft, np.abs(x) - neck_width)
    neck = neck * smoothstep(0.2, 0.25, y)
    round_off = 1 - 0.4 * np.abs(x / identity.face_half_width) ** 2
    shade = (0.62 + 0.3 * smoothstep(1.0, 1.4, y)) * round_off * (1 + 0.25 * lx * x)
    rgb = np.asarray(identity.skin, dtype=np.float32) * shade[..., None]

    slope = 1.12 + 0.06 * np.abs(x) + 0.28 * np.clip(np.abs(x) - 0.55, 0, None) ** 1.5
    drop = np.clip(np.abs(x) - identity.shoulder_width * 0.72, 0, None)
    top = slope + 2.2 * drop**2
    collar_depth = {
        "vneck": 0.55,
        "collar": 0.3,
        "suit": 0.6,
        "turtleneck": -0.16,
        "crew": 0.17,
        "stripes": 0.2,
    }[identity.clothes]
    if identity.clothes in ("vneck", "suit", "collar"):
        neckline = 1.08 + collar_depth * np.clip(1 - np.abs(x) / 0.55, 0, 1)
    elif identity.clothes == "turtleneck":
        neckline = np.where(np.abs(x) < neck_width + 0.05, 1.02 + 0.05 * x * x, top)
    else:
        neckline = 1.1 + collar_depth * np.sqrt(np.clip(1 - (x / 0.6) ** 2, 0, 1))
    skin_top = smoothstep(-soft, soft, y - slope - 0.0)
    torso = skin_top
    cloth = smoothstep(
        -soft, soft, y - np.maximum(top if identity.clothes != "turtleneck" else neckline, neckline)
    )
    folds = noise_field(rng, size, size, 5, 4)
    weave = noise_field(rng, size, size, size / 6, 1)
    cloth_shade = (
        0.86 + 0.07 * folds + 0.015 * weave + 0.14 * lx * np.clip(x, -1, 1) - 0.1 * smoothstep(1.1, 1.9, y)
    )
    fabric: Array = np.broadcast_to(np.asarray(identity.cloth, dtype=np.float32), (size, size, 3)).copy()
    if identity.clothes == "stripes":
        over(fabric, identity.cloth_second, smoothstep(-0.4, 0.4, np.sin(y * 42 + 2 * folds * 0.1)))
    if identity.clothes in ("suit", "collar"):
        shirt = 1 - smoothstep(-soft, soft, np.abs(x) - 0.62 + 0.55 * (y - 1.0))
        over(
            fabric,
            np.asarray(identity.cloth_second) * 0.4 + 0.6,
            shirt * (1.0 if identity.clothes == "suit" else 0.35),
        )
    fabric = fabric * cloth_shade[..., None]
    rim = np.exp(-0.5 * ((y - neckline) / 0.03) ** 2) * (np.abs(x) < 0.62)
    fabric *= (1 - 0.25 * rim)[..., None]
    chest = (
        np.asarray(identity.skin, dtype=np.float32)
        * ((0.85 + 0.1 * lx * x) * (1 - 0.1 * smoothstep(1.0, 1.3, np.abs(x))))[..., None]
    )
    over(rgb, chest, torso * smoothstep(1.1, 1.3, y))
    over(rgb, fabric, cloth)
    alpha = np.maximum(np.maximum(neck, cloth), torso * (1 - smoothstep(-soft, soft, np.abs(x) - 0.6)))
    # The chin's shadow on the neck.
    rgb *= (1 - 0.3 * np.exp(-0.5 * ((y - 1.02) / 0.09) ** 2) * (np.abs(x) < neck_width) * (1 - cloth))[
        ..., None
    ]
    rgb = np.clip(rgb * np.asarray(identity.light_colour, dtype=np.float32), 0, 1)
    return np.concatenate([rgb * alpha[..., None], alpha[..., None]], axis=-1).astype(np.float32)
