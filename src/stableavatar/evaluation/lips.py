"""Do the lips follow the speech: correlation, lag and amplitude of the mouth's opening (spec/6, "What it must
show")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stableavatar.evaluation.observation import Bar, Metric, Observation, Track, mean, median

_STILL = 1e-4
"""A track whose standard deviation lies below this does not move: rounding, not lips."""


@dataclass(frozen=True)
class LipScore:
    """`correlation` at the best lag, -1 to 1; `lag` in frames, positive where the mouth comes after the
    sound;
    `amplitude`, the measured track's standard deviation against that of the track it should follow."""

    correlation: float
    lag: int
    amplitude: float


def correlate(first: Track, second: Track) -> float:
    """Pearson's r of two tracks [n]; 0 where one of them does not move."""
    a = first.astype(np.float64) - first.mean(dtype=np.float64)
    b = second.astype(np.float64) - second.mean(dtype=np.float64)
    if a.std() < _STILL or b.std() < _STILL:
        return 0.0
    return float((a * b).mean() / (a.std() * b.std()))


def correlate_at(measured: Track, called: Track, lag: int) -> float:
    """Pearson's r of `measured` [n], `lag` frames later, with `called` [n], where both have values."""
    if lag > 0:
        measured, called = measured[lag:], called[:-lag]
    elif lag < 0:
        measured, called = measured[:lag], called[-lag:]
    return correlate(measured, called)


def lip_score(measured: Track, called: Track, reach: int = 2) -> LipScore:
    """Holds a measured opening [n] against the opening that the speech calls for [n], at lags of
    -reach..reach frames.

    The best of several lags is above 0 by chance (about 0.1 for 250 frames), so a wrong track must be shown
    beside it.

    Raises:
        ValueError: the tracks differ in length, or are too short for the lags.
    """
    if measured.shape != called.shape or measured.ndim != 1:
        raise ValueError(f"measured {measured.shape} and called {called.shape} must be tracks of one length")
    if len(measured) < 2 * reach + 3:
        raise ValueError(f"{len(measured)} frames are too few for lags of {reach}")
    # Ties (a mouth that does not move) go to lag 0.
    lags = sorted(range(-reach, reach + 1), key=abs)
    scores = [correlate_at(measured, called, lag) for lag in lags]
    best = int(np.argmax(scores))
    spread = float(called.std())
    return LipScore(
        correlation=scores[best],
        lag=lags[best],
        amplitude=float(measured.std()) / spread if spread > _STILL else float("nan"),
    )


def tail_difference(measured: Track, called: Track, tail: int) -> float:
    """Correlation of the last `tail` frames less that of the whole, both at the whole clip's best lag."""
    whole = lip_score(measured, called)
    return correlate_at(measured[-tail:], called[-tail:], whole.lag) - whole.correlation


def openness(measured: Track) -> float:
    """How far the mouth opens where it should stay shut: the opening that one frame in twenty exceeds."""
    return float(np.percentile(measured, 95))


def _correlation(clip: Observation) -> float:
    return lip_score(clip.mouth.opening, clip.called).correlation


def _lag(clip: Observation) -> float:
    return float(lip_score(clip.mouth.opening, clip.called).lag)


def _amplitude(clip: Observation) -> float:
    return lip_score(clip.mouth.opening, clip.called).amplitude


def _tail(clip: Observation) -> float:
    return tail_difference(clip.mouth.opening, clip.called, round(3 * clip.fps))


def _last_minute(clip: Observation) -> float:
    return tail_difference(clip.mouth.opening, clip.called, round(60 * clip.fps))


def _openness(clip: Observation) -> float:
    return openness(clip.mouth.opening)


LIPS = (
    Metric(
        "lip_correlation", "lip correlation", "r", _correlation, median,
        bars={"made": Bar(low=0.75), "wrong": Bar(high=0.25), "decoded": Bar(low=0.9)},
    ),
    Metric("lip_lag", "best lag", "frames", _lag, median, bars={"made": Bar(-1, 1)}),
    Metric(
        "lip_amplitude", "amplitude against the speech's", "", _amplitude, median,
        bars={"made": Bar(0.7, 1.2)},
    ),
    Metric(
        "lip_tail", "lip correlation, last 3 s less the whole", "r", _tail, mean,
        bars={"made": Bar(low=-0.05)},
    ),
)  # fmt: skip
LONG_LIPS = (
    Metric(
        "long_lips", "minutes on end: lip correlation", "r", _correlation, median,
        bars={"made": Bar(low=0.75)},
    ),
    Metric(
        "long_lips_end", "minutes on end: lip correlation, last minute less the whole", "r", _last_minute,
        mean, bars={"made": Bar(low=-0.05)},
    ),
)  # fmt: skip
SILENCE = (
    Metric(
        "silence_opening", "silence: opening that 5 % of frames exceed", "", _openness, median,
        bars={"made": Bar(high=0.15)},
    ),
)  # fmt: skip
PHOTOGRAPH_LIPS = (
    Metric(
        "photograph_lips", "photograph: lip correlation", "r", _correlation, median,
        bars={"made": Bar(low=0.3), "wrong": Bar(high=0.15)},
    ),
)  # fmt: skip
