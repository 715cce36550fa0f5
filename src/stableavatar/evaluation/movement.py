"""Heads that the prompt moves: a nod that comes a little early is a nod too, so each frame is held against
the true clip's nearest."""

from __future__ import annotations

import numpy as np

from stableavatar.evaluation.observation import Frames, Mask, Metric, Observation, worst_low
from stableavatar.evaluation.pictures import structural_similarity

_SHOWN = 15
"""Frames of a clip that are held against all of the true one's."""


def nearest_similarity(made: Frames, true: Frames, where: Mask) -> float:
    """SSIM of each of some frames, spread over `made`, to the true frame that is most like it; their mean.

    A still picture comes near 1, for a true head passes through where it rests: read it beside
    :func:`movement`.
    """
    chosen = made[np.linspace(0, len(made) - 1, min(_SHOWN, len(made))).round().astype(int)]
    best = [structural_similarity(np.broadcast_to(frame, true.shape), true, where).max() for frame in chosen]
    return float(np.mean(best))


def movement(frames: Frames, where: Mask) -> float:
    """How much pixels of `where` change: the root of their mean variance over time, in levels of 255."""
    return float(np.sqrt(frames[:, where].astype(np.float32).var(axis=0).mean()))


def _nearest(clip: Observation) -> float:
    return nearest_similarity(clip.frames, clip.reference, clip.surroundings)


def _movement(clip: Observation) -> float:
    return movement(clip.frames, clip.surroundings) / max(movement(clip.reference, clip.surroundings), 1e-9)


MOVEMENT = (
    Metric(
        "moving_similarity", "moving heads: SSIM to the nearest true frame, the worst clip", "", _nearest,
        worst_low,
    ),
    Metric(
        "moving_movement", "moving heads: movement against the truth's, the stillest clip", "", _movement,
        worst_low,
    ),
)  # fmt: skip
