"""The fields of the form of a video, and what they are filled in with again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stableavatar.jobs.asking import copied
from stableavatar.jobs.job import Job

# In the order in which handlers get them; those of options bear their names.
FIELDS = (
    "portrait",
    "speech",
    "prompt",
    "aspect",
    "first_frames",
    "steps",
    "text_scale",
    "audio_scale",
    "overlap",
    "overlap_weights",
    "step_cache",
    "speech_normalisation",
    "guidance",
    "negative_prompt",
    "seed",
    "width",
    "height",
    "fit",
    "fps",
    "start",
    "duration",
    "quality",
)


def as_made(job: Job, folder: Path) -> list[Any]:
    """What makes the same video again, by `FIELDS`; files as copies of one's own, in a folder."""
    return _values(job, {**job.options, **(job.result or {})}, folder)


def as_asked(job: Job, folder: Path) -> list[Any]:
    """What the form had when the video was asked for, by `FIELDS`; files as copies of one's own."""
    seed = None if job.details.get("seed_drawn") else job.options["seed"]
    return _values(job, {**job.options, "seed": seed}, folder)


def _values(job: Job, options: Mapping[str, Any], folder: Path) -> list[Any]:
    values: dict[str, Any] = {
        **{name: options[name] for name in FIELDS if name in options},
        # What was chosen, and not what came of it.
        **{name: job.options[name] for name in ("aspect", "negative_prompt", "width", "height", "fps")},
        "portrait": _copy(job.portrait, folder / "portrait"),
        "speech": None if job.speech is None else _copy(job.speech, folder / "speech"),
        "first_frames": options["order"] == "causal",
        # A video of an earlier release has none.
        "speech_normalisation": options.get("speech_normalisation", "window"),
    }
    return [values[name] for name in FIELDS]


def _copy(source: Path, target: Path) -> str:
    """A file with the usual ending."""
    target = target.with_suffix(_ending(source))
    copied(source)(target)
    return str(target)


def _ending(path: Path) -> str:
    """The usual ending of a file, from its first bytes: players go by it."""
    with path.open("rb") as file:
        head = file.read(12)
    for start, ending in (
        (b"\x89PNG", ".png"),
        (b"\xff\xd8", ".jpg"),
        (b"RIFF", ".webp" if head[8:] == b"WEBP" else ".wav"),
        (b"fLaC", ".flac"),
        (b"OggS", ".ogg"),
        (b"ID3", ".mp3"),
        (b"\x1aE\xdf\xa3", ".webm"),
    ):
        if head.startswith(start):
            return ending
    return ".mp4" if head[4:8] == b"ftyp" else ""
