"""Portrait and speech in every form in which they may be given, and the length and windows that follow."""

import math
from array import array
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import partial
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from stableavatar.errors import InputError
from stableavatar.media.audio import SPEECH_RATE, Sound, Speech
from stableavatar.media.files import refuse_source
from stableavatar.media.image import check_size, convert_picture, read_picture
from stableavatar.media.live import LiveRecording, LiveSound, LiveSpeech, follow_speech
from stableavatar.media.reading import Frame
from stableavatar.media.timing import frame_count
from stableavatar.options import GenerateOptions, Settings
from stableavatar.sampling.windows import GrowingPlan, Plan, latent_frames_for, plan_windows
from stableavatar.unfinished import unfinished_video

Portrait = str | Path | Image.Image | Frame
SpeechInput = str | Path | NDArray[np.float32] | torch.Tensor | LiveRecording | Iterable[NDArray[np.float32]]


def refuse_inputs(output: Path, portrait: Portrait, speech: SpeechInput | None) -> None:
    """Raise InputError where a video, or what an interrupted run leaves of it, would take the place of a file
    that it is made of."""
    for role, given in (("portrait", portrait), ("recording", speech)):
        if isinstance(given, str | Path):
            for target in (output, unfinished_video(output)):
                refuse_source(target, Path(given).expanduser(), role)


def read_portrait(portrait: Portrait) -> Frame:
    """The picture, uint8 `[H, W, 3]`. Raises InputError where it cannot be read or used."""
    if isinstance(portrait, str | Path):
        return read_picture(portrait)
    if isinstance(portrait, Image.Image):
        return convert_picture(portrait, "the portrait")
    if not isinstance(portrait, np.ndarray):
        raise InputError(
            f"a portrait cannot be {_kind(portrait)}: give a file, a Pillow image, or an array uint8 "
            "[H, W, 3]"
        )
    if portrait.ndim != 3 or portrait.shape[2] != 3 or portrait.dtype != np.uint8:
        raise InputError(
            "a portrait given as an array must be uint8 [H, W, 3], "
            f"not {portrait.dtype} {list(portrait.shape)}"
        )
    check_size("the portrait", portrait.shape[1], portrait.shape[0])
    return portrait


def as_live(speech: SpeechInput | None, options: GenerateOptions) -> SpeechInput | None:
    """An iterator of samples as a `LiveRecording`, a tensor as an array; every other speech as it is.

    Raises:
        InputError: it is no speech; an option that speech that is still arriving cannot have.
    """
    if isinstance(speech, torch.Tensor):
        samples = speech.detach().cpu()
        return (samples.float() if samples.is_floating_point() else samples).numpy()
    if speech is None or isinstance(speech, str | Path | np.ndarray):
        return speech
    if not isinstance(speech, LiveRecording):
        _check_blocks(speech)
    if options.start:
        raise InputError("start cannot be used with speech that is still arriving: leave it at 0")
    if not isinstance(speech, LiveRecording):
        return LiveRecording(speech, duration=options.duration)
    if options.duration is not None:
        raise InputError("give the duration to the LiveRecording, where it is made")
    return speech


def _check_blocks(speech: Any) -> None:
    """Raise InputError unless this may be an iterator of blocks of samples."""
    numbers = isinstance(speech, Sequence | array | memoryview) and any(
        isinstance(value, Real) for value in islice(speech, 1)
    )
    if numbers or not isinstance(speech, Iterable):
        raise InputError(
            f"speech cannot be {_kind(speech)}{' of numbers' if isinstance(speech, list | tuple) else ''}: "
            "give a file, a numpy array of mono samples at 16 kHz, or an iterator of such arrays"
        )


def _kind(value: Any) -> str:
    """What something is, for errors."""
    return "None" if value is None else f"of type {type(value).__name__}"


def open_speech(
    speech: SpeechInput | None, options: GenerateOptions, *, follow: bool = False
) -> Speech | LiveSpeech | None:
    """What the model hears; to be closed.

    Args:
        follow: a file may be read as it is needed. It is where nothing else needs to know its end: then the
            first frames, which in causal order need one window, do not wait for the reading of all of it.

    Raises:
        InputError: it cannot be read or used.
    """
    if speech is None:
        if options.start:
            raise InputError(f"start {options.start:g}: a video without speech has nothing to begin in")
        return None
    if isinstance(speech, LiveRecording):
        return speech.speech
    if isinstance(speech, str | Path):
        if follow and _needs_no_end(options):
            return follow_speech(speech, start=options.start, duration=options.duration)
        return Speech.open(speech, SPEECH_RATE, start=options.start, duration=options.duration)
    assert isinstance(speech, np.ndarray)
    return Speech.from_array(_cut(speech, options), SPEECH_RATE)


