"""Jobs in SQLite, and their files in a folder each.

    FOLDER/jobs.sqlite          a row a job
    FOLDER/jobs/ID/             portrait, speech, video.mp4, and while it is made its journal

Every operation is a transaction of its own, so several threads and processes use one store, and what was
answered survives a kill.
"""

import json
import re
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from stableavatar.errors import InputError, StableAvatarError
from stableavatar.media.files import check_folder, locked, reason_of, to_disk

State = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
STATES: tuple[State, ...] = get_args(State)
FINISHED: tuple[State, ...] = ("completed", "failed", "cancelled")

PORTRAIT, SPEECH, VIDEO, UNFINISHED = "portrait", "speech", "video.mp4", "video.unfinished.mp4"

# A job that so many workers died of is the cause.
MOST_CRASHES = 3

_ID = re.compile(r"video_[0-9a-f]{24}")
_BUSY_SECONDS = 30.0
# A worker that is free answers a call within this.
_GRACE_SECONDS = 0.5
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    state TEXT NOT NULL,
    options TEXT NOT NULL,
    details TEXT NOT NULL,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    progress TEXT,
    result TEXT,
    error TEXT,
    worker TEXT,
    crashes INTEGER NOT NULL DEFAULT 0,
    stop INTEGER NOT NULL DEFAULT 0,
    deleted INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS jobs_of_owner ON jobs (owner, deleted, number);
