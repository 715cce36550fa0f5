"""The one download of weights that the page has at a time, which every open page sees and may stop."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from stableavatar.errors import StableAvatarError
from stableavatar.lifetimes import end_with_parent

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Going:
    """How far a download is.

    Attributes:
        done, total: bytes; both 0 while it is asked which files there are.
        ended: whether nothing will change any more.
        error: why it broke off, None where it did not. An empty one: nobody knows.
        stopped: somebody stopped it.
    """

    done: int = 0
    total: int = 0
    ended: bool = False
    error: str | None = None
    stopped: bool = False


class Downloads:
    """Downloads into a folder, one at a time, in a process of its own: the library's threads cannot be ended.

    Args:
        folder: where weights are put.

    Attributes:
        choice: what was chosen of the last one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.choice: tuple[str, ...] = ()
        self._going: Going | None = None
        self._process: SpawnProcess | None = None
        self._lock = threading.Lock()

    @property
    def going(self) -> Going | None:
        """How far the last one is; None where there was none."""
        return self._going

    def begin(self, download: Callable[..., Path], choice: Sequence[str]) -> bool:
        """Begin one, with `download(folder, *choice, progress=...)`; whether it was begun: another one may be
        going on."""
        with self._lock:
            if self._going is not None and not self._going.ended:
                return False
            here, there = get_context("spawn").Pipe(duplex=False)
            with there:
                process = get_context("spawn").Process(
                    target=_download, args=(there, download, self.folder, tuple(choice)), daemon=True
                )
                try:
                    process.start()
                except BaseException:
                    here.close()
                    raise
            self._process, self._going, self.choice = process, Going(), tuple(choice)
        threading.Thread(target=self._follow, args=(here, self._process), daemon=True).start()
        return True

    def stop(self) -> bool:
        """Stop the one that is going on; what is whole is kept. Whether there was one."""
        with self._lock:
            if self._going is None or self._going.ended or self._process is None:
                return False
            self._going = Going(ended=True, stopped=True)
            self._process.kill()
            return True

    def close(self) -> None:
        """At the page's end."""
        self.stop()

    def _follow(self, here: Connection, process: SpawnProcess) -> None:
        ended = Going(ended=True, error="")
        try:
            while isinstance(told := here.recv(), tuple):
                self._tell(process, Going(*told))
            ended = Going(ended=True, error=told)
        except (EOFError, OSError):
            logger.warning("the download was lost")
        finally:
            self._tell(process, ended)
        process.kill()
        process.join()
        here.close()

    def _tell(self, process: SpawnProcess, going: Going) -> None:
        with self._lock:  # of one that was stopped, another may have been begun meanwhile
            if self._process is process and self._going is not None and not self._going.stopped:
                self._going = going


def _download(page: Connection, download: Callable[..., Path], folder: Path, choice: Sequence[str]) -> None:
    """Tells the page how many bytes of how many are there, at last None, or what went wrong."""
    end_with_parent()
    try:
        download(folder, *choice, progress=lambda *there: page.send(there))
    except StableAvatarError as error:
        page.send(str(error))
    else:
        page.send(None)
