"""Asking for a video: files and options into a job."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from stableavatar.jobs.intake import OPTIONS, FileChecker
from stableavatar.jobs.job import PORTRAIT, SPEECH, Job
from stableavatar.jobs.store import JobStore
from stableavatar.options import GenerateOptions

Bring = Callable[[Path], None]
"""Puts a file under the name that it is given."""


def ask(
    store: JobStore,
    checker: FileChecker,
    owner: str,
    portrait: Bring,
    speech: Bring | None,
    options: GenerateOptions,
    quality: int,
) -> Job:
    """A job that waits for its turn, if its files can be used.

    Raises:
        InputError: a file or an option cannot be used.
        QueueFullError, BusyError: too many videos or files are waiting.
        NoRoomError: the disk is full.
        OSError: the files cannot be kept.
    """
    store.check_room(owner)
    with checker.asking(owner):
        folder = store.new_folder()
        try:
            portrait(folder / PORTRAIT)
            if speech is not None:
                speech(folder / SPEECH)
            recording = None if speech is None else folder / SPEECH
            found = checker.check(owner, folder / PORTRAIT, recording, options)
            checker.check_options(options, found)
            chosen = {name: getattr(options, name) for name in OPTIONS}
            chosen["quality"] = quality
            drawn = chosen["seed"] is None
            if drawn:  # of the job, so that it is the same video whatever befalls a worker
                chosen["seed"] = int.from_bytes(os.urandom(4), "little")
            return store.add(owner, folder, chosen, {"seconds": found.seconds, "seed_drawn": drawn})
        finally:
            store.discard(folder)


def copied(source: Path) -> Bring:
    """A file of this machine, linked where that can be: nobody changes it."""

    def bring(target: Path) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

    return bring
