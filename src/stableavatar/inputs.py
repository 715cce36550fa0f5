"""Portrait and speech in every form in which they may be given, and the length and windows that follow."""

from collections.abc import Iterable
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stableavatar.errors import InputError
from stableavatar.media.audio import SPEECH_RATE, Sound, Speech
from stableavatar.media.image import check_size, convert_picture, read_picture
from stableavatar.media.live import LiveRecording, LiveSound, LiveSpeech, follow_speech
from stableavatar.media.reading import Frame
from stableavatar.media.timing import frame_count
from stableavatar.options import GenerateOptions, Settings
from stableavatar.sampling.windows import GrowingPlan, Plan, latent_frames_for, plan_windows

Portrait = str | Path | Image.Image | Frame
SpeechInput = str | Path | NDArray[np.float32] | LiveRecording | Iterable[NDArray[np.float32]]


def read_portrait(portrait: Portrait) -> Frame:
    """The picture, uint8 `[H, W, 3]`. Raises InputError where it cannot be read or used."""
    if isinstance(portrait, str | Path):
        return read_picture(portrait)
    if isinstance(portrait, Image.Image):
        return convert_picture(portrait, "the portrait")
    if portrait.ndim != 3 or portrait.shape[2] != 3 or portrait.dtype != np.uint8:
        raise InputError(
            "a portrait given as an array must be uint8 [H, W, 3], "
            f"not {portrait.dtype} {list(portrait.shape)}"
        )
    check_size("the portrait", portrait.shape[1], portrait.shape[0])
    return portrait


def as_live(speech: SpeechInput | None, options: GenerateOptions) -> SpeechInput | None:
    """An iterator of samples as a `LiveRecording`; every other speech as it is.

    Raises:
        InputError: an option that speech that is still arriving cannot have.
    """
    if speech is None or isinstance(speech, str | Path | np.ndarray):
        return speech
    if options.start:
        raise InputError("start cannot be used with speech that is still arriving: leave it at 0")
    if not isinstance(speech, LiveRecording):
        return LiveRecording(speech, duration=options.duration)
    if options.duration is not None:
        raise InputError("give the duration to the LiveRecording, where it is made")
    return speech


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
    first = round(options.start * SPEECH_RATE)
    if first and first >= len(samples):
        raise InputError(
            f"a start at {options.start:g} s lies after the speech's end, it has only "
            f"{len(samples) / SPEECH_RATE:.2f} s"
        )
    last = None if options.duration is None else first + round(options.duration * SPEECH_RATE)
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
    if speech.wait_frames(max(4 * (wanted - 2) + 2, 1), fps):
        return None
    assert speech.length is not None
    frames = frame_count(speech.length, SPEECH_RATE, fps)
    if frames < 1:
        raise _too_short(f"the speech ({speech.length / SPEECH_RATE:.3f} s)", fps)
    return latent_frames_for(frames)


def _frames(recording: Speech | None, options: Settings) -> int:
    """Frames of the video: of the duration that was asked for, else of the recording."""
    fps = options.frame_rate
    if options.duration is not None:  # silence follows a shorter recording
        samples, what = round(Fraction(options.duration) * SPEECH_RATE), f"a duration of {options.duration} s"
    elif recording is not None:
        samples, what = len(recording), f"the speech ({recording.seconds:.3f} s)"
    else:
        raise InputError("a video without speech needs a duration")
    if Fraction(samples, SPEECH_RATE) * fps < 1:
        raise _too_short(what, fps)
    return frame_count(samples, SPEECH_RATE, fps)


def _too_short(what: str, fps: Fraction) -> InputError:
    return InputError(f"{what} is shorter than a frame ({float(1 / fps):.3f} s): give a longer one")
