"""A process that has a model and makes the videos of a store, one after the other."""

import ctypes
import json
import logging
import os
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from stableavatar.choices import Offload
from stableavatar.errors import GO_ON, StableAvatarError, StoppedError, StorageError, is_out_of_memory
from stableavatar.jobs.intake import without_folder
from stableavatar.jobs.job import Job
from stableavatar.jobs.quotas import LEAST_ROOM
from stableavatar.jobs.sessions import speak
from stableavatar.jobs.store import JobStore
from stableavatar.journal import HeldError, JournalError
from stableavatar.lifetimes import end_with_parent
from stableavatar.logs import log_to_stderr, quieten_libraries
from stableavatar.options import SamplingDefaults, check_overlap
from stableavatar.unfinished import journal_folder, journal_index

if TYPE_CHECKING:
    from stableavatar.generation import Progress
    from stableavatar.pipeline import AvatarPipeline
    from stableavatar.writing import GeneratedVideo

logger = logging.getLogger(__name__)

# Exit status of a worker whose model cannot be loaded: another one could not either.
NO_MODEL = 2
# Of one that met a fault which may be its own or its device's: the next one starts anew.
FAULTY = 3
_LOOK_SECONDS = 0.1
# What videos have after a session at least, whoever speaks next; as long as it took where that is more.
_TURN_SECONDS = 20.0
_REPORT_SECONDS = 0.25
# Until a video is tried again that another process holds.
_HELD_SECONDS = 5.0
# Until the store is tried again where it cannot be used.
_RETRY_SECONDS = 5.0
# Below the server, which has to answer while videos are made.
_NICENESS = 5
TOO_LITTLE_MEMORY = "there is too little memory for this. Choose fewer pixels, or a shorter video."
NO_ROOM_FOR_MODEL = (
    "there is too little memory for the model: try --dtype bfloat16, then --offload encoders, then --offload "
    "layers"
)
FAULT = "The program that makes videos has met a fault of its own; its log says more."


