"""Work on strangers' files in processes of their own."""

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from serving import until
from stableavatar.errors import InputError, StoppedError
from stableavatar.jobs.apart import BrokenFileError, run_apart

_SERVER = """
import sys

from fastapi import FastAPI

from stableavatar.apps.console import end_on_terminate
from stableavatar.apps.running import listen, run_with_workers
from stableavatar.jobs.apart import run_apart
from stableavatar.jobs.store import JobStore
from stableavatar.jobs.workers import Workers

class NoWorkers(Workers):
    def wait(self, seconds=None):
        return True

app = FastAPI()

@app.get("/")
def work():
    print("begun", flush=True)
    run_apart(exec, "import time; time.sleep(3600)", seconds=3600)

end_on_terminate()
listener, url = listen("127.0.0.1", 0)
print(url, flush=True)
workers = NoWorkers(JobStore(sys.argv[1]), [])
run_with_workers(app, workers, listener=listener, save_seconds=20.0, keep_seconds=None, most_message=1000)
"""


def twice(value: int) -> int:
    return 2 * value


def refused() -> None:
    raise InputError("no sound")


def lost() -> None:
    os._exit(3)


def greedy() -> int:
    return len(bytearray(8 * 2**30))


def test_what_it_gives_and_raises_is_given_and_raised_here() -> None:
    assert run_apart(twice, 4, seconds=60) == 8
    with pytest.raises(InputError, match="no sound"):
        run_apart(refused, seconds=60)


def test_what_breaks_it_or_keeps_it_busy_ends_it_alone() -> None:
    with pytest.raises(BrokenFileError, match="broke off"):
        run_apart(lost, seconds=60)
    began = time.monotonic()
    with pytest.raises(BrokenFileError, match="more than 1 s"):
        run_apart(time.sleep, 600, seconds=1)
    assert time.monotonic() - began < 60


def test_it_is_given_up_where_somebody_says_so() -> None:
    began = time.monotonic()
    with pytest.raises(StoppedError):
        run_apart(time.sleep, 600, seconds=600, stop=lambda: time.monotonic() - began > 1)
    assert time.monotonic() - began < 60


def test_a_server_ends_though_such_work_would_go_on_for_hours(tmp_path: Path) -> None:
    server = subprocess.Popen([sys.executable, "-c", _SERVER, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        threading.Thread(target=ask, args=(url,), daemon=True).start()
        assert server.stdout.readline() == "begun\n"
        until(lambda: len(psutil.Process(server.pid).children()) > 0)
        server.terminate()
        server.wait(60)
    finally:
        server.kill()
        server.wait()


def ask(url: str) -> None:
    with suppress(httpx.TransportError):  # it ends
        httpx.get(url, timeout=3600)


def test_its_memory_is_bounded() -> None:
    with pytest.raises(MemoryError):
        run_apart(greedy, seconds=60)
