"""H.264 and AAC in MP4 by PyAV: the two tracks, and the container that they share."""

import functools
import json
import sys
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from numpy import show_config as numpy_config

from stableavatar.media.audio import Samples, Sound
from stableavatar.media.live import LiveSound
from stableavatar.media.reading import METADATA_KEY, SWS_ACCURATE, Frame
from stableavatar.media.timing import sample_position

# BT.709 as ITU-T H.273 numbers primaries, transfer and matrix alike.
_BT709 = 1
# Bits a second of AAC for one channel; the format allows 6 bits a sample, which is less below 16 kHz.
_SOUND_BITS = 96_000
# Of a live file, in microseconds: what is held back of a video that waits for its next frames.
_FRAGMENT = 200_000


class Writable(Protocol):
    """What takes the bytes of a file in order."""

    def write(self, data: bytes, /) -> int:
        """Take them; how many there were."""
        ...


def open_mp4(
    target: Path | Writable | None,
    *,
    sound: Sound | LiveSound | None = None,
    metadata: Mapping[str, str] | None = None,
    live: bool = False,
) -> Any:
    """A container to write to, the index first; `live`: in fragments that play while it grows.

    Args:
        target: a file's path, or what takes bytes; None writes to standard output.
    """
    file: Any = _StandardOutput() if target is None else target
    if isinstance(target, Path):
        # The system's own error (rights, full disk) is clearer than FFmpeg's.
        with target.open("wb"):
            pass
        file = str(target)
    options = {"movflags": "+frag_keyframe+delay_moov+default_base_moof" if live else "+faststart"}
    if live:
        options |= {"flush_packets": "1", "frag_duration": str(_FRAGMENT)}
    if sound is not None:
        # The edit list that cuts the sound counts in this; milliseconds, the default, cut too much.
        options["movie_timescale"] = str(sound.sample_rate)
    container = av.open(file, "w", format="mp4", options=options)
    if metadata:
        comment = json.dumps({METADATA_KEY: dict(metadata)}, ensure_ascii=False)
        container.metadata["comment"] = comment
    return container


class _StandardOutput:
    """Standard output without seeking, every piece of it at once."""

    def write(self, data: bytes) -> int:
        """Write and flush."""
        written = sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return written


class VideoTrack:
    """H.264 of a container: yuv420p, BT.709 in limited range."""

    def __init__(
        self,
        container: Any,
        width: int,
        height: int,
        fps: Fraction,
        *,
        quality: int,
        preset: str,
        live: bool = False,
    ) -> None:
        self._container = container
        self._fps = fps
        self._frames = 0
        # swscale puts chroma samples in the middle of four pixels; H.264 means their left edge unless told.
        x264 = {"crf": str(quality), "preset": preset, "x264-params": f"chromaloc=1{_repeatable()}"}
        if live:  # nothing is held back, and a fragment can begin every second
            x264 |= {"tune": "zerolatency", "g": str(max(1, round(fps)))}
        video = container.add_stream("libx264", rate=fps, options=x264)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        context = video.codec_context
        context.time_base = 1 / fps
        context.colorspace = _BT709
        context.color_range = int(ColorRange.MPEG)
        context.color_primaries = _BT709
        context.color_trc = _BT709
        self._video = video
        self._reformatter = VideoReformatter()

    def write(self, frame: Frame) -> None:
        """Encode the next frame."""
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
        self._frames += 1
        self._container.mux(self._video.encode(converted))

    def finish(self) -> None:
        """Encode what is held back."""
        self._container.mux(self._video.encode(None))


@functools.cache
def _repeatable() -> str:
    """An option of x264 without which the same frames do not give the same file on some machines.

    Its AVX-512 code for macroblock trees reads memory that nothing was written to, unless the width is a
    multiple of 128 pixels (480, the published width of a tall picture, is none). AVX2 is nearly as fast.
    """
    # Absent where the processor has nothing beyond what numpy was built for.
    found = numpy_config(mode="dicts").get("SIMD Extensions", {}).get("found", [])
    return ":asm=AVX2" if any(name.startswith(("AVX512", "X86_V4")) for name in found) else ""


class SoundTrack:
    """AAC of a container, kept in step with the frames: cut, or followed by silence."""

    def __init__(self, container: Any, sound: Sound | LiveSound, fps: Fraction) -> None:
        self._container = container
        self._sound = sound
        self._fps = fps
        self._position = 0
        self._feed = _SoundFeed(sound)
        self._audio = container.add_stream("aac", rate=sound.sample_rate)
        self._audio.codec_context.layout = "mono" if sound.channels == 1 else "stereo"
        self._audio.bit_rate = sound.channels * min(_SOUND_BITS, 5 * sound.sample_rate)

    def write_until(self, frames: int) -> None:
        """Encode the sound up to the end of so many frames."""
        rate = self._sound.sample_rate
        end = sample_position(frames, rate, self._fps)
        if end == self._position:
            return
        samples = self._feed.take(end - self._position)
        layout = "mono" if self._sound.channels == 1 else "stereo"
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout=layout)
        frame.sample_rate = rate
        frame.pts = self._position
        frame.time_base = Fraction(1, rate)
        self._position = end
        self._container.mux(self._audio.encode(frame))

    def finish(self) -> None:
        """Encode what is held back."""
        self._container.mux(self._audio.encode(None))
        self.close()

    def close(self) -> None:
        """Close the recording."""
        self._feed.close()


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
