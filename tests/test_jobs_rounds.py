"""What a worker does next."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from command_line import toy_model
from stableavatar import load
from stableavatar.errors import InputError
from stableavatar.jobs import worker as worker_module
from stableavatar.jobs.quotas import Quotas
from stableavatar.jobs.store import JobStore
from stableavatar.jobs.worker import ModelChoice, _Rounds
from stableavatar.media.files import locked
from stableavatar.pipeline import AvatarPipeline
from stableavatar.unfinished import journal_folder
from stored_jobs import add, found

MODEL = ModelChoice("toy", checkpoint_every=0)


@pytest.fixture
def jobs(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs", Quotas(8, 4))


@pytest.fixture(scope="module")
def pipeline() -> AvatarPipeline:
    return load(toy_model(), device="cpu")


def test_who_calls_and_hangs_up_again_and_again_keeps_no_video_from_being_made(
    jobs: JobStore, pipeline: AvatarPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is put aside once, and has its turn then."""
    monkeypatch.setattr("stableavatar.jobs.calls._GRACE_SECONDS", 0.0)
    calls: list[str] = []

    def call() -> bool:  # at every step
        calls.append(f"session-{len(calls)}")
        jobs.calls.call(calls[-1], {})
        return False

    job = add(jobs, steps=4)
    rounds = _Rounds("worker-0", jobs, pipeline, MODEL, call)
    assert rounds.next()
    assert (found(jobs, job).state, len(calls)) == ("queued", 1)
    for name in calls:
        jobs.calls.hang_up(name)
    monkeypatch.setattr(worker_module, "_TURN_SECONDS", 3600.0)
    assert rounds.next()
    assert found(jobs, job).state == "completed"
    assert len(calls) > 2


def test_a_video_that_another_process_holds_keeps_no_other_waiting(
    jobs: JobStore, pipeline: AvatarPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_HELD_SECONDS", 3600.0)
    held, other = add(jobs), add(jobs)
    journal_folder(held.output).mkdir()
    rounds = _Rounds("worker-0", jobs, pipeline, MODEL, lambda: False)
    with closing(locked(journal_folder(held.output) / "lock")):
        assert rounds.next()
        assert rounds.next()
        assert (found(jobs, held).state, found(jobs, other).state) == ("queued", "completed")
        assert not rounds.next()
    rounds._held[held.id] = 0.0  # that hour is over
    assert rounds.next()
    assert found(jobs, held).state == "completed"


@pytest.mark.parametrize("fails", [False, True])
def test_what_came_of_a_video_is_said_when_the_table_can_be_written_again(
    jobs: JobStore, pipeline: AvatarPipeline, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    def fail(*_: Any, **__: Any) -> None:
        raise InputError("no sound")

    job = add(jobs)
    rounds = _Rounds("worker-0", jobs, pipeline, MODEL, lambda: False)
    if fails:
        monkeypatch.setattr(pipeline, "generate", fail)
        journal_folder(job.output).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(JobStore, "finish", full)
        with pytest.raises(sqlite3.Error):
            rounds.next()
    assert found(jobs, job).state == "in_progress"
    assert journal_folder(job.output).exists() is fails  # until it is known to be of no use
    made = None if fails else job.output.stat().st_mtime_ns
    assert rounds.next()
    assert found(jobs, job).state == ("failed" if fails else "completed")
    assert fails or job.output.stat().st_mtime_ns == made
    assert not journal_folder(job.output).exists()
