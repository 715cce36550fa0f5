"""Sound into a WAV file of 16 bits, streamed; complete under its name or not there."""

import math
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from stableavatar.errors import InputError
from stableavatar.media.audio import Samples
from stableavatar.media.files import cannot_write, check_parent, partial_name, to_disk

_LARGEST = 2**15 - 1
_LARGEST_RIFF = 2**32 - 1
"""Bytes that a RIFF header can tell of."""


def write_wav(
    path: str | Path,
    blocks: Iterable[Samples],
    sample_rate: int,
    channels: int,
    *,
    most_seconds: float = math.inf,
) -> float:
    """Write blocks [n, channels] of samples in [-1, 1]; what lies beyond is cut. Beyond 4 GiB the file is an
    RF64 (EBU Tech 3306).

    Returns:
        The length in seconds.

    Raises:
        InputError: the name does not end in .wav, its folder is missing, it cannot be written, or the sound
            has no samples or is longer than `most_seconds`.
    """
    target = Path(path).expanduser().absolute()
    if target.suffix.lower() != ".wav":
        raise InputError(f"output {path}: only WAV is written here. Let the name end in .wav.")
    check_parent(target, path)
    partial = target.with_name(partial_name(target.stem, "partial.wav"))
    count = 0
    try:
        with partial.open("wb") as file:
            file.write(_header(sample_rate, channels, 0))
            for block in blocks:
                values = (np.clip(block, -1, 1) * _LARGEST).round().astype("<i2")
                count += len(block)
                if count > most_seconds * sample_rate:
                    raise InputError(
                        f"the sound is longer than {most_seconds:g} s, which is the most that is taken"
                    )
                file.write(values.tobytes())
            if not count:
                raise InputError("the recording holds no sound")
            file.seek(0)
            file.write(_header(sample_rate, channels, count))
        to_disk(partial)
        partial.replace(target)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        partial.unlink(missing_ok=True)
    return count / sample_rate


def _header(sample_rate: int, channels: int, count: int) -> bytes:
    """What comes before `count` samples a channel, of one length for RIFF and RF64."""
    frame = 2 * channels
    size = count * frame
    whole = 72 + size  # of the file, without its first two fields
    described = struct.pack(
        "<4sIHHIIHH", b"fmt ", 16, 1, channels, sample_rate, sample_rate * frame, frame, 16
    )
    if whole <= _LARGEST_RIFF:
        begun = struct.pack("<4sI4s4sI28x", b"RIFF", whole, b"WAVE", b"JUNK", 28)
        return begun + described + struct.pack("<4sI", b"data", size)
    unknown = 2**32 - 1  # the sizes are those of ds64
    begun = struct.pack("<4sI4s4sIQQQI", b"RF64", unknown, b"WAVE", b"ds64", 28, whole, size, count, 0)
    return begun + described + struct.pack("<4sI", b"data", unknown)
