"""Small real files, made with PyAV and the standard library, for the tests of media."""

import wave
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def click(seconds: float, rate: int, at: float, channels: int = 1, level: float = 0.9) -> Floats:
    """Faint noise [n, channels] with one loud sample at `at` seconds."""
    count = round(seconds * rate)
    noise = np.random.default_rng(0).normal(scale=0.005, size=(count, channels)).astype(np.float32)
    noise[round(at * rate)] = level
    return noise


def tone(seconds: float, rate: int, hertz: float = 440.0, level: float = 0.5) -> Floats:
    """A sine [n]."""
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_wav(path: Path, samples: Floats, rate: int) -> Path:
    """16-bit WAV of samples [n] or [n, channels]."""
    samples = samples[:, None] if samples.ndim == 1 else samples
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes())
    return path


def write_sound(
    path: Path,
    samples: Floats,
    rate: int,
    codec: str,
    layout: str | None = None,
    pieces: Sequence[tuple[int, int, float]] | None = None,
) -> Path:
    """Sound in any container and codec; `pieces` are (start, stop, seconds at which the piece is put)."""
    samples = samples[:, None] if samples.ndim == 1 else samples
    layout = layout or {1: "mono", 2: "stereo"}[samples.shape[1]]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.codec_context.layout = layout
        stream.bit_rate = 128_000
        for start, stop, at in pieces or [(0, len(samples), 0.0)]:
            for begin in range(start, stop, 4096):
                block = samples[begin : min(begin + 4096, stop)]
                packed = np.ascontiguousarray(block).reshape(1, -1)
                frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
                frame.sample_rate = rate
                frame.pts = begin - start + round(at * rate)
                frame.time_base = Fraction(1, rate)
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_video(
    path: Path,
    frames: Sequence[NDArray[np.uint8]],
    samples: Floats | None = None,
    rate: int = 48000,
    *,
    sound_at: float = 0.0,
    rotation: int = 0,
    sound_codec: str = "aac",
    aspect: Fraction | None = None,
) -> Path:
    """A video of 25 frames a second, with sound [n] that starts at `sound_at` seconds."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt = "yuv420p"
        if aspect is not None:
            video.codec_context.sample_aspect_ratio = aspect
        if rotation:
            if not hasattr(video, "set_display_rotation"):
                pytest.skip("this PyAV cannot write a rotation")
            video.set_display_rotation(rotation)
        if samples is not None:
            audio = container.add_stream(sound_codec, rate=rate)
            audio.codec_context.layout = "mono"
            frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, round(sound_at * rate), Fraction(1, rate)
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
        for picture in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
    return path
