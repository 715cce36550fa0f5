"""A worker makes what `generate` makes, also where several took turns at it."""

import contextlib
import ctypes
import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from command_line import toy_model
from stableavatar import load
from stableavatar.errors import InputError, StorageError
from stableavatar.jobs import worker as worker_module
from stableavatar.jobs.job import Job
from stableavatar.jobs.quotas import LEAST_ROOM, NoRoomError, Quotas
from stableavatar.jobs.store import JobStore
from stableavatar.jobs.worker import FAULT, NO_MODEL, TOO_LITTLE_MEMORY, ModelChoice, make, run_worker
from stableavatar.journal import HeldError, Journal, SavedState
from stableavatar.media.audio import Sound
from stableavatar.media.files import locked
from stableavatar.media.following import follow
from stableavatar.media.reading import probe, read_frames, read_metadata
from stableavatar.options import OutputOptions, SamplingDefaults
from stableavatar.pipeline import AvatarPipeline
from stableavatar.unfinished import journal_folder, journal_index
from stored_jobs import add, found

MODEL = ModelChoice("toy", checkpoint_every=0)


@pytest.fixture
def jobs(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs", Quotas(8, 4))


@pytest.fixture(scope="module")
def pipeline() -> AvatarPipeline:
    return load(toy_model(), device="cpu")


def test_a_worker_makes_the_video_that_generate_makes(
    jobs: JobStore, pipeline: AvatarPipeline, tmp_path: Path
) -> None:
    job = add(jobs, prompt="A man")
    taken = jobs.take("worker-0")
    assert taken is not None
    make(jobs, taken, pipeline, MODEL)
    done = found(jobs, job)
    assert done.state == "completed"
    assert done.video == job.output
    assert done.result is not None
    assert same_frames(job.output, alone(pipeline, job, tmp_path / "alone.mp4"))
    assert done.result["frame_count"] == probe(job.output).frames == 15
    assert done.result["seed"] == 3
    assert not journal_folder(job.output).exists()
    assert jobs.totals()["video_seconds"] == pytest.approx(0.6)


def test_a_video_that_another_process_holds_waits_for_it(jobs: JobStore, pipeline: AvatarPipeline) -> None:
    """One that could not even be killed: nothing of what it saved is lost."""
    job = interrupted(jobs, pipeline)
    with contextlib.closing(locked(journal_folder(job.output) / "lock")):
        taken = jobs.take("worker-1")
        assert taken is not None
        with pytest.raises(HeldError):
            make(jobs, taken, pipeline, MODEL)
        assert found(jobs, job).state == "queued"
        assert journal_index(job.output).exists()
    taken = jobs.take("worker-1")
    assert taken is not None
    make(jobs, taken, pipeline, MODEL)
    assert found(jobs, job).state == "completed"


def test_what_decides_memory_is_the_workers(jobs: JobStore, pipeline: AvatarPipeline, tmp_path: Path) -> None:
    job = add(jobs, seconds=2.0)
    taken = jobs.take("worker-0")
    assert taken is not None
    smaller = replace(MODEL, sampling={"window": 13, "decoder_tiling": True})
    make(jobs, taken, pipeline, smaller)
    result = found(jobs, job).result
    assert result is not None
    assert (result["window"], result["decoder_tiling"]) == (13, True)
    usual = alone(pipeline, job, tmp_path / "alone.mp4")
    assert not same_frames(job.output, usual)
    defaults = SamplingDefaults(overlap=5)
    with pytest.raises(InputError, match="does not fit"):
        smaller.with_sampling(defaults)
    assert smaller.with_sampling(SamplingDefaults(overlap=3)).window == 13
    several = replace(MODEL, sampling={"window": 13, "batch_windows": 2})
    assert several.for_sessions({"steps": 1}) == {"window": 13, "batch_windows": 1, "steps": 1}
    with pytest.raises(InputError, match="cuda:9"):
        replace(MODEL, source="tiny", sampling={"decoder_device": "cuda:9"}).load()


def test_a_job_goes_on_in_another_worker_and_is_the_same_video(
    jobs: JobStore, pipeline: AvatarPipeline, tmp_path: Path
) -> None:
    job = interrupted(jobs, pipeline)
    given_back = found(jobs, job)
    assert given_back.state == "queued"
    assert given_back.started is not None
    assert journal_index(job.output).exists()
    taken = jobs.take("worker-1")
    assert taken is not None
    make(jobs, taken, pipeline, MODEL)
    assert found(jobs, job).state == "completed"
    assert same_frames(job.output, alone(pipeline, job, tmp_path / "alone.mp4"))


def test_a_kill_between_the_videos_end_and_the_stores_costs_nothing(
    jobs: JobStore, pipeline: AvatarPipeline
) -> None:
    job = add(jobs)
    taken = jobs.take("worker-0")
    assert taken is not None
    make(jobs, taken, pipeline, MODEL)
    before = job.output.stat().st_mtime_ns
    with sqlite3.connect(jobs.folder / "jobs.sqlite") as database:
        database.execute("UPDATE jobs SET state = 'queued', result = NULL")
    taken = jobs.take("worker-1")
    assert taken is not None
    make(jobs, taken, pipeline, MODEL)
    done = found(jobs, job)
    assert done.state == "completed"
    assert done.result is not None
    assert done.result["frame_count"] == 15
    assert job.output.stat().st_mtime_ns == before


def test_what_is_cancelled_keeps_what_is_there(jobs: JobStore, pipeline: AvatarPipeline) -> None:
    job = add(jobs, seconds=3.0, order="causal")
    taken = jobs.take("worker-0")
    assert taken is not None

    def watch() -> bool:  # somebody presses stop when there is something to see
        if any(journal_folder(job.output).glob("segment-*")):
            jobs.cancel("ann", job.id)
        return False

    make(jobs, taken, pipeline, MODEL, watch)
    stopped = found(jobs, job)
    assert stopped.state == "cancelled"
    assert stopped.video is not None
    frames = probe(stopped.video).frames
    assert 0 < frames < 75
    assert not journal_folder(job.output).exists()


def test_a_viewer_sees_the_same_video_across_a_kill(
    jobs: JobStore, pipeline: AvatarPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when segments are there that the state that was saved last does not have yet."""
    job = add(jobs, seconds=3.0, order="causal")
    saved = 0
    save = Journal.save

    def save_once(journal: Journal, state: SavedState) -> None:
        nonlocal saved
        saved += 1
        if saved <= 1:
            save(journal, state)

    def killed(_: Any = None) -> bool:
        if saved > 2:
            raise SystemExit
        return False

    monkeypatch.setattr(Journal, "save", save_once)
    taken = jobs.take("worker-0")
    assert taken is not None
    with pytest.raises(SystemExit):
        make(jobs, taken, pipeline, MODEL, killed)
    monkeypatch.undo()
    segments = journal_folder(job.output)
    index = json.loads((segments / "journal.json").read_text())
    assert len(list(segments.glob("segment-*.mp4"))) > index["rest"]["segments"]
    sound = Sound(job.speech or "")
    watching = follow(
        segments, lambda: job.output if found(jobs, job).is_finished else None,
        lambda: found(jobs, job).is_finished, fps=Fraction(25), sound=sound,
    )  # fmt: skip
    seen = b""
    while piece := next(watching):
        seen += piece
    assert seen, "something is there to be seen"
    jobs.worker_lost("worker-0", crashed=True)
    taken = jobs.take("worker-1")
    assert taken is not None
    make(jobs, taken, pipeline, MODEL)
    seen += b"".join(watching)
    (tmp_path / "seen.mp4").write_bytes(seen)
    assert same_frames(tmp_path / "seen.mp4", job.output)
    assert probe(tmp_path / "seen.mp4").frames == 75


def test_a_state_of_another_release_is_begun_anew(
    jobs: JobStore, pipeline: AvatarPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = interrupted(jobs, pipeline)
    monkeypatch.setattr("stableavatar.writing.__version__", "99")
    taken = jobs.take("worker-1")
    assert taken is not None
    make(jobs, taken, pipeline, MODEL)
    assert found(jobs, job).state == "completed"
    assert '"version": "99"' in read_metadata(job.output)["stableavatar"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputError("portrait FOLDER/portrait: no picture"), "portrait: no picture"),
        (RuntimeError("CUDA out of memory"), TOO_LITTLE_MEMORY),
        (ZeroDivisionError("a fault"), FAULT),
    ],
)
def test_what_fails_says_why_and_the_worker_lives(
    jobs: JobStore, pipeline: AvatarPipeline, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    job = add(jobs)
    if isinstance(error, InputError):
        error = InputError(str(error).replace("FOLDER", str(job.folder)))

    def fail(*_: Any, **__: Any) -> Iterator[None]:
        raise error

    monkeypatch.setattr(pipeline, "generate", fail)
    taken = jobs.take("worker-0")
    assert taken is not None
    trusted = make(jobs, taken, pipeline, MODEL)
    assert (found(jobs, job).state, found(jobs, job).error) == ("failed", words)
    assert trusted == (words != FAULT)
    assert not journal_folder(job.output).exists()


def interrupted(jobs: JobStore, pipeline: AvatarPipeline) -> Job:
    """A job of three seconds that its worker put aside after a few steps."""
    job = add(jobs, seconds=3.0)
    stops = iter([False] * 3 + [True] * 100)
    taken = jobs.take("worker-0")
    assert taken is not None
    make(jobs, taken, pipeline, MODEL, lambda: next(stops))
    return job


def alone(pipeline: AvatarPipeline, job: Job, output: Path) -> Path:
    """A job's video without a store."""
    options = dict(job.options)
    encoding = OutputOptions(quality=options.pop("quality"))
    pipeline.generate(job.portrait, job.speech, output, output_options=encoding, **options)
    return output


def same_frames(one: Path, other: Path) -> bool:
    """Whether two videos show the same."""
    pairs = zip_longest(read_frames(one), read_frames(other))
    return all(a is not None and b is not None and np.array_equal(a, b) for a, b in pairs)


def test_a_full_disk_loses_no_job(
    jobs: JobStore, pipeline: AvatarPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StorageError("there is no room")

    job = add(jobs)
    monkeypatch.setattr(AvatarPipeline, "generate", full)
    own = 600_000_000
    with (job.folder / "large").open("wb") as file:
        file.truncate(own)
    # Of another fault it fails, and where it is itself what takes the room that others need.
    for free, state in ((10, "queued"), (LEAST_ROOM - own, "failed")):
        monkeypatch.setattr(JobStore, "free_bytes", lambda self, free=free: free)
        taken = jobs.take("worker-0")
        assert taken is not None
        make(jobs, taken, pipeline, MODEL)
        assert found(jobs, job).state == state
    monkeypatch.setattr(JobStore, "free_bytes", lambda self: 10)
    other = add(jobs)
    assert jobs.take("worker-0", stopped_alone=True) is None
    jobs.take("worker-0")
    jobs.give_back(other.id)
    journal_folder(other.output).mkdir()
    jobs.cancel("ann", other.id)
    assert found(jobs, other).state == "queued"
    assert jobs.take("worker-0", stopped_alone=True) is not None
    with pytest.raises(NoRoomError):
        jobs.check_room("ann")


def test_a_disk_that_fills_after_the_first_state_loses_no_job(
    jobs: JobStore, pipeline: AvatarPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the video's own writers say it, through everything that lies between."""
    job = interrupted(jobs, pipeline)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    taken = jobs.take("worker-1")
    assert taken is not None
    with monkeypatch.context() as patch:
        patch.setattr("stableavatar.journal.save_file", full)
        patch.setattr(JobStore, "free_bytes", lambda self: 10)
        make(jobs, taken, pipeline, MODEL)
    assert found(jobs, job).state == "queued"
    taken = jobs.take("worker-1")
    assert taken is not None
    make(jobs, taken, pipeline, MODEL)
    assert found(jobs, job).state == "completed"


@pytest.mark.parametrize("index", ['{"format": 0}', "", "{"])
def test_a_journal_that_cannot_be_read_is_begun_anew(
    jobs: JobStore, pipeline: AvatarPipeline, index: str
) -> None:
    job = interrupted(jobs, pipeline)
    journal_index(job.output).write_text(index)
    taken = jobs.take("worker-1")
    assert taken is not None
    make(jobs, taken, pipeline, MODEL)
    assert found(jobs, job).state == "completed"


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets `run_worker` run here."""
    monkeypatch.setattr(worker_module, "end_with_parent", lambda: None)
    monkeypatch.setattr(worker_module.os, "nice", lambda _: 0)
    before = [signal.getsignal(it) for it in (signal.SIGTERM, signal.SIGINT)]
    yield
    for name, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(name, handler)


@pytest.mark.usefixtures("in_this_process")
def test_a_worker_moves_at_every_step_and_while_there_is_nothing_to_do(
    jobs: JobStore, pipeline: AvatarPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves, during, finish = ctypes.c_ulonglong(), list[int](), JobStore.finish

    def end_soon(store: JobStore, *arguments: Any, **keywords: Any) -> None:
        finish(store, *arguments, **keywords)
        during.append(moves.value)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()

    monkeypatch.setattr(ModelChoice, "load", lambda _: pipeline)
    monkeypatch.setattr(worker_module, "_REPORT_SECONDS", 0)
    monkeypatch.setattr(JobStore, "report", lambda *_, **__: during.append(moves.value))
    monkeypatch.setattr(JobStore, "finish", end_soon)
    job = add(jobs, steps=8)
    run_worker("worker-0", jobs.folder, MODEL, moves)
    assert found(jobs, job).state == "completed"
    assert len(set(during)) >= 8
    assert moves.value > during[-1] + 2  # it looked for another one meanwhile


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "--offload encoders"),
        (ValueError("a fault"), "a fault"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_said_to_be_none(
    jobs: JobStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    words: str,
) -> None:
    def load(_choice: ModelChoice) -> None:
        raise error

    monkeypatch.setattr(ModelChoice, "load", load)
    with pytest.raises(SystemExit) as ended:
        run_worker("worker-0", jobs.folder, MODEL, ctypes.c_ulonglong())
    assert ended.value.code == NO_MODEL
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("fails", ["should_stop", "claim"])
def test_a_table_that_cannot_be_read_for_a_moment_fails_no_video(
    jobs: JobStore, pipeline: AvatarPipeline, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    job = add(jobs, steps=4)
    taken = jobs.take("worker-0")
    assert taken is not None
    should_stop = jobs.should_stop
    asked: list[str] = []

    def locked(*_: str) -> bool:
        asked.append(fails)
        if len(asked) < 3:
            raise sqlite3.OperationalError("database is locked")
        return should_stop(job.id)

    if fails == "should_stop":
        monkeypatch.setattr(jobs, "should_stop", locked)
        make(jobs, taken, pipeline, MODEL)
    else:
        make(jobs, taken, pipeline, MODEL, locked)
    assert len(asked) >= 3
    assert found(jobs, job).state == "completed"


@pytest.mark.usefixtures("in_this_process")
def test_a_table_that_cannot_be_used_for_a_moment_ends_no_worker(
    jobs: JobStore, pipeline: AvatarPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, tried = JobStore.take, list[str]()

    def full(store: JobStore, name: str, **how: Any) -> Job | None:
        tried.append(name)
        if len(tried) < 3:
            raise sqlite3.OperationalError("database or disk is full")
        os.kill(os.getpid(), signal.SIGTERM)
        return take(store, name, **how)

    monkeypatch.setattr(ModelChoice, "load", lambda _: pipeline)
    monkeypatch.setattr(worker_module, "_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(JobStore, "take", full)
    run_worker("worker-0", jobs.folder, MODEL, ctypes.c_ulonglong())
    assert len(tried) == 3


@pytest.mark.usefixtures("in_this_process")
def test_videos_have_as_long_as_a_session_took(
    jobs: JobStore, pipeline: AvatarPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who speaks one time after the other does not keep them from being made."""
    order: list[str] = []

    def speak(*_: Any) -> None:
        order.append("session")
        time.sleep(1.0)
        if order.count("session") == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def made(*_: Any, **__: Any) -> bool:
        order.append("video")
        time.sleep(0.3)
        return True

    monkeypatch.setattr(ModelChoice, "load", lambda _: pipeline)
    monkeypatch.setattr(worker_module, "_TURN_SECONDS", 0.1)
    monkeypatch.setattr(worker_module, "speak", speak)
    monkeypatch.setattr(worker_module, "make", made)
    for _ in range(4):
        add(jobs)
    for number in range(2):
        jobs.calls.call(f"session-{number}", {"options": {}})
    run_worker("worker-0", jobs.folder, MODEL, ctypes.c_ulonglong())
    assert order[0] == order[-1] == "session"
    assert order.count("video") >= 2  # of three tenths of a second
