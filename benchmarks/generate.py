"""Whole videos with tiny, in every order and of several lengths: time, memory, time to the first frame."""

import tempfile
import time
from pathlib import Path
from typing import Any, get_args

from benchmarks.inputs import PORTRAIT, write_speech
from benchmarks.measuring import answer, forget_peak, fresh_process, megabytes, memory, table
from benchmarks.sizes import Sizes
from stableavatar import load
from stableavatar.choices import Order
from stableavatar.generation import Progress


def measure(sizes: Sizes, threads: int) -> str:
    """The text with the tables."""
    made: dict[tuple[int, Order], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seconds in sizes.speech:
            speech = Path(folder) / f"{seconds}.wav"
            write_speech(speech, seconds)
            for order in get_args(Order):
                settings = {"speech": str(speech), "order": order, "steps": sizes.steps}
                made[seconds, order] = fresh_process(__name__, settings, threads)
    rows = [
        [
            order,
            str(seconds),
            f"{found['seconds'] / seconds:.3f}",
            f"{found['first_frame']:.2f}",
            megabytes(found["peak"]),
            megabytes(found["peak"] - found["loaded"]),
        ]
        for (seconds, order), found in made.items()
    ]
    headings = [
        "order", "seconds of speech", "seconds a second of video", "first frame after, s", "peak, MB",
        "of it above the loaded model, MB",
    ]  # fmt: skip
    return "\n\n".join(
        [
            f"`generate` with tiny at {sizes.steps} steps (its own default is more), float32, from portrait "
            "and recording to the finished file; one run each, in a process of its own. Loading the model is "
            "not counted.",
            table(headings, rows),
        ]
    )


def _child(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the whole and to the first frame, and memory in bytes when loaded and at its peak."""
    pipeline = load("tiny", device="cpu", dtype="float32")
    forget_peak()
    loaded = memory(peak=False)
    first_frame: list[float] = []

    def watch(progress: Progress) -> None:
        if progress.frame == 1 and not first_frame:
            first_frame.append(time.perf_counter() - begun)

    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        pipeline.generate(
            PORTRAIT,
            settings["speech"],
            Path(folder) / "video.mp4",
            order=settings["order"],
            steps=settings["steps"],
            seed=1,
            progress=watch,
        )
        seconds = time.perf_counter() - begun
    return {
        "seconds": seconds,
        "first_frame": first_frame[0],
        "loaded": loaded,
        "peak": memory(peak=True),
    }


if __name__ == "__main__":
    answer(_child)
