"""Single steps from a video to a clip folder: its sound, its frames."""

import shutil
from pathlib import Path

from PIL import Image

from stableavatar.errors import InputError
from stableavatar.media.audio import SPEECH_RATE, speech_mix
from stableavatar.media.decoding import stream_sound
from stableavatar.media.files import cannot_write, check_parent, hidden_name
from stableavatar.media.reading import read_frames
from stableavatar.media.wav import write_wav


def extract_audio(video: Path, output: Path) -> float:
    """Write the sound of a video (or any recording) as mono WAV at 16 kHz, from the first picture on; the
    seconds written.

    Raises:
        InputError: it cannot be read or has no sound, or the output cannot be written.
    """
    return write_wav(output, stream_sound(video, SPEECH_RATE, speech_mix(video)), SPEECH_RATE, 1)


def extract_frames(video: Path, folder: Path) -> int:
    """Write the frames of a video as `frame_0.png`, `frame_1.png` and on; how many.

    The folder gets its name when all are there.

    Raises:
        InputError: the video cannot be read, or the folder is not empty or cannot be written.
    """
    target = folder.expanduser().absolute()
    check_parent(target, folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"output {folder}: is not empty. Name a new or an empty folder.")
    partial = target.with_name(hidden_name(target.name, "partial"))
    count = 0
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for frame in read_frames(video):
            Image.fromarray(frame).save(partial / f"frame_{count}.png", compress_level=3)
            count += 1
        if target.is_dir():
            target.rmdir()
        partial.replace(target)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count
