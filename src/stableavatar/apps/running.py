"""Running a web application together with the workers that make its videos."""

import contextlib
import logging
import os
import socket
import sqlite3
import tempfile
import threading
import time
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from stableavatar.apps.arriving import upload_folder
from stableavatar.errors import CheckpointError, InputError
from stableavatar.jobs.apart import ENDING
from stableavatar.jobs.store import JobStore
from stableavatar.jobs.workers import Workers
from stableavatar.media.files import reason_of

logger = logging.getLogger(__name__)

THREADS = 100
"""Requests at once that read or write files, or wait until theirs are looked at."""

_BACKLOG = 2048
_CLOSE_SECONDS = 5  # that answers that go on may take after the server is told to end
_EXPIRE_SECONDS = 60.0
_LOOK_SECONDS = 0.1
_UPLOAD_SECONDS = 86_400.0
_MOST_FILES = 65_536


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """Have a port, 0 for any that is free, and its URL for a browser on this machine.

    Raises:
        InputError: it is another program's, or there is no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends at once (TCP_NODELAY) only where the protocol is named: else an answer's last piece waits,
    # 40 ms on Linux, until what came before it is acknowledged.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)  # at once: two can bind, one can listen
    except OSError as error:
        listener.close()
        raise InputError(
            f"{host}, port {port}: cannot be listened at ({reason_of(error)}). "
            "Choose another --port or --host."
        ) from error
    near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    shown = f"[{near}]" if family == socket.AF_INET6 else near
    return listener, f"http://{shown}:{listener.getsockname()[1]}"


def keep_temporary_files(store: JobStore) -> None:
    """Have temporary files, such as uploads and resampled recordings, beside the jobs, whose disk's room is
    looked at, unless TMPDIR says where; of this process and of those that it starts from here on."""
    if "TMPDIR" not in os.environ:
        os.environ["TMPDIR"] = str(store.temporary)
        tempfile.tempdir = None


def run_with_workers(
    app: ASGIApp,
    workers: Workers,
    *,
    listener: socket.socket,
    save_seconds: float,
    keep_seconds: float | None,
    forget_seconds: float | None = None,
    most_message: int,
) -> None:
    """Serve until told to end (SIGTERM, Ctrl-C); workers then save what they are making.

    Args:
        listener: of `listen`; closed at the end.
        save_seconds: what they have for it. keep_seconds: finished videos are removed after so long; None:
            never. forget_seconds: the same of what was asked for and has no video.
        most_message: bytes of a message to a WebSocket.

    Raises:
        CheckpointError: the model cannot be loaded.
    """
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="info" if workers.verbosity else "warning",
            timeout_graceful_shutdown=_CLOSE_SECONDS,
            server_header=False,
            ws_max_size=most_message,
            ws_per_message_deflate=False,
        )
    )
    failed: list[CheckpointError] = []
    ended = threading.Event()

    def wait_for_model() -> None:
        try:
            while not ended.is_set() and not workers.wait(1.0):
                pass
        except CheckpointError as error:
            failed.append(error)
            server.should_exit = True

    def expire() -> None:
        while not ended.wait(_EXPIRE_SECONDS):
            try:
                if keep_seconds is not None:
                    workers.store.expire(keep_seconds)
                if forget_seconds is not None:
                    workers.store.expire_without_video(forget_seconds)
            except sqlite3.Error as error:
                logger.error("videos cannot be removed (%s)", error)
            _remove_broken_uploads(upload_folder())

    def end_workers_too() -> None:
        while not ended.wait(_LOOK_SECONDS):
            if server.should_exit:  # answers may go on for a while; workers need not wait for them
                ENDING.set()
                workers.tell_to_end()
                return

    _open_many_files()
    ENDING.clear()
    try:
        workers.start()
        for task in (wait_for_model, expire, end_workers_too):
            threading.Thread(target=task, daemon=True).start()
        server.run([listener])
    finally:
        listener.close()
        ended.set()
        ENDING.set()
        workers.stop(save_seconds)
    if failed:
        raise failed[0]


def _open_many_files() -> None:
    """Let this process, and its workers, have as many open as they may: every connection is one, and shells
    give few to who does not ask."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _remove_broken_uploads(folder: Path) -> None:
    """Gradio knows nothing of files that were being sent to it when their sender went away, and leaves the
    folders of those that it removes."""
    before = time.time() - _UPLOAD_SECONDS
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < before:
                path.rmdir() if path.is_dir() else path.unlink()  # folders, where they are empty
