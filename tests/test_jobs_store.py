"""The store of jobs: nothing that was taken is lost, owners take turns, nobody sees what is not his."""

import contextlib
import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stableavatar.errors import InputError
from stableavatar.jobs.job import State
from stableavatar.jobs.quotas import QueueFullError, Quotas
from stableavatar.jobs.store import MOST_CRASHES, MOST_KILLS, JobStore
from stableavatar.unfinished import journal_folder
from stored_jobs import add, found


@pytest.fixture
def jobs(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs", Quotas(8, 4))


def test_a_job_is_kept_and_found_by_its_owner_alone(jobs: JobStore) -> None:
    job = add(jobs, prompt="Ein Mann – 一个人")
    assert (job.state, job.options["prompt"], job.details) == (
        "queued",
        "Ein Mann – 一个人",
        {"seconds": 0.6},
    )
    assert job.portrait.exists()
    assert job.speech is not None
    assert job.video is None
    again = JobStore(jobs.folder)
    assert again.get("ann", job.id) == job
    assert again.get("bob", job.id) is None
    assert again.list("bob") == []
    assert again.list("ann") == [job]
    assert again.cancel("bob", job.id) is None
    assert not again.delete("bob", job.id)
    assert found(again, job).state == "queued"


@pytest.mark.parametrize(
    "name", ["", "..", "video_../../../etc/passwd", "video_" + "0" * 24, "x" * 10_000, "'; --"]
)
def test_no_name_leads_anywhere_else(jobs: JobStore, name: str) -> None:
    add(jobs)
    assert jobs.get("ann", name) is None
    assert not jobs.delete("ann", name)


def test_owners_take_turns(jobs: JobStore) -> None:
    order = [add(jobs, owner) for owner in ("ann", "ann", "ann", "bob", "cid")]
    assert [jobs.position(job) for job in order] == [0, 3, 4, 1, 2]
    taken = []
    while (job := jobs.take("worker-0")) is not None:
        taken.append(job)
        jobs.finish(job.id, "completed")
    assert [job.id for job in taken] == [order[index].id for index in (0, 3, 4, 1, 2)]


def test_who_was_served_last_comes_last_also_later(jobs: JobStore) -> None:
    first = add(jobs, "ann")
    taken = jobs.take("worker-0")
    assert taken is not None
    assert taken.id == first.id
    jobs.finish(first.id, "completed")
    second, other = add(jobs, "ann"), add(jobs, "bob")
    assert [jobs.position(second), jobs.position(other)] == [1, 0]
    taken = jobs.take("worker-0")
    assert taken is not None
    assert taken.id == other.id


def test_what_was_interrupted_comes_first(jobs: JobStore) -> None:
    begun = add(jobs, "ann")
    jobs.take("worker-0")
    waiting = add(jobs, "bob")
    jobs.give_back(begun.id)
    assert [jobs.position(begun), jobs.position(waiting)] == [0, 1]
    taken = jobs.take("worker-1")
    assert taken is not None
    assert taken.id == begun.id


@pytest.mark.parametrize("seed", range(3))
def test_places_are_the_order_in_which_jobs_are_taken(tmp_path: Path, seed: int) -> None:
    """Whoever waits, also where some were begun before and given back."""
    jobs = JobStore(tmp_path / "jobs", Quotas(99, 99))
    rng = np.random.default_rng(seed)
    waiting = [add(jobs, str(owner)) for owner in rng.choice(["ann", "bob", "cid", "dan"], 24)]
    begun = [job for job in (jobs.take("worker-0") for _ in range(8)) if job is not None]
    for job in begun[:3]:
        jobs.give_back(job.id)
    for job in begun[3:]:
        jobs.finish(job.id, "completed")
    waiting = [now for job in waiting if not (now := found(jobs, job)).is_finished]
    places = {job.id: jobs.position(job) for job in waiting}
    taken: list[str] = []
    while (job := jobs.take("worker-0")) is not None:
        taken.append(job.id)
        jobs.finish(job.id, "completed")
    assert sorted(places, key=lambda name: places[name]) == taken
    assert sorted(places.values()) == list(range(len(taken)))


def test_several_workers_never_take_the_same_job(jobs: JobStore) -> None:
    wide = JobStore(jobs.folder, Quotas(100, 100))
    expected = {add(wide, f"owner-{number % 3}").id for number in range(24)}
    taken: list[str] = []

    def work(name: str) -> None:
        while (job := wide.take(name)) is not None:
            taken.append(job.id)

    threads = [threading.Thread(target=work, args=(f"worker-{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 24
    assert set(taken) == expected


def test_the_queue_is_bounded_for_one_and_for_all(jobs: JobStore) -> None:
    for _ in range(4):
        add(jobs, "ann")
    with pytest.raises(QueueFullError, match="4 of your videos are waiting"):
        add(jobs, "ann")
    for _ in range(4):
        add(jobs, "bob")
    with pytest.raises(QueueFullError, match="Too many videos"):
        add(jobs, "cid")
    jobs.take("worker-0")
    add(jobs, "cid")


def test_what_waits_is_cancelled_at_once_and_what_is_made_is_asked(jobs: JobStore) -> None:
    made, waiting = add(jobs), add(jobs)
    jobs.take("worker-0")
    cancelled = jobs.cancel("ann", waiting.id)
    assert cancelled is not None
    assert cancelled.state == "cancelled"
    asked = jobs.cancel("ann", made.id)
    assert asked is not None
    assert (asked.state, asked.stopping) == ("in_progress", True)
    assert jobs.should_stop(made.id)
    jobs.finish(made.id, "cancelled")
    again = jobs.cancel("ann", made.id)
    assert again is not None
    assert again.state == "cancelled"


def test_what_is_deleted_is_gone_with_its_files_when_no_worker_has_it(jobs: JobStore) -> None:
    made, waiting = add(jobs), add(jobs)
    jobs.take("worker-0")
    assert jobs.delete("ann", waiting.id)
    assert not waiting.folder.exists()
    assert jobs.delete("ann", made.id)
    assert made.folder.exists()
    assert jobs.get("ann", made.id) is None
    assert jobs.should_stop(made.id)
    jobs.finish(made.id, "cancelled")
    assert not made.folder.exists()
    assert jobs.take("worker-0") is None


def test_what_is_deleted_while_its_worker_dies_is_gone_too(jobs: JobStore) -> None:
    job = add(jobs)
    jobs.take("worker-0")
    jobs.delete("ann", job.id)
    jobs.worker_lost("worker-0", crashed=True)
    assert not job.folder.exists()
    assert sum(jobs.counts().values()) == 0


def test_a_lost_worker_loses_no_job_but_one_that_kills_workers_is_given_up(jobs: JobStore) -> None:
    job = add(jobs)
    for _ in range(1, MOST_CRASHES):
        jobs.take("worker-0")
        jobs.worker_lost("worker-0", crashed=True)
        assert found(jobs, job).state == "queued"
    jobs.take("worker-0")
    jobs.worker_lost("worker-0", crashed=False)  # the server was told to end: no fault of the job
    assert found(jobs, job).state == "queued"
    journal_folder(job.output).mkdir()
    jobs.take("worker-0")
    jobs.worker_lost("worker-0", crashed=True)
    assert found(jobs, job).state == "failed"
    assert "broke off" in (found(jobs, job).error or "")
    assert not journal_folder(job.output).exists()


def test_a_job_that_gets_further_is_not_given_up(jobs: JobStore) -> None:
    job = add(jobs)
    for share in (0.1, 0.2, 0.3, 0.3 + 1e-15, 0.2):  # the last two begin where others have begun
        jobs.take("worker-0")
        jobs.report(job.id, {"share": share}, begins=True)
        jobs.report(job.id, {"share": 0.9})  # as far as it came, of which nothing more was saved
        assert found(jobs, job).state == "in_progress"
        jobs.worker_lost("worker-0", crashed=True)
    assert found(jobs, job).state == "failed"


def test_a_job_that_servers_are_lost_at_is_given_up(jobs: JobStore) -> None:
    """Such as one that takes the whole container down, which is then started again for ever."""
    job, waiting = add(jobs), add(jobs)
    for _ in range(MOST_KILLS):
        assert found(jobs, job).state == "queued"
        jobs.take("worker-0")
        jobs.own().close()
    assert found(jobs, job).state == "failed"
    assert "10 times" in (found(jobs, job).error or "")
    assert found(jobs, waiting).state == "queued"
    assert jobs.totals() == {"videos_failed": 1.0}


def test_a_new_server_goes_on_with_what_was_there_and_sweeps_the_rest(jobs: JobStore) -> None:
    begun, waiting, gone = add(jobs), add(jobs), add(jobs)
    jobs.take("worker-0")
    jobs.finish(gone.id, "completed")
    half = jobs.new_folder()  # a kill before `add`
    (half / "portrait").write_bytes(b"...")
    orphan = jobs.folder / "jobs" / ("video_" + "a" * 24)  # a kill within it
    orphan.mkdir()
    foreign = jobs.folder / "jobs" / "mine"
    foreign.mkdir()
    again = JobStore(jobs.folder)
    lock = again.own()
    assert (found(again, begun).state, found(again, waiting).state) == ("queued", "queued")
    assert found(again, gone).state == "completed"
    assert not half.exists()
    assert not orphan.exists()
    assert foreign.exists()
    assert begun.folder.exists()
    with pytest.raises(InputError, match="another server"):
        JobStore(jobs.folder).own()
    lock.close()
    JobStore(jobs.folder).own().close()


def test_a_job_deleted_as_it_is_given_back_is_gone(jobs: JobStore) -> None:
    job = add(jobs)
    jobs.take("worker-0")
    jobs.delete("ann", job.id)
    jobs.give_back(job.id)
    assert not job.folder.exists()
    assert sum(jobs.counts().values()) == 0


def test_one_owner_keeps_so_many(tmp_path: Path) -> None:
    jobs = JobStore(tmp_path, Quotas(kept_each=2))
    for _ in range(2):
        jobs.cancel("ann", add(jobs).id)
    with pytest.raises(QueueFullError, match="2 videos of yours are kept"):
        add(jobs)
    add(jobs, "bob")


def test_one_owner_keeps_so_many_bytes(tmp_path: Path) -> None:
    """Of what was sent, and of what was made."""
    jobs = JobStore(tmp_path, Quotas(bytes_each=1_000_000))
    job = add(jobs)
    jobs.check_room("ann")
    with job.output.open("wb") as file:
        file.truncate(1_000_000)
    with pytest.raises(QueueFullError, match=r"take 0\.0 GB"):
        jobs.check_room("ann")
    jobs.check_room("bob")
    jobs.delete("ann", job.id)
    jobs.check_room("ann")


def test_what_cannot_be_written_down_leaves_no_folder(
    jobs: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(
        "stableavatar.jobs.store.to_disk", lambda path: full() if path.name == "jobs" else None
    )
    with pytest.raises(sqlite3.OperationalError):
        add(jobs)
    assert list((jobs.folder / "jobs").iterdir()) == []
    assert jobs.list("ann") == []


def test_nobody_else_on_the_machine_reads_them(jobs: JobStore) -> None:
    for name in ("jobs", "incoming"):
        assert (jobs.folder / name).stat().st_mode & 0o077 == 0
    files = [jobs.folder / f"jobs.sqlite{ending}" for ending in ("", "-wal", "-shm")]
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)
    for file in files:  # of an earlier release
        file.chmod(0o644)
    JobStore(jobs.folder)
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)


def test_one_of_several_workers_puts_its_video_aside(jobs: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.calls.call("session", {"folder": "x"})
    assert not jobs.calls.claim("worker-0"), "a worker that is free has a moment to answer"
    monkeypatch.setattr("stableavatar.jobs.calls._GRACE_SECONDS", 0.0)
    assert jobs.calls.claim("worker-0")
    assert jobs.calls.claim("worker-0")
    assert not jobs.calls.claim("worker-1")
    assert jobs.calls.answer("worker-0") == {"id": "session", "folder": "x"}
    jobs.calls.hang_up("session")
    jobs.calls.call("second", {})
    assert jobs.calls.claim("worker-0")
    jobs.worker_lost("worker-0", crashed=True)
    assert jobs.calls.claim("worker-1")
    jobs.calls.hang_up("second")
    assert not jobs.calls.claim("worker-1")


def test_whoever_is_free_answers_and_is_heard_of_again(
    jobs: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another is putting its video aside; and where it dies before it says a word, another one."""
    monkeypatch.setattr("stableavatar.jobs.calls._GRACE_SECONDS", 0.0)
    jobs.calls.call("session", {"folder": "x"})
    assert jobs.calls.claim("worker-0")
    assert jobs.calls.answer("worker-1") == {"id": "session", "folder": "x"}
    assert jobs.calls.answer("worker-0") is None
    jobs.worker_lost("worker-1", crashed=True)
    assert jobs.calls.answer("worker-0") == {"id": "session", "folder": "x"}
    jobs.worker_lost("worker-1", crashed=True)
    assert jobs.calls.answer("worker-1") is None


def test_what_was_begun_and_has_nothing_yet_is_cancelled_at_once(jobs: JobStore) -> None:
    """What has frames waits for a worker that puts them into a file."""
    bare, framed = add(jobs), add(jobs)
    for job in (bare, framed):
        assert jobs.take("worker-0") is not None
        jobs.give_back(job.id)
        assert jobs.take("worker-0", without=[bare.id, framed.id]) is None
        if job is bare:
            cancelled = jobs.cancel("ann", bare.id)
            assert cancelled is not None
            assert cancelled.state == "cancelled"
    journal_folder(framed.output).mkdir()
    waiting = jobs.cancel("ann", framed.id)
    assert waiting is not None
    assert (waiting.state, waiting.stopping) == ("queued", True)
    assert jobs.totals() == {"videos_cancelled": 1.0}
    assert jobs.take("worker-0", stopped_alone=True) is not None


def test_finished_videos_expire(jobs: JobStore) -> None:
    old, waiting = add(jobs), add(jobs)
    jobs.take("worker-0")
    jobs.finish(old.id, "completed")
    assert jobs.expire(3600) == 0
    assert old.folder.exists()
    assert jobs.expire(-1) == 1
    assert jobs.get("ann", old.id) is None
    assert not old.folder.exists()
    assert waiting.folder.exists()


def test_what_ended_without_a_video_expires_sooner(jobs: JobStore) -> None:
    failed, cancelled, stopped, made = (add(jobs) for _ in range(4))
    for job, state in ((failed, "failed"), (cancelled, "cancelled"), (stopped, "cancelled")):
        jobs.take("worker-0")
        jobs.finish(job.id, state)
    (stopped.folder / "video.unfinished.mp4").touch()  # plays what was there
    assert jobs.expire_without_video(3600) == 0
    assert jobs.expire_without_video(-1) == 2
    assert [job.id for job in jobs.list("ann")] == [made.id, stopped.id]
    assert not failed.folder.exists()
    assert not cancelled.folder.exists()


def test_a_removal_that_broke_off_is_done_again(jobs: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job = add(jobs)
    jobs.take("worker-0")
    jobs.finish(job.id, "completed")

    def full(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(JobStore, "_purge", full)
        with pytest.raises(sqlite3.Error):
            jobs.delete("ann", job.id)
    assert job.folder.exists()
    assert jobs.expire(3600) == 0
    assert not job.folder.exists()


def test_pages_follow_each_other(jobs: JobStore) -> None:
    made = [add(jobs) for _ in range(4)]
    newest = [job.id for job in reversed(made)]
    assert [job.id for job in jobs.list("ann", limit=3)] == newest[:3]
    assert [job.id for job in jobs.list("ann", limit=3, after=newest[2])] == newest[3:]
    assert [job.id for job in jobs.list("ann", newest_first=False, after=made[0].id)] == newest[-2::-1]
    with pytest.raises(InputError, match="there is no such video"):
        jobs.list("bob", after=made[0].id)


def test_totals_outlive_the_videos(jobs: JobStore) -> None:
    for _ in range(2):
        job = add(jobs)
        jobs.take("worker-0")
        jobs.finish(job.id, "completed", totals={"video_seconds": 1.5})
        jobs.delete("ann", job.id)
    assert JobStore(jobs.folder).totals() == {"videos_completed": 2.0, "video_seconds": 3.0}


def test_a_folder_of_a_later_release_is_left_alone(tmp_path: Path) -> None:
    JobStore(tmp_path)
    with sqlite3.connect(tmp_path / "jobs.sqlite") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(InputError, match="later release"):
        JobStore(tmp_path)


def test_a_folder_of_an_earlier_release_is_used_on(tmp_path: Path) -> None:
    job = add(JobStore(tmp_path))
    with sqlite3.connect(tmp_path / "jobs.sqlite") as database:  # what version 1 was
        database.execute("ALTER TABLE jobs DROP COLUMN kills")
        database.execute("ALTER TABLE jobs DROP COLUMN begun_at")
        database.execute("PRAGMA user_version = 1")
    jobs = JobStore(tmp_path)
    with sqlite3.connect(tmp_path / "jobs.sqlite") as database:  # whose server may run
        assert database.execute("PRAGMA user_version").fetchone() == (1,)
    jobs.own().close()
    assert found(jobs, job) == job
    jobs.take("worker-0")
    jobs.report(job.id, {"share": 0.5}, begins=True)
    jobs.own().close()
    assert found(JobStore(tmp_path), job).state == "queued"


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_what_a_run_needs_to_go_on_is_gone_with_the_run(tmp_path: Path, state: State) -> None:
    """Where the worker ended before it removed it, at the next start."""
    store = JobStore(tmp_path)
    ended, waits = add(store), add(store)
    store.take("worker-0")
    store.finish(ended.id, state)
    folders = [journal_folder(found(store, job).output) for job in (ended, waits)]
    for folder in folders:
        folder.mkdir()
    with contextlib.closing(store.own()):
        assert [folder.exists() for folder in folders] == [False, True]
