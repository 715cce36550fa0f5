"""Time to the first frame in causal order, of recordings of several lengths."""

import contextlib
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.inputs import PORTRAIT, write_speech
from benchmarks.measuring import interleaved, table
from benchmarks.sizes import Sizes
from stableavatar import load
from stableavatar.pipeline import AvatarPipeline


def measure(sizes: Sizes, threads: int) -> str:
    """The text with the table."""
    pipeline = load("tiny", device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        recordings = dict(_recordings(Path(folder), sizes.followed))
        calls = {
            seconds: partial(_first_frame, pipeline, speech, sizes.steps)
            for seconds, speech in recordings.items()
        }
        times = interleaved(calls, sizes.rounds)
    shortest = times[min(times)]
    rows = [
        [f"{seconds:,}", f"{taken.median:.3f}", f"{taken.ratio(shortest):.3f}"]
        for seconds, taken in times.items()
    ]
    return "\n\n".join(
        [
            "From portrait and recording (WAV) to the first frame of `stream` with tiny at "
            f"{sizes.steps} steps; median of {sizes.rounds} rounds, in which the lengths take turns. Loading "
            "the model is not counted.",
            table(["seconds of speech", "first frame after, s", f"to that of {min(times)} s"], rows),
        ]
    )


def _recordings(folder: Path, lengths: tuple[int, ...]) -> Iterator[tuple[int, Path]]:
    for seconds in lengths:
        write_speech(folder / f"{seconds}.wav", seconds)
        yield seconds, folder / f"{seconds}.wav"


def _first_frame(pipeline: AvatarPipeline, speech: Path, steps: int) -> None:
    stream = pipeline.stream(PORTRAIT, speech, order="causal", steps=steps, seed=1)
    with contextlib.closing(stream):
        next(stream)
