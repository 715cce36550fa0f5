"""Jobs: nothing that was taken is lost, owners take turns, and a worker makes what `generate` makes."""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import portrait, speech, toy_model
from media_files import write_wav
from stableavatar import load
from stableavatar.errors import InputError
from stableavatar.jobs.intake import (
    BusyError,
    FileChecker,
    Limits,
    _Turns,
    check_options,
    look_at_files,
    without_folder,
)
from stableavatar.jobs.store import MOST_CRASHES, Job, JobStore, QueueFullError
from stableavatar.jobs.worker import FAULT, TOO_LITTLE_MEMORY, ModelChoice, make
from stableavatar.journal import Journal, SavedState, journal_folder
from stableavatar.media.audio import Sound
from stableavatar.media.following import follow
from stableavatar.media.video import probe, read_frames, read_metadata
from stableavatar.options import GenerateOptions, OutputOptions
from stableavatar.pipeline import AvatarPipeline

MODEL = ModelChoice("toy", checkpoint_every=0)
QUICK: dict[str, Any] = {
    "steps": 1, "text_scale": 1.0, "audio_scale": 1.0, "width": 48, "height": 48, "seed": 3, "fps": 25.0,
    "start": 0.0, "duration": None, "quality": 30,
}  # fmt: skip


@pytest.fixture
def jobs(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs", most_waiting=8, most_waiting_each=4)


@pytest.fixture(scope="module")
def pipeline() -> AvatarPipeline:
    return load(toy_model(), device="cpu")


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


# The store.


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


def test_several_workers_never_take_the_same_job(jobs: JobStore) -> None:
    wide = JobStore(jobs.folder, most_waiting=100, most_waiting_each=100)
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
    for crash in range(1, MOST_CRASHES):
        jobs.take("worker-0")
        jobs.worker_lost("worker-0", crashed=True)
        assert (found(jobs, job).state, found(jobs, job).crashes) == ("queued", crash)
    jobs.take("worker-0")
    jobs.worker_lost("worker-0", crashed=False)  # the server was told to end: no fault of the job
    assert found(jobs, job).state == "queued"
    jobs.take("worker-0")
    jobs.worker_lost("worker-0", crashed=True)
    assert found(jobs, job).state == "failed"
    assert "broke off" in (found(jobs, job).error or "")


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
    jobs = JobStore(tmp_path, most_kept_each=2)
    for _ in range(2):
        jobs.cancel("ann", add(jobs).id)
    with pytest.raises(QueueFullError, match="2 videos of yours are kept"):
        add(jobs)
    add(jobs, "bob")


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
    assert (jobs.folder / "jobs.sqlite").stat().st_mode & 0o077 == 0


def test_one_of_several_workers_puts_its_video_aside(jobs: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.call("session", {"folder": "x"})
    assert not jobs.claim_call("worker-0"), "a worker that is free has a moment to answer"
    monkeypatch.setattr("stableavatar.jobs.store._GRACE_SECONDS", 0.0)
    assert jobs.claim_call("worker-0")
    assert jobs.claim_call("worker-0")
    assert not jobs.claim_call("worker-1")
    assert jobs.answer("worker-1") is None
    assert jobs.answer("worker-0") == {"id": "session", "folder": "x"}
    jobs.call("second", {})
    assert jobs.claim_call("worker-0")
    jobs.worker_lost("worker-0", crashed=True)
    assert jobs.claim_call("worker-1")
    jobs.hang_up("second")
    assert not jobs.claim_call("worker-1")


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


# What is taken.


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 101}, "steps 101 is too large: 100 at most"),
        ({"duration": 601.0}, "duration 601 is too large"),
        ({"fps": 61.0}, "fps 61 is too large"),
        ({"width": 1024, "height": 1024}, "1048576 pixels"),
        ({"order": "lockstep"}, "wavefront, causal"),
        ({"prompt": "x" * 4001}, "4000 characters"),
        ({"decoder_device": "cuda"}, "there is no option decoder_device"),
        ({"steps": 0}, "too small"),
    ],
)
def test_options_above_a_limit_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_options(values, Limits())


