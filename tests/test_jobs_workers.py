"""Workers are kept running: what is lost, hangs or cannot be started is started again."""

import atexit
import ctypes
import errno
import os
import threading
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


class Undying:
    """A process that waits within the system, for a driver or a disk."""

    name, pid = "worker-0", 7
    killed, joined = False, 0

    def is_alive(self) -> bool:
        return True

    def join(self, _seconds: float) -> None:
        self.joined += 1
        assert self.joined < 100, "it is waited for"

    def terminate(self) -> None:
        pass

    def kill(self) -> None:
        self.killed = True


def test_a_worker_that_cannot_even_be_killed_is_replaced(jobs: JobStore) -> None:
    undying = Undying()
    keeper = Workers(jobs, [MODEL], hung_seconds=5.0)._keepers[0]
    keeper._watch(undying, ctypes.c_ulonglong(1))  # type: ignore[arg-type]
    assert undying.killed


@pytest.mark.parametrize("replaced", [False, True])
def test_a_server_ends_though_a_worker_does_not(
    jobs: JobStore, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """multiprocessing would wait for it, also where another one has taken its place."""
    at_exit: list[tuple[object, ...]] = []
    monkeypatch.setattr(atexit, "register", lambda *what: at_exit.append(what))
    workers = Workers(jobs, [MODEL], hung_seconds=5.0)
    keeper, undying = workers._keepers[0], Undying()
    if replaced:
        keeper._watch(undying, ctypes.c_ulonglong(1))  # type: ignore[arg-type]
    else:
        keeper.process = undying  # type: ignore[assignment]
    keeper.thread = threading.Thread(target=lambda: None)
    keeper.thread.start()
    workers.stop(0.1)
    assert undying.killed
    assert at_exit == [(os._exit, 1)]


def test_a_worker_that_loads_its_model_does_not_hang(jobs: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come from elsewhere first."""

    class Loading(Undying):
        def is_alive(self) -> bool:
            return self.joined < 50

    monkeypatch.setattr("stableavatar.jobs.workers._LOOK_SECONDS", 1.0)
    loading = Loading()
    Workers(jobs, [MODEL], hung_seconds=5.0)._keepers[0]._watch(loading, ctypes.c_ulonglong(0))  # type: ignore[arg-type]
    assert not loading.killed
