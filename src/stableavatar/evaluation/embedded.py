"""The embedded model's clips and their controls, made one at a time: a list of tasks that are done in any
order, each giving a part of the table."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray

from stableavatar.conditioning.image import encode_clips
from stableavatar.data.landmarks import OUTER_EYES
from stableavatar.data.puppets import PuppetClip
from stableavatar.errors import InputError
from stableavatar.evaluation.cases import (
    ASKED_EXPRESSIONS,
    FPS,
    SIZE,
    Plan,
    Samples,
    called_opening,
    long_case,
    moved_anew,
    moving_case,
    person,
    photograph,
    photograph_speech,
    prompted_case,
    silent_case,
    talking_case,
)
from stableavatar.evaluation.faces import FaceReader
from stableavatar.evaluation.identity import worst_second
from stableavatar.evaluation.lips import lip_score
from stableavatar.evaluation.meter import MouthMeter
from stableavatar.evaluation.observation import FaceTrack, Frames, Observation, Track, Variant
from stableavatar.evaluation.regions import Regions, person_regions, photograph_regions, puppet_regions
from stableavatar.evaluation.report import Exhibit, Exhibits
from stableavatar.evaluation.scores import Scores
from stableavatar.generation import as_pixels
from stableavatar.media.image import read_picture
from stableavatar.pipeline import AvatarPipeline
from stableavatar.sampling.decoding import stream_decode

logger = logging.getLogger(__name__)

Speaker = Callable[[NDArray[np.uint8], Samples, str, int], Frames]
"""(portrait [H, W, 3], speech at 16 kHz [n], prompt, seed) to frames [F, H, W, 3] at 25 a second."""
Coder = Callable[[Frames], Frames]
"""Frames [4n+1, H, W, 3] through an autoencoder and back."""

PHOTOGRAPH_PROMPT = "A woman is talking"
PERSON_PROMPT = "A person is talking"


@dataclass(frozen=True)
class Person:
    """A photograph to animate: its file's name, the face [H, W, 3] cut out of it, and where what lies."""

    name: str
    portrait: NDArray[np.uint8]
    regions: Regions


def find_people(files: Sequence[Path], reader: FaceReader) -> list[Person]:
    """The faces of photographs. Raises InputError: a file cannot be read, or has no face to be found."""
    people = []
    for file in files:
        try:
            picture = read_picture(file)
            portrait = person(picture, reader.landmarks(picture)[list(OUTER_EYES)])[0]
            points = reader.landmarks(portrait)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
        people.append(Person(file.name, portrait, person_regions(points, SIZE)))
    return people


Kind = Literal["puppet", "silence", "prompts", "moving", "long", "photograph", "person"]


@dataclass(frozen=True)
class Task:
    """Clips that are made and measured together: the `index`-th of their kind."""

    kind: Kind
    index: int = 0


@dataclass
class Part:
    """What tasks give: scores, and clips to show."""

    scores: Scores = field(default_factory=Scores)
    exhibits: Exhibits = field(default_factory=Exhibits)

    def merge(self, other: Part) -> None:
        """Takes over what other tasks gave."""
        self.scores.merge(other.scores)
        for entry in fields(Exhibits):
            if (exhibit := getattr(other.exhibits, entry.name)) is not None:
                setattr(self.exhibits, entry.name, exhibit)


