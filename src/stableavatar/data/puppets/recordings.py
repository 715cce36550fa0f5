"""The fixed recordings that evaluation listens to; they ship with the package and are never trained on."""

from __future__ import annotations

import functools
from pathlib import Path

import av
import numpy as np

from stableavatar.data.puppets.speech import SAMPLE_RATE, Samples
from stableavatar.errors import InputError

EVALUATION_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "evaluation"
EVALUATION_RECORDINGS = 20


@functools.lru_cache(maxsize=EVALUATION_RECORDINGS)
def evaluation_recording(index: int) -> Samples:
    """Recording `index` (0 to 19): float32 mono at 16 kHz, 10 s.

    Raises:
        InputError: no such recording, or the package's file is missing.
    """
    if not 0 <= index < EVALUATION_RECORDINGS:
        raise InputError(f"There are {EVALUATION_RECORDINGS} evaluation recordings, 0 to 19; got {index}.")
    path = EVALUATION_FOLDER / f"{index:02d}.opus"
    if not path.is_file():
        raise InputError(f"The evaluation recording {path} is missing; reinstall the package.")
    pieces = []
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
        for frame in container.decode(audio=0):
            pieces += [part.to_ndarray()[0] for part in resampler.resample(frame)]
        pieces += [part.to_ndarray()[0] for part in resampler.resample(None)]
    samples = np.concatenate(pieces).astype(np.float32)
    length = 10 * SAMPLE_RATE
    samples = np.pad(samples[:length], (0, max(0, length - len(samples))))
    samples.setflags(write=False)
    return samples


def evaluation_speech(index: int, seconds: float) -> Samples:
    """Speech for evaluation clip `index`: recording `index` mod 20, then the ones that follow it."""
    length = round(seconds * SAMPLE_RATE)
    parts: list[Samples] = []
    total = 0
    while total < length:
        part = evaluation_recording((index + len(parts)) % EVALUATION_RECORDINGS)
        parts.append(part)
        total += len(part)
    return np.concatenate(parts)[:length]
