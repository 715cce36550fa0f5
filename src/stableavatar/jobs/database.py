"""The SQLite file that jobs, workers and calls are in.

Every operation is a transaction of its own, so several threads and processes use one file, and what was
answered survives a kill.
"""

import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stableavatar.errors import InputError
from stableavatar.media.files import reason_of

_BUSY_SECONDS = 30.0
_SCHEMA_VERSION = 2
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
    kills INTEGER NOT NULL DEFAULT 0,
    begun_at REAL NOT NULL DEFAULT -1,
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
# What a file of a version lacks of the next one.
_CHANGES = {
    1: (
        "ALTER TABLE jobs ADD COLUMN kills INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE jobs ADD COLUMN begun_at REAL NOT NULL DEFAULT -1",
    ),
}


class Database:
    """A file of jobs, with a connection for every thread.

    One of an earlier release is left as it is until `migrate`: its server may run.

    Raises:
        InputError: it cannot be used, or is of a later release.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._local = threading.local()
        try:
            self._keep_private()
            with self.transaction() as database:
                version = database.execute("PRAGMA user_version").fetchone()[0]
                if version > _SCHEMA_VERSION:
                    raise InputError(
                        f"{file.parent}: its jobs belong to a later release. Use that, or another folder."
                    )
                if not version:
                    for statement in _SCHEMA.split(";"):
                        database.execute(statement)
                    database.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        except sqlite3.Error as error:
            raise InputError(f"{file}: cannot be used ({error})") from error
        except OSError as error:
            raise InputError(f"{file}: cannot be used ({reason_of(error)})") from error

    def _keep_private(self) -> None:
        """Other accounts of this machine have no business in the file, nor in those that SQLite has beside
        it, which are made as it is."""
        # Not opened where it is there: to close a file ends the locks that this process has on it.
        with suppress(FileExistsError):
            os.close(os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        for ending in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                self.file.with_name(self.file.name + ending).chmod(0o600)

    def migrate(self) -> None:
        """Bring a file of an earlier release up to this one; nobody else uses it."""
        with self.transaction() as database:
            version = database.execute("PRAGMA user_version").fetchone()[0]
            for older in range(version, _SCHEMA_VERSION):
                for change in _CHANGES[older]:
                    database.execute(change)
            database.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    @property
    def _connection(self) -> sqlite3.Connection:
        """This thread's own."""
        if not hasattr(self._local, "connection"):
            connection = sqlite3.connect(self.file, timeout=_BUSY_SECONDS, isolation_level=None)
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode = WAL")
            self._local.connection = connection
        found: sqlite3.Connection = self._local.connection
        return found

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """To read alone: no transaction, so it waits for nobody."""
        yield self._connection

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
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


def as_json(value: Mapping[str, Any]) -> str:
    """A column's text."""
    return json.dumps(value, ensure_ascii=False)
