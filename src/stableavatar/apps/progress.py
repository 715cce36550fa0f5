"""How far a video is, for someone at a terminal or for a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from stableavatar.generation import Progress

SECONDS_BETWEEN_LINES = 10.0
MAKING = "making the video"
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    TaskProgressColumn(),
    TextColumn("{task.fields[detail]}"),
)


class Display(Protocol):
    """Shows stages without a measure, such as loading, and the pipeline's own progress."""

    def stage(self, text: str) -> None:
        """Say what is begun."""

    def __call__(self, progress: "Progress") -> None:
        """Show how far the video is."""


@contextmanager
def display() -> Iterator[Display]:
    """A bar on the standard error stream where that is a terminal, else lines."""
    if not sys.stderr.isatty():
        yield LineDisplay()
        return
    with Bar(*COLUMNS, console=Console(stderr=True), transient=True) as bar:
        yield BarDisplay(bar)


class BarDisplay:
    """A bar with steps, windows, frames and the time left."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._text: str | None = None
        self._task = bar.add_task("", total=None, detail="")

    def stage(self, text: str) -> None:
        """Show a bar that only says that something is going on."""
        self._text = text
        self._bar.reset(self._task, total=None, description=text.capitalize(), detail="")

    def __call__(self, progress: "Progress") -> None:
        """Move the bar."""
        if self._text != MAKING:
            self.stage(MAKING)
        self._bar.update(
            self._task,
            total=None if progress.share is None else 1.0,
            completed=progress.share or 0.0,
            detail=describe(progress),
        )


class LineDisplay:
    """A line at the beginning, at the first frame, at the end, and every ten seconds between."""

    def __init__(self) -> None:
        self._text: str | None = None
        self._shown = 0.0

    def stage(self, text: str) -> None:
        """Write a line."""
        self._text = text
        self._write(text)

    def __call__(self, progress: "Progress") -> None:
        """Write a line if it is time for one."""
        begins = self._text != MAKING
        due = time.monotonic() - self._shown >= SECONDS_BETWEEN_LINES
        first_frame = progress.frame == 1
        if begins or due or first_frame or progress.share == 1:
            self._text = MAKING
            share = "" if progress.share is None else f"{progress.share:.0%}, "
            self._write(f"{MAKING}: {share}{describe(progress)}")

    def _write(self, line: str) -> None:
        self._shown = time.monotonic()
        typer.echo(line, err=True)


def describe(progress: "Progress") -> str:
    """Where the work is and how long it will take: `step 3/50, window 2/7, frame 64/448, 4 min 10 s left`."""
    windows = "" if progress.windows is None else f"/{progress.windows}"
    frames = "" if progress.frames is None else f"/{progress.frames}"
    where = (
        f"step {progress.step}/{progress.steps}, window {progress.window}{windows}, "
        f"frame {progress.frame}{frames}"
    )
    if progress.seconds_left is None or progress.share == 1:
        return where
    return f"{where}, {duration(progress.seconds_left)} left"


def duration(seconds: float) -> str:
    """Seconds in words: `8.3 s`, `4 min 10 s`, `2 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes_rest = divmod(minutes, 60)
    return f"{hours} h {minutes_rest:02d} min" if hours else f"{minutes} min {rest:02d} s"
