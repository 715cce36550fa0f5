"""A job: a video that was asked for, and its files in a folder of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from stableavatar.unfinished import unfinished_video

State = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
STATES: tuple[State, ...] = get_args(State)
FINISHED: tuple[State, ...] = ("completed", "failed", "cancelled")

PORTRAIT, SPEECH, VIDEO = "portrait", "speech", "video.mp4"


@dataclass(frozen=True)
class Job:
    """A video that was asked for.

    Attributes:
        number: rises with every job. id: what it is called outside.
        owner: whose it is; nobody else may see it.
        state: "queued", "in_progress", "completed", "failed" or "cancelled".
        options: what `AvatarPipeline.generate` is given, and "quality" of the file.
        details: what was found when it was taken, such as the speech's length in seconds.
        created, started, finished: seconds since 1970; the last two None before.
        progress: fields of `generation.Progress`, None before the first.
        result: of a completed one, the settings that repeat it, and its `frame_count`.
        error: a sentence, of a failed one.
        stopping: it was asked to stop.
    """

    number: int
    id: str
    owner: str
    state: State
    options: Mapping[str, Any]
    details: Mapping[str, Any]
    created: float
    started: float | None = None
    finished: float | None = None
    progress: Mapping[str, Any] | None = None
    result: Mapping[str, Any] | None = None
    error: str | None = None
    stopping: bool = False
    folder: Path = field(default=Path(), compare=False)

    @property
    def is_finished(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in FINISHED

    @property
    def portrait(self) -> Path:
        """The picture that was given."""
        return self.folder / PORTRAIT

    @property
    def speech(self) -> Path | None:
        """The recording that was given, None for a silent video."""
        path = self.folder / SPEECH
        return path if path.exists() else None

    @property
    def output(self) -> Path:
        """Where the complete video lies."""
        return self.folder / VIDEO

    @property
    def video(self) -> Path | None:
        """The video as far as it is there as a file that plays; None while it is made."""
        return next((it for it in (self.output, unfinished_video(self.output)) if it.exists()), None)
