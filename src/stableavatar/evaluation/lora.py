"""What a LoRA of one person gains: the identity figures of spec/6 with it and without.

    python -m stableavatar.evaluation.lora data --folder runs/tiny-lora/data
    stableavatar cache-latents recipes/tiny-lora.yaml --passes 4 --output runs/tiny-lora/latents
    stableavatar train recipes/tiny-lora.yaml
    python -m stableavatar.evaluation.lora measure --lora runs/tiny-lora/lora --out docs/training.md

The person is a puppet that `tiny` has not seen. The clips to train on have voices and words of their own;
those that are measured are other ones of the same person. At scale 0 the frames must be the base model's.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stableavatar.data.puppets import EVALUATION_SEED, Identity, PuppetClip, make_clip
from stableavatar.data.puppets.layout import write_dataset
from stableavatar.data.puppets.recordings import evaluation_speech
from stableavatar.errors import InputError, with_status
from stableavatar.evaluation.cases import FPS, SIZE, called_opening
from stableavatar.evaluation.identity import sharpness_ratio
from stableavatar.evaluation.lips import lip_score
from stableavatar.evaluation.meter import shipped_meter
from stableavatar.evaluation.observation import Frames
from stableavatar.evaluation.pictures import structural_similarity
from stableavatar.evaluation.regions import puppet_regions
from stableavatar.evaluation.report import check_document, put_between
from stableavatar.pipeline import AvatarPipeline, load

PERSON = EVALUATION_SEED + 100
# Motion and voices of the clips that are trained on: seeds of training, each of a person that is replaced.
FIRST_SEED = 950_000
START, END = "<!-- lora: written by stableavatar.evaluation.lora -->", "<!-- end of lora -->"


def training_clips(count: int, seconds: float) -> Iterator[PuppetClip]:
    """The person with training voices."""
    person = Identity.from_seed(PERSON)
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        yield make_clip(seed, seconds, size=SIZE, identity=person)


def measured_clips(count: int, seconds: float) -> Iterator[PuppetClip]:
    """The person with recordings of the evaluation."""
    person = Identity.from_seed(PERSON)
    for index in range(count):
        yield make_clip(
            PERSON + index, seconds, size=SIZE, identity=person, samples=evaluation_speech(index, seconds)
        )


Values = NDArray[np.float64]


@dataclass(frozen=True)
class LoraFigures:
    """Of one scale, a value a clip: SSIM and sharpness outside mouth and eyes against the truth, and lip
    correlation. `frames` are all that was made, clip after clip."""

    similarity: Values
    sharpness: Values
    lips: Values
    frames: tuple[Frames, ...]


def measure(pipeline: AvatarPipeline, clips: Sequence[PuppetClip], steps: int | None = None) -> LoraFigures:
    """Make the clips with a pipeline as it stands and hold them against the truth."""
    meter = shipped_meter()
    rows, made = [], []
    for number, clip in enumerate(clips):
        stream = pipeline.stream(
            clip.portrait, clip.samples, prompt=clip.prompt, seed=number, width=SIZE, height=SIZE, fps=FPS,
            steps=steps,
        )  # fmt: skip
        frames = np.stack(list(stream))
        where = puppet_regions(clip.identity, SIZE).surroundings
        called = called_opening(clip.samples, len(frames))
        rows.append(
            (
                structural_similarity(frames, clip.frames, where).mean(),
                sharpness_ratio(frames, clip.frames, where),
                lip_score(meter.measure(frames).opening, called).correlation,
            )
        )
        made.append(frames)
    similarity, sharpness, lips = np.asarray(rows, dtype=np.float64).T
    return LoraFigures(similarity, sharpness, lips, tuple(made))


def compare(
    model: str, lora: Path, clips: Sequence[PuppetClip], scales: Sequence[float], steps: int | None = None
) -> tuple[str, bool]:
    """The text with the table; and whether the last scale gains: SSIM in all clips but one of six, and
    sharpness in the median.

    Raises:
        InputError: at scale 0 a frame is not the base model's.
    """
    pipeline = load(model)
    figures = {"without": measure(pipeline, clips, steps)}
    pipeline.load_lora_weights(lora, adapter_name="person")
    for scale in (0.0, *scales):
        pipeline.set_adapters("person", scale)
        figures[f"scale {scale:g}"] = measure(pipeline, clips, steps)
    pairs = zip(figures["without"].frames, figures["scale 0"].frames, strict=True)
    if not all(np.array_equal(one, other) for one, other in pairs):
        raise InputError(f"{lora}: at scale 0 the frames are not those of the model without it")
    without, last = figures["without"], figures[f"scale {scales[-1]:g}"]
    gains = last.similarity - without.similarity
    higher = int((gains > 0).sum())
    gained = higher >= len(clips) * 5 / 6 and bool(np.median(last.sharpness - without.sharpness) > 0)
    lines = [
        f"{len(clips)} clips of {clips[0].samples.size / 16_000:.0f} s of puppet {PERSON}, with other "
        "speech than trained on; medians. At scale 0 every frame is that of the model without the LoRA.",
        "",
        "| LoRA | SSIM outside mouth and eyes | sharpness there, against the truth's | lip correlation |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {name} | {np.median(found.similarity):.3f} | {np.median(found.sharpness):.2f} "
            f"| {np.median(found.lips):.2f} |"
            for name, found in figures.items()
        ),
        "",
        f"Clip by clip, at scale {scales[-1]:g}: SSIM is higher in {higher} of {len(clips)}, by "
        f"{np.median(gains):.3f} in the median and {gains.min():.3f} in the worst.",
    ]
    return "\n".join(lines), gained


@with_status
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stableavatar.evaluation.lora",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="the clips to train on")
    data.add_argument("--folder", type=Path, required=True)
    data.add_argument("--clips", type=int, default=24)
    data.add_argument("--seconds", type=float, default=4.0)
    figures = commands.add_parser("measure", help="with the LoRA and without")
    figures.add_argument("--lora", type=Path, required=True)
    figures.add_argument("--model", default="tiny")
    figures.add_argument("--clips", type=int, default=6)
    figures.add_argument("--seconds", type=float, default=6.0)
    figures.add_argument("--scales", type=float, nargs="+", default=[0.5, 1.0])
    figures.add_argument("--steps", type=int, help="denoising steps in place of the model's own")
    figures.add_argument("--out", type=Path, help="a document to write the table into")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if options.command == "data":
        print(write_dataset(options.folder, training_clips(options.clips, options.seconds)))
        return 0
    if options.out is not None:
        check_document(options.out, START, END)
    clips = list(measured_clips(options.clips, options.seconds))
    text, gained = compare(options.model, options.lora, clips, options.scales, options.steps)
    print(text)
    if options.out is not None:
        put_between(options.out, text, START, END, title="Training")
    if not gained:
        print(f"{options.lora}: nothing is gained by it", file=sys.stderr)
    return 0 if gained else 1


if __name__ == "__main__":
    sys.exit(main())
