"""Does the autoencoder give back what it was given, at the end of a long clip as at its start (spec/6, the
gate)."""

from __future__ import annotations

import numpy as np

from stableavatar.evaluation.observation import Bar, Frames, Metric, Observation, mean
from stableavatar.evaluation.pictures import signal_to_noise


def clip_signal_to_noise(made: Frames, true: Frames) -> float:
    """PSNR of a clip in dB: the mean over its frames."""
    return float(signal_to_noise(made, true).mean())


def end_against_start(made: Frames, true: Frames, frames: int = 50) -> float:
    """PSNR of the last `frames` frames less that of the first, in dB; below 0 where the picture decays."""
    values = signal_to_noise(made, true)
    part = min(frames, len(values))
    return float(np.mean(values[-part:]) - np.mean(values[:part]))


def _noise(clip: Observation) -> float:
    return clip_signal_to_noise(clip.frames, clip.reference)


def _steady(clip: Observation) -> float:
    return end_against_start(clip.frames, clip.reference)


RECONSTRUCTION = (
    Metric(
        "autoencoder_noise", "autoencoder: PSNR", "dB", _noise, mean,
        bars={"decoded": Bar(low=30.0)},
    ),
    Metric(
        "autoencoder_steady", "autoencoder: last 50 frames less first 50", "dB", _steady, mean,
        bars={"decoded": Bar(low=-0.5)},
    ),
)  # fmt: skip
