"""Frames into files as they come: an MP4 with sound, or a folder of PNG pictures. None is kept in memory.

Neither appears under its final name before it is complete; after a failure nothing is left behind.
"""

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, get_args

import av
import numpy as np
from av.video.reformatter import (
    ColorRange,
    Colorspace,
    VideoReformatter,
)
from PIL import Image

from stableavatar.choices import Preset
from stableavatar.errors import InputError
from stableavatar.media.audio import Samples, Sound
from stableavatar.media.files import reason_of
from stableavatar.media.live import LiveSound
from stableavatar.media.reading import (
    METADATA_KEY,
    SWS_ACCURATE,
    Frame,
    MediaInfo,
    probe,
    read_frames,
    read_metadata,
)
from stableavatar.media.timing import parse_fps, sample_position

__all__ = [
    "PRESETS",
    "FrameSink",
    "FrameWriter",
    "MediaInfo",
    "VideoWriter",
    "check_output",
    "probe",
    "read_frames",
    "read_metadata",
]

logger = logging.getLogger(__name__)

PRESETS = get_args(Preset)
MAX_QUALITY = 51
_LONGEST_NAME = 255
STANDARD_OUTPUT = "-"
# BT.709 as ITU-T H.273 numbers primaries, transfer and matrix alike.
_BT709 = 1
# Bits a second of AAC for one channel; the format allows 6 bits a sample, which is less below 16 kHz.
_SOUND_BITS = 96_000


class FrameSink(Protocol):
    """What frames can be written to: a context manager whose body writes them in order."""

    def write(self, frame: Frame) -> None:
        """Take the next frame, uint8 [H, W, 3] sRGB."""

    def __enter__(self) -> "FrameSink":
        """Open for writing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete it, or remove it where the body has failed."""


