"""A whole clip of a puppet: frames, sound, labels and prompt, all from one seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stableavatar.data.puppets.articulation import Articulation, articulate
from stableavatar.data.puppets.identity import EVALUATION_SEED, Identity
from stableavatar.data.puppets.motion import draw_expression, make_motion
from stableavatar.data.puppets.recordings import evaluation_speech
from stableavatar.data.puppets.render import Frame, Renderer
from stableavatar.data.puppets.speech import SAMPLE_RATE, Samples, training_speech
from stableavatar.errors import InputError

FPS = 25


@dataclass(frozen=True)
class PuppetClip:
    """One talking puppet at 25 frames a second.

    `frames` uint8 [T, H, W, 3]; `samples` float32 mono at 16 kHz, T * 640 of them; `articulation` T values a
    track; `face_masks`, `lip_masks` uint8 [T, H, W], 0 or 255; `portrait` uint8 [H, W, 3], the identity at
    rest.
    """

    seed: int
    frames: Frame
    samples: Samples
    articulation: Articulation
    face_masks: NDArray[np.uint8]
    lip_masks: NDArray[np.uint8]
    portrait: Frame
    prompt: str
    expression: str
    identity: Identity


def draw_prompt(seed: int, identity: Identity, expression: str) -> str:
    """Words for a clip; the expression is always named, the person in many ways or not at all."""
    rng = np.random.default_rng([seed, 909])
    subject = identity.describe()
    article = "A"
    kind = rng.uniform()
    if kind < 0.2:
        subject = "protagonist"
        article = "The"
    elif kind < 0.35:
        subject = identity.person
    elif kind < 0.45:
        subject = "person"
    verb = str(rng.choice(["is talking", "is speaking", "talks", "is talking to the camera"]))
    words = f"{article} {subject} {verb}"
    return words if expression == "neutral" else f"{words}, {expression}"


def clip_speech(seed: int, seconds: float, person: str) -> Samples:
    """The sound of a clip: synthesised for training seeds, a shipped recording for evaluation seeds."""
    if seed >= EVALUATION_SEED:
        return evaluation_speech(seed - EVALUATION_SEED, seconds)
    return training_speech(seed, seconds, person)


def make_clip(
    seed: int,
    seconds: float = 4.0,
    *,
    size: int = 128,
    expression: str | None = None,
    samples: Samples | None = None,
    identity: Identity | None = None,
    movement: int | None = None,
) -> PuppetClip:
    """Render the clip that belongs to `seed`; the same arguments always give the same bytes.

    Args:
        seed: below 1,000,000 for training; from there on for evaluation, with voices and recordings of their
            own.
        seconds: length; frames are round(seconds * 25).
        size: side of the square picture in pixels, at least 32.
        expression: one of `EXPRESSIONS` in place of the seed's own.
        samples: float32 mono at 16 kHz in place of the seed's own speech.
        identity: in place of the seed's own; voice, words and motion stay the seed's.
        movement: a seed in place of the clip's for what :func:`make_motion` draws.

    Raises:
        InputError: an argument out of range, or the synthesiser or scikit-image is missing.
    """
    if seed < 0 or seconds <= 0:
        raise InputError(f"A clip needs a seed >= 0 and a length above 0 s, got seed {seed} and {seconds} s.")
    frames = max(1, round(seconds * FPS))
    length = frames * SAMPLE_RATE // FPS
    if identity is None:
        identity = Identity.from_seed(seed)
    sound = clip_speech(seed, length / SAMPLE_RATE, identity.person) if samples is None else samples
    sound = np.pad(sound[:length], (0, max(0, length - len(sound)))).astype(np.float32)
    articulation = articulate(sound, SAMPLE_RATE, FPS)
    chosen = draw_expression(seed) if expression is None else expression
    motion = make_motion(seed if movement is None else movement, articulation, chosen, FPS)
    renderer = Renderer(identity, size)
    pictures = np.empty((frames, size, size, 3), dtype=np.uint8)
    faces = np.empty((frames, size, size), dtype=np.uint8)
    lips = np.empty((frames, size, size), dtype=np.uint8)
    for k in range(frames):
        pictures[k], faces[k], lips[k] = renderer.draw(articulation, motion, k)
    return PuppetClip(
        seed=seed,
        frames=pictures,
        samples=sound,
        articulation=articulation,
        face_masks=faces,
        lip_masks=lips,
        portrait=renderer.portrait(),
        prompt=draw_prompt(seed, identity, chosen),
        expression=chosen,
        identity=identity,
    )


def iter_clips(seeds: Iterable[int], seconds: float = 4.0, *, size: int = 128) -> Iterator[PuppetClip]:
    """Clips of many seeds, one at a time."""
    for seed in seeds:
        yield make_clip(seed, seconds, size=size)
