"""A job's video for a browser: while it is made, complete, and as a small picture."""

import asyncio
import contextlib
import io
import threading
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import anyio.to_thread
import numpy as np
from fastapi.responses import FileResponse, Response, StreamingResponse
from numpy.typing import NDArray
from PIL import Image
from starlette.types import Receive, Scope, Send

from stableavatar.errors import InputError, StableAvatarError
from stableavatar.jobs.job import Job
from stableavatar.jobs.store import JobStore
from stableavatar.media.audio import Sound
from stableavatar.media.following import follow
from stableavatar.media.reading import read_frames
from stableavatar.options import GenerateOptions
from stableavatar.unfinished import journal_folder

_LOOK_SECONDS = 0.1
_THUMBNAIL = 256  # pixels of its longer side


class ManyWatchError(StableAvatarError):
    """So many watch videos in the making that another one would take the others' share of this machine."""


class Viewers:
    """Who watches videos in the making: each is sent a video of his own, with its sound encoded anew.

    Args:
        most, most_each: at a time, of all owners and of one.
    """

    def __init__(self, most: int = 48, most_each: int = 8) -> None:
        self._most, self._most_each = most, most_each
        self._watching: dict[object, str] = {}  # owners
        self._lock = threading.Lock()

    def come(self, owner: str) -> Callable[[], None]:
        """One more watches, until what is returned is called. Raises ManyWatchError: too many do already."""
        place = object()
        with self._lock:
            watching = Counter(self._watching.copy().values())
            if watching[owner] >= self._most_each or watching.total() >= self._most:
                raise ManyWatchError("Too many watch videos in the making. Ask again in a moment.")
            self._watching[place] = owner

        def go() -> None:  # without the lock: what nobody has any more may be found out while it is held
            self._watching.pop(place, None)

        return go

    def live_response(self, store: JobStore, job: Job, gone: Response) -> Response:
        """The video while it is made, from its beginning on, as fragmented MP4; once it is complete, its
        file.

        Args:
            gone: the answer where it was deleted meanwhile.

        Raises:
            ManyWatchError: too many watch already.
        """
        if job.is_finished and job.video is not None:
            return video_response(job, job.video, gone, live=True)
        return _LiveVideo(_live_bytes(store, job), self.come(job.owner))


class _LiveVideo(StreamingResponse):
    """A video in the making; `ended` is called once, also where nothing of it is ever sent."""

    def __init__(self, pieces: AsyncGenerator[bytes], ended: Callable[[], None]) -> None:
        super().__init__(pieces, media_type="video/mp4", headers={"Cache-Control": "no-store"})
        self._pieces = pieces
        self._ended = weakref.finalize(self, ended)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._pieces):
                await super().__call__(scope, receive, send)
        finally:
            self._ended()


def video_response(job: Job, path: Path, gone: Response, *, live: bool = False) -> Response:
    """The file of the video, or the bytes that the browser asks for.

    Args:
        gone: the answer where it was deleted meanwhile.
        live: at the address where it was while it was made: to be shown, and not kept.
    """
    if live:
        return _VideoFile(path, gone, media_type="video/mp4", headers={"Cache-Control": "no-store"})
    return _VideoFile(path, gone, media_type="video/mp4", filename=f"{job.id}.mp4")


def thumbnail(path: Path) -> Image.Image:
    """The video's first frame, small."""
    with contextlib.closing(read_frames(path)) as frames:
        return small(next(frames))


def small(picture: NDArray[np.uint8]) -> Image.Image:
    """A picture [H, W, 3], small."""
    made = Image.fromarray(picture)
    made.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return made


def thumbnail_response(path: Path) -> Response:
    """The same as JPEG."""
    file = io.BytesIO()
    thumbnail(path).save(file, "JPEG", quality=90)
    return Response(file.getvalue(), media_type="image/jpeg")


class _VideoFile(FileResponse):
    """A file that may be deleted before its first byte is sent."""

    def __init__(self, path: Path, gone: Response, **about: Any) -> None:
        super().__init__(path, **about)
        self._gone = gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except RuntimeError:
            if Path(self.path).exists():
                raise
            await self._gone(scope, receive, send)


async def _live_bytes(store: JobStore, job: Job) -> AsyncGenerator[bytes]:
    """See `media.following.follow`."""

    def current() -> Job | None:
        return store.get(job.owner, job.id)

    def ended() -> bool:
        now = current()
        return now is None or now.is_finished

    def complete() -> Path | None:
        now = current()
        return now.video if now is not None and now.is_finished else None

    def pieces() -> Generator[bytes, None, None]:
        options = job.options
        sound = None
        if job.speech is not None:
            sound = Sound(job.speech, options["start"], options["duration"])
        rate = GenerateOptions(fps=options["fps"]).frame_rate
        yield from follow(journal_folder(job.output), complete, ended, fps=rate, sound=sound)

    making = pieces()
    try:
        while True:
            piece = await anyio.to_thread.run_sync(_next, making)
            if piece is None:
                return
            if piece:
                yield piece
            else:
                await asyncio.sleep(_LOOK_SECONDS)
    finally:
        with contextlib.suppress(ValueError):  # a thread is still in it: its end comes with that thread's
            making.close()


def _next(pieces: Iterator[bytes]) -> bytes | None:
    try:
        return next(pieces, None)
    except InputError:  # it was stopped before its first frame, or its speech cannot be read on
        return None
