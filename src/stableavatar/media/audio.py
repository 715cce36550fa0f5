"""Speech for the model, and sound for the output file: any recording in, nothing of it kept in memory."""

import logging
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stableavatar.errors import InputError, StorageError
from stableavatar.media.decoding import (
    LARGEST_SAMPLE,
    Mix,
    Resampler,
    check_span,
    mix_gains,
    sound_format,
    stream_sound,
)
from stableavatar.media.files import check_file, file_fingerprint, reason_of

logger = logging.getLogger(__name__)

Samples = NDArray[np.float32]

SPEECH_RATE = 16000
# What AAC and every player know; other rates are brought to the next higher of these.
SOUND_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
# A mix with less than this share of the louder channel's energy has cancelled itself out.
CANCELLED = 0.01
# Seconds of a recording that are looked at for it.
CANCELLED_LOOK = 60.0
_ITEM = np.dtype(np.float32).itemsize


class Speech:
    """A recording as mono float32 samples on disk, any stretch of which can be read; `len(speech)` of them.

    Channels are mixed as `speech_mix` says.
    """

    def __init__(self, file: IO[bytes], length: int, sample_rate: int) -> None:
        """`file` holds `length` float32 samples from its beginning on; it is closed by `close`."""
        self._file = file
        self._length = length
        self._lock = threading.Lock()
        self.sample_rate = sample_rate

    @classmethod
    def open(
        cls,
        path: str | Path,
        sample_rate: int = SPEECH_RATE,
        *,
        start: float = 0.0,
        duration: float | None = None,
    ) -> "Speech":
        """Decode `duration` seconds from `start` (default: the rest) of a recording or a video's sound.

        The samples go to an unnamed temporary file (64 kB a second at 16 kHz; TMPDIR says where), never to
        memory. A recording that is shorter gives what it has; one without samples has length 0.

        Raises InputError: missing, a folder, empty, not media, no sound, cut off (unless `duration` ends
        before the cut; of .ts and .aac it cannot be told), damaged, samples that are NaN or infinite, `start`
        after the end, no room for the temporary file.
        """
        mix = speech_mix(path, start, duration)
        return cls._store(stream_sound(path, sample_rate, mix, start, duration), sample_rate)

    @classmethod
    def from_array(cls, samples: ArrayLike, sample_rate: int, *, speech_rate: int = SPEECH_RATE) -> "Speech":
        """Speech from samples [n] or [n, channels], resampled to `speech_rate` if need be. Six and eight
        channels are taken as 5.1 and 7.1.

        Raises InputError for samples that are NaN or infinite, or another shape.
        """
        array = _as_channels(samples)
        names = ("",) * array.shape[1]
        look = array[: round(CANCELLED_LOOK * sample_rate)]
        mix = _uncancelled_mix([look @ mix_gains(names, "stereo")], "the recording")
        return cls._store(
            _resample_array(array @ mix_gains(names, mix), sample_rate, speech_rate), speech_rate
        )

    @classmethod
    def _store(cls, blocks: Iterator[Samples], sample_rate: int) -> "Speech":
        """Write blocks [n, 1]."""
        length = 0
        try:
            file: IO[bytes] = tempfile.TemporaryFile(prefix="stableavatar-")  # noqa: SIM115  (closed by close)
        except OSError as error:
            raise _no_room(error) from error
        try:
            for block in blocks:
                length += len(block)
                try:
                    file.write(np.ascontiguousarray(block).data)
                except OSError as error:
                    raise _no_room(error) from error
            try:
                file.flush()
            except OSError as error:
                raise _no_room(error) from error
        except BaseException:
            _discard(file)
            raise
        return cls(file, length, sample_rate)

    def __len__(self) -> int:
        return self._length

    @property
    def seconds(self) -> float:
        """The length in seconds."""
        return self._length / self.sample_rate

    def samples(self, start: int, stop: int) -> Samples:
        """Samples [stop - start] float32; zeros where the stretch reaches outside the recording.

        Raises ValueError where `stop` is before `start`, or after `close`.
        """
        if stop < start:
            raise ValueError(f"samples({start}, {stop}): stop is before start")
        result = np.zeros(stop - start, dtype=np.float32)
        begin, end = max(start, 0), min(stop, self._length)
        if begin < end:
            with self._lock:
                self._file.seek(begin * _ITEM)
                data = self._file.read((end - begin) * _ITEM)
            result[begin - start : end - start] = np.frombuffer(data, dtype=np.float32)
        return result

    def blocks(self, size: int) -> Iterator[Samples]:
        """The whole recording in order, in blocks [size]; the last one may be shorter."""
        if size < 1:
            raise ValueError(f"a block of {size} samples is not possible")
        for start in range(0, self._length, size):
            yield self.samples(start, min(start + size, self._length))

    def close(self) -> None:
        """Give the temporary file back to the system; done by the garbage collector as well."""
        self._file.close()

    def __enter__(self) -> "Speech":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Sound:
    """A recording as it goes into the output file: its own rate up to 48 kHz, one or two channels, streamed.

    `sample_rate` (samples a second) and `channels` (1 or 2; more are mixed to stereo by ITU-R BS.775) are
    known at once; `blocks` decodes from the beginning each time it is called (of `from_blocks`, it calls what
    was given), which may be hours later: a file that has changed by then is refused. Nothing else is changed:
    what is silent or of opposite phase on one side stays so.
    """

    def __init__(self, path: str | Path, start: float = 0.0, duration: float | None = None) -> None:
        """The stretch of `duration` seconds from `start`, both as in `Speech.open`, with which it keeps step.

        Raises InputError: missing, a folder, empty, not media, no sound; the rest when it is decoded.
        """
        check_span(start, duration)
        found_at_first = _version(path)
        found = sound_format(path)
        self.sample_rate = output_rate(found.sample_rate)
        self.channels = min(found.channels, 2)
        mix: Mix = "mono" if self.channels == 1 else "stereo"

        def read() -> Iterator[Samples]:
            if _version(path) != found_at_first:
                raise InputError(
                    f"recording {path}: the file has changed since this run began. Put the former one back."
                )
            return stream_sound(path, self.sample_rate, mix, start, duration)

        self._read: Callable[[], Iterator[Samples]] = read

    @classmethod
    def from_array(cls, samples: ArrayLike, sample_rate: int) -> "Sound":
        """Sound from samples [n] or [n, 1 or 2] in [-1, 1].

        Raises InputError for NaN, infinity or another shape.
        """
        array = _as_channels(samples)
        if array.shape[1] > 2:
            raise InputError(f"sound of {array.shape[1]} channels: give one or two")
        rate = output_rate(sample_rate)
        return cls.from_blocks(lambda: _resample_array(array, sample_rate, rate), rate, array.shape[1])

    @classmethod
    def from_blocks(cls, read: Callable[[], Iterator[Samples]], sample_rate: int, channels: int) -> "Sound":
        """Sound as `read` gives it, in blocks [n, channels] at one of `SOUND_RATES`."""
        sound = cls.__new__(cls)
        sound.sample_rate, sound.channels, sound._read = sample_rate, channels, read
        return sound

    def blocks(self) -> Iterator[Samples]:
        """The sound in order, in blocks [n, channels] float32 clipped to [-1, 1].

        Raises InputError where the file has changed, or turns out to be cut off, damaged, or to hold NaN or
        infinite samples.
        """
        for block in self._read():
            yield np.clip(block, -1.0, 1.0)


