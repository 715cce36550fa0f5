"""Clips of puppets blurred or standing still, and a photograph that is made to talk."""

import numpy as np

from stableavatar.data.puppets import PuppetClip
from stableavatar.data.puppets.painting import blur
from stableavatar.evaluation.cases import photograph
from stableavatar.evaluation.observation import Frames


def blurred(frames: Frames, sigma: float = 2.0) -> Frames:
    made = [255 * blur(frame.astype(np.float32) / 255, sigma) for frame in frames]
    return np.stack(made).round().astype(np.uint8)


def still(clip: PuppetClip) -> Frames:
    return np.broadcast_to(clip.portrait, clip.frames.shape)


def talking_photograph(opening: np.ndarray) -> Frames:
    """The photograph with its lower lip and chin pulled down and a dark gap drawn between the lips."""
    portrait = photograph()[0]
    y, x = np.mgrid[:128, :128]
    frames = []
    for value in opening:
        gap = 14 * float(value)
        inside = ((x - 62) / 17) ** 2 + ((y - 91 - gap / 2) / max(gap / 2, 0.01)) ** 2 <= 1
        near = np.abs(x - 62) < 30
        source = np.where(near & (y > 91), np.maximum(y - gap * np.clip((116 - y) / (25 - gap), 0, 1), 91), y)
        frame = portrait[source.round().astype(int).clip(0, 127), x]
        frame = np.where(inside[..., None], (40, 12, 14), frame)
        frames.append(frame.astype(np.uint8))
    return np.stack(frames)
