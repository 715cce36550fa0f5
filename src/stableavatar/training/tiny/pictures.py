"""Free pictures, textures and noise as short moving clips: what keeps the small autoencoder a general one.

Pictures come from packages (scikit-image, scikit-learn), from the desktop backgrounds of a Debian system
when there are any, and from folders that the user names. Around a third of the clips are drawn by the
program: gradients, noise, stripes, shapes. A clip is a crop that pans, zooms and turns over a picture
(spec/6-embedded-model.md, the data).
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from stableavatar.errors import InputError

logger = logging.getLogger(__name__)

# Free pictures in scikit-image's wheel; its `astronaut` is left out on purpose: it is the photograph that
# tests look at.
SCIKIT_IMAGE_PICTURES = (
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "color.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)
SCIKIT_LEARN_PICTURES = ("china.jpg", "flower.jpg")
SYSTEM_FOLDERS = (Path("/usr/share/backgrounds"), Path("/usr/share/wallpapers"))
HELD_OUT = "astronaut"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"}


def find_pictures(folders: Sequence[Path] = ()) -> list[Path]:
    """Free pictures of the installed packages, of the desktop, and of `folders` (searched deeply).

    Raises InputError for a folder of `folders` that does not exist. `astronaut` is never among them.
    """
    found: list[Path] = []
    for package, folder, names in (
        ("skimage", "data", SCIKIT_IMAGE_PICTURES),
        ("sklearn", "datasets/images", SCIKIT_LEARN_PICTURES),
    ):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            base = Path(spec.origin).parent / folder
            found += [base / name for name in names if (base / name).is_file()]
    for folder_path in folders:
        if not folder_path.is_dir():
            raise InputError(f"no folder of pictures at {folder_path}")
    for folder_path in (*SYSTEM_FOLDERS, *folders):
        if folder_path.is_dir():
            found += sorted(path for path in folder_path.rglob("*") if path.suffix.lower() in SUFFIXES)
    unique = {path.resolve(): path for path in found if path.is_file() and HELD_OUT not in path.name}
    return list(unique.values())


def load_pictures(paths: Sequence[Path], longest_side: int = 896) -> list[torch.Tensor]:
    """Reads `paths`, each reduced to at most `longest_side` pixels, as uint8 [3, H, W].

    Copies of one picture are kept once.
    """
    pictures: list[torch.Tensor] = []
    seen: set[bytes] = set()
    for path in paths:
        with Image.open(path) as opened:
            opened.draft("RGB", (longest_side, longest_side))
            image = opened.convert("RGB")
        image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
        # One picture often comes in several sizes: a small grey copy tells.
        mark = bytes(np.asarray(image.convert("L").resize((6, 6), Image.Resampling.BOX)) // 16)
        if mark in seen or min(image.size) < 96:
            continue
        seen.add(mark)
        pictures.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())
    logger.info("%d free pictures from %d files", len(pictures), len(paths))
    return pictures


def _smooth_noise(rng: np.random.Generator, size: int, channels: int) -> NDArray[np.float32]:
    """Noise of several octaves, float32 [size, size, channels], about 0 to 1."""
    total = np.zeros((size, size, channels), np.float32)
    roughness = rng.uniform(0.4, 0.95)
    weight, weights, cells = 1.0, 0.0, int(rng.integers(2, 6))
    while cells <= size:
        grid = torch.from_numpy(rng.random((1, channels, cells, cells), dtype=np.float32))
        layer = F.interpolate(
            grid, size=(size, size), mode="bicubic" if cells < 32 else "bilinear", align_corners=True
        )
        total += weight * layer[0].permute(1, 2, 0).numpy()
        weights += weight
        weight *= roughness
        cells *= 2
    return total / weights


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = rng.integers(0, 256, 3)
    return int(red), int(green), int(blue)


def procedural_picture(rng: np.random.Generator, size: int = 256) -> torch.Tensor:
    """A drawn picture, uint8 [3, size, size].

    A gradient or noise, perhaps stripes, perhaps shapes, lines and lettering.
    """
    ys, xs = np.meshgrid(
        np.linspace(-1, 1, size, dtype=np.float32), np.linspace(-1, 1, size, dtype=np.float32), indexing="ij"
    )
    first, second = (rng.random(3, dtype=np.float32) for _ in range(2))
    kind = rng.random()
    if kind < 0.4:
        angle = rng.uniform(0, 2 * math.pi)
        along = 0.5 + 0.5 * (math.cos(angle) * xs + math.sin(angle) * ys)
        canvas = first + (second - first) * np.clip(along, 0, 1)[..., None]
    elif kind < 0.55:
        centre = rng.uniform(-0.7, 0.7, 2)
        distance = np.hypot(xs - centre[0], ys - centre[1]) / rng.uniform(0.5, 2)
        canvas = first + (second - first) * np.clip(distance, 0, 1)[..., None]
    else:
        noise = _smooth_noise(rng, size, 3 if rng.random() < 0.5 else 1)
        canvas = first + (second - first) * np.clip((noise - 0.5) * rng.uniform(1, 4) + 0.5, 0, 1)
    if rng.random() < 0.2:
        angle, waves = rng.uniform(0, math.pi), rng.uniform(2, 30)
        stripes = np.sin((math.cos(angle) * xs + math.sin(angle) * ys) * waves * math.pi + rng.uniform(0, 6))
        if rng.random() < 0.5:
            stripes = np.clip(stripes * 8, -1, 1)
        canvas = canvas + stripes[..., None] * (rng.random(3, dtype=np.float32) - 0.5) * rng.uniform(0.2, 1)
    image = Image.fromarray((np.clip(canvas, 0, 1) * 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.6:
        for _ in range(int(rng.integers(1, 12))):
            x, y = (int(value) for value in rng.integers(-20, size, 2))
            width, height = (int(value) for value in rng.integers(4, size // 2, 2))
            shape = rng.random()
            if shape < 0.4:
                draw.ellipse((x, y, x + width, y + height), fill=_colour(rng))
            elif shape < 0.6:
                draw.rectangle((x, y, x + width, y + height), fill=_colour(rng))
            elif shape < 0.8:
                corners = rng.integers(0, size, (int(rng.integers(3, 6)), 2))
                draw.polygon([(int(a), int(b)) for a, b in corners], fill=_colour(rng))
            else:
                draw.arc(
                    (x, y, x + width, y + height),
                    0,
                    int(rng.integers(40, 360)),
                    _colour(rng),
                    int(rng.integers(1, 8)),
                )
    if rng.random() < 0.15:
        letters = "".join(chr(int(code)) for code in rng.integers(33, 126, 14))
        for line in range(0, size, 20):
            draw.text((int(rng.integers(0, 30)), line), letters, fill=_colour(rng))
    picture = np.asarray(image)
    if rng.random() < 0.15:
        grain = rng.normal(0, rng.uniform(2, 10), (size, size, 1)).astype(np.float32)
        picture = np.clip(picture + grain, 0, 255).astype(np.uint8)
    return torch.from_numpy(picture.copy()).permute(2, 0, 1).contiguous()


class PictureClips:
    """Endless short clips that pan, zoom and turn over free pictures.

    `procedural` is the share of drawn ones.
    """

    def __init__(self, pictures: Sequence[torch.Tensor], procedural: float = 0.35) -> None:
        self.procedural = procedural if pictures else 1.0
        self.pyramids = [self._pyramid(picture) for picture in pictures]

    @staticmethod
    def _pyramid(picture: torch.Tensor) -> list[torch.Tensor]:
        levels = [picture]
        while min(levels[-1].shape[1:]) >= 128:
            half = F.avg_pool2d(levels[-1].float()[None], 2)[0]
            levels.append(half.round().to(torch.uint8))
        return levels

    def sample(self, rng: np.random.Generator, frames: int, size: int) -> torch.Tensor:
        """One clip, float32 [3, frames, size, size] in [-1, 1]."""
        if rng.random() < self.procedural:
            pyramid = self._pyramid(procedural_picture(rng))
        else:
            pyramid = self.pyramids[int(rng.integers(len(self.pyramids)))]
        shortest = min(pyramid[0].shape[1:])
        # Source pixels a crop's pixel spans, in the full picture; the level is chosen so that nothing
        # aliases.
        span = math.exp(rng.uniform(math.log(0.7), math.log(max(0.8, shortest / size))))
        level = min(max(0, math.floor(math.log2(max(span, 1.0)) + 0.3)), len(pyramid) - 1)
        source = pyramid[level].float()[None] / 127.5 - 1
        scale = span / 2**level
        height, width = source.shape[2:]

        time = torch.arange(frames, dtype=torch.float32)
        moving = rng.random() < 0.75
        speed = rng.normal(0, 1.2, 2) * scale if moving else np.zeros(2)
        sway = rng.uniform(0, 3) * scale if moving else 0.0
        phase, period = rng.uniform(0, 2 * math.pi), rng.uniform(10, 60)
        angle0, spin = rng.normal(0, 0.15), rng.normal(0, 0.01) if moving else 0.0
        zoom = torch.exp(time * (rng.normal(0, 0.006) if moving else 0.0)) * scale
        angle = angle0 + spin * time
        wave = sway * torch.sin(2 * math.pi * time / period + phase)
        travel_x, travel_y = speed[0] * time + wave, speed[1] * time + 0.5 * wave
        margin = 0.5 * size * scale
        centre_x = rng.uniform(margin, max(margin, width - margin)) + travel_x - travel_x.mean()
        centre_y = rng.uniform(margin, max(margin, height - margin)) + travel_y - travel_y.mean()
        theta = torch.zeros(frames, 2, 3)
        theta[:, 0, 0] = torch.cos(angle) * zoom * size / width
        theta[:, 0, 1] = -torch.sin(angle) * zoom * size / width
        theta[:, 1, 0] = torch.sin(angle) * zoom * size / height
        theta[:, 1, 1] = torch.cos(angle) * zoom * size / height
        theta[:, 0, 2] = centre_x * 2 / width - 1
        theta[:, 1, 2] = centre_y * 2 / height - 1
        if rng.random() < 0.5:
            theta[:, :, 0] *= -1
        grid = F.affine_grid(theta, [frames, 3, size, size], align_corners=False)
        clip = F.grid_sample(
            source.expand(frames, -1, -1, -1),
            grid,
            mode="bilinear",
            padding_mode="reflection",
            align_corners=False,
        )
        if rng.random() < 0.5:
            contrast = torch.from_numpy(rng.uniform(0.6, 1.3, (1, 3, 1, 1)).astype(np.float32))
            clip = clip * contrast + float(rng.uniform(-0.25, 0.25))
        if rng.random() < 0.2:
            clip = clip[:, torch.from_numpy(rng.permutation(3))]
        return clip.clamp(-1, 1).permute(1, 0, 2, 3).contiguous()
