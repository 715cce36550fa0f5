"""How a puppet carries itself: a head that goes with the speech and a little of itself, blinks, glances,
brows on stresses, and what its prompt says (docs/decisions/0012)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from stableavatar.data.puppets.articulation import REST_WIDTH, Articulation, Track, smooth
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
_FREE = 0.2
"""How much of its sway a head has of itself, against one that ignores the speech."""


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


@dataclass(frozen=True)
class _Drive:
    """What the speech does to the head, float64 [frames] each, all 0 in silence.

    `stress` rises to 1 where the mouth is wide open for longer than a frame or two; `sides` goes with the
    colour of the vowels, spread ones to one side and rounded ones to the other; `beat` swings about 0 with
    the loudness of syllables, `turnings` a quarter of a swing before it. The last three have a standard
    deviation near 1.
    """

    stress: NDArray[np.float64]
    sides: NDArray[np.float64]
    beat: NDArray[np.float64]
    turnings: NDArray[np.float64]

    @classmethod
    def of(cls, articulation: Articulation, fps: float) -> _Drive:
        opening = articulation.opening.astype(np.float64)
        colour = articulation.width.astype(np.float64) - REST_WIDTH - 0.67 * articulation.rounding
        syllables = smooth(opening, 0.12 * fps)
        return cls(
            stress=smooth(np.clip((smooth(opening, 0.07 * fps) - 0.35) / 0.35, 0, 1), 0.1 * fps),
            sides=smooth(colour, 0.24 * fps) / 0.17,
            beat=(syllables - smooth(opening, 0.36 * fps)) / 0.1,
            turnings=np.gradient(np.pad(syllables, 1, mode="edge"))[1:-1] * fps / 0.83,
        )


def make_motion(
    seed: int, articulation: Articulation, expression: str = "neutral", fps: float = 25.0
) -> Motion:
    """Motion for a clip; frame 0 is at rest, speech and expression take hold within half a second.

    Args:
        seed: of what nothing else tells: blinks, glances, how strong an expression is, a fifth of the sway.
        articulation: what the speech calls for; the rest of the sway, nods and shakes go with it.
        expression: one of :data:`EXPRESSIONS`.
        fps: frames a second.

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
    drive = _Drive.of(articulation, fps)
    liveliness = _FREE * rng.uniform(0.3, 1.0)
    stress = drive.stress * ramp
    sides = drive.sides * ramp

    shift_x = 0.004 * sides + 0.009 * liveliness * _wander(rng, frames, fps, 1.3)
    shift_y = 0.005 * stress + 0.006 * liveliness * _wander(rng, frames, fps, 1.1)
    roll = -0.01 * sides + 0.022 * liveliness * _wander(rng, frames, fps, 1.6)
    turn = 0.02 * sides + 0.045 * liveliness * _wander(rng, frames, fps, 1.5)
    nod = 0.025 * stress + 0.02 * liveliness * _wander(rng, frames, fps, 1.2)
    zoom = 1 + 0.005 * stress + 0.006 * liveliness * _wander(rng, frames, fps, 2.0)
    brow = 0.15 * _wander(rng, frames, fps, 0.9) + 0.4 * stress
    smile = 0.04 * _wander(rng, frames, fps, 1.2)
    wide = np.zeros(frames)
    gaze_x = np.clip(0.35 * _wander(rng, frames, fps, 0.7), -0.8, 0.8)
    gaze_y = np.clip(0.2 * _wander(rng, frames, fps, 0.9), -0.5, 0.5)

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
        swing = np.clip(drive.beat, -1.6, 1.6) * ramp
        nod += 0.045 * swing
        shift_y += 0.01 * swing
    elif expression == "shaking the head":
        swing = np.clip(drive.turnings, -1.6, 1.6) * ramp
        turn += 0.08 * swing
        shift_x += 0.007 * swing
    elif expression == "tilting the head":
        roll += 0.11 * ramp
        shift_x += 0.01 * ramp
    tracks = {
        "shift_x": shift_x, "shift_y": shift_y, "roll": roll, "turn": turn, "nod": nod, "zoom": zoom,
        "blink": _blinks(rng, frames, fps), "brow": np.clip(brow, -1, 1.2), "smile": np.clip(smile, -1, 1),
        "wide": wide, "gaze_x": gaze_x, "gaze_y": gaze_y,
    }  # fmt: skip
    return Motion(**{name: track.astype(np.float32) for name, track in tracks.items()})
