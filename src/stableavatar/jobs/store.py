"""Jobs in SQLite, and their files in a folder each.

FOLDER/jobs.sqlite          a row a job
FOLDER/jobs/ID/             portrait, speech, video.mp4, and while it is made its journal
FOLDER/incoming/ID/         what is being asked for, and sessions
FOLDER/temporary/           of a server while it runs, such as uploads
"""

import json
import re
import secrets
import shutil
import sqlite3
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from stableavatar.errors import InputError
from stableavatar.jobs.calls import Calls
from stableavatar.jobs.database import Database, as_json
from stableavatar.jobs.job import STATES, VIDEO, Job, State
from stableavatar.jobs.quotas import LEAST_ROOM, NoRoomError, Quotas
from stableavatar.jobs.turns import in_turn
from stableavatar.media.files import check_folder, locked, reason_of, to_disk
from stableavatar.unfinished import journal_folder

# A job that so many workers died of, without getting any further, is the cause.
MOST_CRASHES = 3
# The same of whole servers, which end for more reasons than a job.
MOST_KILLS = 10
# Of the work; less is rounding.
_FURTHER = 1e-6

_ID = re.compile(r"video_[0-9a-f]{24}")


class JobStore:
    """The jobs of one folder.

    Args:
        folder: made if need be.
        quotas: how many jobs are taken.

    Raises:
        InputError: the folder cannot be used.
    """

    def __init__(self, folder: str | Path, quotas: Quotas | None = None) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.quotas = quotas or Quotas()
        check_folder(self.folder)
        for name in ("jobs", "incoming"):
            check_folder(self.folder / name)
            (self.folder / name).chmod(0o700)  # other accounts of this machine have no business there
        self._database = Database(self.folder / "jobs.sqlite")
        self.calls = Calls(self._database)

    # Who asks for videos.

    def new_folder(self) -> Path:
        """A folder for the files of a job to come; give it to `add`, or to `discard`."""
        folder = self.folder / "incoming" / f"video_{secrets.token_hex(12)}"
        folder.mkdir()
        return folder

    def discard(self, folder: Path) -> None:
        """Remove what `new_folder` made."""
        shutil.rmtree(folder, ignore_errors=True)

    def free_bytes(self) -> int:
        """Room on the disk that jobs are kept on."""
        return shutil.disk_usage(self.folder).free

    def check_room(self, owner: str) -> None:
        """Raise QueueFullError where `add` would, NoRoomError where the disk is full; to be asked before
        files are copied."""
        if self.free_bytes() < LEAST_ROOM:
            raise NoRoomError("There is no room for more videos on this machine now.")
        with self._database.reading() as database:
            self.quotas.check(database, owner)
        self.quotas.check_bytes(self._folders(owner))

    def _folders(self, owner: str) -> Sequence[Path]:
        """Of an owner's jobs."""
        with self._database.reading() as database:
            kept = database.execute("SELECT id FROM jobs WHERE owner = ? AND NOT deleted", (owner,))
            return [self._folder(row["id"]) for row in kept.fetchall()]

    def add(
        self,
        owner: str,
        folder: Path,
        options: Mapping[str, Any],
        details: Mapping[str, Any] | None = None,
    ) -> Job:
        """Put a job into the queue. When this returns, no kill or power cut loses it.

        Args:
            folder: of `new_folder`, with its portrait and perhaps its speech.

        Raises:
            QueueFullError: too many are waiting.
            OSError: the files cannot be put where they belong.
        """
        self.quotas.check_bytes(self._folders(owner))  # others may have come since files were copied
        for path in folder.iterdir():
            to_disk(path)
        to_disk(folder)
        target = self._folder(folder.name)
        try:
            with self._database.transaction() as database:
                self.quotas.check(database, owner)
                database.execute(
                    "INSERT INTO jobs (id, owner, state, options, details, created) "
                    "VALUES (?, ?, 'queued', ?, ?, ?)",
                    (folder.name, owner, as_json(options), as_json(details or {}), time.time()),
                )
                folder.replace(target)
                to_disk(self.folder / "jobs")
        except BaseException:
            self.discard(target)
            raise
        added = self.get(owner, folder.name)
        assert added is not None
        return added

    def get(self, owner: str, job_id: str) -> Job | None:
        """A job, None where this owner has none of that id."""
        if not _ID.fullmatch(job_id):
            return None
        with self._database.reading() as database:
            row = database.execute(
                "SELECT * FROM jobs WHERE id = ? AND owner = ? AND NOT deleted", (job_id, owner)
            ).fetchone()
        return None if row is None else self._job(row)

    def list(
        self, owner: str, *, limit: int = 20, after: str | None = None, newest_first: bool = True
    ) -> list[Job]:
        """An owner's jobs, those that follow the one named `after`.

        Raises:
            InputError: there is no such job.
        """
        comparison, order = ("<", "DESC") if newest_first else (">", "ASC")
        condition = ""
        values: tuple[str | int, ...] = (owner,)
        if after is not None:
            last = self.get(owner, after)
            if last is None:
                raise InputError(f"after {after!r}: there is no such video")
            condition, values = f"AND number {comparison} ?", (owner, last.number)
        with self._database.reading() as database:
            rows = database.execute(
                f"SELECT * FROM jobs WHERE owner = ? AND NOT deleted {condition} "
                f"ORDER BY number {order} LIMIT ?",
                (*values, limit),
            ).fetchall()
        return [self._job(row) for row in rows]

    def cancel(self, owner: str, job_id: str) -> Job | None:
        """Stop a job: one that waits is cancelled at once, one that is made within a step, and what is there
        of its video is kept. A finished one is left as it is."""
        if not _ID.fullmatch(job_id):
            return None
        output = self._folder(job_id) / VIDEO
        with self._database.transaction() as database:
            # One that was begun may have frames: a worker that is free puts them into a file.
            nothing = not output.exists() and not journal_folder(output).exists()
            waited = database.execute(
                "UPDATE jobs SET state = 'cancelled', finished = ? "
                "WHERE id = ? AND owner = ? AND state = 'queued' AND (started IS NULL OR ?)",
                (time.time(), job_id, owner, nothing),
            )
            _add_totals(database, {"videos_cancelled": float(waited.rowcount)})
            database.execute(
                "UPDATE jobs SET stop = 1 WHERE id = ? AND owner = ? AND state IN ('queued', 'in_progress')",
                (job_id, owner),
            )
        return self.get(owner, job_id)

    def delete(self, owner: str, job_id: str) -> bool:
        """Remove a job and its files; one that is being made is stopped first. False: there is none."""
        job = self.get(owner, job_id)
        if job is None:
            return False
        with self._database.transaction() as database:
            database.execute(
                "UPDATE jobs SET deleted = 1, stop = 1, state = CASE state WHEN 'queued' THEN 'cancelled' "
                "ELSE state END WHERE id = ?",
                (job_id,),
            )
        self._purge(job_id)
        return True

    def position(self, job: Job) -> int:
        """How many jobs are made or wait before a queued one gets its turn, by the order of now."""
        with self._database.reading() as database:
            running = database.execute("SELECT COUNT(*) FROM jobs WHERE state = 'in_progress'").fetchone()[0]
            rows = database.execute(
                "SELECT number, id, owner, started FROM jobs WHERE state = 'queued' ORDER BY number"
            ).fetchall()
            turns = dict(database.execute("SELECT owner, started FROM turns").fetchall())
        for place, job_id in enumerate(in_turn(rows, turns)):
            if job_id == job.id:
                return int(running) + place
        return 0

    def counts(self) -> dict[State, int]:
        """How many jobs are in each state."""
        with self._database.reading() as database:
            found = dict(database.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in STATES}

    def totals(self) -> dict[str, float]:
        """Sums since the folder was made: `videos_` and a state, and what workers gave to `finish`."""
        with self._database.reading() as database:
            return dict(database.execute("SELECT name, value FROM totals").fetchall())

    def expire(self, seconds: float) -> int:
        """Remove jobs that finished so long ago, and what is left of deleted ones; how many finished."""
        with self._database.transaction() as database:
            count = database.execute(
                "UPDATE jobs SET deleted = 1 WHERE finished < ? AND NOT deleted", (time.time() - seconds,)
            ).rowcount
            database.execute("DELETE FROM turns WHERE started < ?", (time.time() - seconds,))
        self._purge_deleted()
        return count

    def expire_without_video(self, seconds: float) -> int:
        """Remove jobs that failed or were stopped so long ago and have no video; how many."""
        with self._database.reading() as database:
            rows = database.execute(
                "SELECT * FROM jobs WHERE state IN ('failed', 'cancelled') AND finished < ? AND NOT deleted",
                (time.time() - seconds,),
            ).fetchall()
        empty = [job for job in map(self._job, rows) if job.video is None]
        for job in empty:
            self.delete(job.owner, job.id)
        self._purge_deleted()
        return len(empty)

    def _purge_deleted(self) -> None:
        """Also those whose removal was interrupted before, by a full disk or an end."""
        with self._database.reading() as database:
            rows = database.execute("SELECT id FROM jobs WHERE deleted AND state != 'in_progress'").fetchall()
        for row in rows:
            self._purge(row["id"])

    # Who makes them.

    def take(self, worker: str, *, stopped_alone: bool = False, without: Collection[str] = ()) -> Job | None:
        """The next job, which is this worker's from now on; None where none waits.

        Args:
            stopped_alone: only one that was asked to stop, for which there is nothing to do but to say so.
            without: ids of jobs that it is not to be.

        Owners take turns: the one whose last job was begun longest ago is next, with his oldest job. Jobs
        that were interrupted come first.
        """
        kind = "AND jobs.stop" if stopped_alone else ""
        others = f"AND jobs.id NOT IN ({', '.join('?' * len(without))})"
        open_to = f"jobs.state = 'queued' AND NOT jobs.deleted {kind} {others}"
        with self._database.reading() as database:
            waiting = f"SELECT 1 FROM jobs WHERE {open_to} LIMIT 1"
            if database.execute(waiting, (*without,)).fetchone() is None:
                return None
        now = time.time()
        with self._database.transaction() as database:
            row = database.execute(
                "SELECT jobs.id, jobs.owner FROM jobs LEFT JOIN turns USING (owner) "
                f"WHERE {open_to} "
                "ORDER BY jobs.started IS NULL, turns.started NULLS FIRST, jobs.number LIMIT 1",
                (*without,),
            ).fetchone()
            if row is None:
                return None
            database.execute("INSERT OR REPLACE INTO turns VALUES (?, ?)", (row["owner"], now))
            taken = database.execute(
                "UPDATE jobs SET state = 'in_progress', worker = ?, started = COALESCE(started, ?) "
                "WHERE id = ? RETURNING *",
                (worker, now, row["id"]),
            ).fetchone()
        return self._job(taken)

    def should_stop(self, job_id: str) -> bool:
        """Whether somebody asked that job to stop."""
        with self._database.reading() as database:
            row = database.execute("SELECT stop FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return row is None or bool(row["stop"])

    def report(self, job_id: str, progress: Mapping[str, Any], *, begins: bool = False) -> None:
        """Say how far a job is.

        Args:
            begins: it is a worker's first report of the job. One that begins further on than the one before
                it has what that one saved, so what went wrong until then was survived.
        """
        with self._database.transaction(durable=False) as database:
            database.execute("UPDATE jobs SET progress = ? WHERE id = ?", (as_json(progress), job_id))
            if begins:
                database.execute(
                    "UPDATE jobs SET begun_at = ?1, crashes = 0, kills = 0 "
                    "WHERE id = ?2 AND begun_at + ?3 < ?1",
                    (progress["share"], job_id, _FURTHER),
                )

    def finish(
        self,
        job_id: str,
        state: State,
        *,
        result: Mapping[str, Any] | None = None,
        error: str | None = None,
        totals: Mapping[str, float] | None = None,
    ) -> None:
        """A worker is done with a job; `totals` are added to what `totals` tells."""
        with self._database.transaction() as database:
            deleted = database.execute(
                "UPDATE jobs SET state = ?, result = ?, error = ?, finished = ?, worker = NULL "
                "WHERE id = ? RETURNING deleted",
                (state, None if result is None else as_json(result), error, time.time(), job_id),
            ).fetchone()
            _add_totals(database, {f"videos_{state}": 1.0, **dict(totals or {})})
        if deleted is not None and deleted["deleted"]:
            self._purge(job_id)

    def give_back(self, job_id: str) -> None:
        """A worker ends before the job does: another one goes on with it."""
        with self._database.transaction() as database:
            database.execute(
                "UPDATE jobs SET state = 'queued', worker = NULL WHERE id = ? AND state = 'in_progress'",
                (job_id,),
            )
        self._purge(job_id)  # where it was deleted in this very moment

    def worker_ready(self, name: str) -> None:
        """A worker has loaded its model."""
        with self._database.transaction() as database:
            database.execute("INSERT OR REPLACE INTO workers VALUES (?, ?)", (name, time.time()))

    def workers_ready(self) -> int:
        """How many workers can take a job."""
        with self._database.reading() as database:
            return int(database.execute("SELECT COUNT(*) FROM workers").fetchone()[0])

    def worker_lost(self, name: str, *, crashed: bool) -> bool:
        """A worker has ended: what it was making waits again, unless it has cost several workers. Whether it
        had loaded its model."""
        with self._database.transaction() as database:
            ready = database.execute("DELETE FROM workers WHERE name = ?", (name,)).rowcount > 0
            # A session that was answered, and is there still, is about to be removed, or was never heard of
            # that worker: it calls anew.
            database.execute(
                "UPDATE sessions SET claimed = NULL, worker = NULLIF(worker, ?1), called = ?2 "
                "WHERE worker = ?1 OR (worker IS NULL AND claimed = ?1)",
                (name, time.time()),
            )
            database.execute(
                "UPDATE jobs SET state = 'queued', worker = NULL, crashes = crashes + ? "
                "WHERE worker = ? AND state = 'in_progress'",
                (int(crashed), name),
            )
            gone = database.execute("SELECT id FROM jobs WHERE deleted AND state = 'queued'").fetchall()
            given_up = _give_up(database)
        for row in gone:
            self._purge(row["id"])
        self._forget_states(given_up)
        return ready

    # The one process that owns the folder.

    @property
    def temporary(self) -> Path:
        """A folder for what a server needs for a while, on the disk whose room is looked at."""
        return self.folder / "temporary"

    def own(self) -> Any:
        """Be the one server of this folder: what was interrupted waits again, and what was begun to be taken
        is removed. Keep what is returned for as long as that is so, then close it.

        Raises:
            InputError: another process is.
        """
        try:
            lock = locked(self.folder / "lock")
        except BlockingIOError:
            raise InputError(f"{self.folder}: another server uses this folder") from None
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be used ({reason_of(error)})") from error
        self._database.migrate()
        with self._database.transaction() as database:
            database.execute("DELETE FROM workers")
            database.execute("DELETE FROM sessions")
            database.execute(
                "UPDATE jobs SET state = 'queued', worker = NULL, kills = kills + 1 "
                "WHERE state = 'in_progress' AND NOT deleted"
            )
            _give_up(database)
            ended = "SELECT id FROM jobs WHERE state IN ('failed', 'cancelled')"
            without_state = [row["id"] for row in database.execute(ended).fetchall()]
            rows = database.execute("SELECT id FROM jobs WHERE deleted").fetchall()
        for row in rows:
            self._purge(row["id"], running=True)
        self._forget_states(without_state)  # a worker may have ended before it did
        for folder in (self.folder / "incoming").iterdir():
            self.discard(folder)
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(mode=0o700, exist_ok=True)
        with self._database.reading() as database:
            known = {row["id"] for row in database.execute("SELECT id FROM jobs").fetchall()}
        for folder in (self.folder / "jobs").iterdir():
            if _ID.fullmatch(folder.name) and folder.name not in known:
                self.discard(folder)
        return lock

    def _purge(self, job_id: str, *, running: bool = False) -> None:
        """Remove a deleted job, unless a worker still makes it: then that one does."""
        unless = "" if running else "AND state != 'in_progress'"
        with self._database.transaction() as database:
            gone = database.execute(
                f"DELETE FROM jobs WHERE id = ? AND deleted {unless} RETURNING id", (job_id,)
            ).fetchone()
        if gone is not None:
            shutil.rmtree(self._folder(job_id), ignore_errors=True)

    def _forget_states(self, job_ids: Sequence[str]) -> None:
        """Nobody goes on with jobs that have ended."""
        for job_id in job_ids:
            shutil.rmtree(journal_folder(self._folder(job_id) / VIDEO), ignore_errors=True)

    def _folder(self, job_id: str) -> Path:
        return self.folder / "jobs" / job_id

    def _job(self, row: sqlite3.Row) -> Job:
        return Job(
            number=row["number"],
            id=row["id"],
            owner=row["owner"],
            state=row["state"],
            options=json.loads(row["options"]),
            details=json.loads(row["details"]),
            created=row["created"],
            started=row["started"],
            finished=row["finished"],
            progress=_parsed(row["progress"]),
            result=_parsed(row["result"]),
            error=row["error"],
            stopping=bool(row["stop"]),
            folder=self._folder(row["id"]),
        )


def _give_up(database: sqlite3.Connection) -> list[str]:
    """Fail the jobs that workers or servers are lost at, again and again; their ids."""
    lost = database.execute(
        "UPDATE jobs SET state = 'failed', finished = ?, "
        "error = 'The program that makes videos broke off ' || "
        "MAX(crashes, kills) || ' times at this one, perhaps for want of memory, or hung.' "
        "WHERE state = 'queued' AND (crashes >= ? OR kills >= ?) RETURNING id",
        (time.time(), MOST_CRASHES, MOST_KILLS),
    ).fetchall()
    _add_totals(database, {"videos_failed": float(len(lost))})
    return [row["id"] for row in lost]


def _add_totals(database: sqlite3.Connection, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if value:
            database.execute(
                "INSERT INTO totals VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + ?",
                (name, value, value),
            )


def _parsed(text: str | None) -> Any:
    return None if text is None else json.loads(text)
