"""A run's folder: its own while the run lasts, and one for all its processes."""

import contextlib
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from accelerate.utils import broadcast_object_list

from stableavatar.errors import InputError
from stableavatar.media.files import locked, reason_of, unlock
from stableavatar.training.devices import everywhere

_LOCK = ".lock"
# Storage that machines share may show one of them later what another has written.
_PATIENCE_SECONDS = 60.0


class RunFolder:
    """The folder of a run; `leads` on the first of its processes.

    Two runs in one would remove each other's checkpoints, and machines that do not share it would find that
    out at the first of them.
    """

    def __init__(self, folder: Path, *, leads: bool) -> None:
        self.folder = folder
        self.leads = leads
        self._holds = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """It is this run's, to the end of the outermost of such blocks; entered on every process.

        Raises:
            InputError: another training runs in it, it cannot be written, or some process sees another one.
        """
        if self._holds:
            yield
            return
        lock: IO[bytes] | None = None
        told = ["", ""]
        if self.leads:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = locked(self.folder / _LOCK)
                told[1] = secrets.token_hex(16)
                lock.truncate(0)
                lock.write(told[1].encode())
                lock.flush()
            except BlockingIOError:
                told[0] = (
                    f"a training runs in {self.folder}: wait until it has ended, or choose another folder"
                )
            except OSError as error:
                told[0] = f"output {self.folder}: the folder cannot be written ({reason_of(error)})"
        fault, word = broadcast_object_list(told)
        try:
            if fault:
                raise InputError(fault)
            blind = [
                rank for rank, sees in enumerate(everywhere(_appears(self.folder / _LOCK, word))) if not sees
            ]
            if blind:
                raise InputError(
                    f"process {blind[0]} does not see what the first one writes to {self.folder}: they need "
                    "storage that all machines share"
                )
            self._holds = True
            yield
        finally:
            self._holds = False
            if lock is not None:
                unlock(lock)


def _appears(file: Path, word: str) -> bool:
    """Whether a file holds a word, now or soon."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if file.read_text(encoding="utf-8") == word:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
