"""What the embedded model is asked to do: portraits, speech and prompts with fixed seeds that no training has
seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stableavatar.data.puppets import EVALUATION_SEED, Identity, PuppetClip, articulate, make_clip
from stableavatar.data.puppets.clip import clip_speech
from stableavatar.data.puppets.recordings import (
    EVALUATION_RECORDINGS,
    evaluation_recording,
    evaluation_speech,
)
from stableavatar.errors import InputError, extra_missing
from stableavatar.evaluation.observation import Frames, Track
from stableavatar.media.reading import Frame

SAMPLE_RATE = 16_000
FPS = 25
SIZE = 128
Samples = NDArray[np.float32]

ASKED_EXPRESSIONS = ("smiling", "serious")
"""What prompts ask for, of the same person with the same speech."""
MOVING_EXPRESSIONS = ("nodding", "shaking the head", "tilting the head")
"""What prompts ask heads to do."""
_OTHER = 7
"""Recordings this far apart have other voices and other words."""
_MOVED = 10_000_000
"""Movements of clips and movements drawn anew are of seeds this far apart."""
_READINGS = (0, 10)
"""The recordings of a person; the others are synthesised."""
_CROP = (144, 31, 305, 192)
"""Left, top, right, bottom of the astronaut's face in its 512x512 picture: as large and as high as a
puppet's."""
_EYES_AT, _EYES_APART = (0.5, 0.45), 0.39
"""The same for any face: the middle between the eyes, and their outer corners' distance, in sides."""


@dataclass(frozen=True)
class Plan:
    """How much is asked for. Numbers of clips, and their lengths in seconds.

    `puppets` clips against the truth, of which the first `wrong` also with other speech; `silence` clips;
    `prompts` pairs of a smiling and a serious one; `moving` clips, each of the next of `MOVING_EXPRESSIONS`;
    photographs, with their own and with other speech, that of the `astronaut` only where wanted.
    `autoencoder_frames` (4n+1) of true frames go through the autoencoder for each puppet. `long` puppets
    talk for `long_seconds`. Puppets are those of `seed` and the seeds after it.
    """

    puppets: int
    seconds: float
    autoencoder_frames: int
    wrong: int
    silence: int
    silence_seconds: float
    prompts: int
    prompt_seconds: float
    photograph_seconds: float
    moving: int = 0
    moving_seconds: float = 3.0
    astronaut: bool = True
    long: int = 0
    long_seconds: float = 300.0
    seed: int = EVALUATION_SEED

    def __post_init__(self) -> None:
        if not 0 < self.puppets <= EVALUATION_RECORDINGS:
            raise InputError(
                f"There is speech for 1 to {EVALUATION_RECORDINGS} puppets, not for {self.puppets}."
            )
        if self.autoencoder_frames % 4 != 1 or self.autoencoder_frames < self.seconds * FPS:
            raise InputError(
                f"{self.autoencoder_frames} frames for the autoencoder: "
                f"give 4n+1, at least {self.seconds * FPS:.0f}."
            )
        if max(self.wrong, self.silence, self.prompts, self.moving, self.long) > self.puppets:
            raise InputError(
                "Controls are made for puppets of the plan; there cannot be more of them than puppets."
            )


FULL = Plan(
    puppets=20, seconds=10.0, autoencoder_frames=301, wrong=20, silence=4, silence_seconds=4.0,
    prompts=10, prompt_seconds=2.6, moving=6, photograph_seconds=30.0, long=1,
)  # fmt: skip
"""What docs/tiny.md shows."""
QUICK = Plan(
    puppets=3, seconds=5.0, autoencoder_frames=129, wrong=2, silence=1, silence_seconds=2.0,
    prompts=1, prompt_seconds=2.0, moving=3, moving_seconds=2.0, photograph_seconds=5.0,
)  # fmt: skip
"""A subset for minutes; its medians of three clips are coarse."""
DEVELOPMENT = Plan(
    puppets=8, seconds=3.0, autoencoder_frames=77, wrong=2, silence=1, silence_seconds=2.0,
    prompts=8, prompt_seconds=3.0, moving=6, photograph_seconds=5.0, astronaut=False, seed=910_000,
)  # fmt: skip
"""Other puppets, with voices of the training: to choose settings on, so that those of the evaluation stay
unseen."""


@dataclass(frozen=True)
class TalkingCase:
    """A puppet's true clip and the speech to feed.

    `frames` are those of the first `seconds` of `truth`; `called` the opening that the fed speech calls for;
    `other` the speech of another recording, just as long.
    """

    truth: PuppetClip
    frames: Frames
    samples: Samples
    called: Track
    other: Samples


