"""Somebody speaks, and sees himself speak as another: speech in pieces from a server to a worker, and the
video back while it is made.

The server calls (`SessionLine.open`), a worker answers and connects to it; between the two go messages of a
letter and its content, in both directions at once. What is said waits in a file until the worker takes it: a
client is heard however far behind the worker is. Nothing of a session is kept.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from stableavatar.choices import Preset
from stableavatar.errors import StableAvatarError, StoppedError, is_out_of_memory
from stableavatar.jobs.intake import without_folder

if TYPE_CHECKING:
    from stableavatar.generation import Progress
    from stableavatar.jobs.store import JobStore
    from stableavatar.media.audio import Samples
    from stableavatar.pipeline import AvatarPipeline

logger = logging.getLogger(__name__)

# To the worker: samples, 16-bit little-endian mono; that no more come.
SPEECH, END = b"s", b"e"
# From it: bytes of the video; how far it is; why there is no more (HTTP's status and a sentence); that it is
# complete.
VIDEO, PROGRESS, ERROR, DONE = b"v", b"p", b"x", b"d"

_FULL_SCALE = 32768.0
_RETRY_SECONDS = 0.1
_WAKE_SECONDS = 1.0
_PASSED_ON = 2**16  # bytes of speech in a message, an even number
# Time for pictures is short.
_PRESET: Preset = "veryfast"


class Session:
    """A session as the server has it: a line, and a worker at the other end once one has answered. What is
    said before waits for it.

    Args:
        spool: a file for what is said and not taken yet. most: bytes of speech that are taken.
    """

    def __init__(self, hang_up: Callable[[], None], spool: BinaryIO, most: int) -> None:
        self._connection: Connection | None = None
        self._hang_up = hang_up
        self._spool = spool
        self._most = most
        self._said, self._passed_on = 0, 0  # bytes
        self._complete, self._closed = False, False
        self._changed = threading.Condition()

    @property
    def answered(self) -> bool:
        """Whether a worker has taken it."""
        return self._connection is not None

    def answer(self, connection: Connection) -> None:
        """A worker is there."""
        with self._changed:
            if self._closed:
                connection.close()
                return
            self._connection = connection
            self._changed.notify_all()
        threading.Thread(target=self._pass_on, args=(connection,), daemon=True).start()

    def wait(self, patience: float) -> bool:
        """Until a worker is there, at most so many seconds; whether one is. Ends when the session is
        closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self.answered, patience)
            return self.answered

    def say(self, samples: bytes) -> None:
        """Samples for the worker, 16-bit little-endian mono; it is not waited for. What is beyond the
        session's length is left out. Raises OSError: the disk is full."""
        with self._changed:
            if self._spool.closed:  # the worker takes no more: it says why
                return
            taken = samples[: self._most - self._said]
            self._spool.seek(self._said)
            self._spool.write(taken)
            self._spool.flush()
            self._said += len(taken)
            self._changed.notify_all()

    def end_speech(self) -> None:
        """No more is said."""
        with self._changed:
            self._complete = True
            self._changed.notify_all()

    def _pass_on(self, worker: Connection) -> None:
        """What was said, to the worker, as it takes it."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._complete or self._said - self._passed_on > 1)
                    self._spool.seek(self._passed_on)
                    piece = self._spool.read(min(_PASSED_ON, (self._said - self._passed_on) & ~1))
                    self._passed_on += len(piece)
                if not piece:
                    worker.send_bytes(END)
                    return
                worker.send_bytes(SPEECH + piece)
        except OSError:  # the worker, or the client, has gone
            pass
        finally:
            with self._changed, contextlib.suppress(OSError):  # of what the disk had no room for
                self._spool.close()

    def receive(self) -> tuple[bytes, bytes] | None:
        """The next message, waited for; None where the worker has ended. For a session that was answered."""
        assert self._connection is not None
        try:
            message = self._connection.recv_bytes()
        except (EOFError, OSError):
            return None
        return message[:1], message[1:]

    def close(self) -> None:
        """Hang up: a worker in the middle of the video stops, and who waits in `receive` need not wait on."""
        with self._changed:
            self._closed = True
        try:
            self._close_line()
        finally:
            self._hang_up()

    def _close_line(self) -> None:
        self.end_speech()
        if self._connection is None:
            with contextlib.suppress(OSError):  # of what the disk had no room for
                self._spool.close()
            return
        with contextlib.suppress(OSError):
            if hasattr(socket, "AF_UNIX"):  # closing alone wakes nobody
                with socket.socket(fileno=os.dup(self._connection.fileno())) as line:
                    line.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class SessionLine:
    """Where workers connect to, for the server."""

    def __init__(self, store: "JobStore") -> None:
        self._store = store
        self._key = secrets.token_bytes(32)
        self._listener = Listener(authkey=self._key)
        self._waiting: dict[str, Session] = {}
        self._closing = False
        threading.Thread(target=self._accept, daemon=True).start()

    def open(self, folder: Path, options: Mapping[str, Any], rate: int, most_seconds: float) -> Session:
        """Call a worker, which `Session.wait` waits for.

        Args:
            folder: with the portrait; it is removed at the session's end.
            options: of `AvatarPipeline.generate`, and "quality". rate: samples a second of the speech.
            most_seconds: after which it ends.

        Raises:
            OSError: the disk is full.
        """
        session_id = folder.name

        def hang_up() -> None:
            self._waiting.pop(session_id, None)
            shutil.rmtree(folder, ignore_errors=True)
            try:
                self._store.calls.hang_up(session_id)
            except sqlite3.Error as error:  # a worker that still answers finds nobody
                logger.warning("%s: %s", session_id, error)

        spool = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (the session closes it)
        session = Session(hang_up, spool, round(most_seconds * rate) * 2)
        self._waiting[session_id] = session
        try:
            self._store.calls.call(
                session_id,
                {
                    "address": self._listener.address,
                    "key": self._key.hex(),
                    "folder": str(folder),
                    "options": dict(options),
                    "rate": rate,
                    "most_seconds": most_seconds,
                },
            )
        except BaseException:
            session.close()
            raise
        return session

    def close(self) -> None:
        """Take no more."""
        self._closing = True
        waking = threading.Thread(target=self._wake, daemon=True)
        waking.start()
        waking.join(_WAKE_SECONDS)  # nobody may accept it any more: then closing ends it
        self._listener.close()

    def _wake(self) -> None:
        """What waits in `accept`."""
        with contextlib.suppress(OSError, EOFError, AuthenticationError):
            Client(self._listener.address, authkey=self._key).close()

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection = self._listener.accept()
                session_id = connection.recv_bytes().decode()
            except (AuthenticationError, EOFError, ValueError):
                continue
            except OSError:  # such as too many open files, until some are closed
                time.sleep(_RETRY_SECONDS)
                continue
            session = self._waiting.pop(session_id, None)
            if session is None:
                connection.close()
            else:
                session.answer(connection)


def speak(
    request: Mapping[str, Any], pipeline: "AvatarPipeline", ending: Callable[[], bool] = lambda: False
) -> None:
    """A worker's part of a session, from its answer to the call to the end."""
    folder = Path(request["folder"])
    try:
        connection = Client(request["address"], authkey=bytes.fromhex(request["key"]))
    except (OSError, EOFError, AuthenticationError):
        return  # given up meanwhile
    with connection:
        try:
            connection.send_bytes(request["id"].encode())
            frames = _speak(request, folder, connection, pipeline, ending)
            connection.send_bytes(DONE + json.dumps({"frames": frames}).encode())
        except (OSError, EOFError):
            logger.info("%s: hung up", request["id"])
        except StoppedError:
            _fail(connection, 503, "The server ends.")
        except StableAvatarError as error:
            _fail(connection, 400, without_folder(str(error), folder))
        except Exception as error:
            logger.exception("%s", request["id"])
            if is_out_of_memory(error):
                _fail(connection, 503, "There is too little memory for this.")
            else:
                _fail(connection, 500, "A fault of the server.")


