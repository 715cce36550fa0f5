"""Clip folders in the training layout, small enough to be made in a test."""

import os
import signal
import wave
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from stableavatar.data.stretches import PrepareSettings, Stretch

SIDE = 32


def write_clip(
    folder: Path,
    *,
    frames: int = 20,
    fps: int | Fraction = 25,
    size: tuple[int, int] = (SIDE, SIDE),
    images: bool = True,
    masks: bool = True,
    prompt: str | None = None,
) -> Path:
    """A clip whose frame k is grey of level 10·k, and whose masks hold the upper and the left half."""
    folder.mkdir(parents=True)
    width, height = size
    pictures = [np.full((height, width, 3), 10 * k, np.uint8) for k in range(frames)]
    with av.open(str(folder / "sub_clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    with wave.open(str(folder / "audio.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        values = np.arange(round(frames * 16_000 / Fraction(fps))).astype(np.int16)
        file.writeframes(values.tobytes())
    face = np.zeros((height, width), np.uint8)
    face[: height // 2] = 255
    lips = np.zeros((height, width), np.uint8)
    lips[:, : width // 2] = 255
    kept = {"images": pictures if images else None}
    kept |= {"face_masks": [face] * frames, "lip_masks": [lips] * frames} if masks else {}
    for name, series in kept.items():
        if series is not None:
            (folder / name).mkdir()
            for k, picture in enumerate(series):
                Image.fromarray(picture).save(folder / name / f"frame_{k}.png")
    if prompt is not None:
        (folder / "prompt.txt").write_text(prompt)
    Image.fromarray(np.full((height, width, 3), 250, np.uint8)).save(folder / "portrait.png")
    return folder


def looked_at_or_killed(video: Path, work: Path, settings: PrepareSettings) -> list[dict[str, Any]]:
    """In place of `prepare_video`: a video called deadly, or deadly1, brings its worker down, as for want of memory."""
    del work, settings
    if video.stem.startswith("deadly"):
        os.kill(os.getpid(), signal.SIGKILL)
    return [asdict(Stretch(0, 9, "looked at"))]
