"""Stretches of a raw video: one shot, one face throughout, a background that stays still.

A video is looked at in one pass, frame by frame; nothing of it is kept.
"""

import copy
import errno
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stableavatar.data.clips import PROMPTS
from stableavatar.data.landmarks import INNER_LIPS, FaceLandmarker, Points
from stableavatar.errors import InputError
from stableavatar.media.audio import SoundTape
from stableavatar.media.reading import Frame, read_frames_at

Kind = Literal["speech", "singing", "dancing"]
Item = TypeVar("Item")

FPS = Fraction(25)

_SMALL = (64, 36)  # what shots and backgrounds are compared at
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EMFILE, errno.ENFILE}
_CUT = 24.0  # of 255: mean difference of two neighbouring frames of which the second begins another shot
_CUT_RATIO = 4.0  # and so many times as large as differences before it
_FACE_SIZE = (16, 20)  # what faces are compared at
_OTHER = 25.0  # of 255: mean difference of the faces of two neighbouring frames, of which one is another's
_JUMP = 0.15  # of its height: how far a face's middle may move from frame to frame
_GROWS = 1.2  # so many times as high, or as low, a face may become
_FACES_EVERY = 12  # frames between looks for further faces: who comes and goes between two is not seen
_OTHER_FACE = 0.5  # of the largest one's size: a smaller face is somebody in the background
# Of 255: mean difference of two neighbouring frames, where the face is, below which the picture stands still.
# Measured: of people 0.13 and more; puppets are below it for 4 frames at most, photographs in videos from one
# key frame to the next.
_STILL = 0.02
_STANDS = 8  # frames for which it may
# Standard deviation of the mouth's opening, in heights of the face. Measured over 3.24 s: of people 0.011 to
# 0.052, of puppets 0.021 to 0.048, of photographs, also moved ones, up to 0.005 (strongly compressed 0.009).
_MOUTH = 0.006
_SILENT = 1e-3  # root mean square of a stretch without sound


@dataclass(frozen=True)
class PrepareSettings:
    """What is kept of raw videos.

    Attributes:
        kind: of all of them; it says the prompt, unless `prompt` does.
        least_seconds, most_seconds: of a clip; longer stretches are cut into several.
        least_face: height of the face, in heights of the video's picture.
        most_motion: of the background: mean difference, of 255, from the stretch's first frame.
    """

    kind: Kind = "speech"
    prompt: str | None = None
    least_seconds: float = 3.24
    most_seconds: float = 20.0
    least_face: float = 0.08
    most_motion: float = 12.0

    def __post_init__(self) -> None:
        if self.kind not in PROMPTS:
            raise InputError(f"kind {self.kind!r} is not known: choose one of {', '.join(PROMPTS)}")
        if self.prompt is not None and not self.prompt.strip():
            raise InputError("the prompt is empty: leave it out, or say what is to be seen")
        if not 0 <= self.least_face < 1:
            raise InputError(f"least_face is a share of the picture's height, 0 to 1, not {self.least_face}")
        if not 0 <= self.most_motion < math.inf:
            raise InputError(f"most_motion must be at least 0 and finite, not {self.most_motion}")
        if not 0.2 <= self.least_seconds <= self.most_seconds < math.inf:
            raise InputError(
                f"clips of {self.least_seconds} to {self.most_seconds} s are not possible: at least 0.2, and "
                "the longest finite and not below the shortest"
            )


@dataclass
class Stretch:
    """Frames `start` to `stop` of a video, and why they are not kept, if they are not.

    `centre` is the middle of the face in widths and heights of the picture, `face` its height in those,
    `mouth` the standard deviation of the mouth's opening in heights of the face.
    """

    start: int
    stop: int
    reason: str | None = None
    centre: tuple[float, float] = (0.5, 0.4)
    face: float = 0.0
    mouth: float = 0.0

    @property
    def seconds(self) -> float:
        """Its length."""
        return float((self.stop - self.start) / FPS)


