"""How many videos may wait and be kept, of all and of one owner."""

import math
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from stableavatar.errors import InputError, StableAvatarError

# Bytes that have to be free where jobs are kept: below, none is taken and none is made.
LEAST_ROOM = 1_000_000_000


class QueueFullError(StableAvatarError):
    """So many jobs are waiting, or so much is kept, that another one is not taken."""


class NoRoomError(StableAvatarError):
    """There is too little room on the disk to begin a video."""


@dataclass(frozen=True)
class Quotas:
    """What is taken at most.

    Attributes:
        waiting: jobs that wait, of all owners.
        waiting_each: jobs that wait, of one.
        kept_each: jobs of one owner that are there.
        bytes_each: of the files of these jobs, what was sent for them included.
    """

    waiting: int = 100
    waiting_each: int = 20
    kept_each: int = 500
    bytes_each: int = 20_000_000_000

    def __post_init__(self) -> None:
        for f in fields(self):
            check_limit(f.name, getattr(self, f.name))

    def check(self, database: sqlite3.Connection, owner: str) -> None:
        """Raise QueueFullError where another job of this owner is one too many."""
        waiting = "SELECT COUNT(*) FROM jobs WHERE state = 'queued' AND NOT deleted"
        everybody = database.execute(waiting).fetchone()[0]
        own = database.execute(f"{waiting} AND owner = ?", (owner,)).fetchone()[0]
        if own >= self.waiting_each:
            raise QueueFullError(
                f"{own} of your videos are waiting already. Ask again when one is made, or delete one."
            )
        if everybody >= self.waiting:
            raise QueueFullError("Too many videos are waiting. Ask again later.")
        kept = "SELECT COUNT(*) FROM jobs WHERE owner = ? AND NOT deleted"
        if database.execute(kept, (owner,)).fetchone()[0] >= self.kept_each:
            raise QueueFullError(f"{self.kept_each} videos of yours are kept. Delete some first.")

    def check_bytes(self, folders: Iterable[Path]) -> None:
        """Raise QueueFullError where an owner's jobs, which lie in these folders, take too many bytes."""
        files: dict[tuple[int, int], int] = {}  # one that several jobs have is there once
        for path in (path for folder in folders for path in folder.rglob("*")):
            with suppress(OSError):  # removed meanwhile
                found = path.stat()
                files[found.st_dev, found.st_ino] = found.st_size
        taken = sum(files.values())
        if taken >= self.bytes_each:
            raise QueueFullError(
                f"Your videos, and what you sent for them, take {taken / 1e9:.1f} GB. Delete some first."
            )


def check_limit(name: str, value: float) -> None:
    """Raise InputError where a limit is none."""
    if not 0 < value < math.inf:
        raise InputError(f"{name.replace('_', '-')} {value}: give a number above 0, and finite")
