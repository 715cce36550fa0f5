"""Single steps from a video to a clip folder: its sound, its frames, masks of face and lips."""

import contextlib
import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from stableavatar.data.clips import MaskKind, clip_frames, clip_length
from stableavatar.data.landmarks import FaceLandmarker, Points, face_mask, lip_mask
from stableavatar.errors import InputError
from stableavatar.media.audio import SPEECH_RATE, speech_mix
from stableavatar.media.decoding import picture_delay, stream_sound
from stableavatar.media.files import cannot_write, check_parent, refuse_source, replacing
from stableavatar.media.reading import Frame, read_frames
from stableavatar.media.wav import write_wav

logger = logging.getLogger(__name__)

# Seconds by which the parts of a folder that was copied may differ in age.
_COPYING = 3600


def extract_audio(video: Path, output: Path, *, most_seconds: float = math.inf) -> float:
    """Write the sound of a video (or any recording) as mono WAV at 16 kHz, from the first picture on; the
    seconds written.

    Raises:
        InputError: it cannot be read, has no sound or more than `most_seconds` of it, or the output cannot be
            written.
    """
    refuse_source(output, video)
    start = picture_delay(video)
    blocks = stream_sound(video, SPEECH_RATE, speech_mix(video, start), start)
    return write_wav(output, blocks, SPEECH_RATE, 1, most_seconds=most_seconds)


def extract_frames(video: Path, folder: Path) -> int:
    """Write the frames of a video as `frame_0.png`, `frame_1.png` and on; how many.

    The folder gets its name when all are there.

    Raises:
        InputError: the video cannot be read, or the folder is not empty or cannot be written.
    """
    target = folder.expanduser().absolute()
    check_parent(target, folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"output {folder}: is not empty. Name a new or an empty folder.")
    count = 0
    try:
        with replacing(target, alone=True, durable=False) as partial:
            partial.mkdir()
            for frame in read_frames(video):
                Image.fromarray(frame).save(partial / f"frame_{count}.png", compress_level=3)
                count += 1
            if target.is_dir():
                target.rmdir()  # not what somebody has put there meanwhile
    except OSError as error:
        raise cannot_write(target, error) from error
    return count


def extract_masks(
    landmarker: FaceLandmarker, clip: Path, kinds: Sequence[MaskKind] = ("face_masks", "lip_masks")
) -> int:
    """Write the masks of a clip folder (`data.clips`) as `frame_0.png` and on, beside its frames; how many a
    kind. Kinds that are complete already are kept, and where the frames are newer it is said: they may be of
    other frames, or drawn by hand.

    Raises:
        InputError: the clip cannot be read, a frame shows no face, or the folder cannot be written.
    """
    count = clip_length(clip)
    if count < 1:
        raise InputError(f"clip {clip}: holds no frame")
    missing = [kind for kind in kinds if not _complete(clip / kind, count)]
    for kind in kinds:
        if kind in missing:
            continue
        if _newest(clip / "images", clip / "sub_clip.mp4") > _newest(clip / kind) + _COPYING:
            logger.warning("%s: kept, but older than the frames; if it is of others, remove it", clip / kind)
    if not missing:
        return count
    try:
        with contextlib.ExitStack() as stack:
            folders = {
                kind: stack.enter_context(replacing(clip / kind, alone=True, durable=False))
                for kind in missing
            }
            for folder in folders.values():
                folder.mkdir()
            for number, (frame, points) in enumerate(_tracked(landmarker, clip)):
                if points is None:
                    raise InputError(
                        f"clip {clip}: frame {number} shows no face: leave the clip out, or cut it there"
                    )
                size = (frame.shape[1], frame.shape[0])
                for kind, folder in folders.items():
                    mask = face_mask(points, size) if kind == "face_masks" else lip_mask(points, size)
                    Image.fromarray(mask).save(folder / f"frame_{number}.png")
    except OSError as error:
        raise cannot_write(clip, error) from error
    return count


def numbered_clips(root: Path, start: int, end: int) -> list[Path]:
    """Clip folders 00001, 00002, ... below `root` from number `start` on, up to `end`, which is left out.

    Raises:
        InputError: there is none, or no number is asked for.
    """
    if not root.is_dir():
        raise InputError(f"{root}: there is no such folder")
    if end <= start:
        raise InputError(f"end {end}: give a number above the start ({start}); it is left out itself")
    found = sorted(
        (folder for folder in root.glob("*") if folder.name.isdigit() and start <= int(folder.name) < end),
        key=lambda folder: int(folder.name),
    )
    if not found:
        raise InputError(f"{root}: has no clip folders numbered {start} to {end - 1}")
    return found


def _tracked(landmarker: FaceLandmarker, clip: Path) -> Iterator[tuple[Frame, Points | None]]:
    """Frames and their landmarks, one at a time."""
    seen: deque[Frame] = deque()

    def frames() -> Iterator[Frame]:
        for frame in clip_frames(clip):
            seen.append(frame)
            yield frame

    for points in landmarker.track(frames()):
        yield seen.popleft(), points


def _newest(folder: Path, file: Path | None = None) -> float:
    """When a folder's youngest file was written, or `file` where there is no such folder."""
    if file is not None and not folder.is_dir():
        return file.stat().st_mtime
    return max(path.stat().st_mtime for path in folder.iterdir())


def _complete(folder: Path, count: int) -> bool:
    return folder.is_dir() and all((folder / f"frame_{k}.png").is_file() for k in range(count))
