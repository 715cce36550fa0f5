"""Is it still the same person: likeness to the truth outside mouth and eyes, where nothing that is said
should show."""

from __future__ import annotations

import numpy as np

from stableavatar.evaluation.observation import (
    Bar,
    Frames,
    Mask,
    Metric,
    Observation,
    mean,
    median,
    worst_low,
)
from stableavatar.evaluation.pictures import (
    detail_bands,
    sharpness,
    shifted,
    signal_to_noise,
    structural_similarity,
)


def sharpness_ratio(made: Frames, true: Frames, where: Mask | None = None) -> float:
    """Laplacian energy of `made` against that of `true`, over the pixels of `where`: 1 as sharp, 0 flat."""
    return sharpness(made, where) / max(sharpness(true, where), 1e-9)


def detail_agreement(made: Frames, true: Frames, where: Mask | None = None) -> float:
    """How near every band of detail is to the truth's energy, the worst of them: 1 equal, 0 where one has
    nothing of it or many times as much.

    Beside :func:`sharpness_ratio`, a sum, in which a weave of neighbouring pixels makes up for what is
    smooth.
    """
    ratios = np.maximum(detail_bands(made, where), 1e-9) / np.maximum(detail_bands(true, where), 1e-9)
    return float(np.minimum(ratios, 1 / ratios).min())


def steadied_similarity(made: Frames, portrait: Frames, where: Mask, reach: int = 3) -> np.ndarray:
    """SSIM of each frame to a portrait [1, H, W, 3] after the best shift of up to `reach` pixels: a head may
    sway.

    The shift is found for each frame by the smallest squared error over `where`, coarse steps first.
    """
    best = np.empty(len(made))
    chosen = where.copy()
    chosen[:reach] = chosen[-reach:] = False
    chosen[:, :reach] = chosen[:, -reach:] = False
    offsets = [(right, down) for right in range(-reach, reach + 1) for down in range(-reach, reach + 1)]
    candidates = {offset: shifted(portrait, *offset) for offset in offsets}
    values = {offset: candidate[0][chosen].astype(np.float32) for offset, candidate in candidates.items()}
    for index, frame in enumerate(made):
        seen = frame[chosen].astype(np.float32)
        nearest = min(offsets, key=lambda offset: float(np.square(values[offset] - seen).mean()))
        best[index] = structural_similarity(frame[None], candidates[nearest], chosen)[0]
    return best


def worst_second(values: np.ndarray, fps: float) -> float:
    """The lowest mean over one second's frames; the last second may be shorter, but not below half of one."""
    length = max(1, round(fps))
    seconds = [values[start : start + length] for start in range(0, len(values), length)]
    whole = [second.mean() for second in seconds if len(second) * 2 >= length]
    return float(min(whole)) if whole else float(values.mean())


def _similarity(clip: Observation) -> float:
    return float(structural_similarity(clip.frames, clip.reference, clip.surroundings).mean())


def _sharpness(clip: Observation) -> float:
    return sharpness_ratio(clip.frames, clip.reference, clip.surroundings)


def _detail(clip: Observation) -> float:
    return detail_agreement(clip.frames, clip.reference, clip.surroundings)


def _drift_of_likeness(clip: Observation) -> float:
    second = round(clip.fps)
    first, last = (
        structural_similarity(clip.frames[part], clip.reference[part], clip.surroundings).mean()
        for part in (slice(None, second), slice(-second, None))
    )
    return float(last - first)


def _drift_over_minutes(clip: Observation) -> float:
    """Ten seconds, for the true head sways and one second alone would say where it happens to be; not from
    the start, where it is still at rest as in the portrait."""
    early, late = (
        structural_similarity(clip.frames[part], clip.reference[part], clip.surroundings).mean()
        for part in _early_and_late(clip)
    )
    return float(late - early)


def _blur_over_minutes(clip: Observation) -> float:
    early, late = (sharpness(clip.frames[part], clip.surroundings) for part in _early_and_late(clip))
    return late / max(early, 1e-9)


def _early_and_late(clip: Observation) -> tuple[slice, slice]:
    second = round(clip.fps)
    return slice(2 * second, 12 * second), slice(-10 * second, None)


def _likeness(clip: Observation) -> float:
    return worst_second(steadied_similarity(clip.frames, clip.reference[:1], clip.surroundings), clip.fps)


def _photograph_noise(clip: Observation) -> float:
    return worst_second(signal_to_noise(clip.frames, clip.reference, clip.surroundings), clip.fps)


IDENTITY = (
    Metric(
        "similarity", "SSIM outside mouth and eyes", "", _similarity, median,
        bars={"made": Bar(low=0.85)},
    ),
    # A median does not show one in seven that falls apart.
    Metric("similarity_worst", "the same, the worst clip", "", _similarity, worst_low),
    Metric(
        "sharpness", "sharpness there, against the truth's", "", _sharpness, median,
        bars={"made": Bar(low=0.7)},
    ),
    Metric("detail", "detail there, against the truth's, in its worst band", "", _detail, median),
    # No bar: in the first second the true head still rests as in the portrait, so that a still falls too.
    Metric("similarity_drift", "SSIM, last second less first", "", _drift_of_likeness, median),
)  # fmt: skip
LONG_IDENTITY = (
    Metric(
        "long_similarity", "minutes on end: SSIM, last 10 s less seconds 2 to 12", "", _drift_over_minutes,
        mean, bars={"made": Bar(low=-0.02)},
    ),
    Metric(
        "long_sharpness", "minutes on end: sharpness, last 10 s against seconds 2 to 12", "",
        _blur_over_minutes, mean,
    ),
)  # fmt: skip
PHOTOGRAPH_IDENTITY = (
    Metric(
        "photograph_likeness", "photograph: SSIM to the portrait, worst second", "", _likeness, median,
        bars={"made": Bar(low=0.6)},
    ),
    Metric(
        "photograph_noise", "photograph: PSNR to the portrait, worst second", "dB", _photograph_noise, median
    ),
    Metric("photograph_sharpness", "photograph: sharpness against the portrait's", "", _sharpness, median),
    Metric("photograph_detail", "photograph: detail, in its worst band", "", _detail, median),
)  # fmt: skip
