"""One video made by one process and by two, of one thread each."""

import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import av
import numpy as np

from benchmarks.inputs import PORTRAIT, write_speech
from benchmarks.measuring import BenchmarkError, Times, interleaved, run_command, table
from benchmarks.sizes import Sizes

THREADS = 1
_TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAUNCHES: dict[str, tuple[str, ...]] = {"one process": (), "two processes": _TWO}


def measure(sizes: Sizes, threads: int) -> str:
    """The text with the table; the number of threads is one whatever is asked for.

    Raises:
        BenchmarkError: a command failed, or the two make other frames.
    """
    lengths = (sizes.short_speech, sizes.long_speech)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calls: dict[str, Callable[[], object]] = {}
        for seconds in lengths:
            write_speech(folder / f"{seconds}.wav", seconds)
            for launch in LAUNCHES:
                command = _command(folder, launch, seconds, sizes.process_steps)
                calls[_key(launch, seconds)] = partial(run_command, command, THREADS)
        times = interleaved(calls, sizes.rounds, warm_up=False)
        frames = {seconds: _same_frames(folder, seconds) for seconds in lengths}
    one, two = (_added(times, launch, lengths) for launch in LAUNCHES)
    added = lengths[1] - lengths[0]
    rows = [
        [
            launch,
            *(f"{times[_key(launch, seconds)].median:.1f}" for seconds in lengths),
            f"{added / taken.median:.2f}",
            f"{one.ratio(taken):.2f}",
        ]
        for launch, taken in zip(LAUNCHES, (one, two), strict=True)
    ]
    headings = [
        "launch", *(f"{seconds} s of speech, s" for seconds in lengths), "video a second, s", "speed-up",
    ]  # fmt: skip
    return "\n\n".join(
        [
            f"`stableavatar generate` with tiny at {sizes.process_steps} steps, one thread a process, from "
            f"the start of the command to its end; median of {sizes.rounds} rounds. What the "
            f"{added} s between the two lengths take is the rate: starting and loading do not count. All "
            f"{sum(frames.values()):,} frames of the two are identical.",
            table(headings, rows),
        ]
    )


def _key(launch: str, seconds: int) -> str:
    return f"{launch}, {seconds} s"


def _output(folder: Path, launch: str, seconds: int) -> Path:
    return folder / f"{launch.split()[0]}_{seconds}.mp4"


def _command(folder: Path, launch: str, seconds: int, steps: int) -> list[str]:
    inputs = [str(PORTRAIT), str(folder / f"{seconds}.wav"), "-o", str(_output(folder, launch, seconds))]
    options = ["--steps", str(steps), "--seed", "1", "--overwrite"]
    return [sys.executable, *LAUNCHES[launch], "-m", "stableavatar", "generate", *inputs, *options]


def _added(times: dict[str, Times], launch: str, lengths: tuple[int, int]) -> Times:
    """What the longer video takes more than the shorter one, in every round."""
    short, long = (times[_key(launch, seconds)].seconds for seconds in lengths)
    return Times(tuple(after - before for before, after in zip(short, long, strict=True)))


def _same_frames(folder: Path, seconds: int) -> int:
    """How many frames the videos of one length have, each the same in both. Raises BenchmarkError where they
    are not."""
    count = 0
    paths = [_output(folder, launch, seconds) for launch in LAUNCHES]
    for one, two in zip_longest(*(_frames(path) for path in paths)):
        if one is None or two is None or not np.array_equal(one, two):
            raise BenchmarkError(
                f"frame {count + 1} of {seconds} s of speech is not the same from one process and from two"
            )
        count += 1
    return count


def _frames(path: Path) -> Iterator[Any]:
    with av.open(str(path)) as file:
        for frame in file.decode(video=0):
            yield frame.to_ndarray(format="rgb24")
