"""Files and options that strangers send: refused unless they can be used, before anything waits for them.

Files are decoded in a process of their own, with little memory and little time, so that one that breaks a
decoder breaks nothing else. Their names are never used: a job's files have names of ours.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from stableavatar.choices import Order
from stableavatar.errors import InputError, StableAvatarError
from stableavatar.jobs.apart import kill_process, start_process
from stableavatar.jobs.quotas import Quotas, check_limit
from stableavatar.options import GenerateOptions, OutputOptions, SamplingDefaults, Settings

# What a request may choose. The others concern the machine (devices, memory, windows) or comparisons.
OPTIONS = (
    "prompt", "negative_prompt", "width", "height", "aspect", "fit", "steps", "guidance", "text_scale",
    "audio_scale", "overlap", "overlap_weights", "order", "step_cache", "seed", "fps", "start", "duration",
    "speech_normalisation",
)  # fmt: skip
# Lockstep keeps all of a video in memory to its end.
ORDERS: tuple[Order, ...] = ("wavefront", "causal")

# Requests that wait for their files to be looked at hold a thread each.
_MOST_CHECKS = 60
# Fewer samples a second are no speech, and make files of hours out of little.
_LEAST_RATE = 4000


@dataclass(frozen=True)
class Limits:
    """What is taken at most.

    Attributes:
        upload_bytes: of a request with its files. seconds: of a video. portrait_pixels: of the picture that
            is sent. video_pixels: of a frame that is made.
        steps: of denoising. fps: frames a second. prompt: characters.
        quotas: how many videos are taken.
        check_seconds: that the looking at files may take.
    """

    upload_bytes: int = 200_000_000
    seconds: float = 600.0
    portrait_pixels: int = 40_000_000
    video_pixels: int = 832 * 480
    steps: int = 100
    fps: float = 60.0
    prompt: int = 4000
    quotas: Quotas = field(default_factory=Quotas)
    check_seconds: float = 30.0

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name != "quotas":
                check_limit(f.name, getattr(self, f.name))


@dataclass(frozen=True)
class Found:
    """What was found in the files of a request.

    Attributes:
        seconds: of the video that they make. width, height: of the portrait, in pixels.
    """

    seconds: float
    width: int
    height: int


def check_options(values: Mapping[str, Any], limits: Limits) -> GenerateOptions:
    """Options of a request, within the limits.

    Raises:
        InputError: a value that cannot be, or is above a limit.
    """
    for name in values:
        if name not in OPTIONS:
            raise InputError(f"there is no option {name}")
    options = GenerateOptions(**values)
    if options.order not in ORDERS:
        raise InputError(f"order {options.order!r}: choose one of {', '.join(ORDERS)}")
    for name, most in (("steps", limits.steps), ("fps", limits.fps), ("duration", limits.seconds)):
        value = getattr(options, name)
        if value is not None and value > most:
            raise InputError(f"{name} {value:g} is too large: {most:g} at most")
    for name in ("prompt", "negative_prompt"):
        if len(getattr(options, name) or "") > limits.prompt:
            raise InputError(f"{name.replace('_', ' ')}: {limits.prompt} characters at most")
    if options.width is not None and options.height is not None:
        pixels = options.width * options.height
        if pixels > limits.video_pixels:
            raise InputError(
                f"{options.width}x{options.height} are {pixels} pixels: {limits.video_pixels} at most"
            )
    return options


def check_quality(value: int | None) -> int:
    """H.264 quality of a request, the default if None. Raises InputError: it cannot be."""
    return OutputOptions().quality if value is None else OutputOptions(quality=value).quality


class BusyError(StableAvatarError):
    """So many files wait to be looked at that these are not."""


class EndingError(StableAvatarError):
    """The server ends, and takes nothing more."""


class FileChecker:
    """Looks at files in a process of its own, one after the other; owners take turns.

    Args:
        defaults: of the model that will make the videos: what it cannot make is refused too.
    """

    def __init__(self, limits: Limits, defaults: SamplingDefaults | None = None) -> None:
        self.limits = limits
        self.defaults = defaults
        self._turns = _Turns(_MOST_CHECKS)
        self._asking: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None
        self._closed = False

    @contextlib.contextmanager
    def asking(self, owner: str) -> Iterator[None]:
        """A request of an owner, from before its files are copied on. Raises BusyError: he has as many as
        videos of his may wait."""
        with self._lock:
            if self._asking[owner] >= self.limits.quotas.waiting_each:
                raise BusyError("Many files of yours are being looked at. Ask again in a moment.")
            self._asking[owner] += 1
        try:
            yield
        finally:
            with self._lock:
                self._asking[owner] -= 1
                self._asking += Counter()  # without those that have none

    def check(self, owner: str, portrait: Path, speech: Path | None, options: GenerateOptions) -> Found:
        """See that a portrait and a recording can be used; called from any thread.

        Raises:
            InputError: one cannot, is above a limit, or breaks what looks at it.
            BusyError: too many wait for this.
            EndingError: the server ends.
        """
        with self._turns.turn(owner):
            for _ in range(2):  # the process may have been lost before it came to these files
                if self._closed:
                    raise EndingError("the server ends: send the files again later")
                try:
                    work = self._processes().submit(look_at_files, portrait, speech, options, self.limits)
                    return work.result(self.limits.check_seconds)
                except TimeoutError:
                    self._end()
                    raise InputError(
                        f"the files could not be read within {self.limits.check_seconds:g} s. Send smaller "
                        "ones, such as JPEG and WAV."
                    ) from None
                except (BrokenProcessPool, CancelledError):
                    self._end()
            raise InputError(
                "one of the files cannot be read. Save the portrait as JPEG or PNG, and the recording as WAV."
            )

    def check_options(self, options: GenerateOptions, found: Found) -> None:
        """Raise InputError where the model cannot make what the options ask for of such a portrait, or its
        own size is above the limit."""
        if self.defaults is None:
            return
        made = Settings.resolve(options, self.defaults, picture=(found.width, found.height), seed=0)
        if made.width * made.height > self.limits.video_pixels:
            raise InputError(
                f"{made.width}x{made.height}, this model's size, are {made.width * made.height} pixels: "
                f"{self.limits.video_pixels} at most. Give a smaller size."
            )

    def close(self) -> None:
        """End the process; who waits is refused."""
        self._closed = True
        self._end()

    def _processes(self) -> ProcessPoolExecutor:
        """The one process, started where there is none."""
        if self._pool is None:
            self._pool = start_process()
        return self._pool

    def _end(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            kill_process(pool)


class _Turns:
    """One at a time, and of those who wait the one whose owner was served longest ago."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._changed = threading.Condition()
        self._waiting: list[tuple[object, str]] = []
        self._busy = False
        self._served: dict[str, int] = {}
        self._count = 0

    @contextlib.contextmanager
    def turn(self, owner: str) -> Iterator[None]:
        """Wait for a turn. Raises BusyError: too many do."""
        ticket = (object(), owner)
        with self._changed:
            if len(self._waiting) >= self._most:
                raise BusyError("Many files are being looked at. Ask again in a moment.")
            self._waiting.append(ticket)
            while self._busy or self._next() is not ticket:
                self._changed.wait()
            self._waiting.remove(ticket)
            self._busy = True
            self._count += 1
            self._served[owner] = self._count
        try:
            yield
        finally:
            with self._changed:
                self._busy = False
                if not self._waiting:
                    self._served.clear()
                self._changed.notify_all()

    def _next(self) -> tuple[object, str]:
        return min(self._waiting, key=lambda ticket: self._served.get(ticket[1], 0))


