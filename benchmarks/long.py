"""A long video by `tiny`: its memory, and whether lips and person are at its end what they were at its start.

    python -m benchmarks.long --seconds 60 600 --orders wavefront causal --out docs/performance.md

A puppet that nothing was trained on says recordings that nothing was trained on. Every video is made in a
process of its own, whose peak memory is read; then the mouths of a minute at its start and of one at its end
are measured against the opening that the speech calls for, and its pictures against the puppet's truth
outside mouth and eyes. The two minutes have the same words, and windows are laid over them in the same way: a
window that lies in a silent pause as a whole can make the mouth move (docs/tiny.md), wherever it is. Videos
are kept in --folder; one that is there is not made again with the same weights, versions and threads.
"""

import argparse
import hashlib
import json
import multiprocessing
import time
from collections.abc import Iterator
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import stableavatar
from benchmarks.inputs import write_wav
from benchmarks.measuring import MEGABYTE, conditions, memory, table
from stableavatar.choices import Order
from stableavatar.data.puppets import EVALUATION_SEED, Identity, Renderer, articulate, make_motion
from stableavatar.data.puppets.recordings import evaluation_speech
from stableavatar.evaluation.lips import lip_score
from stableavatar.evaluation.meter import shipped_meter
from stableavatar.evaluation.observation import Frames
from stableavatar.evaluation.pictures import structural_similarity
from stableavatar.evaluation.regions import puppet_regions
from stableavatar.evaluation.report import check_document, put_between
from stableavatar.media.reading import read_frames
from stableavatar.sampling.windows import latent_frames_for
from stableavatar.training.tiny.assemble import SAMPLING_DEFAULTS

RATE, FPS, SIZE = 16_000, 25, 128
HEADINGS = (
    "order", "speech", "peak MiB", "first frame, s", "lips, start", "lips, end", "SSIM, start", "SSIM, end",
)  # fmt: skip
MARKERS = ("<!-- long: written by benchmarks.long -->", "<!-- end of long -->")
WEIGHTS = Path(stableavatar.__file__).parent / "assets" / "tiny"
STRETCH = 60.0
"""Seconds at the start and at the end that are measured."""
WINDOW_STRIDE = 4 * (latent_frames_for(SAMPLING_DEFAULTS["window"]) - SAMPLING_DEFAULTS["overlap"])
"""Frames from a window's start to the next one's."""


