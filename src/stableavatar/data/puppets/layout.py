"""Puppets in the folders that the trainer reads from disk (spec 4, "Data layout")."""

from __future__ import annotations

import shutil
import wave
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from stableavatar.data.puppets.clip import FPS, PuppetClip
from stableavatar.data.puppets.render import Frame
from stableavatar.data.puppets.speech import SAMPLE_RATE
from stableavatar.errors import InputError
from stableavatar.media.audio import Sound
from stableavatar.media.video import VideoWriter


def write_clip(folder: str | Path, clip: PuppetClip) -> Path:
    """Write one clip folder: video, sound, pictures, both masks, prompt and the portrait at rest.

    The folder appears under its name only when complete. Returns it.

    Raises:
        InputError: the folder exists, or the pictures' side is odd (H.264 needs an even one).
    """
    target = Path(folder)
    if target.exists():
        raise InputError(f"{target} exists already; name a new folder for the clip")
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    _write_pictures(partial / "images", clip.frames)
    _write_pictures(partial / "face_masks", clip.face_masks)
    _write_pictures(partial / "lip_masks", clip.lip_masks)
    Image.fromarray(clip.portrait).save(partial / "portrait.png")
    (partial / "prompt.txt").write_text(clip.prompt + "\n", encoding="utf-8")
    with wave.open(str(partial / "audio.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(SAMPLE_RATE)
        sound.writeframes((np.clip(clip.samples, -1, 1) * 32767).astype("<i2").tobytes())
    height, width = clip.frames.shape[1:3]
    track = Sound.from_array(clip.samples, SAMPLE_RATE)
    with VideoWriter(partial / "sub_clip.mp4", width, height, FPS, sound=track) as video:
        for frame in clip.frames:
            video.write(frame)
    return partial.rename(target)


def _write_pictures(folder: Path, pictures: Frame) -> None:
    folder.mkdir()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"frame_{index}.png", compress_level=1)


def write_dataset(root: str | Path, clips: Iterable[PuppetClip]) -> Path:
    """Write clips as `root`/square/speech/00001 and on, and their list `root`/video_square_path.txt.

    Clips already there are kept, so that an interrupted run can be continued with the same clips. Returns the
    list's path; a line is a clip's absolute folder.
    """
    top = Path(root).absolute()
    folders = []
    for number, clip in enumerate(clips, 1):
        folder = top / "square" / "speech" / f"{number:05d}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        folders.append(folder if folder.exists() else write_clip(folder, clip))
    listing = top / "video_square_path.txt"
    partial = listing.with_name(f".{listing.name}.partial")
    partial.write_text("".join(f"{folder}\n" for folder in folders), encoding="utf-8")
    partial.replace(listing)
    return listing
