"""Where mouth, eyes and face lie in a picture: of a puppet from its identity, of a known photograph from its
crop."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stableavatar.data.landmarks import EYES, LIPS, Points
from stableavatar.data.puppets import Identity
from stableavatar.evaluation.observation import Mask


@dataclass(frozen=True)
class Regions:
    """Masks [H, W]: `surroundings`, everything but mouth and eyes; `outside`, everything but head and
    hair."""

    surroundings: Mask
    outside: Mask


def ellipse(
    height: int, width: int, centre: tuple[float, float], half: tuple[float, float], angle: float = 0.0
) -> Mask:
    """A filled ellipse; centre and half axes (x, y) in shares of width and height, turned by `angle`
    radians."""
    x = (np.arange(width) + 0.5)[None, :] / width - centre[0]
    y = (np.arange(height) + 0.5)[:, None] / height - centre[1]
    along = math.cos(angle) * x + math.sin(angle) * y
    across = math.cos(angle) * y - math.sin(angle) * x
    return np.asarray((along / half[0]) ** 2 + (across / half[1]) ** 2 <= 1)


def puppet_regions(identity: Identity, size: int) -> Regions:
    """The regions of a puppet at rest in a square picture, wide enough for its sway, jaw and smile."""

    def place(x: float, y: float, half_x: float, half_y: float, bulge: float) -> Mask:
        x += identity.turn * bulge
        cos, sin = math.cos(identity.tilt), math.sin(identity.tilt)
        centre = (
            identity.centre[0] + identity.scale * (cos * x - sin * y),
            identity.centre[1] + identity.scale * (sin * x + cos * y),
        )
        return ellipse(size, size, centre, (identity.scale * half_x, identity.scale * half_y), identity.tilt)

    eye = identity.eye_half_width + 0.09
    mouth = place(0.0, identity.mouth_y + 0.1, 0.5, 0.32, 0.9)
    left = place(-identity.eye_spacing, identity.eye_y, eye, 0.18, 0.9)
    right = place(identity.eye_spacing, identity.eye_y, eye, 0.18, 0.9)
    head = place(0.0, -0.1, identity.face_half_width + 0.3, 1.35, 0.0)
    return Regions(surroundings=~(mouth | left | right), outside=~head)


def photograph_regions(size: int) -> Regions:
    """The regions of the crop of `astronaut` that :func:`stableavatar.evaluation.cases.photograph` makes."""
    mouth = ellipse(size, size, (0.485, 0.72), (0.2, 0.13))
    left = ellipse(size, size, (0.354, 0.435), (0.1, 0.07))
    right = ellipse(size, size, (0.64, 0.435), (0.1, 0.07))
    head = ellipse(size, size, (0.5, 0.45), (0.5, 0.52))
    return Regions(surroundings=~(mouth | left | right), outside=~head)


def person_regions(points: Points, size: int) -> Regions:
    """The regions of a person's picture from its landmarks [468, 2] in pixels, wide enough for hair."""
    low, high = points.min(axis=0) / size, points.max(axis=0) / size
    centre, half = (low + high) / 2, (high - low) / 2
    left, right = (points[list(corner)].mean(axis=0) / size for corner in EYES)
    lips = points[list(LIPS)].mean(axis=0) / size

    def around(place: Points, half_x: float, half_y: float) -> Mask:
        return ellipse(
            size, size, (float(place[0]), float(place[1])), (float(half[0]) * half_x, float(half[1]) * half_y)
        )

    features = around(lips, 0.7, 0.4) | around(left, 0.4, 0.2) | around(right, 0.4, 0.2)
    return Regions(surroundings=~features, outside=~around(centre - (0, 0.2 * half[1]), 1.5, 1.6))