CREATE INDEX IF NOT EXISTS jobs_in_state ON jobs (state, owner);
CREATE TABLE IF NOT EXISTS turns (owner TEXT PRIMARY KEY, started REAL NOT NULL);
CREATE TABLE IF NOT EXISTS workers (name TEXT PRIMARY KEY, since REAL NOT NULL);
CREATE TABLE IF NOT EXISTS totals (name TEXT PRIMARY KEY, value REAL NOT NULL);
CREATE TABLE IF NOT EXISTS sessions (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    request TEXT NOT NULL,
    called REAL NOT NULL,
    claimed TEXT,
    worker TEXT
);
"""


class QueueFullError(StableAvatarError):
    """So many jobs are waiting that another one is not taken."""


@dataclass(frozen=True)
class Job:
    """A video that was asked for.

    Attributes:
        number: rises with every job. id: what it is called outside.
        owner: whose it is; nobody else may see it.
        state: "queued", "in_progress", "completed", "failed" or "cancelled".
        options: what `AvatarPipeline.generate` is given, and "quality" of the file.
        details: what was found when it was taken, such as the speech's length in seconds.
        created, started, finished: seconds since 1970; the last two None before.
        progress: fields of `generation.Progress`, None before the first.
        result: of a completed one, the settings that repeat it, and its `frame_count`.
        error: a sentence, of a failed one.
        stopping: it was asked to stop.
        crashes: how many workers were lost while they made it.
    """

    number: int
    id: str
    owner: str
    state: State
    options: Mapping[str, Any]
    details: Mapping[str, Any]
    created: float
    started: float | None = None
    finished: float | None = None
    progress: Mapping[str, Any] | None = None
    result: Mapping[str, Any] | None = None
    error: str | None = None
    stopping: bool = False
    crashes: int = 0
    folder: Path = field(default=Path(), compare=False)

    @property
    def is_finished(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in FINISHED

    @property
    def portrait(self) -> Path:
        """The picture that was given."""
        return self.folder / PORTRAIT

    @property
    def speech(self) -> Path | None:
        """The recording that was given, None for a silent video."""
        path = self.folder / SPEECH
        return path if path.exists() else None

    @property
    def output(self) -> Path:
        """Where the complete video lies."""
        return self.folder / VIDEO

    @property
    def video(self) -> Path | None:
        """The video as far as it is there as a file that plays; None while it is made."""
        for name in (VIDEO, UNFINISHED):
            if (self.folder / name).exists():
                return self.folder / name
        return None


class JobStore:
    """The jobs of one folder.

    Args:
        folder: made if need be.
        most_waiting, most_waiting_each: jobs that wait, of all owners and of one.
        most_kept_each: jobs of one owner that are there.

    Raises:
        InputError: the folder cannot be used.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        most_waiting: int = 100,
        most_waiting_each: int = 20,
        most_kept_each: int = 500,
    ) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.most_waiting = most_waiting
        self.most_waiting_each = most_waiting_each
        self.most_kept_each = most_kept_each
        self._local = threading.local()
        check_folder(self.folder)
        for name in ("jobs", "incoming"):
            check_folder(self.folder / name)
            (self.folder / name).chmod(0o700)  # other accounts of this machine have no business there
        try:
            with self._transaction() as database:
                version = database.execute("PRAGMA user_version").fetchone()[0]
                if version > _SCHEMA_VERSION:
                    raise InputError(
                        f"{self.folder}: its jobs belong to a later release. Use that, or another folder."
                    )
                for statement in _SCHEMA.split(";"):
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            (self.folder / "jobs.sqlite").chmod(0o600)
        except sqlite3.Error as error:
            raise InputError(f"{self.folder / 'jobs.sqlite'}: cannot be used ({error})") from error

    # Who asks for videos.

    def new_folder(self) -> Path:
        """A folder for the files of a job to come; give it to `add`, or to `discard`."""
        folder = self.folder / "incoming" / f"video_{secrets.token_hex(12)}"
        folder.mkdir()
        return folder

    def discard(self, folder: Path) -> None:
        """Remove what `new_folder` made."""
        shutil.rmtree(folder, ignore_errors=True)

    def check_room(self, owner: str) -> None:
        """Raise QueueFullError where `add` would; to be asked before files are copied."""
        with self._reading() as database:
            self._check_room(database, owner)

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
        for path in folder.iterdir():
            to_disk(path)
        to_disk(folder)
        target = self._folder(folder.name)
        try:
            with self._transaction() as database:
                self._check_room(database, owner)
                database.execute(
                    "INSERT INTO jobs (id, owner, state, options, details, created) "
                    "VALUES (?, ?, 'queued', ?, ?, ?)",
                    (folder.name, owner, _json(options), _json(details or {}), time.time()),
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
        with self._reading() as database:
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
        condition, values = "", [owner]
        if after is not None:
            last = self.get(owner, after)
            if last is None:
                raise InputError(f"after {after!r}: there is no such video")
            condition, values = f"AND number {comparison} ?", [owner, last.number]  # type: ignore[list-item]
        with self._reading() as database:
            rows = database.execute(
                f"SELECT * FROM jobs WHERE owner = ? AND NOT deleted {condition} "
                f"ORDER BY number {order} LIMIT ?",
                (*values, limit),
            ).fetchall()
        return [self._job(row) for row in rows]

    def cancel(self, owner: str, job_id: str) -> Job | None:
        """Stop a job: one that waits is cancelled at once, one that is made within a step, and what is there
        of its video is kept. A finished one is left as it is."""
        with self._transaction() as database:
            waited = database.execute(
                "UPDATE jobs SET state = 'cancelled', finished = ? "
                "WHERE id = ? AND owner = ? AND state = 'queued' AND started IS NULL",
                (time.time(), job_id, owner),
            )
            _add_totals(database, {"videos_cancelled": float(waited.rowcount)})
            # One that was begun may have frames: a worker puts them into a file.
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
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET deleted = 1, stop = 1, state = CASE state WHEN 'queued' THEN 'cancelled' "
                "ELSE state END WHERE id = ?",
                (job_id,),
            )
        self._purge(job_id)
        return True

    def position(self, job: Job) -> int:
        """How many jobs are made or wait before a queued one gets its turn, by the order of now."""
        with self._reading() as database:
            running = database.execute("SELECT COUNT(*) FROM jobs WHERE state = 'in_progress'").fetchone()[0]
            rows = database.execute(
                "SELECT id, owner, started FROM jobs WHERE state = 'queued' ORDER BY number"
            ).fetchall()
            turns = dict(database.execute("SELECT owner, started FROM turns").fetchall())
        for place, job_id in enumerate(_in_turn(rows, turns)):
            if job_id == job.id:
                return int(running) + place
        return 0

    def counts(self) -> dict[State, int]:
        """How many jobs are in each state."""
        with self._reading() as database:
            found = dict(database.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in STATES}

    def totals(self) -> dict[str, float]:
        """Sums since the folder was made: `videos_` and a state, and what workers gave to `finish`."""
        with self._reading() as database:
            return dict(database.execute("SELECT name, value FROM totals").fetchall())

    def expire(self, seconds: float) -> int:
        """Remove jobs that finished so long ago; how many."""
        with self._transaction() as database:
            rows = database.execute(
                "UPDATE jobs SET deleted = 1 WHERE finished < ? AND NOT deleted RETURNING id",
                (time.time() - seconds,),
            ).fetchall()
            database.execute("DELETE FROM turns WHERE started < ?", (time.time() - seconds,))
        for row in rows:
            self._purge(row["id"])
        return len(rows)

    # Who makes them.

    def take(self, worker: str) -> Job | None:
        """The next job, which is this worker's from now on; None where none waits.

        Owners take turns: the one whose last job was begun longest ago is next, with his oldest job. Jobs
        that were interrupted come first.
        """
        with self._reading() as database:
            waiting = "SELECT 1 FROM jobs WHERE state = 'queued' AND NOT deleted LIMIT 1"
            if database.execute(waiting).fetchone() is None:
                return None
        now = time.time()
        with self._transaction() as database:
            row = database.execute(
                "SELECT jobs.id, jobs.owner FROM jobs LEFT JOIN turns USING (owner) "
                "WHERE jobs.state = 'queued' AND NOT jobs.deleted "
                "ORDER BY jobs.started IS NULL, turns.started NULLS FIRST, jobs.number LIMIT 1"
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
        with self._reading() as database:
            row = database.execute("SELECT stop FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return row is None or bool(row["stop"])

    def report(self, job_id: str, progress: Mapping[str, Any]) -> None:
        """Say how far a job is."""
        with self._transaction(durable=False) as database:
            database.execute("UPDATE jobs SET progress = ? WHERE id = ?", (_json(progress), job_id))

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
        with self._transaction() as database:
            deleted = database.execute(
                "UPDATE jobs SET state = ?, result = ?, error = ?, finished = ?, worker = NULL "
                "WHERE id = ? RETURNING deleted",
                (state, None if result is None else _json(result), error, time.time(), job_id),
            ).fetchone()
            _add_totals(database, {f"videos_{state}": 1.0, **dict(totals or {})})
        if deleted is not None and deleted["deleted"]:
            self._purge(job_id)

    def give_back(self, job_id: str) -> None:
        """A worker ends before the job does: another one goes on with it."""
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET state = 'queued', worker = NULL WHERE id = ? AND state = 'in_progress'",
                (job_id,),
            )
        self._purge(job_id)  # where it was deleted in this very moment

    def worker_ready(self, name: str) -> None:
        """A worker has loaded its model."""
        with self._transaction() as database:
            database.execute("INSERT OR REPLACE INTO workers VALUES (?, ?)", (name, time.time()))

    def workers_ready(self) -> int:
        """How many workers can take a job."""
        with self._reading() as database:
            return int(database.execute("SELECT COUNT(*) FROM workers").fetchone()[0])

    def worker_lost(self, name: str, *, crashed: bool) -> None:
        """A worker has ended: what it was making waits again, unless it has cost several workers."""
        with self._transaction() as database:
            database.execute("DELETE FROM workers WHERE name = ?", (name,))
            database.execute("UPDATE sessions SET claimed = NULL WHERE claimed = ?", (name,))
            database.execute(
                "UPDATE jobs SET state = 'queued', worker = NULL, crashes = crashes + ? "
                "WHERE worker = ? AND state = 'in_progress'",
                (int(crashed), name),
            )
            gone = database.execute("SELECT id FROM jobs WHERE deleted AND state = 'queued'").fetchall()
            lost = database.execute(
                "UPDATE jobs SET state = 'failed', finished = ?, error = ? "
                "WHERE state = 'queued' AND crashes >= ?",
                (
                    time.time(),
                    f"The program that makes videos broke off {MOST_CRASHES} times at this one, perhaps for "
                    "want of memory.",
                    MOST_CRASHES,
                ),
            )
            _add_totals(database, {"videos_failed": float(lost.rowcount)})
        for row in gone:
            self._purge(row["id"])

    # Sessions: somebody speaks now, and no video goes before.

    def call(self, session_id: str, request: Mapping[str, Any]) -> None:
        """Ask for a worker for a session."""
        with self._transaction(durable=False) as database:
            database.execute(
                "INSERT INTO sessions (id, request, called) VALUES (?, ?, ?)",
                (session_id, _json(request), time.time()),
            )

    def hang_up(self, session_id: str) -> None:
        """A session is over, or given up."""
        with self._transaction(durable=False) as database:
            database.execute("DELETE FROM sessions WHERE id = ?", (session_id,))

    def claim_call(self, worker: str) -> bool:
        """Whether this worker, which makes a video, is to put it aside for a session: of several workers one
        is, and none where another has been free for it."""
        late = time.time() - _GRACE_SECONDS
        open_to = "worker IS NULL AND (claimed IS NULL OR claimed = ?) AND called < ?"
        with self._reading() as database:
            found = database.execute(
                f"SELECT 1 FROM sessions WHERE {open_to} LIMIT 1", (worker, late)
            ).fetchone()
        if found is None:
            return False
        with self._transaction(durable=False) as database:
            return (
                database.execute(
                    "UPDATE sessions SET claimed = ? WHERE number = "
                    f"(SELECT MIN(number) FROM sessions WHERE {open_to}) RETURNING 1",
                    (worker, worker, late),
                ).fetchone()
                is not None
            )

    def answer(self, worker: str) -> dict[str, Any] | None:
        """The session that has waited longest, which is this worker's from now on; None where none does."""
        with self._reading() as database:
            called = database.execute("SELECT 1 FROM sessions WHERE worker IS NULL LIMIT 1").fetchone()
        if called is None:
            return None
        with self._transaction(durable=False) as database:
            row = database.execute(
                "UPDATE sessions SET worker = ? WHERE number = (SELECT MIN(number) FROM sessions "
                "WHERE worker IS NULL AND (claimed IS NULL OR claimed = ?)) RETURNING id, request",
                (worker, worker),
            ).fetchone()
        return None if row is None else {"id": row["id"], **json.loads(row["request"])}

    # The one process that owns the folder.

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
        with self._transaction() as database:
            database.execute("DELETE FROM workers")
            database.execute("DELETE FROM sessions")
            database.execute(
                "UPDATE jobs SET state = 'queued', worker = NULL WHERE state = 'in_progress' AND NOT deleted"
            )
            rows = database.execute("SELECT id FROM jobs WHERE deleted").fetchall()
        for row in rows:
            self._purge(row["id"], running=True)
        for folder in (self.folder / "incoming").iterdir():
            self.discard(folder)
        with self._reading() as database:
            known = {row["id"] for row in database.execute("SELECT id FROM jobs").fetchall()}
        for folder in (self.folder / "jobs").iterdir():
            if _ID.fullmatch(folder.name) and folder.name not in known:
                self.discard(folder)
        return lock

    def _check_room(self, database: sqlite3.Connection, owner: str) -> None:
        waiting = "SELECT COUNT(*) FROM jobs WHERE state = 'queued' AND NOT deleted"
        everybody = database.execute(waiting).fetchone()[0]
        own = database.execute(f"{waiting} AND owner = ?", (owner,)).fetchone()[0]
        if own >= self.most_waiting_each:
            raise QueueFullError(
                f"{own} of your videos are waiting already. Ask again when one is made, or delete one."
            )
        if everybody >= self.most_waiting:
            raise QueueFullError("Too many videos are waiting. Ask again later.")
        kept = "SELECT COUNT(*) FROM jobs WHERE owner = ? AND NOT deleted"
        if database.execute(kept, (owner,)).fetchone()[0] >= self.most_kept_each:
            raise QueueFullError(f"{self.most_kept_each} videos of yours are kept. Delete some first.")

    def _purge(self, job_id: str, *, running: bool = False) -> None:
        """Remove a deleted job, unless a worker still makes it: then that one does."""
        unless = "" if running else "AND state != 'in_progress'"
        with self._transaction() as database:
            gone = database.execute(
                f"DELETE FROM jobs WHERE id = ? AND deleted {unless} RETURNING id", (job_id,)
            ).fetchone()
        if gone is not None:
            shutil.rmtree(self._folder(job_id), ignore_errors=True)

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
            crashes=row["crashes"],
            folder=self._folder(row["id"]),
        )

    @property
    def _connection(self) -> sqlite3.Connection:
        """This thread's own."""
        if not hasattr(self._local, "connection"):
            connection = sqlite3.connect(
                self.folder / "jobs.sqlite", timeout=_BUSY_SECONDS, isolation_level=None
            )
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode = WAL")
            self._local.connection = connection
        found: sqlite3.Connection = self._local.connection
        return found

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        yield self._connection

    @contextmanager
    def _transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Everything or nothing; `durable`: on the disk when it returns."""
        database = self._connection
        database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
        except BaseException:
            with suppress(sqlite3.Error):
                database.execute("ROLLBACK")
            raise
        database.execute("COMMIT")


def describe(progress: Any) -> dict[str, Any]:
    """A `generation.Progress` as JSON can hold it."""
    return asdict(progress)


def _in_turn(rows: list[sqlite3.Row], turns: Mapping[str, float]) -> Iterator[str]:
    """The ids of waiting jobs in the order in which `take` would take them, one after the other."""
    last = dict(turns)
    waiting = list(rows)
    now = max(last.values(), default=0.0)
    while waiting:
        row = min(
            waiting,
            key=lambda row: (row["started"] is None, last.get(row["owner"], float("-inf"))),
        )
        now += 1.0
        last[row["owner"]] = now
        waiting.remove(row)
        yield row["id"]


def _add_totals(database: sqlite3.Connection, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if value:
            database.execute(
                "INSERT INTO totals VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + ?",
                (name, value, value),
            )


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)


def _parsed(text: str | None) -> Any:
    return None if text is None else json.loads(text)