def test_files_are_looked_at(tmp_path: Path) -> None:
    picture, sound = portrait(tmp_path / "portrait.png"), speech(tmp_path / "speech.wav", 1.5)
    checker = FileChecker(Limits(seconds=2.0, portrait_pixels=4000))
    try:
        found = checker.check("ann", picture, sound, GenerateOptions())
        assert (found.seconds, found.width, found.height) == (1.5, 40, 48)
        assert checker.check("ann", picture, sound, GenerateOptions(duration=1.0)).seconds == 1.0
        assert checker.check("ann", picture, None, GenerateOptions(duration=1.0)).seconds == 1.0
        with pytest.raises(InputError, match="needs a duration"):
            checker.check("ann", picture, None, GenerateOptions())
        with pytest.raises(InputError, match="longer than 2 s"):
            checker.check("ann", picture, speech(tmp_path / "long.wav", 2.1), GenerateOptions())
        with pytest.raises(InputError, match="shorter than a frame"):
            checker.check("ann", picture, speech(tmp_path / "short.wav", 0.03), GenerateOptions())
        with pytest.raises(InputError, match=r"0\.00192 .*at most 0\.001 megapixels"):
            FileChecker(Limits(portrait_pixels=1000)).check("ann", picture, sound, GenerateOptions())
    finally:
        checker.close()


def test_what_breaks_or_delays_the_reader_is_refused_and_the_next_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, sound = portrait(tmp_path / "portrait.png"), speech(tmp_path / "speech.wav")
    checker = FileChecker(Limits(check_seconds=20))
    try:
        monkeypatch.setattr("stableavatar.jobs.intake.look_at_files", _die)
        with pytest.raises(InputError, match="one of the files cannot be read"):
            checker.check("ann", picture, sound, GenerateOptions())
        monkeypatch.undo()
        assert checker.check("ann", picture, sound, GenerateOptions()).seconds == pytest.approx(0.6)
        assert checker._pool is not None
        for process in checker._pool._processes.values():  # lost while nothing is looked at
            process.kill()
            process.join()
        assert checker.check("ann", picture, sound, GenerateOptions()).seconds == pytest.approx(0.6)
        impatient = FileChecker(Limits(check_seconds=0.001))
        with pytest.raises(InputError, match="could not be read within"):
            impatient.check("ann", picture, sound, GenerateOptions())
        impatient.close()
    finally:
        checker.close()


def test_owners_take_turns_at_being_looked_at_too() -> None:
    turns, order = _Turns(4), list[str]()
    begun, go_on = threading.Event(), threading.Event()

    def wait(owner: str, number: int) -> None:
        with turns.turn(owner):
            order.append(f"{owner}{number}")
            begun.set()
            go_on.wait(10)

    threads = []
    for owner, number in (("ann", 0), ("ann", 1), ("ann", 2), ("bob", 0), ("ann", 3)):
        threads.append(threading.Thread(target=wait, args=(owner, number)))
        threads[-1].start()
        begun.wait(10)
        while len(turns._waiting) < len(threads) - 1:
            time.sleep(0.001)
    with pytest.raises(BusyError), turns.turn("cid"):
        pass
    go_on.set()
    for thread in threads:
        thread.join()
    assert order == ["ann0", "bob0", "ann1", "ann2", "ann3"]


def test_sound_of_too_few_samples_is_refused(tmp_path: Path) -> None:
    picture, sound = portrait(tmp_path / "portrait.png"), write_wav(tmp_path / "speech", np.zeros(5000), 100)
    with pytest.raises(InputError, match="100 samples a second"):
        look_at_files(picture, sound, GenerateOptions(start=19_000), Limits())


def _die(*_: Any) -> None:
    os._exit(1)


def test_errors_do_not_tell_where_files_lie() -> None:
    folder = Path("/data/jobs/video_1")
    assert without_folder(f"recording {folder / 'speech'}: cut off", folder) == "speech: cut off"
    assert without_folder(f"portrait {folder / 'portrait'}: no picture", folder) == "portrait: no picture"
    assert str(folder) not in without_folder(f"output {folder / 'video.mp4'}: no room", folder)


# Workers.


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


def test_a_job_goes_on_in_another_worker_and_is_the_same_video(
    jobs: JobStore, pipeline: AvatarPipeline, tmp_path: Path
) -> None:
    job = add(jobs, seconds=3.0)
    stops = iter([False] * 3 + [True] * 100)
    taken = jobs.take("worker-0")
    assert taken is not None
    make(jobs, taken, pipeline, MODEL, lambda: next(stops))
    given_back = found(jobs, job)
    assert given_back.state == "queued"
    assert given_back.started is not None
    assert (journal_folder(job.output) / "journal.json").exists()
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
    with jobs._transaction() as database:
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
    job = add(jobs, seconds=3.0)
    stops = iter([False] * 3 + [True] * 100)
    taken = jobs.take("worker-0")
    assert taken is not None
    make(jobs, taken, pipeline, MODEL, lambda: next(stops))
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