class SoundTape:
    """The sound of a file in one pass: stretches of it, one after the other, however many they are.

    Each stretch is what `stream_sound` gives for it, without decoding again what lies before.

    Args:
        path, sample_rate, mix: as `stream_sound` takes them; without a mix, that of speech.
    """

    def __init__(self, path: str | Path, sample_rate: int, mix: Mix | None = None) -> None:
        self.sample_rate = sample_rate
        self._blocks = self._decode(path, mix)
        self._waiting: Samples = np.zeros((0, 1), np.float32)
        self._at = 0  # of the first sample that waits
        self._error: InputError | None = None

    def stretch(self, start: float, duration: float) -> Iterator[Samples]:
        """Blocks [n, 1 or 2] of `duration` seconds from `start`; less, or none, where the sound ends before.

        Raises:
            InputError: as `stream_sound`, where the sound cannot be read so far; then all later ones do.
            ValueError: a stretch before one that was read.
        """
        first = round(Fraction(start) * self.sample_rate)
        stop = first + round(Fraction(duration) * self.sample_rate)
        if first < self._at:
            raise ValueError(f"a stretch from {start:g} s: the tape is at {self._at / self.sample_rate:g} s")
        while self._at < stop:
            block = self._next()
            if block is None:
                return
            part, self._waiting = block[: stop - self._at], block[stop - self._at :]
            begin = max(first - self._at, 0)
            self._at += len(part)
            if begin < len(part):
                yield part[begin:]

    def _decode(self, path: str | Path, mix: Mix | None) -> Iterator[Samples]:
        if mix is None:
            try:
                mix = speech_mix(path)
            except InputError as error:
                logger.debug("%s: mixed as it is, for %s", path, error)
                mix = "mono"  # what can be read is read, up to where that error lies
        yield from stream_sound(path, self.sample_rate, mix)

    def _next(self) -> Samples | None:
        if self._error is not None:
            raise self._error
        if len(self._waiting):
            return self._waiting
        try:
            return next(self._blocks, None)
        except InputError as error:
            self._error = error
            raise