class VideoWriter:
    """An MP4: H.264 (yuv420p, BT.709 limited range) and AAC in step, interleaved, the index first.

        with VideoWriter("out.mp4", 512, 512, Fraction(25), sound=Sound("speech.wav")) as writer:
            for frame in frames:
                writer.write(frame)

    The sound is cut, or padded with silence, to the length of the frames. The file is written as
    `.NAME.PROCESS.partial.mp4` beside its final name and renamed when it is complete and on the disk. Memory
    does not grow but for MP4's index (about 100 bytes a frame).
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        fps: Fraction | int | float | str,
        *,
        sound: Sound | LiveSound | None,
        quality: int = 18,
        preset: str = "medium",
        metadata: Mapping[str, str] | None = None,
        live: bool = False,
    ) -> None:
        """Check everything; nothing is written before the context is entered.

        `quality` is x264's constant rate factor: 0 is lossless, 18 hardly to be told from it, 28 small.
        `preset` trades time for size. `metadata` can be read again with `read_metadata`. `live` writes
        fragmented MP4, a fragment a second, which plays while it grows: under the final name (or to standard
        output, if `path` is "-"), where it stays as far as it has come if the body fails.

        Raises InputError: a name that does not end in .mp4, a folder that is missing or cannot be written, a
        folder under the file's name, an odd size, a frame rate, quality or preset that does not exist.
        """
        self._live = live or str(path) == STANDARD_OUTPUT
        self._path = Path(path) if str(path) == STANDARD_OUTPUT else check_output(path)
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise InputError(f"a video of {width}x{height} is not possible: both must be even and above 0")
        if isinstance(quality, bool) or not isinstance(quality, int) or not 0 <= quality <= MAX_QUALITY:
            raise InputError(f"quality {quality}: give a whole number from 0 (best) to {MAX_QUALITY}")
        if preset not in PRESETS:
            raise InputError(f"preset {preset!r} is not known: choose one of {', '.join(PRESETS)}")
        self._width, self._height, self._fps = width, height, parse_fps(fps)
        self._quality, self._preset = quality, preset
        self._metadata = dict(metadata or {})
        self._sound = sound
        self._partial = self._path
        if not self._live:
            self._partial = self._path.with_name(_partial_name(self._path.stem, "partial.mp4"))
        self._container: Any = None
        self._frames = 0

    @property
    def frames(self) -> int:
        """How many frames have been written."""
        return self._frames

    def __enter__(self) -> "VideoWriter":
        """Open the partial file. Raises InputError where that fails."""
        try:
            self._open()
        except (av.FFmpegError, OSError) as error:
            self._abort()
            raise _cannot_write(self._path, error) from error
        except BaseException:
            self._abort()
            raise
        return self

    def write(self, frame: Frame) -> None:
        """Take the next frame, uint8 [height, width, 3] sRGB.

        Raises InputError where the file cannot be written (disk full) or the sound cannot be read, ValueError
        for another shape or type.
        """
        if self._container is None:
            raise ValueError("write outside of the writer's context")
        if frame.shape != (self._height, self._width, 3) or frame.dtype != np.uint8:
            raise ValueError(
                f"a frame must be uint8 [{self._height}, {self._width}, 3], not "
                f"{frame.dtype} {list(frame.shape)}"
            )
        try:
            self._write_picture(frame)
            self._frames += 1
            self._write_sound()
        except (av.FFmpegError, OSError) as error:
            raise _cannot_write(self._path, error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete and rename the file, or remove it. Raises InputError where it cannot be completed."""
        if kind is not None:
            self._abort()
            return
        try:
            self._finish()
        except (av.FFmpegError, OSError) as failure:
            self._abort()
            raise _cannot_write(self._path, failure) from failure
        except BaseException:
            self._abort()
            raise

    def _open(self) -> None:
        target: Any = sys.stdout.buffer
        if str(self._path) != STANDARD_OUTPUT:
            # The system's own error (rights, full disk) is clearer than FFmpeg's.
            with self._partial.open("wb"):
                pass
            target = str(self._partial)
        flags = "+frag_keyframe+delay_moov+default_base_moof" if self._live else "+faststart"
        options = {"movflags": flags}
        if self._live:
            options["flush_packets"] = "1"
        if self._sound is not None:
            # The edit list that cuts the sound counts in this; milliseconds, the default, cut too much.
            options["movie_timescale"] = str(self._sound.sample_rate)
        self._container = av.open(target, "w", format="mp4", options=options)
        if self._metadata:
            comment = json.dumps({METADATA_KEY: self._metadata}, ensure_ascii=False)
            self._container.metadata["comment"] = comment
        # swscale puts chroma samples in the middle of four pixels; H.264 means their left edge unless told.
        x264 = {"crf": str(self._quality), "preset": self._preset, "x264-params": "chromaloc=1"}
        if self._live:  # nothing is held back, and a fragment can begin every second
            x264 |= {"tune": "zerolatency", "g": str(max(1, round(self._fps)))}
        video = self._container.add_stream("libx264", rate=self._fps, options=x264)
        video.width, video.height, video.pix_fmt = self._width, self._height, "yuv420p"
        context = video.codec_context
        context.time_base = 1 / self._fps
        context.colorspace = _BT709
        context.color_range = int(ColorRange.MPEG)
        context.color_primaries = _BT709
        context.color_trc = _BT709
        self._video = video
        self._reformatter = VideoReformatter()
        if self._sound is not None:
            rate, channels = self._sound.sample_rate, self._sound.channels
            self._audio = self._container.add_stream("aac", rate=rate)
            self._audio.codec_context.layout = "mono" if channels == 1 else "stereo"
            self._audio.bit_rate = channels * min(_SOUND_BITS, 5 * rate)
            self._feed = _SoundFeed(self._sound)
            self._sound_position = 0

    def _write_picture(self, frame: Frame) -> None:
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        # swscale takes BT.601 unless it is told otherwise.
        converted = self._reformatter.reformat(
            picture,
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=SWS_ACCURATE,
        )
        converted.pts = self._frames
        converted.time_base = 1 / self._fps
        self._container.mux(self._video.encode(converted))

    def _write_sound(self) -> None:
        if self._sound is None:
            return
        rate = self._sound.sample_rate
        end = sample_position(self._frames, rate, self._fps)
        if end == self._sound_position:
            return
        samples = self._feed.take(end - self._sound_position)
        layout = "mono" if self._sound.channels == 1 else "stereo"
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout=layout)
        frame.sample_rate = rate
        frame.pts = self._sound_position
        frame.time_base = Fraction(1, rate)
        self._sound_position = end
        self._container.mux(self._audio.encode(frame))

    def _finish(self) -> None:
        if self._frames == 0:
            raise InputError(f"output {self._path}: there was no frame to write")
        self._container.mux(self._video.encode(None))
        if self._sound is not None:
            self._container.mux(self._audio.encode(None))
            self._feed.close()
        self._container.close()
        self._container = None
        if str(self._path) == STANDARD_OUTPUT:
            sys.stdout.buffer.flush()
            return
        _to_disk(self._partial)
        if not self._live:
            self._partial.replace(self._path)

    def _abort(self) -> None:
        # Removed first: closing would otherwise move the index of a long file to its front in vain.
        if not self._live:
            with suppress(OSError):
                self._partial.unlink()
        container, self._container = self._container, None
        if container is not None:
            with suppress(av.FFmpegError, OSError):
                container.close()
        if self._sound is not None and hasattr(self, "_feed"):
            self._feed.close()