@dataclass
class _Run:
    """A stretch while it goes on."""

    start: int
    first: NDArray[np.float32]  # small picture of its first frame
    centres: NDArray[np.float32] = field(default_factory=lambda: np.zeros(2, np.float32))
    heights: float = 0.0
    count: int = 0
    motion: float = 0.0
    opening: float = 0.0
    opening_squared: float = 0.0

    def take(self, small: NDArray[np.float32], points: Points, width: int, height: int) -> None:
        """The next frame."""
        low, high = points.min(axis=0), points.max(axis=0)
        self.centres += (low + high) / 2 / np.array([width, height], np.float32)
        self.heights += float(high[1] - low[1]) / height
        upper, lower = points[list(INNER_LIPS)]
        opening = float(np.hypot(*(lower - upper)) / (high[1] - low[1]))
        self.opening += opening
        self.opening_squared += opening**2
        self.count += 1
        still = _background(points, width, height)
        if still.any():
            moved = np.abs(small - self.first).mean(axis=2)[still]
            self.motion = max(self.motion, float(moved.mean()))

    def ended(self, stop: int, settings: PrepareSettings) -> Stretch:
        """What has become of it."""
        x, y = (float(value) for value in self.centres / self.count)
        moves = self.motion > settings.most_motion
        reason = f"the background moves (by {self.motion:.0f} of 255)" if moves else None
        mean, squared = self.opening / self.count, self.opening_squared / self.count
        mouth = math.sqrt(max(squared - mean**2, 0.0))
        return Stretch(self.start, stop, reason, (x, y), self.heights / self.count, mouth)


@dataclass
class _Cuts:
    """Whether a frame begins another shot: the whole picture changes at once, or the face in it is another
    one, or elsewhere, as where two people stand before one backdrop or a sentence was taken out.

    `still` counts the frames since the picture has last changed where the face is, as it does all the time
    but in photographs and where it hangs.
    """

    picture: NDArray[np.float32] | None = None
    face: tuple[Points, NDArray[np.float32]] | None = None
    usual: float = 0.0
    usual_of_face: float = 0.0
    still: int = 0

    def begins(self, frame: Frame, small: NDArray[np.float32], points: Points | None) -> bool:
        """Take the next frame, its small picture and its face."""
        cut = False
        if self.picture is not None:
            change = float(np.abs(small - self.picture).mean())
            cut = change > _CUT and change > _CUT_RATIO * self.usual
            self.usual = _followed(self.usual, change, _CUT)
        self.picture = small
        self.still += 1
        if self.face is None or np.abs(_face_square(frame, self.face[0]) - self.face[1]).mean() > _STILL:
            self.still = 0
        face = None if points is None else (points, _face_square(frame, points))
        if face is not None and self.face is not None:
            change = float(np.abs(face[1] - self.face[1]).mean())
            another = change > _OTHER and change > _CUT_RATIO * self.usual_of_face
            self.usual_of_face = _followed(self.usual_of_face, change, _OTHER)
            cut = cut or another or _jumps(self.face[0], face[0])
        self.face = face
        return cut


class PassingError(Exception):
    """A file that its disk, or the network, did not give just now: nothing is known of the file."""


def refuse_passing(error: InputError) -> None:
    """Raise PassingError where it is not the file that is to blame for an error."""
    if getattr(error.__cause__, "errno", None) in _PASSING:
        raise PassingError(str(error)) from error


def _followed(usual: float, change: float, least: float) -> float:
    """The usual change after another one. A cut counts as little as it may, and flashes that go on become
    usual."""
    return 0.9 * usual + 0.1 * min(change, max(_CUT_RATIO * usual, least))


def find_stretches(video: Path, landmarker: FaceLandmarker, settings: PrepareSettings) -> Iterator[Stretch]:
    """The stretches of a video in order, kept ones and others.

    Where it cannot be read any further, what comes then is an empty stretch with that reason.

    Raises:
        InputError: nothing of the video can be read.
        PassingError: it could not be read just now.
    """
    frames = Last(read_frames_at(video, FPS))
    run: _Run | None = None
    bad: Stretch | None = None
    several = False  # further faces, when they were last looked for
    sole, sure = -1, None  # when there were none, and what the run was then
    cuts = _Cuts()
    longest = round(settings.most_seconds * FPS)
    number = -1
    damaged: InputError | None = None
    faces = landmarker.track(frame for _, frame in frames)
    while True:
        try:
            points = next(faces)
        except StopIteration:
            break
        except InputError as error:
            refuse_passing(error)
            if number < 0:
                raise
            damaged = error
            break
        number, frame = frames.item
        height, width = frame.shape[:2]
        small = _small(frame)
        cut = cuts.begins(frame, small, points)
        if cut or number % _FACES_EVERY == 0:
            several = _faces(landmarker, frame) > 1
            sole = sole if several else number
        still = cuts.still >= _STANDS
        reason = "the picture stands still" if still else None
        reason = "no face" if points is None else "more than one face" if several else reason
        begin = number
        if run is not None and still:
            begin = max(run.start, number - cuts.still)
            run = run if begin > run.start else None
        if run is not None and points is not None and several and not cut:  # since when is not known
            known = sure is not None and sure.start == run.start
            run, begin = (sure, sole + 1) if known else (None, run.start)
        if run is not None and (cut or reason is not None or number - run.start >= longest):
            yield run.ended(begin, settings)
            run = None
        if bad is not None and bad.reason != reason:
            yield replace(bad, stop=number)
            bad = None
        if points is None or reason is not None:
            bad = bad or Stretch(begin, number, reason)
            continue
        if run is None:
            run = _Run(number, small)
        run.take(small, points, width, height)
        if number == sole:
            sure = copy.deepcopy(run)
    if run is not None:
        yield run.ended(number + 1, settings)
    if bad is not None:
        yield replace(bad, stop=number + 1)
    if damaged is not None:
        yield Stretch(number + 1, number + 1, str(damaged))


