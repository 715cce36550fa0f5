"""Jobs with real files, for the tests of those who keep and make them."""

from typing import Any

from command_line import portrait, speech
from stableavatar.jobs.job import Job
from stableavatar.jobs.store import JobStore

QUICK: dict[str, Any] = {
    "steps": 1, "text_scale": 1.0, "audio_scale": 1.0, "width": 48, "height": 48, "seed": 3, "fps": 25.0,
    "start": 0.0, "duration": None, "quality": 30,
}  # fmt: skip


def add(store: JobStore, owner: str = "ann", seconds: float = 0.6, **options: Any) -> Job:
    """A job with real files."""
    folder = store.new_folder()
    portrait(folder / "portrait.png").rename(folder / "portrait")
    speech(folder / "speech.wav", seconds).rename(folder / "speech")
    return store.add(owner, folder, {**QUICK, **options}, {"seconds": seconds})


def found(store: JobStore, job: Job) -> Job:
    now = store.get(job.owner, job.id)
    assert now is not None
    return now