def long_speech(seconds: float) -> NDArray[np.float32]:
    """Recordings one after the other, over and over, at 16 kHz; what is measured at the end has the words of
    the start, as some are harder than others."""
    speech = evaluation_speech(0, seconds)
    start, stop = ends(seconds)
    sample = start * RATE // FPS
    again = speech[: stop * RATE // FPS - sample]
    speech[sample:] = np.resize(again, len(speech) - sample)
    return speech


def ends(seconds: float) -> tuple[int, int]:
    """First frame of what is measured at the end, and one after its last; at the start as many are measured.
    The first begins a window, as frame 0 does."""
    total = round(seconds * FPS)
    length = round(min(STRETCH, seconds / 2) * FPS)
    start = (total - length) // WINDOW_STRIDE * WINDOW_STRIDE
    return start, start + length


class Truth:
    """The puppet that says the speech, drawn frame by frame."""

    def __init__(self, seed: int, speech: NDArray[np.float32]) -> None:
        self.articulation = articulate(speech, RATE, FPS)
        self._motion = make_motion(seed, self.articulation, "neutral", FPS)
        self._renderer = Renderer(Identity.from_seed(seed), SIZE)

    def frames(self, start: int, stop: int) -> Frames:
        """Frames `[start, stop)`."""
        drawn = (self._renderer.draw(self.articulation, self._motion, k) for k in range(start, stop))
        return np.stack([picture for picture, _face, _lips in drawn])


def make(portrait: Path, speech: Path, output: Path, order: Order, steps: int | None, threads: int) -> None:
    """Make a video, and write beside it what it took."""
    torch.set_num_threads(threads)
    began = time.monotonic()
    made = stableavatar.generate(portrait, speech, output, order=order, steps=steps, seed=1, resume=False)
    took = time.monotonic() - began
    peak = memory(peak=True) / MEGABYTE
    figures = {
        "date": str(date.today()), "peak": peak, "took": took, "first_frame": made.first_frame_seconds,
        **made_with(threads),
    }  # fmt: skip
    output.with_suffix(".json").write_text(json.dumps(figures), encoding="utf-8")


def made_with(threads: int) -> dict[str, str]:
    """What the figures of a video depend on."""
    digest = hashlib.sha256()
    for file in sorted(WEIGHTS.rglob("*")):
        if file.is_file():
            digest.update(file.read_bytes())
    return {
        "version": stableavatar.__version__,
        "weights": digest.hexdigest(),
        "conditions": conditions(threads, "float32"),
    }


def kept(output: Path, threads: int) -> dict[str, Any] | None:
    """What a video took that was made in the same way; None where there is none."""
    file = output.with_suffix(".json")
    if not file.exists() or not output.exists():
        return None
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    same = made_with(threads).items() <= figures.items()
    return figures if same else None


def write_inputs(seed: int, seconds: float, portrait: Path, speech: Path) -> None:
    """Puppet and speech as files: as samples in memory, speech would count as memory of the generation."""
    samples = long_speech(seconds)
    Image.fromarray(Truth(seed, samples[: RATE * 2]).frames(0, 1)[0]).save(portrait)
    write_wav(speech, samples)


def measure(path: Path, seed: int, seconds: float) -> Iterator[dict[str, float]]:
    """Lip correlation and likeness of the first and of the last stretch."""
    speech = long_speech(seconds)
    truth = Truth(seed, speech)
    around = puppet_regions(Identity.from_seed(seed), SIZE).surroundings
    last, stop = ends(seconds)
    length = stop - last
    for start in (0, last):
        frames = np.stack(list(islice(read_frames(path), start, start + length)))
        opening = shipped_meter().measure(frames).opening
        score = lip_score(opening, truth.articulation.opening[start : start + length])
        every = range(0, length, FPS)  # the true head sways, which no model can know: one second says little
        true = np.concatenate([truth.frames(start + k, start + k + 1) for k in every])
        likeness = structural_similarity(frames[every.start : every.stop : every.step], true, around).mean()
        yield {"lips": score.correlation, "lag": score.lag, "likeness": float(likeness)}


def video(
    folder: Path, seed: int, seconds: float, order: Order, steps: int | None, threads: int
) -> tuple[Path, dict[str, Any]]:
    """A video and what it took; it is made if it is not there."""
    output = folder / f"{order}_{seconds:g}s_{steps or 'default'}_puppet{seed - EVALUATION_SEED}.mp4"
    figures = kept(output, threads)
    if figures is None:
        portrait, speech = folder / f"puppet{seed - EVALUATION_SEED}.png", folder / f"{seconds:g}s.wav"
        write_inputs(seed, seconds, portrait, speech)
        arguments = (portrait, speech, output, order, steps, threads)
        child = multiprocessing.get_context("spawn").Process(target=make, args=arguments)
        child.start()
        child.join()
        figures = None if child.exitcode else kept(output, threads)
    if figures is None:
        raise SystemExit(f"{output} was not made")
    return output, figures


def row(output: Path, figures: dict[str, Any], seed: int, seconds: float, order: Order) -> list[str]:
    """A row of the table."""
    start, end = measure(output, seed, seconds)
    return [
        order, f"{seconds:g} s", f"{figures['peak']:.1f}", f"{figures['first_frame']:.1f}",
        f"{start['lips']:.2f}", f"{end['lips']:.2f}", f"{start['likeness']:.3f}", f"{end['likeness']:.3f}",
    ]  # fmt: skip


def main() -> None:
    """Make what is missing, print a table, and put it into the document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("out/long"))
    parser.add_argument("--seconds", type=float, nargs="+", default=[60.0, 600.0])
    parser.add_argument("--orders", nargs="+", choices=get_args(Order), default=["wavefront", "causal"])
    parser.add_argument("--steps", type=int, help="by default the model's own")
    parser.add_argument("--puppet", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a document to put the table into")
    given = parser.parse_args()
    if given.out is not None:
        check_document(given.out, *MARKERS)
    given.folder.mkdir(parents=True, exist_ok=True)
    seed = EVALUATION_SEED + given.puppet
    rows: list[list[str]] = []
    dates: set[str] = set()
    for order in given.orders:
        for seconds in given.seconds:
            output, figures = video(given.folder, seed, seconds, order, given.steps, given.threads)
            rows.append(row(output, figures, seed, seconds, order))
            dates.add(figures["date"])
    steps = given.steps or SAMPLING_DEFAULTS["steps"]
    text = "\n\n".join(
        [
            f"tiny at {steps} steps, puppet {given.puppet}; lips: correlation over {STRETCH:g} s at the "
            "start and at the end (half of a shorter video), with the same words under the same windows; "
            "SSIM: of one frame a second there.",
            table(HEADINGS, rows),
            f"{' and '.join(sorted(dates))}, {conditions(given.threads, 'float32')}",
        ]
    )
    print(text)
    if given.out is not None:
        put_between(given.out, text, *MARKERS, title="Speed and memory")


if __name__ == "__main__":
    main()
