"""Sound out of any file as a stream of small blocks: down-mixed, resampled, in place on the time line.

What makes the length and the place of every sample right:

- Priming samples of AAC, MP3 and Opus are dropped where the file states them (FFmpeg does so while decoding);
  the padding at the end of AAC in MP4 is cut at the length the file states.
- The resampler is fed silence after the last sample and its tail is taken, then the result is cut to
  round(samples * new rate / old rate).
- In a video, time 0 is the start of picture or sound, whichever comes first: sound that begins later is
  preceded by silence. Holes between packets (pauses in browser recordings, bad packets) become silence.

A file that was cut off is an error where the format allows to know it: a header that states the length, or
an Ogg page that is not whole. Of MPEG transport streams (.ts) and bare AAC (.aac) it cannot be told: neither
states its length or marks its end.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import av.container
import numpy as np
from av.stream import Disposition
from numpy.typing import NDArray

from stableavatar.errors import InputError
from stableavatar.media.files import VIDEO_FORMATS, open_media, reason_of

logger = logging.getLogger(__name__)

Samples = NDArray[np.float32]
Mix = Literal["mono", "stereo", "left", "right"]
OggEnding = Literal["marked", "unmarked", "broken"]

# A step between packets below this is the rounding of time stamps (Matroska and FLV keep milliseconds).
SMALLEST_HOLE = Fraction(1, 20)
# Decoded sound is gathered into blocks of about this many samples before it is mixed and resampled.
BLOCK = 16384
# No sound has samples beyond this; NaN and infinity fail the comparison as well.
LARGEST_SAMPLE = 2.0**31
# Formats whose header states the length of the sound itself, so that a shorter file was cut off.
STATED_LENGTH = {"mov", "flac", "aiff", "caf", "tta", "ape", "wv", "w64"}
# Bytes of an Ogg page's header before its segment table, of the largest page, and the flag of the last one.
_PAGE_HEADER = 27
_LARGEST_PAGE = _PAGE_HEADER + 255 + 255 * 255
_LAST_OF_STREAM = 4

# (left, right) gains of ITU-R BS.775 by FFmpeg's channel names; low-frequency channels are left out.
_HALF = float(np.sqrt(0.5))
_GAINS = {
    **dict.fromkeys(("FL", "FLC", "WL", "DL", "SDL", "TFL"), (1.0, 0.0)),
    **dict.fromkeys(("FR", "FRC", "WR", "DR", "SDR", "TFR"), (0.0, 1.0)),
    **dict.fromkeys(("FC", "TFC", "TC", "BFC"), (_HALF, _HALF)),
    **dict.fromkeys(("SL", "BL", "TBL", "TSL"), (_HALF, 0.0)),
    **dict.fromkeys(("SR", "BR", "TBR", "TSR"), (0.0, _HALF)),
    **dict.fromkeys(("BC", "TBC"), (0.5, 0.5)),
    **dict.fromkeys(("LFE", "LFE2"), (0.0, 0.0)),
}
# WAV files without a channel mask: the order that two, six and eight channels have everywhere.
_USUAL = {2: "stereo", 6: "5.1", 8: "7.1"}


@dataclass(frozen=True)
class SoundFormat:
    """What a file's sound is like: samples a second and number of channels."""

    sample_rate: int
    channels: int


def mix_gains(channels: tuple[str, ...], mix: Mix) -> Samples:
    """Gains [channels in, channels out] from named channels to one or two, scaled so that nothing can clip.

    "mono" is the mean of left and right; "left" and "right" are the two halves of "stereo". Channels without
    known places (recorders with many microphones) count the same on both sides.
    """
    if len(channels) == 1:
        pairs = np.ones((1, 2), dtype=np.float32)
    elif any(name not in _GAINS for name in channels):
        usual = _USUAL.get(len(channels))
        if usual is not None:
            return mix_gains(tuple(channel.name for channel in av.AudioLayout(usual).channels), mix)
        pairs = np.ones((len(channels), 2), dtype=np.float32)
    else:
        pairs = np.array([_GAINS[name] for name in channels], dtype=np.float32)
    largest = float(pairs.sum(axis=0).max())
    pairs = pairs / largest if largest > 0 else np.full_like(pairs, 1 / len(channels))
    if mix == "stereo":
        return pairs
    if mix == "mono":
        return pairs.mean(axis=1, keepdims=True)
    return pairs[:, :1] if mix == "left" else pairs[:, 1:]


