"""`stableavatar serve` as an operator starts it: a process with its workers."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from command_line import portrait, speech, toy_model

QUICK = {"steps": "2", "text_scale": "1", "audio_scale": "1", "size": "48x48"}


class Server:
    """`stableavatar serve` with the toy model."""

    def __init__(self, folder: Path, *arguments: str, model: str | Path | None = None) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "stableavatar", "serve", "--folder", str(folder), "--port", "0",
                "--model", str(model or toy_model()), "--name", "toy", "--device", "cpu", "--checkpoint-every", "0", *arguments,
            ],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )  # fmt: skip
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.said.extend(self.process.stderr)

    @property
    def url(self) -> str:
        """Where it says that it listens."""
        said = next(line for line in self.said if line.startswith("http://"))
        return said[: said.index("/docs")]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def wait_ready(self) -> "Server":
        def ready() -> bool:
            assert self.process.poll() is None, self.said
            if not self.said:
                return False
            try:
                return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        until(ready, 120)
        return self

    def family(self) -> list[psutil.Process]:
        """The processes that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        """kill -9 of the server alone, as a system that is short of memory does."""
        family = self.family()
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive, alive

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def servers_of(folder: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers of one folder, and kills what is left of them."""
    started: list[Server] = []

    def start(*arguments: str, model: str | None = None) -> Server:
        started.append(Server(folder, *arguments, model=model))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.kill()


def files_to_send(folder: Path) -> dict[str, bytes]:
    """A portrait and three seconds of speech."""
    return {
        "portrait": portrait(folder / "portrait.png").read_bytes(),
        "speech": speech(folder / "speech.wav", 3.0).read_bytes(),
    }


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def states(server: Server) -> dict[str, dict[str, Any]]:
    return {it["id"]: it for it in httpx.get(f"{server.url}/v1/videos?limit=100", timeout=30).json()["data"]}