@dataclass(frozen=True)
class ModelChoice:
    """The model of a worker: what `stableavatar.load` is given.

    Attributes:
        name: what it is called in requests. lora: each "FILE" or "FILE:0.8".
        checkpoint_every: seconds after which the state of a video is saved.
        sampling: options of `AvatarPipeline.generate` that every video is made with, whoever asks for it:
            what decides memory, such as `window`.
    """

    source: str = "tiny"
    device: str = "auto"
    dtype: str = "auto"
    offload: Offload = "none"
    variant: str | None = None
    size: str | None = None
    lora: tuple[str, ...] = ()
    name: str = ""
    checkpoint_every: float = 10.0
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """What videos say of the model that made them: names, and not where the server has its files."""
        said: dict[str, Any] = {"model": self.name or Path(self.source).name}
        if self.lora:
            said["lora"] = [Path(file).name for file in self.lora]
        return said

    def with_sampling(self, defaults: SamplingDefaults) -> SamplingDefaults:
        """A model's own settings, with those of `sampling` in their place.

        Raises:
            InputError: windows are too short for its overlap.
        """
        known = {f.name for f in fields(SamplingDefaults)}
        made = replace(defaults, **{name: it for name, it in self.sampling.items() if name in known})
        check_overlap(made.window, made.overlap)
        return made

    def for_sessions(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a session: one window at a time, for several would wait for the speech of all."""
        return {**self.sampling, **chosen, "batch_windows": 1}

    def load(self) -> "AvatarPipeline":
        """The pipeline, on its device.

        Raises:
            StableAvatarError: see `stableavatar.load`; or the decoder's device is not there.
        """
        from stableavatar.pipeline import load
        from stableavatar.placement.offload import check_placement

        check_placement(self.offload, self.sampling.get("decoder_device"))
        return load(
            self.source,
            device=self.device,
            dtype=self.dtype,
            offload=self.offload,
            variant=self.variant,
            size=self.size,
            lora=self.lora,
        )


def run_worker(
    name: str, folder: Path, model: ModelChoice, moves: ctypes.c_ulonglong, verbosity: int = 0
) -> None:
    """The worker process: loads the model, then makes jobs until it is told to end (SIGTERM).

    A job that is being made is then given back, and another worker goes on with it; so it is when somebody
    wants to speak (`jobs.sessions`), and this worker goes on with it afterwards.

    Args:
        moves: shared with who looks after this process; counts up as long as this one moves.
    """
    end_with_parent()
    told_to_end = threading.Event()

    def ending() -> bool:
        """Asked at every step of what is made, and while nothing is."""
        moves.value += 1
        return told_to_end.is_set()

    def end(_signal: int, _frame: FrameType | None) -> None:
        told_to_end.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the server too, which says what is to end
    if hasattr(os, "nice"):
        os.nice(_NICENESS)
    log_to_stderr(verbosity)
    quieten_libraries(verbosity)
    try:
        pipeline = model.load()
    except Exception as error:
        if not isinstance(error, StableAvatarError) and not is_out_of_memory(error):
            logger.exception("the model cannot be loaded")
        reason = NO_ROOM_FOR_MODEL if is_out_of_memory(error) else error
        print(f"Error: {reason}", file=sys.stderr, flush=True)
        sys.exit(NO_MODEL)
    store = JobStore(folder)
    store.worker_ready(name)
    pipeline.origin = model.told()
    rounds = _Rounds(name, store, pipeline, model, ending)
    while not ending():
        try:
            if not rounds.next():
                told_to_end.wait(_LOOK_SECONDS)
        except sqlite3.Error as error:  # such as of a full disk
            logger.error("%s: the jobs cannot be read or written (%s)", name, error)
            told_to_end.wait(_RETRY_SECONDS)


class _Rounds:
    """What a worker does, one thing after the other: sessions before videos, and a turn for those between."""

    def __init__(
        self,
        name: str,
        store: JobStore,
        pipeline: "AvatarPipeline",
        model: ModelChoice,
        ending: Callable[[], bool],
    ) -> None:
        self._name, self._store, self._pipeline, self._model = name, store, pipeline, model
        self._ending = ending
        self._turn_ends = float("-inf")  # of the videos, after a session
        self._claimed = False  # a session, for which a video was put aside
        self._making: str | None = None  # a job of which the store has not heard what came of it
        self._held: dict[str, float] = {}  # jobs of other processes, and until when they are left to those

    def next(self) -> bool:
        """Do one thing. False: there is nothing to do.

        Raises:
            sqlite3.Error: the store cannot be used.
            SystemExit: this process cannot be trusted with another video.
        """
        if self._making is not None:
            self._store.give_back(self._making)  # and made again of what is there, which is soon
            self._making = None
        # Who speaks one time after the other leaves time for videos between.
        job = self._take() if time.monotonic() <= self._turn_ends else None
        if job is None and (request := self._store.calls.answer(self._name)) is not None:
            self._speak(request)
            return True
        if self._claimed:  # by somebody who has hung up, or was answered by another worker
            self._claimed = False
            self._turn_ends = time.monotonic() + _TURN_SECONDS
        job = job or self._take()
        if job is not None:
            self._make(job)
        return job is not None

    def _take(self) -> Job | None:
        """The next job, none while the disk is full: it would break off at once."""
        now = time.monotonic()
        self._held = {job_id: until for job_id, until in self._held.items() if until > now}
        full = self._store.free_bytes() < LEAST_ROOM
        return self._store.take(self._name, stopped_alone=full, without=self._held)

    def _speak(self, request: dict[str, Any]) -> None:
        self._claimed = False
        began = time.monotonic()
        options = self._model.for_sessions(request["options"])
        speak({**request, "options": options}, self._pipeline, self._ending)
        ended = time.monotonic()
        self._turn_ends = ended + max(_TURN_SECONDS, ended - began)

    def _make(self, job: Job) -> None:
        self._making = job.id
        try:
            trusted = make(self._store, job, self._pipeline, self._model, self._put_aside)
        except HeldError as error:  # by a process that was given up and has not ended
            logger.warning("%s of %s: %s", job.id, job.owner, error)
            self._held[job.id] = time.monotonic() + _HELD_SECONDS
            trusted = True
        self._making = None
        if not trusted:
            sys.exit(FAULTY)

    def _put_aside(self) -> bool:
        """Whether a video is to wait: the worker ends, or somebody wants to speak."""
        if self._ending():
            return True
        if time.monotonic() > self._turn_ends and self._store.calls.claim(self._name):
            self._claimed = True
        return self._claimed


def make(
    store: JobStore,
    job: Job,
    pipeline: "AvatarPipeline",
    model: ModelChoice,
    ending: Callable[[], bool] = lambda: False,
) -> bool:
    """Make a job's video, from where an earlier worker left it, and say in the store what came of it.

    Returns:
        Whether this process can be trusted with another one: after a fault of a device it cannot.

    Raises:
        HeldError: another process has it; it was given back.
        sqlite3.Error: what came of it cannot be said in the store.
    """
    logger.info("%s of %s: begun", job.id, job.owner)
    began = time.monotonic()
    try:
        result = _generate(store, job, pipeline, model, ending)
    except StoppedError:
        if store.should_stop(job.id):
            store.finish(job.id, "cancelled")
            _forget_state(job)
        else:
            store.give_back(job.id)
    except HeldError:
        store.give_back(job.id)
        raise
    except StableAvatarError as error:
        logger.warning("%s of %s: %s", job.id, job.owner, error)
        if isinstance(error, StorageError) and _lacks_room(store, job):
            store.give_back(job.id)  # it goes on where it was once there is room
            return True
        store.finish(job.id, "failed", error=without_folder(str(error).removesuffix(GO_ON), job.folder))
        _forget_state(job)
    except Exception as error:
        logger.exception("%s of %s", job.id, job.owner)
        little = is_out_of_memory(error)
        store.finish(job.id, "failed", error=TOO_LITTLE_MEMORY if little else FAULT)
        _forget_state(job)
        return little
    else:
        logger.info("%s of %s: made in %.1f s", job.id, job.owner, time.monotonic() - began)
        totals = {"video_seconds": job.details.get("seconds", 0.0), "work_seconds": time.monotonic() - began}
        store.finish(job.id, "completed", result=result, totals=totals)
    return True


def _lacks_room(store: JobStore, job: Job) -> bool:
    """Whether the disk is full of other things than this job's, which would leave room for the others."""
    own = sum(path.stat().st_size for path in job.folder.rglob("*") if path.is_file())
    return store.free_bytes() + own < LEAST_ROOM and not store.should_stop(job.id)


def _generate(
    store: JobStore,
    job: Job,
    pipeline: "AvatarPipeline",
    model: ModelChoice,
    ending: Callable[[], bool],
) -> dict[str, Any]:
    from stableavatar.media.reading import METADATA_KEY, probe, read_metadata
    from stableavatar.options import OutputOptions

    # Killed between the video's end and the store's.
    if job.output.exists() and not journal_index(job.output).exists():
        settings = json.loads(read_metadata(job.output)[METADATA_KEY])
        return {**settings, "frame_count": probe(job.output).frames}
    options = dict(job.options)
    quality = options.pop("quality")
    reported: float | None = None

    def report(progress: "Progress") -> None:
        nonlocal reported
        now = time.monotonic()
        begins = reported is None
        if reported is None or now - reported >= _REPORT_SECONDS:
            reported = now
            with suppress(sqlite3.Error):  # the disk may be full: the video is not lost for that
                store.report(job.id, asdict(progress), begins=begins)

    def stop() -> bool:
        try:
            return ending() or store.should_stop(job.id)
        except sqlite3.Error as error:  # such as another's long transaction: asked again at the next step
            logger.warning("%s: %s", job.id, error)
            return False

    def generate(resume: bool) -> "GeneratedVideo":
        return pipeline.generate(
            job.portrait,
            job.speech,
            job.output,
            output_options=OutputOptions(quality=quality, checkpoint_every=model.checkpoint_every),
            resume=resume,
            stop=stop,
            progress=report,
            **{**model.sampling, **options},
        )

    video: GeneratedVideo | None = None
    try:
        video = generate(resume=True)
    except JournalError as error:  # such as one of an earlier release
        logger.warning("%s of %s: begun anew: %s", job.id, job.owner, error)
    if video is None:  # out of the handler, whose error would keep alive what it came from
        video = generate(resume=False)
    settings = json.loads(read_metadata(job.output)[METADATA_KEY])
    return {
        **settings,
        "frame_count": video.frame_count,
        "first_frame_seconds": round(video.first_frame_seconds, 3),
    }


def _forget_state(job: Job) -> None:
    """Nobody goes on with a job that has failed or was cancelled; what is there of its video stays."""
    shutil.rmtree(journal_folder(job.output), ignore_errors=True)