def _speak(
    request: Mapping[str, Any],
    folder: Path,
    connection: Connection,
    pipeline: "AvatarPipeline",
    ending: Callable[[], bool],
) -> int:
    from stableavatar.media.live import LiveRecording
    from stableavatar.options import OutputOptions

    options = dict(request["options"])
    quality = options.pop("quality")
    rate, most = request["rate"], request["most_seconds"]

    def blocks() -> Iterator["Samples"]:
        left = round(most * rate)
        while left > 0:
            while not connection.poll(0.2):
                if ending():
                    raise StoppedError("The server ends.")
            message = connection.recv_bytes()
            if message[:1] == END:
                return
            samples = np.frombuffer(message[1:], dtype="<i2").astype(np.float32) / _FULL_SCALE
            yield samples[:left]
            left -= len(samples)

    def report(progress: "Progress") -> None:
        said = {"frame": progress.frame, "window": progress.window, "step": progress.step}
        connection.send_bytes(PROGRESS + json.dumps(said).encode())

    video = pipeline.generate(
        folder / "portrait",
        LiveRecording(blocks(), rate, name="speech"),
        _Line(connection),
        output_options=OutputOptions(quality=quality, preset=_PRESET, live=True),
        stop=ending,
        progress=report,
        **options,
    )
    return video.frame_count


class _Line:
    """The bytes of the video as messages."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def write(self, data: bytes, /) -> int:
        """Send a piece."""
        self._connection.send_bytes(VIDEO + bytes(data))
        return len(data)


def _fail(connection: Connection, status: int, text: str) -> None:
    with contextlib.suppress(OSError):
        connection.send_bytes(ERROR + json.dumps({"status": status, "message": text}).encode())
