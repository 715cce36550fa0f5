"""Videos back in: frames, the settings written into a file, and what a file is like."""

import json
import logging
import math
from collections.abc import Generator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

from stableavatar.errors import InputError
from stableavatar.media.decoding import sound_format, stream_sound
from stableavatar.media.files import VIDEO_FORMATS, open_media, reason_of

logger = logging.getLogger(__name__)

Frame = NDArray[np.uint8]

# Settings are one JSON object in the `comment` tag, under this name: every tool shows and keeps a comment.
METADATA_KEY = "stableavatar"
# FFmpeg's number for a file that does not say its matrix.
_UNSPECIFIED = 2
# Its numbers for transfers of more light than a screen of today shows (ITU-R BT.2100).
_HDR = {16: "PQ", 18: "HLG"}
# Seconds: time stamps that go back by less are disorder, as in AVI, which has none.
_JOINED = 1
# SWS_BICUBIC | SWS_ACCURATE_RND | SWS_FULL_CHR_H_INT | SWS_FULL_CHR_H_INP, which PyAV names only from version
# 18 on. Without them colours are about one level too dark: 43 dB after yuv420p and back instead of 51.
SWS_ACCURATE = 0x4 | 0x40000 | 0x2000 | 0x4000


@dataclass(frozen=True)
class MediaInfo:
    """What is in a video file, counted and not estimated.

    `fps` is the average frame rate; `sound_samples` is None where there is no sound.
    """

    width: int
    height: int
    fps: Fraction
    frames: int
    sound_rate: int | None = None
    sound_channels: int | None = None
    sound_samples: int | None = None

    @property
    def seconds(self) -> float:
        """The length of the picture."""
        return float(self.frames / self.fps)

    @property
    def sound_seconds(self) -> float:
        """The length of the sound, 0 where there is none."""
        return (self.sound_samples or 0) / (self.sound_rate or 1)


def read_frames(path: str | Path, role: str = "video") -> Generator[Frame, None, None]:
    """Decode a video frame by frame: uint8 [H, W, 3] sRGB, upright, with square pixels.

    The matrix is the file's own; where it states none, BT.709 from 720 lines up and BT.601 below.

    Raises InputError: missing, a folder, empty, no video, cut off or damaged.
    """
    with open_media(path, role) as container:
        stream = video_stream(container, path, role)
        stream.thread_type = "AUTO"
        count = hidden = 0
        try:
            for packet in container.demux(stream):
                hidden += packet.is_discard  # what an edit list cuts off
                for frame in packet.decode():
                    count += 1
                    yield _to_rgb(frame, stream.sample_aspect_ratio)
        except av.FFmpegError as error:
            raise InputError(
                f"{role} {path}: damaged after frame {count} ({reason_of(error)}). Fetch the file again."
            ) from error
        _check_whole(container, stream, count, hidden, f"{role} {path}")


def read_frames_at(
    path: str | Path, fps: Fraction, role: str = "video"
) -> Generator[tuple[int, Frame], None, None]:
    """A video at another frame rate: pairs of k and the frame that is nearest to k/fps seconds, k in order.

    Time 0 is the start of picture or sound, whichever comes first, as for `media.audio.Speech`; where the
    picture begins later, so does k. Frames as in `read_frames`; raises InputError as it does, and where its
    time stamps go back, so that nobody knows which sound belongs to a picture, or the picture is HDR or
    interlaced, which would be learned as flat colours and combs.
    """
    with open_media(path, role) as container:
        stream = video_stream(container, path, role)
        stream.thread_type = "AUTO"
        starts = [
            Fraction(it.start_time) * Fraction(it.time_base or 0)
            for it in (stream, container.streams.best("audio"))
            if it is not None and it.start_time is not None
        ]
        origin = min(starts, default=Fraction(0))
        usual = 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)
        before: tuple[Fraction, Frame] | None = None
        number = count = hidden = 0
        try:
            for packet in container.demux(stream):
                hidden += packet.is_discard  # what an edit list cuts off
                for frame in packet.decode():
                    count += 1
                    known = frame.pts is not None
                    time = frame.pts * Fraction(frame.time_base) - origin if known else Fraction(0)
                    if before is None:
                        number = max(math.ceil(time * fps), 0)
                    elif not known:
                        time = before[0] + usual
                    elif time < before[0] - _JOINED:
                        raise InputError(
                            f"{role} {path}: its time stamps go back at {float(before[0]):.1f} s, as where "
                            "recordings were joined. Prepare these one by one, or encode it anew with ffmpeg."
                        )
                    _refuse_unfit(stream, frame, f"{role} {path}")
                    while before is not None and number / fps <= (before[0] + time) / 2:
                        yield number, before[1]
                        number += 1
                    before = time, _to_rgb(frame, stream.sample_aspect_ratio)
        except av.FFmpegError as error:
            raise InputError(
                f"{role} {path}: damaged after {float(number / fps):.1f} s ({reason_of(error)}). Fetch the "
                "file again."
            ) from error
        while before is not None and number < round((before[0] + usual) * fps):
            yield number, before[1]
            number += 1
        _check_whole(container, stream, count, hidden, f"{role} {path}")


