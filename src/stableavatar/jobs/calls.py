"""Who speaks now and waits for a worker: no video goes before."""

import json
import time
from collections.abc import Mapping
from typing import Any

from stableavatar.jobs.database import Database, as_json

# A worker that is free answers a call within this.
_GRACE_SECONDS = 0.5


class Calls:
    """Calls for workers, one a session."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def call(self, session_id: str, request: Mapping[str, Any]) -> None:
        """Ask for a worker for a session."""
        with self._database.transaction(durable=False) as database:
            database.execute(
                "INSERT INTO sessions (id, request, called) VALUES (?, ?, ?)",
                (session_id, as_json(request), time.time()),
            )

    def hang_up(self, session_id: str) -> None:
        """A session is over, or given up."""
        with self._database.transaction(durable=False) as database:
            database.execute("DELETE FROM sessions WHERE id = ?", (session_id,))

    def claim(self, worker: str) -> bool:
        """Whether this worker, which makes a video, is to put it aside for a session: of several workers one
        is, and none where another has been free for it. One that becomes free meanwhile may still answer."""
        late = time.time() - _GRACE_SECONDS
        open_to = "worker IS NULL AND (claimed IS NULL OR claimed = ?) AND called < ?"
        with self._database.reading() as database:
            found = database.execute(
                f"SELECT 1 FROM sessions WHERE {open_to} LIMIT 1", (worker, late)
            ).fetchone()
        if found is None:
            return False
        with self._database.transaction(durable=False) as database:
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
        with self._database.reading() as database:
            called = database.execute("SELECT 1 FROM sessions WHERE worker IS NULL LIMIT 1").fetchone()
        if called is None:
            return None
        with self._database.transaction(durable=False) as database:
            row = database.execute(
                "UPDATE sessions SET worker = ? WHERE number = "
                "(SELECT MIN(number) FROM sessions WHERE worker IS NULL) RETURNING id, request",
                (worker,),
            ).fetchone()
        return None if row is None else {"id": row["id"], **json.loads(row["request"])}
