"""Frames into files as they come: an MP4 with sound, or a folder of PNG pictures. None is kept in memory.

Neither appears under its final name before it is complete; after a failure nothing is left behind.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import av
import numpy as np
from PIL import Image

from stableavatar.choices import Preset
from stableavatar.errors import InputError
from stableavatar.media.audio import Sound
from stableavatar.media.encoding import SoundTrack, VideoTrack, Writable, open_mp4
from stableavatar.media.files import (
    cannot_write,
    check_frames_folder,
    check_output,
    locked,
    partial_name,
    remove,
    to_disk,
)
from stableavatar.media.live import LiveSound
from stableavatar.media.reading import (
    Frame,
)
from stableavatar.media.timing import parse_fps

PRESETS = get_args(Preset)
MAX_QUALITY = 51
STANDARD_OUTPUT = "-"
_LOCK = "lock"  # beside the pictures while they are made
_SYNC_EVERY = 250  # pictures


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
        path: str | Path | Writable,
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
        fragmented MP4, several fragments a second, which plays while it grows: under the final name (or to
        standard output, if `path` is "-", or into whatever has `write`), where it stays as far as it has come
        if the body fails.

        Raises InputError: a name that does not end in .mp4, a folder that is missing or cannot be written, a
        folder under the file's name, an odd size, a frame rate, quality or preset that does not exist.
        """
        self._sink: Writable | None = None
        if not isinstance(path, str | Path):
            self._sink, path = path, STANDARD_OUTPUT
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
            self._partial = self._path.with_name(partial_name(self._path.stem, "partial.mp4"))
        self._container: Any = None
        self._audio: SoundTrack | None = None
        self._entered = False
        self._frames = 0

    @property
    def frames(self) -> int:
        """How many frames have been written."""
        return self._frames

    def __enter__(self) -> "VideoWriter":
        """Open the partial file; a live one is opened with the first frame. Raises InputError where that
        fails."""
        self._entered = True
        try:
            if not self._live:
                self._open()
        except (av.FFmpegError, OSError) as error:
            self._abort()
            raise cannot_write(self._path, error) from error
        except BaseException:
            self._abort()
            raise
        return self

    def write(self, frame: Frame) -> None:
        """Take the next frame, uint8 [height, width, 3] sRGB.

        Raises InputError where the file cannot be written (disk full) or the sound cannot be read, ValueError
        for another shape or type.
        """
        if not self._entered:
            raise ValueError("write outside of the writer's context")
        if frame.shape != (self._height, self._width, 3) or frame.dtype != np.uint8:
            raise ValueError(
                f"a frame must be uint8 [{self._height}, {self._width}, 3], not "
                f"{frame.dtype} {list(frame.shape)}"
            )
        try:
            if self._container is None:
                self._open()
            self._video.write(frame)
            self._frames += 1
            if self._audio is not None:
                self._audio.write_until(self._frames)
        except (av.FFmpegError, OSError) as error:
            raise cannot_write(self._path, error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete and rename the file, or remove it. Raises InputError where it cannot be completed."""
        self._entered = False
        if kind is not None:
            self._abort()
            return
        try:
            self._finish()
        except (av.FFmpegError, OSError) as failure:
            self._abort()
            raise cannot_write(self._path, failure) from failure
        except BaseException:
            self._abort()
            raise

    def _open(self) -> None:
        target: Path | Writable | None = self._partial
        if str(self._path) == STANDARD_OUTPUT:
            target = self._sink
        self._container = open_mp4(target, sound=self._sound, metadata=self._metadata, live=self._live)
        self._video = VideoTrack(
            self._container,
            self._width,
            self._height,
            self._fps,
            quality=self._quality,
            preset=self._preset,
            live=self._live,
        )
        if self._sound is not None:
            self._audio = SoundTrack(self._container, self._sound, self._fps)

    def _finish(self) -> None:
        if self._frames == 0:
            raise InputError(f"output {self._path}: there was no frame to write")
        self._video.finish()
        if self._audio is not None:
            self._audio.finish()
        self._container.close()
        self._container = None
        if str(self._path) == STANDARD_OUTPUT:
            return
        to_disk(self._partial)
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
        if self._audio is not None:
            self._audio.close()


class FrameWriter:
    """A folder of PNG pictures, frame_000000.png and on, for other programs to work with.

    They are written to `.NAME.PROCESS.partial` beside the folder, which is renamed when it is complete and on
    the disk.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        partial: Path | None = None,
        done: int = 0,
        keep: Callable[[], bool] = lambda: False,
    ) -> None:
        """`partial` is where the pictures lie until they are complete, `done` how many of those there belong
        to this run, and `keep` says after a failure whether they are to stay there.

        Raises InputError as `check_frames_folder` does.
        """
        self._folder = check_frames_folder(folder)
        self._keep = keep
        self._synced = done
        self._partial = partial or self._folder.with_name(partial_name(self._folder.name, "partial"))
        self._frames = done

    @property
    def frames(self) -> int:
        """How many frames have been written."""
        return self._frames

    def __enter__(self) -> "FrameWriter":
        """Make the partial folder. Raises InputError where that fails, or another process has it."""
        try:
            self._partial.mkdir(exist_ok=True)
            self._lock = locked(self._partial / _LOCK)
        except BlockingIOError:
            raise InputError(
                f"output {self._folder}: another process is making pictures for it. Name another folder."
            ) from None
        except OSError as error:
            raise cannot_write(self._folder, error) from error
        try:
            self._begin()
        except BaseException:
            self._lock.close()
            raise
        return self

    def _begin(self) -> None:
        """Take away what is not of the frames before."""
        there, later = 0, []
        try:
            with os.scandir(self._partial) as entries:  # one by one: of hours there are hundreds of thousands
                for entry in entries:
                    if _is_picture_before(self._frames, entry.name):
                        there += 1
                    elif entry.name != _LOCK:  # of frames that will be made again
                        later.append(Path(entry))
            for path in later:
                remove(path)
        except OSError as error:
            raise cannot_write(self._folder, error) from error
        if there < self._frames:
            raise InputError(
                f"output {self._folder}: pictures that were made before are missing in {self._partial}. "
                "Begin anew with --overwrite and without --resume."
            )

    def write(self, frame: Frame) -> None:
        """Take the next frame, uint8 [H, W, 3] sRGB. Raises InputError where it cannot be written."""
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise ValueError(f"a frame must be uint8 [H, W, 3], not {frame.dtype} {list(frame.shape)}")
        path = self._partial / _picture_name(self._frames)
        try:
            Image.fromarray(np.ascontiguousarray(frame)).save(path, compress_level=3)
        except OSError as error:
            raise cannot_write(self._folder, error) from error
        self._frames += 1
        # On the way, or a long video would have all of it to wait for at its end.
        if self._frames - self._synced >= _SYNC_EVERY:
            self.sync()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete and rename the folder, or remove it. Raises InputError where it cannot be completed."""
        if kind is not None:
            self._give_up()
            return
        try:
            self._finish()
        except OSError as failure:
            self._give_up()
            raise cannot_write(self._folder, failure) from failure
        except BaseException:
            self._give_up()
            raise
        self._lock.close()

    def sync(self) -> None:
        """Put the pictures that were written so far on the disk. Raises InputError where that fails."""
        try:
            for number in range(self._synced, self._frames):
                to_disk(self._partial / _picture_name(number))
            to_disk(self._partial)
        except OSError as error:
            raise cannot_write(self._folder, error) from error
        self._synced = self._frames

    def _finish(self) -> None:
        self.sync()
        if self._folder.is_dir():
            self._folder.rmdir()
        (self._partial / _LOCK).unlink()
        self._partial.replace(self._folder)
        to_disk(self._folder.parent)

    def _give_up(self) -> None:
        if not self._keep():
            shutil.rmtree(self._partial, ignore_errors=True)
        self._lock.close()


def _picture_name(number: int) -> str:
    return f"frame_{number:06d}.png"


def _is_picture_before(end: int, name: str) -> bool:
    digits = name.removeprefix("frame_").removesuffix(".png")
    return digits.isdecimal() and int(digits) < end and name == _picture_name(int(digits))