def read_metadata(path: str | Path) -> dict[str, str]:
    """The settings that `VideoWriter` wrote into a file, or the file's own tags where it is from elsewhere.

    Raises InputError: missing, a folder, empty, not media.
    """
    with open_media(path, "video") as container:
        tags = dict(container.metadata)
    try:
        settings = json.loads(tags.get("comment", ""))[METADATA_KEY]
    except (ValueError, KeyError, TypeError):
        return tags
    return {str(key): str(value) for key, value in settings.items()} if isinstance(settings, dict) else tags


def probe(path: str | Path) -> MediaInfo:
    """Size, frame rate, number of frames and length of the sound; reads the whole file, decodes the sound.

    Raises InputError: missing, a folder, empty, no video, or sound that cannot be read.
    """
    with open_media(path, "video") as container:
        stream = video_stream(container, path, "video")
        try:
            frame = next(container.decode(stream), None)
            if frame is None:
                raise InputError(f"video {path}: no frame of it can be decoded. Fetch the file again.")
            height, width = _to_rgb(frame, stream.sample_aspect_ratio).shape[:2]
            container.seek(0)
            frames = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))
        except av.FFmpegError as error:
            raise InputError(f"video {path}: damaged ({reason_of(error)}). Fetch the file again.") from error
        fps = stream.average_rate or stream.guessed_rate or Fraction(25)
        has_sound = bool(container.streams.audio)
    if not has_sound:
        return MediaInfo(width, height, Fraction(fps), frames)
    sound = sound_format(path)
    samples = sum(len(block) for block in stream_sound(path, sound.sample_rate, "mono"))
    return MediaInfo(width, height, Fraction(fps), frames, sound.sample_rate, sound.channels, samples)


def video_stream(container: Any, path: str | Path, role: str) -> Any:
    """The moving picture of an open file. Raises InputError: it has none, or of a kind that is not known."""
    known = VIDEO_FORMATS & set(container.format.name.split(","))
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not known or not streams:
        raise InputError(f"{role} {path}: has no moving picture. Name a video file.")
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise InputError(f"{role} {path}: its kind of video is not known. Convert it to MP4 (H.264).")
    return stream


def square_width(width: int, aspect: Fraction | None) -> int:
    """A picture's width with square pixels, of pixels of an aspect (None: square)."""
    # Encoders crop to odd ratios such as 4320:4313; only a real anamorphic picture is worth a resampling.
    if aspect and abs(aspect - 1) > Fraction(1, 50):
        return max(1, round(width * aspect))
    return width


def _check_whole(container: Any, stream: Any, count: int, hidden: int, what: str) -> None:
    """Raise InputError where a file ends before the frames that its header promises, or has none."""
    promised = stream.frames if "mov" in container.format.name.split(",") else 0
    if stream.duration and stream.average_rate:  # of those that are there an edit list may show fewer
        shown = round(stream.duration * stream.time_base * stream.average_rate)
        promised = min(promised, shown + hidden)
    if count == 0 or count + hidden < 0.98 * promised:
        raise InputError(f"{what}: cut off, only {count} of its frames can be read. Fetch the whole file.")


def _refuse_unfit(stream: Any, frame: "av.VideoFrame", what: str) -> None:
    """Raise InputError for a frame that is not to be learned as it is."""
    transfer = _HDR.get(stream.codec_context.color_trc)
    if transfer is not None:
        raise InputError(f"{what}: HDR ({transfer}). Convert it to SDR (BT.709) first.")
    if frame.interlaced_frame:
        raise InputError(
            f"{what}: interlaced, or flagged as such. Deinterlace it first (ffmpeg's filter bwdif)."
        )


def _to_rgb(frame: "av.VideoFrame", aspect: Fraction | None) -> Frame:
    """A decoded frame as uint8 [H, W, 3], by its own matrix and range, with square pixels, turned upright."""
    source = None
    if frame.colorspace == _UNSPECIFIED and not frame.format.is_rgb:
        source = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601
    converted = frame.reformat(
        width=square_width(frame.width, aspect),
        format="rgb24",
        src_colorspace=source,
        dst_color_range=ColorRange.JPEG,
        interpolation=SWS_ACCURATE,
    )
    array = np.asarray(converted.to_ndarray(), dtype=np.uint8)
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(array, turns)) if turns else array