def _needs_no_end(options: GenerateOptions) -> bool:
    return (
        options.order == "causal"
        and options.batch_windows == 1
        and options.speech_normalisation == "window"
        and options.compat is None
    )


def _cut(samples: NDArray[np.float32], options: GenerateOptions) -> NDArray[np.float32]:
    first = round(Fraction(options.start) * SPEECH_RATE)
    if first and first >= len(samples):
        raise InputError(
            f"a start at {options.start:g} s lies after the speech's end, it has only "
            f"{len(samples) / SPEECH_RATE:.2f} s"
        )
    last = None if options.duration is None else first + round(Fraction(options.duration) * SPEECH_RATE)
    return samples[first:last]


def open_sound(speech: SpeechInput | None, options: GenerateOptions) -> Sound | LiveSound | None:
    """What the output file has for sound, at its own rate."""
    if speech is None:
        return None
    if isinstance(speech, LiveRecording):
        return speech.sound
    if isinstance(speech, str | Path):
        return Sound(speech, options.start, options.duration)
    assert isinstance(speech, np.ndarray)
    return Sound.from_array(_cut(speech, options), SPEECH_RATE)


def plan_video(recording: Speech | LiveSpeech | None, options: Settings) -> tuple[int | None, Plan]:
    """Frames of the video, None while they are not known, and its windows.

    Raises:
        InputError: the video would have no frame, or speech that is still arriving cannot have these options.
    """
    window = latent_frames_for(options.window)
    if isinstance(recording, LiveSpeech):
        if options.speech_normalisation == "recording":
            raise InputError(
                "the loudness of a whole recording is not known while it arrives: leave speech-normalisation "
                "at window"
            )
        if options.compat is not None or options.order == "lockstep":
            raise InputError(
                "speech that is still arriving needs the order wavefront or causal, without compat"
            )
        if options.order == "causal" and options.batch_windows > 1:
            raise InputError(
                "in causal order several windows at once would wait for the speech of all of them: leave "
                "batch-windows at 1 while it is arriving"
            )
        return None, GrowingPlan(
            window, options.overlap, partial(_live_latents, recording, options.frame_rate)
        )
    frames = _frames(recording, options)
    if options.compat == "upstream":
        frames = (frames - 1) // 4 * 4 + 1
    return frames, plan_windows(latent_frames_for(frames), window, options.overlap, compat=options.compat)


def check_sharing(recording: Speech | LiveSpeech | None, options: Settings, processes: int) -> None:
    """Raise InputError where so many processes cannot share a video."""
    if isinstance(recording, LiveSpeech):
        raise InputError("speech that is still arriving is spoken by one process: start it without torchrun")
    if options.order == "lockstep":
        raise InputError("processes share a video in wavefront order (the same frames), or in causal order")
    if processes > options.steps:
        raise InputError(
            f"{options.steps} steps have work for {options.steps} processes at most; there are {processes}"
        )


def _live_latents(speech: LiveSpeech, fps: Fraction, wanted: int) -> int | None:
    """See `GrowingPlan`: waits for the first frame that needs so many latent frames."""
    if not speech.wait(math.ceil(SPEECH_RATE / fps)):
        assert speech.length is not None
        raise _too_short(f"the speech ({speech.length / SPEECH_RATE:.7g} s)", fps)
    if speech.wait_frames(max(4 * (wanted - 2) + 2, 1), fps):
        return None
    assert speech.length is not None
    return latent_frames_for(frame_count(speech.length, SPEECH_RATE, fps))


def _frames(recording: Speech | None, options: Settings) -> int:
    """Frames of the video: of the duration that was asked for, else of the recording."""
    fps = options.frame_rate
    if options.duration is not None:  # silence follows a shorter recording
        samples, what = round(Fraction(options.duration) * SPEECH_RATE), f"a duration of {options.duration} s"
    elif recording is not None:
        samples, what = len(recording), f"the speech ({recording.seconds:.7g} s)"
    else:
        raise InputError("a video without speech needs a duration")
    if Fraction(samples, SPEECH_RATE) * fps < 1:
        raise _too_short(what, fps)
    return frame_count(samples, SPEECH_RATE, fps)


def _too_short(what: str, fps: Fraction) -> InputError:
    return InputError(f"{what} is shorter than a frame ({float(1 / fps):.7g} s): give a longer one")
