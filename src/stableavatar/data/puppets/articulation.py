"""What a mouth does for a sound: from speech to lips, jaw, teeth and tongue, frame by frame."""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from stableavatar.errors import InputError

Track = NDArray[np.float32]

_HOPS_PER_SECOND = 100
_WINDOW = 512
REST_WIDTH = 0.4
_USUAL_SECOND = 1430.0
_SILENCE_DB = -66.0
"""A recording whose loud frames lie below this level (dB of full scale) is silence as a whole."""


@dataclass(frozen=True)
class Articulation:
    """Tracks of float32 [frames] in 0..1, one value a video frame.

    `opening` is the gap between the lips (0 in silence), `width` the stretch of the mouth (0.4 at rest),
    `rounding` pursed lips, `jaw` the drop of the chin, `teeth` and `tongue` how much of them is seen.
    """

    opening: Track
    width: Track
    rounding: Track
    jaw: Track
    teeth: Track
    tongue: Track

    def __len__(self) -> int:
        return int(self.opening.shape[0])

    def __getitem__(self, frames: slice) -> Articulation:
        return Articulation(**{field.name: getattr(self, field.name)[frames] for field in fields(self)})

    def as_array(self) -> NDArray[np.float32]:
        """All tracks as [frames, 6], in the order of the fields."""
        return np.stack([getattr(self, field.name) for field in fields(self)], axis=-1)

    @classmethod
    def from_array(cls, tracks: NDArray[np.float32]) -> Articulation:
        """The reverse of :meth:`as_array`."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: tracks[:, i].astype(np.float32) for i, name in enumerate(names)})

    @classmethod
    def rest(cls, frames: int) -> Articulation:
        """A closed mouth at rest for `frames` frames."""
        zero = np.zeros(frames, dtype=np.float32)
        return cls(zero, np.full(frames, REST_WIDTH, dtype=np.float32), zero, zero, zero, zero)


def frames_of(samples: int, sample_rate: int, fps: float | Fraction) -> int:
    """Whole frames in `samples` samples; frame k starts at sample round(k * sample_rate / fps)."""
    return max(1, int(Fraction(samples) * Fraction(fps) / sample_rate))


def smooth(values: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """Values [n] under a Gaussian of standard deviation `sigma`, in steps; the ends are held."""
    reach = max(1, int(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    padded = np.pad(values, reach, mode="edge")
    return np.convolve(padded, kernel / kernel.sum(), mode="valid")


def _ramp(values: NDArray[np.float64], low: float | NDArray[np.float64], high: float) -> NDArray[np.float64]:
    return np.clip((values - low) / (high - low), 0.0, 1.0)


def _centroid(
    power: NDArray[np.float64], frequencies: NDArray[np.float64], low: float, high: float
) -> NDArray[np.float64]:
    chosen = (frequencies >= low) & (frequencies < high)
    band = np.sqrt(power[:, chosen])
    return (band * frequencies[chosen]).sum(axis=1) / np.maximum(band.sum(axis=1), 1e-9)


def articulate(
    samples: NDArray[np.float32], sample_rate: int = 16_000, fps: float | Fraction = 25
) -> Articulation:
    """Articulation of a recording, one value per video frame.

    Args:
        samples: mono float [n] in -1..1.
        sample_rate: samples a second, at least 8000; features reach up to 8 kHz.
        fps: frames of video a second.

    Loudness is measured against the recording's own loud frames, so that quiet recordings articulate as
    well; the vowel's first formant opens, the second stretches or rounds, hiss shows the teeth. Values are
    smoothed by about one frame.

    Raises:
        InputError: `samples` is not one-dimensional and finite, or the rate is too low.
    """
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise InputError(
            f"Speech must be one channel of finite samples; got an array of shape {samples.shape}."
        )
    if sample_rate < 8000:
        raise InputError(f"Speech at {sample_rate} samples a second is too coarse; give at least 8000.")
    frames = frames_of(len(samples), sample_rate, fps)
    window = round(_WINDOW * sample_rate / 16_000)
    hops = int(np.ceil(frames * _HOPS_PER_SECOND / float(fps))) + 8
    centres = np.round((np.arange(hops) - 2) * sample_rate / _HOPS_PER_SECOND).astype(np.int64)
    padded = np.pad(
        samples.astype(np.float64), (window, window + max(0, int(centres[-1]) + window - len(samples)))
    )
    emphasised = padded.copy()
    starts = centres + window - window // 2
    pieces = emphasised[starts[:, None] + np.arange(window)[None, :]] * np.hanning(window)
    power = np.abs(np.fft.rfft(pieces, axis=1)) ** 2 / window**2 * 8
    frequencies = np.fft.rfftfreq(window, 1 / sample_rate).astype(np.float64)

    def band(low: float, high: float) -> NDArray[np.float64]:
        return power[:, (frequencies >= low) & (frequencies < high)].sum(axis=1)

    voice = band(180, 3600)
    level = 10 * np.log10(voice + 1e-12)
    whole = 10 * np.log10(band(100, 8000) + 1e-12)
    loudest = float(np.percentile(whole, 99))
    present = level[level > loudest - 40]
    loud = float(np.percentile(present, 90)) if len(present) else loudest
    if loudest < _SILENCE_DB:
        return Articulation.rest(frames)
    floor = float(np.percentile(level, 5))
    quiet = float(np.clip(floor + 7, loud - 30, loud - 17))
    energy = _ramp(level, quiet, loud - 1.0)
    audible = _ramp(whole, float(np.clip(floor + 9, loud - 32, loud - 18)), loud - 10)

    first = _centroid(power, frequencies, 200, 1050)
    second = _centroid(power, frequencies, 620, 2900)
    hiss = band(3600, 8000) / (band(180, 8000) + 1e-12)
    hissing = _ramp(hiss, 0.25, 0.7) * audible
    vowel = _ramp(first, 340, 640)
    openness = energy**0.85 * (0.34 + 0.66 * vowel) * (1 - 0.65 * hissing)
    # Half of the recording's own timbre is taken out, so that a dull microphone does not round every vowel.
    voiced = (energy > 0.4) & (hiss < 0.3)
    timbre = float(np.median(second[voiced])) if voiced.any() else _USUAL_SECOND
    front = _ramp(second - 0.5 * (timbre - _USUAL_SECOND), 1130, 1790)
    spread = audible * np.where(front < 0.45, (front - 0.45) * (1 - 0.7 * vowel), front - 0.45)
    rounded = energy * (1 - front) ** 1.5 * (1 - 0.9 * vowel) * (1 - hissing)

    per_frame = _HOPS_PER_SECOND / float(fps)
    when = (np.arange(frames) + 0.5) * per_frame + 2

    def track(values: NDArray[np.float64], frames_sigma: float) -> Track:
        smoothed = smooth(values, max(0.5, frames_sigma * per_frame))
        return np.clip(np.interp(when, np.arange(hops), smoothed), 0, 1).astype(np.float32)

    opening = track(openness * 1.08, 0.55)
    return Articulation(
        opening=opening,
        width=track(REST_WIDTH + 0.95 * spread + 0.15 * hissing, 0.9),
        rounding=track(rounded * 1.4, 0.9),
        jaw=track(openness, 1.1),
        teeth=np.clip(track(0.9 * hissing + 0.55 * energy * front, 0.7), 0, 1),
        tongue=track(energy * front * (0.35 + 0.65 * (1 - vowel)), 0.8),
    )
