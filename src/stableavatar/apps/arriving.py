"""What is being sent: counted as it comes, and room on the disk for it."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import Message, Receive

from stableavatar.jobs.quotas import LEAST_ROOM
from stableavatar.jobs.store import JobStore

# A request of which nothing comes for so long is given up: room is kept for it, and it is one of few.
_SILENT_SECONDS = 30.0


class Arriving:
    """Keeps room for what arrives at a time. What of it is on the disk already counts twice, to be safe."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._bytes = 0

    def has_room(self, comes: int) -> bool:
        """Whether so many bytes have room beside those that arrive already, where they arrive and where they
        are kept."""
        comes += self._bytes
        return self._store.free_bytes() - comes >= LEAST_ROOM and comes <= _free_to_arrive()

    @contextmanager
    def kept(self, comes: int) -> Iterator[None]:
        """Room for them while they arrive."""
        self._bytes += comes
        try:
            yield
        finally:
            self._bytes -= comes


def counted(receive: Receive, most: int, too_much: Callable[[], Exception]) -> Receive:
    """What a request brings, up to the end of its body; what comes then is no matter of size or time.

    Args:
        most: bytes; of more, what `too_much` gives is raised.

    Raises:
        HTTPException: when it is asked for the next piece: none came for a while (408).
    """
    taken, complete = 0, False

    async def receive_counted() -> Message:
        nonlocal taken, complete
        if complete:  # who asks on waits for the client to go
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), _SILENT_SECONDS)
        except TimeoutError:
            words = f"nothing came for {_SILENT_SECONDS:g} s"
            raise HTTPException(408, words, {"Connection": "close"}) from None
        taken += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if taken > most:
            raise too_much()
        return message

    return receive_counted


def announced_bytes(request: HTTPConnection, most: int) -> int:
    """How many bytes a request says that it has; `most` where it says nothing that can be read."""
    length = request.headers.get("content-length", "")
    # Of numbers that are too long for `int`, the beginning is too much already.
    return int(length[:20]) if length.isascii() and length.isdecimal() else most


def upload_folder() -> Path:
    """Where Gradio has what it is sent, as `gradio.utils.get_upload_folder` says it; the server's forms are
    on the same disk."""
    return Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio")


def _free_to_arrive() -> int:
    """Bytes of room where files arrive, which with TMPDIR is another disk than that of the jobs."""
    folder = upload_folder().absolute()
    return shutil.disk_usage(next(it for it in (folder, *folder.parents) if it.exists())).free