class Resampler:
    """Blocks [n, channels] float32 at one rate in, at another out; `finish` gives the rest, to the sample."""

    def __init__(self, rate_in: int, rate_out: int, channels: int) -> None:
        self._rate_in, self._rate_out, self._channels = rate_in, rate_out, channels
        self._layout = "mono" if channels == 1 else "stereo"
        self._resampler = av.AudioResampler(format="flt", layout=self._layout, rate=rate_out)
        self._taken = self._given = 0

    def push(self, block: Samples) -> Samples:
        """Take a block [n, channels]; return what is ready [m, channels], m may be 0."""
        self._taken += len(block)
        if self._rate_in == self._rate_out:
            self._given += len(block)
            return block
        return self._limit(self._run(block))

    def finish(self) -> Samples:
        """The samples [m, channels] still owed: in all, round(samples in * rate out / rate in) come out."""
        if self._rate_in == self._rate_out:
            return self._empty()
        # The filter looks ahead, and gives nothing at all for a few samples: silence pushes them through.
        tail = self._run(np.zeros((self._rate_in // 10 + 64, self._channels), dtype=np.float32))
        flushed = [self._array(frame) for frame in self._resampler.resample(None) if frame is not None]
        return self._limit(np.concatenate([tail, *flushed]), last=True)

    def _run(self, block: Samples) -> Samples:
        if not len(block):
            return self._empty()
        packed = np.ascontiguousarray(block, dtype=np.float32).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=self._layout)
        frame.sample_rate = self._rate_in
        parts = [self._array(result) for result in self._resampler.resample(frame)]
        return np.concatenate(parts) if parts else self._empty()

    def _limit(self, samples: Samples, last: bool = False) -> Samples:
        owed = round(Fraction(self._taken * self._rate_out, self._rate_in)) - self._given
        samples = samples[: max(owed, 0)]
        if last and len(samples) < owed:
            samples = np.concatenate([samples, np.zeros((owed - len(samples), self._channels), np.float32)])
        self._given += len(samples)
        return samples

    def _array(self, frame: "av.AudioFrame") -> Samples:
        return np.asarray(frame.to_ndarray(), dtype=np.float32).reshape(-1, self._channels)

    def _empty(self) -> Samples:
        return np.zeros((0, self._channels), dtype=np.float32)


def sound_format(path: str | Path) -> SoundFormat:
    """Sample rate and channels of a file's sound, from its header. Raises InputError as `open_media` does."""
    with open_media(path, "recording") as container:
        context = _sound_stream(container, path).codec_context
        return SoundFormat(context.sample_rate, context.layout.nb_channels)


def stream_sound(
    path: str | Path, sample_rate: int, mix: Mix, start: float = 0.0, duration: float | None = None
) -> Iterator[Samples]:
    """Decode the sound of `path` from `start` for `duration` seconds: blocks [n, 1 or 2] float32.

    Ends with the recording where that is shorter than `start + duration`. Raises InputError: missing, a
    folder, empty, not media, no sound, cut off, too damaged, NaN or infinite samples, `start` after the end.
    """
    check_span(start, duration)
    first = round(Fraction(start) * sample_rate)
    stop = None if duration is None else first + round(Fraction(duration) * sample_rate)
    position = 0
    reading = _Reading(path)
    for block in _checked(_resampled(reading, sample_rate, mix), path, sample_rate):
        begin, end = max(first - position, 0), None if stop is None else stop - position
        position += len(block)
        part = block[begin:end]
        if len(part):
            yield part
        if stop is not None and position >= stop:
            return
    reading.check()
    if position <= first and first > 0:
        raise InputError(
            f"recording {path}: a start at {start:g} s lies after its end, it has only "
            f"{position / sample_rate:.2f} s. Give an earlier start."
        )


def check_span(start: float, duration: float | None) -> None:
    """Raise InputError unless `start` (seconds) is 0 or more and `duration` None or above 0."""
    if not (np.isfinite(start) and start >= 0):
        raise InputError(f"a start of {start} s is not possible: give 0 or more seconds")
    if duration is not None and not (np.isfinite(duration) and duration > 0):
        raise InputError(f"a duration of {duration} s is not possible: give more than 0 seconds")


def _checked(blocks: Iterator[Samples], path: str | Path, sample_rate: int) -> Iterator[Samples]:
    position = 0
    for block in blocks:
        if len(block) and not float(np.abs(block).max()) <= LARGEST_SAMPLE:
            raise InputError(
                f"recording {path}: samples that are no numbers (NaN, infinite or beyond any sound) at about "
                f"{position / sample_rate:.2f} s. Export it again, as 16-bit WAV for example."
            )
        position += len(block)
        yield block


def _resampled(reading: "_Reading", sample_rate: int, mix: Mix) -> Iterator[Samples]:
    """The whole sound of a file, mixed and resampled; its format may change on the way (broadcasts do)."""
    resampler: Resampler | None = None
    current: tuple[int, tuple[str, ...]] | None = None
    gains = np.ones((1, 1), dtype=np.float32)
    for rate, names, raw in _gathered(reading):
        if current != (rate, names) or resampler is None:
            if resampler is not None:
                yield resampler.finish()
            current, gains = (rate, names), mix_gains(names, mix)
            resampler = Resampler(rate, sample_rate, gains.shape[1])
        yield resampler.push(raw @ gains)
    if resampler is not None:
        yield resampler.finish()


def _gathered(reading: "_Reading") -> Iterator[tuple[int, tuple[str, ...], Samples]]:
    """Decoded frames put together into larger blocks of one format, for speed."""
    current: tuple[int, tuple[str, ...]] | None = None
    waiting: list[Samples] = []
    count = 0
    for rate, names, raw in _decoded(reading):
        if waiting and current is not None and (current != (rate, names) or count >= BLOCK):
            yield *current, np.concatenate(waiting)
            waiting, count = [], 0
        current = (rate, names)
        waiting.append(raw)
        count += len(raw)
    if waiting and current is not None:
        yield *current, np.concatenate(waiting)


def _decoded(reading: "_Reading") -> Iterator[tuple[int, tuple[str, ...], Samples]]:
    """(sample rate, channel names, samples [n, channels]) frame by frame from time 0 on, holes filled."""
    path = reading.path
    with open_media(path, "recording") as container:
        stream = _sound_stream(container, path)
        reading.stated = _stated_seconds(container, stream, Path(path))
        if "ogg" in container.format.name.split(","):
            reading.ending = ogg_ending(Path(path))
        longest = None if container.duration is None else Fraction(container.duration, av.time_base) + 1
        end_of_file = _stated_end(container, stream)
        time: Fraction | None = None  # where the sound so far ends, in the stream's own time
        origin = Fraction(0)
        waiting: tuple[int, tuple[str, ...], Samples] | None = None
        for frame in _frames(container, stream, reading):
            if frame.samples == 0:
                continue
            rate, names = frame.sample_rate, tuple(channel.name for channel in frame.layout.channels)
            raw = decoded_samples(frame, path)
            stamp = None if frame.pts is None else frame.pts * Fraction(frame.time_base or 1)
            if time is None:
                stamp = stamp or Fraction(0)
                time = origin = min(stamp, _picture_start(container, stamp))
            at = time if stamp is None else stamp
            if waiting is not None:
                yield waiting
            hole = at - time
            leading = waiting is None
            if (hole > SMALLEST_HOLE or (leading and hole > 0)) and (
                # A jump beyond the end of the file is a fault of its time stamps and no pause.
                hole <= 10 if longest is None else at - origin <= longest
            ):
                yield from _silence(hole, rate, names)
                reading.seconds += 0 if leading else hole
            waiting = (rate, names, raw)
            time = at + Fraction(len(raw), rate)
            reading.seconds += Fraction(len(raw), rate)
        if waiting is not None:
            rate, names, raw = waiting
            if end_of_file is not None and time is not None and time > end_of_file:
                raw = raw[: max(len(raw) - round((time - end_of_file) * rate), 0)]
            yield rate, names, raw


@dataclass
class _Reading:
    """What was met while a file was read to its end; a caller who needs only its beginning does not ask."""

    path: str | Path
    packets: int = 0
    damaged: int = 0  # packets that cannot be decoded
    stated: Fraction | None = None  # seconds of sound by the header
    seconds: Fraction = Fraction(0)  # seconds of sound that were decoded
    ending: OggEnding = "marked"  # how an Ogg file ends
    end: Fraction = Fraction(0)  # seconds: where the last packet of any stream ends, where that is looked at

    def check(self) -> None:
        """Raise InputError for a file that is cut off or damaged; a few bad packets are normal (MP3 tags)."""
        if self.damaged and (self.seconds == 0 or self.damaged > max(3, self.packets // 50)):
            raise InputError(
                f"recording {self.path}: damaged, {self.damaged} of its {self.packets} packets cannot "
                "be decoded. Fetch the file again or export it anew."
            )
        if self.damaged:
            logger.warning(
                "recording %s: %d of %d packets of sound cannot be decoded; silence takes their place",
                self.path,
                self.damaged,
                self.packets,
            )
        there = max(self.seconds, self.end)
        if self.ending == "unmarked":
            logger.warning(
                "recording %s: its last Ogg page is not marked as the end; unless the program that wrote it "
                "never does so, something is missing after %.1f s",
                self.path,
                float(there),
            )
        if self.ending == "broken":
            why = "it ends within an Ogg page and"
        elif self.stated is not None and self.stated - there > max(0.03, min(0.5, 0.05 * float(self.stated))):
            why = f"its header promises {float(self.stated):.1f} s but"
        else:
            return
        raise InputError(
            f"recording {self.path}: cut off, {why} only {float(there):.1f} s could be read. Fetch the whole "
            f"file again, or use what is there with a duration of at most {int(there * 10) / 10:g} s."
        )


def _frames(container: Any, stream: Any, reading: _Reading) -> Iterator["av.AudioFrame"]:
    # Matroska states one length for the whole file: all of it has to be seen to know that nothing is missing.
    whole = "matroska" in container.format.name.split(",")
    try:
        for packet in container.demux() if whole else container.demux(stream):
            if whole and packet.pts is not None:
                end = (packet.pts + (packet.duration or 0)) * Fraction(packet.time_base)
                reading.end = max(reading.end, end)
            if packet.stream.index != stream.index:
                continue
            reading.packets += packet.size > 0
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                reading.damaged += 1
                continue
            except EOFError:
                return
            yield from frames
    except av.FFmpegError as error:
        raise InputError(
            f"recording {reading.path}: reading stopped in the middle ({reason_of(error)}). "
            "Fetch the file again."
        ) from error


def _sound_stream(container: Any, path: str | Path) -> Any:
    stream = container.streams.best("audio")
    if stream is None and VIDEO_FORMATS & set(container.format.name.split(",")):
        raise InputError(f"recording {path}: has no sound, only pictures. Name a file with sound.")
    if stream is None:
        raise InputError(
            f"recording {path}: not a sound or video file. Name a recording, or a video with sound."
        )
    if stream.codec_context is None:
        raise InputError(f"recording {path}: its kind of sound is not known. Convert it to WAV or MP3.")
    return stream


def picture_delay(path: str | Path) -> float:
    """Seconds from time 0 of a recording, where picture or sound begin, to its picture; 0 where it has none.

    Raises InputError: missing, a folder, empty, not media, no sound.
    """
    with open_media(path, "recording") as container:
        stream = _sound_stream(container, path)
        sound = (stream.start_time or 0) * Fraction(stream.time_base)
        return float(max(_picture_start(container, sound) - sound, Fraction(0)))


def _picture_start(container: Any, otherwise: Fraction) -> Fraction:
    """When the moving picture of a file starts (a cover picture is none)."""
    for stream in container.streams.video:
        if stream.disposition & Disposition.attached_pic or stream.start_time is None:
            continue
        return stream.start_time * Fraction(stream.time_base)
    return otherwise


def decoded_samples(frame: "av.AudioFrame", path: str | Path) -> Samples:
    """A frame's samples [n, channels] as float32 in [-1, 1]."""
    try:
        if frame.format.is_planar and frame.layout.nb_channels >= 8:
            # PyAV finds the end of the planes by a null pointer, which is missing after the eighth.
            (frame,) = av.AudioResampler(format="flt").resample(frame)
        array = frame.to_ndarray()
    except (ValueError, KeyError) as error:
        raise InputError(
            f"recording {path}: samples of the kind {frame.format.name!r} cannot be read. "
            "Export it as 16-bit WAV."
        ) from error
    channels = frame.layout.nb_channels
    array = array.T if frame.format.is_planar else array.reshape(-1, channels)
    if array.dtype == np.uint8:
        return np.asarray((array.astype(np.float32) - 128) / 128, np.float32)
    if array.dtype.kind == "i":
        return np.asarray(array.astype(np.float32) / 2.0 ** (8 * array.dtype.itemsize - 1), np.float32)
    # A double beyond float32 becomes infinite here, and is refused later as what it is.
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _silence(
    seconds: Fraction, rate: int, names: tuple[str, ...]
) -> Iterator[tuple[int, tuple[str, ...], Samples]]:
    left = round(seconds * rate)
    while left > 0:
        count = min(left, BLOCK)
        yield rate, names, np.zeros((count, len(names)), dtype=np.float32)
        left -= count


def _stated_end(container: Any, stream: Any) -> Fraction | None:
    """The end of the sound by an MP4's edit list, in the stream's time; what follows it is padding."""
    if "mp4" not in container.format.name.split(",") or stream.duration is None:
        return None
    return (stream.duration + (stream.start_time or 0)) * Fraction(stream.time_base)


def _stated_seconds(container: Any, stream: Any, path: Path) -> Fraction | None:
    """How long the sound should be by the file's own header; None where no header says so reliably.

    FFmpeg's figures for some formats are estimates from the size of the file: a cut file agrees with them.
    """
    names = set(container.format.name.split(","))
    if "wav" in names:
        return _stated_by_wav(path)
    if "matroska" in names:
        return None if container.duration is None else Fraction(container.duration, av.time_base)
    if stream.duration is None or not (
        names & STATED_LENGTH or ("mp3" in names and _mp3_states_length(path))
    ):
        return None
    return stream.duration * Fraction(stream.time_base)


def _stated_by_wav(path: Path) -> Fraction | None:
    with path.expanduser().open("rb") as file:
        if file.read(4) != b"RIFF":
            return None
        file.seek(12)
        byte_rate = 0
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little")
            if head[:4] == b"data":
                # A program that writes to a pipe cannot know the size: nothing, or about the largest number.
                known = 0 < size < 0x7FFFF000 and byte_rate > 0
                return Fraction(size, byte_rate) if known else None
            chunk = file.tell()
            if head[:4] == b"fmt ":
                byte_rate = int.from_bytes(file.read(16)[8:12], "little")
            file.seek(chunk + size + size % 2)
    return None


def ogg_ending(path: Path) -> OggEnding:
    """How an Ogg file ends: with a page "marked" as its stream's last, with an "unmarked" one, or "broken".

    An unmarked one alone is no proof of a cut: Android's writer, and with it messengers and call recorders,
    never marks the end. A file that is cut anywhere but between two pages (RFC 3533, section 6) is broken.
    """
    with path.expanduser().open("rb") as file:
        file.seek(max(file.seek(0, 2) - 2 * _LARGEST_PAGE, 0))
        tail = file.read()
    # Version 0 follows; the pattern alone may occur in the sound.
    start = tail.rfind(b"OggS\0")
    if start < 0:
        return "broken"
    header = tail[start : start + _PAGE_HEADER]
    segments = tail[start + _PAGE_HEADER :][: header[-1]]
    length = _PAGE_HEADER + len(segments) + sum(segments)
    if len(header) < _PAGE_HEADER or len(segments) < header[-1] or len(tail) - start < length:
        return "broken"
    return "marked" if header[5] & _LAST_OF_STREAM else "unmarked"


def _mp3_states_length(path: Path) -> bool:
    """Whether an MP3 has a Xing or Info header, which counts its frames."""
    with path.expanduser().open("rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3" and len(head) == 10:
            size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
            file.seek(10 + size)
        else:
            file.seek(0)
        head = file.read(4096)
    return b"Xing" in head or b"Info" in head