def judge(stretch: Stretch, speech: SoundTape, settings: PrepareSettings) -> Stretch:
    """With the reason why it is not kept, where there is one that only the whole stretch tells; where its
    sound ends before it, it ends with the sound.

    Args:
        speech: of the video, not read beyond the stretch's start.

    Raises:
        PassingError: it could not be read just now.
    """
    if stretch.reason is not None:
        return stretch
    if stretch.seconds < settings.least_seconds:
        return replace(stretch, reason=f"only {stretch.seconds:.1f} s")
    if stretch.face < settings.least_face:
        return replace(stretch, reason=f"the face is small ({stretch.face:.0%} of the height)")
    if stretch.mouth < _MOUTH and settings.kind != "dancing":
        return replace(stretch, reason="the mouth does not move")
    length, energy, cut_off = 0, 0.0, False
    try:
        for block in speech.stretch(float(stretch.start / FPS), stretch.seconds):
            length += len(block)
            energy += float(np.square(block, dtype=np.float64).sum())
    except InputError as error:
        refuse_passing(error)
        if not length:
            return replace(stretch, reason=f"no sound ({error})")
        cut_off = True
    if not length:
        return replace(stretch, reason="no sound (it ends before)")
    if math.sqrt(energy / length) < _SILENT:
        return replace(stretch, reason="silent")
    # Of a sound that is cut off, no frame may ask for what comes then.
    frames = (math.floor if cut_off else math.ceil)(length * FPS / speech.sample_rate)
    if frames < stretch.stop - stretch.start:
        stretch = replace(stretch, stop=stretch.start + frames)
        if stretch.seconds < settings.least_seconds:
            return replace(stretch, reason=f"only {stretch.seconds:.1f} s of sound")
    return stretch


class Last(Generic[Item]):
    """Items, of which the one that was taken last is kept."""

    item: Item

    def __init__(self, items: Iterable[Item]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Item]:
        for item in self.items:
            self.item = item
            yield item


def _small(frame: Frame) -> NDArray[np.float32]:
    return np.asarray(Image.fromarray(frame).resize(_SMALL, Image.Resampling.BOX), np.float32)


def _face_square(frame: Frame, points: Points) -> NDArray[np.float32]:
    """The face alone, small, cut out by its landmarks: where it is in the picture, and how large, is all the
    same."""
    (left, top), (right, bottom) = np.floor(points.min(axis=0)), np.ceil(points.max(axis=0)) + 1
    face = Image.fromarray(frame).crop((int(left), int(top), int(right), int(bottom)))
    return np.asarray(face.resize(_FACE_SIZE, Image.Resampling.BOX), np.float32)


def _jumps(before: Points, now: Points) -> bool:
    """Whether a face is elsewhere, or of another size, than it can be a frame later."""
    (low, high), (last_low, last_high) = ((it.min(axis=0), it.max(axis=0)) for it in (now, before))
    height, last_height = float(high[1] - low[1]), float(last_high[1] - last_low[1])
    moved = float(np.abs(low + high - last_low - last_high).max()) / 2
    ratio = max(height, last_height) / max(min(height, last_height), 1e-6)
    return moved > _JUMP * last_height or ratio > _GROWS


def _background(points: Points, width: int, height: int) -> NDArray[np.bool_]:
    """Where in a small picture nobody is: beside and above the head, away from the body."""
    low, high = points.min(axis=0), points.max(axis=0)
    face = high - low
    x = (np.arange(_SMALL[0]) + 0.5) / _SMALL[0] * width
    y = (np.arange(_SMALL[1]) + 0.5) / _SMALL[1] * height
    beside = (x < low[0] - 0.8 * face[0]) | (x > high[0] + 0.8 * face[0])
    above = y < low[1] - 0.8 * face[1]
    at_head = y < high[1]  # further down are shoulders and hands
    result: NDArray[np.bool_] = (beside[None] & at_head[:, None]) | above[:, None]
    return result


def _faces(landmarker: FaceLandmarker, frame: Frame) -> int:
    """Faces that are not much smaller than the largest."""
    sides = [square.side for square in landmarker.faces(frame)]
    return sum(side >= _OTHER_FACE * max(sides) for side in sides)