def speech_mix(path: str | Path, start: float = 0.0, duration: float | None = None) -> Mix:
    """How the channels of a recording become the one that the model hears.

    The mean of left and right (5.1 and 7.1 by ITU-R BS.775 first). One silent channel only halves the level,
    which the model normalises. Where left and right cancel each other (a microphone wired with opposite
    phase: the mean keeps less than a hundredth of the energy), the louder of the two is taken alone. The
    first minute decides, so that no one waits for the end of a long recording.

    Raises InputError as `stream_sound` does, for as much as is read.
    """
    if sound_format(path).channels == 1:
        return "mono"
    look = CANCELLED_LOOK if duration is None else min(duration, CANCELLED_LOOK)
    return _uncancelled_mix(stream_sound(path, SPEECH_RATE, "stereo", start, look), f"recording {path}")


def _uncancelled_mix(blocks: Iterable[Samples], name: str) -> Mix:
    """The mean of stereo blocks, or the louder channel where they cancel each other."""
    left = right = mean = 0.0
    for block in blocks:
        left += _energy(block[:, 0])
        right += _energy(block[:, 1])
        mean += _energy(block.mean(axis=1))
    if mean >= CANCELLED * max(left, right):
        return "mono"
    louder: Mix = "left" if left >= right else "right"
    logger.info("%s: left and right cancel each other; only the %s one is used", name, louder)
    return louder


def _version(path: str | Path) -> str:
    """What is another once a recording has been written again, and not when it was touched or copied. Raises
    InputError: it cannot be read."""
    try:
        return file_fingerprint(check_file(path, "recording"))
    except OSError as error:
        raise InputError(f"recording {path}: cannot be read ({reason_of(error)})") from error


def output_rate(sample_rate: int) -> int:
    return next((rate for rate in SOUND_RATES if rate >= sample_rate), SOUND_RATES[-1])


def _as_channels(samples: ArrayLike) -> Samples:
    array = np.asarray(samples)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] == 0 or array.dtype.kind != "f":
        raise InputError(
            f"sound must be floating-point samples [n] or [n, channels], not {array.dtype} {array.shape}"
        )
    # NaN fails the comparison as well.
    if array.size and not float(np.abs(array).max()) <= LARGEST_SAMPLE:
        raise InputError("sound with samples that are no numbers (NaN or infinite)")
    return array.astype(np.float32)


def _resample_array(array: Samples, rate_in: int, rate_out: int) -> Iterator[Samples]:
    if rate_in <= 0:
        raise InputError(f"a sample rate of {rate_in} is not possible")
    resampler = Resampler(rate_in, rate_out, array.shape[1])
    for start in range(0, len(array), 1 << 16):
        yield resampler.push(array[start : start + (1 << 16)])
    yield resampler.finish()


def _energy(samples: Samples) -> float:
    return float(np.square(samples, dtype=np.float64).sum())


def _no_room(error: OSError) -> StorageError:
    return StorageError(
        f"the decoded speech cannot be put into a temporary file ({reason_of(error)}). Make room, or set "
        "TMPDIR to a folder with room."
    )


def _discard(file: IO[bytes]) -> None:
    try:
        file.close()
    except OSError as error:
        # What could not be written is flushed once more on closing; the first error is the one to tell.
        logger.debug("closing the temporary file: %s", error)
