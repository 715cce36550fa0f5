"""Worker processes that are there while a server runs: started, started again when one is lost or hangs, and
ended."""

import atexit
import ctypes
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.context import SpawnProcess

from stableavatar.errors import CheckpointError
from stableavatar.jobs.store import JobStore
from stableavatar.jobs.worker import FAULTY, NO_MODEL, ModelChoice, run_worker

logger = logging.getLogger(__name__)

# A worker that is lost at once is not started again at once.
_PAUSES = (0.0, 1.0, 5.0, 20.0, 60.0)
_STEADY_SECONDS = 60.0
_RETRY_SECONDS = 5.0
_LOOK_SECONDS = 1.0
# What is killed and has not ended after this waits within the system, where nothing reaches it.
_DYING_SECONDS = 20.0
# A step of any model takes less on a machine that is fit for it.
HUNG_SECONDS = 3600.0


class Workers:
    """The workers of a store, each with a model of its own.

    Args:
        models: of each worker; several with different devices use several GPUs.
        hung_seconds: one that does not move for so long, as in a driver that never returns, is killed, which
            is a crash like others; None: never.
    """

    def __init__(
        self,
        store: JobStore,
        models: Sequence[ModelChoice],
        *,
        hung_seconds: float | None = HUNG_SECONDS,
        verbosity: int = 0,
    ) -> None:
        self.store = store
        self.hung_seconds = hung_seconds
        self._verbosity = verbosity
        self._ending = threading.Event()
        self._keepers = [_Keeper(self, f"worker-{number}", model) for number, model in enumerate(models)]

    def start(self) -> None:
        """Start them; their models take a while to load."""
        for keeper in self._keepers:
            keeper.thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether one is ready, waited for.

        Raises:
            CheckpointError: no worker could load its model; each has said why.
        """
        pause = threading.Event()
        waited = 0.0
        while not self.store.workers_ready():
            if all(keeper.no_model.is_set() for keeper in self._keepers):
                raise CheckpointError("the model cannot be loaded, see above")
            if seconds is not None and waited >= seconds:
                return False
            pause.wait(0.05)
            waited += 0.05
        return True

    def processes(self) -> list[SpawnProcess]:
        """Those that run."""
        return [it.process for it in self._keepers if it.process is not None and it.process.is_alive()]

    def tell_to_end(self) -> None:
        """Let each save what it is making, and end."""
        self._ending.set()
        for process in self.processes():
            process.terminate()

    def stop(self, seconds: float) -> None:
        """The same, waited for; what has not ended after so long is killed, and loses what it did since it
        saved last."""
        self.tell_to_end()
        until = time.monotonic() + seconds
        for keeper in self._keepers:
            keeper.thread.join(max(until - time.monotonic(), 0.0))
        for process in self.processes():
            process.kill()
        for keeper in self._keepers:
            keeper.thread.join(2 * _DYING_SECONDS)
        given_up = [process for keeper in self._keepers for process in keeper.given_up]
        if stuck := {it for it in given_up if it.is_alive()}.union(self.processes()):
            logger.error("%s do not end", ", ".join(f"{it.name} (process {it.pid})" for it in stuck))
            atexit.register(os._exit, 1)  # else this process would wait for them at its end

    @property
    def ending(self) -> threading.Event:
        """Set when no worker is to be started again."""
        return self._ending

    @property
    def verbosity(self) -> int:
        """How much workers say."""
        return self._verbosity


class _Keeper:
    """Keeps one worker running, in a thread."""

    def __init__(self, workers: Workers, name: str, model: ModelChoice) -> None:
        self._workers = workers
        self._name = name
        self._model = model
        self.process: SpawnProcess | None = None
        self.given_up: list[SpawnProcess] = []  # that did not end when they were killed
        self.no_model = threading.Event()
        self.thread = threading.Thread(target=self._keep, name=name, daemon=True)

    def _keep(self) -> None:
        losses, loaded = 0, False
        ending = self._workers.ending
        while not ending.wait(_PAUSES[min(losses, len(_PAUSES) - 1)]):
            began = time.monotonic()
            try:
                status = self._run()
            except OSError as error:  # such as too little memory for another process
                logger.error("%s cannot be started (%s)", self._name, error)
                status = None
            loaded |= self._settle(crashed=not ending.is_set() and status not in (FAULTY, NO_MODEL))
            if ending.is_set():
                return
            if status == NO_MODEL and not loaded:
                self.no_model.set()
            # Also what could not be loaded: another program may have had the device.
            worked = status != NO_MODEL and time.monotonic() - began > _STEADY_SECONDS
            steady = status == FAULTY or worked
            losses = 0 if steady else losses + 1
            logger.error("%s was lost (exit status %s); another one is started", self._name, status)

    def _run(self) -> int | None:
        """One worker, from its start to its end; its exit status."""
        context = get_context("spawn")
        moves = context.Value("Q", 0, lock=False)
        self.process = context.Process(
            target=run_worker,
            args=(self._name, self._workers.store.folder, self._model, moves, self._workers.verbosity),
            name=self._name,
        )
        self.process.start()
        if self._workers.ending.is_set():  # asked to end while it was started
            self.process.terminate()
        self._watch(self.process, moves)
        return self.process.exitcode

    def _watch(self, process: SpawnProcess, moves: "ctypes.c_ulonglong") -> None:
        """Until it ends, by itself or because, with its model loaded, it does not move."""
        hung, seen, still = self._workers.hung_seconds, moves.value, 0.0
        while process.is_alive():
            process.join(_LOOK_SECONDS)
            # Not by the clock: where all are suspended together, none hangs. Nor while it loads its model,
            # which may come from elsewhere first.
            still = still + _LOOK_SECONDS if moves.value == seen > 0 else 0.0
            seen = moves.value
            if hung is not None and still >= hung:
                logger.error("%s has not moved for %g s: it is killed", self._name, hung)
                process.kill()
                process.join(_DYING_SECONDS)
                if process.is_alive():
                    logger.error("%s does not end; another one takes its place", self._name)
                    self.given_up.append(process)
                return

    def _settle(self, *, crashed: bool) -> bool:
        """Say in the store that the worker is gone; its disk may be full, and have room again later. Whether
        it had loaded its model."""
        while True:
            try:
                return self._workers.store.worker_lost(self._name, crashed=crashed)
            except sqlite3.Error as error:
                logger.error("%s: the jobs cannot be written (%s)", self._name, error)
                if self._workers.ending.wait(_RETRY_SECONDS):
                    return False  # the next server settles it
