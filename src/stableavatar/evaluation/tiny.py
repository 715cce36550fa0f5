"""The table of the embedded model: what it shows on puppets and a photograph it has never seen, beside its
controls.

    python -m stableavatar.evaluation.tiny [--quick] [--model tiny] [--out docs/tiny.md]

Every clip is made, measured and let go, one at a time; nothing is kept from run to run. Exit status 1 where a
bar of this state is missed (spec/6-embedded-model.md). `--gate FOLDER` measures an autoencoder alone, before
a transformer is trained.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from rich.console import Console

from stableavatar.data.landmarks import OUTER_EYES
from stableavatar.data.puppets import EVALUATION_SEED
from stableavatar.errors import InputError, StableAvatarError
from stableavatar.evaluation.cases import (
    FPS,
    FULL,
    QUICK,
    SIZE,
    Plan,
    Samples,
    called_opening,
    long_cases,
    person,
    photograph,
    photograph_speech,
    prompted_cases,
    silent_cases,
    talking_cases,
)
from stableavatar.evaluation.faces import FaceReader
from stableavatar.evaluation.identity import worst_second
from stableavatar.evaluation.lips import lip_score
from stableavatar.evaluation.meter import MouthMeter, shipped_meter
from stableavatar.evaluation.observation import FaceTrack, Frames, Observation, Track, Variant
from stableavatar.evaluation.regions import Regions, person_regions, photograph_regions, puppet_regions
from stableavatar.evaluation.report import Exhibits, write_report
from stableavatar.evaluation.scores import Scores, rich_table
from stableavatar.media.image import read_picture
from stableavatar.pipeline import AvatarPipeline, load
from stableavatar.sampling.decoding import normalise_latents, stream_decode

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


class Evaluation:
    """One run: clips are made by `speaker` and `coder`, read by `meter`, their values gathered in
    `scores`."""

    def __init__(
        self,
        plan: Plan,
        coder: Coder,
        speaker: Speaker | None,
        meter: MouthMeter,
        faces: FaceReader | None = None,
        people: Sequence[Person] = (),
    ) -> None:
        self.plan = plan
        self.faces = faces
        self.people = people
        self.coder = coder
        self.speaker = speaker
        self.meter = meter
        self.scores = Scores()
        self.exhibits = Exhibits()

    def run(self) -> Scores:
        """Everything of the plan; the autoencoder alone when there is no speaker."""
        with _timed("puppets"):
            self.talk()
        if self.speaker is not None:
            with _timed("silence and prompts"):
                self.keep_silent(self.speaker)
                self.follow_prompts(self.speaker)
            with _timed("minutes on end"):
                self.talk_on(self.speaker)
            with _timed("photograph"):
                self.animate_photograph(self.speaker)
            if self.faces is not None and self.people:
                with _timed("more photographs"):
                    self.animate_people(self.speaker, self.faces)
        return self.scores

    def observe(
        self,
        frames: Frames,
        reference: Frames,
        called: Track,
        regions: Regions,
        expression: str | None = None,
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
            expression=expression,
            fps=FPS,
            faces=None if faces is None else FaceTrack(faces.likeness[:count], faces.opening[:count]),
        )

    def talk(self) -> None:
        """Puppets against their truth, and every control of theirs."""
        for index, case in enumerate(talking_cases(self.plan)):
            truth = case.truth
            regions = puppet_regions(truth.identity, SIZE)
            decoded = self.coder(truth.frames)
            opening = truth.articulation.opening
            whole = self.observe(decoded, truth.frames, opening, regions)
            self.scores.add("autoencoder", "decoded", whole)
            still = np.broadcast_to(truth.portrait, truth.frames.shape)
            self.scores.add("autoencoder", "still", self.observe(still, truth.frames, opening, regions))
            count = len(case.frames)
            variants: dict[Variant, Frames] = {
                "true": case.frames,
                "decoded": decoded[:count],
                "still": still[:count],
            }
            if self.speaker is not None:
                variants["made"] = self.speaker(truth.portrait, case.samples, truth.prompt, index)
                if index < self.plan.wrong:
                    variants["wrong"] = self.speaker(truth.portrait, case.other, truth.prompt, index)
            for variant, frames in variants.items():
                clip = self.observe(frames, case.frames, case.called, regions)
                self.scores.add("puppets", variant, clip)
                if variant == "made":
                    score = lip_score(clip.mouth.opening, clip.called)
                    logger.info("puppet %d: lips r %.2f at lag %d", index, score.correlation, score.lag)
                    if index == 0:
                        self.exhibits.puppet_measured = clip.mouth.opening
            if index == 0:
                self.exhibits.puppet_called = case.called
                self.exhibits.puppet = {
                    "truth": case.frames,
                    "decoded": decoded[:count],
                    **({"generated": variants["made"]} if "made" in variants else {}),
                }

    def keep_silent(self, speaker: Speaker) -> None:
        """Silence fed: the mouth stays shut."""
        for index, truth in enumerate(silent_cases(self.plan)):
            regions = puppet_regions(truth.identity, SIZE)
            made = speaker(truth.portrait, truth.samples, truth.prompt, index)
            for variant, frames in _with_true(made, truth.frames):
                clip = self.observe(frames, truth.frames, truth.articulation.opening, regions)
                self.scores.add("silence", variant, clip)

    def follow_prompts(self, speaker: Speaker) -> None:
        """The same speech twice, asked to smile and asked to be serious."""
        for index, truth in enumerate(prompted_cases(self.plan)):
            regions = puppet_regions(truth.identity, SIZE)
            made = speaker(truth.portrait, truth.samples, truth.prompt, index)
            for variant, frames in _with_true(made, truth.frames):
                clip = self.observe(
                    frames, truth.frames, truth.articulation.opening, regions, truth.expression
                )
                self.scores.add("prompts", variant, clip)

    def talk_on(self, speaker: Speaker) -> None:
        """A puppet for minutes: is it at the end what it was at the start."""
        for index, case in enumerate(long_cases(self.plan)):
            truth = case.truth
            regions = puppet_regions(truth.identity, SIZE)
            still = np.broadcast_to(truth.portrait, truth.frames.shape)
            variants: dict[Variant, Frames] = {
                "made": speaker(truth.portrait, case.samples, truth.prompt, index),
                "true": truth.frames,
                "still": still,
            }
            for variant, frames in variants.items():
                self.scores.add("long", variant, self.observe(frames, truth.frames, case.called, regions))

    def animate_people(self, speaker: Speaker, reader: FaceReader) -> None:
        """Photographs of people, read by networks that know people's faces."""
        own, other = photograph_speech(self.plan.photograph_seconds)
        called = called_opening(own, round(self.plan.photograph_seconds * FPS))
        for someone in self.people:
            still = np.broadcast_to(someone.portrait, (len(called), *someone.portrait.shape))
            variants: dict[Variant, Frames] = {
                "made": speaker(someone.portrait, own, PERSON_PROMPT, 0),
                "wrong": speaker(someone.portrait, other, PERSON_PROMPT, 0),
                "decoded": self.coder(still[: 4 * ((len(still) - 1) // 4) + 1]),
            }
            for variant, made in variants.items():
                faces = reader.read(made, someone.portrait)
                clip = self.observe(made, still, called, someone.regions, faces=faces)
                self.scores.add("people", variant, clip)
                logger.info(
                    "%s (%s): identity %.2f in the worst second, lips r %.2f",
                    someone.name,
                    variant,
                    worst_second(faces.likeness, FPS),
                    lip_score(faces.opening[: len(clip.called)], clip.called).correlation,
                )

    def animate_photograph(self, speaker: Speaker) -> None:
        """A photograph with real speech, its own and another's."""
        portrait = photograph()
        own, other = photograph_speech(self.plan.photograph_seconds)
        frames = round(self.plan.photograph_seconds * FPS)
        called = called_opening(own, frames)
        regions = photograph_regions(SIZE)
        still = np.broadcast_to(portrait, (frames, *portrait.shape[1:]))
        coded = self.coder(still[: 4 * ((frames - 1) // 4) + 1])
        variants: dict[Variant, Frames] = {
            "made": speaker(portrait[0], own, PHOTOGRAPH_PROMPT, 0),
            "decoded": coded,
            "still": still,
            "wrong": speaker(portrait[0], other, PHOTOGRAPH_PROMPT, 0),
        }
        for variant, made in variants.items():
            faces = None if self.faces is None else self.faces.read(made, portrait[0])
            clip = self.observe(made, still, called, regions, faces=faces)
            self.scores.add("photograph", variant, clip)
            if faces is not None:
                self.scores.add("people", variant, clip)
            if variant == "made":
                self.exhibits.photograph_called = clip.called
                self.exhibits.photograph_measured = clip.mouth.opening
        self.exhibits.photograph = {"portrait": still, "decoded": coded, "generated": variants["made"]}


def _with_true(made: Frames, true: Frames) -> Iterator[tuple[Variant, Frames]]:
    yield "made", made
    yield "true", true


@contextmanager
def _timed(what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    logger.info("%s: %.0f s", what, time.monotonic() - started)


def _face_reader(*, required: bool) -> FaceReader | None:
    """Where its networks are missing and not required, what they would read is left out, and said so."""
    try:
        return FaceReader()
    except StableAvatarError as error:
        if required:
            raise
        logger.warning("left out, face identity and lips by landmarks: %s", error)
        return None


@torch.no_grad()
def code(vae: AutoencoderKLWan, frames: Frames) -> Frames:
    """Frames [4n+1, H, W, 3] through the latents' means and back, as the pipeline decodes them."""
    values = torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None]
    pictures = values.to(vae.device, vae.dtype) / 127.5 - 1
    latents = normalise_latents(vae, vae.encode(pictures).latent_dist.mode().float())
    decoded = stream_decode(vae, latents[0].unbind(1))
    return np.stack([_as_bytes(frame) for frame in decoded])


def _as_bytes(frame: torch.Tensor) -> NDArray[np.uint8]:
    pixels = ((frame + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 0).cpu().numpy()


def pipeline_speaker(pipeline: AvatarPipeline, options: Mapping[str, Any]) -> Speaker:
    """A pipeline as a speaker; `options` are fields of ``GenerateOptions`` in place of the model's own."""

    def speak(portrait: NDArray[np.uint8], samples: Samples, prompt: str, seed: int) -> Frames:
        stream = pipeline.stream(
            portrait, samples, prompt=prompt, seed=seed, width=SIZE, height=SIZE, fps=FPS, **options
        )
        return np.stack(list(stream))

    return speak


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stableavatar.evaluation.tiny", description="The table of the embedded model."
    )
    parser.add_argument("--quick", action="store_true", help="a subset, some minutes on two cores")
    parser.add_argument("--model", default="tiny", help="tiny, or a folder in this project's layout")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--gate", type=Path, help="measure the autoencoder in this folder alone")
    parser.add_argument(
        "--out", type=Path, help="a document to write the table and pictures into, such as docs/tiny.md"
    )
    parser.add_argument(
        "--portrait",
        type=Path,
        action="append",
        default=[],
        help="a further photograph of a face to animate (may be repeated)",
    )
    parser.add_argument(
        "--curves", type=Path, help="a folder of training logs (*.jsonl) to draw the loss curves from"
    )
    parser.add_argument("--steps", type=int, help="denoising steps in place of the model's own")
    parser.add_argument("--text-scale", type=float, help="strength of the prompt in place of the model's own")
    parser.add_argument(
        "--audio-scale", type=float, help="strength of the speech in place of the model's own"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's first lines. Returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    console = Console(width=None if sys.stdout.isatty() else 200)
    started = time.monotonic()
    plan = QUICK if options.quick else FULL
    try:
        speaker = faces = None
        if options.gate is not None:
            if options.portrait:
                raise InputError("--gate measures an autoencoder alone: leave --portrait out")
            if not (options.gate / "config.json").is_file():
                raise InputError(f"There is no autoencoder in {options.gate}: config.json is missing.")
            vae = AutoencoderKLWan.from_pretrained(options.gate).eval()
        else:
            pipeline = load(options.model, dtype=options.dtype)
            given = {
                "steps": options.steps,
                "text_scale": options.text_scale,
                "audio_scale": options.audio_scale,
            }
            speaker = pipeline_speaker(
                pipeline, {name: value for name, value in given.items() if value is not None}
            )
            vae = pipeline.vae
            faces = _face_reader(required=bool(options.portrait))
        people = find_people(options.portrait, faces) if faces is not None else []
        evaluation = Evaluation(
            plan, lambda frames: code(vae, frames), speaker, shipped_meter(), faces, people
        )
        scores = evaluation.run()
        minutes = (time.monotonic() - started) / 60
        title = (
            f"{options.gate or options.model}, {plan.puppets} puppets x {plan.seconds:g} s, "
            f"seeds from {EVALUATION_SEED}, {minutes:.1f} min"
        )
        console.print(rich_table(scores, title))
        if options.out is not None:
            write_report(options.out, scores, evaluation.exhibits, title, options.curves)
    except StableAvatarError as error:
        logger.error("%s", error)
        return 2
    missed = scores.missed()
    for line in missed:
        console.print(f"[bold red]missed[/] {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
