"""Speech that is still arriving, from a pipe, a microphone, or a file that is read as it is needed: only what
is needed stays in memory.

The same samples as `Speech` and `Sound` give once it has ended, as far as they have arrived.
"""

import io
import os
import select
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np

from stableavatar.errors import InputError
from stableavatar.media.audio import CANCELLED, SPEECH_RATE, Samples, output_rate, speech_mix
from stableavatar.media.decoding import (
    LARGEST_SAMPLE,
    Resampler,
    decoded_samples,
    mix_gains,
    stream_sound,
)
from stableavatar.media.files import OPEN_OPTIONS, reason_of
from stableavatar.media.timing import frame_count

# Small, so that a second of speech does not wait for the next one.
_READ = 2048


class LiveRecording:
    """Sound that arrives block by block: as speech for the model and, at its own rate, for the output file.

    Args:
        blocks: samples [n] or [n, channels], float32 in [-1, 1], of any n; asked for when they are needed.
        sample_rate: samples a second.
        channels: 1 or 2; a block [n] stands for all of them.
        duration: seconds after which no more is taken; None: until the blocks end.
        name: of the source, for errors.
    """

    def __init__(
        self,
        blocks: Iterable[Samples],
        sample_rate: int = SPEECH_RATE,
        *,
        channels: int = 1,
        duration: float | None = None,
        name: str = "speech",
    ) -> None:
        if channels not in (1, 2):
            raise InputError(f"{name}: sound of {channels} channels: give one or two")
        self._blocks = iter(blocks)
        self._left = None if duration is None else round(Fraction(duration) * sample_rate)
        self._rate = sample_rate
        self._channels = channels
        self._energies = {"mean": 0.0, "left": 0.0, "right": 0.0}
        self._name = name
        self._ended = False
        self.speech = LiveSpeech(self, sample_rate)
        self.sound = LiveSound(self, sample_rate, channels)

    def pump(self) -> bool:
        """Take the next block for both uses; False after the last.

        Raises:
            InputError: samples that are NaN or infinite, or of another shape.
        """
        if self._ended:
            return False
        block = next(self._blocks, None)
        if block is None and self._left:  # a duration that was asked for: silence follows
            block = np.zeros(min(self._left, self._rate), dtype=np.float32)
        if block is not None:
            block = block if self._left is None else block[: self._left]
            self._push(block)
            self._left = None if self._left is None else self._left - len(block)
        if block is None or self._left == 0:
            self._finish()
        return True

    def _push(self, block: Samples) -> None:
        array = np.asarray(block)
        if array.ndim == 1:
            array = array[:, None]
        if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1] not in (1, self._channels):
            raise InputError(
                f"{self._name}: blocks must be floating-point samples [n] or [n, channels], not "
                f"{array.dtype} {array.shape}"
            )
        if array.size and not float(np.abs(array).max()) <= LARGEST_SAMPLE:
            raise InputError(f"{self._name}: has samples that are no numbers (NaN or infinite)")
        array = array.astype(np.float32)
        self.speech.push(self._mixed(array))
        self.sound.push(
            np.broadcast_to(array, (len(array), self._channels)) if array.shape[1] == 1 else array
        )

    def _mixed(self, array: Samples) -> Samples:
        """One channel [n, 1] of a block [n, channels]: see `media.audio.speech_mix`, of what has arrived."""
        mean = array.mean(axis=1, keepdims=True)
        if array.shape[1] == 1:
            return mean
        for name, channel in (("mean", mean), ("left", array[:, :1]), ("right", array[:, 1:])):
            self._energies[name] += float(np.square(channel, dtype=np.float64).sum())
        left, right = self._energies["left"], self._energies["right"]
        if self._energies["mean"] >= CANCELLED * max(left, right):
            return mean
        return array[:, :1] if left >= right else array[:, 1:]

    def _finish(self) -> None:
        self._ended = True
        self.speech.finish()
        self.sound.finish()

    def close(self) -> None:
        """Take no more."""
        close = getattr(self._blocks, "close", None)
        if close is not None:
            close()
        if not self._ended:
            self._finish()


class LiveSpeech:
    """Mono samples at 16 kHz of a recording that may still be arriving; see `media.audio.Speech`."""

    def __init__(self, recording: LiveRecording, sample_rate: int) -> None:
        self._recording = recording
        self._resampler = Resampler(sample_rate, SPEECH_RATE, 1)
        self._parts: deque[Samples] = deque()
        self._first = 0  # position of the first sample that is kept
        self._arrived = 0
        self._ended = False

    def push(self, block: Samples) -> None:
        """Take samples [n, 1] at the recording's rate."""
        self._append(self._resampler.push(block))

    def finish(self) -> None:
        """There is no more."""
        if not self._ended:
            self._append(self._resampler.finish())
            self._ended = True

    def wait(self, count: int) -> bool:
        """Whether there are `count` samples; waits until there are, or until the end."""
        while self._arrived < count and not self._ended:
            self._recording.pump()
        return self._arrived >= count

    def wait_frames(self, count: int, fps: Fraction) -> bool:
        """Whether there is speech for `count` frames of video; waits until there is, or until the end."""
        while frame_count(self._arrived, SPEECH_RATE, fps) < count and not self._ended:
            self._recording.pump()
        return frame_count(self._arrived, SPEECH_RATE, fps) >= count

    @property
    def length(self) -> int | None:
        """The number of samples; None while they are arriving."""
        return self._arrived if self._ended else None

    def samples(self, start: int, stop: int) -> Samples:
        """Samples [stop - start], waited for; zeros after the end. Lets go of what lies before `start`:
        windows come in order.

        Raises ValueError for a stretch that has been let go.
        """
        if start < self._first:
            raise ValueError(f"samples({start}, {stop}): the first that is kept is {self._first}")
        self.wait(stop)
        while self._parts and self._first + len(self._parts[0]) <= start:
            self._first += len(self._parts.popleft())
        result = np.zeros(stop - start, dtype=np.float32)
        position = self._first
        for part in self._parts:
            begin, end = max(start, position), min(stop, position + len(part))
            if begin < end:
                result[begin - start : end - start] = part[begin - position : end - position]
            position += len(part)
        return result

    def close(self) -> None:
        """Take no more."""
        self._recording.close()

    def _append(self, block: Samples) -> None:
        if len(block):
            self._parts.append(block[:, 0])
            self._arrived += len(block)