@dataclass(frozen=True)
class Evaluation:
    """Tasks and how they are done: clips are made by `speaker` and `coder`, and read by `meter`, those of
    photographs by `faces` too. Without a speaker the autoencoder alone is measured."""

    plan: Plan
    coder: Coder
    speaker: Speaker | None
    meter: MouthMeter
    faces: FaceReader | None = None
    people: Sequence[Person] = ()

    def tasks(self) -> list[Task]:
        """Everything of the plan, what takes longest first, so that processes end together."""
        plan = self.plan
        kinds: list[tuple[Kind, int]] = [("puppet", plan.puppets)]
        if self.speaker is not None:
            people = 0 if self.faces is None else len(self.people)
            kinds = [("long", plan.long), ("photograph", plan.astronaut), ("person", people), *kinds]
            kinds += [("silence", plan.silence), ("prompts", plan.prompts), ("moving", plan.moving)]
        return [Task(kind, index) for kind, count in kinds for index in range(count)]

    def run(self) -> Part:
        """All tasks, one after the other."""
        whole = Part()
        for task in self.tasks():
            whole.merge(self.do(task))
        return whole

    def do(self, task: Task) -> Part:
        """Make and measure the clips of a task."""
        started = time.monotonic()
        part = Part()
        if task.kind == "puppet":
            self._talk(task.index, part)
        elif self.speaker is None:
            raise ValueError(f"{task}: there is nobody to speak")
        elif task.kind == "silence":
            self._keep_silent(task.index, self.speaker, part)
        elif task.kind == "prompts":
            self._follow_prompts(task.index, self.speaker, part)
        elif task.kind == "moving":
            self._move(task.index, self.speaker, part)
        elif task.kind == "long":
            self._talk_on(task.index, self.speaker, part)
        elif task.kind == "photograph":
            self._animate_photograph(self.speaker, part)
        else:
            self._animate_person(self.people[task.index], self.speaker, part)
        logger.info("%s %d: %.0f s", task.kind, task.index, time.monotonic() - started)
        return part

    def _observe(
        self,
        frames: Frames,
        reference: Frames,
        called: Track,
        regions: Regions,
        faces: FaceTrack | None = None,
    ) -> Observation:
        """The first frames that all have, as an observation; `faces` are of all frames."""
        count = min(len(frames), len(reference), len(called))
        return Observation(
            frames=frames[:count],
            reference=reference[:count],
            called=called[:count],
            mouth=self.meter.measure(frames[:count]),
            surroundings=regions.surroundings,
            outside=regions.outside,
            fps=FPS,
            faces=None if faces is None else FaceTrack(faces.likeness[:count], faces.opening[:count]),
        )

    def _talk(self, index: int, part: Part) -> None:
        """A puppet against its truth, and every control of it."""
        case = talking_case(self.plan, index)
        truth = case.truth
        regions = puppet_regions(truth.identity, SIZE)
        decoded = self.coder(truth.frames)
        opening = truth.articulation.opening
        whole = self._observe(decoded, truth.frames, opening, regions)
        part.scores.add("autoencoder", "decoded", whole)
        still = np.broadcast_to(truth.portrait, truth.frames.shape)
        part.scores.add("autoencoder", "still", self._observe(still, truth.frames, opening, regions))
        count = len(case.frames)
        variants: dict[Variant, Frames] = {
            "true": case.frames,
            "decoded": decoded[:count],
            "redrawn": moved_anew(truth)[:count],
            "still": still[:count],
        }
        if self.speaker is not None:
            variants["made"] = self.speaker(truth.portrait, case.samples, truth.prompt, index)
            if index < self.plan.wrong:
                variants["wrong"] = self.speaker(truth.portrait, case.other, truth.prompt, index)
        measured: Track | None = None
        for variant, frames in variants.items():
            clip = self._observe(frames, case.frames, case.called, regions)
            part.scores.add("puppets", variant, clip)
            if variant == "made":
                measured = clip.mouth.opening
                score = lip_score(measured, clip.called)
                logger.info("puppet %d: lips r %.2f at lag %d", index, score.correlation, score.lag)
        if index == 0:
            rows = {"truth": case.frames, "decoded": decoded[:count]}
            rows |= {"generated": variants["made"]} if "made" in variants else {}
            part.exhibits.puppet = Exhibit(rows, case.called, measured)

    def _keep_silent(self, index: int, speaker: Speaker, part: Part) -> None:
        """Silence fed: the mouth stays shut."""
        truth = silent_case(self.plan, index)
        self._beside_truth("silence", truth, speaker, index, part)

    def _follow_prompts(self, index: int, speaker: Speaker, part: Part) -> None:
        """The same speech twice, asked to smile and asked to be serious."""
        for expression in ASKED_EXPRESSIONS:
            truth = prompted_case(self.plan, index, expression)
            self._beside_truth("prompts", truth, speaker, index, part)

    def _move(self, index: int, speaker: Speaker, part: Part) -> None:
        """Asked to nod, shake or tilt the head."""
        truth = moving_case(self.plan, index)
        made = self._beside_truth("moving", truth, speaker, index, part)
        regions = puppet_regions(truth.identity, SIZE)
        opening = truth.articulation.opening
        controls: dict[Variant, Frames] = {
            "decoded": self.coder(truth.frames[: 4 * ((len(truth.frames) - 1) // 4) + 1]),
            "still": np.broadcast_to(truth.portrait, truth.frames.shape),
        }
        for variant, frames in controls.items():
            part.scores.add("moving", variant, self._observe(frames, truth.frames, opening, regions))
        if index == 0:
            rows = {"truth": truth.frames, "decoded": controls["decoded"], "generated": made.frames}
            part.exhibits.moving = Exhibit(rows, made.called, made.mouth.opening)

    def _beside_truth(
        self, group: str, truth: PuppetClip, speaker: Speaker, seed: int, part: Part
    ) -> Observation:
        """A made clip and its truth are scored; the made one."""
        regions = puppet_regions(truth.identity, SIZE)
        variants: dict[Variant, Frames] = {
            "made": speaker(truth.portrait, truth.samples, truth.prompt, seed),
            "true": truth.frames,
        }
        opening = truth.articulation.opening
        at_rest = float(self.meter.measure(truth.portrait[None]).smile[0])
        clips = {
            variant: replace(
                self._observe(frames, truth.frames, opening, regions),
                expression=truth.expression,
                smile_at_rest=at_rest,
            )
            for variant, frames in variants.items()
        }
        for variant, clip in clips.items():
            part.scores.add(group, variant, clip)
        return clips["made"]

    def _talk_on(self, index: int, speaker: Speaker, part: Part) -> None:
        """A puppet for minutes: is it at the end what it was at the start."""
        case = long_case(self.plan, index)
        truth = case.truth
        regions = puppet_regions(truth.identity, SIZE)
        variants: dict[Variant, Frames] = {
            "made": speaker(truth.portrait, case.samples, truth.prompt, index),
            "true": truth.frames,
            "still": np.broadcast_to(truth.portrait, truth.frames.shape),
        }
        for variant, frames in variants.items():
            part.scores.add("long", variant, self._observe(frames, truth.frames, case.called, regions))

    def _animate_photograph(self, speaker: Speaker, part: Part) -> None:
        """A photograph with real speech, its own and another's."""
        portrait = photograph()
        frames = round(self.plan.photograph_seconds * FPS)
        still = np.broadcast_to(portrait, (frames, *portrait.shape[1:]))
        variants = self._photograph_variants(still, PHOTOGRAPH_PROMPT, speaker)
        variants["still"] = still
        clips = self._observe_photograph(variants, still, photograph_regions(SIZE))
        for variant, clip in clips.items():
            part.scores.add("photograph", variant, clip)
            if clip.faces is not None:
                part.scores.add("people", variant, clip)
        rows = {"portrait": still, "decoded": variants["decoded"], "generated": variants["made"]}
        part.exhibits.photograph = Exhibit(rows, clips["made"].called, clips["made"].mouth.opening)

    def _animate_person(self, someone: Person, speaker: Speaker, part: Part) -> None:
        """A photograph of a person, read by networks that know people's faces."""
        frames = round(self.plan.photograph_seconds * FPS)
        still = np.broadcast_to(someone.portrait, (frames, *someone.portrait.shape))
        variants = self._photograph_variants(still, PERSON_PROMPT, speaker)
        for variant, clip in self._observe_photograph(variants, still, someone.regions).items():
            part.scores.add("people", variant, clip)
            assert clip.faces is not None
            logger.info(
                "%s (%s): identity %.2f in the worst second, lips r %.2f",
                someone.name,
                variant,
                worst_second(clip.faces.likeness, FPS),
                lip_score(clip.faces.opening, clip.called).correlation,
            )

    def _photograph_variants(self, still: Frames, prompt: str, speaker: Speaker) -> dict[Variant, Frames]:
        own, other = photograph_speech(self.plan.photograph_seconds)
        return {
            "made": speaker(still[0], own, prompt, 0),
            "wrong": speaker(still[0], other, prompt, 0),
            "decoded": self.coder(still[: 4 * ((len(still) - 1) // 4) + 1]),
        }

    def _observe_photograph(
        self, variants: Mapping[Variant, Frames], still: Frames, regions: Regions
    ) -> dict[Variant, Observation]:
        """Held against the portrait and the opening that its own speech calls for."""
        own, _ = photograph_speech(self.plan.photograph_seconds)
        called = called_opening(own, len(still))
        clips: dict[Variant, Observation] = {}
        for variant, frames in variants.items():
            faces = None if self.faces is None else self.faces.read(frames, still[0])
            clips[variant] = self._observe(frames, still, called, regions, faces=faces)
        return clips


@torch.no_grad()
def code(vae: AutoencoderKLWan, frames: Frames) -> Frames:
    """Frames [4n+1, H, W, 3] through the latents' means and back, as the pipeline decodes them."""
    values = torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None]
    latents = encode_clips(vae, values.to(vae.device, torch.float32) / 127.5 - 1)
    decoded = stream_decode(vae, latents[0].unbind(1))
    return np.stack([as_pixels(frame) for frame in decoded])


def pipeline_speaker(pipeline: AvatarPipeline, options: Mapping[str, Any]) -> Speaker:
    """A pipeline as a speaker; `options` are fields of ``GenerateOptions`` in place of the model's own."""

    def speak(portrait: NDArray[np.uint8], samples: Samples, prompt: str, seed: int) -> Frames:
        stream = pipeline.stream(
            portrait, samples, prompt=prompt, seed=seed, width=SIZE, height=SIZE, fps=FPS, **options
        )
        return np.stack(list(stream))

    return speak
