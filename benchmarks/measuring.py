"""What every part measures with: calls timed in turns, peaks of fresh processes, tables."""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import transformers

MEGABYTE = 2**20
Key = TypeVar("Key", bound=Hashable)
_SHOWN_OF_A_FAILURE = 10  # first and last lines of what a failed process said


class BenchmarkError(Exception):
    """A measurement that cannot be made, or whose two sides do not do the same work."""


@dataclass(frozen=True)
class Times:
    """Seconds of one call in every round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of the middle round."""
        return statistics.median(self.seconds)

    def ratio(self, other: "Times") -> float:
        """How many times as long as `other` this takes: the median of the rounds' ratios, so that what slows
        a whole round down does not count."""
        return statistics.median(mine / its for mine, its in zip(self.seconds, other.seconds, strict=True))


def interleaved(
    calls: Mapping[Key, Callable[[], object]], rounds: int, *, warm_up: bool = True
) -> dict[Key, Times]:
    """Times of calls that take turns (A, B, A, B, ...), so that the machine's drift hits all alike.

    Args:
        rounds: that are counted. warm_up: a round before them that is not.
    """
    if warm_up:
        for call in calls.values():
            call()
    seconds: dict[Key, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begun)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def memory(peak: bool) -> int:
    """Bytes of main memory that this process holds, or has held at its peak.

    From the kernel's own count of this program: `ru_maxrss` of a started process begins with the peak of the
    process that started it.

    Raises:
        BenchmarkError: the system has no `/proc`.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        raise BenchmarkError("memory is read from /proc, which this system does not have: measure on Linux")
    name = "VmHWM" if peak else "VmRSS"
    found = re.search(rf"^{name}:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    if found is None:
        raise BenchmarkError(f"{status} does not tell {name}")
    return int(found[1]) * 1024


def forget_peak() -> None:
    """Let the peak begin anew with what this process holds now: what loading took for a while is not
    counted."""
    Path("/proc/self/clear_refs").write_text("5")


def fresh_process(module: str, settings: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """What a module's `answer` gives for settings in a process of its own.

    Raises:
        BenchmarkError: it failed.
    """
    said = run_command([sys.executable, "-m", module, json.dumps(settings)], threads)
    return json.loads(said.splitlines()[-1])


def answer(child: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The other end of `fresh_process`: the last line of what a module prints when it is run."""
    show_no_progress()
    print(json.dumps(child(json.loads(sys.argv[1]))))


def show_no_progress() -> None:
    """Keep the libraries' loading bars out of the tables."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def run_command(command: Sequence[str], threads: int) -> str:
    """What a command prints, run with so many threads.

    Raises:
        BenchmarkError: it failed; with the first and the last lines of what it said.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        if len(said) > 2 * _SHOWN_OF_A_FAILURE:
            said = [*said[:_SHOWN_OF_A_FAILURE], "...", *said[-_SHOWN_OF_A_FAILURE:]]
        shown = " ".join(["python", *command[1:]])
        raise BenchmarkError("\n".join([f"failed with status {done.returncode}: {shown}", *said]))
    return done.stdout


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns lined up; all but the first to the right."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    rule = [":" + "-" * (width - 1) if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [headings, rule, *rows]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )


def megabytes(size: int) -> str:
    """A size in bytes for a table."""
    return f"{size / MEGABYTE:,.0f}"


def circumstances(threads: int, dtypes: str) -> str:
    """When, with what and on which kind of processor, in a sentence."""
    return f"{date.today()}, {conditions(threads, dtypes)}"


def conditions(threads: int, dtypes: str) -> str:
    """The rest of that sentence."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    return f"{versions}, threads: {threads}, processor: {_processor()}, {dtypes}."


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    found = None
    if described.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", described.read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()