def look_at_files(portrait: Path, speech: Path | None, options: GenerateOptions, limits: Limits) -> Found:
    """See `FileChecker.check`; errors do not name the folder."""
    from stableavatar.media.audio import SPEECH_RATE
    from stableavatar.media.decoding import sound_format, stream_sound
    from stableavatar.media.image import read_picture

    try:
        picture = read_picture(portrait, most_pixels=limits.portrait_pixels)
        duration = seconds = options.duration
        if speech is not None:
            most = limits.seconds if duration is None else duration
            samples = 0
            if (rate := sound_format(speech).sample_rate) < _LEAST_RATE:
                raise InputError(f"the speech has {rate} samples a second: {_LEAST_RATE} at least")
            # Half a second more than may be, so that a longer one is told from one that just fits.
            for block in stream_sound(speech, SPEECH_RATE, "mono", options.start, most + 0.5):
                samples += len(block)
            if duration is None:
                seconds = samples / SPEECH_RATE
                if seconds > limits.seconds:
                    raise InputError(
                        f"the speech is longer than {limits.seconds:g} s, which is the most that is taken. "
                        "Send less, or give a duration."
                    )
    except InputError as error:
        raise InputError(without_folder(str(error), portrait.parent)) from None
    except MemoryError:
        raise InputError("the files take too much memory. Send a smaller picture.") from None
    if seconds is None:
        raise InputError("a video without speech needs a duration")
    if speech is None and options.start:
        raise InputError(f"start {options.start:g} is a place in the speech: send some, or leave it out")
    if seconds * options.fps < 1:
        raise InputError(f"{seconds:.3f} s are shorter than a frame: send more speech")
    return Found(seconds, picture.shape[1], picture.shape[0])


def without_folder(text: str, folder: Path) -> str:
    """An error's text without where files lie: `portrait /data/jobs/video_1/portrait: ...` is
    `portrait: ...`."""
    for name in ("portrait", "speech"):
        for role in ("portrait", "recording", "speech", "video"):
            text = text.replace(f"{role} {folder / name}", name)
        text = text.replace(str(folder / name), name)
    return text.replace(str(folder), "")
