"""Workers are kept running: what is lost, hangs or cannot be started is started again."""

import ctypes
import errno
import time
from pathlib import Path

import pytest

from serving import until
from stableavatar.errors import CheckpointError
from stableavatar.jobs.store import JobStore
from stableavatar.jobs.worker import FAULTY, NO_MODEL, ModelChoice
from stableavatar.jobs.workers import Workers, _Keeper

MODEL = ModelChoice("toy")


@pytest.fixture
def jobs(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs")


def test_a_worker_that_cannot_load_its_model_again_is_tried_again(
    jobs: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = iter([FAULTY, NO_MODEL, NO_MODEL, 0])

    def run(keeper: _Keeper) -> int:
        status = next(ends)
        if status == FAULTY:
            jobs.worker_ready("worker-0")
        if status == 0:
            workers.ending.set()
        return status

    monkeypatch.setattr("stableavatar.jobs.workers._PAUSES", (0.0,))
    monkeypatch.setattr(_Keeper, "_run", run)
    workers = Workers(jobs, [MODEL])
    workers.start()
    assert workers.ending.wait(20)
    assert workers._keepers[0].no_model.is_set() is False


def test_a_server_ends_only_where_no_worker_can_load_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose device another program has is started again."""
    busy = {"worker-0", "worker-1"}

    def run(keeper: _Keeper) -> int:
        if keeper._name in busy:
            time.sleep(0.01)
            return NO_MODEL
        until(lambda: any(it.no_model.is_set() for it in workers._keepers))
        time.sleep(0.3)  # the server has seen that by now
        store.worker_ready(keeper._name)
        keeper._workers.ending.wait(60)
        return 0

    monkeypatch.setattr("stableavatar.jobs.workers._PAUSES", (0.0,))
    monkeypatch.setattr(_Keeper, "_run", run)
    for able in ("", "worker-1", "worker-0"):
        store = JobStore(tmp_path / (able or "none"))
        busy = {"worker-0", "worker-1"} - {able}
        workers = Workers(store, [MODEL, MODEL])
        workers.start()
        if able:
            assert workers.wait(20)
            busy.clear()  # the device is free again
            until(lambda store=store: store.workers_ready() == 2)
        else:
            with pytest.raises(CheckpointError):
                workers.wait(20)
        workers.stop(20)


def test_a_worker_that_cannot_be_started_is_tried_again(
    jobs: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is too little memory for another process, just after a worker was lost for that."""
    tried: list[str] = []

    def run(keeper: _Keeper) -> int:
        tried.append(keeper._name)
        if len(tried) == 1:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        workers.ending.set()
        return 0

    monkeypatch.setattr("stableavatar.jobs.workers._PAUSES", (0.0,))
    monkeypatch.setattr(_Keeper, "_run", run)
    workers = Workers(jobs, [MODEL])
    workers.start()
    assert workers.ending.wait(20)
    assert len(tried) == 2


def test_a_worker_that_cannot_even_be_killed_is_replaced(
    jobs: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits within the system, for a driver or a disk."""

    class Undying:
        killed, joined = False, 0

        def is_alive(self) -> bool:
            return True

        def join(self, _seconds: float) -> None:
            self.joined += 1
            assert self.joined < 100, "it is waited for"

        def kill(self) -> None:
            self.killed = True

    undying = Undying()
    keeper = Workers(jobs, [MODEL], hung_seconds=5.0)._keepers[0]
    keeper._watch(undying, ctypes.c_ulonglong())  # type: ignore[arg-type]
    assert undying.killed
