"""Work on strangers' files in processes of their own, with bounded memory and time: a file that crashes a
library, or keeps it busy for ever, takes nothing else along."""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from stableavatar.errors import StableAvatarError, StoppedError
from stableavatar.lifetimes import end_with_parent

# Enough for the largest picture that is taken by default, and the libraries.
_MEMORY = 6 * 2**30
_LOOK_SECONDS = 0.2
# Set when this process is told to end, which would wait for the threads that wait for such work.
ENDING = threading.Event()


class BrokenFileError(StableAvatarError):
    """What worked on a file broke off, or was made to: it took too long."""


def start_process() -> ProcessPoolExecutor:
    """A process for such work, started when there is some."""
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_confine)


def kill_process(pool: ProcessPoolExecutor) -> None:
    """End it, whatever it is doing."""
    for process in list((pool._processes or {}).values()):
        process.kill()
    # Waited for, which is soon: else its thread may outlive it, and is woken in vain at the exit.
    pool.shutdown(wait=True, cancel_futures=True)


def run_apart(
    work: Callable[..., Any], *arguments: Any, seconds: float, stop: Callable[[], bool] = lambda: False
) -> Any:
    """What `work` returns, of a process of its own; its errors are raised here.

    Args:
        stop: asked now and then whether to give it up.

    Raises:
        BrokenFileError: it took more than so many seconds, or was lost.
        StoppedError: `stop` said so, or this process ends.
    """
    pool = start_process()
    until = time.monotonic() + seconds
    try:
        made = pool.submit(work, *arguments)
        while not wait([made], min(_LOOK_SECONDS, max(until - time.monotonic(), 0.0))).done:
            if ENDING.is_set() or stop():
                raise StoppedError("Stopped.")
            if time.monotonic() >= until:
                raise BrokenFileError(f"it took more than {seconds:g} s")
        return made.result()
    except BrokenProcessPool as error:
        raise BrokenFileError("it broke off") from error
    finally:
        kill_process(pool)


def _confine() -> None:
    end_with_parent()
    with contextlib.suppress(ImportError):  # Windows has none
        import resource

        # Of what is written to: libraries of GPUs reserve more addresses than a machine has memory.
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
