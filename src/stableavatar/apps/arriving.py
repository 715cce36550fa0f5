"""Room on the disk for files that are being sent."""

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import HTTPConnection

from stableavatar.jobs.quotas import LEAST_ROOM
from stableavatar.jobs.store import JobStore


class Arriving:
    """Keeps room for what arrives at a time. What of it is on the disk already counts twice, to be safe."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._bytes = 0

    def has_room(self, comes: int) -> bool:
        """Whether so many bytes have room beside those that arrive already."""
        return self._store.free_bytes() - self._bytes - comes >= LEAST_ROOM

    @contextmanager
    def kept(self, comes: int) -> Iterator[None]:
        """Room for them while they arrive."""
        self._bytes += comes
        try:
            yield
        finally:
            self._bytes -= comes


def announced_bytes(request: HTTPConnection, most: int) -> int:
    """How many bytes a request says that it has; `most` where it says nothing that can be read."""
    length = request.headers.get("content-length", "")
    # Of numbers that are too long for `int`, the beginning is too much already.
    return int(length[:20]) if length.isascii() and length.isdecimal() else most
