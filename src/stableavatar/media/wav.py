"""Sound into a WAV file of 16 bits, streamed; complete under its name or not there."""

import math
import wave
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from stableavatar.errors import InputError
from stableavatar.media.audio import Samples
from stableavatar.media.files import cannot_write, check_parent, partial_name, to_disk

_LARGEST = 2**15 - 1


def write_wav(
    path: str | Path,
    blocks: Iterable[Samples],
    sample_rate: int,
    channels: int,
    *,
    most_seconds: float = math.inf,
) -> float:
    """Write blocks [n, channels] of samples in [-1, 1]; what lies beyond is cut.

    Returns:
        The length in seconds.

    Raises:
        InputError: the name does not end in .wav, its folder is missing, it cannot be written, or the sound
            is longer than `most_seconds`.
    """
    target = Path(path).expanduser().absolute()
    if target.suffix.lower() != ".wav":
        raise InputError(f"output {path}: only WAV is written here. Let the name end in .wav.")
    check_parent(target, path)
    partial = target.with_name(partial_name(target.stem, "partial.wav"))
    count = 0
    try:
        with wave.open(str(partial), "wb") as file:
            file.setnchannels(channels)
            file.setsampwidth(2)
            file.setframerate(sample_rate)
            for block in blocks:
                values = (np.clip(block, -1, 1) * _LARGEST).round().astype("<i2")
                count += len(block)
                if count > most_seconds * sample_rate:
                    raise InputError(
                        f"the sound is longer than {most_seconds:g} s, which is the most that is taken"
                    )
                file.writeframes(values.tobytes())
        to_disk(partial)
        partial.replace(target)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        partial.unlink(missing_ok=True)
    return count / sample_rate
