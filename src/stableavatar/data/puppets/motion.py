"""How a puppet carries itself: sway, blinks, glances, brows on stresses, and what its prompt says."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from stableavatar.data.puppets.articulation import Articulation, Track
from stableavatar.errors import InputError

EXPRESSIONS = (
    "neutral",
    "smiling",
    "serious",
    "surprised",
    "nodding",
    "shaking the head",
    "tilting the head",
)
"""What a prompt can ask for; each is visible in the picture."""
_SHARES = (0.28, 0.2, 0.2, 0.1, 0.1, 0.06, 0.06)
_RAMP_SECONDS = 0.5


@dataclass(frozen=True)
class Motion:
    """Tracks of float32 [frames].

    `shift_x`, `shift_y` in shares of the picture's side; `roll` in radians; `turn` and `nod` as displacement
    of the face's nearest point in head units; `zoom` a factor near 1; `blink` 0 open to 1 shut; `brow` and
    `smile` -1 to 1; `wide` extra opening of the eyes 0 to 1; `gaze_x`, `gaze_y` -1 to 1.
    """

    shift_x: Track
    shift_y: Track
    roll: Track
    turn: Track
    nod: Track
    zoom: Track
    blink: Track
    brow: Track
    smile: Track
    wide: Track
    gaze_x: Track
    gaze_y: Track

    def __len__(self) -> int:
        return int(self.blink.shape[0])

    def __getitem__(self, frames: slice) -> Motion:
        return Motion(**{field.name: getattr(self, field.name)[frames] for field in fields(self)})

    @classmethod
    def rest(cls, frames: int) -> Motion:
        """No motion, eyes open, a neutral face."""
        zero = np.zeros(frames, dtype=np.float32)
        tracks = {field.name: zero for field in fields(cls)}
        return replace(cls(**tracks), zoom=np.ones(frames, dtype=np.float32))


def draw_expression(seed: int) -> str:
    """The expression that belongs to a clip's seed."""
    rng = np.random.default_rng([seed, 505])
    return str(rng.choice(EXPRESSIONS, p=_SHARES))


def _wander(rng: np.random.Generator, frames: int, fps: float, seconds: float) -> NDArray[np.float64]:
    """Smooth random track, starting at 0, of standard deviation near 1 with waves of about `seconds`."""
    knots = int(np.ceil(frames / (seconds * fps))) + 4
    values = rng.standard_normal(knots) * 1.3
    position = np.arange(frames) / (seconds * fps) + 1
    index = np.floor(position).astype(np.int64)
    t = position - index
    # Uniform cubic B-spline: smooth twice, never jerky.
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    padded = np.concatenate([values, values[-4:]])
    track = sum(w * padded[index - 1 + k] for k, w in enumerate(weights)) / 6
    return np.asarray(track - track[0])


def _blinks(rng: np.random.Generator, frames: int, fps: float) -> NDArray[np.float64]:
    track = np.zeros(frames)
    shape = np.array([0.45, 1.0, 0.9, 0.5, 0.15])
    rate = rng.uniform(1.8, 5.0)
    moment = rng.uniform(0.5, rate)
    while moment * fps < frames:
        start = int(moment * fps)
        part = shape[: max(0, frames - start)]
        track[start : start + len(part)] = np.maximum(track[start : start + len(part)], part)
        moment += max(0.6, rng.exponential(rate - 0.8) + 0.8)
    return track


def _stresses(articulation: Articulation) -> NDArray[np.float64]:
    """Slow pulses where syllables are louder than their neighbourhood, 0..1."""
    opening = articulation.opening.astype(np.float64)
    kernel = np.hanning(9)
    local = np.convolve(np.pad(opening, 4, mode="edge"), kernel / kernel.sum(), mode="valid")
    pulses = np.clip(local - 0.35, 0, None) / 0.35
    return np.clip(pulses, 0, 1)


def make_motion(
    seed: int, articulation: Articulation, expression: str = "neutral", fps: float = 25.0
) -> Motion:
    """Motion for a clip, deterministic in `seed`; frame 0 is at rest, the expression rises in half a second.

    Raises:
        InputError: `expression` is not one of :data:`EXPRESSIONS`.
    """
    if expression not in EXPRESSIONS:
        raise InputError(f"Unknown expression {expression!r}; choose one of: {', '.join(EXPRESSIONS)}.")
    rng = np.random.default_rng([seed, 606])
    frames = len(articulation)
    seconds = np.arange(frames) / fps
    ramp = np.clip(seconds / _RAMP_SECONDS, 0, 1)
    ramp = ramp * ramp * (3 - 2 * ramp)
    liveliness = rng.uniform(0.3, 1.0)
    stress = _stresses(articulation) * ramp

    shift_x = 0.009 * liveliness * _wander(rng, frames, fps, 1.3)
    shift_y = 0.006 * liveliness * _wander(rng, frames, fps, 1.1)
    roll = 0.022 * liveliness * _wander(rng, frames, fps, 1.6)
    turn = 0.045 * liveliness * _wander(rng, frames, fps, 1.5)
    nod = 0.02 * liveliness * _wander(rng, frames, fps, 1.2) + 0.02 * liveliness * stress
    zoom = 1 + 0.006 * liveliness * _wander(rng, frames, fps, 2.0)
    brow = 0.15 * _wander(rng, frames, fps, 0.9) + 0.4 * rng.uniform(0, 1) * stress
    smile = 0.04 * _wander(rng, frames, fps, 1.2)
    wide = np.zeros(frames)
    gaze_x = np.clip(0.35 * _wander(rng, frames, fps, 0.7), -0.8, 0.8)
    gaze_y = np.clip(0.2 * _wander(rng, frames, fps, 0.9), -0.5, 0.5)

    phase = 2 * np.pi * rng.uniform(0.85, 1.25) * seconds
    strength = rng.uniform(0.8, 1.15)
    if expression == "smiling":
        smile += 0.85 * strength * ramp
        brow += 0.12 * ramp
    elif expression == "serious":
        smile -= 0.6 * strength * ramp
        brow -= 0.75 * ramp
    elif expression == "surprised":
        brow += 1.0 * strength * ramp
        wide += 0.9 * ramp
    elif expression == "nodding":
        nod += 0.075 * strength * np.sin(phase) * ramp
        shift_y += 0.014 * strength * np.sin(phase) * ramp
    elif expression == "shaking the head":
        turn += 0.15 * strength * np.sin(phase) * ramp
        shift_x += 0.01 * strength * np.sin(phase) * ramp
    elif expression == "tilting the head":
        side = 1.0 if rng.uniform() < 0.5 else -1.0
        roll += side * 0.15 * strength * ramp
        shift_x += side * 0.015 * ramp
    tracks = {
        "shift_x": shift_x, "shift_y": shift_y, "roll": roll, "turn": turn, "nod": nod, "zoom": zoom,
        "blink": _blinks(rng, frames, fps), "brow": np.clip(brow, -1, 1.2), "smile": np.clip(smile, -1, 1),
        "wide": wide, "gaze_x": gaze_x, "gaze_y": gaze_y,
    }  # fmt: skip
    return Motion(**{name: track.astype(np.float32) for name, track in tracks.items()})
