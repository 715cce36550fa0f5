"""The demo's portrait and recording, brought to any length."""

import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import stableavatar
from stableavatar.media.audio import SPEECH_RATE, Speech

_DEMO = Path(stableavatar.__file__).parent / "assets" / "demo"
PORTRAIT = _DEMO / "portrait.png"


def write_speech(path: Path, seconds: int) -> None:
    """The demo's recording, repeated to so many seconds, as WAV."""
    with Speech.open(_DEMO / "speech.flac", SPEECH_RATE) as speech:
        write_wav(path, np.resize(speech.samples(0, len(speech)), seconds * SPEECH_RATE))


def write_wav(path: Path, samples: NDArray[np.float32]) -> None:
    """Samples at 16 kHz as WAV of 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SPEECH_RATE)
        file.writeframes((samples.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