class LiveSound:
    """The recording at its own rate, up to 48 kHz, for the output file; see `media.audio.Sound`.

    Attributes:
        wanted: False where nobody takes the sound, so that it is not kept.
    """

    def __init__(self, recording: LiveRecording, sample_rate: int, channels: int) -> None:
        self._recording = recording
        self.sample_rate = output_rate(sample_rate)
        self.channels = channels
        self._resampler = Resampler(sample_rate, self.sample_rate, channels)
        self._waiting: deque[Samples] = deque()
        self._ended = False
        self.wanted = True

    def push(self, block: Samples) -> None:
        """Take samples [n, channels] at the recording's rate."""
        if self.wanted:
            self._waiting.append(self._resampler.push(block))

    def finish(self) -> None:
        """There is no more."""
        if not self._ended and self.wanted:
            self._waiting.append(self._resampler.finish())
        self._ended = True

    def blocks(self) -> Iterator[Samples]:
        """The sound in order, in blocks [n, channels] clipped to [-1, 1], waited for."""
        while True:
            while not self._waiting and not self._ended:
                self._recording.pump()
            if not self._waiting:
                return
            yield np.clip(self._waiting.popleft(), -1.0, 1.0)


def follow_speech(path: str | Path, *, start: float = 0.0, duration: float | None = None) -> LiveSpeech:
    """The speech of a file, the samples of `Speech.open`, read as they are asked for.

    With a `duration` silence follows where the file is shorter.

    Raises:
        InputError: see `Speech.open`; what is wrong further on in the file is found when it is read.
    """
    mix = speech_mix(path, start, duration)
    blocks = stream_sound(path, SPEECH_RATE, mix, start, duration)
    recording = LiveRecording(blocks, SPEECH_RATE, duration=duration, name=f"recording {path}")
    recording.sound.wanted = False
    return recording.speech


def read_live(
    file: BinaryIO,
    *,
    raw_rate: int | None = None,
    duration: float | None = None,
    name: str = "-",
    stop: Callable[[], bool] | None = None,
) -> LiveRecording:
    """A recording that is read from a pipe while it arrives.

    Args:
        file: any format that FFmpeg reads without seeking, such as WAV; or raw mono samples.
        raw_rate: samples a second of raw 16-bit little-endian mono samples; None: the file says it.
        name: of the file, for errors.
        stop: asked while nothing arrives; where it says so, the speech has ended.

    Raises:
        InputError: no sound in a format that can be read from a pipe.
    """
    options = {**OPEN_OPTIONS, "probesize": "4096", "analyzeduration": "0"}
    if raw_rate is not None:
        options = {"sample_rate": str(raw_rate), "ch_layout": "mono"}
    pipe: Any = _Pipe(file, stop)
    try:
        container = av.open(
            pipe, format=None if raw_rate is None else "s16le", options=options, buffer_size=_READ
        )
        stream = container.streams.audio[0]
    except (av.FFmpegError, OSError, IndexError) as error:
        raise InputError(
            f"speech {name}: this is no sound that can be read while it arrives "
            f"({reason_of(error)}). Send WAV, or raw 16-bit mono samples with --raw-rate."
        ) from error
    gains = mix_gains(
        tuple(channel.name for channel in stream.codec_context.layout.channels),
        "mono" if stream.codec_context.channels == 1 else "stereo",
    )

    def blocks() -> Iterator[Samples]:
        try:
            for frame in container.decode(stream):
                yield decoded_samples(frame, name) @ gains
        except av.EOFError:
            return
        except (av.FFmpegError, OSError) as error:
            raise InputError(f"speech {name}: cannot be read on ({reason_of(error)})") from error
        finally:
            container.close()

    return LiveRecording(
        blocks(), stream.codec_context.sample_rate, channels=gains.shape[1], duration=duration, name=name
    )


class _Pipe:
    """What of a file PyAV may use: reading what is there, without seeking."""

    def __init__(self, file: BinaryIO, stop: Callable[[], bool] | None) -> None:
        self._stop = stop
        try:
            self._descriptor: int | None = file.fileno()
        except (OSError, AttributeError, io.UnsupportedOperation):
            self._descriptor = None
        self._file = file

    def read(self, size: int) -> bytes:
        """At most `size` bytes, as soon as there are any."""
        if self._descriptor is None:
            return self._file.read(size)
        while not select.select([self._descriptor], [], [], 0.2)[0]:
            if self._stop is not None and self._stop():
                return b""
        return os.read(self._descriptor, size)
