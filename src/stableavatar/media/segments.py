"""An MP4 by way of segments: what is closed survives a kill, and a resumed run goes on after it.

Every segment is encoded by an encoder of its own, so that its frames do not depend on where a run was
interrupted; at the end they are joined without encoding them again, with the sound.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from stableavatar.errors import InputError
from stableavatar.media.audio import Sound
from stableavatar.media.encoding import SoundTrack, VideoTrack, open_mp4
from stableavatar.media.files import cannot_write, to_disk
from stableavatar.media.reading import Frame

# Frames by which x264 at most decodes ahead of what it shows, at any preset.
_REORDERED = 2


class SegmentWriter:
    """Frames into segments in a folder, and the segments into a file.

    Attributes:
        segments, frames: how many are closed, and how many frames have been written.

    Args:
        folder: where the segments lie, `segment-000000.mp4` and on.
        segments, frames: how many are there already.
    """

    def __init__(
        self,
        folder: Path,
        width: int,
        height: int,
        fps: Fraction,
        *,
        quality: int,
        preset: str,
        segments: int = 0,
        frames: int = 0,
    ) -> None:
        self.folder = folder
        self.segments = segments
        self.frames = frames
        self._width, self._height, self._fps = width, height, fps
        self._quality, self._preset = quality, preset
        self._container: Any = None
        self._track: VideoTrack | None = None

    def write(self, frame: Frame) -> None:
        """Take the next frame, uint8 [H, W, 3] sRGB. Raises InputError where it cannot be written."""
        try:
            if self._track is None:
                self._container = open_mp4(self._unfinished)
                self._track = VideoTrack(
                    self._container, self._width, self._height, self._fps, quality=self._quality,
                    preset=self._preset,
                )  # fmt: skip
            self._track.write(frame)
            self.frames += 1
        except (av.FFmpegError, OSError) as error:
            raise cannot_write(self.folder, error) from error

    def cut(self) -> None:
        """Close the segment: its frames are on the disk."""
        if self._track is None:
            return
        try:
            self._track.finish()
            self._container.close()
            to_disk(self._unfinished)
            self._unfinished.replace(self._path(self.segments))
        except (av.FFmpegError, OSError) as error:
            raise cannot_write(self.folder, error) from error
        self.segments += 1
        self._container, self._track = None, None

    def abandon(self) -> None:
        """Give up the segment that is open."""
        if self._container is not None:
            with suppress(av.FFmpegError, OSError):  # the disk may be full
                self._container.close()
            self._unfinished.unlink(missing_ok=True)
        self._container, self._track = None, None

    def join(self, target: Path, *, sound: Sound | None, metadata: Mapping[str, str] | None = None) -> None:
        """All closed segments, one after the other, with the sound, as an MP4.

        Raises:
            InputError: there is no frame, or the file cannot be written.
        """
        if not self.segments:
            raise InputError(f"output {target}: there was no frame to write")
        try:
            self._join(target, sound, metadata)
        except (av.FFmpegError, OSError) as error:
            raise cannot_write(target, error) from error

    def _join(self, target: Path, sound: Sound | None, metadata: Mapping[str, str] | None) -> None:
        with open_mp4(target, sound=sound, metadata=metadata) as container:
            joint = Joint(container, self._fps, sound)
            for number in range(self.segments):
                for _ in joint.add(self._path(number)):
                    pass
            joint.finish()
        to_disk(target)

    @property
    def _unfinished(self) -> Path:
        return self.folder / "unfinished.mp4"

    def _path(self, number: int) -> Path:
        return self.folder / segment_name(number)


class Joint:
    """Pieces of one video, not encoded again, and its sound, in a container.

    Attributes:
        frames: how many it has.
    """

    def __init__(self, container: Any, fps: Fraction, sound: Sound | None) -> None:
        self.frames = 0
        self._container = container
        self._fps = fps
        self._sound = sound
        self._stream: Any = None
        self._audio: SoundTrack | None = None

    def add(self, path: Path, *, from_start: bool = False) -> Iterator[None]:
        """Take the frames of a file, one at a time.

        Args:
            from_start: the file is the whole video, of which those that are here already are left out; else
                what follows on them.
        """
        done = self.frames
        first = 0 if from_start else done
        with av.open(str(path)) as source:
            template = source.streams.video[0]
            if self._stream is None:
                self._stream = self._container.add_stream_from_template(template)
                self._stream.time_base = 1 / self._fps
                if self._sound is not None:
                    self._audio = SoundTrack(self._container, self._sound, self._fps)
            number = first  # of the packet, in the order of decoding
            for packet in source.demux(template):
                if packet.pts is None:
                    continue
                number += 1
                if number <= done:
                    continue
                shown = round(packet.pts * packet.time_base * self._fps)
                packet.time_base = 1 / self._fps
                packet.pts, packet.dts = first + shown, self.frames - _REORDERED
                packet.duration = 1
                packet.stream = self._stream
                self._container.mux(packet)
                self.frames += 1
                if self._audio is not None:
                    self._audio.write_until(self.frames)
                yield

    def finish(self) -> None:
        """Encode what is held back of the sound."""
        if self._audio is not None:
            self._audio.finish()

    def close(self) -> None:
        """Close the recording, where the video is given up."""
        if self._audio is not None:
            self._audio.close()


def segment_name(number: int) -> str:
    """The file of a segment, counted from 0."""
    return f"segment-{number:06d}.mp4"