class FrameWriter:
    """A folder of PNG pictures, frame_000000.png and on, for other programs to work with.

    They are written to `.NAME.PROCESS.partial` beside the folder, which is renamed when it is complete.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises InputError: the parent folder is missing or cannot be written, or `folder` is not empty."""
        self._folder = Path(folder).expanduser().absolute()
        _check_parent(self._folder, folder)
        if self._folder.exists() and not self._folder.is_dir():
            raise InputError(f"output {folder}: there is a file of this name. Name a folder for the frames.")
        if self._folder.is_dir() and any(self._folder.iterdir()):
            raise InputError(f"output {folder}: this folder is not empty. Name a new or an empty one.")
        self._partial = self._folder.with_name(_partial_name(self._folder.name, "partial"))
        self._frames = 0

    @property
    def frames(self) -> int:
        """How many frames have been written."""
        return self._frames

    def __enter__(self) -> "FrameWriter":
        """Make the partial folder. Raises InputError where that fails."""
        try:
            if self._partial.exists():
                shutil.rmtree(self._partial)
            self._partial.mkdir()
        except OSError as error:
            raise _cannot_write(self._folder, error) from error
        return self

    def write(self, frame: Frame) -> None:
        """Take the next frame, uint8 [H, W, 3] sRGB. Raises InputError where it cannot be written."""
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise ValueError(f"a frame must be uint8 [H, W, 3], not {frame.dtype} {list(frame.shape)}")
        path = self._partial / f"frame_{self._frames:06d}.png"
        try:
            Image.fromarray(np.ascontiguousarray(frame)).save(path, compress_level=3)
        except OSError as error:
            raise _cannot_write(self._folder, error) from error
        self._frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Rename the folder, or remove it where the body has failed."""
        if kind is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            return
        try:
            self._partial.replace(self._folder)
        except OSError as failure:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise _cannot_write(self._folder, failure) from failure


class _SoundFeed:
    """Any number of samples at a time from a stream of blocks; silence after its end."""

    def __init__(self, sound: Sound | LiveSound) -> None:
        self._blocks: Iterator[Samples] = sound.blocks()
        self._channels = sound.channels
        self._rest = np.zeros((0, sound.channels), dtype=np.float32)

    def take(self, count: int) -> Samples:
        """The next samples [count, channels]."""
        parts: list[Samples] = []
        missing = count
        while missing > 0:
            if not len(self._rest):
                block = next(self._blocks, None)
                self._rest = np.zeros((missing, self._channels), np.float32) if block is None else block
            part, self._rest = self._rest[:missing], self._rest[missing:]
            parts.append(part)
            missing -= len(part)
        return np.concatenate(parts)

    def close(self) -> None:
        """Close the file that is read."""
        close = getattr(self._blocks, "close", None)
        if close is not None:
            close()


def check_output(path: str | Path) -> Path:
    """The absolute path of an MP4 that can be written; to be called before long work begins.

    Raises InputError: the name does not end in .mp4, its folder is missing or cannot be written, or it is a
    folder itself.
    """
    absolute = Path(path).expanduser().absolute()
    if absolute.is_dir():
        raise InputError(
            f"output {path}: this is a folder. Name a file in it, such as {Path(path) / 'out.mp4'}."
        )
    if absolute.suffix.lower() != ".mp4":
        raise InputError(f"output {path}: only MP4 is written. Let the name end in .mp4.")
    _check_parent(absolute, path)
    return absolute


def _check_parent(absolute: Path, given: str | Path) -> None:
    folder = absolute.parent
    if not folder.is_dir():
        raise InputError(f"output {given}: there is no folder {folder}. Make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"output {given}: the folder {folder} cannot be written. Choose another one.")


def _partial_name(stem: str, suffix: str) -> str:
    """`.STEM.PROCESS.SUFFIX`: two programs may write to one output at a time.

    The stem is shortened where the name would be longer than file systems allow.
    """
    suffix = f".{os.getpid()}.{suffix}"
    room = _LONGEST_NAME - len(os.fsencode(suffix)) - 1
    while len(os.fsencode(stem)) > room:
        stem = stem[:-1]
    return f".{stem}{suffix}"


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: BaseException) -> InputError:
    return InputError(
        f"output {path}: cannot be written ({reason_of(error)}). Make room, or choose another folder."
    )