def called_opening(samples: Samples, frames: int) -> Track:
    """The opening [frames] that speech at 16 kHz calls for."""
    return articulate(samples, SAMPLE_RATE, FPS).opening[:frames]


def talking_case(plan: Plan, index: int) -> TalkingCase:
    """One of the plan's puppets, each with a recording of its own."""
    frames = round(plan.seconds * FPS)
    samples = frames * SAMPLE_RATE // FPS
    truth = make_clip(plan.seed + index, plan.autoencoder_frames / FPS, size=SIZE)
    spoken = truth.samples[:samples]
    return TalkingCase(
        truth=truth,
        frames=truth.frames[:frames],
        samples=spoken,
        called=called_opening(spoken, frames),
        other=_other_speech(plan, index, plan.seconds)[:samples],
    )


def moved_anew(truth: PuppetClip) -> Frames:
    """The same clip [T, H, W, 3] with blinks, glances and free sway drawn anew: what a perfect model may
    give."""
    return make_clip(
        truth.seed,
        len(truth.frames) / FPS,
        size=SIZE,
        samples=truth.samples,
        expression=truth.expression,
        movement=truth.seed + _MOVED,
    ).frames


def _other_speech(plan: Plan, index: int, seconds: float) -> Samples:
    seed = plan.seed + index + _OTHER
    return clip_speech(seed, seconds, Identity.from_seed(seed).person)


def silent_case(plan: Plan, index: int) -> PuppetClip:
    """A puppet to whom silence is fed, and how it keeps its mouth shut."""
    silence = np.zeros(round(plan.silence_seconds * SAMPLE_RATE), dtype=np.float32)
    return make_clip(
        plan.seed + index, plan.silence_seconds, size=SIZE, samples=silence, expression="neutral"
    )


def prompted_case(plan: Plan, index: int, expression: str) -> PuppetClip:
    """A puppet with one of `ASKED_EXPRESSIONS`; its speech is the same with each."""
    return make_clip(plan.seed + index, plan.prompt_seconds, size=SIZE, expression=expression)


def moving_case(plan: Plan, index: int) -> PuppetClip:
    """A puppet whose head does one of `MOVING_EXPRESSIONS`."""
    expression = MOVING_EXPRESSIONS[index % len(MOVING_EXPRESSIONS)]
    return make_clip(plan.seed + index, plan.moving_seconds, size=SIZE, expression=expression)


def photograph() -> Frames:
    """The face of scikit-image's `astronaut` (Eileen Collins, NASA, public domain), 128x128: one frame [1, H,
    W, 3].

    Raises:
        InputError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise extra_missing(
            "The photograph of the evaluation comes with scikit-image, which is not installed", "tiny"
        ) from error
    picture = Image.fromarray(data.astronaut()).crop(_CROP)
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS))[None]


def person(picture: Frame, eyes: NDArray[np.float32]) -> Frames:
    """A person's face out of a larger picture, 128x128, as large and as high as a puppet's: [1, H, W, 3].

    Args:
        picture: [H, W, 3]. eyes: outer corners [2, 2] in pixels. Beyond the picture's edge it is black.
    """
    side = float(np.linalg.norm(eyes[1] - eyes[0])) / _EYES_APART
    left, top = eyes.mean(axis=0) - side * np.array(_EYES_AT)
    cut = Image.fromarray(picture).crop((round(left), round(top), round(left + side), round(top + side)))
    return np.asarray(cut.resize((SIZE, SIZE), Image.Resampling.LANCZOS))[None]


def photograph_speech(seconds: float) -> tuple[Samples, Samples]:
    """What a photograph says, readings by people, and other speech of the same length. The readings last
    20 s; beyond that they begin again, the other speech does not."""
    samples = round(seconds * SAMPLE_RATE)
    own = [evaluation_recording(index) for index in _READINGS]
    rounds = -(-samples // sum(map(len, own)))
    return np.concatenate(own * rounds)[:samples], evaluation_speech(_OTHER, seconds)


def long_case(plan: Plan, index: int) -> TalkingCase:
    """A puppet that talks for minutes."""
    frames = round(plan.long_seconds * FPS)
    truth = make_clip(plan.seed + index, plan.long_seconds, size=SIZE)
    return TalkingCase(
        truth=truth,
        frames=truth.frames,
        samples=truth.samples,
        called=called_opening(truth.samples, frames),
        other=_other_speech(plan, index, plan.long_seconds),
    )
